"""Plans for hardware that is not there: every row is held once, bytes add up, and what cannot fit is named."""

import json
import math
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from etl.experiment_file import load
from etl.faults import Fault, Faults
from etl.schema import Schema, Table
from recsys.cli import app
from recsys.experiment import Experiment
from recsys.learner import Learner
from recsys.network import build_network
from recsys.parallel.plan import Plan, make_plan
from recsys.parallel.sharders import Hardware, planner_of, sharder_of
from recsys.parallel.world import open_world
from recsys.plan import GIB, as_json, as_text, schema_for, write_picture
from recsys.plan_options import PlanOptions
from recsys.train import train
from tests.recsys.conftest import RAW, SCHEMA, experiment

pytestmark = pytest.mark.usefixtures("quiet")
ROOT = Path(__file__).parents[2]
ADAGRAD: dict[str, Any] = {"optimizer": "adagrad"}
H100S = Hardware(16, 2, "cuda", 80 * GIB, 2048 * GIB)


def sized(**rows: int) -> Schema:
    return SCHEMA.model_copy(
        update={"tables": tuple(Table(name=t.name, rows=rows.get(t.name, t.rows)) for t in SCHEMA.tables)}
    )


def covered(plan: Plan, table: str, *, width: int) -> int:
    """Weights of a table over all shards; each of its places once."""
    places = [s for s in plan.shards if s.table == table]
    cells = {
        (row, column)
        for s in places
        for row in range(s.first_row, s.first_row + s.rows)
        for column in range(s.first_column, s.first_column + s.columns)
    }
    assert sum(s.rows * s.columns for s in places) == len(cells)
    return len(cells)


@settings(max_examples=20)
@given(
    sharding=st.sampled_from(
        ["table_wise", "row_wise", "column_wise", "table_row_wise", "table_column_wise", "grid_shard"]
    ),
    hosts=st.integers(1, 4),
    local=st.integers(1, 4),
)
def test_every_weight_is_held_once(sharding: str, hosts: int, local: int) -> None:
    hardware = Hardware(hosts * local, hosts, "cuda", 80 * GIB, 2048 * GIB)
    chosen = experiment(embedding=ADAGRAD | {"sharding": sharding, "dim": 12})
    plan = make_plan(chosen, SCHEMA, hardware=hardware)
    for name, width in {"user": 16, "item": 16, "pair": 4}.items():
        assert covered(plan, name, width=width) == SCHEMA.rows(name) * width
    assert {rank.rank for rank in plan.ranks} == set(range(hardware.ranks))
    assert all(s.columns % 4 == 0 and 0 <= s.rank < hardware.ranks for s in plan.shards)


def test_bytes_are_those_of_rows_and_states() -> None:
    chosen = experiment(embedding=ADAGRAD | {"sharding": "row_wise", "tables": {"item": {"precision": "fp16"}}})
    plan = make_plan(chosen, sized(user=1_000_001, item=500), hardware=H100S)
    user = [s for s in plan.shards if s.table == "user"]
    assert [s.rows for s in user] == [62_501] * 15 + [1_000_001 - 15 * 62_501]
    assert user[0].weight_bytes == 62_501 * 12 * 4 == user[0].state_bytes
    assert next(s for s in plan.shards if s.table == "item").weight_bytes == 32 * 12 * 2
    held = [s for s in plan.shards if s.rank == 3]
    assert plan.ranks[3].hbm["weights"] == sum(s.weight_bytes for s in held)
    assert plan.ranks[3].hbm["states"] == sum(s.state_bytes for s in held)


@pytest.mark.parametrize(
    ("embedding", "floats"),
    [
        ({"optimizer": "rowwise_adagrad"}, 1),
        ({"optimizer": "sgd"}, 0),
        ({"optimizer": "adagrad"}, 12),
        ({"optimizer": "momentum"}, 12),
        ({"optimizer": "adam"}, 24),
    ],
)
def test_each_optimizer_has_its_states(embedding: dict[str, Any], floats: int) -> None:
    plan = make_plan(experiment(embedding=embedding), SCHEMA, hardware=H100S)
    assert sum(s.state_bytes for s in plan.shards if s.table == "user") == SCHEMA.rows("user") * floats * 4


def test_copies_are_on_every_rank_with_their_gradients() -> None:
    plan = make_plan(experiment(embedding={"sharding": "data_parallel"}), SCHEMA, hardware=H100S)
    assert sum(s.table == "user" for s in plan.shards) == 16
    assert plan.ranks[0].hbm["gradients"] == (60 + 30) * 13 * 4 + 400 * 5 * 4


