"""Sharded tables, moved by FBGEMM, compiled loops or torch, against plain tables, autograd and a loop over rows."""

from collections.abc import Iterator, Mapping
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from fbgemm_gpu.split_table_batched_embeddings_ops_common import EmbeddingLocation
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from etl.schema import Schema
from recsys.experiment import Embedding, Train
from recsys.learner import dense_optimizer
from recsys.models import MODELS
from recsys.models.head import ModelConfig
from recsys.optim import DenseOptimizer, OptimizerSettings, start_states, state_count, update
from recsys.parallel import kernels, rows
from recsys.parallel.row_rules import needs_own_rows
from recsys.parallel.rows import RowOptimizer, summed
from recsys.parallel.shard import Sharded, shard
from recsys.parallel.world import World, open_world
from tests.registry import config_of, network_of, random_rows, rich_schema

pytestmark = pytest.mark.usefixtures("quiet")

STEPS, SIZE, SEED = 4, 5, 11
LIMITS = {"cpu": 1e-6, "cuda": 2e-5}  # a GPU adds in any order, and Adam divides what differs by a small root
HEAD = Train(optimizer="sgd", learning_rate=0.05)
DEEPFM = {"hidden": [8], "keep_prob": 1.0}
FTRL = {"optimizer": "ftrl", "learning_rate": 0.1, "accumulator_start": 0.1, "l1": 0.001, "ftrl_l2": 0.01}
OPTIMIZERS: dict[str, dict[str, Any]] = {
    "sgd": {"optimizer": "sgd", "learning_rate": 0.5},
    "momentum": {"optimizer": "momentum", "learning_rate": 0.2, "momentum": 0.8},
    "nesterov": {"optimizer": "momentum", "learning_rate": 0.2, "momentum": 0.8, "nesterov": True},
    "adagrad": {"optimizer": "adagrad", "learning_rate": 0.1, "accumulator_start": 0.01},
    "rowwise_adagrad": {"optimizer": "rowwise_adagrad", "learning_rate": 0.1, "accumulator_start": 0.01},
    "adam": {"optimizer": "adam", "learning_rate": 0.05, "eps": 1e-4},
    "adam_eps_hat": {"optimizer": "adam", "learning_rate": 0.05, "eps": 1e-4, "eps_hat": True},
    "ftrl": FTRL | {"preserve_init": True},
}
WIDE_AND_DEEP = OPTIMIZERS["adagrad"] | {"linear": FTRL}
L2 = {"l2": 0.05, "linear_l2": 0.2}


@pytest.fixture(scope="module", params=["cpu", "cpu without loops", pytest.param("cuda", marks=pytest.mark.gpu)])
def world(request: pytest.FixtureRequest) -> Iterator[World]:
    device, *without = request.param.split(" ", 1)
    with open_world(device) as alone, pytest.MonkeyPatch.context() as patch:
        if without:
            patch.setattr(kernels, "library", lambda: None)
        yield alone


def loss_of(
    network: torch.nn.Module, schema: Schema, *, step: int, device: torch.device | str = "cpu"
) -> tuple[Tensor, Tensor]:
    """The mean logloss of step's own batch, and the ids of the batch."""
    ids_BS, floats_BN = random_rows(schema, SIZE, seed=100 + step)
    generator = torch.Generator().manual_seed(step)
    labels_BT = torch.randint(0, 2, (SIZE, len(schema.tasks)), generator=generator).float().to(device)
    logits_BT = network(ids_BS.to(device), floats_BN.to(device)).logits_BT
    return binary_cross_entropy_with_logits(logits_BT, labels_BT), ids_BS


def touched(schema: Schema, ids_BS: Tensor, *, table: str) -> set[int]:
    """Rows of a table that a batch looks up."""
    found: set[int] = set()
    for feature, end in zip(schema.features, schema.slot_ends, strict=True):
        if feature.table == table:
            found |= set(ids_BS[:, end - feature.slots : end].flatten().tolist()) - {-1}
    return found


