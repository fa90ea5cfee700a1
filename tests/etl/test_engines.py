"""Both engines and the plain Python reference make the same dataset folder of the same generated rows."""

import json
import math
import shutil
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from etl.experiment_file import parse
from etl.faults import Fault
from etl.run import run
from etl.spec import FeatureSpec
from tests.etl.reference import Columns, Expected, expected

if find_spec("nvtabular") is None:
    pytest.skip("the extra 'nvtabular' is not installed", allow_module_level=True)

INT, TEXT, NUMBER = pa.int64(), pa.string(), pa.float64()
TYPES = {"i": INT, "s": TEXT, "t": TEXT, "x": NUMBER, "y": NUMBER}
LISTS = {"li": INT, "ls": TEXT, "w": NUMBER}
INTS = [2**63 - 1, 2**63 - 2, -(2**63) + 2, 2**53, 2**53 + 1, 2**32 + 1, 1, 0, -1]
TEXTS = ["", "nan", "None", "a", "b", " a", "ü", "u\u0308", "日本", "\U0001f600", "\x00", "1"]
NUMBERS = [0.0, -0.0, 0.25, -3.5, 0.1, 100.0, 1e6, 1.7e9, 1.7e9 + 1, 1.7e9 + 7, math.nan]
POOLS: dict[pa.DataType, list[Any]] = {INT: INTS, TEXT: TEXTS, NUMBER: NUMBERS}


@st.composite
def tables(draw: st.DrawFn) -> dict[str, Columns]:
    """Rows of three splits. Training rows know a part of the values, so that others are unseen."""
    known = {kind: draw(st.lists(st.sampled_from(pool), min_size=2, max_size=6)) for kind, pool in POOLS.items()}
    splits = {}
    for split, sizes in (("train", (4, 24)), ("valid", (1, 4)), ("test", (1, 6))):
        size = draw(st.integers(*sizes))
        pools = {k: st.sampled_from([*(known[k] if split == "train" else POOLS[k]), None]) for k in POOLS}
        columns = {n: draw(st.lists(pools[kind], min_size=size, max_size=size)) for n, kind in TYPES.items()}
        for name in ("li", "ls"):
            cells = st.lists(pools[LISTS[name]], max_size=4) | st.none()
            columns[name] = draw(st.lists(cells, min_size=size, max_size=size))
        columns["w"] = [cell and [0.5 * at - 1 for at in range(len(cell))] for cell in columns["ls"]]
        splits[split] = columns | {"click": [at % 2 for at in range(size)], "buy": [at % 3 % 2 for at in range(size)]}
    return splits


@st.composite
def vocabularies(draw: st.DrawFn) -> dict[str, Any]:
    """The settings of a table."""
    limits = {"min_count": draw(st.integers(1, 3)), "max_rows": draw(st.sampled_from([None, None, 2, 3, 5]))}
    return {"hash_rows": draw(st.integers(2, 40))} if draw(st.integers(0, 3)) == 0 else limits


@st.composite
def numbers(draw: st.DrawFn) -> dict[str, Any]:
    """The settings of a dense input or a field."""
    return {
        "fill": draw(st.sampled_from(["mean", "median", 0.0, -2.5])),
        "clip": draw(st.sampled_from([None, None, (-1.0, 50.0), (0.0, 1.7e9 + 3)])),
        "log1p": draw(st.booleans()),
        "scale": draw(st.sampled_from(["standardize", "minmax", "none"])),
    }