def test_what_spills_lies_in_host_memory_behind_a_cache() -> None:
    cached = {"placement": "uvm_caching", "cache_share": 0.1}
    chosen = experiment(train={"device": "cuda"}, embedding={"sharding": "table_wise"} | cached)
    plan = make_plan(chosen, sized(user=10_000_000), hardware=H100S)
    owner = next(s.rank for s in plan.shards if s.table == "user")
    assert plan.ranks[owner].ddr["weights"] >= 10_000_000 * 48
    assert plan.ranks[owner].hbm["cache"] >= 1_000_000 * (48 + 16) + 40_000_000


def scale(*overrides: str, rows: dict[str, int] | None = None) -> tuple[Experiment, Schema]:
    """The model of 800 GB, left to the planner."""
    found = load(ROOT / "experiments/criteo/scale.toml", overrides=overrides, into=Experiment)
    return found, schema_for(found, Path("none"), rows=rows or {})


def test_tables_spill_only_where_they_do_not_fit() -> None:
    chosen, schema = scale()
    assert {shard.memory for shard in make_plan(chosen, schema, hardware=H100S).shards} == {"own"}
    fewer = make_plan(chosen, schema, hardware=Hardware(8, 1, "cuda", 80 * GIB, 2048 * GIB))
    spilled = {shard.table for shard in fewer.shards if shard.memory == "uvm_caching"}
    assert {"C1", "C2", "C3", "C4"} <= spilled and spilled.isdisjoint({"C17", "C26"})


def test_what_cannot_fit_is_named_with_what_would_help() -> None:
    chosen = experiment(embedding=ADAGRAD | {"sharding": "table_wise", "dim": 128})
    with pytest.raises(Fault) as fault:
        make_plan(chosen, sized(user=300_000_000), hardware=H100S)
    text = str(fault.value)
    assert "'user' (295" in text
    assert "remedy: cut the rows of user (sharding 'row_wise'), or let tables spill" in text, "as many ranks are enough"
    assert "rowwise_adagrad" in text and "uvm_caching" in text and "fp16" in text


