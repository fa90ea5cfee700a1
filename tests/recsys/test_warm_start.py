"""Runs that start from another one: with more rows, with another head, with frozen tables, an FNN from an FM."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from torch import Tensor

from etl.faults import Fault, Faults
from etl.schema import Schema, Table
from recsys.checkpoint import best, latest
from recsys.data import Batch, Slice, Split
from recsys.experiment import Experiment
from recsys.learner import Learner
from recsys.models.fm import FMConfig
from recsys.models.fnn import FNNConfig
from recsys.models.wide import WideConfig
from recsys.parallel.state import read_tensors, restore, save
from recsys.parallel.world import World, open_world
from recsys.predict import load_network
from recsys.progress import quiet_libraries
from recsys.train import train
from recsys.warm_start import start_from
from tests.recsys.conftest import ROWS

Make = Callable[..., Experiment]
pytestmark = pytest.mark.usefixtures("quiet")
ADDED = {"user": 15, "item": 3, "pair": 0}
ADAGRAD = {"optimizer": "adagrad", "learning_rate": 0.1, "accumulator_start": 0.01}
FTRL = {"optimizer": "ftrl", "learning_rate": 0.1, "accumulator_start": 0.1, "preserve_init": True}
TABLES: dict[str, dict[str, Any]] = {
    "a state a row, fused": {"optimizer": "rowwise_adagrad", "learning_rate": 0.1},
    "a state a weight, fused": ADAGRAD,
    "no state": {"optimizer": "sgd", "learning_rate": 0.1},
    "two own states": {"optimizer": "adam", "learning_rate": 0.05, "eps": 1e-3},
    "two optimizers": ADAGRAD | {"linear": FTRL},
    "copies": {"optimizer": "adam", "learning_rate": 0.05, "sharding": "data_parallel"},
    "copies, a state a row": {"optimizer": "rowwise_adagrad", "learning_rate": 0.1, "sharding": "data_parallel"},
}


def silent(record: Any) -> None:
    """Nobody watches."""


def grown(schema: Schema) -> Schema:
    tables = tuple(Table(name=t.name, rows=t.rows + ADDED[t.name]) for t in schema.tables)
    return schema.model_copy(update={"tables": tables})


def write_vocabulary(run: Path, table: str, keys: list[int]) -> None:
    folder = run / "transform" / "vocabulary"
    folder.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({"key": pa.array(keys, pa.int64())}), folder / f"{table}.parquet")


def first_run(experiment: Experiment, dataset: Path, run: Path) -> Path:
    train(experiment, data=dataset, run=run, report=silent)
    return run


def tensors(learner: Learner, folder: Path) -> dict[str, Tensor]:
    save(folder, learner.sharded, optimizer=learner.optimizer)
    return read_tensors(folder)


def started(experiment: Experiment, schema: Schema, world: World, run: Path) -> tuple[Learner, int]:
    """On the schema's rows, with a vocabulary as the ETL would leave it where there are more than before."""
    run.mkdir()
    for table in schema.tables:
        if table.rows > ROWS[table.name]:
            write_vocabulary(experiment.starts_from or run, table.name, list(range(ROWS[table.name])))
            write_vocabulary(run, table.name, list(range(table.rows)))
    learner = Learner(experiment, schema, world=world)
    return learner, start_from(learner, experiment, schema=schema, run=run)


def a_batch(dataset: Path, schema: Schema) -> Batch:
    return next(iter(Split(dataset / "train", schema).in_file_order(Slice(0, 1, 256))))


