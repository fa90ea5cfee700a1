"""The `[data]` section: the raw files, how they are divided, and the rows and columns that are made from them."""

from collections.abc import Mapping
from typing import Literal

from pydantic import Field, model_validator

from etl.section import Name, Section

TEXT_TABLES = ("csv", "tsv")
OWN_COLUMNS = ("label:", "group:", "weight:", "day:", "split:", "row:", "history:", "negatives:", "position:")
"""How the names begin of columns that are made beside those of the files."""


class Split(Section):
    """How the training files are divided where no validation or no test files are given.

    `row`: by a hash of the row's position. `group`: by a hash of a column, whose rows stay together. `time`: the newest
    rows, by share or from a given time on. `last`: the last row of each user is for the test, the one before it for
    validation; a user's first row stays in training.
    """

    by: Literal["row", "group", "time", "last"] = Field("row", description="what decides where a row goes")
    column: str | None = Field(None, description="the column of the group, of the time, or (last) of the user")
    time: str | None = Field(None, description="last: the time column; of equal times the later row counts as newer")
    valid_fraction: float = Field(0.1, gt=0, lt=1, description="share of the training rows held out for validation")
    test_fraction: float | None = Field(None, gt=0, lt=1, description="share for the test, without test files")
    valid_from: int | str | None = Field(None, description="time: rows at or after go to validation, instead of shares")
    test_from: int | str | None = Field(None, description="time: rows at or after go to the test, instead of shares")
    seed: int = Field(0, ge=0, description="row and group: the split depends on it and on the position or group alone")
    unit: Literal["s", "ms"] | None = Field(
        None, description="time and last: of whole numbers, counted from 1970 on; rates of labels are then told by day"
    )

    @property
    def bounded(self) -> bool:
        """Whether times are given instead of shares."""
        return self.valid_from is not None or self.test_from is not None

    @model_validator(mode="after")
    def _keys_fit(self) -> "Split":
        if (self.by == "row") == (self.column is not None):
            raise ValueError("'column' goes with by = 'group', 'time' or 'last', which need it")
        if (self.by == "last") != (self.time is not None):
            raise ValueError("'time' goes with by = 'last', which needs it")
        if self.unit is not None and self.by not in ("time", "last"):
            raise ValueError("'unit' goes with by = 'time' or 'last'")
        if self.bounded and (self.by != "time" or self.test_fraction is not None):
            raise ValueError("'valid_from' and 'test_from' go with by = 'time', without 'test_fraction'")
        if self.by == "last" and self.test_fraction is not None:
            raise ValueError("by = 'last' takes no 'test_fraction': a row of each user is for the test")
        if self.valid_fraction + (self.test_fraction or 0.0) >= 1.0:
            raise ValueError("'valid_fraction' and 'test_fraction' leave no row for training")
        return self


class History(Section):
    """List columns with what a user did before: for each row the newest earlier events of its user, oldest first.

    The log is all rows of all files. Only strictly earlier times count, so rows of one time do not see each other. A
    row without a user has an empty history and stands in none.
    """

    user: str = Field(description="whole numbers or text")
    time: str = Field(description="whole numbers, times or dates (text in ISO 8601)")
    columns: dict[Name, str] = Field(min_length=1, description="new list column = the column that it collects")
    max_length: int = Field(ge=1, le=1024, description="events kept, the newest")
    where: dict[str, str] = Field({}, description="only rows with these texts in these columns are events")
    min_length: int = Field(0, ge=0, description="rows with fewer events before them are in the log alone")

    @model_validator(mode="after")
    def _lengths(self) -> "History":
        if self.min_length > self.max_length:
            raise ValueError("'min_length' is above 'max_length'")
        return self


class Negatives(Section):
    """Rows with an item that the user did not take, after each positive row, whose other columns they share.

    Items and what belongs to them come from the training rows; labels of all tasks are 0.
    """

    item: str = Field(description="the column whose values are drawn")
    attributes: list[str] = Field([], description="columns that follow the item, as in its first training row")
    count: int = Field(1, ge=1, le=1000, description="rows a positive, drawn one by one: an item may come again")
    by: Literal["uniform", "popularity"] = Field("uniform", description="popularity: by rows of the item in training")
    exclude: Literal["user", "event"] = Field(
        "user", description="user: no item of any row of the user, in all files; event: not the positive's own item"
    )
    user: str | None = Field(None, description="exclude = 'user': whole numbers or text")
    positive: Name | None = Field(
        None, description="the task whose 1s get negatives; unset: the files hold no labels and each row is a 1"
    )
    seed: int = Field(0, ge=0, description="draws depend on it and on the row's position alone")

    @model_validator(mode="after")
    def _user_fits(self) -> "Negatives":
        if (self.exclude == "user") != (self.user is not None):
            raise ValueError("'user' goes with exclude = 'user', which needs it")
        if self.item in self.attributes or len(set(self.attributes)) < len(self.attributes):
            raise ValueError("'attributes' are other columns than 'item', each once")
        return self


