"""The bundle: everything that serves one trained network, in one folder. `bundle.json` is written last."""

from collections.abc import Collection
from pathlib import Path, PurePosixPath
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from etl.artifact import read_json, sha256
from etl.faults import Fault, Faults

MARKER = "bundle.json"
MODEL = "ranker"  # the one name under which any bundle is served, so that a client needs the address alone


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Signature(_Record):
    """What a client packs: see `etl.transform.Signature`."""

    columns: dict[str, Literal["string", "int64", "float64", "list<string>", "list<int64>", "list<float64>"]]
    keys: tuple[str, ...]
    numbers: tuple[str, ...]
    slots: dict[str, int]
    newest: tuple[str, ...]

    def width(self, names: tuple[str, ...]) -> int:
        """Columns of the packed matrix of these raw columns."""
        return sum(self.slots.get(name, 1) for name in names)

    def part(self, names: Collection[str]) -> "Signature":
        """The signature of some of the raw columns."""
        return Signature(
            columns={name: dtype for name, dtype in self.columns.items() if name in names},
            keys=tuple(name for name in self.keys if name in names),
            numbers=tuple(name for name in self.numbers if name in names),
            slots={name: size for name, size in self.slots.items() if name in names},
            newest=tuple(name for name in self.newest if name in names),
        )


class ServeDefaults(_Record):
    """The experiment's [serve]; a port that is None is any free one."""

    instances: int = Field(ge=1)
    device: Literal["cpu", "cuda"] = "cpu"
    gpus: tuple[int, ...] = (0,)
    max_batch_size: int = Field(ge=1)
    grpc_port: int | None
    http_port: int | None
    metrics_port: int | None
    user: tuple[str, ...]
    max_candidates: int = Field(ge=1)
    numbers: Literal["fp64", "fp32"] = "fp64"
    psi_alarm: float = Field(gt=0)


class Cost(_Record):
    """Of one precision on validation rows: bytes of all weights, AUC and NE by task, largest change of a probability.

    `finer` is what tables hold instead where `tables` would change a probability by too much, `kept` names the layers
    that stay float32 for the same reason. A figure that the rows leave undefined is None.
    """

    tables: Literal["fp32", "fp16", "int8"]
    dense: Literal["fp32", "bf16"]
    finer: Literal["fp32", "fp16"] | None = None
    kept: tuple[str, ...] = ()
    size_bytes: int
    rows: int
    auc: dict[str, float | None]
    ne: dict[str, float | None]
    difference: float


class Bundle(_Record):
    """bundle.json. `isa` is what native code was compiled for; `costs` is empty where no validation rows were there."""

    version: Literal[1] = 1
    name: str
    run: str
    step: int
    metrics: dict[str, dict[str, float | None]]
    tasks: tuple[str, ...]
    ids: tuple[str, ...]
    floats: tuple[str, ...]
    signature: Signature
    tolerance: float
    serve: ServeDefaults
    versions: dict[str, str]
    quantization: str
    isa: str
    costs: tuple[Cost, ...]
    files: dict[str, str]


def read_bundle(folder: Path) -> Bundle:
    """The manifest of a bundle, after a look at every file that it names.

    Raises:
        Fault: there is no bundle, or it is of another version.
        Faults: files that are missing or differ from what was exported, all of them.
    """
    remedy = "run 'python -m deploy export RUN' again"
    path = folder / MARKER
    raw = read_json(path, remedy=remedy)
    try:
        bundle = Bundle.model_validate(raw)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        got = f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
        raise Fault(str(path), got=got, wanted="a bundle of version 1", remedy=remedy) from None
    if faults := _changed(folder, bundle):
        raise Faults(faults)
    return bundle


def file_hashes(folder: Path) -> dict[str, str]:
    """Path from the folder -> sha256, of all files in it."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): sha256(path) for path in paths}


def _changed(folder: Path, bundle: Bundle) -> list[Fault]:
    remedy = "run 'python -m deploy export RUN' again, or copy the bundle anew"
    faults = []
    for name, wanted in bundle.files.items():
        path = folder / PurePosixPath(name)
        got = f"sha256 {sha256(path)}" if path.is_file() else "no such file"
        if got != f"sha256 {wanted}":
            faults.append(Fault(str(path), got=got, wanted=f"sha256 {wanted}", remedy=remedy))
    return faults
