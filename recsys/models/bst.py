"""Behavior Sequence Transformer (Chen et al. 2019, https://arxiv.org/abs/1905.06874): self-attention over a history."""

from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from recsys.models.head import Head, Inputs, ModelConfig, Sizes
from recsys.models.histories import AttentionPair, Histories
from recsys.models.layers import Dropout
from recsys.models.tower import MLP, Keep, Tower


class BSTConfig(Tower, ModelConfig):
    """Transformer blocks over each history with its candidate at the end, then an MLP with the other inputs."""

    paper: ClassVar[str] = "https://arxiv.org/abs/1905.06874"
    linear: ClassVar[bool] = False
    unpooled: ClassVar[bool] = True
    kind: Literal["bst"] = "bst"
    attention: list[AttentionPair] = Field(min_length=1, description="candidates and their histories")
    blocks: int = Field(1, ge=1, description="transformer blocks, one after the other")
    heads: int = Field(2, ge=1, description="attention heads; must divide the width of a position")
    feed_forward: int = Field(4, ge=1, description="inner width of a block, in widths of a position")
    attention_keep: Keep = Field(1.0, description="share of a block's outputs kept in training")
    pooling: Literal["mean", "flatten"] = Field("mean", description="flatten: every position has its own place")

    def faults(self, sizes: Sizes) -> Sequence[str]:
        found = [*super().faults(sizes), *(fault for pair in self.attention for fault in pair.faults(sizes))]
        widths = [len(pair.query) * sizes.dim for pair in self.attention]
        return found + [f"attention: {self.heads} heads for a width of {w}" for w in widths if w % self.heads]

    def head(self, sizes: Sizes) -> Head:
        return BST(self, sizes)


class Block(nn.Module):
    """Equations 3 to 6: S = norm(E + attention(E)), then norm(S + FFN(S)) with LeakyReLU: [B, L, D] -> same."""

    def __init__(self, width: int, *, config: BSTConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.project = nn.ModuleList(nn.Linear(width, width, bias=False) for _ in "qkv")
        self.merge = nn.Linear(width, width, bias=False)
        self.inner = nn.Linear(width, config.feed_forward * width)
        self.outer = nn.Linear(config.feed_forward * width, width)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.dropout = Dropout(config.attention_keep)

    def forward(self, x_BLD: Tensor, valid_BL: Tensor) -> Tensor:
        attend, feed = self.norms
        x_BLD = attend(x_BLD + self.dropout(self._attention(x_BLD, valid_BL)))
        inner_BLD = nn.functional.leaky_relu(self.inner(x_BLD))
        out_BLD: Tensor = feed(x_BLD + self.dropout(self.outer(inner_BLD)))
        return out_BLD

    def _attention(self, x_BLD: Tensor, valid_BL: Tensor) -> Tensor:
        split = [layer(x_BLD).unflatten(2, (self.heads, -1)).transpose(1, 2) for layer in self.project]
        query, key, value = split
        mask = valid_BL[:, None, None, :]
        mixed_BHLD = nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        merged_BLD: Tensor = self.merge(mixed_BHLD.transpose(1, 2).flatten(2))
        return merged_BLD


class Encoder(nn.Module):
    """One history with its candidate, read by blocks: [B, D] and [B, L, D] -> [B, D], or [B, (L + 1) D] flattened.

    A position is known by how many ids stand from it to the newest, the candidate by 0: padding may be at either end.
    """

    def __init__(self, width: int, *, length: int, config: BSTConfig) -> None:
        super().__init__()
        self.flatten = config.pooling == "flatten"
        self.width = width * (length + 1) if self.flatten else width
        self.positions_LD = nn.Parameter(torch.zeros(length + 1, width))
        self.blocks = nn.ModuleList(Block(width, config=config) for _ in range(config.blocks))

    def init(self, generator: torch.Generator) -> None:
        """Positions start as small as BERT's."""
        nn.init.normal_(self.positions_LD, std=0.02, generator=generator)

    def forward(self, query_BD: Tensor, keys_BLD: Tensor, valid_BL: Tensor) -> Tensor:
        query_B1D = query_BD[:, None]
        x_BLD = torch.cat([keys_BLD, query_B1D], dim=1)
        valid_BL = torch.cat([valid_BL, torch.ones_like(query_B1D[:, :, 0], dtype=torch.bool)], dim=1)
        ranks_BL = valid_BL.long().flip(1).cumsum(dim=1).flip(1) - 1
        x_BLD = x_BLD + nn.functional.embedding(ranks_BL, self.positions_LD)
        for block in self.blocks:
            x_BLD = block(x_BLD, valid_BL)
        x_BLD = x_BLD.masked_fill(~valid_BL[:, :, None], 0)
        return x_BLD.flatten(1) if self.flatten else x_BLD.sum(dim=1) / valid_BL.sum(dim=1, keepdim=True)


class BST(Head):
    """logit = MLP(vectors, encoded histories, dense)."""

    def __init__(self, config: BSTConfig, sizes: Sizes) -> None:
        super().__init__()
        self.histories = Histories(config.attention, sizes)
        lengths = [dict(sizes.sequences)[pair.keys[0]] for pair in config.attention]
        pairs = zip(self.histories.widths, lengths, strict=True)
        encoders = [Encoder(width, length=length, config=config) for width, length in pairs]
        self.encoders = nn.ModuleList(encoders)
        encoded = sum(encoder.width for encoder in encoders)
        self.deep = MLP(self.histories.deep + encoded, tower=config, out=len(sizes.tasks))

    def forward(self, inputs: Inputs) -> Tensor:
        histories = self.histories.read(inputs)
        encoded = [encoder(*history) for encoder, history in zip(self.encoders, histories, strict=True)]
        logits_BT: Tensor = self.deep(self.histories.deep_BD(inputs, encoded))
        return logits_BT
