"""The experiment file as a whole: what the ETL reads, and the model, its training and its serving."""

from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from etl.artifact import read_json
from etl.experiment_file import parse
from etl.spec import FeatureSpec, Name, Section
from recsys.models import AnyModel


class EarlyStop(Section):
    """Ends training after `patience` evaluations without a better figure."""

    metric: Literal["auc", "logloss"] = "auc"
    patience: int = Field(2, ge=1, description="evaluations in a row without a new best")


class Train(Section):
    """How the model learns. `optimizer` and what follows it concern the dense part; tables have `[embedding]`."""

    batch_size: int = Field(512, ge=1, description="rows of one step on one rank")
    epochs: int = Field(10, ge=1, description="passes over the training rows, unless stopped early")
    optimizer: Literal["adam", "adagrad", "sgd"] = "adam"
    learning_rate: float = Field(1e-3, gt=0)
    weight_decay: float = Field(0.0, ge=0, description="decoupled: weights shrink by learning_rate x this each step")
    clip_norm: float | None = Field(None, gt=0, description="largest gradient norm of the dense part")
    precision: Literal["fp32", "bf16"] = Field("fp32", description="bf16: autocast of the dense part, tables stay fp32")
    device: Literal["cpu", "cuda"] = "cpu"
    early_stop: EarlyStop = Field(default_factory=EarlyStop)
    eval_every_steps: int | None = Field(None, ge=1, description="evaluate also between the ends of epochs")
    checkpoint_every_steps: int | None = Field(None, ge=1, description="save also between evaluations")
    keep: int = Field(2, ge=1, description="newest checkpoints kept, the best one always is")
    log_every_steps: int = Field(50, ge=1)


class Embedding(Section):
    """The tables: their size, their start, their optimizer (fused into the backward pass) and their sharding."""

    dim: int = Field(16, ge=4, multiple_of=4, description="embedding size; FBGEMM moves four floats at once")
    init_std: float = Field(0.01, ge=0, description="vectors start normal around 0; first-order weights at 0")
    optimizer: Literal["rowwise_adagrad", "adagrad", "sgd"] = "rowwise_adagrad"
    learning_rate: float = Field(0.02, gt=0)
    eps: float = Field(1e-8, gt=0, description="added to Adagrad's root of summed squares")
    sharding: Literal["auto", "table_wise", "row_wise"] = Field("auto", description="auto: the planner chooses a table")


class Export(Section):
    """What a bundle is checked with."""

    golden_rows: int = Field(64, ge=1, description="raw test rows kept in the bundle with their offline scores")
    tolerance: float = Field(1e-6, gt=0, description="largest difference of a served probability")


class Serve(Section):
    """The model server."""

    instances: int = Field(1, ge=1, description="copies of the model, one thread each")
    max_batch_size: int = Field(1024, ge=1, description="rows of the largest request")
    grpc_port: int | None = Field(None, ge=1, le=65535, description="a free one unless set")
    http_port: int | None = Field(None, ge=1, le=65535, description="a free one unless set")
    metrics_port: int | None = Field(None, ge=1, le=65535, description="a free one unless set")


class Experiment(FeatureSpec):
    """One experiment file."""

    name: Name
    model: AnyModel
    train: Train = Field(default_factory=Train)
    embedding: Embedding = Field(default_factory=Embedding)
    export: Export = Field(default_factory=Export)
    serve: Serve = Field(default_factory=Serve)

    def as_json(self) -> Any:
        """Every setting resolved, as JSON values; `read_experiment` reads them back."""
        return self.model_dump(mode="json", by_alias=True)


def read_experiment(run: Path) -> Experiment:
    """The experiment of a run folder. Raises Fault where the folder is none."""
    path = run / "experiment.json"
    return parse(read_json(path, remedy="name a folder that 'recsys train' made"), place=str(path), into=Experiment)
