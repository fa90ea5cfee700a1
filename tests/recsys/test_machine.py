"""The compiled dense part beside the plain one, and what is said where a machine lacks something."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from etl.faults import Fault
from recsys.experiment import Experiment, Train
from recsys.machine import check_compiler, slow_precision
from recsys.network import Network
from tests.registry import config_of, network_of, random_rows, rich_schema


def gradients(network: Network, *, steps: int = 2) -> list[torch.Tensor]:
    """Of all parameters, tables included, summed over batches."""
    network.zero_grad()
    for step in range(steps):
        ids_BS, floats_BN = random_rows(rich_schema(), 32, seed=step)
        network(ids_BS, floats_BN).logits_BT.square().sum().backward()
    return [parameter.grad.clone() for parameter in network.parameters() if parameter.grad is not None]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["deepfm", "dcn", "din"])
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_the_compiled_dense_part_is_the_same(kind: str) -> None:
    network = network_of(config_of(kind), rich_schema()).train()
    rows = random_rows(rich_schema(), 32, seed=9)
    network.eval()
    plain_logits = network(*rows).logits_BT.detach()
    network.train()
    plain = gradients(network)
    network.compile_dense()
    compiled = gradients(network)
    network.eval()
    assert len(plain) == len(compiled) > 4
    for one, other in zip(plain, compiled, strict=True):
        torch.testing.assert_close(other, one, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(network(*rows).logits_BT.detach(), plain_logits, rtol=1e-3, atol=1e-4)


def test_no_compiler_is_a_fault(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CXX", str(tmp_path / "missing"))
    with pytest.raises(Fault, match=r"train\.compile"):
        check_compiler(Train(compile="inductor"))
    check_compiler(Train())
    check_compiler(Train(compile="inductor", device="cuda"))


def test_emulated_bf16_is_told(monkeypatch: pytest.MonkeyPatch, experiment: Callable[..., Experiment]) -> None:
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    assert "bf16" in (slow_precision(experiment(train={"precision": "bf16"}).train) or "")
    assert slow_precision(experiment().train) is None
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    assert slow_precision(experiment(train={"precision": "bf16"}).train) is None
