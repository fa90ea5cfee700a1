"""`[etl] device = "cuda"` of the polars engine: what it needs, and that cudf-polars knows every query of the engine.

The queries are translated without a GPU, in the environment that `make cudf` makes. That runs no kernel: the
test marked `gpu` does, where there is one.
"""

import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import etl.engines
from etl.engines import open_engine
from etl.engines.device import gpus, queries_on
from etl.experiment_file import parse
from etl.extend import read_parent
from etl.faults import Fault
from etl.run import run
from etl.spec import Etl, FeatureSpec

ENGINES = Path(etl.engines.__file__).parent
HAS_CUDF_POLARS = find_spec("cudf_polars") is not None
needs_cudf_polars = pytest.mark.skipif(not HAS_CUDF_POLARS, reason="cudf-polars is not installed: make cudf")
ROWS = 40
NUMBERS: list[dict[str, Any]] = [
    {"type": "numeric", "name": f"n{at}", "column": "x", "fill": fill, "scale": scale, **more}
    for at, (fill, scale, more) in enumerate(
        [
            ("mean", "standardize", {}),
            ("median", "standardize", {"clip": [0.0, 60.0], "log1p": True}),
            (0.0, "minmax", {"log1p": True}),
            (-1.0, "none", {"clip": [0.0, 60.0], "as": "field"}),
            ("mean", "standardize", {"as": "buckets", "quantiles": 4}),
        ]
    )
]
FEATURES: list[dict[str, Any]] = [
    {"type": "categorical", "name": "i", "dtype": "int64", "table": "ints"},
    {"type": "sequence", "name": "li", "dtype": "int64", "table": "ints", "max_length": 2},
    {"type": "categorical", "name": "s", "min_count": 2, "table": "texts"},
    {"type": "bag", "name": "ls", "min_count": 2, "max_length": 3, "table": "texts"},
    {"type": "target", "name": "t", "by": ["i", "s"], "task": "buy"},
    {"type": "count", "name": "k", "by": ["s"]},
    *NUMBERS,
    {"type": "cross", "name": "c", "inputs": ["i", "n4"], "hash_rows": 99},
]


def spec_of(folder: Path, **etl: Any) -> FeatureSpec:
    raw = {
        "data": {"format": "parquet"} | {split: [str(folder / "rows.parquet")] for split in ("train", "valid", "test")},
        "tasks": [{"name": "click"}, {"name": "buy", "given": "click"}],
        "features": FEATURES,
        "etl": etl,
    }
    return parse(raw, place="x", into=FeatureSpec)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write(tmp_path, first=0)
    return tmp_path


def write(folder: Path, *, first: int) -> None:
    at = range(first, first + ROWS)
    rows = {
        "i": pa.array([None if n % 9 == 0 else 2**62 + n % 5 for n in at]),
        "li": pa.array([[2**62 + n % 3, 7, None][: n % 4] for n in at], pa.list_(pa.int64())),
        "s": pa.array([None if n % 7 == 0 else "Zürich"[: n % 6] for n in at]),
        "ls": pa.array([["Z", None, "日本"][: n % 4] for n in at], pa.list_(pa.string())),
        "x": pa.array([[None, float("nan"), n / 3][min(n % 5, 2)] for n in at], pa.float64()),
        "click": pa.array([n % 2 for n in at]),
        "buy": pa.array([int(n % 4 == 1) for n in at]),
    }
    pq.write_table(pa.table(rows), folder / "rows.parquet", row_group_size=7)


def silent(stage: str, rows: int, *, total: int | None = None) -> None:
    """Nobody watches."""


@pytest.mark.skipif(HAS_CUDF_POLARS, reason="is about an environment without cudf-polars")
def test_cuda_without_cudf_polars_is_a_fault(folder: Path) -> None:
    with pytest.raises(Fault, match=r"etl\.device: got no cudf-polars.*remedy: run .*, or set device = \"cpu\""):
        run(spec_of(folder, device="cuda"), folder / "data", report=silent)
    assert [path.name for path in folder.iterdir()] == ["rows.parquet"]


