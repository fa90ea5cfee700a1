"""What is said of tables that do not fit: which they are, how much room there is, and what would help."""

from collections.abc import Mapping

from etl.faults import Fault
from recsys.experiment import Embedding
from recsys.forecast import GIB
from recsys.optim import state_count
from recsys.parallel.row_rules import needs_own_rows
from recsys.parallel.sharders import HEADROOM, Hardware


def too_large(sizes: Mapping[str, int], embedding: Embedding, *, hardware: Hardware, reserved: int) -> Fault:
    """Of tables, bytes with their states by name, that the planner has no place for beside `reserved` bytes a rank."""
    cuda = hardware.device == "cuda"
    capacity = hardware.hbm_bytes if cuda else hardware.ddr_bytes // hardware.ranks_per_host
    room, total = max(int(capacity * (1 - HEADROOM)) - reserved, 0), sum(sizes.values())
    remedies = [_more_room(sizes, embedding, hardware=hardware, room=room)]
    if cuda and total < hardware.ranks * hardware.ddr_bytes // hardware.ranks_per_host * (1 - HEADROOM):
        remedies.append(f"let tables spill into host memory (placement '{spilling_placement(embedding)}')")
    if room and not embedding.rowwise and state_count(embedding):
        remedies.append("take rowwise_adagrad, which keeps one number a row")
    if room and all(embedding.of(name).precision == "fp32" for name in largest(sizes)):
        remedies.append("keep rows in fp16 (precision 'fp16')")
    named = ", ".join(f"'{name}' ({size / GIB:,.1f} GiB)" for name, size in largest(sizes).items())
    got = f"{total / GIB:,.1f} GiB of tables and states, the largest {named}"
    wanted = (
        f"at most {room / GIB:,.1f} GiB on each of {hardware.ranks} ranks, beside {reserved / GIB:,.1f} GiB of others"
    )
    return Fault("plan", got=got, wanted=wanted, remedy=", or ".join(remedies))


def _more_room(sizes: Mapping[str, int], embedding: Embedding, *, hardware: Hardware, room: int) -> str:
    """More ranks, and other cuts of tables that no number of them would make fit."""
    if not room:
        return "lower train.batch_size, or take ranks with more memory"
    limits = dict.fromkeys(("table_wise", "data_parallel"), room)
    limits |= dict.fromkeys(("table_row_wise", "table_column_wise"), room * hardware.ranks_per_host)
    uncut = [name for name in largest(sizes) if sizes[name] > limits.get(embedding.of(name).sharding, sizes[name])]
    cut = f"cut the rows of {', '.join(uncut)} (sharding 'row_wise')"
    ranks = -(-int(sum(sizes.values()) * 1.1) // room)
    if uncut and ranks <= hardware.ranks:
        return cut
    hosts = -(-max(ranks, hardware.ranks + 1) // hardware.ranks_per_host)
    more = f"take {hosts * hardware.ranks_per_host} ranks or more"
    return f"{cut} and {more}" if uncut else more


def spilling_placement(embedding: Embedding) -> str:
    """The placement in host memory that the optimizer can work in."""
    return "uvm" if needs_own_rows(embedding) else "uvm_caching"


def largest(sizes: Mapping[str, int]) -> dict[str, int]:
    """The three largest, in order."""
    return {name: sizes[name] for name in sorted(sizes, key=lambda name: -sizes[name])[:3]}
