"""The experiment file as a whole: what the ETL reads, and the model, its training and its serving."""

from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from etl.artifact import read_json
from etl.experiment_file import parse
from etl.spec import (
    Bag,
    ColumnNames,
    Count,
    FeatureSpec,
    Name,
    Numeric,
    Section,
    Sequence,
    Target,
    column_of,
    dims_of,
    expanded,
    resolve,
)
from recsys.models import AnyModel
from recsys.models.fnn import FNNConfig
from recsys.models.head import Sizes
from recsys.optim import Name as OptimizerName
from recsys.optim import OptimizerSettings
from recsys.placement import Placement, placement_faults


class EarlyStop(Section):
    """Ends training after `patience` evaluations without a better figure."""

    metric: Literal["auc", "logloss"] = "auc"
    patience: int = Field(2, ge=1, description="evaluations in a row without a new best")


class Plateau(Section):
    """Multiplies the learning rates by `factor` after `patience` evaluations without a better figure."""

    factor: float = Field(0.1, gt=0, lt=1)
    patience: int = Field(1, ge=1)
    times: int = Field(2, ge=1, description="at most this often")


class Train(OptimizerSettings):
    """How the model learns. The optimizer and its constants concern the dense part; tables have `[embedding]`."""

    optimizer: Literal["adam", "adagrad", "sgd", "momentum", "ftrl"] = "adam"
    batch_size: int = Field(512, ge=1, description="rows of one step on one rank")
    accumulate: int = Field(
        1, ge=1, description="a step of so many batches: the head takes one after the other, tables see them as one"
    )
    epochs: int = Field(10, ge=1, description="passes over the training rows, unless stopped early")
    weight_decay: float = Field(0.0, ge=0, description="decoupled: weights shrink by learning_rate x this each step")
    layer_l2: float | list[float] = Field(
        0.0,
        description="half of this times each linear layer's squared weights joins the loss; one number, or one a layer",
    )
    clip_norm: float | None = Field(None, gt=0, description="largest gradient norm of the dense part")
    precision: Literal["fp32", "bf16"] = Field("fp32", description="bf16: autocast of the dense part, tables stay fp32")
    compile: bool = Field(
        False, description="the dense part as one program, made in the first step; on CPU needs a C++ compiler"
    )
    device: Literal["cpu", "cuda"] = "cpu"
    early_stop: EarlyStop = Field(default_factory=EarlyStop)
    plateau: Plateau | None = Field(None, description="lower the learning rates where validation stops gaining")
    eval_every_steps: int | None = Field(None, ge=1, description="evaluate also between the ends of epochs")
    checkpoint_every_steps: int | None = Field(None, ge=1, description="save also between evaluations")
    keep: int = Field(2, ge=1, description="newest checkpoints kept, the best one always is")
    log_every_steps: int = Field(50, ge=1)
    tensorboard: bool = Field(False, description="also write the numbers of metrics.jsonl as TensorBoard's event files")
    spike: float | None = Field(
        10.0, gt=1, description="stop at a loss of so many times the usual one that is also worse than a coin's"
    )
    start_from: str | None = Field(
        None,
        min_length=1,
        description="folder of a finished run whose tables, head and optimizer states this one takes",
    )
    dead_after_s: float = Field(60.0, ge=2, description="a rank that is silent for so long is given up; the others end")

    @property
    def rank_rows(self) -> int:
        """Rows of a rank in one step: all of its parts are looked up at once."""
        return self.batch_size * self.accumulate

    @property
    def saves_midway(self) -> bool:
        """Whether checkpoints may be written while training goes on, from a copy; the last one needs none."""
        return self.epochs > 1 or bool(self.eval_every_steps or self.checkpoint_every_steps)


