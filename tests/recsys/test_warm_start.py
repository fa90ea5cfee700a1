"""FNN starts from the tables of a trained FM."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from etl.faults import Fault
from recsys.experiment import Experiment
from recsys.models.fm import FMConfig
from recsys.models.fnn import FNNConfig
from recsys.predict import load_network
from recsys.train import train


@pytest.fixture
def fm(dataset: Path, tmp_path: Path, experiment: Callable[..., Experiment]) -> Path:
    run = tmp_path / "fm"
    train(experiment(model=FMConfig()), data=dataset, run=run, report=lambda record: None)
    return run


@pytest.mark.usefixtures("quiet")
@pytest.mark.parametrize("include_linear", [False, True])
def test_tables_start_as_the_fms(
    fm: Path, dataset: Path, tmp_path: Path, experiment: Callable[..., Experiment], include_linear: bool
) -> None:
    model = FNNConfig(hidden=[8], include_linear=include_linear, init_from_fm=str(fm))
    still = experiment(model=model, embedding={"learning_rate": 1e-30}, train={"epochs": 1})
    train(still, data=dataset, run=tmp_path / "fnn", report=lambda record: None)
    _, _, start = load_network(fm)
    _, _, found = load_network(tmp_path / "fnn")
    for table in ("user", "item"):
        width = 9 if include_linear else 8
        rows = found.tables.embedding_bags[table].weight[:, :width]
        wanted = start.tables.embedding_bags[table].weight[:, :width]
        torch.testing.assert_close(rows, wanted, rtol=0, atol=1e-7)
        assert wanted[:, -1].abs().max() > 1e-3


@pytest.mark.usefixtures("quiet")
def test_another_size_is_refused(
    fm: Path, dataset: Path, tmp_path: Path, experiment: Callable[..., Experiment]
) -> None:
    model = FNNConfig(hidden=[8], init_from_fm=str(fm))
    with pytest.raises(Fault, match=r"embedding\.dim 8; wanted vectors of 4"):
        train(experiment(model=model, embedding={"dim": 4}), data=dataset, run=tmp_path / "x", report=lambda r: None)
