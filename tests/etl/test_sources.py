"""The file formats: what is read from each, and days without traffic."""

import gzip
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from etl import formats, libsvm
from etl.experiment_file import parse
from etl.faults import Fault, Faults
from etl.formats import files
from etl.reader import Reader
from etl.run import run
from etl.spec import FeatureSpec

SVM: dict[str, Any] = {
    "tasks": [{"name": "click", "column": "label", "positive": ["1", "+1"], "negative": ["0", "-1"]}],
    "features": [{"type": "bag", "column": "ids", "dtype": "int64", "weight_column": "values", "max_length": 9}],
}
FFM: dict[str, Any] = {
    "tasks": [{"name": "click", "column": "label"}],
    "features": [
        {"type": "bag", "column": f"ids_{field}", "weight_column": f"values_{field}", "max_length": 9} | kind
        for field, kind in (("user", {"dtype": "int64"}), ("2", {}))
    ],
}


def silent(stage: str, rows: int, *, total: int | None = None) -> None:
    """Nobody watches."""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def spec(sections: dict[str, Any], **data: Any) -> FeatureSpec:
    given = {"train": ["rows*"], "valid": ["rows*"], "test": ["rows*"]} | data
    return parse(sections | {"data": given}, place="x.toml", into=FeatureSpec)


def read(sections: dict[str, Any], **data: Any) -> dict[str, list[Any]]:
    made = spec(sections, **data)
    return pa.Table.from_batches(Reader(made).batches(files(made.data.train, what="train"))).to_pydict()


def packed(path: str, text: str) -> None:
    """Writes a file as its name says."""
    if path.endswith(".gz"):
        Path(path).write_bytes(gzip.compress(text.encode()))
        return
    with pa.output_stream(path, compression="detect") as stream:
        stream.write(text.encode())


@pytest.mark.parametrize("name", ["rows.txt", "rows.txt.gz", "rows.txt.zst"])
def test_libsvm(folder: Path, name: str) -> None:
    packed(name, "# made by hand\n+1 1:0.5 9007199254740993:-1e-3\n\n-1  7:.25\t8:2 \r\n0")
    found = read(SVM, format="libsvm", comment="#")
    assert found["ids"] == [[1, 2**53 + 1], [7, 8], []] and found["values"] == [[0.5, -1e-3], [0.25, 2.0], []]
    assert found["label:click"] == [1.0, 0.0, 0.0]


def test_libffm_has_a_pair_of_lists_a_field(folder: Path) -> None:
    Path("rows.ffm").write_text("1 user:5:1 2:é:0.5 2:b:2\n0 other:1:1\n0 2:c:1 user:6:3\n")
    found = read(FFM, format="libffm")
    assert found["ids_user"] == [[5], [], [6]] and found["values_user"] == [[1.0], [], [3.0]]
    assert found["ids_2"] == [["é", "b"], [], ["c"]] and found["values_2"] == [[0.5, 2.0], [], [1.0]]


def test_libsvm_reaches_the_shards(folder: Path) -> None:
    Path("rows.svm").write_text("1 3:0.5 4:2\n0 3:1\n")
    run(spec(SVM, format="libsvm"), folder / "data", report=silent)
    found = pq.read_table(folder / "data/train").to_pydict()
    assert found["ids"] == [[1, 2], [1]] and found["ids:value"] == [[0.5, 2.0], [1.0]]


pairs = st.lists(st.tuples(st.integers(-(2**63) + 2, 2**63 - 1), st.floats(-1e30, 1e30)), max_size=5)