@pytest.mark.parametrize("kind", TABLES)
def test_old_rows_keep_weights_and_states_and_new_ones_start_as_usual(
    dataset: Path, tmp_path: Path, experiment: Make, schema: Schema, kind: str
) -> None:
    day1 = experiment(embedding=TABLES[kind], train={"epochs": 1})
    run = first_run(day1, dataset, tmp_path / "one")
    day2 = experiment(embedding=TABLES[kind], train={"start_from": str(run)})
    found = latest(run)
    with open_world("cpu") as world:
        fresh = tensors(Learner(day2, grown(schema), world=world), tmp_path / "fresh")
        learner, seen = started(day2, grown(schema), world, tmp_path / "two")
        start, old = tensors(learner, tmp_path / "start"), read_tensors(best(run))
        assert start.keys() == old.keys()
        for name, tensor in start.items():
            rows = len(old[name]) if tensor.dim() else 1
            torch.testing.assert_close(tensor[:rows] if tensor.dim() else tensor, old[name], rtol=0, atol=0, msg=name)
            if tensor.dim():
                torch.testing.assert_close(tensor[rows:], fresh[name][rows:], rtol=0, atol=0, msg=name)
        added = [name for name in old if old[name].dim() and len(start[name]) > len(old[name])]
        states = 0 if kind == "no state" else 2 if kind in ("two own states", "two optimizers", "copies") else 1
        assert len(added) == 2 * (1 + states), "user and item"
        assert found and seen == (found[1].step if states else 0)

        batch = a_batch(dataset, schema)
        whole = Learner(day1, schema, world=world)
        restore(best(run), whole.sharded, optimizer=whole.optimizer)
        for one, name in ((whole, "a"), (learner, "b")):
            torch.manual_seed(0)
            one.update(batch, step=25, guard=lambda scored, batch, logloss: None)
            tensors(one, tmp_path / name)
        wanted = read_tensors(tmp_path / "a")
        for name, tensor in read_tensors(tmp_path / "b").items():
            rows = len(wanted[name]) if tensor.dim() else 1
            torch.testing.assert_close(
                tensor[:rows] if tensor.dim() else tensor, wanted[name], rtol=0, atol=1e-6, msg=name
            )
        assert any(not torch.equal(wanted[name], old[name]) for name in wanted), "the step moved something"


