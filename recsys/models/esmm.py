"""Entire Space Multi-Task Model (Ma et al. 2018, https://arxiv.org/abs/1804.07931): conversion after a click."""

from collections.abc import Sequence
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import BeforeValidator, Field, SerializeAsAny
from torch import Tensor

from recsys.models.deep import DeepConfig
from recsys.models.head import Head, Inputs, ModelConfig, Sizes


def _model(value: object) -> object:
    """A table with 'kind' becomes the settings of that model."""
    from recsys.models import MODELS  # which holds this file's model too

    if not isinstance(value, dict):
        return value
    kind = value.get("kind")
    if not isinstance(kind, str) or kind not in MODELS:
        raise ValueError(f"'kind' is {kind!r}, wanted one of {', '.join(sorted(MODELS))}")
    return MODELS[kind].model_validate(value)


TowerModel = Annotated[SerializeAsAny[ModelConfig], BeforeValidator(_model)]


class ESMMConfig(ModelConfig):
    """Two towers on the same tables: p(click), and p(click and conversion) = p(click) p(conversion | click)."""

    paper: ClassVar[str] = "https://arxiv.org/abs/1804.07931"
    kind: Literal["esmm"] = "esmm"
    click: str = Field("click", description="task of the first step")
    conversion: str = Field("conversion", description="task of both steps: its label is 1 only where the click's is")
    post_click: str | None = Field(None, description="task of the second step alone, among clicks")
    tower: TowerModel = Field(default_factory=DeepConfig, description="any model of one task, with its 'kind'")
    click_tower: TowerModel | None = Field(None, description="another model for the click")
    conversion_tower: TowerModel | None = Field(None, description="another model for the conversion after a click")

    @property
    def towers(self) -> tuple[ModelConfig, ModelConfig]:
        """Models of the click and of the conversion after it."""
        return self.click_tower or self.tower, self.conversion_tower or self.tower

    @property
    def vectors(self) -> bool:  # type: ignore[override]
        """What either tower reads; so the two below."""
        return any(tower.vectors for tower in self.towers)

    @property
    def linear(self) -> bool:  # type: ignore[override]
        return any(tower.linear for tower in self.towers)

    @property
    def unpooled(self) -> bool:  # type: ignore[override]
        return any(tower.unpooled for tower in self.towers)

    def columns(self) -> tuple[str, ...]:
        """Names of the tasks: click, conversion, and the second step where it is one."""
        return (self.click, self.conversion, *([self.post_click] if self.post_click else []))

    def faults(self, sizes: Sizes) -> Sequence[str]:
        wanted = self.columns()
        found = [
            f"task '{name}' is not among the tasks {list(sizes.tasks)}" for name in wanted if name not in sizes.tasks
        ]
        found += [
            f"task '{name}' is none of this model's: {list(wanted)}" for name in sizes.tasks if name not in wanted
        ]
        if len(set(wanted)) < len(wanted):
            found.append(f"tasks of one name: {list(wanted)}")
        click, conversion = self.towers
        if sizes.sequences and click.unpooled != conversion.unpooled:
            found.append("one tower reads sequences and the other would not see them: choose two that do")
        for name, tower in zip(("click", "conversion"), self.towers, strict=True):
            found += [f"{name} tower: {fault}" for fault in tower.faults(sizes._replace(tasks=(name,)))]
        return found

    def head(self, sizes: Sizes) -> Head:
        return ESMM(self, sizes)


class ESMM(Head):
    """Equation 1 in logits: p = s(a) s(c), a and c those of the towers, has the logit -log(e^-a + e^-c + e^(-a-c)).

    It stays exact where a probability rounds to 0 or 1.
    """

    def __init__(self, config: ESMMConfig, sizes: Sizes) -> None:
        super().__init__()
        click, conversion = config.towers
        self.click = click.build(sizes._replace(tasks=(config.click,)))
        self.conversion = conversion.build(sizes._replace(tasks=(config.conversion,)))
        self.order = [config.columns().index(name) for name in sizes.tasks]

    def forward(self, inputs: Inputs) -> Tensor:
        a_B1, c_B1 = self.click(inputs), self.conversion(inputs)
        both_B1 = -torch.logsumexp(torch.cat([-a_B1, -c_B1, -a_B1 - c_B1], dim=1), dim=1, keepdim=True)
        columns = [a_B1, both_B1, c_B1]
        return torch.cat([columns[at] for at in self.order], dim=1)

    def penalty(self) -> Tensor | None:
        parts = [part for tower in (self.click, self.conversion) if (part := tower.penalty()) is not None]
        return torch.stack(parts).sum() if parts else None