class Plain:
    """The unsharded network; a loop moves its tables row by row."""

    def __init__(
        self, config: ModelConfig, embedding: Embedding, *, schema: Schema, start: Mapping[str, Tensor]
    ) -> None:
        self.network, self.embedding, self.schema = network_of(config, schema, dim=embedding.dim), embedding, schema
        layout = self.network.layout
        with_vector = {table for _, table in layout.slots[: layout.vectors]}
        self.vector = {table: embedding.dim if table in with_vector else 0 for table in start}
        self.weights = {table: self.network.tables.embedding_bags[table].weight for table in start}
        self.states = {table: [torch.zeros_like(weight) for _ in range(2)] for table, weight in start.items()}
        self.moved: dict[str, set[int]] = {}
        self.optimizer = DenseOptimizer([(list(self.network.head.parameters()), HEAD)])
        for table, weight in self.weights.items():
            weight.data.copy_(start[table])
            for columns, settings in self.parts(table):
                states = [state[:, columns] for state in self.states[table][: state_count(settings)]]
                start_states(settings, start[table][:, columns], states=states)

    def parts(self, table: str) -> list[tuple[slice, OptimizerSettings]]:
        if self.embedding.linear is None:
            return [(slice(None), self.embedding)]
        vector = self.vector[table]
        parts = [(slice(0, vector), self.embedding), (slice(vector, None), self.embedding.linear)]
        return parts if vector else parts[1:]

    def l2(self, table: str) -> Tensor:
        """Each column's, of all steps that it stands for."""
        l2_W = torch.full((self.weights[table].shape[1],), self.embedding.first_order_l2)
        l2_W[: self.vector[table]] = self.embedding.l2
        return l2_W * self.embedding.l2_every_steps

    def step(self, step: int) -> float:
        loss, ids_BS = loss_of(self.network, self.schema, step=step)
        self.network.zero_grad()
        loss.backward()
        self.optimizer.step()
        with torch.no_grad():
            for table in self.weights:
                self.move(table, touched(self.schema, ids_BS, table=table), step=step)
        return float(loss.detach())

    def move(self, table: str, looked_up: set[int], *, step: int) -> None:
        weight_RW, gradient_RW, l2_W = self.weights[table], self.weights[table].grad, self.l2(table)
        waits = step % self.embedding.l2_every_steps > 0
        whole_table = self.embedding.l2_scope == "table" and bool(l2_W.any()) and not waits
        self.moved[table] = looked_up
        if whole_table or self.embedding.update == "all":
            self.moved[table] = set(range(len(weight_RW)))
        for row in self.moved[table]:
            gradient_W = gradient_RW[row].clone()
            if whole_table or (row in looked_up and self.embedding.l2_scope == "batch"):
                gradient_W += l2_W * weight_RW[row]
            for columns, settings in self.parts(table):
                states = [state[row, columns] for state in self.states[table][: state_count(settings)]]
                update(settings, weight_RW[row, columns], gradients=gradient_W[columns], states=states, step=step)


class Trained:
    """The network behind TorchRec, as the trainer drives it."""

    def __init__(
        self, config: ModelConfig, embedding: Embedding, *, schema: Schema, world: World, std: float = 0.5
    ) -> None:
        self.schema, self.device = schema, world.device
        network = network_of(config, schema, dim=embedding.dim, std=std)
        self.sharded: Sharded = shard(network, embedding, world=world, seed=SEED)
        self.optimizer = dense_optimizer(self.sharded.model, HEAD, linear=None)

    def step(self, step: int) -> float:
        self.sharded.begin_step(step)
        loss, _ = loss_of(self.sharded.model, self.schema, step=step, device=self.device)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return float(loss.detach())

    def tables(self) -> dict[str, Tensor]:
        """Copies of all tables."""
        names = dict.fromkeys(feature.table for feature in self.schema.features)
        state = self.sharded.model.state_dict()
        found = {table: state.get(f"tables.embedding_bags.{table}.weight") for table in names}
        return {table: w.local_shards()[0].tensor.detach().cpu().clone() for table, w in found.items() if w is not None}


def embedding_of(settings: Mapping[str, Any], **more: Any) -> Embedding:
    return Embedding.model_validate({"dim": 8, "init_std": 0.3} | dict(settings) | more)


