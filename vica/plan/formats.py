"""The three checkpoint formats: how each names its settings and its weights.

    llava   config.json is flat (Llama's fields beside mm_*), model_type is llava_llama; keys as in `state_dict()`.
    hf      transformers' LlavaForConditionalGeneration: nested configs, renamed keys, a padded vocabulary.
    vica    llava's form plus t2v_layers, freeze_prefix, variant and the tower's config; the tower's weights are inside.

Everything here is a pure function of dicts and names. vica/checkpoint reads and writes the files.
"""

import re
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from ..utils.errors import ViCAError

if TYPE_CHECKING:
    from .config import ViCAConfig

FORMATS = ("llava", "hf", "vica")

LLAVA_TYPES = ("llava_llama", "llava_mistral", "llava_qwen", "llava_qwen2", "llava")

# The backbone that a flat config's model_type implies.
BACKBONES: dict[str | None, str] = {"llava_mistral": "mistral", "llava_qwen": "qwen2", "llava_qwen2": "qwen2"}

# Fields of ViCAConfig that config.json holds as they are.
OWN_FIELDS = (
    "variant", "t2v_layers", "freeze_prefix", "custom_plan", "image_token_index", "conversation", "image_aspect_ratio",
    "mm_vision_tower", "mm_projector_type", "mm_hidden_size", "mm_vision_select_layer", "mm_vision_select_feature",
)  # fmt: skip
COMMON_FIELDS = (
    "architectures",
    "dtype",
    "torch_dtype",
    "transformers_version",
    "quantization_config",
    "_name_or_path",
)
# How many leading tokens of a tower's output are no patches.
CLASS_TOKENS = {"clip_vision_model": 1, "siglip_vision_model": 0}
# Towers that LLaVA checkpoints name without saying more about them.
CLIP_LARGE: dict[str, Any] = dict(
    model_type="clip_vision_model", hidden_size=1024, intermediate_size=4096, num_hidden_layers=24,
    num_attention_heads=16, patch_size=14, projection_dim=768,
)  # fmt: skip
KNOWN_TOWERS: dict[str, dict[str, Any]] = {
    "openai/clip-vit-large-patch14": dict(CLIP_LARGE, image_size=224),
    "openai/clip-vit-large-patch14-336": dict(CLIP_LARGE, image_size=336),
    "google/siglip-so400m-patch14-384": dict(
        model_type="siglip_vision_model", hidden_size=1152, intermediate_size=4304, num_hidden_layers=27,
        num_attention_heads=16, patch_size=14, image_size=384,
    ),
}  # fmt: skip
# Settings of other model families that change the function where they are on, and mean nothing where they are off.
UNSUPPORTED = {
    "mm_use_im_start_end": "marks around images",
    "use_sliding_window": "sliding-window attention",
    "tune_mm_vision_resampler": "a vision resampler",
}
# Without these, LLaVA's loader would add a token and would not read the tower inside the checkpoint.
FOR_LLAVA = {
    "use_mm_proj": True,
    "mm_use_im_start_end": False,
    "mm_use_im_patch_token": False,
    "unfreeze_mm_vision_tower": True,
}
# LLaVA's training and image settings, which its flat config.json mixes with Llama's fields.
LLAVA_ONLY = ("mm_", "use_mm_", "tune_", "freeze_", "unfreeze_", "image_", "tokenizer_")
IGNORED_TEXT_FIELDS = ("layer_types", "use_sliding_window", "max_window_layers", "model_type", "_name_or_path")


def format_of(config_dict: dict) -> str:
    """Returns the format of a checkpoint with this config.json."""
    model_type = config_dict.get("model_type")
    if model_type == "llava" and "text_config" in config_dict:
        return "hf"
    if model_type == "vica":
        return "vica"
    if model_type in LLAVA_TYPES:
        return "llava"
    raise ViCAError(
        f"config.json has model_type {model_type!r}; this program reads 'vica', 'llava' (llava-hf) and "
        f"{', '.join(repr(x) for x in LLAVA_TYPES[:-1])}"
    )


# --- settings -----------------------------------------------------------------------------------------------------


def read_config(config_dict: dict) -> dict:
    """Returns ViCAConfig's arguments from a config.json of any format. Returns those arguments unchanged if they are
    what is given."""
    config_dict = dict(config_dict)
    if config_dict.get("model_type", "vica") == "vica" and (
        "text_config" in config_dict or "hidden_size" not in config_dict
    ):
        return config_dict
    if format_of(config_dict) == "hf":
        return _read_hf(config_dict)
    return _read_flat(config_dict)