@settings(max_examples=50, deadline=None)
@given(lines=st.lists(st.tuples(st.booleans(), pairs), min_size=1, max_size=20), block=st.integers(1, 40))
def test_libsvm_lines_come_back_whatever_the_blocks(
    lines: list[tuple[bool, list[tuple[int, float]]]], block: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("svm") / "rows.txt"
    text = [" ".join([str(int(label)), *(f"{key}:{value!r}" for key, value in pairs)]) for label, pairs in lines]
    path.write_text("\n".join(text) + "\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(libsvm, "_BLOCK_BYTES", block)
        found = read(SVM, format="libsvm", train=[str(path)])
    assert found["ids"] == [[key for key, _ in pairs] for _, pairs in lines]
    assert found["values"] == [[value for _, value in pairs] for _, pairs in lines]
    assert found["label:click"] == [float(label) for label, _ in lines]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("1 3:0.5 4", "rows.txt: line 3: got '4'; wanted label id:value"),
        ("1 3:x", "rows.txt: line 3: got '3:x'"),
        ("1 3:nan", "rows.txt: line 3: got '3:nan'"),
        ("1 a:3:1", "rows.txt: line 3: got 'a:3:1'"),
        ("3:0.5 4:1", "rows.txt: line 3: got '3:0.5' where the label stands"),
        ("2 3:0.5", r"rows.txt: rows 1 to 3, column 'label': got '2' as label 2"),
        ("1 3.5:1", r"rows.txt: rows 1 to 3, column 'ids': got .*'3.5'"),
    ],
)
def test_a_malformed_line_is_named(folder: Path, line: str, message: str) -> None:
    Path("rows.txt").write_text(f"1 1:1\n\n{line}\n0 1:1\n")
    with pytest.raises(Fault, match=message):
        read(SVM, format="libsvm")


ITEMS: dict[str, Any] = {
    "tasks": [{"name": "click"}],
    "features": [{"type": "categorical", "name": "item", "dtype": "int64"}, {"type": "numeric", "name": "price"}],
}


def parquet(path: str, item: pa.Array, price: pa.Array | None = None) -> None:
    price = price or pa.array(np.arange(len(item), dtype=np.float32))
    pq.write_table(pa.table({"item": item, "price": price, "click": [at % 2 for at in range(len(item))]}), path)


def test_widths_of_whole_numbers_may_differ_between_files(folder: Path) -> None:
    for at, kind in enumerate((pa.int32(), pa.int64(), pa.uint64(), pa.int8(), pa.uint16())):
        parquet(f"rows{at}.parquet", pa.array([at, None, 100], kind))
    parquet("rows6.parquet", pa.array([None, None]))
    parquet("rows7.parquet", pa.array([2**63 - 1, -(2**63) + 2]))
    parquet("rows8.parquet", pa.array([1, 1]), pa.array([2**24 + 1, 3], pa.int64()))
    found = read(ITEMS, format="parquet")
    assert found["item"][:6] == [0, None, 100, 1, None, 100]
    assert found["item"][15:] == [None, None, 2**63 - 1, -(2**63) + 2, 1, 1]
    assert found["price"][-2:] == [2.0**24 + 1, 3.0]
    run(spec(ITEMS, format="parquet"), folder / "data", report=silent)
    words = pq.read_table(folder / "data/transform/vocabulary/item.parquet")["value"]
    assert words.type == pa.int64() and 2**63 - 1 in words.to_pylist()


def test_a_day_without_traffic(folder: Path) -> None:
    parquet("rows0.parquet", pa.array([], pa.int64()))
    parquet("rows1.parquet", pa.array([4, 5]))
    parquet("rows2.parquet", pa.array([], pa.int32()))
    assert read(ITEMS, format="parquet")["item"] == [4, 5]
    for path in Path().iterdir():
        path.unlink()
    Path("rows0.csv").write_text("item,price,click\n")
    packed("rows1.csv.zst", "item,price,click\n4,1,1\n5,2,0\n")
    Path("rows2.csv").write_text("item,price,click")
    assert read(ITEMS)["item"] == [4, 5]
    for name in ("rows0.csv", "rows2.csv"):
        Path(name).write_text("")
    packed("rows1.csv.zst", "4,1,1\n5,2,0\n")
    packed("rows3.csv.gz", "")
    assert read(ITEMS, columns=["item", "price", "click"])["item"] == [4, 5]


