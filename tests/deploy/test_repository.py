"""Bundle -> repository: the config says what the bundle says, and a changed bundle is not served."""

import json
import shutil
from pathlib import Path

import pytest
from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2 as pb

from deploy.bundle import MODEL, read_bundle
from deploy.repository import Repository, config_text, locked, make_repository, model_config
from etl.faults import Fault, Faults
from etl.transform import Signature
from tests.deploy.test_publish import reseal


def test_the_config_says_what_the_bundle_says(bundle: Path, tmp_path: Path) -> None:
    made = make_repository(bundle, tmp_path / "repository", instances=3)
    text = (tmp_path / "repository" / MODEL / "config.pbtxt").read_text()
    config = text_format.Parse(text, pb.ModelConfig())
    assert config == model_config(made, bundle_hash=config.parameters["bundle"].string_value, instances=3, version=1)
    assert [(each.name, each.data_type, list(each.dims), each.allow_ragged_batch) for each in config.input] == [
        ("keys", pb.TYPE_INT64, [3], False),
        ("numbers", pb.TYPE_FP64, [2], False),
        ("user_keys", pb.TYPE_INT64, [1], False),
        ("user_numbers", pb.TYPE_FP64, [1], False),
        ("item_keys", pb.TYPE_INT64, [-1, 2], True),
        ("item_numbers", pb.TYPE_FP64, [-1, 1], True),
    ]
    assert all(each.optional for each in config.input), "a request has the inputs of its kind"
    widths = {"score": 2, "ids": 5, "floats": 2}
    assert {each.name: list(each.dims) for each in config.output} == {
        **{name: [width] for name, width in widths.items()},
        **{f"rank_{name}": [-1, width] for name, width in widths.items()},
    }
    assert config.max_batch_size == 32
    assert config.HasField("dynamic_batching")
    assert not config.dynamic_batching.ListFields(), "a queue policy costs up to 500 ms a batch"
    assert config.instance_group[0].count == 3
    signature = json.loads(config.parameters["signature"].string_value)
    assert Signature.from_json(signature).keys == ("site", "city", "item")
    assert (signature["tasks"], signature["max_rows"]) == (["click", "buy"], 32)
    assert (signature["ranking"]["user"]["keys"], signature["ranking"]["items"]["keys"]) == (["site"], ["city", "item"])
    assert signature["ranking"]["max_candidates"] == 100
    assert float(config.parameters["psi_alarm"].string_value) == 0.2


def test_numbers_of_32_bits(bundle: Path) -> None:
    made = read_bundle(bundle)
    narrow = made.model_copy(update={"serve": made.serve.model_copy(update={"numbers": "fp32"})})
    config = model_config(narrow, bundle_hash="", instances=1, version=1)
    types = {each.data_type for each in config.input if each.name.endswith("numbers")}
    assert types == {pb.TYPE_FP32}
    assert json.loads(config.parameters["signature"].string_value)["numbers_type"] == "FP32"


def test_inputs_and_outputs_without_columns_are_left_out(bundle: Path) -> None:
    made = read_bundle(bundle)
    bare = made.model_copy(
        update={
            "floats": (),
            "signature": made.signature.model_copy(update={"numbers": ()}),
            "tasks": ("a",),
            "serve": made.serve.model_copy(update={"user": ()}),
        }
    )
    config = model_config(bare, bundle_hash="x", instances=1, version=1)
    assert [(each.name, each.optional) for each in config.input] == [("keys", False)]
    assert [each.name for each in config.output] == ["score", "ids"]
    assert text_format.Parse(config_text(config), pb.ModelConfig()) == config


def test_every_changed_or_missing_file_is_named(bundle: Path, tmp_path: Path) -> None:
    (bundle / "model.py").write_text("import os")
    (bundle / "weights.safetensors").unlink()
    with pytest.raises(Faults) as caught:
        make_repository(bundle, tmp_path / "repository")
    assert {Path(fault.place).name for fault in caught.value.faults} == {"model.py", "weights.safetensors"}
    assert not (tmp_path / "repository").exists()


