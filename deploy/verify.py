"""Served scores against offline ones, row by row."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from deploy.bundle import Bundle, read_bundle
from deploy.client import Client, Rows
from deploy.offline import Scores, offline_run, offline_scores
from etl.artifact import read_json
from etl.faults import Fault
from etl.sources import read_raw_split, read_rows
from recsys.experiment import read_experiment


@dataclass(frozen=True)
class Comparison:
    """How many of some rows came back as offline, and the largest difference of a probability."""

    what: str
    rows: int
    equal: int
    difference: float
    tolerance: float

    def __str__(self) -> str:
        tail = f"equal within {self.tolerance:g} (largest difference {self.difference:.1e})"
        return f"{self.what}: {self.equal:,} of {self.rows:,} rows {tail}"


def verify(bundle_dir: Path, *, url: str, rows: Path | None, tls: Path | None = None) -> Iterator[Comparison]:
    """Replays the golden requests with the scores kept in the bundle, as rows and, where the model ranks, as rankings;
    then the raw test split, or `rows` instead of it, scored offline by the trained network. A row is equal where all
    its ids are, and its scores within the tolerance.

    Raises:
        Fault: the bundle was changed, the server can't be reached, raw files are gone, or the run was trained anew.
    """
    bundle = read_bundle(bundle_dir)
    with Client(url, tls=tls) as client:
        yield from golden_comparisons(bundle_dir, bundle, client=client)
        network, transform = offline_run(_same_run(bundle))
        what = str(rows) if rows else "test split"
        raw = read_rows(rows, client.columns) if rows else read_raw_split(read_experiment(bundle_dir), "test")
        served = client.score(raw, ids=True)  # first: it reports rows that can't be packed
        offline = offline_scores(network, transform, table=raw)
        yield _compare(what, served, offline=offline, tolerance=bundle.tolerance)


def golden_comparisons(bundle_dir: Path, bundle: Bundle, *, client: Client) -> Iterator[Comparison]:
    """Replays the golden requests as rows and, by the program that rankings have, each as a user with one candidate.

    Raises Fault where the server does not take or answer them.
    """
    golden = read_rows(bundle_dir / "golden" / "requests.jsonl", client.columns)
    kept = pq.read_table(bundle_dir / "golden" / "scores.parquet")
    score_BT = np.stack([kept[task].to_numpy() for task in bundle.tasks], axis=1)
    ids_BS = np.array(kept["ids"].to_pylist(), np.int64)
    offline = Scores(ids_BS, score_BT)
    yield _compare("golden requests", client.score(golden, ids=True), offline=offline, tolerance=bundle.tolerance)
    if user := bundle.serve.user:
        served = _ranked(golden, client=client, user=user)
        yield _compare("golden rankings", served, offline=offline, tolerance=bundle.tolerance)


def _ranked(rows: pa.Table, *, client: Client, user: Sequence[str]) -> Rows:
    """Each row as a ranking request."""
    users = rows.select(user).to_pylist()
    items = rows.drop_columns(list(user))
    found = [client.rank(one, items.slice(at, 1), ids=True) for at, one in enumerate(users)]
    ids = [each.ids for each in found if each.ids is not None]
    return Rows(client.tasks, np.concatenate([each.score for each in found]), np.concatenate(ids))


def _compare(what: str, served: Rows, *, offline: Scores, tolerance: float) -> Comparison:
    if served.ids is None or served.score.shape != offline.score.shape or served.ids.shape != offline.ids.shape:
        got = f"scores of {list(served.score.shape)}, offline ones of {list(offline.score.shape)}"
        remedy = "serve the bundle that is verified"
        raise Fault(what, got=got, wanted="rows, and as many scores and ids of each as offline", remedy=remedy)
    difference_B = np.abs(served.score - offline.score).max(axis=1)
    equal_B = (difference_B <= tolerance) & np.all(served.ids == offline.ids, axis=1)
    return Comparison(what, len(equal_B), int(equal_B.sum()), float(difference_B.max()), tolerance)


def _same_run(bundle: Bundle) -> Path:
    """The run that was exported, as long as it is still the one."""
    run, remedy = Path(bundle.run), "export the run again"
    step = read_json(run / "result.json", remedy=remedy)["best_step"]
    if step != bundle.step:
        raise Fault(str(run), got=f"best step {step}", wanted=f"step {bundle.step} as exported", remedy=remedy)
    return run
