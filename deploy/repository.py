"""Bundles -> Triton model repository.

    <repository>/repository.json       what it is
    <repository>/ranker/config.pbtxt   names the one version that is served, and describes it
    <repository>/ranker/<n>/           a whole bundle each

A version counts once config.pbtxt, which is replaced by one rename, names it: whatever else lies there is not loaded.
"""

import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2 as pb

from deploy.bundle import MARKER, MODEL, Bundle, ServeDefaults, Signature, read_bundle
from etl.artifact import new_folder, read_json, sha256, write_json, write_text
from etl.faults import Fault

CANDIDATE = f"{MODEL}-candidate"
REPOSITORY = "repository.json"
_CONFIG = "config.pbtxt"
_LAYOUT = 2
_LINKED_BYTES = 1 << 20


class Repository:
    """The versions of one model in a folder. Whoever changes them has `locked` it."""

    def __init__(self, folder: Path) -> None:
        self.folder, self._model, self._candidate = folder, folder / MODEL, folder / CANDIDATE

    def version(self, number: int) -> Path:
        """The folder of a version."""
        return self._model / str(number)

    def versions(self) -> list[int]:
        """All versions that lie there, oldest first."""
        return sorted(int(path.name) for path in self._model.iterdir() if path.name.isdecimal())

    def config(self) -> pb.ModelConfig | None:
        """What is served, or None before the first version. Raises Fault where the file is broken."""
        path = self._model / _CONFIG
        try:
            return text_format.Parse(path.read_text(encoding="utf-8"), pb.ModelConfig())
        except FileNotFoundError:
            return None
        except text_format.ParseError as error:
            remedy = "publish again into another folder"
            raise Fault(str(path), got=str(error), wanted="Triton's own format", remedy=remedy) from None

    def holds(self, bundle_hash: str) -> int | None:
        """The served version, if it is this bundle."""
        config = self.config()
        served = config is not None and config.parameters["bundle"].string_value == bundle_hash
        return self.current() if served else None

    def current(self) -> int | None:
        """The version that config.pbtxt names."""
        config = self.config()
        return config.version_policy.specific.versions[0] if config else None

    @contextmanager
    def candidate(self, bundle_dir: Path, bundle: Bundle) -> Iterator[int]:
        """The bundle as a model of its own, `ranker-candidate`, under the number it would have; gone afterwards."""
        self.discard_candidate()
        number = max(self.versions(), default=0) + 1
        self.copy_bundle(bundle_dir, self._candidate / str(number), bundle=bundle)
        config = model_config(bundle, bundle_hash=sha256(bundle_dir / MARKER), instances=1, version=number)
        config.name = CANDIDATE
        write_text(self._candidate / _CONFIG, config_text(config))
        try:
            yield number
        finally:
            self.discard_candidate()

    def discard_candidate(self) -> None:
        """Also what a killed publisher left."""
        shutil.rmtree(self._candidate, ignore_errors=True)

    def copy_bundle(self, bundle_dir: Path, target: Path, *, bundle: Bundle) -> None:
        """The bundle's files at `target`, whole or not at all.

        Large ones are hard links where the file system has them: to the file of a version that has the same, so that
        all versions map one, else to the bundle's.
        """
        held = self._large_files()
        with new_folder(target, marker=MARKER) as folder:
            for name, wanted in bundle.files.items():
                same = held.get(wanted)
                _link(same if same and sha256(same) == wanted else bundle_dir / name, folder / name)
            _link(bundle_dir / MARKER, folder / MARKER)

    def _large_files(self) -> dict[str, Path]:
        """Hash -> file, of all versions."""
        folders = [folder for at in self.versions() if (folder := self.version(at)).joinpath(MARKER).is_file()]
        told = {folder: read_json(folder / MARKER, remedy="remove the folder") for folder in folders}
        files = {wanted: folder / name for folder, each in told.items() for name, wanted in each["files"].items()}
        return {wanted: path for wanted, path in files.items() if path.is_file() and _is_large(path)}

    def adopt(self, number: int) -> None:
        """The candidate's folder becomes a version, by one rename; it is not served yet."""
        (self._candidate / str(number)).rename(self.version(number))

    def serve(self, number: int, *, instances: int | None = None) -> None:
        """Names the version in config.pbtxt. Instances stay as many as they are unless given.

        Raises Fault or Faults where the version is no whole bundle.
        """
        folder = self.version(number)
        bundle = read_bundle(folder)
        before = self.config()
        instances = instances or (before.instance_group[0].count if before else bundle.serve.instances)
        config = model_config(bundle, bundle_hash=sha256(folder / MARKER), instances=instances, version=number)
        write_text(self._model / _CONFIG, config_text(config))

    def restore(self, config: pb.ModelConfig | None) -> None:
        """Puts back what `config()` returned before."""
        if config is None:
            (self._model / _CONFIG).unlink(missing_ok=True)
        else:
            write_text(self._model / _CONFIG, config_text(config))

    def prune(self, *, keep: int) -> None:
        """Removes what was put there and never served, and all but the newest `keep` of the others."""
        current = self.current() or 0
        served = [number for number in self.versions() if number <= current]
        for number in set(self.versions()) - set(served[-keep:]):
            shutil.rmtree(self.version(number))


