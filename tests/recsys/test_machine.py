"""What is said where a machine lacks something, and what is asked of it."""

import json
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from recsys import machine
from recsys.experiment import Experiment
from recsys.machine import slow_precision, slow_tables

ROOT = Path(__file__).parents[2]


def test_emulated_bf16_is_told(monkeypatch: pytest.MonkeyPatch, experiment: Callable[..., Experiment]) -> None:
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    assert "bf16" in (slow_precision(experiment(train={"precision": "bf16"}).train) or "")
    assert slow_precision(experiment().train) is None
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    assert slow_precision(experiment(train={"precision": "bf16"}).train) is None


def test_tables_on_one_core_are_told(monkeypatch: pytest.MonkeyPatch, experiment: Callable[..., Experiment]) -> None:
    settings = experiment().train
    monkeypatch.setattr(machine, "library", lambda: object())
    assert slow_tables(settings) is None
    monkeypatch.setattr(machine, "library", lambda: None)
    assert "C compiler" in (slow_tables(settings) or "")
    assert slow_tables(settings.model_copy(update={"device": "cuda"})) is None


@pytest.mark.skipif(shutil.which(sysconfig.get_config_var("CC").split()[0]) is None, reason="no C compiler")
def test_an_installation_with_a_compiler_has_the_loops() -> None:
    assert machine.library() is not None


def test_what_tensors_give_back_is_kept() -> None:
    """Pages that the kernel hands out while tensors of 40 MB come and go, in processes of their own: glibc by itself
    maps each of more than 32 MB anew."""
    assert _pages("keep_memory()") < 1000 < _pages("pass")


def test_what_was_kept_is_given_back() -> None:
    code = """
import psutil, torch
from recsys.machine import give_back_memory, keep_memory
keep_memory()
parts = [torch.ones(10 << 20, dtype=torch.uint8) for _ in range(20)]
guard = torch.ones(1 << 10)
del parts
kept = psutil.Process().memory_info().rss
give_back_memory()
print(kept - psutil.Process().memory_info().rss)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert int(done.stdout) > 150 << 20


def test_training_loads_no_library_of_the_etl(
    dataset: Path, tmp_path: Path, experiment: Callable[..., Experiment]
) -> None:
    """Pandas takes 40 MB of memory, polars 20, matplotlib 30, Arrow's functions 6; Arrow likes to load the first."""
    code = """
import json, sys
from pathlib import Path
from recsys.experiment import Experiment
from recsys.train import train
settings, data, run = sys.argv[1:]
train(Experiment.model_validate(json.loads(settings)), data=Path(data), run=Path(run), report=lambda progress: None)
print([name for name in ("pandas", "polars", "matplotlib", "numba", "pyarrow.compute") if name in sys.modules])
"""
    settings = json.dumps(experiment().as_json())
    line = [sys.executable, "-c", code, settings, str(dataset), str(tmp_path / "run")]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"


def _pages(first: str) -> int:
    code = f"""
import ctypes, resource, torch
ctypes.CDLL(None).prctl(41, 1, 0, 0, 0)  # PR_SET_THP_DISABLE: a huge page would count as one
from recsys.machine import keep_memory
{first}
def turn():
    for _ in range(5):
        parts = [torch.ones(10 << 20, dtype=torch.float32) for _ in range(3)]
for _ in range(4):
    turn()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
turn()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    return int(done.stdout)
