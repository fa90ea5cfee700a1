"""Writes the raw files by day, the true probabilities and what is known of them."""

import contextlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import BinaryIO, Protocol

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from etl.artifact import Json, new_folder, write_json
from etl.faults import Faults
from etl.synth.criteo import Criteo
from etl.synth.events import Events
from etl.synth.options import Options
from etl.synth.truth import Known, Truth, probability

Write = Callable[[pa.Table], None]
BATCH_ROWS = 32_768


class Layout(Protocol):
    """A kind of rows, made in order from the first on."""

    def batch(self, first: int, count: int) -> tuple[pa.Table, Known]:
        """The rows `first` to `first + count - 1`, and the truth of them."""


def synth(out: Path, options: Options, *, report: Callable[[str, int], None]) -> Json:
    """Writes `day_0...` in the order of time, `truth/day_0.parquet...` beside, `truth.json` last; returns the latter.

    truth/ holds p_click (and p_conversion: of both steps) row by row. truth.json holds the rates and the AUC that the
    true probabilities reach, which no model can beat but by chance: of all rows and by day.

    Raises:
        Fault: something else stands at `out`. Faults: options out of range, all of them.
    """
    if faults := options.faults():
        raise Faults(faults)
    truth, layout = Truth(), _layout(options)
    with new_folder(out, marker="truth.json") as folder:
        (folder / "truth").mkdir()
        for day in range(options.days):
            names = f"day_{day}.{options.chosen_format}", f"truth/day_{day}.parquet"
            with _writer(folder / names[0], header=options.layout != "criteo") as raw, _writer(folder / names[1]) as p:
                truth.add_day(_written(layout, _batches(options, day), raw=raw, probabilities=p, report=report))
        found = truth.as_json() | {"seed": options.seed, "options": asdict(options)}
        write_json(folder / "truth.json", found)
    return found


def _layout(options: Options) -> Layout:
    seed, rows, users, items = options.seed, options.rows, options.users, options.items
    if options.layout == "criteo":
        return Criteo(seed, rows=rows, users=users, items=items)
    return Events(seed, rows=rows, days=options.days, users=users, items=items)


def _batches(options: Options, day: int) -> Iterator[tuple[int, int]]:
    """First row and rows of each batch of a day."""
    end = (day + 1) * options.rows // options.days
    for first in range(day * options.rows // options.days, end, BATCH_ROWS):
        yield first, min(BATCH_ROWS, end - first)


def _written(
    layout: Layout,
    batches: Iterable[tuple[int, int]],
    *,
    raw: Write,
    probabilities: Write,
    report: Callable[[str, int], None],
) -> Iterator[Known]:
    """Makes and writes one batch after another."""
    for first, count in batches:
        table, known = layout.batch(first, count)
        raw(table)
        probabilities(pa.table({f"p_{task}": probability(logits) for task, logits in known.logits.items()}))
        report("write", first + count)
        yield known


@contextlib.contextmanager
def _writer(path: Path, *, header: bool = True) -> Iterator[Write]:
    """A function that appends a table to a new file, in the format that the file's name says."""
    with contextlib.ExitStack() as stack:
        if path.suffix == ".parquet":
            yield _Parquet(path, stack)
        else:
            yield _Text(stack.enter_context(path.open("wb")), gzip=path.suffix == ".gz", header=header)


class _Parquet:
    """Random numbers and hashed ids: a dictionary pays for texts alone."""

    def __init__(self, path: Path, stack: contextlib.ExitStack) -> None:
        self._path, self._stack = path, stack
        self._writer: pq.ParquetWriter | None = None

    def __call__(self, table: pa.Table) -> None:
        if self._writer is None:
            texts = [field.name for field in table.schema if pa.types.is_string(field.type)]
            writer = pq.ParquetWriter(self._path, table.schema, use_dictionary=texts)
            self._writer = self._stack.enter_context(writer)
        self._writer.write_table(table)


class _Text:
    """Tab-separated lines, lists parted by `|`. Each batch is a gzip member of its own, as the format allows."""

    def __init__(self, file: BinaryIO, *, gzip: bool, header: bool) -> None:
        self._file, self._gzip, self._header = file, gzip, header

    def __call__(self, table: pa.Table) -> None:
        frame = pl.DataFrame(table)
        lists = [name for name, dtype in frame.schema.items() if isinstance(dtype, pl.List)]
        frame.with_columns(pl.col(lists).cast(pl.List(pl.String)).list.join("|")).write_csv(
            self._file,
            separator="\t",
            include_header=self._header,
            quote_style="never",
            compression="gzip" if self._gzip else "uncompressed",
            compression_level=1 if self._gzip else None,
        )
        self._header = False