@needs_cudf_polars
@pytest.mark.skipif(HAS_CUDF_POLARS and gpus() > 0, reason="is about a machine without a GPU, here is one")
def test_cuda_without_a_gpu_is_a_fault(folder: Path) -> None:
    with (
        pytest.raises(Fault, match=r"etl\.device: got no CUDA device"),
        open_engine(Etl(device="cuda"), beside=folder / "data"),
    ):
        pass


def test_queries_stream_or_go_to_the_gpu_until_the_fit_ends() -> None:
    before = pl.Config.state()["POLARS_ENGINE_AFFINITY"]
    for device, engine in (("cpu", "streaming"), ("cuda", "gpu")):
        with queries_on(device):  # type: ignore[arg-type]
            assert pl.Config.state()["POLARS_ENGINE_AFFINITY"] == engine
        assert pl.Config.state()["POLARS_ENGINE_AFFINITY"] == before


Seen = dict[tuple[Path, int], list[pl.Schema]]
"""By file and line the columns of the queries that were collected there."""


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> Seen:
    """Queries as `device = "cuda"` makes them; each has been translated for a GPU before it ran on the CPU."""
    from cudf_polars.dsl.translate import Translator

    queries: Seen = {}
    collect = pl.LazyFrame.collect
    monkeypatch.setattr(etl.engines, "check_device", lambda device: None)

    def translated(query: pl.LazyFrame, **options: Any) -> Any:
        frame = sys._getframe(1)
        if Path(frame.f_code.co_filename).is_relative_to(ENGINES):
            translator = Translator(query._ldf.visit(), pl.GPUEngine(executor="in-memory"))
            translator.translate_ir()
            assert not translator.errors, query.explain()
            place = Path(frame.f_code.co_filename), frame.f_lineno
            queries.setdefault(place, []).append(query.collect_schema())
        return collect(query, **options | {"engine": "streaming"})

    monkeypatch.setattr(pl.LazyFrame, "collect", translated)
    return queries


@needs_cudf_polars
@pytest.mark.slow
def test_cudf_polars_knows_every_query_of_the_engine(folder: Path, seen: Seen) -> None:
    spec = spec_of(folder, device="cuda")
    run(spec, folder / "day1", report=silent)
    write(folder, first=ROWS)
    parent = read_parent(spec, folder / "day1", refit_numbers=True)
    run(spec, folder / "day2", report=silent, parent=parent)
    written = {
        (path, number)
        for path in ENGINES.glob("*.py")
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1)
        if ".collect(" in line
    }
    assert seen.keys() == written
    vocabularies = [
        schema["value"] for (path, _), found in seen.items() if path.stem == "vocabulary" for schema in found
    ]
    assert set(vocabularies) == {pl.Int64(), pl.String()}, "on the CPU a table of whole numbers is counted without one"


@needs_cudf_polars
@pytest.mark.slow
def test_a_query_that_it_does_not_know_is_noticed(seen: Seen) -> None:
    code = compile("query.collect()", str(ENGINES / "order.py"), "exec")
    with pytest.raises(AssertionError):
        exec(code, {"query": pl.LazyFrame({"a": [1, 2]}).select(pl.int_range(pl.len()))})


@pytest.mark.gpu
@needs_cudf_polars
def test_a_gpu_makes_the_same_folder(folder: Path) -> None:
    for device in ("cpu", "cuda"):
        run(spec_of(folder, device=device), folder / device, report=silent)
    names = sorted(path.relative_to(folder / "cpu") for path in (folder / "cpu").rglob("*.parquet"))
    assert names == sorted(path.relative_to(folder / "cuda") for path in (folder / "cuda").rglob("*.parquet"))
    for name in names:
        ours, theirs = (pq.read_table(folder / device / name) for device in ("cpu", "cuda"))
        floats = {at for at, field in enumerate(ours.schema) if pa.types.is_floating(field.type)}
        for at, (one, other) in enumerate(zip(ours.columns, theirs.columns, strict=True)):
            near = pytest.approx(other.to_pylist(), rel=1e-6, abs=1e-6) if at in floats else other.to_pylist()
            assert one.to_pylist() == near, name
