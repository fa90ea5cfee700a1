"""The models. A new one is a file beside these and a line in `AnyModel`.

Shapes are named by their last letters: B rows, F fields with a vector, E single ids of fields, S slots of ids, P pairs
of fields, L first-order weights or positions of a sequence, K embedding size, N dense inputs, T tasks, D other widths.
"""

import json
from typing import Annotated, get_args

from pydantic import BaseModel, Field
from pydantic.fields import FieldInfo

from recsys.models.afm import AFMConfig
from recsys.models.autoint import AutoIntConfig
from recsys.models.bst import BSTConfig
from recsys.models.dcn import DCNConfig
from recsys.models.dcnv2 import DCNV2Config
from recsys.models.deep import DeepConfig
from recsys.models.deep_crossing import DeepCrossingConfig
from recsys.models.deepfm import DeepFMConfig
from recsys.models.din import DINConfig
from recsys.models.dlrm import DLRMConfig
from recsys.models.esmm import ESMMConfig
from recsys.models.final_mlp import FinalMLPConfig
from recsys.models.fm import FMConfig
from recsys.models.fnn import FNNConfig
from recsys.models.head import ModelConfig
from recsys.models.masknet import MaskNetConfig
from recsys.models.mmoe import MMoEConfig
from recsys.models.nfm import NFMConfig
from recsys.models.ple import PLEConfig
from recsys.models.pnn import PNN1Config, PNN2Config
from recsys.models.wide import WideConfig
from recsys.models.wide_deep import WideDeepConfig

AnyModel = Annotated[
    FMConfig  #
    | FNNConfig
    | DeepFMConfig
    | NFMConfig
    | PNN1Config
    | PNN2Config
    | WideConfig
    | DeepConfig
    | WideDeepConfig
    | AFMConfig
    | DeepCrossingConfig
    | DCNConfig
    | DINConfig
    | ESMMConfig
    | DCNV2Config
    | DLRMConfig
    | MMoEConfig
    | PLEConfig
    | MaskNetConfig
    | AutoIntConfig
    | FinalMLPConfig
    | BSTConfig,
    Field(discriminator="kind"),
]

MODELS: dict[str, type[ModelConfig]] = {
    config.model_fields["kind"].default: config for config in get_args(get_args(AnyModel)[0])
}


def default_of(field: FieldInfo) -> str:
    """A setting's default as the experiment file would say it; "needed" where there is none."""
    if field.is_required():
        return "needed"
    value = field.get_default(call_default_factory=True)
    if isinstance(value, BaseModel):
        kind = {"kind": value.kind} if isinstance(value, ModelConfig) and hasattr(value, "kind") else {}
        value = kind | value.model_dump(exclude_defaults=True)
    return json.dumps(value)
