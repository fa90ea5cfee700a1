"""FinalMLP (Mao et al. 2023, https://arxiv.org/abs/2304.00902): two gated MLPs, fused by a bilinear form.

H heads, E outputs of the second stream.
"""

from collections.abc import Sequence
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from recsys.models.head import Head, Inputs, ModelConfig, Sizes
from recsys.models.tower import MLP, Tower, Widths


class FinalMLPConfig(Tower, ModelConfig):
    """Two MLPs on vectors and dense inputs that gates weigh differently; `hidden` and so on are the first one's."""

    paper: ClassVar[str] = "https://arxiv.org/abs/2304.00902"
    linear: ClassVar[bool] = False
    kind: Literal["final_mlp"] = "final_mlp"
    stream2_hidden: list[Annotated[int, Field(ge=1)]] = Field([], description="the second MLP's; empty: as 'hidden'")
    gating: bool = Field(True, description="weigh the inputs of each stream by a gate of its context")
    stream1_context: list[str] = Field([], description="features the first gate looks at; empty: a learnt vector")
    stream2_context: list[str] = Field([], description="features the second gate looks at; empty: a learnt vector")
    gate_hidden: Widths = Field([64], description="widths of the gates' MLPs")
    heads: int = Field(2, ge=1, description="parts that the streams' outputs are cut into and fused by")

    @model_validator(mode="after")
    def _streams_fit(self) -> "FinalMLPConfig":
        for width in (self.hidden[-1], self.second().hidden[-1]):
            if width % self.heads:
                raise ValueError(f"a stream ends in {width} outputs, which 'heads' = {self.heads} does not divide")
        return self

    def second(self) -> Tower:
        """Settings of the second stream's MLP."""
        hidden = self.stream2_hidden or self.hidden
        return Tower(hidden=hidden, activation=self.activation, keep_prob=self.keep_prob, batch_norm=self.batch_norm)

    def head(self, sizes: Sizes) -> Head:
        return FinalMLP(self, sizes)

    def faults(self, sizes: Sizes) -> Sequence[str]:
        contexts = {"stream1_context": self.stream1_context, "stream2_context": self.stream2_context}
        unknown = [
            f"'{key}' names '{name}', which is no feature with a vector"
            for key, names in contexts.items()
            for name in names
            if name not in sizes.fields
        ]
        return [*super().faults(sizes), *unknown]


class FinalMLP(Head):
    """logit = fusion(MLP1(gate1 x), MLP2(gate2 x))."""

    def __init__(self, config: FinalMLPConfig, sizes: Sizes) -> None:
        super().__init__()
        contexts = (config.stream1_context, config.stream2_context) if config.gating else ()
        self.gates = nn.ModuleList(Gate(sizes, context=names, hidden=config.gate_hidden) for names in contexts)
        self.first = MLP(sizes.deep, tower=config, out=0)
        self.second = MLP(sizes.deep, tower=config.second(), out=0)
        widths = (self.first.width, self.second.width)
        self.fusion = Fusion(*widths, heads=config.heads, tasks=len(sizes.tasks))

    def forward(self, inputs: Inputs) -> Tensor:
        x_BD = inputs.deep_BD()
        first_BD, second_BD = [gate(inputs) * x_BD for gate in self.gates] or (x_BD, x_BD)
        logits_BT: Tensor = self.fusion(self.first(first_BD), self.second(second_BD))
        return logits_BT


class Gate(nn.Module):
    """2 sigmoid(MLP(context)), the context chosen fields or a learnt vector: [B or 1, D]."""

    columns: Tensor

    def __init__(self, sizes: Sizes, *, context: list[str], hidden: list[int]) -> None:
        super().__init__()
        columns = torch.tensor([sizes.fields.index(name) for name in context], dtype=torch.int64)
        self.register_buffer("columns", columns, persistent=False)
        self.context_1K = None if context else nn.Parameter(torch.zeros(1, sizes.dim))
        self.mlp = MLP(sizes.dim * max(1, len(context)), tower=Tower(hidden=hidden), out=sizes.deep)

    def init(self, generator: torch.Generator) -> None:
        """The learnt vector random: from zeros no gradient would pass the first ReLU."""
        if self.context_1K is not None:
            nn.init.normal_(self.context_1K, generator=generator)

    def forward(self, inputs: Inputs) -> Tensor:
        fields_BD = inputs.emb_BFK.index_select(1, self.columns).flatten(1)
        return 2 * torch.sigmoid(self.mlp(fields_BD if self.context_1K is None else self.context_1K))


class Fusion(nn.Module):
    """Multi-head bilinear form b + w1 . x + w2 . y + sum over heads of x_h W_h y_h: [B, D] and [B, E] -> [B, T]."""

    def __init__(self, first: int, second: int, *, heads: int, tasks: int) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(first, tasks), nn.Linear(second, tasks, bias=False)
        self.weight_HTDE = nn.Parameter(torch.zeros(heads, tasks, first // heads, second // heads))

    @torch.no_grad()
    def init(self, generator: torch.Generator) -> None:
        """Each head's matrix Glorot uniform by itself."""
        for matrix in self.weight_HTDE.flatten(0, 1):
            nn.init.xavier_uniform_(matrix, generator=generator)

    def forward(self, x_BD: Tensor, y_BE: Tensor) -> Tensor:
        heads, _, first, second = self.weight_HTDE.shape
        x_BHD, y_BHE = x_BD.reshape(-1, heads, first), y_BE.reshape(-1, heads, second)
        fused_BT = torch.einsum("bhd,htde,bhe->bt", x_BHD, self.weight_HTDE, y_BHE)
        out_BT: Tensor = self.first(x_BD) + self.second(y_BE) + fused_BT
        return out_BT