@st.composite
def features(draw: st.DrawFn) -> list[dict[str, Any]]:
    """A few of all kinds of features, with and without a table in common."""
    ints, texts = (draw(vocabularies()) | shared for shared in ({"dtype": "int64"}, {}))
    tables = [{"table": "shared_ints"}, {"table": "shared_texts"}] if draw(st.booleans()) else [{}, {}]
    weights = draw(st.sampled_from([{}, {"weight_column": "w"}]))
    edges = draw(st.lists(st.sampled_from([-1.0, 0.0, 0.25, 50.0, 1.7e9]), min_size=1, max_size=3, unique=True))
    all_kinds: list[dict[str, Any]] = [
        {"type": "categorical", "name": "i", **ints, **tables[0]},
        {"type": "sequence", "name": "li", "max_length": draw(st.integers(1, 4)), **ints, **tables[0]},
        {"type": "categorical", "name": "s", **texts, **tables[1]},
        {"type": "bag", "name": "ls", "max_length": 4, **texts, **tables[1], **weights},
        {"type": "categorical", "name": "t", **draw(vocabularies())},
        {"type": "bag", "name": "lh", "column": "ls", "max_length": 4, "hash_rows": draw(st.integers(2, 9))},
        {"type": "numeric", "name": "x", **draw(numbers())},
        {"type": "numeric", "name": "x2", "column": "x", **draw(numbers())},
        {"type": "numeric", "name": "y", "as": "field", **draw(numbers())},
        {"type": "numeric", "name": "b", "column": "x", "as": "buckets", "boundaries": sorted(edges)},
        {"type": "numeric", "name": "q", "column": "y", "as": "buckets", "quantiles": draw(st.integers(2, 7))},
    ]
    encodings: list[dict[str, Any]] = [
        {"type": "target", "name": "e", "by": draw(st.sampled_from([["i"], ["t", "i"]])), "task": "buy", "folds": 2},
        {"type": "count", "name": "n", "by": draw(st.sampled_from([["s"], ["s", "i"]])), "log1p": draw(st.booleans())},
    ]
    encodings[0] |= {"smoothing": draw(st.sampled_from([0.0, 3.0])), "seed": draw(st.integers(0, 9))}
    all_kinds += encodings
    names = [feature["name"] for feature in all_kinds]
    kept = set(names) - draw(st.sets(st.sampled_from(names), max_size=7))
    kept |= {"i"} if any("i" in encoding["by"] for encoding in encodings if encoding["name"] in kept) else set()
    chosen = [feature for feature in all_kinds if feature["name"] in kept]
    ids = [name for name in ("i", "s", "t", "b", "q") if name in kept]
    crossed = draw(st.permutations(ids)) if len(ids) > 1 else []
    return [*chosen, *({"type": "cross", "name": "c", "inputs": crossed, "hash_rows": 1000} for _ in crossed[:1])]


Case = tuple[dict[str, Columns], list[dict[str, Any]], int]
cases = st.tuples(tables(), features(), st.sampled_from([8, 100]))


def spec_of(features: list[dict[str, Any]], *, group: int, **etl: str) -> FeatureSpec:
    files = {split: [f"{split}-*.parquet"] for split in ("train", "valid", "test")}
    raw = {
        "data": {"format": "parquet"} | files,
        "tasks": [{"name": "click"}, {"name": "buy", "given": "click"}],
        "features": features,
        "etl": {"rows_per_group": group} | etl,
    }
    return parse(raw, place="parity", into=FeatureSpec)


def written(folder: Path, splits: dict[str, Columns], *, group: int) -> None:
    """The raw files, in row groups of their own size: half of a split's rows, no row, the other half."""
    for split, columns in splits.items():
        types = TYPES | {name: pa.list_(kind) for name, kind in LISTS.items()}
        rows = pa.table({name: pa.array(values, types.get(name)) for name, values in columns.items()})
        half = rows.num_rows // 2
        for at, part in enumerate((rows[:half], rows[:0], rows[half:])):
            pq.write_table(part, folder / f"{split}-{at}.parquet", row_group_size=group + 1)


def outcome(spec: FeatureSpec, out: Path) -> Path | str:
    """The folder that the engine made, or its fault."""
    shutil.rmtree(out, ignore_errors=True)
    try:
        run(spec, out, report=lambda stage, rows, total=None: None)
    except Fault as fault:
        return str(fault)
    return out


def check(case: Case, folder: Path, *, device: str = "cpu") -> None:
    """Both engines fail alike, or make one folder, which is the reference's."""
    splits, chosen, group = case
    written(folder, splits, group=group)
    options: dict[str, dict[str, str]] = {"polars": {}, "nvtabular": {"device": device}}
    specs = {engine: spec_of(chosen, engine=engine, group=group, **etl) for engine, etl in options.items()}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        ours, theirs = (outcome(spec, folder / engine) for engine, spec in specs.items())
    if isinstance(ours, str) or isinstance(theirs, str):
        assert ours == theirs
        assert "no value in the training rows" in str(ours)
        return
    wanted = expected(specs["polars"], splits)
    check_reference(ours, wanted)
    check_same(ours, theirs, loose=wanted.loose)


