"""The experiment file: overrides, faults with dotted paths, and every shipped file."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from etl.experiment_file import load_feature_spec, read
from etl.faults import Fault, Faults
from etl.spec import Categorical, FeatureSpec, resolve

MINIMAL = """
data = { train = ["a.csv"], test = ["b.csv"] }
tasks = [{ name = "click" }]
features = [{ type = "categorical", columns = ["C1", "C2"] }, { type = "numeric", name = "n" }]
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "trial.toml"
    path.write_text(MINIMAL)
    return path


def test_one_block_names_many_columns(file: Path) -> None:
    name, spec = load_feature_spec(file, overrides=[])
    assert name == "trial"
    assert [f.name for f in resolve(spec.features)] == ["C1", "C2", "n"]
    assert spec.raw_columns() == {"C1": "string", "C2": "string", "n": "float64"}


def test_overrides_reach_sections_and_blocks(file: Path) -> None:
    overrides = ["data.split.seed=7", "features.0.min_count=3", "name=other", "data.null_values=['NA']"]
    name, spec = load_feature_spec(file, overrides=overrides)
    first = spec.features[0]
    assert isinstance(first, Categorical)
    assert (name, spec.data.split.seed, first.min_count, spec.data.null_values) == ("other", 7, 3, ["NA"])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("seed", "wanted a.b=value"),
        ("features.9.min_count=3", "an index from 0 to 1"),
        ("data.split.seed.x=3", None),
        ("name.x.y=3", "'name' holds 'trial'"),
    ],
)
def test_bad_overrides(file: Path, override: str, message: str | None) -> None:
    with pytest.raises((Fault, Faults), match=message):
        load_feature_spec(file, overrides=[override])


@pytest.mark.parametrize(
    ("features", "message"),
    [
        ('[{ type = "categorical" }]', "needs 'name', 'column' or 'columns'"),
        ('[{ type = "numeric", name = "n", as = "buckets" }]', "'boundaries' or 'quantiles'"),
        ('[{ type = "numeric", name = "n", as = "buckets", boundaries = [2.0, 1.0] }]', "must ascend"),
        ('[{ type = "cross", name = "x", inputs = ["a", "b"], hash_rows = 9 }]', "must be categorical or bucket"),
        (
            '[{ type = "cross", name = "x", inputs = ["a", "b"], hash_rows = 9 },'
            ' { type = "categorical", columns = ["a", "b"] }]',
            "listed before it, not",
        ),
        ('[{ type = "categorical", columns = ["a", "a"] }]', "named twice: a"),
        (
            '[{ type = "categorical", name = "a" }, { type = "numeric", name = "n", column = "a" }]',
            "set dtype = 'int64'",
        ),
        ('[{ type = "vector", name = "a" }]', "vector"),
    ],
)
def test_features_that_make_no_sense(tmp_path: Path, features: str, message: str) -> None:
    path = tmp_path / "trial.toml"
    lines = [line for line in MINIMAL.splitlines() if not line.startswith("features")]
    path.write_text("\n".join([*lines, f"features = {features}"]))
    with pytest.raises(Faults, match=message):
        load_feature_spec(path, overrides=[])


def test_a_missing_and_a_broken_file(tmp_path: Path) -> None:
    with pytest.raises(Fault, match="no such file"):
        read(tmp_path / "none.toml", overrides=[])
    (tmp_path / "broken.toml").write_text("a = = 1")
    with pytest.raises(Fault, match="TOML"):
        read(tmp_path / "broken.toml", overrides=[])


@pytest.mark.parametrize("path", sorted(Path(__file__).parents[2].glob("experiments/**/*.toml")), ids=lambda p: p.name)
def test_every_shipped_file_loads_and_survives_json(path: Path) -> None:
    _, spec = load_feature_spec(path, overrides=[])
    assert FeatureSpec.model_validate_json(spec.model_dump_json(by_alias=True)) == spec


OWN = [
    "label:click",
    "group:",
    "weight:",
    "day:",
    "split:",
    "row:",
    "history:items",
    "history:0:time",
    "negatives:user",
]
READS = [
    '{{ type = "categorical", name = "h", column = "{}" }}',
    '{{ type = "numeric", name = "h", column = "{}" }}',
    '{{ type = "bag", name = "h", weight_column = "{}", max_length = 2 }}',
    '{{ type = "count", name = "h", by = ["{}"] }}',
]


