"""Raw rows to probabilities, offline, in one process."""

from pathlib import Path

import pyarrow as pa
import torch

from etl.artifact import write_parquet
from etl.faults import Fault
from etl.schema import Schema, read_schema
from etl.sources import read_rows
from etl.transform import Transform
from recsys.checkpoint import best
from recsys.experiment import Experiment, read_experiment
from recsys.network import Network, build_network
from recsys.parallel.state import restore_unsharded

_ROWS = 4096


def load_network(run: Path) -> tuple[Experiment, Schema, Network]:
    """The best network of a run, unsharded, on the CPU, in evaluation mode.

    Raises:
        Fault: the folder is no run, or it has no complete checkpoint.
    """
    experiment, schema = read_experiment(run), read_schema(run)
    network = build_network(experiment, schema, table_device="cpu")
    restore_unsharded(best(run), network)
    return experiment, schema, network.eval()


def predict(run: Path, *, rows: Path, output: Path) -> int:
    """Writes one float32 column a task, rows in the order of the input; returns their number.

    Raises:
        Fault: the rows cannot be read, or a column is unknown, absent, of the wrong type, NaN or infinite.
    """
    _, schema, network = load_network(run)
    transform = Transform.load(run / "transform")
    try:
        encoded = transform.apply(transform.pack(read_rows(rows, transform.columns)))
    except ValueError as error:
        wanted = f"the columns {', '.join(f'{name} ({dtype})' for name, dtype in transform.columns.items())}"
        raise Fault(str(rows), got=str(error), wanted=wanted, remedy="mend the file") from None
    with torch.inference_mode():
        ids, dense = torch.from_numpy(encoded.ids), torch.from_numpy(encoded.dense)
        parts = [network(ids[at : at + _ROWS], dense[at : at + _ROWS]) for at in range(0, len(ids), _ROWS)]
    probability_RT = torch.cat(parts).sigmoid().numpy() if parts else ids.new_empty((0, len(schema.tasks))).numpy()
    columns = {task: pa.array(probability_RT[:, at], pa.float32()) for at, task in enumerate(schema.task_names)}
    write_parquet(output, pa.table(columns))
    return len(ids)
