"""`python -m recsys`."""

from recsys.cli import app

app(prog_name="python -m recsys")
