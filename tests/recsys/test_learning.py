"""Training finds a known signal, and finds nothing where the labels are shuffled."""

from collections.abc import Callable
from pathlib import Path

import pytest

from etl.artifact import Json
from recsys.experiment import Experiment
from recsys.models import MODELS
from recsys.train import train


def learnt_auc(experiment: Experiment, *, data: Path, run: Path) -> float:
    """The AUC on the test rows after training in `run`."""
    result: Json = train(experiment, data=data, run=run, report=lambda record: None)
    return float(result["test"]["auc"])


@pytest.mark.usefixtures("quiet")
@pytest.mark.parametrize("kind", ["wide", "fm", "wide_deep", "dcnv2"])
def test_a_known_signal_is_learnt(
    kind: str, dataset: Path, noise: Path, tmp_path: Path, experiment: Callable[..., Experiment]
) -> None:
    settings = experiment(
        model=MODELS[kind](), train={"epochs": 8, "learning_rate": 0.01}, embedding={"learning_rate": 0.1}
    )
    assert learnt_auc(settings, data=dataset, run=tmp_path / "signal") > 0.78
    assert abs(learnt_auc(settings, data=noise, run=tmp_path / "noise") - 0.5) < 0.06