def compare(config: ModelConfig, embedding: Embedding, *, world: World, schema: Schema | None = None) -> None:
    """The same loss and tables after each step; rows that don't move, and padding, stay bit-equal."""
    schema, limit = schema or rich_schema(), LIMITS[world.device.type]
    trained = Trained(config, embedding, schema=schema, world=world)
    start = before = trained.tables()
    plain = Plain(config, embedding, schema=schema, start=start)
    for step in range(1, STEPS + 1):
        assert trained.step(step) == pytest.approx(plain.step(step), abs=limit)
        after = trained.tables()
        for table, weight_RW in after.items():
            torch.testing.assert_close(weight_RW, plain.weights[table].detach(), rtol=0, atol=limit, msg=table)
            still = sorted(set(range(len(weight_RW))) - plain.moved[table])
            assert torch.equal(weight_RW[still], before[table][still]), table
            assert not (config.linear and weight_RW[:, -3:].any()), table
        before = after
    assert all(float((after[table] - start[table]).abs().max()) > 1e-3 for table in start)


def test_the_batches_hold_what_is_hard() -> None:
    """Duplicates, within one bag and in a shared table too, empty bags, and rows that a step leaves alone."""
    schema = rich_schema()
    every_BS = torch.cat([random_rows(schema, SIZE, seed=100 + step)[0] for step in range(1, STEPS + 1)])
    bags_BL, histories_BL = every_BS[:, 2:5], every_BS[:, 7:11]
    assert bool((bags_BL < 0).all(dim=1).any()) and bool((histories_BL < 0).all(dim=1).any())
    assert any(len(set(bag) - {-1}) < sum(at >= 0 for at in bag) for bag in bags_BL.tolist())
    for ids_BS in every_BS.split(SIZE):
        assert set(ids_BS[:, 6].tolist()) & (set(ids_BS[:, 7:11].flatten().tolist()))
        assert any(len(touched(schema, ids_BS, table=table.name)) < table.rows for table in schema.tables)


@pytest.mark.parametrize("scope", ["batch", "table"])
@pytest.mark.parametrize("moved", ["touched", "all"])
@pytest.mark.parametrize("name", [*OPTIMIZERS, "wide_and_deep"])
def test_our_own_optimizers_move_rows_as_a_loop_does(name: str, moved: str, scope: str, world: World) -> None:
    embedding = embedding_of((OPTIMIZERS | {"wide_and_deep": WIDE_AND_DEEP})[name], update=moved, l2_scope=scope, **L2)
    assert needs_own_rows(embedding)
    compare(config_of("deepfm", **DEEPFM), embedding, world=world)


