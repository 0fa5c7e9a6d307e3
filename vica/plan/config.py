"""The configuration saved with every checkpoint: the backbone, the vision tower, and the wiring of the layers.

Multimodal fields carry LLaVA's names (`mm_projector_type`, ...), so that one config.json serves both code bases.
"""

import os
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from huggingface_hub.dataclasses import strict
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, LlamaConfig, PreTrainedConfig

from ..utils.errors import ViCAError
from . import formats
from .layer import LayerPlan, check_plan, plan_from_json, plan_to_json
from .vica import check_freeze_prefix, check_variant, make_plan, missing_layers_message, parse_t2v_layers, replaces_plan

IMAGE_TOKEN_INDEX = -200
PROJECTORS = ("linear", "mlp2x_gelu", "identity")
Config = TypeVar("Config")


@strict
class TextConfig(LlamaConfig):
    """LlamaConfig plus what the Mistral and Qwen2 shapes need: biases on q, k, v but not on the output."""

    attention_out_bias: bool | None = None
    if TYPE_CHECKING:  # LlamaConfig fills them in where they are not given
        head_dim: int
        num_key_value_heads: int

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        if self.attention_out_bias is None:
            self.attention_out_bias = self.attention_bias
        if (kind := (self.rope_parameters or {}).get("rope_type")) in ("dynamic", "longrope"):
            raise ViCAError(f"rope_type is {kind!r}: frequencies that change with the length are not supported")
        if self.attention_dropout:
            raise ViCAError(f"attention_dropout is {self.attention_dropout}; only 0 is supported")


class ViCAConfig(PreTrainedConfig):
    """The settings of a ViCA model.

    `text_config` takes any field of transformers' LlamaConfig. `vision_config` takes any field of CLIPVisionConfig, or
    of another tower's config, which its `model_type` names; None means that the caller brings image features.
    """

    model_type = "vica"
    keys_to_ignore_at_inference = ["past_key_values"]
    attribute_map = {"image_token_id": "image_token_index"}
    sub_configs = {"text_config": TextConfig, "vision_config": AutoConfig}

    if TYPE_CHECKING:
        # Their types after construction. The constructor takes tables of fields, and any sequence of layers.
        text_config: TextConfig
        vision_config: PreTrainedConfig | None
        t2v_layers: list[int] | None

        def __init__(self, **fields: Any) -> None: ...
    else:
        text_config: dict | PreTrainedConfig | None = None
        vision_config: dict | PreTrainedConfig | None = None
        t2v_layers: list | tuple | None = None
    variant: str = "accel"
    freeze_prefix: bool | int = True
    custom_plan: list | None = None  # tables of LayerPlan's fields; set it through `plan`
    image_token_index: int = IMAGE_TOKEN_INDEX
    tie_word_embeddings: bool = False
    mm_vision_tower: str | None = None
    mm_projector_type: str = "mlp2x_gelu"
    mm_hidden_size: int | None = None
    mm_vision_select_layer: int = -2
    mm_vision_select_feature: str = "patch"
    image_aspect_ratio: str | None = "pad"
    conversation: str = "vicuna_v1"

    def __post_init__(self, **kwargs: Any) -> None:
        self.text_config = as_text_config(self.text_config)
        self.vision_config = as_vision_config(self.vision_config)
        if self.vision_config is not None:
            self.mm_hidden_size = self.vision_config.hidden_size
        self.tie_word_embeddings = self.text_config.tie_word_embeddings
        super().__post_init__(**kwargs)
        self.check()

    def check(self) -> None:
        """Brings the settings into one form, such as sorted lists, and raises ViCAError at a wrong one."""
        layers = self.text_config.num_hidden_layers
        check_variant(self.variant, layers)
        if self.t2v_layers is not None:
            self.t2v_layers = parse_t2v_layers(self.t2v_layers, layers)
        self.freeze_prefix = check_freeze_prefix(self.freeze_prefix, layers)
        if self.custom_plan is not None:
            self.plan = self.custom_plan
        if self.mm_projector_type not in PROJECTORS:
            raise ViCAError(f"mm_projector_type is {self.mm_projector_type!r}; known: {', '.join(PROJECTORS)}")
        if self.mm_vision_select_feature not in ("patch", "cls_patch"):
            raise ViCAError(f"mm_vision_select_feature is {self.mm_vision_select_feature!r}; known: patch, cls_patch")

    def require_layers(self) -> None:
        """Raises ViCAError where the plan depends on layers that nothing names. An empty list names them."""
        if self.t2v_layers is None and self.variant != "dense" and self.custom_plan is None:
            raise ViCAError(missing_layers_message(self.variant, self.text_config.num_hidden_layers))

    @property
    def plan(self) -> list[LayerPlan]:
        """Returns what each layer does: as assigned, else as variant, t2v_layers and freeze_prefix say."""
        if self.custom_plan is not None:
            return plan_from_json(self.custom_plan)
        return make_plan(self.variant, self.text_config.num_hidden_layers, self.t2v_layers, self.freeze_prefix)

    @plan.setter
    def plan(self, layers: Sequence) -> None:
        plan = plan_from_json(layers)
        check_plan(plan, self.text_config.num_hidden_layers)
        self.custom_plan = plan_to_json(plan)

    @classmethod
    def get_config_dict(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any) -> tuple[dict, dict]:
        config_dict, kwargs = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        return formats.read_config(config_dict), kwargs

    @classmethod
    def from_dict(cls, config_dict: dict, **kwargs: Any) -> "ViCAConfig":
        fields = formats.read_config(config_dict)
        if replaces_plan(kwargs):
            fields = {**fields, "custom_plan": None}
        return super().from_dict(fields, **kwargs)

    def to_diff_dict(self) -> dict:
        """Returns what config.json holds: LLaVA's flat form, which LLaVA's own loader reads too."""
        return formats.flat_config(self, super().to_diff_dict())


def as_text_config(value: TextConfig | PreTrainedConfig | dict | None) -> TextConfig:
    if isinstance(value, TextConfig):
        return value
    given = value.to_dict() if isinstance(value, PreTrainedConfig) else dict(value or {})
    return checked("text_config", TextConfig, formats.llama_shape(given))


def as_vision_config(value: PreTrainedConfig | dict | None) -> PreTrainedConfig | None:
    if value is None or isinstance(value, PreTrainedConfig):
        return value
    return checked("vision_config", AutoConfig.for_model, {"model_type": "clip_vision_model", **value})


def checked(what: str, make: Callable[..., Config], fields: dict) -> Config:
    """Returns the config made of `fields`. transformers' own complaints take several lines; the error here is one."""
    try:
        return make(**fields)
    except ViCAError:
        raise
    except (StrictDataclassError, ValueError, TypeError) as error:
        reason = str(error.__cause__ or error).strip()
        raise ViCAError(f"{what}: {' '.join(reason.split())}") from error
