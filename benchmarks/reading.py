"""What reading costs a rank: CPU time of one batch of 4,096 rows, on one rank and where several share the files.

Each rank decodes its share of the row groups, so that the time should hardly grow with the ranks; it would grow in
proportion if every rank decoded all rows. The sides take turns. The last line is a JSON object: `over_one_rank`, the
time of a rank of so many over that of one alone.
"""

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

sys.path.insert(0, str(Path(__file__).parents[1]))

from etl.schema import DenseFeature, IdFeature, Schema, Table, TaskColumn
from recsys.data import Slice, Split

FEATURES, DENSE, ROWS, GROUP, BATCH = 26, 13, 100_000, 65_536, 4096
IDS, NUMBERS = [f"C{at + 1}" for at in range(FEATURES)], [f"x{at + 1}" for at in range(DENSE)]
SCHEMA = Schema(
    features=tuple(IdFeature(name=name, type="categorical", table=name, linear_only=False) for name in IDS),
    dense=tuple(DenseFeature(name=name) for name in NUMBERS),
    tables=tuple(Table(name=name, rows=ROWS) for name in IDS),
    tasks=(TaskColumn(name="click", positive_rate=0.5),),
)
RANKS = (1, 2, 4, 8)


def write_split(folder: Path, *, groups: int) -> Split:
    """Random rows, compressed as the ETL does it."""
    rng, rows = np.random.default_rng(0), groups * GROUP
    columns = {name: rng.integers(0, ROWS, rows) for name in IDS}
    floats = {name: rng.normal(size=rows).astype(np.float32) for name in NUMBERS}
    labels = {"click": rng.integers(0, 2, rows).astype(np.float32)}
    pq.write_table(pa.table(columns | floats | labels), folder / "part-0.parquet", row_group_size=GROUP)
    return Split(folder, SCHEMA)


def seconds_a_batch(split: Split, *, ranks: int) -> float:
    """CPU time of the process, which does nothing else: of the last rank, over an epoch."""
    begin = time.process_time()
    count = sum(1 for _ in split.shuffled(Slice(ranks - 1, ranks, BATCH), seed=1, epoch=0, start=0))
    return (time.process_time() - begin) / count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer rows and turns")
    quick = parser.parse_args().quick
    with tempfile.TemporaryDirectory() as folder:
        split = write_split(Path(folder), groups=16 if quick else 48)
        turns = [{ranks: seconds_a_batch(split, ranks=ranks) for ranks in RANKS} for _ in range(1 if quick else 3)]
    for turn in turns:
        print(", ".join(f"{ranks} ranks {seconds * 1e3:.1f} ms" for ranks, seconds in turn.items()))
    print(json.dumps({"over_one_rank": {ranks: median(turn[ranks] / turn[1] for turn in turns) for ranks in RANKS}}))


if __name__ == "__main__":
    main()
