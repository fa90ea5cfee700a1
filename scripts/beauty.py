"""Amazon Beauty sequences -> raw rows for experiments/beauty: which item does a user take next?

Reads `Beauty.txt` (a line a user: user, then items in the order of time) and `Beauty_item2attributes.json` of the
S3-Rec preprocessing of the Amazon reviews (McAuley et al. 2015). From a user's third item on each event is a positive
row with the items before as its history, and beside it stands one row with an item that the user never took (Zhou et
al. 2018, section 6.1). A user's last event is the test, the one before the validation.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

HISTORY = 50


def main() -> None:
    """Writes train, valid and test.parquet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="folder with Beauty.txt and Beauty_item2attributes.json")
    parser.add_argument("out", type=Path, help="folder for the parquet files")
    parser.add_argument("--seed", type=int, default=0, help="of the negative items")
    options = parser.parse_args()
    users = [[int(part) for part in line.split()[1:]] for line in (options.source / "Beauty.txt").open()]
    attributes = json.loads((options.source / "Beauty_item2attributes.json").read_text())
    category = {int(item): found[-1] for item, found in attributes.items() if found}
    options.out.mkdir(parents=True, exist_ok=True)
    for split, rows in split_rows(users, items=max(map(max, users)), seed=options.seed).items():
        item, history, label = (list(part) for part in zip(*rows, strict=True))
        table = pa.table(
            {
                "item": item,
                "category": [category.get(each) for each in item],
                "history": history,
                "history_category": [[category.get(each) for each in past] for past in history],
                "click": label,
            }
        )
        pq.write_table(table, options.out / f"{split}.parquet")
        print(f"{options.out / split}.parquet: {table.num_rows:,} rows")


def split_rows(users: list[list[int]], *, items: int, seed: int) -> dict[str, list[tuple[int, list[int], int]]]:
    """(item, history, label) of each split, a positive row and its negative one after the other."""
    rng = np.random.default_rng(seed)
    rows: dict[str, list[tuple[int, list[int], int]]] = {"train": [], "valid": [], "test": []}
    for taken in users:
        own = set(taken)
        for at in range(2, len(taken)):
            split = "test" if at == len(taken) - 1 else "valid" if at == len(taken) - 2 else "train"
            other = int(rng.integers(1, items + 1))
            while other in own:
                other = int(rng.integers(1, items + 1))
            history = taken[max(0, at - HISTORY) : at]
            rows[split] += [(taken[at], history, 1), (other, history, 0)]
    return rows


if __name__ == "__main__":
    main()
