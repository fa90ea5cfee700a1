"""Bad input, case by case: the fault names place, got, wanted and remedy, and an older folder stays as it is."""

import gzip
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from etl.experiment_file import parse
from etl.faults import Fault
from etl.run import run
from etl.spec import FeatureSpec

HEADER = "user,item,price,tags,time,click\n"
GOOD = HEADER + "".join(f"u{at % 3},{at % 5},{at}.5,a|b,{at},{at % 2}\n" for at in range(20))
SPEC: dict[str, Any] = {
    "data": {"train": ["train.csv"], "valid": ["valid.csv"], "test": ["test.csv"]},
    "tasks": [{"name": "click"}],
    "features": [
        {"type": "categorical", "name": "item", "dtype": "int64"},
        {"type": "numeric", "name": "price"},
        {"type": "bag", "name": "tags", "max_length": 2},
    ],
}
HISTORY = {"user": "user", "time": "time", "max_length": 3, "columns": {"past": "item"}}
PAST = {"type": "sequence", "name": "past", "table": "item", "dtype": "int64", "max_length": 3}
NEGATIVES = {"user": "user", "item": "item"}
ROW: dict[str, Any] = {"item": [1, 2], "price": [0.5, 1.5], "tags": [["a"], ["b"]], "click": [1, 0], "time": [1, 2]}


class Case(NamedTuple):
    """What is wrong, how to make it so, and the fault: a pattern of place, of got and of wanted."""

    what: str
    make: Callable[[], object]
    place: str
    got: str
    wanted: str
    data: dict[str, Any] = {}  # noqa: RUF012
    features: list[dict[str, Any]] = []  # noqa: RUF012


def text(content: str | bytes, path: str = "train.csv") -> Callable[[], object]:
    return lambda: Path(path).write_bytes(content if isinstance(content, bytes) else content.encode())


def rows(*lines: str) -> Callable[[], object]:
    return text(HEADER + "\n".join(lines) + "\n")


def parquet(**columns: object) -> Callable[[], object]:
    return lambda: pq.write_table(pa.table(ROW | columns), "train.parquet")


def nothing() -> None:
    """The files are good, the spec does not fit them."""


def cut(path: str) -> Callable[[], object]:
    return lambda: Path(path).write_bytes(gzip.compress(GOOD.encode() * 50)[:200])


def repeated() -> None:
    table = pa.table(ROW)
    pq.write_table(table.append_column("item", table["item"]), "train.parquet")


GZ = {"train": ["train.csv.gz"]}
ARROW: dict[str, Any] = {"format": "parquet", "train": ["train.parquet"], "valid": ["train.parquet"]}
ARROW |= {"test": ["train.parquet"]}
SVM: dict[str, Any] = {"format": "libsvm", "train": ["train.svm"], "valid": ["train.svm"], "test": ["train.svm"]}
IDS = [{"type": "bag", "column": "ids", "dtype": "int64", "weight_column": "values", "max_length": 3}]
ITEM = {"type": "categorical", "name": "item", "dtype": "int64"}
LABEL = "u,1,1,a,1,"
FIRST = "train.csv: rows 1 to 2"
PARQUET = "train.parquet: rows 1 to 2"

