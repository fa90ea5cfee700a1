"""What one fit reads and writes."""

from dataclasses import dataclass
from pathlib import Path

import polars as pl

from etl.engines.device import Device
from etl.extend import Parent
from etl.typed import Columns


@dataclass(frozen=True)
class Fitting:
    """The typed training rows of a dataset folder that is being made, and the folder that it extends, if it does."""

    folder: Path
    train: Columns
    parent: Parent | None
    device: Device = "cpu"

    @property
    def is_new(self) -> bool:
        """Whether the training rows count; not where the parent holds the same ones."""
        return self.parent is None or self.parent.new_rows

    @property
    def new(self) -> pl.LazyFrame:
        """The training rows that count."""
        return self.train.rows if self.is_new else self.train.rows.head(0)

    def of_parent(self, file: str, otherwise: pl.DataFrame) -> pl.DataFrame:
        """A parquet file of the parent's folder."""
        path = self.parent.folder / file if self.parent else None
        return pl.read_parquet(path) if path and path.is_file() else otherwise

    def write(self, file: str, table: pl.DataFrame) -> None:
        """Writes a parquet file of the folder."""
        path = self.folder / file
        path.parent.mkdir(parents=True, exist_ok=True)
        table.write_parquet(path, compression="lz4", statistics=False)  # keys do not compress