class Data(Section):
    """The raw files. Paths and globs are relative to the folder in which the command runs.

    libsvm lines (`label id:value ...`) are read as the columns `label`, `ids` and `values`; libffm lines
    (`label field:id:value ...`) as `label` and, for each field, `ids_<field>` and `values_<field>`.
    """

    format: Literal["csv", "tsv", "parquet", "libsvm", "libffm"] = Field(
        "csv", description="gz and zst are recognised by the file's name"
    )
    train: list[str] = Field(min_length=1, description="files or globs, read in sorted order within a glob")
    valid: list[str] = Field([], description="validation files; empty: [data.split] divides the training files")
    test: list[str] = Field([], description="test files; empty: [data.split] divides the training files")
    columns: list[str] = Field([], description="csv and tsv: column names of files without a header line")
    group: str | None = Field(None, description="a whole-number or text column, such as the user, for AUC by group")
    weight: str | None = Field(None, description="a column of numbers from 0 on: how often a row counts")
    null_values: list[str] = Field([""], description="texts that mean missing, compared after trimming")
    comment: str | None = Field(None, min_length=1, description="lines that start with this text are skipped")
    trim: bool = Field(True, description="remove spaces around each value")
    quote: str | None = Field(
        None, max_length=1, description="what encloses values, '' for nothing; default: '\"' in csv, nothing in tsv"
    )
    split: Split = Field(default_factory=Split)
    histories: list[History] = Field([], description="lists of a user's earlier events, which sequences read")
    negatives: Negatives | None = Field(None, description="drawn rows for files that hold positives alone")

    @property
    def divided(self) -> list[str]:
        """The splits that come from the training files."""
        return [name for name, given in (("valid", self.valid), ("test", self.test)) if not given]

    @property
    def quotes(self) -> str | None:
        """What encloses a value that holds the delimiter; None where nothing does, and each line is a row."""
        default = '"' if self.format == "csv" else ""
        return (default if self.quote is None else self.quote) or None

    @property
    def history_sources(self) -> dict[str, str]:
        """List column -> the column that it collects, over all histories."""
        return {name: source for history in self.histories for name, source in history.columns.items()}

    @model_validator(mode="after")
    def _split_fits(self) -> "Data":
        split = self.split
        by_split = split.by == "last" or split.test_fraction is not None or split.test_from is not None
        if not self.test and not by_split:
            raise ValueError("give 'test' files, or split.test_fraction, split.test_from or split.by = 'last'")
        if self.test and (split.test_fraction is not None or split.test_from is not None):
            raise ValueError("there are 'test' files: drop split.test_fraction and split.test_from")
        if split.bounded and (split.valid_from is None) != bool(self.valid):
            raise ValueError("split.valid_from goes with split.test_from and without 'valid' files")
        if self.columns and self.format not in TEXT_TABLES:
            raise ValueError(f"'columns' belongs to csv and tsv, not to {self.format}")
        if self.quote is not None and self.format not in TEXT_TABLES:
            raise ValueError(f"'quote' belongs to csv and tsv, not to {self.format}")
        delimiter = "\t" if self.format == "tsv" else ","
        if self.quote and (not self.quote.isascii() or not self.quote.isprintable() or self.quote == delimiter):
            raise ValueError("'quote' is a printable ASCII letter other than the delimiter, or ''")
        if len(set(self.columns)) < len(self.columns):
            raise ValueError("'columns' names a column twice")
        return self

    def check(self, raw: Mapping[str, str], *, tasks: list[str]) -> None:
        """Raises ValueError where histories and negatives do not fit the columns that features read."""
        sources, negatives = self.history_sources, self.negatives
        if own := [name for name in (*raw, *sources.values()) if name.startswith(OWN_COLUMNS)]:
            raise ValueError(f"no column '{own[0]}', the name of one that the ETL makes: rename it")
        if len(sources) < sum(len(history.columns) for history in self.histories):
            raise ValueError("two histories make a list column of one name")
        for name, source in sources.items():
            if not raw.get(name, "").startswith("list<"):
                raise ValueError(f"no sequence or bag reads the history column '{name}'")
            if source in sources:
                raise ValueError(f"history column '{name}' collects '{source}', which is a history itself")
        if negatives is None:
            return
        if negatives.positive is not None and negatives.positive not in tasks:
            raise ValueError(f"data.negatives.positive = '{negatives.positive}' is no task")
        drawn = (negatives.item, *negatives.attributes)
        if unread := [name for name in drawn if name in sources or name not in raw]:
            raise ValueError(f"data.negatives: no feature reads '{unread[0]}' from the files")
        if raw.get(negatives.item, "").startswith(("list<", "float")):
            raise ValueError(f"data.negatives: the item column '{negatives.item}' is read as {raw[negatives.item]}")
