"""`python -m deploy`."""

from deploy.cli import app

app()