def make_repository(bundle_dir: Path, out: Path, *, instances: int | None = None) -> Bundle:
    """A repository at `out` that serves this bundle, as a new version unless it is the one that is served already.

    Raises:
        Fault: no bundle, or something else stands at `out`.
        Faults: files of the bundle that are not as they were exported.
    """
    bundle = read_bundle(bundle_dir)
    with locked(out) as repository:
        number = repository.holds(sha256(bundle_dir / MARKER))
        if number is None:
            number = max(repository.versions(), default=0) + 1
            repository.copy_bundle(bundle_dir, repository.version(number), bundle=bundle)
        repository.serve(number, instances=instances or bundle.serve.instances)
    return bundle


@contextmanager
def locked(folder: Path) -> Iterator[Repository]:
    """The repository, made where there is none, for one writer at a time.

    Raises Fault where something else stands there, or another writer is at it.
    """
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        lock = folder.with_name(f".{folder.name}.lock").open("w")
    except OSError as error:
        raise Fault(str(folder), got=str(error), wanted="a folder this user can write", remedy="check it") from None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            remedy = "wait for the other one"
            raise Fault(str(folder), got="another publisher", wanted="one at a time", remedy=remedy) from None
        mark = folder / REPOSITORY
        if not mark.is_file() or read_json(mark, remedy="remove the folder").get("layout") != _LAYOUT:
            with new_folder(folder, marker=REPOSITORY) as made:
                (made / MODEL).mkdir()
                write_json(made / REPOSITORY, {"model": MODEL, "layout": _LAYOUT})
        yield Repository(folder)


def model_config(bundle: Bundle, *, bundle_hash: str, instances: int, version: int) -> pb.ModelConfig:
    """The served model as Triton is told about it."""
    signature = bundle.signature
    numbers = bundle.serve.numbers.upper()
    described = signature.model_dump(mode="json") | {
        "tasks": bundle.tasks,
        "max_rows": bundle.serve.max_batch_size,
        "numbers_type": numbers,
    }
    outputs = {"score": len(bundle.tasks), "ids": len(bundle.ids), "floats": len(bundle.floats)}
    inputs = _inputs("", signature, numbers=numbers)
    rows = [_output(name, size) for name, size in outputs.items() if size]
    if bundle.serve.user:
        user = signature.part(bundle.serve.user)
        items = signature.part(set(signature.columns) - set(bundle.serve.user))
        described["ranking"] = {
            "user": user.model_dump(mode="json"),
            "items": items.model_dump(mode="json"),
            "max_candidates": bundle.serve.max_candidates,
        }
        inputs += _inputs("user_", user, numbers=numbers)
        inputs += _inputs("item_", items, numbers=numbers, ragged=True)
        rows += [_output(f"rank_{name}", size, ragged=True) for name, size in outputs.items() if size]
        for each in inputs:  # a request has those of its kind
            each.optional = True
    return pb.ModelConfig(
        name=MODEL,
        backend="python",
        version_policy=pb.ModelVersionPolicy(specific=pb.ModelVersionPolicy.Specific(versions=[version])),
        max_batch_size=bundle.serve.max_batch_size,
        input=inputs,
        output=rows,
        instance_group=[_instances(bundle.serve, count=instances)],
        dynamic_batching=pb.ModelDynamicBatching(),  # any queue policy makes the batcher wait for up to 500 ms
        parameters={
            "signature": pb.ModelParameter(string_value=json.dumps(described)),
            "bundle": pb.ModelParameter(string_value=bundle_hash),
            "psi_alarm": pb.ModelParameter(string_value=str(bundle.serve.psi_alarm)),
        },
    )


def _instances(serve: ServeDefaults, *, count: int) -> pb.ModelInstanceGroup:
    if serve.device == "cpu":
        return pb.ModelInstanceGroup(kind=pb.ModelInstanceGroup.KIND_CPU, count=count)
    return pb.ModelInstanceGroup(kind=pb.ModelInstanceGroup.KIND_GPU, count=count, gpus=serve.gpus)


def _inputs(prefix: str, signature: Signature, *, numbers: str, ragged: bool = False) -> list[pb.ModelInput]:
    """The packed columns of a signature, of one width each; `ragged`: as many rows as each request likes."""
    widths = {
        "keys": (pb.TYPE_INT64, signature.width(signature.keys)),
        "numbers": (pb.DataType.Value(f"TYPE_{numbers}"), signature.width(signature.numbers)),
    }
    return [
        pb.ModelInput(
            name=f"{prefix}{name}", data_type=kind, dims=[-1, size] if ragged else [size], allow_ragged_batch=ragged
        )
        for name, (kind, size) in widths.items()
        if size
    ]


def _output(name: str, size: int, *, ragged: bool = False) -> pb.ModelOutput:
    kind = pb.TYPE_INT64 if name.endswith("ids") else pb.TYPE_FP32
    return pb.ModelOutput(name=name, data_type=kind, dims=[-1, size] if ragged else [size])


def config_text(config: pb.ModelConfig) -> str:
    """config.pbtxt. Raises Fault where the text does not say the same as the config."""
    text: str = text_format.MessageToString(config)
    if text_format.Parse(text, pb.ModelConfig()) != config:
        remedy = "report it with the versions of protobuf and tritonclient"
        raise Fault("config.pbtxt", got="another config when parsed back", wanted="the same", remedy=remedy)
    return text


def _is_large(path: Path) -> bool:
    return path.stat().st_size >= _LINKED_BYTES


def _link(source: Path, target: Path) -> None:
    """A copy does not change with its source: what is small gets one."""
    target.parent.mkdir(parents=True, exist_ok=True)
    if _is_large(source):
        with suppress(OSError):
            os.link(source, target)
            return
    shutil.copyfile(source, target)