def _read_flat(config_dict: dict) -> dict:
    refuse_unsupported(config_dict)
    alias = config_dict.pop("vision_tower", None)  # LLaVA reads either
    known = {k: config_dict.pop(k) for k in OWN_FIELDS + COMMON_FIELDS if k in config_dict}
    tower = known.get("mm_vision_tower") or alias
    known["mm_vision_tower"] = tower[0] if isinstance(tower, list) else tower
    vision_config = config_dict.pop("vision_config", None)
    known.setdefault("mm_projector_type", "linear")  # LLaVA's own default
    known.setdefault("image_aspect_ratio", None)
    text_config = {k: v for k, v in config_dict.items() if not k.startswith(LLAVA_ONLY)}
    text_config["model_type"] = BACKBONES.get(config_dict.get("model_type"), "llama")
    return {**known, "model_type": "vica", "text_config": llama_shape(text_config), "vision_config": vision_config}


def _read_hf(config_dict: dict) -> dict:
    select = config_dict.get("vision_feature_select_strategy", "default")
    known = {k: config_dict[k] for k in OWN_FIELDS + COMMON_FIELDS if k in config_dict}
    if config_dict.get("projector_hidden_act", "gelu") != "gelu" or not config_dict.get(
        "multimodal_projector_bias", True
    ):
        raise ViCAError("the checkpoint's projector is not two biased linear maps with a gelu between them")
    layer = config_dict.get("vision_feature_layer", -2)
    if not isinstance(layer, int):
        raise ViCAError(f"vision_feature_layer is {layer!r}; only one layer is supported")
    vision_config = dict(config_dict["vision_config"])
    tower = vision_config.setdefault("model_type", "clip_vision_model")
    if select == "default" and not CLASS_TOKENS.get(tower, 1):
        raise ViCAError(
            f"vision_feature_select_strategy 'default' drops a patch of a {tower}, which has no class token"
        )
    return {
        **known,
        "model_type": "vica",
        "text_config": llama_shape(dict(config_dict["text_config"])),
        "vision_config": vision_config,
        "image_token_index": config_dict.get("image_token_index", config_dict.get("image_token_id", 32000)),
        "mm_projector_type": "mlp2x_gelu",
        "mm_vision_select_layer": layer,
        "mm_vision_select_feature": "patch" if select == "default" else "cls_patch",
        "image_aspect_ratio": config_dict.get("image_aspect_ratio"),
    }


def llama_shape(text: dict) -> dict:
    """Returns TextConfig's fields from a Llama, Mistral or Qwen2 config."""
    refuse_unsupported(text)
    model_type = text.get("model_type", "llama")
    if model_type in ("mistral", "qwen2"):  # a field that is not written has that family's default
        from transformers import AutoConfig  # takes seconds, for which the names above need not wait

        text = AutoConfig.for_model(**text).to_dict()
    window = text.get("sliding_window")
    if window and window < text.get("max_position_embeddings", 0) and text.get("use_sliding_window", True):
        raise ViCAError(f"sliding_window is {window}: sliding-window attention is not supported")
    if "qwen" in model_type:
        text = {"attention_bias": True, "attention_out_bias": False, **text}
    elif not any(x in model_type for x in ("llama", "mistral", "vica")):
        raise ViCAError(f"text_config has model_type {model_type!r}; llama, mistral and qwen2 backbones are supported")
    return {k: v for k, v in text.items() if k not in IGNORED_TEXT_FIELDS and k != "sliding_window"}


def refuse_unsupported(config_dict: dict) -> None:
    for key, what in UNSUPPORTED.items():
        if config_dict.get(key):
            raise ViCAError(f"the checkpoint's config sets {key}: {what} are not supported")
    tiling = str(config_dict.get("mm_patch_merge_type") or "flat")
    if str(config_dict.get("image_aspect_ratio")).startswith("anyres") or tiling != "flat":
        raise ViCAError("the checkpoint tiles its images (anyres, LLaVA 1.6); only one view an image is supported")


def flat_config(config: "ViCAConfig", saved: dict) -> dict:
    """Returns config.json in LLaVA's flat form. `saved` is what transformers would write for `config`."""
    text = config.text_config.to_diff_dict()
    text |= old_rope(text.pop("rope_parameters", None) or {})
    for key in (*IGNORED_TEXT_FIELDS, *COMMON_FIELDS, "text_config"):
        text.pop(key, None)
    vision = config.vision_config.to_diff_dict() if config.vision_config is not None else None
    # LLaVA asks whether the key mm_vision_tower exists, not whether its value is null.
    own = {k: getattr(config, k) for k in OWN_FIELDS if getattr(config, k) is not None}
    if "mm_vision_tower" not in own and (name := known_tower(config)):
        own["mm_vision_tower"] = name
    common = {k: saved[k] for k in COMMON_FIELDS if saved.get(k) is not None}
    return {**text, **own, **common, **FOR_LLAVA, "model_type": "vica", "vision_config": vision}


def old_rope(rope: dict) -> dict:
    """Returns rope_parameters under transformers 4's names. It takes exactly two fields of the
    kinds that it knows."""
    kind = rope.get("rope_type", "default")
    scaling = {k: v for k, v in rope.items() if k not in ("rope_theta", "type")}
    if kind in ("linear", "dynamic"):
        scaling = {"type": kind, "factor": rope["factor"]}
    return {"rope_theta": rope.get("rope_theta", 10000.0), "rope_scaling": None if kind == "default" else scaling}


