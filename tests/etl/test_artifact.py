"""Files and folders exist whole or not at all."""

from pathlib import Path

import pytest

from etl.artifact import digest, new_folder, read_json, write_json
from etl.faults import Fault


def test_a_folder_that_fails_leaves_the_old_one(tmp_path: Path) -> None:
    target = tmp_path / "data"
    with new_folder(target, marker="m") as folder:
        (folder / "m").write_text("old")

    def fail() -> None:
        with new_folder(target, marker="m") as folder:
            (folder / "m").write_text("new")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert (target / "m").read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["data"]
    with new_folder(target, marker="m") as folder:
        (folder / "m").write_text("new")
    assert (target / "m").read_text() == "new" and [p.name for p in tmp_path.iterdir()] == ["data"]


def test_json_knows_no_nan_and_names_what_is_broken(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="JSON"):
        write_json(tmp_path / "x.json", float("nan"))
    assert not (tmp_path / "x.json").exists()
    (tmp_path / "y.json").write_text("{")
    with pytest.raises(Fault, match=r"y\.json: got broken JSON.*remedy: again"):
        read_json(tmp_path / "y.json", remedy="again")


def test_digest_does_not_depend_on_the_order_of_keys() -> None:
    assert digest({"a": 1, "b": [1]}) == digest({"b": [1], "a": 1}) != digest({"a": 1, "b": [2]})
