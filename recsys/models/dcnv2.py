"""DCN-V2 (Wang et al. 2021, https://arxiv.org/abs/2008.13535): crosses with whole matrices, or mixtures of low rank.

X experts, R rank.
"""

from typing import ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from recsys.models.head import Head, Inputs, ModelConfig, Sizes
from recsys.models.tower import MLP, Tower


class DCNV2Config(Tower, ModelConfig):
    """A cross network with a matrix a layer, and an MLP beside it or behind it."""

    paper: ClassVar[str] = "https://arxiv.org/abs/2008.13535"
    linear: ClassVar[bool] = False
    kind: Literal["dcnv2"] = "dcnv2"
    cross_layers: int = Field(3, ge=1, description="cross products one after another")
    rank: int = Field(0, ge=0, description="the cross matrices are products of two of this rank; 0: whole matrices")
    experts: int = Field(1, ge=1, description="low-rank crosses mixed by a gate; needs 'rank'")
    structure: Literal["parallel", "stacked"] = Field("parallel", description="the MLP beside the crosses or on them")

    @model_validator(mode="after")
    def _experts_have_a_rank(self) -> "DCNV2Config":
        if self.experts > 1 and not self.rank:
            raise ValueError(f"'experts' = {self.experts} needs a 'rank' of at least 1")
        return self

    def head(self, sizes: Sizes) -> Head:
        return DCNV2(self, sizes)


class DCNV2(Head):
    """logit = W [crosses, MLP(x)] + b, or MLP(crosses): the parallel and the stacked structure of the paper."""

    def __init__(self, config: DCNV2Config, sizes: Sizes) -> None:
        super().__init__()
        width, tasks = sizes.deep, len(sizes.tasks)
        self.crosses = nn.ModuleList(_cross(config, width) for _ in range(config.cross_layers))
        parallel = config.structure == "parallel"
        self.deep = MLP(width, tower=config, out=0 if parallel else tasks)
        self.out = nn.Linear(width + self.deep.width, tasks) if parallel else None

    def forward(self, inputs: Inputs) -> Tensor:
        x0_BD = x_BD = inputs.deep_BD()
        for cross in self.crosses:
            x_BD = x0_BD * cross(x_BD) + x_BD
        logits_BT: Tensor = (
            self.deep(x_BD) if self.out is None else self.out(torch.cat([x_BD, self.deep(x0_BD)], dim=1))
        )
        return logits_BT


def _cross(config: DCNV2Config, width: int) -> nn.Module:
    """What multiplies x0: W x + b, U V x + b (the paper's low-rank DCN) or its mixture of experts: [B, D] -> [B, D]."""
    if not config.rank:
        return nn.Linear(width, width)
    if config.experts > 1:
        return Mixture(width, rank=config.rank, experts=config.experts)
    return nn.Sequential(nn.Linear(width, config.rank, bias=False), nn.Linear(config.rank, width))


class Mixture(nn.Module):
    """Sum over experts of softmax gate(x) times U tanh(C tanh(V x)), plus b: [B, D] -> [B, D].

    The paper's mixture of low-rank DCN, tanh being its g. The bias is one for all experts and needs no gate, since
    the gates sum to 1.
    """

    def __init__(self, width: int, *, rank: int, experts: int) -> None:
        super().__init__()
        self.gate = nn.Linear(width, experts, bias=False)
        self.down_XDR = nn.Parameter(torch.zeros(experts, width, rank))
        self.core_XRR = nn.Parameter(torch.zeros(experts, rank, rank))
        self.up_XRD = nn.Parameter(torch.zeros(experts, rank, width))
        self.bias_D = nn.Parameter(torch.zeros(width))

    @torch.no_grad()
    def init(self, generator: torch.Generator) -> None:
        """Each expert's matrices Glorot uniform by themselves."""
        for matrices in (self.down_XDR, self.core_XRR, self.up_XRD):
            for matrix in matrices:
                nn.init.xavier_uniform_(matrix, generator=generator)
        nn.init.zeros_(self.bias_D)

    def forward(self, x_BD: Tensor) -> Tensor:
        gates_BX = self.gate(x_BD).softmax(dim=1)
        low_BXR = torch.tanh(torch.einsum("bd,xdr->bxr", x_BD, self.down_XDR))
        low_BXR = torch.tanh(torch.einsum("bxr,xrs->bxs", low_BXR, self.core_XRR))
        return torch.einsum("bxr,xrd->bd", low_BXR * gates_BX[:, :, None], self.up_XRD) + self.bias_D
