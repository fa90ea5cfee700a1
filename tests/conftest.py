"""What every test shares: hypothesis without a clock, and `gpu` tests only where there is one."""

import pytest
from hypothesis import settings

# A deadline would test the machine's speed; derandomized, a run finds the same as the run before it.
settings.register_profile("rankforge", deadline=None, derandomize=True)
settings.load_profile("rankforge")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip tests marked `gpu` where there is no CUDA device; torch is loaded only if one was collected."""
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if not marked:
        return
    import torch

    if not torch.cuda.is_available():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device, torch finds none"))
