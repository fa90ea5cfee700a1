"""The models. A new one is a file beside these and a line in `AnyModel`.

Shapes are named by their last letters: B rows, F fields with a vector, L id features with a first-order weight,
K embedding size, N dense inputs, T tasks, D any other width.
"""

from typing import Annotated, get_args

from pydantic import Field

from recsys.models.deep import DeepConfig
from recsys.models.deepfm import DeepFMConfig
from recsys.models.head import ModelConfig
from recsys.models.wide import WideConfig
from recsys.models.wide_deep import WideDeepConfig

AnyModel = Annotated[
    DeepFMConfig  #
    | WideDeepConfig
    | DeepConfig
    | WideConfig,
    Field(discriminator="kind"),
]

MODELS: dict[str, type[ModelConfig]] = {
    config.model_fields["kind"].default: config for config in get_args(get_args(AnyModel)[0])
}