CASES = [
    Case("no such file", nothing, "data.train", "no file 'gone.csv'", "an existing file", {"train": ["gone.csv"]}),
    Case("a glob without a match", nothing, "data.test", "no file 'day.*csv'", "a.* glob", {"test": ["day*.csv"]}),
    Case("one file twice", nothing, "data.train", "train.csv twice", "each file once", {"train": ["train.csv", "tr*"]}),
    Case("a file of 0 bytes", text(""), "train.csv", "Empty CSV", "a readable csv file"),
    Case("a split without rows", text(HEADER), "data.train", "no rows", "at least one"),
    Case("a truncated gz", cut("train.csv.gz"), "train.csv.gz", "[Tt]runcated", "a readable csv file", GZ),
    Case("text under the name of a gz", text(GOOD, "train.csv.gz"), "train.csv.gz", "", "a readable csv file", GZ),
    Case("no parquet", text("PAR", "train.parquet"), "train.parquet", "Parquet", "a readable parquet file", ARROW),
    Case("another encoding", text(GOOD.encode() + b"\xff,1,1,\xe9,1,1\n"), "train.csv", "UTF", "a readable csv file"),
    Case("a column that is not there", text("item,click\n1,1\n"), "train.csv", "no column price, tags", "the columns"),
    Case("a column twice", text("item,item,price,tags,click\n1,2,1,,1\n"), "train.csv", "column item twice", "a read"),
    Case("a column twice in parquet", repeated, "train.parquet", "column item twice", "a readable", ARROW),
    Case("a row that is too short", rows(LABEL + "1", "u,1"), "train.csv", "Expected 6 columns, got 2", "a readable"),
    Case("a text as number", rows(LABEL + "1", "u,2,x,a,1,0"), f"{FIRST}, column 'price'", "'x'", "numbers"),
    Case("a fraction as id", rows(LABEL + "1", "u,2.5,1,a,1,0"), f"{FIRST}, column 'item'", "'2.5'", "whole numbers"),
    Case("an id above 2^63", rows(LABEL + "1", f"u,{2**63},1,a,1,0"), f"{FIRST}, column 'item'", str(2**63), "whole"),
    Case("infinity", rows(LABEL + "1", "u,2,inf,a,1,0"), f"{FIRST}, column 'price'", "infinity", "finite numbers"),
    Case("a reserved id", rows(LABEL + "1", f"u,{-(2**63)},1,a,1,0"), f"{FIRST}, column 'item'", "stands for", "whole"),
    Case("a list that is too long", rows(LABEL + "1", "u,2,1,a|b|c,1,0"), f"{FIRST}, column 'tags'",
         "3 values in row 2", "at most 2"),
    Case("a label that is neither", rows(LABEL + "1", LABEL + "2"), f"{FIRST}, column 'click'", "'2' as label", "0 or"),
    Case("no label", rows(LABEL + "1", LABEL), f"{FIRST}, column 'click'", "None as label 2", "0 or 1"),
    Case("labels of one class", rows(LABEL + "1", LABEL + "1"), "data.train", "only class 1", "both classes"),
    Case("ids as floats", parquet(item=[1.0, 2.0]), f"{PARQUET}, column 'item'", "double", "whole numbers", ARROW),
    Case("NaN among ids", parquet(item=[1, float("nan")]), f"{PARQUET}, column 'item'", "double", "whole", ARROW),
    Case("no list", parquet(tags=[1, 2]), f"{PARQUET}, column 'tags'", "holds int64", "list<text>", ARROW),
    Case("a malformed libsvm line", text("1 1:1\n0 2\n", "train.svm"), "train.svm: line 2", "'2'", "label", SVM, IDS),
    Case("a libsvm line without label", text("1 1:1\n2:1\n", "train.svm"), "line 2", "'2:1' where", "label", SVM, IDS),
    Case("a column that libsvm lacks", text("1 1:1\n", "train.svm"), "column 'item'", "no such", "label, ids", SVM),
    Case("weights of another length", parquet(values=[[1.0], []], ids=[[1], [2]]), f"{PARQUET}, column 'values'",
         "another number than of ids in row 2", "a finite weight an id", ARROW, IDS),
    Case("a weight that is not finite", parquet(values=[[1.0], [float("nan")]], ids=[[1], [2]]),
         f"{PARQUET}, column 'values'", "null, NaN or infinity", "a finite weight an id", ARROW, IDS),
    Case("a group of floats", parquet(), f"{PARQUET}, column 'price'", "double", "whole numbers or text",
         ARROW | {"group": "price"}),
    Case("a weight below 0", rows("u,1,-1,a,1,1", LABEL + "0"), f"{FIRST}, column 'price'", "'-1' as weight 1",
         "a number from 0 on", {"weight": "price"}, [ITEM]),
    Case("no weight in a row", rows(LABEL + "1", "u,1,,a,1,0"), f"{FIRST}, column 'price'", "None as weight 2",
         "a number from 0 on", {"weight": "price"}, [ITEM]),
    Case("no time in a row", rows(LABEL + "1", "u,1,1,a,,0"), f"{FIRST}, column 'time'", "no value in row 2", "times",
         {"histories": [HISTORY]}, [PAST]),
    Case("a time that is none", rows(LABEL + "1", "u,1,1,a,soon,0"), f"{FIRST}, column 'time'", "soon", "ISO 8601",
         {"histories": [HISTORY]}, [PAST]),
    Case("times of two forms", text(HEADER + "u,1,1,a,2024-01-01,0\n", "test.csv"), "test.csv: rows 1 to 1",
         "times without a zone", "whole numbers, as before", {"histories": [HISTORY]}, [PAST]),
    Case("bounds in the wrong order", nothing, "data.split", "valid_from = 15, test_from = 10", "starts after",
         {"valid": [], "test": [], "split": {"by": "time", "column": "time", "valid_from": 15, "test_from": 10}}),
    Case("bounds of another form", nothing, "data.split.valid_from, column 'time'", "times without", "whole numbers",
         {"valid": [], "test": [],
          "split": {"by": "time", "column": "time", "valid_from": "2024-01-01", "test_from": "2024-02-01"}}),
    Case("times in another unit", rows(f"u,1,1,a,{10**12},0", f"v,2,1,a,{2 * 10**12},1"),
         f"{FIRST}, column 'time'", f"{10**12} as a time in s", "years 1 to 9999",
         {"valid": [], "split": {"by": "time", "column": "time", "unit": "s"}}),
    Case("one time for all rows", rows("u,1,1,a,7,0", "v,2,1,a,7,1"), "data.train", "no rows", "at least one",
         {"valid": [], "split": {"by": "time", "column": "time"}}),
    Case("a user with every item", nothing, "data.negatives", "user 'u0' with rows of all 5", "an item left",
         {"negatives": NEGATIVES}),
    Case("no item to draw", rows("u,,1,a,1,1"), "data.negatives.item", "no item", "at least one",
         {"negatives": NEGATIVES}),
    Case("histories that are all too short", text(HEADER + "new,1,1,a,1,1\n", "valid.csv"), "data.valid", "no rows",
         "at least one", {"histories": [HISTORY | {"min_length": 1}]}, [PAST]),
]  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for name in ("train", "valid", "test"):
        Path(f"{name}.csv").write_text(GOOD)
    run(parse(SPEC, place="x.toml", into=FeatureSpec), Path("old"), report=silent)
    return tmp_path


