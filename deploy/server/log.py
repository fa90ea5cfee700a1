"""What in Triton's log explains a failure."""

import re
from pathlib import Path

_ERROR = re.compile(r'(?:E\d{4} [^]]*\] |\[libprotobuf ERROR [^]]*\] |error: )"?(?P<text>.*?)"?\s*')
_TRITON = re.compile(r"[IWE]\d{4} |[+|]|Signal \(|error: |\s*$")
_REPEATED = "ERROR: Failed to create instance: "  # said again, in full, by "failed to load"
_HARMLESS = "CudaDriverHelper has not been initialized"
_SUMMARY = "creating server: Internal - failed to load all models"
_CRASH = "is not healthy"  # the stub died without an error of its own: its last output is all there is
_TAIL_BYTES = 65536
_LAST_LINES = 8


def size_bytes(log: Path) -> int:
    """0 where someone moved the log away: a restart begins a new one."""
    return log.stat().st_size if log.exists() else 0


def read_since(log: Path, offset: int) -> str:
    """The log's text after byte `offset`, its last 64 KiB at most."""
    with log.open("rb") as lines:
        lines.seek(max(offset, size_bytes(log) - _TAIL_BYTES))
        return lines.read().decode(errors="replace")


def reasons(text: str) -> str:
    """The errors of one start, as many lines; what the process printed last where Triton reports none."""
    lines = text.splitlines()
    errors = [match["text"].replace("\\n", "\n").strip() for line in lines if (match := _ERROR.fullmatch(line))]
    told = [error for error in dict.fromkeys(errors) if not error.startswith((_REPEATED, _HARMLESS, _SUMMARY))]
    if not told or any(_CRASH in error for error in told):
        told += [line for line in lines if not _TRITON.match(line)][-_LAST_LINES:]
    return "\n".join(told) or "nothing in the log"
