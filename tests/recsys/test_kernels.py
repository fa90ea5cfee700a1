"""The compiled loops over rows of tables, against FBGEMM's own lookup and optimizers and the same in torch."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from fbgemm_gpu.split_table_batched_embeddings_ops_common import EmbeddingLocation, PoolingMode
from fbgemm_gpu.split_table_batched_embeddings_ops_training import (
    ComputeDevice,
    OptimType,
    SplitTableBatchedEmbeddingBagsCodegen,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from recsys.experiment import Embedding
from recsys.parallel import kernels
from recsys.parallel.rows import RowOptimizer
from tests.recsys.test_rows import OPTIMIZERS

pytestmark = [
    pytest.mark.usefixtures("quiet"),
    pytest.mark.skipif(kernels.library() is None, reason="this installation has no compiled loops"),
]
KINDS = {"sgd": OptimType.EXACT_SGD, "rowwise_adagrad": OptimType.EXACT_ROWWISE_ADAGRAD}
STEPS = 3


@dataclass(frozen=True)
class Case:
    """Tables by rows and width, which of them each feature looks up, rows of a batch, and where ids come from."""

    tables: tuple[tuple[int, int], ...]
    features: tuple[int, ...]
    size: int
    longest: int
    seed: int

    def module(self, kind: OptimType) -> SplitTableBatchedEmbeddingBagsCodegen:
        specs = [(rows, width, EmbeddingLocation.HOST, ComputeDevice.CPU) for rows, width in self.tables]
        made = SplitTableBatchedEmbeddingBagsCodegen(
            specs,
            feature_table_map=list(self.features),
            optimizer=kind,
            learning_rate=0.1,
            eps=1e-8,
            pooling_mode=PoolingMode.SUM,
            device=torch.device("cpu"),
        )
        with torch.no_grad():
            made.weights_host.normal_(generator=self.generator(0))
        return made

    def generator(self, step: int) -> torch.Generator:
        return torch.Generator().manual_seed(self.seed * 100 + step)

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        """Ids, skewed to the first rows, and their offsets."""
        generator, bags = self.generator(step), len(self.features) * self.size
        lengths = torch.randint(0, self.longest + 1, (bags,), generator=generator)
        rows = torch.tensor([self.tables[table][0] for table in self.features]).repeat_interleave(self.size)
        chance = torch.rand(int(lengths.sum()), generator=generator) ** 3
        ids = (chance * rows.repeat_interleave(lengths)).long()
        return ids, torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])

    def gradient(self, step: int) -> Tensor:
        width = sum(self.tables[table][1] for table in self.features)
        return torch.randn(self.size, width, generator=self.generator(step + 50))


@st.composite
def cases(draw: st.DrawFn, longest: int = 1) -> Case:
    tables = draw(st.lists(st.tuples(st.integers(1, 5000), st.sampled_from([4, 8, 20])), min_size=1, max_size=4))
    tables.sort(key=lambda table: table[1])
    repeats = draw(st.lists(st.integers(1, 3), min_size=len(tables), max_size=len(tables)))
    features = [at for at, times in enumerate(repeats) for _ in range(times)]
    size, most = draw(st.integers(0, 200)), draw(st.integers(0, longest))
    return Case(tuple(tables), tuple(features), size, most, draw(st.integers(0, 9999)))


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@given(cases(longest=4))
@settings(max_examples=60, deadline=None)
def test_lookups_are_those_of_fbgemm(case: Case) -> None:
    module = case.module(OptimType.EXACT_SGD)
    ids, offsets = case.batch(1)
    if not case.size:
        assert kernels.Lookup(module)(ids, offsets).shape == (0, case.gradient(1).shape[1])
        return
    wanted_BD = module(ids, offsets).detach()
    torch.testing.assert_close(kernels.Lookup(module)(ids, offsets), wanted_BD, rtol=1e-6, atol=1e-6)


def moved(case: Case, settings_: dict[str, Any], *, loops: bool, kind: OptimType) -> Sequence[Tensor]:
    """Weights and states after some steps, by the loops or in torch."""
    module = case.module(kind)
    rows = RowOptimizer(Embedding.model_validate({"dim": 8} | settings_))
    with pytest.MonkeyPatch.context() as patch:
        if not loops:
            patch.setattr(kernels, "library", lambda: None)
        rows.attach(module, [width for _, width in case.tables])
    for step in range(1, STEPS + 1):
        rows.step = step
        if case.size:
            module(*case.batch(step)).backward(case.gradient(step))
    memories = [getattr(module, name, None) for name in ("weights_host", "momentum1_host")]
    second = [group.second_RW.flatten() for group in rows.groups if group.second_RW is not None]
    return [memory.detach().clone() for memory in (*memories, *second) if memory is not None]


@given(case=cases(), name=st.sampled_from(sorted(OPTIMIZERS)), l2=st.sampled_from([0.0, 0.05]))
@settings(max_examples=150, deadline=None)
def test_rows_move_as_in_torch(case: Case, name: str, l2: float) -> None:
    more = {"l2": l2, "l2_scope": "batch"} if l2 else {}
    kind = OptimType.EXACT_ADAGRAD if l2 else KINDS.get(name, OptimType.EXACT_ADAGRAD)
    found, wanted = (moved(case, OPTIMIZERS[name] | more, loops=loops, kind=kind) for loops in (True, False))
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("name", sorted(OPTIMIZERS))
@pytest.mark.usefixtures("threads")
def test_the_number_of_threads_changes_no_bit(name: str) -> None:
    case = Case(((3, 20), (100_000, 20), (40, 4)), (0, 0, 1, 2), size=700, longest=1, seed=3)
    kind, found = KINDS.get(name, OptimType.EXACT_ADAGRAD), []
    for count in (1, 2, 3, 7, 140):
        torch.set_num_threads(count)
        found.append(moved(case, OPTIMIZERS[name], loops=True, kind=kind))
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))


@pytest.mark.parametrize("wrong", [-1, 9, 2**40, -(2**62)])
def test_an_id_that_its_table_has_not_is_refused_before_anything_moves(wrong: int) -> None:
    module = Case(((9, 8), (20, 8)), (0, 1), size=2, longest=1, seed=0).module(OptimType.EXACT_SGD)
    before = module.weights_host.detach().clone()
    with pytest.raises(IndexError, match=f"id {wrong} of feature 0: its table has 9 rows"):
        kernels.Lookup(module)(torch.tensor([3, wrong, 19, 0]), torch.arange(5))
    assert torch.equal(module.weights_host, before)


def test_weights_of_ids_are_refused() -> None:
    module = Case(((9, 8),), (0,), size=1, longest=1, seed=0).module(OptimType.EXACT_SGD)
    ids, offsets = torch.tensor([3]), torch.arange(2)
    assert kernels.Lookup(module)(ids, offsets, per_sample_weights=None).shape == (1, 8)
    with pytest.raises(ValueError, match="per_sample_weights"):
        kernels.Lookup(module)(ids, offsets, per_sample_weights=torch.ones(1))


def test_loops_that_do_not_load_are_none(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    broken = tmp_path / "_kernels.so"
    broken.write_bytes(b"of another machine")
    monkeypatch.setattr(kernels, "find_spec", lambda name: SimpleNamespace(origin=str(broken)))
    assert kernels.library.__wrapped__() is None


def test_loops_of_another_version_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "VERSION", kernels.VERSION + 1)
    with pytest.raises(RuntimeError, match="install the project again"):
        kernels.library.__wrapped__()
