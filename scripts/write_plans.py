"""Writes the plans of docs/scale.md between its marks: each command there is run and its output put below it."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "scale.md"
BLOCK = re.compile(r"    \$ python (?P<command>-m recsys plan .*)\n(?:    (?!\$ ).*\n|\n(?=    (?!\$ )))*")


def shown(match: re.Match[str]) -> str:
    """The command, and what it prints, indented."""
    line = [sys.executable, *shlex.split(match["command"])]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, check=False)
    text = done.stdout if done.returncode == 0 else done.stderr
    body = "".join(f"    {part}".rstrip() + "\n" for part in text.splitlines())
    return f"    $ python {match['command']}\n{body}"


def written(text: str) -> str:
    """The page with its plans made anew."""
    return BLOCK.sub(shown, text)


if __name__ == "__main__":
    PAGE.write_text(written(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
