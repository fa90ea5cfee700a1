"""Starts the tables of a model from those of another trained run."""

from pathlib import Path

from etl.faults import Fault
from etl.schema import Schema, read_schema
from recsys.network import Network
from recsys.parallel.shard import Sharded
from recsys.predict import load_network


def start_from_fm(sharded: Sharded, network: Network, *, schema: Schema, run: Path) -> None:
    """Copies the rows of a trained FM, vectors and (where the model has them) first-order weights, into the tables.

    Raises:
        Fault: the run is no finished one, learnt from other data, has no such vectors, or has another embedding size.
    """
    place, remedy = "model.init_from_fm", "name the run of an FM on the same dataset folder and embedding.dim"
    if read_schema(run) != schema:
        raise Fault(place, got=f"{run}: a run on another schema", wanted="this dataset's schema", remedy=remedy)
    experiment, _, trained = load_network(run)
    there, here = trained.layout, network.layout
    if not (there.sizes.dim == here.sizes.dim and there.linear and there.vectors):
        got = f"{run}: model '{experiment.model.kind}' with embedding.dim {there.sizes.dim}"
        wanted = f"vectors of {here.sizes.dim} and first-order weights"
        raise Fault(place, got=got, wanted=wanted, remedy=remedy)
    bags = trained.tables.embedding_bags
    sharded.set_rows({name: bags[name].weight.detach()[:, :width] for name, width in here.widths().items()})
