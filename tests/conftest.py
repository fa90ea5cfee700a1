"""What every test shares: hypothesis without a clock, and `gpu` tests only where there is one."""

from importlib.util import find_spec

import pytest
from hypothesis import settings

from etl.engines.device import gpus

# A deadline would test the machine's speed; derandomized, a run finds the same as the run before it.
settings.register_profile("rankforge", deadline=None, derandomize=True)
settings.load_profile("rankforge")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip tests marked `gpu` where there is no CUDA device; torch is loaded only for these."""
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if not marked:
        return
    if find_spec("torch"):
        import torch

        finder, found = "torch", torch.cuda.is_available()
    else:
        finder, found = "its driver", gpus() > 0
    if not found:
        for item in marked:
            item.add_marker(pytest.mark.skip(reason=f"needs a CUDA device, {finder} finds none"))