class Embedding(OptimizerSettings, Placement):
    """The tables: their size, their start, their optimizer (in the backward pass) and their sharding."""

    optimizer: OptimizerName = "rowwise_adagrad"
    learning_rate: float = Field(0.02, gt=0)
    dim: int = Field(16, ge=4, multiple_of=4, description="embedding size; FBGEMM moves four floats at once")
    init_std: float = Field(0.01, ge=0, description="vectors start normal around 0; first-order weights at 0")
    linear: OptimizerSettings | None = Field(
        None, description="optimizer of the first-order weights, of ids and of dense inputs, where another"
    )
    update: Literal["touched", "all"] = Field(
        "touched", description="all: each step moves every row, as dense optimizers do; for small tables"
    )
    l2: float = Field(0.0, ge=0, description="half of this times the squared vectors joins the loss, by l2_scope")
    linear_l2: float | None = Field(None, ge=0, description="the same for first-order weights; unset: as l2")
    l2_scope: Literal["batch", "table", "activations"] = Field(
        "batch",
        description="batch: rows that the step touched, once each; table: every row, each step, or as l2_every_steps "
        "says; activations: pooled vectors of each row of the batch, summed, as in the code of FM, FNN and PNN",
    )
    l2_every_steps: int = Field(
        1,
        ge=1,
        description="l2_scope table: every row moves at each so many-th step, by the gradient of as many L2s; at the "
        "others those that the step touched. Adam and Adagrad make about one step of it, so choose l2 anew",
    )

    @model_validator(mode="after")
    def _l2_waits_for_rows(self) -> "Embedding":
        wanted = self.l2_scope == "table" and self.update == "touched" and bool(self.l2 or self.first_order_l2)
        if self.l2_every_steps > 1 and not wanted:
            got = f"l2_scope '{self.l2_scope}', update '{self.update}', l2 {self.l2:g}"
            raise ValueError(
                f"'l2_every_steps' is for an 'l2' of l2_scope 'table' with update 'touched', got {got}; "
                "set these or leave it out"
            )
        return self

    @property
    def rowwise(self) -> bool:
        """Whether some columns of a row share one state."""
        return "rowwise_adagrad" in (self.optimizer, self.linear.optimizer if self.linear else "")

    @property
    def first_order_l2(self) -> float:
        """`linear_l2`, or what stands for it."""
        return self.l2 if self.linear_l2 is None else self.linear_l2


class Export(Section):
    """How a network is made a program, and what the bundle is checked with."""

    tables: Literal["fp32", "fp16", "int8"] = Field("fp32", description="int8: bytes with scale and start of each row")
    dense: Literal["fp32", "bf16"] = Field("fp32", description="bf16: gains on CPUs with AVX512-BF16 or AMX alone")
    compile: Literal["auto", "off", "x86-64-v3", "x86-64-v4"] = Field(
        "auto", description="native code for that level; auto: this CPU's, where there is a C++ compiler"
    )
    golden_rows: int = Field(64, ge=1, description="raw test rows kept in the bundle with their offline scores")
    tolerance: float | None = Field(
        None, gt=0, description="largest difference of a served probability; unset: 1e-6, of lower precisions 1e-3"
    )
    cost_rows: int = Field(50_000, ge=1, description="validation rows on which precisions are compared, at most")
    auc_budget: float = Field(5e-4, ge=0, description="largest change of the validation AUC by a lower precision")
    ne_budget: float = Field(1e-3, ge=0, description="largest change of the validation NE by a lower precision")


class Serve(Section):
    """The model server."""

    instances: int = Field(1, ge=1, description="copies of the model, one thread each")
    device: Literal["cpu", "cuda"] = Field("cpu", description="cuda: as many instances on each of `gpus`")
    gpus: list[int] = Field([0], min_length=1, description="for device cuda: numbers of the GPUs")
    max_batch_size: int = Field(1024, ge=1, description="rows of the largest request")
    grpc_port: int | None = Field(None, ge=1, le=65535, description="a free one unless set")
    http_port: int | None = Field(None, ge=1, le=65535, description="a free one unless set")
    metrics_port: int | None = Field(None, ge=1, le=65535, description="a free one unless set")
    user: list[ColumnNames] = Field(
        [], description="raw columns or ranges (U1..U9) that a ranking request sends once for all its candidates"
    )
    max_candidates: int = Field(1024, ge=1, description="of one ranking request")
    numbers: Literal["fp64", "fp32"] = Field(
        "fp64", description="type of packed numbers; fp32 halves them, and takes what float32 holds exactly"
    )
    psi_alarm: float = Field(0.2, gt=0, description="drift of scores and values that raises the alarm, as a PSI")


