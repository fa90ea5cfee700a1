"""Reading shards: the law that each row comes once, and what is refused."""

from collections import Counter
from collections.abc import Callable, Iterable
from itertools import chain
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from etl.faults import Fault
from etl.schema import DenseFeature, IdFeature, Schema, Table, TaskColumn
from recsys.data import Batch, Slice, Split, open_dataset
from recsys.experiment import Experiment
from recsys.loss import mean_loss
from recsys.network import Scored
from recsys.shards import RowGroup, Rows

TOTAL = 3000
SCHEMA = Schema(
    features=(IdFeature(name="row", type="categorical", table="row", linear_only=False),),
    dense=(DenseFeature(name="x"),),
    tables=(Table(name="row", rows=TOTAL),),
    tasks=(TaskColumn(name="click", positive_rate=0.5),),
)


@pytest.fixture(scope="module")
def numbered(tmp_path_factory: pytest.TempPathFactory) -> Split:
    """Rows that carry their number as id, in 4 files of more row groups than one shuffle window has."""
    folder = tmp_path_factory.mktemp("numbered")
    for at, rows in enumerate(np.array_split(np.arange(TOTAL), [100, 1700, 1701])):
        table = pa.table({"row": rows, "x": rows.astype(np.float32), "click": (rows % 2).astype(np.float32)})
        pq.write_table(table, folder / f"part-{at}.parquet", row_group_size=83)
    return Split(folder, SCHEMA)


def real_ids(batches: Iterable[Batch]) -> list[list[int]]:
    """Each batch's ids without the padding."""
    return [batch.ids_BS[batch.real_B > 0, 0].tolist() for batch in batches]


def by_step(split: Split, *, ranks: int, batch_size: int, epoch: int, start: int) -> list[list[int]]:
    """Each step's ids over all ranks, in rank order."""
    slices = [Slice(rank, ranks, batch_size) for rank in range(ranks)]
    of_ranks = [real_ids(split.shuffled(mine, seed=5, epoch=epoch, start=start)) for mine in slices]
    return [list(chain(*parts)) for parts in zip(*of_ranks, strict=True)]


