"""DLRM (Naumov et al. 2019, https://arxiv.org/abs/1906.00091): dot products of fields' and dense inputs' vectors."""

from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from recsys.models.head import Head, Inputs, ModelConfig, Sizes
from recsys.models.layers import pair_indices
from recsys.models.tower import MLP, Tower, Widths


class DLRMConfig(Tower, ModelConfig):
    """Dense inputs become a vector of their own; dot products of all pairs of vectors go into an MLP."""

    paper: ClassVar[str] = "https://arxiv.org/abs/1906.00091"
    linear: ClassVar[bool] = False
    kind: Literal["dlrm"] = "dlrm"
    interaction: Literal["dot", "cat"] = Field("dot", description="cat: the vectors themselves instead of dot products")
    bottom_hidden: Widths = Field([512, 256], description="widths of the dense inputs' MLP, which ends in a vector")

    def head(self, sizes: Sizes) -> Head:
        return DLRM(self, sizes)

    def faults(self, sizes: Sizes) -> Sequence[str]:
        vectors, needed = len(sizes.fields) + (sizes.dense > 0), 2 if self.interaction == "dot" else 1
        return [] if vectors >= needed else ["needs two features with a vector, or one and a dense input"]


class DLRM(Head):
    """logit = top MLP(dense vector, dot products) (section 2), without the dense vector where nothing is dense."""

    places_P: Tensor

    def __init__(self, config: DLRMConfig, sizes: Sizes) -> None:
        super().__init__()
        bottom = Tower(hidden=[*config.bottom_hidden, sizes.dim])
        self.bottom = MLP(sizes.dense, tower=bottom, out=0) if sizes.dense else None
        self.dots = config.interaction == "dot"
        vectors = len(sizes.fields) + (sizes.dense > 0)
        first_P, second_P = pair_indices(vectors)
        self.register_buffer("places_P", first_P * vectors + second_P, persistent=False)
        dense = sizes.dim if sizes.dense else 0
        interactions = len(first_P) if self.dots else len(sizes.fields) * sizes.dim
        self.top = MLP(dense + interactions, tower=config, out=len(sizes.tasks))

    def forward(self, inputs: Inputs) -> Tensor:
        dense = [] if self.bottom is None else [self.bottom(inputs.dense_BN)]
        vectors_BVK = torch.cat([*(dense_BK[:, None] for dense_BK in dense), inputs.emb_BFK], dim=1)
        interactions_BD = self._dots_BP(vectors_BVK) if self.dots else inputs.emb_BFK.flatten(1)
        logits_BT: Tensor = self.top(torch.cat([*dense, interactions_BD], dim=1))
        return logits_BT

    def _dots_BP(self, vectors_BVK: Tensor) -> Tensor:
        """Dot products of all pairs of vectors."""
        return (vectors_BVK @ vectors_BVK.transpose(1, 2)).flatten(1).index_select(1, self.places_P)