def silent(stage: str, rows: int, *, total: int | None = None) -> None:
    """Nobody watches."""


def contents(folder: str) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(Path(folder).rglob("*")) if path.is_file()}


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.what.replace(" ", "_"))
def test_bad_input_is_named_and_leaves_nothing(folder: Path, case: Case) -> None:
    case.make()
    features = [*SPEC["features"], *case.features] if case.features == [PAST] else case.features or SPEC["features"]
    raw = SPEC | {"data": SPEC["data"] | case.data, "features": features}
    raw |= {"tasks": [{"name": "click", "column": "label"}]} if features == IDS and case.data == SVM else {}
    spec, before = parse(raw, place="x.toml", into=FeatureSpec), contents("old")
    for out in ("new", "old"):
        with pytest.raises(Fault) as caught:
            run(spec, Path(out), report=silent)
        fault = caught.value
        assert case.place in fault.place
        assert re.search(case.got, fault.got, re.DOTALL) and re.search(case.wanted, fault.wanted), str(fault)
        assert (
            fault.remedy
            and str(fault) == f"{fault.place}: got {fault.got}; wanted {fault.wanted}; remedy: {fault.remedy}"
        )
    assert contents("old") == before
    assert sorted(path.name for path in folder.iterdir() if path.is_dir()) == ["old"]


def test_every_case_is_one_of_its_own() -> None:
    assert len(CASES) >= 25 and len({case.what for case in CASES}) == len(CASES)


def test_the_documentation_lists_every_case() -> None:
    page = (Path(__file__).parents[2] / "docs" / "etl.md").read_text(encoding="utf-8")
    assert [case.what for case in CASES if f"| {case.what} | {case.place} |" not in page] == []