def check_reference(folder: Path, wanted: Expected) -> None:
    """The folder holds what plain Python says."""
    for table, values in wanted.vocabularies.items():
        found = pq.read_table(folder / f"transform/vocabulary/{table}.parquet").to_pydict()
        assert list(zip(found["value"], found["count"], strict=True)) == values
        assert found["row"] == list(range(1, len(values) + 1))
    counted = json.loads((folder / "manifest.json").read_text())["splits"]
    for split, ids in wanted.ids.items():
        rows = pq.read_table(folder / split).to_pydict()
        assert {name: rows[name] for name in ids} == ids
        for name, numbers in wanted.numbers[split].items():
            if name.removesuffix(":value") not in wanted.loose:
                assert all(close(a, b) for a, b in zip(rows[name], numbers, strict=True)), name
        counts = {name: {"missing": wanted.missing[split][name], "unseen": wanted.unseen[split][name]} for name in ids}
        assert counted[split]["features"] == counts
        assert counted[split]["dense"] == {name: {"missing": n} for name, n in wanted.nulls[split].items()}


def check_same(ours: Path, theirs: Path, *, loose: set[str]) -> None:
    """Two folders hold the same files; floats differ by 1e-6 at most."""
    files = [sorted(str(path.relative_to(top)) for path in top.rglob("*")) for top in (ours, theirs)]
    assert files[0] == files[1]
    for name in files[0]:
        one, other = ours / name, theirs / name
        if name.endswith(".parquet"):
            check_same_table(pq.read_table(one), pq.read_table(other), loose=loose)
        elif name.endswith(".json"):
            parts = [json.loads(path.read_text()) for path in (one, other)]
            kept = [list(steps(part, loose=loose)) for part in parts]
            assert len(kept[0]) == len(kept[1])
            assert all(close(a, b) for a, b in zip(*kept, strict=True)), name


def check_same_table(one: pa.Table, other: pa.Table, *, loose: set[str]) -> None:
    assert one.schema == other.schema
    for name in one.column_names:
        if one[name].type != pa.float32():
            assert one[name] == other[name], name
        elif name.removesuffix(":value") not in loose:
            np.testing.assert_allclose(one[name], other[name], rtol=1e-6, atol=1e-6, err_msg=name)


def steps(value: Any, *, loose: set[str], path: str = "") -> Iterator[tuple[str, Any]]:
    """The leaves of a JSON file with their paths, without what names the engine, the files and loose numbers."""
    if isinstance(value, dict):
        if value.get("name") in loose:
            return
        own = {"hash", "engine", "files"} if "engine" in value else set()
        for key in sorted(value.keys() - own):
            yield from steps(value[key], loose=loose, path=f"{path}.{key}")
    elif isinstance(value, list):
        for at, part in enumerate(value):
            yield from steps(part, loose=loose, path=f"{path}.{at}")
    else:
        yield path, value


def close(one: Any, other: Any) -> bool:
    """Equal, or numbers within 1e-6."""
    if isinstance(one, tuple | list):
        return len(one) == len(other) and all(close(a, b) for a, b in zip(one, other, strict=True))
    if isinstance(one, float) or isinstance(other, float):
        return math.isclose(one, other, rel_tol=1e-6, abs_tol=1e-6)
    return bool(one == other)


thorough = [HealthCheck.too_slow, HealthCheck.data_too_large]


@pytest.mark.parametrize("part", [pytest.param(at, marks=[pytest.mark.slow] if at else []) for at in range(10)])
def test_engines_and_reference_agree(part: int, tmp_path: Path) -> None:
    """500 cases in ten parts; without `-m slow` the first 50."""

    @seed(part)
    @settings(max_examples=50, suppress_health_check=thorough, phases=[Phase.generate])  # to shrink would take minutes
    @given(case=cases)
    def agree(case: Case) -> None:
        check(case, tmp_path)

    agree()


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.skipif(find_spec("cudf") is None, reason="cuDF 24.12 is not installed")
def test_a_gpu_and_reference_agree(tmp_path: Path) -> None:
    @settings(max_examples=50, suppress_health_check=thorough, phases=[Phase.generate])
    @given(case=cases)
    def agree(case: Case) -> None:
        check(case, tmp_path, device="cuda")

    agree()
