"""The experiment file: overrides, faults with dotted paths, and every shipped file."""

from pathlib import Path

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


OWN = ["label:click", "group:", "day:", "split:", "row:", "history:items", "history:0:time", "negatives:user"]
READS = [
    '{{ type = "categorical", name = "h", column = "{}" }}',
    '{{ type = "numeric", name = "h", column = "{}" }}',
    '{{ type = "bag", name = "h", weight_column = "{}", max_length = 2 }}',
    '{{ type = "count", name = "h", by = ["{}"] }}',
]


@pytest.mark.parametrize("column", OWN)
@pytest.mark.parametrize("feature", READS)
def test_names_of_columns_that_the_etl_makes_are_refused(file: Path, feature: str, column: str) -> None:
    with pytest.raises(Faults, match=f"column '{column}' has the name of one that the ETL makes"):
        load_feature_spec(file, overrides=[f"features=[{feature.format(column)}]"])


def test_a_history_of_such_a_column_is_refused(file: Path) -> None:
    history = '[{ user = "u", time = "t", max_length = 2, columns = { past = "label:click" } }]'
    features = '[{ type = "sequence", name = "past", max_length = 2 }]'
    with pytest.raises(Faults, match="column 'label:click' has the name of one that the ETL makes"):
        load_feature_spec(file, overrides=[f"data.histories={history}", f"features={features}"])


@pytest.mark.parametrize("feature", READS)
def test_no_feature_reads_a_label(file: Path, feature: str) -> None:
    tasks = 'tasks=[{ name = "bought", column = "click" }]'
    with pytest.raises(Faults, match="a feature reads the column 'click', which is a label"):
        load_feature_spec(file, overrides=[tasks, f"features=[{feature.format('click')}]"])


@pytest.mark.parametrize("name", ["../esc", "", "a b", "a/b", ".", "1"])
def test_a_name_is_one_of_a_folder(file: Path, name: str) -> None:
    with pytest.raises(Faults, match=r"(?s)trial\.toml: tasks: got .*trial\.toml: name: got"):
        load_feature_spec(file, overrides=[f'name="{name}"', "tasks=[]"])
