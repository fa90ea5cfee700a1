"""Experiment files: every fault at once, with its dotted path; what is shipped loads."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from etl.experiment_file import load, parse
from etl.faults import Faults
from recsys.experiment import Experiment
from recsys.models import MODELS

SHIPPED = sorted((Path(__file__).parents[2] / "experiments").rglob("*.toml"))


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.name)
def test_shipped_experiments_load(path: Path) -> None:
    load(path, overrides=[], into=Experiment)


def test_all_faults_come_at_once(experiment: Callable[..., Experiment]) -> None:
    with pytest.raises(Faults) as faults:
        experiment(
            train={"batch_size": 0, "learning_rate": float("nan"), "epoch": 3},
            embedding={"dim": 6},
            model={"hidden": [8, 0], "keep_prob": 0.0},
        )
    places = {fault.place.removeprefix("known.toml: ") for fault in faults.value.faults}
    model = {"model.wide_deep.hidden.1", "model.wide_deep.keep_prob.number"}
    assert places == {"train.batch_size", "train.learning_rate", "train.epoch", "embedding.dim"} | model


def test_a_model_says_what_the_features_lack(experiment: Callable[..., Experiment]) -> None:
    attention = [{"query": ["item"], "keys": ["history"]}]
    with pytest.raises(Faults, match="model 'din': attention: 'history' is no sequence with vectors"):
        experiment(model=MODELS["din"].model_validate({"kind": "din", "attention": attention}))
    with pytest.raises(Faults, match="task 'conversion' is not among the tasks"):
        experiment(model=MODELS["esmm"]())


def test_an_unknown_model_is_answered_with_the_known_ones(experiment: Callable[..., Experiment]) -> None:
    with pytest.raises(Faults, match="'fm', 'fnn', 'deepfm', 'nfm'"):
        experiment(model={"kind": "deep_fm"})


def test_a_resolved_experiment_reads_back_equal(experiment: Callable[..., Experiment]) -> None:
    there = experiment()
    assert parse(json.loads(json.dumps(there.as_json())), place="experiment.json", into=Experiment) == there


def test_the_users_columns_are_raw_columns_and_not_all(experiment: Callable[..., Experiment]) -> None:
    assert experiment(serve={"user": ["user", "x"]}).serve.user == ["user", "x"]
    with pytest.raises(Faults, match=r"serve\.user: no feature reads 'pair', the columns are user, item, x, y"):
        experiment(serve={"user": ["pair"]})
    with pytest.raises(Faults, match="candidates need one of their own"):
        experiment(serve={"user": ["user", "item", "x", "y"]})
    bag = {"type": "bag", "name": "tags", "max_length": 3, "weight_column": "share"}
    features = [{"type": "categorical", "columns": ["C1", "C2", "item"]}, bag]
    assert experiment(features=features, model=MODELS["deep"](), serve={"user": ["C1..C2", "tags", "share"]})
    with pytest.raises(Faults, match="name both share and tags, or neither"):
        experiment(features=features, model=MODELS["deep"](), serve={"user": ["tags"]})
