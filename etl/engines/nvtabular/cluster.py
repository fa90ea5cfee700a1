"""Where the Workflow runs: in this process, on the GPUs of this machine, or on the workers of a Dask scheduler.

The workers of other machines need this package, and the dataset folder's parent under the same path.
"""

import contextlib
import importlib
import importlib.util
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from etl.engines.nvtabular.library import HAS_GPU, Client, WorkerPlugin, dask, quiet, set_dask_client
from etl.faults import Fault
from etl.spec import Etl

_CONNECT_S = 10


class _Fence(WorkerPlugin):
    """Makes a worker load `library`, with its settings, before any task of NVTabular; also one that joins later."""

    name = "rankforge"

    def setup(self, worker: object) -> None:
        """Loading this class has done it."""


@dataclass(frozen=True)
class Workers:
    """What computes. Without a client everything runs in this process, one task after another."""

    cuda: bool
    client: Any = None

    def compute(self, tasks: Sequence[Any]) -> list[Any]:
        """The results of the tasks, in their order."""
        with quiet():
            if self.client is None:
                return list(dask.compute(*tasks, scheduler="synchronous"))
            return list(self.client.gather(self.client.compute(list(tasks))))


@contextlib.contextmanager
def open_workers(etl: Etl) -> Iterator[Workers]:
    """The workers that the experiment names; NVTabular's own calls use them as well until the block ends.

    Raises:
        Fault: there is no CUDA device, or no scheduler answers.
    """
    cuda = etl.device == "cuda"
    with contextlib.ExitStack() as stack:
        client = stack.enter_context(_client(etl)) if etl.scheduler or cuda else None
        with quiet():
            set_dask_client(client)
        stack.callback(set_dask_client, None)
        if client is not None:
            client.register_plugin(_Fence())
        yield Workers(cuda=cuda, client=client)


@contextlib.contextmanager
def _client(etl: Etl) -> Iterator[Any]:
    """A client of the scheduler; else of one worker a GPU; None for a GPU without dask-cuda."""
    if etl.scheduler is not None:
        with _connected(etl.scheduler) as client:
            yield client
    elif not HAS_GPU:
        got, remedy = "no CUDA device", 'set device = "cpu"'
        raise Fault("etl.device", got=got, wanted='one for device = "cuda"', remedy=remedy)
    elif importlib.util.find_spec("dask_cuda") is None:
        yield None
    else:
        with importlib.import_module("dask_cuda").LocalCUDACluster() as cluster, Client(cluster) as client:
            yield client


def _connected(scheduler: str) -> Any:
    try:
        return Client(scheduler, timeout=_CONNECT_S)
    except OSError as error:
        wanted, remedy = "a Dask scheduler that answers", "start `dask scheduler`, or leave etl.scheduler out"
        raise Fault("etl.scheduler", got=f"{scheduler}: {error}", wanted=wanted, remedy=remedy) from None
