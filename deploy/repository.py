"""Bundle -> Triton model repository. The config is made, written and parsed back as Triton's own protobuf."""

import json
import os
import shutil
from pathlib import Path

from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2 as pb

from deploy.bundle import MARKER, MODEL, Bundle, read_bundle
from etl.artifact import new_folder, sha256, write_text
from etl.faults import Fault

_CODE = ("transform.py", "served_program.py", "ranker.py", "model.py")
_PROGRAM = ("program.pt2", "program.json", "native.pt2", "weights.safetensors")
_SERVED = (*_PROGRAM, "schema.json", "transform", *_CODE)
_MARK = "repository.json"


def make_repository(bundle_dir: Path, out: Path, *, instances: int | None = None) -> Bundle:
    """Writes `<out>/ranker/config.pbtxt` and version 1; files are hard links where the file system has them.

    Raises:
        Fault: no bundle, or something else stands at `out`.
        Faults: files of the bundle that are not as they were exported.
    """
    bundle = read_bundle(bundle_dir)
    bundle_hash = sha256(bundle_dir / MARKER)
    config = model_config(bundle, bundle_hash=bundle_hash, instances=instances or bundle.serve.instances)
    with new_folder(out, marker=_MARK) as folder:
        version = folder / MODEL / "1"
        version.mkdir(parents=True)
        for name in bundle.files:
            if name.split("/")[0] in _SERVED:
                _link(bundle_dir / name, version / name)
        write_text(folder / MODEL / "config.pbtxt", config_text(config))
        write_text(folder / _MARK, json.dumps({"bundle": bundle_hash}) + "\n")
    return bundle


def model_config(bundle: Bundle, *, bundle_hash: str, instances: int) -> pb.ModelConfig:
    """The served model as Triton is told about it."""
    signature = bundle.signature
    inputs = [
        ("keys", pb.TYPE_INT64, signature.width(signature.keys)),
        ("numbers", pb.TYPE_FP64, signature.width(signature.numbers)),
    ]
    outputs = [
        ("score", pb.TYPE_FP32, len(bundle.tasks)),
        ("ids", pb.TYPE_INT64, len(bundle.ids)),
        ("floats", pb.TYPE_FP32, len(bundle.floats)),
    ]
    described = signature.model_dump(mode="json") | {"tasks": bundle.tasks, "max_rows": bundle.serve.max_batch_size}
    return pb.ModelConfig(
        name=MODEL,
        backend="python",
        max_batch_size=bundle.serve.max_batch_size,
        input=[pb.ModelInput(name=name, data_type=kind, dims=[size]) for name, kind, size in inputs if size],
        output=[pb.ModelOutput(name=name, data_type=kind, dims=[size]) for name, kind, size in outputs if size],
        instance_group=[pb.ModelInstanceGroup(kind=pb.ModelInstanceGroup.KIND_CPU, count=instances)],
        dynamic_batching=pb.ModelDynamicBatching(),  # any queue policy makes the batcher wait for up to 500 ms
        parameters={
            "signature": pb.ModelParameter(string_value=json.dumps(described)),
            "bundle": pb.ModelParameter(string_value=bundle_hash),
        },
    )


def config_text(config: pb.ModelConfig) -> str:
    """config.pbtxt. Raises Fault where the text does not say the same as the config."""
    text: str = text_format.MessageToString(config)
    if text_format.Parse(text, pb.ModelConfig()) != config:
        remedy = "report it with the versions of protobuf and tritonclient"
        raise Fault("config.pbtxt", got="another config when parsed back", wanted="the same", remedy=remedy)
    return text


def _link(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
