"""What `recsys plan` is asked for; light, since the command line is made from it."""

import math
from dataclasses import dataclass, field
from pathlib import Path

from etl.faults import Fault, Faults


def _help(text: str) -> dict[str, str]:
    return {"help": text}


@dataclass(frozen=True, kw_only=True)
class PlanOptions:
    """Hardware that need not be there, and tables that need not be there; the fields are the command's options."""

    world_size: int = field(default=1, metadata=_help("Ranks: processes, one a GPU."))
    hosts: int | None = field(
        default=None, metadata=_help("Hosts that share the ranks evenly; default the fewest of at most 8 ranks.")
    )
    local_world_size: int | None = field(default=None, metadata=_help("Ranks of one host, instead of --hosts."))
    device: str | None = field(default=None, metadata=_help("cpu or cuda; default train.device."))
    hbm_gib: float = field(default=80.0, metadata=_help("Memory of one GPU."))
    ddr_gib: float | None = field(
        default=None,
        metadata=_help("Memory of one host; default 2048 with GPUs, without them this container's."),
    )
    data: Path | None = field(
        default=None, metadata=_help("The dataset folder; default out/<name>/data. Not needed where --rows says all.")
    )
    rows: list[str] | None = field(
        default=None, metadata=_help("Rows of a table that is planned larger or smaller: --rows item=1000000.")
    )
    json: bool = field(default=False, metadata=_help("Print one JSON object."))
    picture: Path | None = field(
        default=None, metadata=_help("Also draw the ranks' memory into this .svg or .png file.")
    )
    set: list[str] | None = field(default=None, metadata=_help("Overrides one key: --set embedding.sharding=row_wise."))

    @property
    def host_count(self) -> int:
        """Hosts, by whichever option says so. Raises Faults where the options don't fit together."""
        fitting = max((size for size in range(1, 9) if self.world_size % size == 0), default=1)
        local = self.local_world_size or (self.world_size // self.hosts if self.hosts else fitting)
        limits = (("world-size", self.world_size), ("hosts", self.hosts), ("local-world-size", self.local_world_size))
        small = [(name, value) for name, value in limits if value is not None and value < 1]
        faults = [
            Fault(f"--{name}", got=str(v), wanted="at least 1", remedy="give a larger number") for name, v in small
        ]
        for name, gib in (("hbm-gib", self.hbm_gib), ("ddr-gib", self.ddr_gib)):
            if gib is not None and not 0 < gib < math.inf:
                faults.append(Fault(f"--{name}", got=str(gib), wanted="a number above 0", remedy="say how many GiB"))
        hosts = self.hosts or (self.world_size // local if local > 0 else 1)
        if not faults and hosts * local != self.world_size:
            got = f"{self.world_size} ranks on {hosts} hosts of {local}"
            faults = [Fault("--world-size", got=got, wanted="equally many on each host", remedy="change one of them")]
        if self.device not in (None, "cpu", "cuda"):
            faults.append(Fault("--device", got=self.device, wanted="cpu or cuda", remedy="choose one of these"))
        if self.picture and self.picture.suffix not in (".svg", ".png"):
            remedy = "name a file of one of these kinds"
            faults.append(Fault("--picture", got=str(self.picture), wanted=".svg or .png", remedy=remedy))
        if faults:
            raise Faults(faults)
        return hosts

    def overrides(self) -> list[str]:
        """The experiment's keys that these options stand for."""
        return [f"train.device={self.device}"] if self.device in ("cpu", "cuda") else []

    def row_counts(self) -> dict[str, int]:
        """`--rows` parsed. Raises Faults where one is no NAME=COUNT."""
        parted = [text.partition("=") for text in self.rows or []]
        bad = [f"{name}={count}" for name, _, count in parted if not (name and count.isdecimal() and int(count))]
        if bad:
            wanted, remedy = "NAME=COUNT with a count above 0", "for example --rows item=1000000"
            raise Faults([Fault("--rows", got=text, wanted=wanted, remedy=remedy) for text in bad])
        return {name: int(count) for name, _, count in parted}
