"""Dead and busy rows of tables, counted from the training rows."""

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from etl.schema import IdFeature, Schema, Table, TaskColumn
from recsys import table_use
from recsys.data import Split
from recsys.experiment import Experiment
from recsys.parallel.world import open_world
from recsys.report import write_report
from recsys.table_use import TableUse, table_uses
from recsys.train import train
from tests.recsys.conftest import ROWS

SCHEMA = Schema(
    features=(
        IdFeature(name="item", type="categorical", table="item", linear_only=False),
        IdFeature(name="seen", type="sequence", table="item", linear_only=False, slots=3, dtype="list<int64>"),
        IdFeature(name="never", type="bag", table="never", linear_only=False, slots=2, dtype="list<int64>"),
    ),
    dense=(),
    tables=(Table(name="item", rows=300), Table(name="never", rows=5)),
    tasks=(TaskColumn(name="click", positive_rate=0.5),),
)


@pytest.fixture
def split(tmp_path: Path) -> Split:
    """Item 7 is looked up 6 times by itself and twice in lists, 250 and 299 once, in two files of small row groups."""
    lists = [[7], [7, 299], [], [], [250], [], []]
    columns = {
        "item": [7, 7, 7, 0, 7, 7, 7],
        "seen": pa.array(lists, pa.list_(pa.int64())),
        "never": pa.array([[]] * 7, pa.list_(pa.int64())),
        "click": pa.array([0, 1] * 3 + [0], pa.float32()),
    }
    table = pa.table(columns)
    for at, part in enumerate((table.slice(0, 3), table.slice(3))):
        pq.write_table(part, tmp_path / f"part-{at}.parquet", row_group_size=2)
    return Split(tmp_path, SCHEMA)


@pytest.mark.parametrize("block", [1 << 25, 256, 7])
def test_rows_and_lookups_are_counted_over_all_features_of_a_table(
    split: Split, monkeypatch: pytest.MonkeyPatch, block: int
) -> None:
    monkeypatch.setattr(table_use, "_BLOCK", block)
    with open_world("cpu") as world:
        found = table_uses(SCHEMA, split.groups, world=world)
    # The busiest 3 of 300 rows: 8 lookups, and two of those with one.
    assert found["item"] == TableUse(rows=300, dead=296, lookups=11, top_share=10 / 11)
    assert found["never"] == TableUse(rows=5, dead=5, lookups=0, top_share=None)


@pytest.mark.usefixtures("quiet")
def test_training_leaves_them_in_the_run(dataset: Path, tmp_path: Path, experiment: Callable[..., Experiment]) -> None:
    train(experiment(train={"epochs": 1}), data=dataset, run=tmp_path / "run", report=lambda record: None)
    found = json.loads((tmp_path / "run" / "tables.json").read_text())
    for table, rows in ROWS.items():
        files = sorted((dataset / "train").glob("*.parquet"))
        counts = Counter(np.concatenate([pq.read_table(f)[table].to_numpy() for f in files]).tolist())
        top = sum(number for _, number in counts.most_common(-(-rows // 100)))
        assert found[table] == {
            "rows": rows,
            "dead": rows - len(counts),
            "lookups": 6000,
            "top_share": pytest.approx(top / 6000),
        }
    page = write_report([tmp_path / "run"]).read_text()
    pair = found["pair"]
    assert f"<td>{pair['dead'] / 400:.1%}</td><td>{pair['top_share']:.1%}</td>" in page
    (tmp_path / "run" / "tables.json").unlink()
    assert "<td>–</td><td>–</td>" in write_report([tmp_path / "run"]).read_text()
