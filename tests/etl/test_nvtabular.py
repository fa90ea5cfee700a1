"""The NVTabular engine: where it runs, what it leaves behind, what it refuses, and its way to a GPU as far as it goes.

The tests of the GPU path show that the sources import, that the graph for `device = "cuda"` is built and has the types
it should, and that names which cuDF has moved are put back. They run no kernel and load no cuDF.
"""

import importlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from etl.experiment_file import parse
from etl.faults import Fault, Faults
from etl.run import run
from etl.spec import Etl, FeatureSpec

if find_spec("nvtabular") is None:
    pytest.skip("the extra 'nvtabular' is not installed", allow_module_level=True)

from etl.engines.nvtabular import cuda
from etl.engines.nvtabular.cluster import open_workers
from etl.engines.nvtabular.coded import Parts
from etl.engines.nvtabular.library import HAS_GPU, quiet
from etl.engines.nvtabular.plan import plan
from etl.engines.nvtabular.prepare import marked, unmarked
from etl.engines.nvtabular.workflow import build

JOB = """
import os, signal
from pathlib import Path
from etl.experiment_file import parse
from etl.run import run
from etl.spec import FeatureSpec

def report(stage, rows, *, total=None):
    if stage == {killed!r}:
        os.kill(os.getpid(), signal.SIGKILL)

run(parse({raw!r} | {{"etl": {etl!r}}}, place="x", into=FeatureSpec), Path({out!r}), report=report)
"""
ROWS = 90
FEATURES: list[dict[str, Any]] = [
    {"type": "categorical", "name": "item", "dtype": "int64", "table": "items"},
    {"type": "sequence", "name": "path", "dtype": "int64", "table": "items", "max_length": 2},
    {"type": "categorical", "name": "city", "min_count": 2},
    {"type": "categorical", "name": "hashed", "column": "city", "hash_rows": 50},
    {"type": "numeric", "name": "age", "clip": [0.0, 60.0], "log1p": True},
    {"type": "numeric", "name": "middle", "column": "age", "as": "field", "fill": "median", "scale": "minmax"},
    {"type": "numeric", "name": "bucket", "column": "age", "as": "buckets", "quantiles": 4},
    {"type": "cross", "name": "both", "inputs": ["city", "bucket"], "hash_rows": 99},
]


def spec_of(folder: Path, features: list[dict[str, Any]] = FEATURES, **etl: Any) -> FeatureSpec:
    raw = {
        "data": {"format": "parquet"} | {split: [str(folder / "rows.parquet")] for split in ("train", "valid", "test")},
        "tasks": [{"name": "click"}],
        "features": features,
        "etl": {"rows_per_group": 16} | etl,
    }
    return parse(raw, place="x", into=FeatureSpec)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    rng = np.random.default_rng(3)
    rows = {
        "item": pa.array([None if at % 9 == 0 else 2**62 + at % 5 for at in range(ROWS)]),
        "path": pa.array([[2**62 + at % 3, 7, None][: at % 4] for at in range(ROWS)], pa.list_(pa.int64())),
        "city": pa.array([None if at % 7 == 0 else "Zürich"[: 1 + at % 6] for at in range(ROWS)]),
        "age": pa.array([None if at % 8 == 0 else float(x) for at, x in enumerate(rng.integers(-5, 99, ROWS))]),
        "click": pa.array([at % 2 for at in range(ROWS)]),
    }
    pq.write_table(pa.table(rows), tmp_path / "rows.parquet", row_group_size=7)
    return tmp_path


def silent(stage: str, rows: int, *, total: int | None = None) -> None:
    """Nobody watches."""


def check_same(one: Path, other: Path) -> None:
    """Two dataset folders hold the same rows and vocabularies."""
    names = sorted(path.relative_to(one) for path in one.rglob("*.parquet"))
    assert names == sorted(path.relative_to(other) for path in other.rglob("*.parquet"))
    for name in names:
        assert pq.read_table(one / name).to_pydict() == pq.read_table(other / name).to_pydict(), name


def test_nothing_is_left_beside_the_folder_and_torch_is_not_loaded(folder: Path) -> None:
    run(spec_of(folder, engine="nvtabular"), folder / "data", report=silent)
    assert sorted(path.name for path in folder.iterdir()) == ["data", "rows.parquet"]
    assert sorted(path.name for path in (folder / "data").iterdir()) == [
        "counts", "manifest.json", "schema.json", "test", "train", "transform", "valid",
    ]  # fmt: skip
    code = "import sys, etl.engines.nvtabular.engine; sys.exit('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_fault_leaves_nothing(folder: Path) -> None:
    bag = {"type": "bag", "name": "path", "dtype": "int64", "max_length": 2}
    with pytest.raises(Fault, match=r"rows 1 to 90, column 'path': got 3 values in row 4 of these; wanted at most 2"):
        run(spec_of(folder, [bag], engine="nvtabular"), folder / "data", report=silent)
    assert [path.name for path in folder.iterdir()] == ["rows.parquet"]