@pytest.mark.parametrize("sharding", ["table_wise", "table_row_wise"])
def test_more_ranks_alone_do_not_help_a_table_that_stays_whole_or_on_a_host(sharding: str) -> None:
    """The remedy is planned as it says: with the cut and the ranks it fits."""
    large = sized(user=20_000_000_000)  # 9.6 TiB
    chosen = {"sharding": sharding, "dim": 128, "placement": "hbm"}
    with pytest.raises(
        Fault, match=r"cut the rows of user \(sharding 'row_wise'\) and take (\d+) ranks or more"
    ) as told:
        make_plan(experiment(embedding=chosen), large, hardware=H100S)
    ranks = int(re.search(r"take (\d+) ranks", str(told.value))[1])  # type: ignore[index]
    cut = experiment(embedding=chosen | {"tables": {"user": {"sharding": "row_wise"}}})
    make_plan(cut, large, hardware=Hardware(ranks, ranks // 8, "cuda", 80 * GIB, 2048 * GIB))


def test_no_room_at_all_is_no_fault_of_tables() -> None:
    with pytest.raises(Fault, match=r"remedy: lower train\.batch_size, or take ranks with more memory$"):
        make_plan(experiment(), SCHEMA, hardware=Hardware(1, 1, "cpu", 0, GIB // 4))


def test_a_plan_at_its_limit_fits_and_one_rank_less_does_not() -> None:
    chosen = experiment(embedding={"sharding": "row_wise", "placement": "hbm", "dim": 128})
    large = sized(user=1_500_000_000)  # 740 GiB
    plan = make_plan(chosen, large, hardware=H100S)
    assert all(sum(rank.hbm.values()) <= plan.hbm_limit for rank in plan.ranks)
    with pytest.raises(Fault, match=r"take \d+ ranks or more"):
        make_plan(chosen, large, hardware=Hardware(10, 1, "cuda", 80 * GIB, 2048 * GIB))


def test_what_the_planner_does_not_count_has_to_fit_as_well(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tables that fit beside the head, but not beside what they look up; said before training makes anything."""
    chosen = experiment(train={"batch_size": 3_000_000}, embedding={"sharding": "table_wise"})
    enough = sum(make_plan(chosen, SCHEMA, hardware=Hardware(1, 1, "cpu", 0, 80 * GIB)).ranks[0].ddr.values())
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(total=int(enough / 0.9) - 10_000))
    with pytest.raises(Fault) as fault:
        train(chosen, data=dataset, run=tmp_path / "run", report=lambda line: None)
    assert re.search(r"rank 0 with .* of host memory, .*lookups .* the most; of its tables 'pair' ", str(fault.value))
    assert not (tmp_path / "run").exists()


def test_a_batch_that_does_not_fit_is_told_apart_from_tables_that_do_not() -> None:
    with pytest.raises(Fault, match=r"lower train\.batch_size"):
        make_plan(experiment(train={"batch_size": 200_000_000}), SCHEMA, hardware=H100S)


def test_the_parts_of_a_step_are_looked_up_at_once_and_pass_the_head_one_after_the_other() -> None:
    train = {"batch_size": 4096, "accumulate": 4}
    whole, parts = (make_plan(experiment(train=own), SCHEMA, hardware=H100S) for own in ({"batch_size": 4096}, train))
    large = make_plan(experiment(train={"batch_size": 4 * 4096}), SCHEMA, hardware=H100S)
    assert (whole.batch_size, parts.batch_size) == (4096, 4 * 4096)
    few, several, many = (plan.ranks[0].hbm for plan in (whole, parts, large))
    assert several["activations"] == few["activations"] < many["activations"]
    assert several["batches"] == many["batches"] == 4 * few["batches"]
    assert several["lookups"] > many["lookups"] == 4 * few["lookups"]
    assert parts.ranks[0].sent_bytes > 2 * whole.ranks[0].sent_bytes


def test_ids_of_two_steps_are_there_at_once_on_several_ranks() -> None:
    """An id takes 12 bytes, on the rank that asks and on the one that holds the rows."""

    def lookups(ranks: int) -> int:
        hardware = Hardware(ranks, 1, "cuda", 80 * GIB, 2048 * GIB)
        chosen = experiment(train={"batch_size": 100}, embedding={"sharding": "row_wise"})
        return make_plan(chosen, SCHEMA, hardware=hardware).ranks[0].hbm["lookups"]

    slots, width = 3, 12 + 12 + 4
    assert lookups(1) == 100 * (2 * slots * 12 + 3 * width * 4)
    assert lookups(2) == 100 * (2 * 2 * slots * 12 + 4 * width * 4)


def test_training_asks_the_planner_for_all_rows_of_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    monkeypatch.setattr(
        "recsys.parallel.plan.planner_of", lambda *a, **named: asked.append(named["batch_size"]) or 1 / 0
    )
    with open_world("cpu") as world, pytest.raises(ZeroDivisionError):
        Learner(experiment(train={"batch_size": 32, "accumulate": 3}), SCHEMA, world=world)
    assert asked == [96]


def test_training_plans_once_and_not_at_all_where_it_has_ended(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []

    def planner(*given: Any, **named: Any) -> Any:
        asked.append(named["batch_size"])
        return planner_of(*given, **named)

    monkeypatch.setattr("recsys.parallel.plan.planner_of", planner)
    short = experiment(train={"batch_size": 2000, "epochs": 1})
    results = [train(short, data=dataset, run=tmp_path / "run", report=lambda line: None) for _ in range(2)]
    assert asked == [2000] and results[0] == results[1]


def test_caches_are_planned_for_rows_that_are_fetched_ahead() -> None:
    """Without that FBGEMM would bring a step's update to the places where the rows were before the fetch."""
    behind = {"placement": "uvm_caching", "cache_share": 0.3}
    chosen = experiment(embedding=ADAGRAD | behind, train={"device": "cuda"})
    network = build_network(chosen, SCHEMA, table_device="meta")
    planner = planner_of(network.tables, chosen.embedding, hardware=H100S, batch_size=256)
    tables = planner.plan(network, sharder_of(chosen.embedding, "cuda")).plan["tables"]
    assert tables.keys() == {"user", "item", "pair"}
    for table in tables.values():
        assert table.compute_kernel == "fused_uvm_caching"
        assert table.cache_params.load_factor == 0.3 and table.cache_params.prefetch_pipeline


def test_the_planner_s_choice_does_not_depend_on_the_process(tmp_path: Path) -> None:
    plans = [as_json(make_plan(experiment(), SCHEMA, hardware=H100S)) for _ in range(2)]
    assert plans[0] == plans[1]


def test_without_data_the_experiment_and_the_rows_say_the_schema(dataset: Path, tmp_path: Path) -> None:
    found = schema_for(experiment(), tmp_path, rows={"user": 60, "item": 30})
    wanted = schema_for(experiment(), dataset, rows={})
    assert found == wanted
    with pytest.raises(Fault, match="no size of user, item"):
        schema_for(experiment(), tmp_path, rows={})
    with pytest.raises(Fault, match="no such table"):
        schema_for(experiment(), dataset, rows={"itme": 3})


def test_text_and_picture_show_all_ranks(tmp_path: Path) -> None:
    plan = make_plan(experiment(embedding={"sharding": "row_wise"}), SCHEMA, hardware=H100S)
    text = as_text(plan)
    assert "16 x cuda, 2 hosts of 8; 80 GiB each" in text
    assert "0-15" in text and "imbalance" in text
    for name in ("plan.svg", "plan.png"):
        write_picture(plan, tmp_path / name)
        assert (tmp_path / name).stat().st_size > 1000
    assert sorted(path.name for path in tmp_path.iterdir()) == ["plan.png", "plan.svg"]


@pytest.mark.parametrize(
    "options",
    [
        PlanOptions(world_size=12, hosts=5),
        PlanOptions(world_size=0),
        PlanOptions(world_size=8, local_world_size=3),
        PlanOptions(device="gpu"),
        PlanOptions(hbm_gib=-80.0),
        PlanOptions(ddr_gib=math.nan),
        PlanOptions(picture=Path("plan.pdf")),
    ],
)
def test_options_that_do_not_fit_together_are_refused(options: PlanOptions) -> None:
    with pytest.raises(Faults):
        _ = options.host_count
    with pytest.raises(Faults):
        PlanOptions(rows=["item=many"]).row_counts()


@pytest.mark.parametrize(
    ("ranks", "hosts"), [(1, 1), (7, 1), (8, 1), (9, 3), (10, 2), (12, 2), (13, 13), (15, 3), (100, 20), (1024, 128)]
)
def test_hosts_are_the_fewest_of_at_most_8_ranks(ranks: int, hosts: int) -> None:
    assert PlanOptions(world_size=ranks).host_count == hosts


def test_what_a_remedy_says_can_be_planned_and_fits() -> None:
    chosen, schema = scale("embedding.placement=hbm")
    with pytest.raises(Fault) as fault:
        make_plan(chosen, schema, hardware=Hardware(8, 1, "cuda", 80 * GIB, 2048 * GIB))
    said = re.search(r"take (\d+) ranks or more", str(fault.value))
    assert said and int(said[1]) == 16
    plan = make_plan(chosen, schema, hardware=H100S)
    assert all(sum(rank.hbm.values()) <= plan.hbm_limit for rank in plan.ranks)


@pytest.mark.slow
def test_1024_ranks_are_planned() -> None:
    """10 TB: four tables larger than a host, which all ranks share."""
    chosen, schema = scale("train.batch_size=1024", rows=dict.fromkeys(("C1", "C2", "C3", "C4"), 4_500_000_000))
    plan = make_plan(chosen, schema, hardware=Hardware(1024, 128, "cuda", 80 * GIB, 2048 * GIB))
    assert {s.sharding for s in plan.shards if s.table == "C1"} == {"row_wise"}
    for table, rows in plan.tables.items():
        assert sum(s.rows * s.columns for s in plan.shards if s.table == table) == rows * 128
    assert all(sum(rank.hbm.values()) <= plan.hbm_limit for rank in plan.ranks)


def test_the_command(dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "known.json").write_text(json.dumps(RAW))
    monkeypatch.setattr("recsys.cli._load", lambda path, overrides: experiment())
    arguments = ["plan", "known.toml", "--data", str(dataset), "--world-size", "4", "--json", "--ddr-gib", "8"]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    found = json.loads(done.output)
    assert found["hardware"] == {"ranks": 4, "hosts": 1, "device": "cpu", "hbm_bytes": 0, "ddr_bytes": 8 * GIB}
    assert found["tables"] == {"user": 60, "item": 30, "pair": 400}


def test_training_plans_with_the_reserve_that_plan_shows(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A machine whose memory the tables alone would fit into, but not beside the head and the libraries."""
    chosen = experiment(embedding=ADAGRAD, model={"hidden": [512, 512]})
    large = sized(user=3_000_000)
    tables = 2 * 3_000_000 * 12 * 4
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(total=int((tables + 50e6) / 0.9)))
    hardware = Hardware(1, 1, "cpu", 0, int((tables + 50e6) / 0.9))
    with pytest.raises(Fault) as planned:
        make_plan(chosen, large, hardware=hardware)
    with open_world("cpu") as world, pytest.raises(Fault) as trained:
        Learner(chosen, large, world=world)
    assert str(trained.value) == str(planned.value)
    assert "GiB of others" in str(trained.value)
