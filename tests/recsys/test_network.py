"""Looked up rows in the layout's order."""

from collections.abc import Callable

import torch
from torchrec import KeyedTensor

from etl.schema import Schema
from recsys.experiment import Experiment
from recsys.network import build_network


def test_answers_in_any_order_come_into_the_layouts(schema: Schema, experiment: Callable[..., Experiment]) -> None:
    """Rows with a vector and first-order weights alone, of other widths, against torchrec's own `regroup`."""
    network = build_network(experiment(), schema, table_device="cpu")
    widths = network.layout.widths()
    of_slot = {slot: widths[table] for slot, table in network.layout.slots}
    assert len(set(of_slot.values())) > 1
    keys = sorted(of_slot, reverse=True)
    assert keys != list(of_slot)
    sizes = [of_slot[name] for name in keys]
    values_BD = torch.randn(5, sum(sizes), requires_grad=True)
    weights_BD = torch.randn(5, sum(sizes))
    found = []
    for in_order in (network._in_order, lambda pooled: KeyedTensor.regroup([pooled], [list(of_slot)])[0]):
        values_BD.grad = None
        ordered_BD = in_order(KeyedTensor(keys, sizes, values_BD))
        (ordered_BD * weights_BD).sum().backward()
        found.append((ordered_BD.detach(), values_BD.grad))
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(*found, strict=True))