def test_a_parquet_file_without_rows_still_needs_its_columns(folder: Path) -> None:
    pq.write_table(pa.table({"item": pa.array([], pa.int64())}), "rows0.parquet")
    parquet("rows1.parquet", pa.array([4, 5]))
    with pytest.raises(Fault, match=r"rows0.parquet: got .*no column price, click"):
        read(ITEMS, format="parquet")


def test_globs_are_read_in_order_and_each_file_once(folder: Path) -> None:
    for at in (10, 2, 1):
        Path(f"rows{at}.tsv").write_text(f"item\tprice\tclick\n{at}\t1\t1\n")
    data = {"format": "tsv", "train": ["rows2*", "rows1*"]}
    assert read(ITEMS, **data)["item"] == [2, 1, 10]
    with pytest.raises(Fault, match=r"data.train: got rows2.tsv twice"):
        read(ITEMS, format="tsv", train=["rows*", "rows2.tsv"])


def test_a_header_after_a_byte_order_mark_remarks_and_blank_lines(folder: Path) -> None:
    Path("rows.csv").write_bytes("\ufeffitem,price,click\r\n4,1,1\r\n".encode())
    assert read(ITEMS)["item"] == [4]
    Path("rows.csv").write_text("# one\n# two\n\nitem,price,click\n# three\n4,1,1\n\n5,1,1\n")
    assert read(ITEMS, comment="#")["item"] == [4, 5]


@pytest.mark.parametrize(
    ("column", "message"),
    [
        (pa.array([1.0, float("nan")]), "holds double, wanted int64"),
        (pa.array([1.0, 2.0]), "holds double, wanted int64"),
        (pa.array(["1", "2"]), "holds string, wanted int64"),
        (pa.array([2**63, 1], pa.uint64()), "9223372036854775808"),
        (pa.array([True, False]), "holds bool, wanted int64"),
    ],
)
def test_what_is_no_id_is_a_fault(folder: Path, column: pa.Array, message: str) -> None:
    parquet("rows.parquet", column)
    with pytest.raises(Fault, match=f"rows.parquet: rows 1 to 2, column 'item': got .*{message}"):
        read(ITEMS, format="parquet")
    if pa.types.is_floating(column.type):
        with pytest.raises(Fault, match="column 'item': got double; wanted whole numbers or text"):
            read(ITEMS | {"features": ITEMS["features"][1:]}, format="parquet", group="item")


CITIES: dict[str, Any] = {
    "tasks": [{"name": "click"}],
    "features": [{"type": "categorical", "name": "city"}, {"type": "numeric", "name": "price"}],
}