@settings(max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(ranks=st.integers(1, 4), batch_size=st.integers(40, 900), epoch=st.integers(0, 3), data=st.data())
def test_each_row_comes_once_and_a_resumed_epoch_takes_the_rest(
    numbered: Split, ranks: int, batch_size: int, epoch: int, data: st.DataObject
) -> None:
    steps = by_step(numbered, ranks=ranks, batch_size=batch_size, epoch=epoch, start=0)
    assert Counter(chain(*steps)) == Counter(range(TOTAL))
    taken = data.draw(st.integers(0, len(steps) - 1))
    start = sum(len(step) for step in steps[:taken])
    assert by_step(numbered, ranks=ranks, batch_size=batch_size, epoch=epoch, start=start) == steps[taken:]


@settings(max_examples=10, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(ranks=st.integers(2, 4), batch_size=st.integers(40, 300))
def test_the_rows_of_a_step_do_not_depend_on_the_ranks(numbered: Split, ranks: int, batch_size: int) -> None:
    one = by_step(numbered, ranks=1, batch_size=ranks * batch_size, epoch=0, start=0)
    several = by_step(numbered, ranks=ranks, batch_size=batch_size, epoch=0, start=0)
    assert [sorted(step) for step in several] == [sorted(step) for step in one]


class Counting(Split):
    """Remembers which row groups it decoded."""

    def _decode(self, group: RowGroup, into: Rows) -> None:
        self.read = [*getattr(self, "read", []), (group.file.name, group.index)]
        super()._decode(group, into)


@pytest.mark.parametrize(("ranks", "share"), [(1, 1.0), (2, 0.75), (4, 0.5)])
def test_a_rank_decodes_its_share_of_the_row_groups_and_none_twice(numbered: Split, ranks: int, share: float) -> None:
    folder, total = numbered.groups[0].file.parent, len(numbered.groups)
    everything = set()
    for rank in range(ranks):
        split = Counting(folder, SCHEMA)
        assert len(list(split.shuffled(Slice(rank, ranks, 100), seed=5, epoch=0, start=0))) == -(
            -TOTAL // (100 * ranks)
        )
        assert len(split.read) == len(set(split.read)) <= share * total
        everything |= set(split.read)
    assert len(everything) == total


def test_epochs_differ_in_order_and_evaluation_keeps_that_of_the_files(numbered: Split) -> None:
    first, second = (by_step(numbered, ranks=1, batch_size=500, epoch=epoch, start=0) for epoch in (0, 1))
    assert first != second
    assert list(chain(*real_ids(numbered.in_file_order(Slice(0, 1, 500))))) == list(range(TOTAL))
    windows = [{row // 83 for row in step} for step in first]
    assert all(len(groups) > 8 for groups in windows), "rows of a step come from all over a window"


def test_a_window_is_as_many_row_groups_as_its_bytes_hold(numbered: Split, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two of them here, so that the 80 rows of a step, which may lie in two windows, come from few groups."""
    monkeypatch.setattr("recsys.data.WINDOW_BYTES", 2 * 83 * Rows.bytes_each(SCHEMA))
    steps = by_step(numbered, ranks=1, batch_size=80, epoch=0, start=0)
    assert Counter(chain(*steps)) == Counter(range(TOTAL))
    groups = [sum(row >= group.first for group in numbered.groups) for row in range(TOTAL)]
    assert max(len({groups[row] for row in step}) for step in steps) <= 4


def test_in_file_order_each_rank_has_a_stretch_and_all_equally_many_batches(numbered: Split) -> None:
    stretches = []
    for rank in range(4):
        batches = list(numbered.in_file_order(Slice(rank, 4, 400)))
        assert [batch.ids_BS.shape for batch in batches] == [(400, 1)] * 2
        stretches += real_ids(batches)
    assert list(chain(*stretches)) == list(range(TOTAL))


def test_ranks_have_equal_shapes_also_where_rows_run_out(tmp_path: Path) -> None:
    """Seven rows in steps of up to twelve: one or two for each of four ranks, then of eight ranks one has none."""
    split = write_files(tmp_path, [3, 4], group_rows=2)
    for ranks, counts in ((4, [2, 2, 2, 1]), (8, [1] * 7 + [0])):
        real, ids = [], []
        for rank in range(ranks):
            (batch,) = split.shuffled(Slice(rank, ranks, 3), seed=1, epoch=0, start=0)
            assert (batch.ids_BS.shape, batch.global_rows) == ((3, 1), 7)
            real.append(int(batch.real_B.sum()))
            assert batch.weights_BT[:, 0].equal(batch.real_B)
            own = batch.ids_BS[:, 0].tolist()
            ids += own[: real[-1]]
            assert set(own[real[-1] :]) <= set(own[: max(real[-1], 1)]), "copies of the rank's own rows"
        assert real == counts
        assert sorted(ids) == list(range(7))
    for rank in range(9):
        (batch,) = split.in_file_order(Slice(rank, 9, 1))
        assert (batch.ids_BS[:, 0].tolist(), batch.real_B.tolist()) == ([min(rank, 6)], [float(rank < 7)])


def test_lists_values_conditions_and_groups_are_read(tmp_path: Path) -> None:
    bag = IdFeature(
        name="tags", type="bag", table="row", linear_only=False, slots=3, weighted=True, dtype="list<int64>"
    )
    tasks = tuple(TaskColumn(name=n, positive_rate=0.5, given=g) for n, g in (("click", None), ("buy", "click")))
    schema = SCHEMA.model_copy(update={"features": (*SCHEMA.features, bag), "tasks": tasks, "group": True})
    floats = {
        name: pa.array(values, pa.float32()) for name, values in {"x": [0, 1], "click": [0, 1], "buy": [0, 1]}.items()
    }
    lists = {"tags": [[], [5, 6]], "tags:value": pa.array([[], [0.5, 2]], pa.list_(pa.float32()))}
    pq.write_table(pa.table({"row": [7, 8], **floats, **lists, "group:": [2**62, -1]}), tmp_path / "part-0.parquet")
    (batch,) = Split(tmp_path, schema).in_file_order(Slice(0, 1, 2))
    assert batch.ids_BS.tolist() == [[7, -1, -1, -1], [8, 5, 6, -1]]
    assert batch.floats_BN.tolist() == [[0, 0, 0, 0], [1, 0.5, 2, 0]]
    assert batch.weights_BT.tolist() == [[1, 0], [1, 1]]
    assert batch.groups_BG.tolist() == [[2**62], [-1]]


def test_a_rows_weight_multiplies_what_counts(tmp_path: Path) -> None:
    tasks = tuple(TaskColumn(name=n, positive_rate=0.5, given=g) for n, g in (("click", None), ("buy", "click")))
    schema = SCHEMA.model_copy(update={"tasks": tasks, "weight": True})
    columns = {"x": [0, 1, 2], "click": [0, 1, 1], "buy": [0, 1, 0], "weight:": [0.5, 3, 0]}
    floats = {name: pa.array(values, pa.float32()) for name, values in columns.items()}
    pq.write_table(pa.table({"row": [7, 8, 9], **floats}), tmp_path / "part-0.parquet")
    (batch,) = Split(tmp_path, schema).in_file_order(Slice(0, 1, 4))
    assert batch.weights_BT.tolist() == [[0.5, 0], [3, 3], [0, 0], [0, 0]]
    assert batch.real_B.tolist() == [1, 1, 1, 0]
    scored = Scored(torch.tensor([[0.3, -1.0], [1.0, 2.0], [0.5, 0.5], [9.0, 9.0]]), torch.zeros(4))
    _, loss = mean_loss(scored, batch, task_weights_T=torch.ones(2), ranks=1)
    p = scored.logits_BT.sigmoid()
    wanted = -(0.5 * (1 - p[0, 0]).log() + 3 * p[1, 0].log() + 3 * p[1, 1].log()) / 3
    torch.testing.assert_close(loss, wanted)


def write_files(folder: Path, sizes: list[int], *, group_rows: int) -> Split:
    """Files of these sizes, their rows numbered through."""
    first = 0
    for at, size in enumerate(sizes):
        rows = np.arange(first, first := first + size)
        table = pa.table({"row": rows, "x": rows.astype(np.float32), "click": np.zeros(size, np.float32)})
        pq.write_table(table, folder / f"part-{at:02}.parquet", row_group_size=group_rows)
    return Split(folder, SCHEMA)


@pytest.mark.slow
@settings(max_examples=200)
@given(
    sizes=st.lists(st.integers(0, 60), min_size=1, max_size=7).filter(any),
    group_rows=st.integers(1, 40),
    batch_size=st.integers(1, 30),
    ranks=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    share=st.floats(0, 1),
)
def test_any_files_on_any_ranks_give_every_row_once_also_where_the_ranks_change(
    sizes: list[int], group_rows: int, batch_size: int, ranks: tuple[int, int], share: float
) -> None:
    """Uneven and empty files, fewer files than ranks, ranks without rows. Equal steps on all ranks: none waits."""
    with TemporaryDirectory() as folder:
        split = write_files(Path(folder), sizes, group_rows=group_rows)
        before = by_step(split, ranks=ranks[0], batch_size=batch_size, epoch=0, start=0)
        taken = before[: round(share * len(before))]
        start = sum(len(step) for step in taken)
        rest = by_step(split, ranks=ranks[1], batch_size=batch_size, epoch=0, start=start) if start < sum(sizes) else []
        stretches = [split.in_file_order(Slice(rank, ranks[1], batch_size)) for rank in range(ranks[1])]
        in_order = list(chain(*(ids for stretch in stretches for ids in real_ids(stretch))))
    assert Counter(chain(*before)) == Counter(range(sum(sizes)))
    assert Counter(chain(*taken, *rest)) == Counter(range(sum(sizes)))
    assert in_order == list(range(sum(sizes)))


def test_a_row_is_found_again_by_its_number(tmp_path: Path) -> None:
    split = write_files(tmp_path, [5, 0, 9], group_rows=2)
    for batch in split.shuffled(Slice(1, 2, 3), seed=1, epoch=0, start=0):
        for row, number in zip(
            batch.ids_BS[:, 0].tolist(), [] if batch.numbers_B is None else batch.numbers_B.tolist(), strict=True
        ):
            file, within = (0, row) if row < 5 else (2, row - 5)
            assert split.place(number) == f"{tmp_path}/part-{file:02}.parquet, row {within}"


def test_a_batch_in_parts_is_the_same_rows(numbered: Split) -> None:
    whole = next(iter(numbered.in_file_order(Slice(0, 1, 12))))
    parts = whole.parts(3)
    assert [part.ids_BS[:, 0].tolist() for part in parts] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]
    assert {part.global_rows for part in parts} == {whole.global_rows}


@pytest.mark.parametrize("column", ["x", "click"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_value_that_is_no_number_is_named_with_its_row(tmp_path: Path, column: str, value: float) -> None:
    columns = {"row": np.arange(4), "x": np.zeros(4, np.float32), "click": np.zeros(4, np.float32)}
    columns[column][3] = value
    pq.write_table(pa.table(columns), tmp_path / "part-0.parquet", row_group_size=2)
    with pytest.raises(Fault, match=rf"part-0\.parquet, row 3: got {value} in column '{column}'"):
        list(Split(tmp_path, SCHEMA).in_file_order(Slice(0, 1, 2)))


@pytest.mark.parametrize("big", [2**24 + 1, 2**31 - 1, 2**31, 2**33 + 5])
def test_large_ids_stay_exact(tmp_path: Path, big: int) -> None:
    rows = pa.table({"row": [big, 0], "x": pa.array([0.0, 1.0], pa.float32()), "click": pa.array([0, 1], pa.float32())})
    pq.write_table(rows, tmp_path / "part-0.parquet")
    split = Split(tmp_path, SCHEMA.model_copy(update={"tables": (Table(name="row", rows=big + 1),)}))
    (batch,) = split.in_file_order(Slice(0, 1, 2))
    assert batch.ids_BS.dtype == torch.int64
    assert batch.ids_BS[:, 0].tolist() == [big, 0]


def test_ids_of_a_batch_lie_feature_after_feature_also_across_windows(tmp_path: Path) -> None:
    ids = pa.array(np.arange(24) % 9)
    rows = pa.table({"row": ids, "other": ids, "click": pa.array(np.zeros(24, np.float32))})
    pq.write_table(rows, tmp_path / "part-0.parquet", row_group_size=4)
    features = [IdFeature(name=name, type="categorical", table=name, linear_only=False) for name in ("row", "other")]
    tables = [Table(name=name, rows=9) for name in ("row", "other")]
    schema = SCHEMA.model_copy(update={"features": tuple(features), "tables": tuple(tables), "dense": ()})
    for batch in Split(tmp_path, schema).in_file_order(Slice(0, 1, 6)):
        assert batch.ids_BS.t().is_contiguous()


@pytest.mark.parametrize(
    ("column", "values", "said"),
    [
        ("row", pa.array([0, TOTAL]), f"column 'row': got id {TOTAL}; wanted ids from 0 to {TOTAL - 1}"),
        ("row", pa.array([0, -1]), "got id -1"),
        ("row", pa.array([0, 2**32]), f"got id {2**32}"),
        ("row", pa.array([0.0, 1.0]), "column 'row' of double"),
        ("click", pa.array([None, 1.0], pa.float32()), "column 'click' of float with 1 nulls"),
        ("click", pa.array([[1.0], []], pa.list_(pa.float32())), "column 'click' of list<element: float>"),
        ("x", None, "no column x"),
    ],
)
def test_a_broken_shard_is_named(tmp_path: Path, column: str, values: pa.Array | None, said: str) -> None:
    columns = {
        "row": pa.array([0, 1]),
        "x": pa.array([0.0, 1.0], pa.float32()),
        "click": pa.array([0, 1], pa.float32()),
    }
    columns = {name: array for name, array in (columns | {column: values}).items() if array is not None}
    pq.write_table(pa.table(columns), tmp_path / "part-0.parquet")
    with pytest.raises(Fault) as fault:
        list(Split(tmp_path, SCHEMA).in_file_order(Slice(0, 1, 2)))
    assert said in str(fault.value)
    assert "part-0.parquet" in str(fault.value)


def test_a_truncated_or_absent_shard_is_a_fault(tmp_path: Path) -> None:
    with pytest.raises(Fault, match="no rows"):
        Split(tmp_path, SCHEMA)
    (tmp_path / "part-0.parquet").write_bytes(b"PAR1")
    with pytest.raises(Fault, match=r"part-0\.parquet"):
        Split(tmp_path, SCHEMA)


def test_stale_data_is_refused(dataset: Path, experiment: Callable[..., Experiment]) -> None:
    open_dataset(dataset, experiment().data_hash())
    open_dataset(dataset, experiment(train={"epochs": 9}, seed=4).data_hash())
    with pytest.raises(Fault, match="run 'python -m etl run' again"):
        open_dataset(dataset, experiment(data={"null_values": ["-"]}).data_hash())
    with pytest.raises(Fault, match="no such file"):
        open_dataset(dataset / "train", experiment().data_hash())
