"""The served program equals the trained network, and carries code alone."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from deploy import precision as precisions
from deploy.lookup import Columns, Matrices, Matrix, Reader, Split
from deploy.native import level_of
from deploy.precision import PRECISIONS, Fit, Rows
from deploy.program import Precision, ServedNetwork, Shape, save_program, served_network, wide_layers
from deploy.served_program import FILES, Program, load_program
from etl.faults import Fault
from etl.schema import Schema, Table
from recsys.layout import Layout
from recsys.models import MODELS
from recsys.models.wide import WideConfig
from recsys.network import Network
from tests.registry import config_of, id_feature, network_of, random_rows, rich_schema, schema_of

MAX_ROWS = 16
NATIVE = pytest.mark.skipif(level_of("auto") is None, reason="no C++ compiler, or a CPU below x86-64-v3")
NATIVE_KINDS = ("deepfm", "din", "esmm")


def native_program(folder: Path) -> Program:
    """Without its other form, so that it cannot give way."""
    portable = [folder / files.portable for files in FILES.values()]
    for path in portable:
        path.rename(path.with_suffix(".aside"))
    try:
        return load_program(folder)
    finally:
        for path in portable:
            path.with_suffix(".aside").rename(path)


def split_of(schema: Schema) -> Split:
    """A user who is an id, a weighted bag, a history and a number, between columns of the candidates."""
    user = ("user", "tags", "tags:value", "history", "x1")
    sides: dict[bool, list[list[int]]] = {True: [], False: []}
    for names in (schema.slot_names, schema.float_names):
        for side, columns in sides.items():
            columns.append([at for at, name in enumerate(names) if (name in user) == side])
    return Split(Columns(*sides[True]), Columns(*sides[False]))


def saved(network: Network, schema: Schema, folder: Path, *, precision: Precision, level: str | None) -> Path:
    shape = Shape(MAX_ROWS, slots=len(schema.slot_names), floats=len(schema.float_names))
    served = served_network(network, precision, split=split_of(schema))
    save_program(served, folder, shape=shape, level=level)
    return folder


def check_scores(program: Program, network: Network, schema: Schema, *, atol: float) -> None:
    check_rows(program, network, schema, atol=atol)
    check_rankings(program, network, schema, atol=atol)


def check_rankings(program: Program, network: Network, schema: Schema, *, atol: float) -> None:
    """As the rows that they stand for: one user or several, of one candidate or many."""
    assert program.ranked is not None
    user, candidates = split_of(schema)
    for users, user_B in ((1, [0]), (1, [0] * MAX_ROWS), (3, [0, 0, 1, 1, 1, 2]), (4, [0, 1, 2, 3])):
        ids_US, floats_UN = (each[:, columns] for each, columns in zip(random_rows(schema, users), user, strict=True))
        ids_BS, floats_BN = random_rows(schema, len(user_B), seed=len(user_B))
        ids_BS[:, user.ids], floats_BN[:, user.floats] = ids_US[user_B], floats_UN[user_B]
        with torch.no_grad():
            wanted_BT = network(ids_BS, floats_BN).logits_BT.sigmoid()
            own = (ids_BS[:, candidates.ids], floats_BN[:, candidates.floats])
            got_BT = program.ranked(*own, ids_US, floats_UN, torch.tensor(user_B))
        torch.testing.assert_close(got_BT, wanted_BT, rtol=0, atol=atol)


def check_rows(program: Program, network: Network, schema: Schema, *, atol: float) -> None:
    for rows in (1, 2, 7, MAX_ROWS):
        ids_BS, floats_BN = random_rows(schema, rows)
        with torch.no_grad():
            wanted_BT = network(ids_BS, floats_BN).logits_BT.sigmoid()
            got_BT = program(ids_BS, floats_BN)
        torch.testing.assert_close(got_BT, wanted_BT, rtol=0, atol=atol)
        assert rows == 1 or wanted_BT.std() > 1e-3


@pytest.mark.parametrize("dense", [0, 3])
@pytest.mark.parametrize("kind", list(MODELS))
def test_the_program_scores_as_the_network_does(kind: str, dense: int, tmp_path: Path) -> None:
    schema = rich_schema(dense=dense)
    network = network_of(config_of(kind), schema, std=0.1)
    saved(network, schema, tmp_path, precision=Precision(), level=None)
    check_scores(load_program(tmp_path), network, schema, atol=1e-6)


def fitted_to_rows(network: Network, schema: Schema, wanted: Precision, *, tolerance: float = 1e-3) -> Precision:
    """By other rows than those of the checks."""
    return Fit(network, Rows(*random_rows(schema, 8192, seed=9)), tolerance=tolerance).nearest(wanted)


@pytest.mark.parametrize("kind", list(MODELS))
@pytest.mark.parametrize("precision", PRECISIONS[1:], ids=str)
def test_lower_precisions_score_nearly_so(kind: str, precision: Precision, tmp_path: Path) -> None:
    torch.manual_seed(1)  # of the rows before noise joins them
    schema = rich_schema(dense=2)
    network = network_of(config_of(kind), schema, std=0.05)
    found = fitted_to_rows(network, schema, precision)
    saved(network, schema, tmp_path, precision=found, level=None)
    check_scores(load_program(tmp_path), network, schema, atol=1e-3)
    ids_BS, floats_BN = random_rows(schema, 512)
    with torch.no_grad():
        wanted_BT = network(ids_BS, floats_BN).logits_BT.sigmoid()
        got_BT = served_network(network, found)(ids_BS, floats_BN)
    torch.testing.assert_close(got_BT, wanted_BT, rtol=0, atol=1e-3)


@pytest.mark.parametrize("kind", ["deep_crossing", "masknet"])
def test_what_carries_a_rounding_on_stays_finer(kind: str) -> None:
    torch.manual_seed(1)
    schema, wanted = rich_schema(dense=2), Precision("int8", "bf16")
    network = network_of(config_of(kind), schema, std=0.05)
    layers = set(wide_layers(network.head))
    found = fitted_to_rows(network, schema, wanted)
    assert set() < set(found.keep) <= layers
    assert (found.tables == "fp16") == (kind == "masknet")
    assert set(wide_layers(served_network(network, found).head)) == set(found.keep)
    assert fitted_to_rows(network, schema, wanted, tolerance=0.1) == wanted
    strict = fitted_to_rows(network, schema, wanted, tolerance=1e-6)
    assert (strict.tables, set(strict.keep)) == ("fp32", layers)


def test_no_precision_is_measured_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(1)
    schema, scored = rich_schema(dense=2), precisions._logits_RT
    network = network_of(config_of("deep_crossing"), schema, std=0.05)
    measured: list[frozenset[tuple[str, torch.dtype]]] = []

    def noted(served: ServedNetwork, rows: Rows) -> torch.Tensor:
        measured.append(frozenset((name, tensor.dtype) for name, tensor in served.weights_by_name().items()))
        return scored(served, rows)

    monkeypatch.setattr(precisions, "_logits_RT", noted)
    fit = Fit(network, Rows(*random_rows(schema, 2048, seed=9)), tolerance=1e-3)
    found = [fit.nearest(wanted) for wanted in PRECISIONS]
    assert found[1].keep and found[4].keep, "layers were chosen for both kinds of tables"
    assert [fit.change(each) for each in found] == [fit.change(each) for each in found]
    assert len(measured) == len(set(measured)) > 2 * len(PRECISIONS)


@NATIVE
@pytest.mark.parametrize(
    "kind", [kind if kind in NATIVE_KINDS else pytest.param(kind, marks=pytest.mark.long) for kind in MODELS]
)
def test_native_code_scores_as_the_network_does(kind: str, tmp_path: Path) -> None:
    schema = rich_schema(dense=3)
    network = network_of(config_of(kind), schema, std=0.1)
    saved(network, schema, tmp_path, precision=Precision(), level=level_of("auto"))
    check_scores(native_program(tmp_path), network, schema, atol=1e-6)


@NATIVE
@pytest.mark.long
@pytest.mark.parametrize(
    ("kind", "precision"),
    [
        *((kind, Precision("fp16", "fp32")) for kind in NATIVE_KINDS),
        *((kind, Precision("int8", "bf16")) for kind in MODELS),
    ],
    ids=str,
)
def test_native_code_of_lower_precisions(kind: str, precision: Precision, tmp_path: Path) -> None:
    schema = rich_schema(dense=2)
    network = network_of(config_of(kind), schema, std=0.05)
    found = fitted_to_rows(network, schema, precision)
    saved(network, schema, tmp_path, precision=found, level=level_of("auto"))
    check_scores(native_program(tmp_path), network, schema, atol=1e-3)


@pytest.fixture(scope="module")
def deepfm() -> Network:
    return network_of(config_of("deepfm"), rich_schema(dense=2), std=0.1)


@pytest.fixture(scope="module")
def native_folder(deepfm: Network, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """That network with native code; read only."""
    folder = tmp_path_factory.mktemp("native")
    return saved(deepfm, rich_schema(dense=2), folder, precision=Precision(), level=level_of("auto"))


@NATIVE
def test_native_code_takes_the_weights_of_another_training(native_folder: Path, tmp_path: Path) -> None:
    """Biases of one element too, which a compiler that is given constants writes into the code."""
    shutil.copytree(native_folder, tmp_path, dirs_exist_ok=True)
    schema = rich_schema(dense=2)
    network = network_of(config_of("deepfm"), schema, std=0.1)
    save_file(served_network(network, split=split_of(schema)).weights_by_name(), tmp_path / "weights.safetensors")
    check_scores(native_program(tmp_path), network, schema, atol=1e-6)


@NATIVE
@pytest.mark.parametrize(
    "case",
    [("needs", ["avx9"], "this CPU lacks avx9"), ("torch", "1.0", "compiled for torch 1.0"), (None, None, "not load")],
)
def test_native_code_that_cannot_run_here_gives_way(
    case: tuple[str | None, object, str],
    deepfm: Network,
    *,
    native_folder: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    key, value, reason = case
    shutil.copytree(native_folder, tmp_path, dirs_exist_ok=True)
    told = json.loads((tmp_path / "program.json").read_text())
    if key:
        told["native"][key] = value
    else:
        (tmp_path / "native.pt2").write_bytes(b"not an archive")
    (tmp_path / "program.json").write_text(json.dumps(told))
    program = load_program(tmp_path)
    assert reason in caplog.text
    check_scores(program, deepfm, rich_schema(dense=2), atol=1e-6)


@NATIVE
def test_inputs_of_another_shape_or_layout(native_folder: Path) -> None:
    """Native code looks at neither width nor strides."""
    program = native_program(native_folder)
    ids_BS, floats_BN = random_rows(rich_schema(dense=2), 4)
    for bad in (
        (ids_BS[:, 1:], floats_BN),
        (ids_BS, floats_BN.double()),
        (ids_BS[1:], floats_BN),
        (ids_BS.int(), floats_BN),
    ):
        with pytest.raises(ValueError, match="wanted"):
            program(*bad)
    user, candidates = split_of(rich_schema(dense=2))
    own, users = ((ids_BS[:, part.ids], floats_BN[:, part.floats]) for part in (candidates, user))
    assert program.ranked is not None
    for of_user, user_B in ((users, torch.zeros(3).long()), (users[::-1], torch.zeros(4).long()), (users, own[1])):
        with pytest.raises(ValueError, match="wanted"):
            program.ranked(*own, *of_user, user_B)
    by_column = (ids_BS.t().contiguous().t(), floats_BN.t().contiguous().t())
    torch.testing.assert_close(program(*by_column), program(ids_BS, floats_BN), rtol=0, atol=0)


def test_int8_rows_keep_the_first_order_weight() -> None:
    tables = {"a": torch.cat([torch.linspace(-0.1, 0.1, 36).view(9, 4), torch.full((9, 1), 5.4321)], dim=1)}
    matrix = Matrix(tables, vector=4, precision="int8")
    got_BW = matrix(torch.arange(9))
    torch.testing.assert_close(got_BW[:, 4], tables["a"][:, 4], rtol=0, atol=0)
    row_range = float((tables["a"][:, 3] - tables["a"][:, 0]).max())
    torch.testing.assert_close(got_BW[:, :4], tables["a"][:, :4], rtol=0, atol=row_range / 255)
    assert matrix.matrix_RW.nbytes == 9 * (4 + 8)


def test_lists_without_any_id() -> None:
    schema = rich_schema(dense=2)
    ids_BS, floats_BN = random_rows(schema, 5)
    ids_BS[:, [at for at, name in enumerate(schema.slot_names) if name in ("tags", "history")]] = -1
    for kind in ("deepfm", "din", "bst"):
        network = network_of(config_of(kind), schema, std=0.1)
        wanted_BT = network(ids_BS, floats_BN).logits_BT.sigmoid()
        torch.testing.assert_close(served_network(network)(ids_BS, floats_BN), wanted_BT, rtol=0, atol=1e-6)


def test_no_compiler_no_native_code(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert level_of("auto") is None
    assert level_of("off") is None
    with pytest.raises(Fault, match="no compiler 'no-such-compiler'"):
        level_of("x86-64-v3")


def test_the_program_holds_no_weight_and_loads_without_our_packages(exported: Path) -> None:
    program = exported / "program.pt2"
    some = (exported / "weights.safetensors").read_bytes()[-64:]
    assert some not in program.read_bytes()
    code = (
        "import sys, torch; program = torch.export.load(sys.argv[1]);"
        "sys.exit(bool(program.state_dict or program.constants or {'etl', 'recsys', 'deploy'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-I", "-c", code, str(program)], cwd="/", capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode()


def test_a_program_with_pickled_weights_is_refused(tmp_path: Path, exported: Path) -> None:
    for name in ("weights.safetensors", "program.json"):
        shutil.copyfile(exported / name, tmp_path / name)
    linear = torch.nn.Linear(2, 2)
    torch.export.save(torch.export.export(linear, (torch.zeros(1, 2),)), tmp_path / "program.pt2")
    with pytest.raises(ValueError, match="wanted code alone"):
        load_program(tmp_path, native=False)


def test_a_head_with_hidden_tensors_is_not_exported(tmp_path: Path) -> None:
    class Hidden(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.secret = [torch.ones(1)]

        def forward(self, inputs: object) -> torch.Tensor:
            return inputs.dense_BN + self.secret[0]  # type: ignore[attr-defined]

    layout = Layout.of(schema_of((), dense=1, tasks=("click",)), WideConfig(), dim=4)
    served = ServedNetwork(Hidden(), Reader(layout, Matrices(None, None)))  # type: ignore[arg-type]
    with pytest.raises(RuntimeError, match="wanted code alone"):
        save_program(served, tmp_path, shape=Shape(4, slots=0, floats=1), level=None)


def test_features_of_one_table_share_its_rows() -> None:
    matrix = Matrix({"a": torch.tensor([[0.0], [1.0]]), "b": torch.tensor([[10.0], [11.0], [12.0]])})
    features = (id_feature("x", table="b"), id_feature("y", table="a"), id_feature("z", table="b"))
    schema = schema_of((), dense=0, tasks=("click",))
    tables = tuple(Table(name=name, rows=rows) for name, rows in (("a", 2), ("b", 3)))
    schema = schema.model_copy(update={"features": features, "tables": tables})
    layout = Layout.of(schema, WideConfig(), dim=4)
    read = Reader(layout, Matrices(None, matrix))(torch.tensor([[1, 0, 2]]), torch.zeros(1, 0))
    assert matrix.matrix_RW.shape == (5, 1)
    assert read.linear_BL.tolist() == [[11.0, 0.0, 12.0]]
