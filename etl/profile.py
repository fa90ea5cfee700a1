"""Distributions of a dataset's columns by split, in memory that depends on distinct values, not on rows."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl
import pyarrow.parquet as pq

from etl.artifact import Json
from etl.transform import Float32s, Float64s, Int64s

SPLITS = ("train", "valid", "test")
TOP = 10
SLICES = 24
BINS = 30
_SAMPLED, _LEAST = 20_000_000, 10_000  # numbers kept to find quantiles, over all columns; rows kept of each at least


def psi(expected: npt.ArrayLike, actual: npt.ArrayLike) -> float | None:
    """Population stability index sum((p - q) ln(p / q)) of two sets of counts in the same bins.

    Half a count is added to each bin, so that an empty one costs much but not everything. None where one set is empty.
    """
    counts = np.asarray(expected, np.float64), np.asarray(actual, np.float64)
    if not all(part.sum() for part in counts):
        return None
    p, q = ((part + 0.5) / (part + 0.5).sum() for part in counts)
    return float(((p - q) * np.log(p / q)).sum())


def batches(
    folder: Path, split: str, *, columns: Sequence[str]
) -> Iterator[tuple[int, Mapping[str, npt.NDArray[Any]]]]:
    """Columns of a split in row order, a row group at a time, each with the number of its first row."""
    first = 0
    for path in sorted((folder / split).glob("*.parquet")):
        for batch in pq.ParquetFile(path).iter_batches(columns=list(columns)):
            yield first, {name: batch[name].to_numpy(zero_copy_only=False) for name in columns}
            first += batch.num_rows


def label_slices(folder: Path, split: str, *, tasks: Sequence[str], rows: int) -> list[Json]:
    """Rows and label rates of 24 equal parts of a split, in row order."""
    count = min(SLICES, rows)
    sizes, ones = np.zeros(count, np.int64), {task: np.zeros(count) for task in tasks}
    for first, columns in batches(folder, split, columns=tasks):
        at = np.arange(first, first + len(columns[tasks[0]])) * count // rows
        sizes += np.bincount(at, minlength=count)
        for task in tasks:
            ones[task] += np.bincount(at, columns[task], minlength=count)
    rates = {task: (ones[task] / sizes).tolist() for task in tasks}
    return [{"rows": int(n), "label_rate": {task: rates[task][at] for task in tasks}} for at, n in enumerate(sizes)]


def row_counts(folder: Path, split: str, *, name: str, listed: bool) -> pl.DataFrame:
    """How often each table row occurs in a split: columns row and n, the most frequent first, ties by row."""
    values = pl.scan_parquet(folder / split).select(row=pl.col(name))
    if listed:
        values = values.explode("row", empty_as_null=True).drop_nulls()
    counts = values.group_by("row").agg(n=pl.len().cast(pl.Int64)).collect(engine="streaming")
    return counts.sort("n", "row", descending=[True, False])


def id_figures(counts: Mapping[str, pl.DataFrame]) -> Json:
    """Of an id feature's `row_counts` by split: distinct rows seen, coverage, drift, and the ten most frequent rows.

    `distinct` leaves row 0 out. `coverage` is the share of the training values that the k most frequent rows hold, by
    k; row 0 covers nothing. Drift compares row 0, each of the ten rows that are the most frequent in training, and the
    rest.
    """
    known = {split: part.filter(pl.col("row") > 0) for split, part in counts.items()}
    totals = {split: int(part["n"].sum()) for split, part in counts.items()}
    top = known["train"].head(TOP)
    found = {split: _at(part, [0, *top["row"].to_list()]) for split, part in counts.items()}
    bins = {split: [*part, totals[split] - sum(part)] for split, part in found.items()}
    rows = [
        {"row": row, "count": n, "share": {split: _share(found[split][at], totals[split]) for split in counts}}
        for at, (row, n) in enumerate(top.iter_rows(), start=1)
    ]
    return {
        "values": totals,
        "distinct": {split: part.height for split, part in known.items()},
        "coverage": _coverage(known["train"]["n"], total=totals["train"]),
        "psi": {split: psi(bins["train"], part) for split, part in bins.items() if split != "train"},
        "top": rows,
    }


def _at(counts: pl.DataFrame, rows: Sequence[int]) -> list[int]:
    """How often these rows occur, in their order."""
    found = dict(counts.filter(pl.col("row").is_in(rows)).iter_rows())
    return [found.get(row, 0) for row in rows]


def _share(part: int, total: int) -> float:
    return part / total if total else 0.0


def _coverage(sorted_counts: pl.Series, *, total: int) -> dict[str, float]:
    """By powers of ten, and by all rows."""
    sizes = [10**power for power in range(1, 9) if 10**power < len(sorted_counts)] + [len(sorted_counts)]
    covered = sorted_counts.cum_sum()
    return {str(k): _share(int(covered[k - 1]), total) for k in sizes if k}


@dataclass
class _Moments:
    """Of columns [N], summed up around a center near their means, which keeps the digits."""

    center: Float64s
    rows: int = 0
    sums: Float64s = field(init=False)
    squares: Float64s = field(init=False)
    low: Float64s = field(init=False)
    high: Float64s = field(init=False)

    def __post_init__(self) -> None:
        size = len(self.center)
        self.sums, self.squares = np.zeros(size), np.zeros(size)
        self.low, self.high = np.full(size, np.inf), np.full(size, -np.inf)

    def add(self, x: Float64s) -> None:
        """Rows [B, N]."""
        self.rows += len(x)
        self.sums += (x - self.center).sum(axis=0)
        self.squares += ((x - self.center) ** 2).sum(axis=0)
        self.low, self.high = np.minimum(self.low, x.min(axis=0)), np.maximum(self.high, x.max(axis=0))

    def of(self, column: int) -> Json:
        """Mean, standard deviation, lowest and highest value."""
        shift = self.sums[column] / self.rows
        variance = max(self.squares[column] / self.rows - shift**2, 0.0)
        mean, low, high = self.center[column] + shift, self.low[column], self.high[column]
        return {"mean": float(mean), "std": float(variance**0.5), "min": float(low), "max": float(high)}


@dataclass(frozen=True)
class _Edges:
    """Of one column: distinct inner deciles, and the range in which the histogram's bins lie."""

    deciles: Float64s
    low: float
    high: float

    def histogram(self, x: Float64s) -> Int64s:
        """Counts [30]; what lies outside the range counts in the outer bins."""
        at = (x - self.low) * (BINS / (self.high - self.low))
        return np.bincount(at.clip(0, BINS - 1).astype(np.int64), minlength=BINS)

    def tenths(self, x: Float64s) -> Int64s:
        """Counts between the deciles; a decile opens the bin at its right."""
        bins = np.searchsorted(self.deciles, x, side="right")
        return np.bincount(bins, minlength=len(self.deciles) + 1)


