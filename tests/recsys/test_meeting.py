"""What a start under torchrun is refused for; the meeting itself is tested with real ranks in tests/e2e."""

import pytest

from etl.faults import Fault
from recsys.parallel.meeting import meeting
from recsys.parallel.world import open_world


def test_restarts_on_several_hosts_need_a_store_for_each_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """A host that comes back could not find the one store of all starts, and would be waited for."""
    torchrun = {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_MAX_RESTARTS": "3", "GROUP_WORLD_SIZE": "2"}
    for name, value in torchrun.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(Fault, match="TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1"), meeting(0, 2, dead_after_s=5):
        pass


def test_a_rank_without_a_gpu_of_its_own_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    monkeypatch.setenv("LOCAL_RANK", "1")
    with (
        pytest.raises(Fault, match=r"train\.device = 'cuda': got 1 GPUs on .*; wanted one for each"),
        open_world("cuda"),
    ):
        pass
