"""Histories and their candidates, for the models that read sequences unpooled."""

import torch
from pydantic import Field
from torch import Tensor

from etl.spec import Section
from recsys.models.head import Inputs, Sizes


class AttentionPair(Section):
    """A candidate and a history of its like: the n-th field of the one goes with the n-th sequence of the other."""

    query: list[str] = Field(min_length=1, description="fields of the candidate")
    keys: list[str] = Field(min_length=1, description="sequence features, as many as fields, of one length")

    def faults(self, sizes: Sizes) -> list[str]:
        slots = dict(sizes.sequences)
        found = [f"attention: '{name}' is no field with a vector" for name in self.query if name not in sizes.fields]
        found += [f"attention: '{name}' is no sequence with vectors" for name in self.keys if name not in slots]
        if len(self.query) != len(self.keys):
            found.append(f"attention: {len(self.query)} fields {self.query} for {len(self.keys)} sequences {self.keys}")
        if len({slots[name] for name in self.keys if name in slots}) > 1:
            found.append(f"attention: the sequences {self.keys} are of unequal lengths, give them one")
        return found


class Histories:
    """Finds the pairs among a head's inputs; sequences that no pair names are averaged."""

    def __init__(self, pairs: list[AttentionPair], sizes: Sizes) -> None:
        slots = dict(sizes.sequences)
        self.queries = [[sizes.fields.index(name) for name in pair.query] for pair in pairs]
        self.keys = [[list(slots).index(name) for name in pair.keys] for pair in pairs]
        self.rest = sorted(set(range(len(slots))).difference(*self.keys))
        self.widths = [sizes.dim * len(keys) for keys in self.keys]
        self.deep = sizes.deep + sizes.dim * len(self.rest)

    def read(self, inputs: Inputs) -> list[tuple[Tensor, Tensor, Tensor]]:
        """For each pair candidates [B, D], histories [B, L, D] and where any of their sequences has an id, [B, L]."""
        valid = [mask_BL > 0 for mask_BL in inputs.masks]
        kept = [torch.where(on[:, :, None], rows, 0) for rows, on in zip(inputs.sequences, valid, strict=True)]
        queries = [torch.cat([inputs.emb_BFK[:, at] for at in query], dim=1) for query in self.queries]
        keys = [torch.cat([kept[at] for at in pair], dim=2) for pair in self.keys]
        any_valid = [torch.stack([valid[at] for at in pair]).any(dim=0) for pair in self.keys]
        return list(zip(queries, keys, any_valid, strict=True))

    def deep_BD(self, inputs: Inputs, read: list[Tensor]) -> Tensor:
        """Side by side: fields, what was read from the histories, averages of the other sequences, dense inputs."""
        valid = [inputs.masks[at][:, :, None] > 0 for at in self.rest]
        kept = [torch.where(on, inputs.sequences[at], 0) for at, on in zip(self.rest, valid, strict=True)]
        rest = [rows.sum(dim=1) / on.sum(dim=1).clamp(min=1) for rows, on in zip(kept, valid, strict=True)]
        return torch.cat([inputs.emb_BFK.flatten(1), *read, *rest, inputs.dense_BN], dim=1)