def number_figures(folder: Path, names: Sequence[str], *, rows: Mapping[str, int]) -> list[Json]:
    """Of dense columns: moments and a histogram by split, and the drift from training over training deciles.

    Deciles and the histogram's range (from the half to the last half percent) are those of an even sample of the
    training rows: of all rows where they are few.
    """
    if not names:
        return []
    sample = _sample(folder, names, rows=rows["train"])
    edges = [_edges(column) for column in sample.T]
    center = sample.mean(axis=0, dtype=np.float64)
    moments, tenths, histograms = {}, {}, {}
    for split in rows:
        moments[split] = _Moments(center)
        tenths[split] = [np.zeros(len(edge.deciles) + 1, np.int64) for edge in edges]
        histograms[split] = [np.zeros(BINS, np.int64) for _ in edges]
        for _, columns in batches(folder, split, columns=names):
            x = np.stack([columns[name] for name in names], axis=1).astype(np.float64)
            moments[split].add(x)
            for at, edge in enumerate(edges):
                tenths[split][at] += edge.tenths(x[:, at])
                histograms[split][at] += edge.histogram(x[:, at])
    return [
        {"name": name}
        | moments["train"].of(at)
        | {
            "by_split": {split: moments[split].of(at) for split in rows},
            "psi": {split: psi(tenths["train"][at], tenths[split][at]) for split in rows if split != "train"},
            "histogram": {
                "edges": np.linspace(edges[at].low, edges[at].high, BINS + 1).tolist(),
                "share": {split: (histograms[split][at] / rows[split]).tolist() for split in rows},
            },
        }
        for at, name in enumerate(names)
    ]


def _sample(folder: Path, names: Sequence[str], *, rows: int) -> Float32s:
    """Every k-th training row, [S, N]."""
    step = -(-rows // max(_LEAST, _SAMPLED // len(names)))
    kept = [
        np.stack([columns[name][-first % step :: step] for name in names], axis=1)
        for first, columns in batches(folder, "train", columns=names)
    ]
    return np.concatenate(kept)


def _edges(column: Float32s) -> _Edges:
    quantiles = np.quantile(column.astype(np.float64), [0.005, 0.995, *np.arange(1, 10) / 10])
    low, high = quantiles[:2]
    if low == high:  # one value, or nearly so
        low, high = low - 0.5, high + 0.5
    return _Edges(np.unique(quantiles[2:]), float(low), float(high))