@pytest.fixture(scope="module")
def plain(dataset: Path, experiment: Make, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of the experiment as it is."""
    quiet_libraries()
    return first_run(experiment(train={"epochs": 1}), dataset, tmp_path_factory.mktemp("plain") / "run")


def test_a_changed_head_starts_anew_where_its_shape_differs_and_says_so(
    plain: Path, dataset: Path, tmp_path: Path, experiment: Make, schema: Schema, caplog: pytest.LogCaptureFixture
) -> None:
    model = {"hidden": [16, 12]}
    changed = experiment(model=model, train={"start_from": str(plain)})
    with open_world("cpu") as world:
        fresh = tensors(Learner(changed, schema, world=world), tmp_path / "fresh")
        learner, _ = started(changed, schema, world, tmp_path / "two")
        start, old = tensors(learner, tmp_path / "start"), read_tensors(best(plain))
    anew = {f"deep.layers.{at}" for at in ("3.weight", "3.bias", "6.weight")}
    for name in start:
        if name.startswith("model.head."):
            source = fresh if name.removeprefix("model.head.") in anew else old
            assert torch.equal(start[name], source[name]), name
    assert {f"model.head.{name}" for name in anew} <= set(said(tmp_path)["dense"]["initialised"])
    (message,) = [record.getMessage() for record in caplog.records if record.name == "recsys.warm_start"]
    assert "model.head.deep.layers.3.weight" in message and "layers.0" not in message


def said(folder: Path) -> Any:
    return json.loads((folder / "two" / "start.json").read_text())


def test_states_of_another_optimizer_begin_anew(
    plain: Path, tmp_path: Path, experiment: Make, schema: Schema, caplog: pytest.LogCaptureFixture
) -> None:
    changed = experiment(embedding={"optimizer": "adagrad"}, train={"start_from": str(plain), "optimizer": "sgd"})
    with open_world("cpu") as world:
        learner, seen = started(changed, schema, world, tmp_path / "two")
        start = tensors(learner, tmp_path / "start")
    assert seen == 0
    assert not any(tensor.any() for name, tensor in start.items() if name.endswith("momentum1"))
    assert said(tmp_path)["tables"]["user"] == {"rows": 60, "rows_taken": 60, "states_taken": False}
    assert "optimizer states of user" in caplog.text


def test_a_run_that_is_killed_goes_on_from_its_own_checkpoint(
    plain: Path, dataset: Path, tmp_path: Path, experiment: Make
) -> None:
    settings = {"epochs": 1, "checkpoint_every_steps": 10, "keep": 9, "start_from": str(plain)}
    adam = {"optimizer": "adam", "learning_rate": 0.05}
    one = first_run(experiment(embedding=adam, train={"epochs": 1}), dataset, tmp_path / "one")
    second = experiment(embedding=adam, train=settings | {"start_from": str(one)})
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    train(second, data=dataset, run=whole, report=silent)

    def stop(record: Any) -> None:
        if record["step"] == 15:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(second, data=dataset, run=cut, report=stop)
    train(second, data=dataset, run=cut, report=silent)
    wanted, found = (read_tensors(best(run)) for run in (whole, cut))
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    progress = latest(cut)
    assert progress and progress[1].steps_before == progress[1].step == 24


@pytest.mark.parametrize("sharding", ["auto", "data_parallel"])
@pytest.mark.parametrize("optimizer", ["rowwise_adagrad", "sgd", "adam"])
def test_frozen_tables_stay_and_have_no_states(
    plain: Path, dataset: Path, tmp_path: Path, experiment: Make, sharding: str, optimizer: str
) -> None:
    tables = {name: {"frozen": True} for name in ("item", "pair")}
    embedding = {"optimizer": optimizer, "learning_rate": 0.1, "l2": 0.01, "l2_scope": "table", "sharding": sharding}
    frozen = experiment(embedding=embedding | {"tables": tables}, train={"start_from": str(plain), "epochs": 1})
    train(frozen, data=dataset, run=tmp_path / "two", report=silent)
    old, new = read_tensors(best(plain)), read_tensors(best(tmp_path / "two"))
    for table in ("item", "pair", "user"):
        name = f"model.tables.embedding_bags.{table}.weight"
        assert torch.equal(new[name], old[name]) == (table != "user"), table
        has_states = table == "user" and (optimizer, sharding) != ("sgd", "data_parallel")
        assert any(f"{table}.momentum1" in key for key in new) == has_states


def test_a_whole_model_of_frozen_tables_learns_its_head(
    plain: Path, dataset: Path, tmp_path: Path, experiment: Make
) -> None:
    settings = experiment(embedding={"frozen": True}, train={"start_from": str(plain), "epochs": 1})
    train(settings, data=dataset, run=tmp_path / "two", report=silent)
    old, new = read_tensors(best(plain)), read_tensors(best(tmp_path / "two"))
    for name in old:
        if name.startswith("model."):
            assert torch.equal(new[name], old[name]) == ("embedding_bags" in name), name


@pytest.mark.parametrize(
    ("new", "said"),
    [
        ([5, 6, 7, 9], None),
        ([5, 7, 6, 9], "other values on the rows of the old vocabulary"),
        ([5, 6], "other values on the rows of the old vocabulary"),
        (None, "15 rows more, and no vocabulary"),
    ],
)
def test_rows_of_another_meaning_are_refused(
    plain: Path, tmp_path: Path, experiment: Make, schema: Schema, new: list[int] | None, said: str | None
) -> None:
    copied = tmp_path / "copied"
    copied.mkdir()
    for part in ("experiment.json", "schema.json", "checkpoints"):
        (copied / part).symlink_to(plain / part)
    for table in ("user", "item"):
        write_vocabulary(copied, table, [5, 6, 7])
        if new is not None:
            write_vocabulary(tmp_path / "two", table, new)
    second = experiment(train={"start_from": str(copied)})
    with open_world("cpu") as world:
        learner = Learner(second, grown(schema), world=world)
        (tmp_path / "two").mkdir(exist_ok=True)
        if said is None:
            start_from(learner, second, schema=grown(schema), run=tmp_path / "two")
            return
        with pytest.raises(Faults, match="table 'user'") as faults:
            start_from(learner, second, schema=grown(schema), run=tmp_path / "two")
    assert said in str(faults.value)


def test_fewer_rows_are_refused(plain: Path, tmp_path: Path, experiment: Make, schema: Schema) -> None:
    fewer = schema.model_copy(update={"tables": tuple(Table(name=n, rows=r - 1) for n, r in ROWS.items())})
    second = experiment(train={"start_from": str(plain)})
    with open_world("cpu") as world, pytest.raises(Faults, match="1 rows less"):
        started(second, fewer, world, tmp_path / "two")


def test_no_run_and_an_unfinished_one_are_refused(plain: Path, dataset: Path, tmp_path: Path, experiment: Make) -> None:
    nowhere = experiment(train={"start_from": str(tmp_path / "none")})
    with pytest.raises(Fault, match=r"train\.start_from: got .*no finished run"):
        train(nowhere, data=dataset, run=tmp_path / "two", report=silent)

    def stop(record: Any) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(experiment(), data=dataset, run=tmp_path / "broken", report=stop)
    with pytest.raises(Fault, match="no finished run"):
        train(
            experiment(train={"start_from": str(tmp_path / "broken")}),
            data=dataset,
            run=tmp_path / "three",
            report=silent,
        )


def test_a_damaged_checkpoint_is_refused(plain: Path, dataset: Path, tmp_path: Path, experiment: Make) -> None:
    copied = tmp_path / "copied"
    shutil.copytree(plain, copied)
    shard = next(best(copied).glob("__0_*.distcp"))
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    with pytest.raises(Fault, match="other content than was written"):
        train(experiment(train={"start_from": str(copied)}), data=dataset, run=tmp_path / "two", report=silent)


def test_a_run_starts_from_one_other(experiment: Make) -> None:
    with pytest.raises(Faults, match="a run starts from one other"):
        experiment(model=FNNConfig(init_from_fm="a"), train={"start_from": "b"})


@pytest.fixture
def fm(dataset: Path, tmp_path: Path, experiment: Make) -> Path:
    return first_run(experiment(model=FMConfig()), dataset, tmp_path / "fm")


@pytest.mark.parametrize("include_linear", [False, True])
def test_an_fnn_s_tables_start_as_the_fms(
    fm: Path, dataset: Path, tmp_path: Path, experiment: Make, include_linear: bool
) -> None:
    model = FNNConfig(hidden=[8], include_linear=include_linear, init_from_fm=str(fm))
    still = experiment(model=model, embedding={"learning_rate": 1e-30}, train={"epochs": 1})
    train(still, data=dataset, run=tmp_path / "fnn", report=silent)
    _, _, start = load_network(fm)
    _, _, found = load_network(tmp_path / "fnn")
    for table in ("user", "item"):
        width = 9 if include_linear else 8
        rows = found.tables.embedding_bags[table].weight[:, :width]
        wanted = start.tables.embedding_bags[table].weight[:, :width]
        torch.testing.assert_close(rows, wanted, rtol=0, atol=1e-7)
        assert wanted[:, -1].abs().max() > 1e-3
    about = json.loads((tmp_path / "fnn" / "start.json").read_text())
    assert not any(table["states_taken"] for table in about["tables"].values())


def test_another_size_is_refused(fm: Path, dataset: Path, tmp_path: Path, experiment: Make) -> None:
    model = FNNConfig(hidden=[8], init_from_fm=str(fm))
    with pytest.raises(Fault, match=r"embedding\.dim 8; wanted vectors of 4"):
        train(experiment(model=model, embedding={"dim": 4}), data=dataset, run=tmp_path / "x", report=silent)


def test_a_model_without_vectors_is_no_fm_and_gives_no_vectors(dataset: Path, tmp_path: Path, experiment: Make) -> None:
    wide = first_run(experiment(model=WideConfig(), train={"epochs": 1}), dataset, tmp_path / "wide")
    starts = ((FNNConfig(init_from_fm=str(wide)), {}), (FNNConfig(), {"start_from": str(wide)}))
    for at, (model, start) in enumerate(starts):
        with pytest.raises(Fault, match="model 'wide'"):
            train(experiment(model=model, train=start), data=dataset, run=tmp_path / f"{at}", report=silent)
