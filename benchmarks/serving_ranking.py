"""Ranking requests in process, on one thread: a user's columns looked up once, or written out with each candidate.

DIN: 16 ids and a history of the user (at most 50 items, 30 on average), 10 ids of the candidate. DeepFM: the same with
two bags (at most 50 tags, 10 on average) for the history. 13 numbers, 5 of them the user's; 20,000 rows x 16 a table,
three layers of 400; random weights, uniform ids.

- rows: every candidate as a row of its own, as a request of rows has it
- ranked: ids of users, ids of candidates, and each candidate's user

Both are the exported program, native code where this machine can make it, and take turns, round after round; figures
are medians over the rounds, of CPU time a candidate. The last line is a JSON object: `<model>_ranked_over_rows_<users>`
are ratios (below 1: faster) for so many requests of 100 candidates in one forward.
"""

import argparse
import json
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
from torch import Tensor

warnings.simplefilter("ignore")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.serving_program import network_of  # noqa: E402
from deploy.lookup import Columns, Split  # noqa: E402
from deploy.native import level_of  # noqa: E402
from deploy.program import Shape, save_program, served_network  # noqa: E402
from deploy.served_program import load_program  # noqa: E402
from etl.schema import DenseFeature, IdFeature, Schema, Table, TaskColumn  # noqa: E402
from recsys.models.deepfm import DeepFMConfig  # noqa: E402
from recsys.models.din import DINConfig  # noqa: E402
from recsys.models.head import ModelConfig  # noqa: E402
from recsys.models.histories import AttentionPair  # noqa: E402

USER_IDS, ITEM_IDS, NUMBERS, USER_NUMBERS, CANDIDATES, MAX_ROWS = 16, 10, 13, 5, 100, 1024
LONGEST, MEAN = 50, {"history": 30, "tags": 10, "topics": 10}
HIDDEN = [400, 400, 400]
MODELS: dict[str, tuple[ModelConfig, list[str]]] = {
    "din": (DINConfig(hidden=HIDDEN, attention=[AttentionPair(query=["i0"], keys=["history"])]), ["history"]),
    "deepfm": (DeepFMConfig(hidden=HIDDEN), ["tags", "topics"]),
}
Batch = dict[str, tuple[Tensor, ...]]


def main() -> None:
    """Makes each network, saves its programs, times the sides in turns."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=20_000, help="of a table")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--quick", action="store_true", help="500 rows, one round: shows that it works, no figures")
    options = parser.parse_args()
    rows, rounds = (500, 1) if options.quick else (options.rows, options.rounds)
    torch.set_num_threads(1)
    figures: dict[str, object] = {"level": level_of("auto")}
    print(f"{'':8}{'requests':>9}{'rows, us':>12}{'ranked, us':>12}")
    for name, (config, lists) in MODELS.items():
        schema = schema_of(lists, rows=rows)
        split = split_of(schema, lists)
        with tempfile.TemporaryDirectory(prefix="ranking-benchmark-") as folder:
            shape = Shape(MAX_ROWS, slots=len(schema.slot_names), floats=len(schema.float_names))
            served = served_network(network_of(config, schema), split=split)
            save_program(served, Path(folder), shape=shape, level=level_of("auto"))
            program = load_program(Path(folder))
            assert program.ranked is not None
            sides = {"rows": program.rows, "ranked": program.ranked}
            for users in (1, 8):
                batches = [batch_of(schema, split, users=users, seed=seed) for seed in range(max(2, 24 // users))]
                micros = timed(sides, batches, rounds=rounds)
                print(f"{name:8}{users:9}{micros['rows']:12.2f}{micros['ranked']:12.2f}", flush=True)
                figures[f"{name}_ranked_over_rows_{users}"] = round(micros["ranked"] / micros["rows"], 3)
    print(json.dumps(figures))


def schema_of(lists: list[str], *, rows: int) -> Schema:
    """The user's ids and lists come first; a history reads the table of the first candidate id."""
    names = [*(f"u{at}" for at in range(USER_IDS)), *(f"i{at}" for at in range(ITEM_IDS))]
    features = [IdFeature(name=name, type="categorical", table=name, linear_only=False) for name in names]
    for name in lists:
        kind, table = ("sequence", "i0") if name == "history" else ("bag", name)
        listed = {"slots": LONGEST, "dtype": "list<int64>", "combiner": "mean"}
        features.append(
            IdFeature.model_validate({"name": name, "type": kind, "table": table, "linear_only": False} | listed)
        )
    return Schema(
        features=tuple(features),
        dense=tuple(DenseFeature(name=f"x{at}") for at in range(NUMBERS)),
        tables=tuple(Table(name=name, rows=rows) for name in dict.fromkeys(feature.table for feature in features)),
        tasks=(TaskColumn(name="click", positive_rate=0.25),),
    )


def split_of(schema: Schema, lists: list[str]) -> Split:
    """The user's columns, and those of the candidates."""
    of_user = [name in lists or name.startswith("u") for name in schema.slot_names]
    ids = [[at for at, side in enumerate(of_user) if side == wanted] for wanted in (True, False)]
    floats = (list(range(USER_NUMBERS)), list(range(USER_NUMBERS, NUMBERS)))
    return Split(Columns(ids[0], floats[0]), Columns(ids[1], floats[1]))


def batch_of(schema: Schema, split: Split, *, users: int, seed: int) -> Batch:
    """The same requests as either side takes them."""
    generator = torch.Generator().manual_seed(seed)
    user_B = torch.arange(users).repeat_interleave(CANDIDATES)
    columns = []
    for feature in schema.features:
        ids_BL = torch.randint(0, schema.rows(feature.table), (len(user_B), feature.slots), generator=generator)
        if feature.slots > 1:
            most = 2 * MEAN[feature.name]
            lengths_B1 = torch.randint(0, most + 1, (len(user_B), 1), generator=generator).clamp(max=LONGEST)
            ids_BL = torch.where(torch.arange(feature.slots) < lengths_B1, ids_BL, -1)
        columns.append(ids_BL)
    ids_BS, floats_BN = torch.cat(columns, dim=1), torch.rand(len(user_B), NUMBERS, generator=generator)
    ids_US, floats_UN = ids_BS[::CANDIDATES, split.user.ids], floats_BN[::CANDIDATES, split.user.floats]
    ids_BS[:, split.user.ids], floats_BN[:, split.user.floats] = ids_US[user_B], floats_UN[user_B]
    own = (ids_BS[:, split.candidates.ids], floats_BN[:, split.candidates.floats])
    return {"rows": (ids_BS, floats_BN), "ranked": (*own, ids_US, floats_UN, user_B)}


def timed(sides: dict[str, Callable[..., Tensor]], batches: list[Batch], *, rounds: int) -> dict[str, float]:
    """Median CPU microseconds a candidate, by side."""
    found: dict[str, list[float]] = {name: [] for name in sides}
    with torch.inference_mode():
        for at in range(rounds + 1):  # the first one warms up
            for name, side in sides.items():
                start = time.process_time()
                for batch in batches:
                    side(*batch[name])
                candidates = sum(len(batch["rows"][0]) for batch in batches)
                found[name] += [1e6 * (time.process_time() - start) / candidates] if at else []
    return {name: median(values) for name, values in found.items()}


if __name__ == "__main__":
    main()
