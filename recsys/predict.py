"""Raw rows to probabilities, offline, in one process."""

from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch

from etl.artifact import write_parquet
from etl.pack import encode
from etl.schema import Schema, read_schema
from etl.sources import read_rows
from etl.transform import Encoded, Transform
from recsys.checkpoint import best, refuse_damaged
from recsys.experiment import Experiment, read_experiment
from recsys.network import Network, build_network
from recsys.parallel.state import restore_unsharded
from recsys.parallel.world import World

_ROWS = 4096


def load_network(run: Path) -> tuple[Experiment, Schema, Network]:
    """The best network of a run, unsharded, on the CPU, in evaluation mode.

    Raises:
        Fault: the folder is no run, it has no complete checkpoint, or that one's files are not as they were written.
    """
    experiment, schema = read_experiment(run), read_schema(run)
    network = build_network(experiment, schema, table_device="cpu")
    refuse_damaged(found := best(run), world=World(0, 1, torch.device("cpu")))
    restore_unsharded(found, network)
    return experiment, schema, network.eval()


def predict(run: Path, *, rows: Path, output: Path) -> int:
    """Writes one float32 column a task, rows in the order of the input; returns their number.

    Raises:
        Fault: the rows cannot be read, or a column is unknown, absent, of the wrong type, NaN or infinite.
    """
    _, schema, network = load_network(run)
    transform = Transform.load(run / "transform")
    encoded = encode(read_rows(rows, transform.signature.columns), transform, place=str(rows))
    probability_RT = probabilities(network, encoded)
    columns = {task: pa.array(probability_RT[:, at], pa.float32()) for at, task in enumerate(schema.task_names)}
    write_parquet(output, pa.table(columns))
    return len(probability_RT)


def probabilities(network: Network, encoded: Encoded) -> npt.NDArray[np.float32]:
    """Float32 [R, T] of encoded rows, some thousands at a time."""
    ids_RS, floats_RN = torch.from_numpy(encoded.ids), torch.from_numpy(encoded.floats)
    with torch.inference_mode():
        chunks = zip(torch.split(ids_RS, _ROWS), torch.split(floats_RN, _ROWS), strict=True)
        parts = [network(ids_BS, floats_BN).logits_BT for ids_BS, floats_BN in chunks]
        found: npt.NDArray[np.float32] = torch.cat(parts).sigmoid().numpy()
    return found
