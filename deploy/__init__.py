"""Serving on Triton: a run folder to a bundle, a model repository, the embedded server and its client."""

from pathlib import Path


def triton_model_file() -> Path:
    """The file that Triton's Python backend runs; it cannot be imported outside of it."""
    return Path(__file__).with_name("triton_model.py")