def test_a_folder_of_another_kind_is_left_alone(bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "repository").mkdir()
    (tmp_path / "repository" / "thesis.txt").write_text("mine")
    with pytest.raises(Fault, match=r"repository\.json"):
        make_repository(bundle, tmp_path / "repository")
    assert (tmp_path / "repository" / "thesis.txt").read_text() == "mine"


@pytest.mark.parametrize("text", ["", "{}", '{"version": 2}'])
def test_a_broken_manifest_is_a_fault(bundle: Path, text: str) -> None:
    (bundle / "bundle.json").write_text(text)
    with pytest.raises(Fault, match=r"bundle\.json"):
        read_bundle(bundle)


def test_the_same_bundle_stays_the_version_it_is_and_another_becomes_the_next(bundle: Path, tmp_path: Path) -> None:
    folder = tmp_path / "repository"
    for _ in range(2):
        make_repository(bundle, folder, instances=2)
    repository = Repository(folder)
    assert (repository.current(), repository.versions()) == (1, [1])
    manifest = json.loads((bundle / "bundle.json").read_text())
    (bundle / "bundle.json").write_text(json.dumps(manifest | {"name": "another"}))
    make_repository(bundle, folder)
    assert (repository.current(), repository.versions()) == (2, [1, 2])
    config = repository.config()
    assert config is not None
    assert config.instance_group[0].count == 1
    assert read_bundle(repository.version(1)).name == "tiny"
    assert read_bundle(repository.version(2)).name == "another"


def test_versions_share_the_large_files_that_did_not_change(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights and vocabularies that two bundles hold alike are one file, which all instances of both map."""
    monkeypatch.setattr("deploy.repository._LINKED_BYTES", 1)
    folder, again = tmp_path / "repository", shutil.copytree(bundle, tmp_path / "again")
    make_repository(bundle, folder)
    (again / "experiment.json").write_text("{}")
    reseal(again)
    make_repository(again, folder)
    repository = Repository(folder)
    one, two = repository.version(1), repository.version(2)
    names = set(read_bundle(two).files)
    assert {name for name in names if not (one / name).samefile(two / name)} == {"experiment.json"}
    (one / "weights.safetensors").write_bytes(b"broken, and so in the second")
    third = shutil.copytree(again, tmp_path / "third")
    (third / "experiment.json").write_text("{ }")
    reseal(third)
    make_repository(third, folder)
    assert not (one / "weights.safetensors").samefile(repository.version(3) / "weights.safetensors")


def test_what_a_killed_publisher_left_is_neither_served_nor_kept(bundle: Path, tmp_path: Path) -> None:
    folder = tmp_path / "repository"
    make_repository(bundle, folder)
    with locked(folder) as repository, repository.candidate(bundle, read_bundle(bundle)) as number:
        assert number == 2
        repository.adopt(number)
    assert (repository.current(), repository.versions()) == (1, [1, 2])
    assert not (folder / "ranker-candidate").exists()
    repository.prune(keep=3)
    assert repository.versions() == [1]


def test_the_newest_versions_are_kept(bundle: Path, tmp_path: Path) -> None:
    folder = tmp_path / "repository"
    manifest = json.loads((bundle / "bundle.json").read_text())
    for name in "abcd":
        (bundle / "bundle.json").write_text(json.dumps(manifest | {"name": name}))
        make_repository(bundle, folder)
    with locked(folder) as repository:
        repository.prune(keep=2)
        assert repository.versions() == [3, 4]
        repository.serve(3)
        repository.prune(keep=2)
        assert repository.versions() == [3]


def test_one_writer_at_a_time(bundle: Path, tmp_path: Path) -> None:
    with locked(tmp_path / "repository"), pytest.raises(Fault, match="another publisher"):
        make_repository(bundle, tmp_path / "repository")


def test_a_bundle_for_gpus_gets_instances_on_each_of_them(bundle: Path) -> None:
    made = read_bundle(bundle)
    serve = made.serve.model_copy(update={"device": "cuda", "gpus": (0, 2)})
    config = model_config(made.model_copy(update={"serve": serve}), bundle_hash="x", instances=1, version=1)
    (group,) = text_format.Parse(config_text(config), pb.ModelConfig()).instance_group
    assert (group.kind, group.count, list(group.gpus)) == (pb.ModelInstanceGroup.KIND_GPU, 1, [0, 2])
