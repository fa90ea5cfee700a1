"""What `deploy bench` is asked for; light, since the command line is made from it."""

from dataclasses import dataclass, field
from pathlib import Path

from etl.faults import Fault


@dataclass(frozen=True, kw_only=True)
class BenchOptions:
    """The load, and where it goes; the fields are the command's options."""

    url: str | None = field(
        default=None, metadata={"help": "Or a server that runs, HOST:PORT (gRPC), with random rows."}
    )
    tls: Path | None = field(
        default=None, metadata={"help": "With --url: folder with ca.crt, and tls.crt and tls.key for mutual TLS."}
    )
    rows: int = field(default=64, metadata={"help": "Rows of a request.", "min": 1})
    ranked: bool = field(default=False, metadata={"help": "Ranking requests: the rows are the candidates of one user."})
    concurrency: int = field(default=8, metadata={"help": "Clients of the closed loop.", "min": 1})
    rate: float | None = field(
        default=None, metadata={"help": "Open loop instead: requests/s at random times.", "min": 0.1}
    )
    out: Path | None = field(default=None, metadata={"help": "Folder for bench.json and bench.svg."})

    def refuse_two_places(self, bundle: Path | None) -> None:
        """Raises Fault unless either a bundle or a server is named, and TLS for a server alone."""
        remedy = "see 'deploy bench --help'"
        if (bundle is None) == (self.url is None):
            raise Fault("bench", got="a bundle and --url, or neither", wanted="either of the two", remedy=remedy)
        if self.tls is not None and self.url is None:
            raise Fault("bench", got="--tls with a bundle", wanted="it with --url", remedy=remedy)

    def __str__(self) -> str:
        what = "candidates" if self.ranked else "rows"
        load = f"{self.rate:g} requests/s" if self.rate else f"{self.concurrency} clients"
        return f"{self.rows} {what} a request, {load}"