class Experiment(FeatureSpec):
    """One experiment file."""

    name: Name
    seed: int = Field(0, ge=0, description="of initial weights, shuffling and dropout")
    model: AnyModel
    train: Train = Field(default_factory=Train)
    embedding: Embedding = Field(default_factory=Embedding)
    export: Export = Field(default_factory=Export)
    serve: Serve = Field(default_factory=Serve)

    @model_validator(mode="after")
    def _model_has_what_it_needs(self) -> "Experiment":
        resolved = list(resolve(self.features))
        looked_up = [f for f in resolved if not isinstance(f, Target | Count)]
        ids = [f for f in looked_up if not (isinstance(f, Numeric) and f.as_ == "dense")]
        vectors = [f for f in ids if self.model.vectors and not f.linear_only]
        sequences = [f for f in vectors if self.model.unpooled and isinstance(f, Sequence)]
        sizes = Sizes(
            fields=tuple(str(f.name) for f in vectors if f not in sequences),
            dim=self.embedding.dim,
            dense=len(resolved) - len(ids),
            tasks=tuple(task.name for task in self.tasks),
            sequences=tuple((str(f.name), f.max_length) for f in sequences),
        )
        if faults := self.model.faults(sizes):
            raise ValueError(f"model '{self.model.kind}': {'; '.join(faults)}")
        if wrong := {name: dim for name, dim in dims_of(self.features).items() if dim > self.embedding.dim}:
            raise ValueError(f"tables with a dim above embedding.dim, {self.embedding.dim}: {wrong}; raise that one")
        tables = dict.fromkeys(str(getattr(f, "table", None) or f.name) for f in ids)
        embedding, device = self.embedding, self.train.device
        if faults := placement_faults(embedding, tables, device=device, rowwise=embedding.rowwise):
            raise ValueError("; ".join(faults))
        return self

    @model_validator(mode="after")
    def _starts_from_one_run(self) -> "Experiment":
        frozen, fm = [table for table, own in self.embedding.tables.items() if own.frozen], _fm_of(self.model)
        if self.train.start_from and fm:
            raise ValueError("train.start_from and model.init_from_fm: a run starts from one other, drop either")
        if (frozen or self.embedding.frozen) and not (self.train.start_from or fm):
            where = f"embedding.tables.{frozen[0]}" if frozen else "embedding"
            raise ValueError(f"{where}: frozen rows would stay as drawn at random, wanted 'train.start_from'")
        return self

    @property
    def starts_from(self) -> Path | None:
        """The run that training starts from, where there is one."""
        name = self.train.start_from or _fm_of(self.model)
        return Path(name) if name else None

    @model_validator(mode="after")
    def _user_columns_are_there(self) -> "Experiment":
        columns, user = self.raw_columns(), set(expanded(self.serve.user))
        if unknown := sorted(user - set(columns)):
            raise ValueError(f"serve.user: no feature reads '{unknown[0]}', the columns are {', '.join(columns)}")
        if user and not set(columns) - user:
            raise ValueError("serve.user names every column: candidates need one of their own")
        for feature in resolve(self.features):
            if isinstance(feature, Bag) and feature.weight_column:
                pair = {column_of(feature), feature.weight_column}
                if len(pair & user) == 1:
                    raise ValueError(
                        f"serve.user: name both {' and '.join(sorted(pair))}, or neither: they go together"
                    )
        return self

    def as_json(self) -> Any:
        """Every setting resolved, as JSON values; `read_experiment` reads them back."""
        return self.model_dump(mode="json", by_alias=True)


def _fm_of(model: AnyModel) -> str | None:
    return model.init_from_fm if isinstance(model, FNNConfig) else None


def read_experiment(run: Path) -> Experiment:
    """The experiment of a run folder. Raises Fault where the folder is none."""
    path = run / "experiment.json"
    return parse(read_json(path, remedy="name a folder that 'recsys train' made"), place=str(path), into=Experiment)
