"""The feature spec's numbers: raw ones, and those that stand for what training rows say about a value."""

from typing import Any, Literal

from pydantic import Field, model_validator

from etl.section import ColumnNames, IdSection, Name, Section


class Numeric(IdSection):
    """A number: a dense input, buckets that are looked up like ids, or a field, one row multiplied by the number.

    Dense inputs and fields are filled, clipped, taken the logarithm of and scaled, in this order; every statistic of a
    step is one of the training rows after the steps before it. NaN is missing.
    """

    type: Literal["numeric"]
    name: Name | None = Field(None, description="defaults to the column's name")
    column: str | None = Field(None, description="the raw column; defaults to the name")
    columns: list[ColumnNames] = Field(
        [], description="several columns, ranges (I1..I13) or globs (I*), each a feature of its own"
    )
    as_: Literal["dense", "field", "buckets"] = Field("dense", alias="as")
    fill: float | Literal["mean", "median"] = Field(
        "mean", description="dense and field: value of a missing number, or the mean or median of the training rows"
    )
    clip: tuple[float, float] | None = Field(
        None, description="dense and field: lowest and highest value kept", strict=False
    )
    log1p: bool = Field(False, description="dense and field: log(1 + x); values below 0 count as 0")
    scale: Literal["standardize", "minmax", "none"] = Field(
        "standardize", description="dense and field: to mean 0 and deviation 1, or the training rows to [0, 1]"
    )
    boundaries: list[float] = Field([], description="buckets: ascending inner edges; x < edge stays left")
    quantiles: int | None = Field(
        None, ge=2, le=4096, description="buckets: this many, with edges at training quantiles"
    )

    @model_validator(mode="before")
    @classmethod
    def _older_key(cls, raw: Any) -> Any:
        """`standardize` true or false says scale = "standardize" or "none"."""
        if not isinstance(raw, dict) or not isinstance(raw.get("standardize"), bool):
            return raw
        scale = "standardize" if raw["standardize"] else "none"
        if raw.get("scale", scale) != scale:
            raise ValueError("'standardize' and 'scale' contradict each other: give 'scale' alone")
        return {key: value for key, value in raw.items() if key != "standardize"} | {"scale": scale}

    @model_validator(mode="after")
    def _bucket_edges(self) -> "Numeric":
        if self.as_ == "buckets" and bool(self.boundaries) == (self.quantiles is not None):
            raise ValueError("as = 'buckets' needs either 'boundaries' or 'quantiles'")
        if self.as_ != "buckets" and (self.boundaries or self.quantiles):
            raise ValueError("'boundaries' and 'quantiles' belong to as = 'buckets'")
        if self.as_ == "dense" and (self.linear_only or self.dim):
            raise ValueError("'linear_only' and 'dim' belong to as = 'buckets' and as = 'field'")
        if any(a >= b for a, b in zip(self.boundaries, self.boundaries[1:], strict=False)):
            raise ValueError("'boundaries' must ascend")
        if self.clip and self.clip[0] >= self.clip[1]:
            raise ValueError("'clip' must be [lowest, highest]")
        return self


class _Encoding(Section):
    """A dense input that stands for the value of one column, or for the values of several columns together."""

    name: Name
    by: list[str] = Field(min_length=1, description="raw columns of single values; several are one key together")
    dtype: Literal["string", "int64"] = Field("string", description="of columns that no other feature reads")

    @model_validator(mode="after")
    def _each_column_once(self) -> "_Encoding":
        if len(set(self.by)) < len(self.by):
            raise ValueError("'by' names a column twice")
        return self


class Target(_Encoding):
    """The rate of a task's label at a value, drawn towards the rate of all rows (Micci-Barreca 2001).

    (ones + smoothing * rate) / (rows + smoothing), in which a training row sees the rows of the other folds alone.
    """

    type: Literal["target"]
    task: Name | None = Field(None, description="whose label; may be left out where there is one task")
    smoothing: float = Field(20.0, ge=0, description="rows that the rate of all rows counts for")
    folds: int = Field(5, ge=2, le=100, description="parts of the training rows, by a hash of seed and position")
    seed: int = Field(0, ge=0, lt=2**63, description="of the folds")


class Count(_Encoding):
    """How many training rows hold a value; 0 where it is missing or unseen."""

    type: Literal["count"]
    log1p: bool = Field(True, description="log(1 + rows)")