def llava_config(config: "ViCAConfig") -> dict:
    """Returns a config.json that LLaVA's own code takes for one of its models; the wiring is in it for ours."""
    flat = config.to_diff_dict()
    return {**flat, "model_type": "llava_llama", "architectures": ["LlavaLlamaForCausalLM"]}


def known_tower(config: "ViCAConfig") -> str | None:
    """Returns the public name of a tower of these sizes. LLaVA loads the image processor from its repository."""
    for name, sizes in KNOWN_TOWERS.items():
        if all(getattr(config.vision_config, k, None) == v for k, v in sizes.items()):
            return name
    return None


def hf_config(config: "ViCAConfig", vocab_size: int, image_token_index: int) -> dict:
    """Returns the config.json of transformers' LlavaForConditionalGeneration, with the wiring in extra fields. The
    model has a tower."""
    assert config.vision_config is not None
    vision = config.vision_config.to_diff_dict()
    text = {**config.text_config.to_diff_dict(), "model_type": text_model_type(config), "vocab_size": vocab_size}
    text |= old_rope(text.pop("rope_parameters", None) or {})
    side = vision["image_size"] // vision["patch_size"] if "patch_size" in vision else 0
    return {
        "model_type": "llava",
        "architectures": ["LlavaForConditionalGeneration"],
        "dtype": str(config.dtype).removeprefix("torch.") if config.dtype is not None else None,
        "text_config": text,
        "vision_config": {**vision, "model_type": config.vision_config.model_type},
        "image_token_index": image_token_index,
        "image_seq_length": side**2,
        "projector_hidden_act": "gelu",
        "vision_feature_layer": config.mm_vision_select_layer,
        "vision_feature_select_strategy": "default" if drops_class_token(config) else "full",
        "tie_word_embeddings": config.tie_word_embeddings,
        **{
            k: getattr(config, k)
            for k in ("variant", "t2v_layers", "freeze_prefix", "image_aspect_ratio", "conversation")
        },
        **({} if config.custom_plan is None else {"custom_plan": config.custom_plan}),
    }


def drops_class_token(config: "ViCAConfig") -> bool:
    """Returns whether the tower has a class token that the model does not use. The model has a tower."""
    assert config.vision_config is not None
    has_one = CLASS_TOKENS.get(config.vision_config.model_type, 1)
    return bool(has_one) and config.mm_vision_select_feature == "patch"


def text_model_type(config: "ViCAConfig") -> str:
    """Returns transformers' name for the backbone's shape."""
    text = config.text_config
    return "qwen2" if text.attention_bias and not text.attention_out_bias else "llama"


# --- names of weights ---------------------------------------------------------------------------------------------

# Buffers that old files hold and that every model computes for itself.
HARMLESS = re.compile(r"(rotary_emb\.inv_freq|embeddings\.position_ids)$")
# The weights of a whole CLIP or SigLIP outside its vision tower.
TEXT_TOWER = re.compile(r"^(text_model\.|text_projection\.|visual_projection\.|logit_scale|logit_bias)")
TOWER = "model.vision_tower.vision_tower.vision_model."

# transformers has written the hf format with and without a leading `model.`, with `language_model.model.` or
# `language_model.`, and with or without `vision_model.`. All of them map to one name here.
FROM_HF = (
    (re.compile(r"^(model\.)?language_model\.lm_head\."), "lm_head."),
    (re.compile(r"^(model\.)?language_model\.(model\.)?"), "model."),
    (re.compile(r"^(model\.)?vision_tower\.(vision_model\.)?"), TOWER),
    (re.compile(r"^(model\.)?multi_modal_projector\.linear_1\."), "model.mm_projector.0."),
    (re.compile(r"^(model\.)?multi_modal_projector\.linear_2\."), "model.mm_projector.2."),
)
TO_HF = (
    (re.compile(r"^model\.vision_tower\.vision_tower\."), "vision_tower."),
    (re.compile(r"^model\.mm_projector\.0\."), "multi_modal_projector.linear_1."),
    (re.compile(r"^model\.mm_projector\.2\."), "multi_modal_projector.linear_2."),
    (re.compile(r"^model\."), "language_model.model."),
    (re.compile(r"^lm_head\."), "language_model.lm_head."),
)


def our_name(key: str, format: str) -> str:
    """Returns the name in `state_dict()` of a weight that a checkpoint calls `key`."""
    return _renamed(key, FROM_HF) if format == "hf" else key


def hf_name(key: str) -> str:
    """Returns the name in the hf format of a weight that `state_dict()` calls `key`."""
    return _renamed(key, TO_HF)


def _renamed(key: str, rules: Iterable[tuple[re.Pattern, str]]) -> str:
    for pattern, target in rules:
        if pattern.match(key):
            return pattern.sub(target, key)
    return key
