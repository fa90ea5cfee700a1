"""Where the ranks of one start find each other: a store on the host of rank 0, kept by torchrun or by rank 0 itself."""

import contextlib
import os
from collections.abc import Iterator
from datetime import timedelta

import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore, Store, TCPStore

from etl.faults import Fault
from recsys.parallel.alive import COME_WITHIN_S, Alive

_AGAIN = "the same command goes on from the last checkpoint; torchrun has --max-restarts"


@contextlib.contextmanager
def meeting(rank: int, size: int, *, dead_after_s: float) -> Iterator[Store]:
    """The store. Tells the other ranks of an error in the block; makes of a broken connection the name of who broke it.

    torchrun keeps one store for all its restarts on a host: each restart gets keys of its own, or ranks would connect
    to the addresses of dead ones, and wait.

    Raises:
        Fault: another rank ended or never came; or torchrun could not restart ranks of several hosts.
    """
    of_torchrun = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == str(True)
    restart = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) if of_torchrun else 0
    _check_restarts(of_torchrun)
    keeps = rank == 0 and not of_torchrun
    store = PrefixStore(f"start-{restart}", _connect(rank, within_s=COME_WITHIN_S, keeps=keeps))
    beats = PrefixStore(f"alive-{restart}", _connect(rank, within_s=dead_after_s, keeps=False))
    keeper = f"{_server()}, kept by {'torchrun beside ' if of_torchrun else ''}"
    alive = Alive(beats, rank=rank, size=size, keeper=keeper, dead_after_s=dead_after_s)
    try:
        yield store
    except Exception as error:
        broken = isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error).lower())
        why = (alive.who_ended() or f"a broken connection, though all ranks live: {error}") if broken else str(error)
        alive.say_ended(why if broken else f"{alive.name} ended: {why}")
        if keeps:
            alive.linger()
        if broken:
            raise Fault(alive.name, got=why, wanted="all ranks to the end", remedy=_AGAIN) from error
        raise
    finally:
        alive.stop()


def _check_restarts(of_torchrun: bool) -> None:
    """On several hosts torchrun neither counts restarts alike nor tells a host that came back where its store is."""
    hosts, restarts = (int(os.environ.get(name, "0")) for name in ("GROUP_WORLD_SIZE", "TORCHELASTIC_MAX_RESTARTS"))
    if of_torchrun and hosts > 1 and restarts:
        got = f"one store for all {restarts} restarts of {hosts} hosts"
        remedy = "start torchrun on every host with TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 and --rdzv-backend=c10d"
        raise Fault("torchrun", got=got, wanted="a store for each of them", remedy=remedy)


def _server() -> str:
    return f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"


def _connect(rank: int, *, within_s: float, keeps: bool) -> TCPStore:
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    within = timedelta(seconds=within_s)
    try:
        return TCPStore(host, port, is_master=keeps, timeout=within, wait_for_workers=False)
    except dist.DistError as error:
        got = f"no store at {_server()} within {within_s:g} s: {error}"
        raise Fault(f"rank {rank}", got=got, wanted="that of rank 0 or of its torchrun", remedy=_AGAIN) from error