@pytest.mark.parametrize("chunk", [2, 1 << 15])
@pytest.mark.parametrize("name", [*OPTIMIZERS, "wide_and_deep"])
def test_l2_of_several_steps_at_once(name: str, chunk: int, world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every row moves at steps 2 and 4, by twice the L2; only what was looked up at 1 and 3."""
    monkeypatch.setattr(rows, "_CHUNK_ROWS", {"cpu": chunk, "cuda": chunk})
    settings = (OPTIMIZERS | {"wide_and_deep": WIDE_AND_DEEP})[name]
    embedding = embedding_of(settings, l2_scope="table", l2_every_steps=2, **L2)
    compare(config_of("deepfm", **DEEPFM), embedding, world=world)


@pytest.mark.parametrize("wrong", [{"l2_scope": "batch"}, {"update": "all"}, {"l2": 0.0, "linear_l2": 0.0}])
def test_l2_of_several_steps_is_of_whole_tables_with_touched_rows(wrong: dict[str, Any]) -> None:
    settings: dict[str, Any] = {"l2_scope": "table", "l2_every_steps": 2} | L2
    assert embedding_of(OPTIMIZERS["adam"], **settings).l2_every_steps == 2
    with pytest.raises(ValueError, match="'l2_every_steps' is for an 'l2' of l2_scope 'table' with update 'touched'"):
        embedding_of(OPTIMIZERS["adam"], **settings | wrong)


@pytest.mark.parametrize("name", [*OPTIMIZERS, "wide_and_deep"])
def test_optimizers_without_l2_move_rows_as_a_loop_does(name: str, world: World) -> None:
    embedding = embedding_of((OPTIMIZERS | {"wide_and_deep": WIDE_AND_DEEP})[name])
    assert needs_own_rows(embedding) == (name not in ("sgd", "adagrad", "rowwise_adagrad"))
    compare(config_of("deepfm", **DEEPFM), embedding, world=world)


@pytest.mark.parametrize("name", ["sgd", "adagrad", "rowwise_adagrad"])
def test_fused_optimizers_agree_with_our_own(name: str, world: World) -> None:
    """A row without gradient stays where it is, so that `update = "all"` changes nothing but who moves the rows."""
    found = []
    for moved in ("touched", "all"):
        embedding = embedding_of(OPTIMIZERS[name], update=moved)
        assert needs_own_rows(embedding) == (moved == "all")
        trained = Trained(config_of("deepfm", **DEEPFM), embedding, schema=rich_schema(), world=world)
        for step in range(1, STEPS + 1):
            trained.step(step)
        found.append(trained.tables())
    for table, fused_RW in found[0].items():
        torch.testing.assert_close(found[1][table], fused_RW, rtol=0, atol=LIMITS[world.device.type], msg=table)


@pytest.mark.parametrize("settings", [{}, L2, L2 | {"l2_scope": "table"}, {"linear": FTRL}])
@pytest.mark.parametrize("name", ["sgd", "adam"])
def test_weights_and_vectors_of_4_columns_are_told_apart(name: str, settings: dict[str, Any], world: World) -> None:
    """With 4 columns, a vector alone is as wide as a weight with its padding."""
    embedding = embedding_of(OPTIMIZERS[name], dim=4, **settings)
    for kind, rest in (("deepfm", DEEPFM), ("deep", DEEPFM), ("wide", {})):
        schema = rich_schema(tasks=("click",))
        compare(config_of(kind, **rest), embedding, world=world, schema=only_read(kind, schema))


@pytest.mark.parametrize("kind", ["deep", "wide"])
@pytest.mark.parametrize("name", ["adagrad", "adam", "wide_and_deep"])
def test_vectors_or_weights_alone(name: str, kind: str, world: World) -> None:
    embedding = embedding_of((OPTIMIZERS | {"wide_and_deep": WIDE_AND_DEEP})[name], **L2)
    compare(config_of(kind, **({} if kind == "wide" else DEEPFM)), embedding, world=world, schema=only_read(kind))


def only_read(kind: str, schema: Schema | None = None) -> Schema:
    """The schema, without what the model skips."""
    schema = schema or rich_schema()
    kept = tuple(f for f in schema.features if MODELS[kind].linear or not f.linear_only)
    tables = {feature.table for feature in kept}
    return schema.model_copy(
        update={"features": kept, "tables": tuple(table for table in schema.tables if table.name in tables)}
    )


def test_l2_of_the_other_columns_leaves_untouched_rows_alone(world: World) -> None:
    """`l2_scope = "table"` moves all rows of a table only where that table has something to regularise."""
    embedding = embedding_of(OPTIMIZERS["momentum"], l2=0.05, linear_l2=0.0, l2_scope="table")
    compare(config_of("wide"), embedding, world=world)


@pytest.mark.parametrize("settings", [{}, {"update": "all"}])
@pytest.mark.parametrize("name", ["sgd", "adagrad", "rowwise_adagrad"])
def test_a_scaled_rate_is_that_rate(name: str, settings: dict[str, str], world: World) -> None:
    """Scaled by 0.5, then by 0.1: both of the experiment's rate. The second rate acts from the third step on."""
    embedding = embedding_of(OPTIMIZERS[name], **settings)
    config, schema = config_of("deepfm", **DEEPFM), rich_schema()
    trained = Trained(config, embedding, schema=schema, world=world)
    start = trained.tables()
    plain = Plain(config, embedding, schema=schema, start=start)
    for step, factor in enumerate((1.0, 0.5, 0.1, 0.1), start=1):
        trained.sharded.scale_rate(factor)
        plain.embedding = embedding.model_copy(update={"learning_rate": embedding.learning_rate * factor})
        before = trained.tables()
        trained.step(step)
        plain.step(step)
        for table, weight_RW in trained.tables().items():
            assert not torch.equal(weight_RW, before[table])
            torch.testing.assert_close(
                weight_RW, plain.weights[table].detach(), rtol=0, atol=LIMITS[world.device.type], msg=table
            )


def test_a_scaled_rate_reaches_the_first_order_weights_optimizer(world: World) -> None:
    embedding = embedding_of(WIDE_AND_DEEP)
    config, schema = config_of("deepfm", **DEEPFM), rich_schema()
    assert embedding.linear is not None
    trained = Trained(config, embedding, schema=schema, world=world)
    plain = Plain(config, embedding, schema=schema, start=trained.tables())
    trained.sharded.scale_rate(0.1)
    linear = embedding.linear.model_copy(update={"learning_rate": 0.01})
    rates = {"linear": linear, "learning_rate": embedding.learning_rate * 0.1}
    plain.embedding = embedding.model_copy(update=rates)
    for step in range(1, STEPS + 1):
        trained.step(step)
        plain.step(step)
    for table, weight_RW in trained.tables().items():
        torch.testing.assert_close(
            weight_RW, plain.weights[table].detach(), rtol=0, atol=LIMITS[world.device.type], msg=table
        )


def test_rows_start_normal_and_weights_at_0(world: World) -> None:
    embedding = embedding_of(OPTIMIZERS["adam"])
    tables = Trained(config_of("deepfm", **DEEPFM), embedding, schema=rich_schema(), world=world).tables()
    assert {table: weight_RW.shape[1] for table, weight_RW in tables.items()} == {
        "user": 12, "tags": 12, "price": 12, "item": 12, "pair": 4
    }  # fmt: skip
    for table, weight_RW in tables.items():
        vector = 0 if table == "pair" else 8
        assert not weight_RW[:, vector:].any()
        assert bool((weight_RW[:, :vector] != 0).all())


@pytest.mark.parametrize("count", [0, 1, 400])
def test_gradients_of_equal_rows_are_added_up(count: int) -> None:
    generator = torch.Generator().manual_seed(count)
    rows_I = torch.randint(0, 60, (count,), generator=generator)
    place_I = torch.randperm(count, generator=generator)
    gradient_GW = torch.randn(count, 4, generator=generator)
    touched_R, gradient_RW = summed(rows_I, gradient_GW, place_I=place_I)
    whole = torch.zeros(60, 4).index_add_(0, rows_I, gradient_GW[place_I])
    assert touched_R.tolist() == sorted(set(rows_I.tolist()))
    assert torch.allclose(gradient_RW, whole[touched_R], atol=1e-5)


def test_states_lie_where_the_rows_lie(monkeypatch: pytest.MonkeyPatch) -> None:
    """An FBGEMM module of a GPU holds tables in both memories, each counted from the start of its own."""
    asked: list[list[int]] = []

    def unified(one: Tensor, shape: list[int], *, is_host_mapped: bool) -> Tensor:
        asked.append(shape)
        return torch.ones(shape, dtype=one.dtype)

    monkeypatch.setattr(torch.ops.fbgemm, "new_unified_tensor", unified)
    sizes = {"dev": 3 * 8, "uvm": 2 * 8, "host": 0}
    memories = {
        f"{name}_{place}": torch.rand(size) for name in ("weights", "momentum1") for place, size in sizes.items()
    }
    module = SimpleNamespace(
        embedding_specs=[(3, 8, EmbeddingLocation.DEVICE, None), (2, 8, EmbeddingLocation.MANAGED, None)],
        weights_physical_offsets=[0, 0],
        momentum1_physical_offsets=[0, 0],
        feature_table_map=[0, 1],
        D_offsets=torch.tensor([0, 8, 16]),
        placeholder_autograd_tensor=torch.zeros(0),
        forward=None,
        **memories,
    )
    rows = RowOptimizer(Embedding.model_validate({"dim": 8} | OPTIMIZERS["adam"]))
    rows.attach(module, [8, 8])  # type: ignore[arg-type]
    for group, place in zip(rows.groups, ("dev", "uvm"), strict=True):
        assert group.weights_RW.data_ptr() == memories[f"weights_{place}"].data_ptr()
        assert group.states[0].data_ptr() == memories[f"momentum1_{place}"].data_ptr()
        assert group.second_RW is not None and group.second_RW.shape == group.weights_RW.shape
        assert not group.second_RW.any()
    assert asked == [[2, 8]]
