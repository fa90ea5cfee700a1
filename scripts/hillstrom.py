"""Hillstrom e-mail campaign -> raw rows for experiments/hillstrom: who visits the shop, and who buys?

Reads `hillstrom.csv` of the MineThatData challenge (Hillstrom 2008), 64,000 customers, which has no split of its own.
60 % of the rows become train.csv, 20 % valid.csv and 20 % test.csv, drawn by seed within each of the three outcomes
(no visit, visit, conversion), so that the 578 conversions are spread alike. Lines stay as they are, in their order.
"""

import argparse
import csv
from pathlib import Path

import numpy as np

SHARES = {"train": 0.6, "valid": 0.2, "test": 0.2}


def main() -> None:
    """Writes train, valid and test.csv."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="hillstrom.csv")
    parser.add_argument("out", type=Path, help="folder for the csv files")
    parser.add_argument("--seed", type=int, default=0, help="of the split")
    options = parser.parse_args()
    header, *lines = options.source.read_text(encoding="utf-8").splitlines()
    outcomes = [(row["visit"], row["conversion"]) for row in csv.DictReader([header, *lines])]
    options.out.mkdir(parents=True, exist_ok=True)
    for split, rows in split_rows(outcomes, seed=options.seed).items():
        text = "".join(f"{line}\n" for line in [header, *(lines[row] for row in rows)])
        (options.out / f"{split}.csv").write_text(text, encoding="utf-8")
        print(f"{options.out / split}.csv: {len(rows):,} rows")


def split_rows(outcomes: list[tuple[str, str]], *, seed: int) -> dict[str, list[int]]:
    """Row numbers of each split, ascending; every outcome is divided by the shares."""
    rng = np.random.default_rng(seed)
    ends = np.cumsum(list(SHARES.values()))[:-1]
    found: dict[str, list[int]] = {split: [] for split in SHARES}
    for outcome in sorted(set(outcomes)):
        rows = rng.permutation([row for row, own in enumerate(outcomes) if own == outcome])
        for split, part in zip(SHARES, np.split(rows, np.rint(ends * len(rows)).astype(int)), strict=True):
            found[split] += part.tolist()
    return {split: sorted(rows) for split, rows in found.items()}


if __name__ == "__main__":
    main()