def test_encodings_alone_are_refused(folder: Path) -> None:
    with pytest.raises(Fault, match="features: got target and count encodings alone with engine 'nvtabular'"):
        run(spec_of(folder, [{"type": "count", "name": "n", "by": ["city"]}], engine="nvtabular"), folder / "data",
            report=silent)  # fmt: skip


def test_an_extension_is_refused(folder: Path) -> None:
    from etl.extend import read_parent

    run(spec_of(folder), folder / "day1", report=silent)
    spec = spec_of(folder, engine="nvtabular")
    parent = read_parent(spec, folder / "day1", refit_numbers=True)
    with pytest.raises(Fault, match="--extend: got an extension with engine 'nvtabular'"):
        run(spec, folder / "data", report=silent, parent=parent)


@pytest.fixture
def cluster() -> Iterator[Any]:
    """A scheduler and two workers, each a process."""
    from distributed import LocalCluster

    with quiet(), LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None, host="127.0.0.1") as made:
        yield made


@pytest.mark.slow
@pytest.mark.dist
def test_two_workers_make_the_same_folder_as_one_process(folder: Path, cluster: Any) -> None:
    run(spec_of(folder, engine="nvtabular"), folder / "alone", report=silent)
    spec = spec_of(folder, engine="nvtabular", scheduler=cluster.scheduler_address)
    run(spec, folder / "two", report=silent)
    check_same(folder / "alone", folder / "two")
    assert cluster.scheduler.transition_counter > 0, "tasks went through the scheduler"


@pytest.mark.slow
@pytest.mark.dist
def test_the_folder_is_the_old_one_or_a_whole_new_one_whatever_dies(folder: Path, cluster: Any) -> None:
    """A killed job leaves the old folder; with a killed worker the other one makes the new folder whole."""
    run(spec_of(folder, engine="nvtabular"), folder / "data", report=silent)
    before = (folder / "data/manifest.json").read_bytes()
    etl = {"engine": "nvtabular", "scheduler": cluster.scheduler_address, "rows_per_group": 4}
    raw = spec_of(folder, **etl).model_dump(mode="json", by_alias=True)
    for killed, out in (("encode train", "data"), ("encode valid", "data"), ("encode test", "new")):
        code = JOB.format(raw=raw, etl=etl, killed=killed, out=str(folder / out))
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
        assert done.returncode == -signal.SIGKILL, done.stderr
        assert (folder / "data/manifest.json").read_bytes() == before and not (folder / "new").exists()
    pids = iter(cluster.workers[0].process.pid for _ in range(1))

    def kill_a_worker(stage: str, rows: int, *, total: int | None = None) -> None:
        if stage == "encode train" and (pid := next(pids, None)):
            os.kill(pid, signal.SIGKILL)

    run(spec_of(folder, **etl), folder / "data", report=kill_a_worker)
    run(spec_of(folder, engine="nvtabular", rows_per_group=4), folder / "alone", report=silent)
    check_same(folder / "alone", folder / "data")
    assert next(pids, None) is None, "a worker was killed"


def test_a_scheduler_that_does_not_answer_is_a_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("etl.engines.nvtabular.cluster._CONNECT_S", 1)
    etl = Etl(engine="nvtabular", scheduler="tcp://127.0.0.1:9")
    with pytest.raises(Fault, match=r"etl\.scheduler: got tcp://127\.0\.0\.1:9"), open_workers(etl):
        pass


def test_a_scheduler_belongs_to_this_engine(folder: Path) -> None:
    with pytest.raises(Faults, match="'scheduler' belongs to engine = 'nvtabular'"):
        spec_of(folder, scheduler="tcp://host:8786")


def test_where_it_runs_is_no_part_of_what_it_makes(folder: Path) -> None:
    here = spec_of(folder, engine="nvtabular")
    there = spec_of(folder, engine="nvtabular", scheduler="tcp://host:8786", device="cuda")
    assert here.data_hash() == there.data_hash()


@pytest.mark.skipif(HAS_GPU, reason="is about a machine without a GPU, here is one")
def test_without_a_gpu_cuda_is_a_fault() -> None:
    etl = Etl(engine="nvtabular", device="cuda")
    with pytest.raises(Fault, match=r"etl\.device: got no CUDA device.*remedy: set device"), open_workers(etl):
        pass