@pytest.mark.parametrize("size", [3, 40])
@pytest.mark.parametrize("name", ["rows.csv", "rows.csv.gz", "rows.csv.zst"])
def test_a_comment_is_no_row_whatever_it_holds(
    folder: Path, name: str, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also one with as many fields as a row, at the start, at the end and across the reader's blocks."""
    monkeypatch.setattr(formats, "_BLOCK_BYTES", 64)
    row, comment = "a" * size + ",1,1", "## b,2,0"
    packed(name, f"{comment}\n##\n\ncity,price,click\n{row}\n{comment}\n# c,3,0\n{comment}\n\n{row}\n{comment}")
    found = read(CITIES, comment="##")
    assert found["city"] == ["a" * size, "# c", "a" * size] and found["price"] == [1.0, 3.0, 1.0]


def test_a_line_within_a_quoted_value_is_no_comment() -> None:
    """Whatever the blocks; a quote within a plain value is a letter, and a doubled one ends no quoted value."""
    lines = ["city,click", '"a', '# b ""', '# c",1', "# gone", '5" d,0', '# gone "', '"e",1', '"f ""', '# g"']
    text = "\n".join(lines).encode()
    wanted = "\n".join(line for line in lines if "gone" not in line).encode()
    for size in (1, 3, 7, 1000):
        kept = formats._Uncommented(spec(CITIES, comment="#").data)
        blocks = [pa.py_buffer(text[at : at + size]) for at in range(0, len(text), size)]
        assert b"".join(map(kept, [*blocks, pa.py_buffer(b"")])) == wanted


@pytest.mark.parametrize("quote", ["«", ",", "\x00"])
def test_a_quote_that_no_reader_can_take_is_refused(quote: str) -> None:
    with pytest.raises(Faults, match="printable ASCII letter other than the delimiter"):
        spec(CITIES, quote=quote)


@pytest.mark.parametrize(("trim", "inner"), [(True, "b"), (False, " b ")])
def test_values_of_a_list_are_trimmed_and_may_be_missing(folder: Path, trim: bool, inner: str) -> None:
    Path("rows.csv").write_text("tags,numbers,click\na| b |,1|?|3,1\n?,,0\n||?,7,1\n")
    lists = [("tags", {"type": "bag"}), ("numbers", {"type": "sequence", "dtype": "int64"})]
    features = [{"name": name, "max_length": 3} | kind for name, kind in lists]
    sections = {"tasks": CITIES["tasks"], "features": features}
    found = read(sections, null_values=["", "?"], trim=trim)
    assert found["tags"] == [["a", inner, None], [], [None, None, None]]
    assert found["numbers"] == [[1, None, 3], [], [7]]


def test_a_missing_weight_in_a_list_is_a_fault(folder: Path) -> None:
    Path("rows.csv").write_text("tags,weights,click\na|b,1|?,1\n")
    bag = {"type": "bag", "name": "tags", "weight_column": "weights", "max_length": 3}
    with pytest.raises(Fault, match=r"column 'weights': got null, NaN or infinity; wanted a finite weight an id"):
        read({"tasks": CITIES["tasks"], "features": [bag]}, null_values=["?"])


@pytest.mark.parametrize(
    ("data", "cities"),
    [
        ({"format": "tsv"}, ['"a', 'b"', "c"]),
        ({"format": "tsv", "quote": '"'}, ["a\t1\t1\nb", "c"]),
        ({"format": "csv"}, ["a,1,1\nb", "c"]),
        ({"format": "csv", "quote": ""}, ['"a', 'b"', "c"]),
        ({"format": "csv", "quote": "'"}, ['"a', 'b"', "c"]),
    ],
)
def test_quotes_enclose_values_in_csv_alone_unless_said_otherwise(
    folder: Path, data: dict[str, Any], cities: list[str]
) -> None:
    text = 'city,price,click\n"a,1,1\nb",2,0\nc,3,0\n'
    Path("rows.txt").write_text(text.replace(",", "\t") if data["format"] == "tsv" else text)
    assert read(CITIES, **data)["city"] == cities


def test_quotes_belong_to_text_tables(folder: Path) -> None:
    for wrong in ({"format": "parquet", "quote": '"'}, {"quote": "<>"}):
        with pytest.raises(Faults, match=r"'quote' belongs to csv and tsv|at most 1 character"):
            spec(CITIES, **wrong)


@pytest.mark.parametrize("start", ["", "\ufeff", "\n# a remark\n\n"])
def test_names_of_a_header_are_trimmed_as_values_are(folder: Path, start: str) -> None:
    Path("rows.csv").write_text(start + "city , price,\tclick \r\nBern,2, 1\r\n\r\nChur,3,0\r\n")
    assert read(CITIES, comment="#")["price"] == [2.0, 3.0]
    with pytest.raises(Fault, match="no column city, price, click; it has city ,  price"):
        read(CITIES, comment="#", trim=False)
    Path("rows.csv").write_text("city,city ,price,click\na,b,1,1\n")
    with pytest.raises(Fault, match="column city twice"):
        read(CITIES)