@pytest.mark.parametrize("column", OWN)
@pytest.mark.parametrize("feature", READS)
def test_names_of_columns_that_the_etl_makes_are_refused(file: Path, feature: str, column: str) -> None:
    with pytest.raises(Faults, match=f"column '{column}', the name of one that the ETL makes"):
        load_feature_spec(file, overrides=[f"features=[{feature.format(column)}]"])


def test_a_history_of_such_a_column_is_refused(file: Path) -> None:
    history = '[{ user = "u", time = "t", max_length = 2, columns = { past = "label:click" } }]'
    features = '[{ type = "sequence", name = "past", max_length = 2 }]'
    with pytest.raises(Faults, match="column 'label:click', the name of one that the ETL makes"):
        load_feature_spec(file, overrides=[f"data.histories={history}", f"features={features}"])


@pytest.mark.parametrize("feature", READS)
def test_no_feature_reads_a_label(file: Path, feature: str) -> None:
    tasks = 'tasks=[{ name = "bought", column = "click" }]'
    with pytest.raises(Faults, match="no feature that reads the column 'click', which is a label"):
        load_feature_spec(file, overrides=[tasks, f"features=[{feature.format('click')}]"])


@pytest.mark.parametrize("name", ["../esc", "", "a b", "a/b", ".", "1"])
def test_a_name_is_one_of_a_folder(file: Path, name: str) -> None:
    with pytest.raises(Faults, match=r"(?s)trial\.toml: tasks: got .*trial\.toml: name: got"):
        load_feature_spec(file, overrides=[f'name="{name}"', "tasks=[]"])


@pytest.fixture
def rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Path("a.csv").write_text("# a remark\nC2, C10,click,n1,n2,C1\nx,y,1,1,2,z\n")
    pq.write_table(pa.table({"C2": ["x"], "n1": [1.0], "C1": ["y"], "click": [1]}), "a.parquet")
    return tmp_path


@pytest.mark.parametrize(
    ("data", "globs", "columns"),
    [
        ("{ train = ['a.csv'], test = ['b.csv'], comment = '#' }", ["C*", "n?"], ["C2", "C10", "C1", "n1", "n2"]),
        ("{ train = ['a.csv'], test = ['b.csv'], comment = '#' }", ["C[12]", "n1..n2"], ["C2", "C1", "n1", "n2"]),
        ("{ train = ['b.csv'], test = ['b.csv'], columns = ['click', 'C9', 'n'] }", ["C*"], ["C9"]),
        ("{ train = ['a.*t'], test = ['b'], format = 'parquet' }", ["C*"], ["C2", "C1"]),
    ],
)
def test_a_glob_names_columns_of_the_first_file(
    file: Path, rows: Path, data: str, globs: list[str], columns: list[str]
) -> None:
    Path("b.csv").touch()
    features = f"[{{ type = 'categorical', columns = {globs} }}, {{ type = 'numeric', name = 'm' }}]"
    overrides = [f"data={data}", f"features={features}"]
    _, spec = load_feature_spec(file, overrides=overrides)
    assert [feature.name for feature in resolve(spec.features)] == [*columns, "m"]
    named = features.replace(str(globs), str(columns))
    _, other = load_feature_spec(file, overrides=[*overrides, f"features={named}"])
    assert list(resolve(other.features)) == list(resolve(spec.features))


def test_a_glob_without_a_match_or_a_file_is_a_fault(file: Path, rows: Path) -> None:
    glob = "features=[{ type = 'categorical', columns = ['C1', 'D*'] }]"
    said = r"trial.toml: features.0.columns: got 'D\*', which no column of a.csv matches; wanted .* C2, C10, click"
    with pytest.raises(Fault, match=said):
        load_feature_spec(file, overrides=[glob, "data.comment='#'"])
    with pytest.raises(Fault, match=r"data.train: got no file 'gone.csv'"):
        load_feature_spec(file, overrides=[glob, "data.train=['gone.csv']"])
    Path("a.csv").write_text("")
    with pytest.raises(Fault, match=r"a.csv: got .*; wanted a readable csv file with named columns"):
        load_feature_spec(file, overrides=[glob])
    with pytest.raises(Faults, match=r"data.format: got 'xls'"):
        load_feature_spec(file, overrides=[glob, "data.format=xls"])
    Path("a.csv").write_text("C1,click\n")
    with pytest.raises(Faults, match="named twice: click"):
        load_feature_spec(file, overrides=["features=[{ type = 'categorical', columns = ['*'] }]"])