def test_the_graph_is_built_without_rows_and_says_its_types(folder: Path, tmp_path: Path) -> None:
    from merlin.dtypes import float64, int64
    from merlin.schema import ColumnSchema, Schema

    planned = plan(spec_of(folder, engine="nvtabular", device="cuda"))
    with quiet():
        graph = build(planned, out=tmp_path)
        columns = [ColumnSchema(k.name, dtype=int64, is_list=k.listed) for k in planned.keys.values()]
        columns += [ColumnSchema(name, dtype=float64) for name in planned.numbers]
        graph.workflow.fit_schema(Schema(columns))
    types = {name: dtype.without_shape for name, dtype in graph.workflow.output_dtypes.items()}
    assert types == {name: float64 if name.startswith("n") else int64 for name in planned.of.values()}


@pytest.fixture
def modules() -> Iterator[dict[str, ModuleType]]:
    """Stand-ins for cuDF."""
    made = {name: ModuleType(name) for name in ("cudf", "cudf.core", "cudf.core.column", "dask_cudf")}
    made["cudf"].__spec__ = importlib.machinery.ModuleSpec("cudf", None)
    with pytest.MonkeyPatch.context() as patch:
        for name, module in made.items():
            patch.setitem(sys.modules, name, module)
        yield made


def test_names_that_cudf_has_moved_are_put_back(modules: dict[str, ModuleType]) -> None:
    cuda.mend_cudf()
    column, dask_cudf = modules["cudf.core.column"], modules["dask_cudf"]
    with pytest.raises(TypeError, match="Hive"):
        column.build_categorical_column(1, 2)  # type: ignore[attr-defined]

    class Frame:
        def to_backend(self, name: str) -> str:
            return name

    assert dask_cudf.from_dask_dataframe(Frame()) == "cudf"  # type: ignore[attr-defined]
    kept = column.build_categorical_column  # type: ignore[attr-defined]
    cuda.mend_cudf()
    assert column.build_categorical_column is kept  # type: ignore[attr-defined]


@pytest.mark.gpu
@pytest.mark.skipif(find_spec("cudf") is None, reason="cuDF 24.12 is not installed")
def test_a_gpu_makes_the_same_folder(folder: Path) -> None:
    run(spec_of(folder, engine="nvtabular"), folder / "cpu", report=silent)
    run(spec_of(folder, engine="nvtabular", device="cuda"), folder / "gpu", report=silent)
    check_same(folder / "cpu", folder / "gpu")


def test_without_the_extra_one_sentence_says_so(folder: Path) -> None:
    code = f"""
import sys
sys.modules["nvtabular"] = None
from pathlib import Path
from etl.experiment_file import parse
from etl.faults import exit_on_fault
from etl.run import run
from etl.spec import FeatureSpec
raw = {spec_of(folder, engine="nvtabular").model_dump(mode="json", by_alias=True)!r}
with exit_on_fault():
    spec = parse(raw, place="x", into=FeatureSpec)
    run(spec, Path({str(folder / "data")!r}), report=lambda stage, rows, total=None: None)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert "etl.engine: got no NVTabular" in done.stderr and "the extra 'nvtabular'" in done.stderr


@given(
    lists=st.lists(st.lists(st.integers(-(2**63) + 2, 2**63 - 1), max_size=4), min_size=1, max_size=8), cut=st.data()
)
def test_marks_come_and_go(lists: list[list[int]], cut: st.DataObject) -> None:
    array = pa.array(lists, pa.large_list(pa.int64()))
    made = marked(np.asarray(array.offsets), array.values.to_numpy())
    assert all(len(row) == len(old) + 1 for row, old in zip(made.to_pylist(), lists, strict=True))
    first = cut.draw(st.integers(0, len(lists) - 1))
    assert unmarked(made.slice(first)).to_pylist() == lists[first:]


@given(sizes=st.lists(st.integers(1, 5), min_size=1, max_size=6), cut=st.data())
def test_parts_give_any_rows_in_order(
    sizes: list[int], cut: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder, total = tmp_path_factory.mktemp("parts"), sum(sizes)
    values, files = list(range(total)), [folder / str(at) for at in range(len(sizes))]
    for at, file in enumerate(files):
        start = sum(sizes[:at])
        pq.write_table(pa.table({"x": values[start : start + sizes[at]]}), file)
    first = cut.draw(st.integers(0, total - 1))
    rows = cut.draw(st.integers(1, total - first))
    assert Parts(files, sizes)(first, rows)["x"].to_pylist() == values[first : first + rows]
