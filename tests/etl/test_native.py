"""Compiled loops that are kept on disk."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from etl.engines import native

KEPT = "loops.json"


def test_a_later_process_does_not_load_numba() -> None:
    native.load()
    code = "import sys; from etl.engines.native import load; load(); print('numba' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


@pytest.mark.parametrize("broken", ["", "[1]", '{"put": ["name"]}', '{"put": '])
def test_what_is_not_whole_is_made_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: str) -> None:
    (tmp_path / KEPT).write_text(broken)
    monkeypatch.setattr(native, "_places", lambda: [tmp_path])
    made = native._texts(KEPT)
    assert sorted(made) == ["count", "fill", "look_up", "put", "scale32", "scale64"]
    assert native._texts(KEPT) == made
    assert all(name in text for name, text in made.values())


def test_the_next_place_is_taken_where_one_can_not_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    nowhere, home = tmp_path / "file" / "cache", tmp_path / "home"
    monkeypatch.setattr(native, "_places", lambda: [nowhere, home])
    assert native._texts(KEPT)
    assert [path.name for path in home.iterdir()] == [KEPT]
    monkeypatch.setattr(native, "_places", lambda: [nowhere])
    assert native._texts(KEPT)


@pytest.mark.parametrize("wrong", [np.arange(8)[::2], np.arange(4, dtype=np.int32)])
def test_arrays_that_the_loops_can_not_read(wrong: np.ndarray) -> None:
    with pytest.raises(ValueError, match=r"look_up: .*wanted 64 bits side by side"):
        native.call("look_up", np.zeros((2, 2), np.int64), wrong, np.zeros(4, np.int64), np.array([2, 4, 0, 0]))


def test_a_user_without_a_home(monkeypatch: pytest.MonkeyPatch) -> None:
    def nobody() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", nobody)
    assert [place.name for place in native._places()] == ["__pycache__"]
