"""Training's flags beside transformers' own, and their groups in the help.

Kept apart from what parses them: `vica train --help` comes without torch, which TrainingArguments needs.
"""

from dataclasses import dataclass, field

from ..plan.vica import VARIANTS
from ..plan.wiring import read_recipe

ABOUT = "Train stage 1 (the projector) or stage 2 (projector and language model) on LLaVA's data formats."
STAGES = ("pretrain", "finetune")
USAGE = (
    "vica train [SETTINGS.yaml] --stage STAGE --model_name_or_path M --data_path FILE --output_dir FOLDER [more flags]"
)


def option(default, help: str, **more):
    return field(default=default, metadata={"help": help, **more})


@dataclass
class ModelArguments:
    model_name_or_path: str | None = option(
        None, "language model to start from (stage 1, or LLaVA-style stage 2), or a multimodal checkpoint"
    )
    version: str = option("v1", "conversation template: plain, v1, llama_2, mistral")
    vision_tower: str | None = option(None, "folder or repository of the tower; a multimodal checkpoint brings its own")
    mm_projector_type: str | None = option(None, "linear, mlp2x_gelu (default) or identity")
    mm_vision_select_layer: int | None = option(None, "hidden state of the tower that is projected (default: -2)")
    mm_vision_select_feature: str | None = option(None, "patch (default) or cls_patch")
    pretrain_mm_mlp_adapter: str | None = option(None, "stage 1's mm_projector.bin, or the folder that holds it")
    variant: str = option("accel", f"{', '.join(VARIANTS)}; accel and mask train the same function")
    t2v_layers: str | None = option(None, 'JSON list such as "[0,1,7,8]"; goes before --config and T2V_LAYERS')
    freeze_prefix: str | None = option(None, "true, false or the first layer that freezes the prefix")
    config: str | None = option(None, "a file of configs/: what a published model is made of; flags go before it")
    mm_use_im_start_end: bool = option(False, "LLaVA's marks around images: only False is supported")
    mm_use_im_patch_token: bool = option(False, "LLaVA's patch token: only False is supported")
    mm_patch_merge_type: str = option("flat", "only flat is supported")

    def __post_init__(self):
        if self.config is None:
            return
        recipe = read_recipe(self.config)
        self.model_name_or_path = self.model_name_or_path or recipe.get("language_model")
        self.vision_tower = self.vision_tower or recipe.get("vision_tower")


@dataclass
class DataArguments:
    data_path: list[str] = field(
        default_factory=list, metadata={"help": "LLaVA's JSON, JSONL, parquet, or a Hugging Face dataset; several mix"}
    )
    image_folder: str | None = option(None, "where the samples' image paths begin")
    image_aspect_ratio: str = option("pad", "pad, resize or crop (LLaVA's square)")
    streaming: bool = option(False, "read samples as they come, without an index; needs --max_steps")
    max_broken_share: float = option(0.01, "training stops above this share of unreadable or malformed samples")
    lazy_preprocess: bool = option(True, "LLaVA's flag; samples are always read when they are needed")
    is_multimodal: bool = option(True, "LLaVA's flag; samples with and without images always mix")


@dataclass
class RunArguments:
    """Flags for what a run learns and how; beside these flags are those of transformers' TrainingArguments."""

    stage: str | None = option(None, f"what trains: {', '.join(STAGES)}")
    tune_mm_mlp_adapter: bool = option(False, "LLaVA's word for --stage pretrain")
    freeze_backbone: bool = option(False, "in stage finetune the language model stays as it is")
    freeze_mm_mlp_adapter: bool = option(False, "in stage finetune the projector stays as it is")
    unfreeze_mm_vision_tower: bool = option(False, "in stage finetune the tower learns too")
    mm_projector_lr: float | None = option(None, "the projector's own learning rate")
    model_max_length: int = option(2048, "positions of a sample, visual tokens included; what is beyond is cut")
    group_by_modality_length: bool = option(False, "batches of like lengths, of samples with or without images")
    group_by_length: bool = option(False, "batches of like lengths")
    lora_enable: bool = option(False, "train adapters instead of the language model")
    lora_r: int = option(64, "rank of the adapters")
    lora_alpha: int = option(16, "their scale")
    lora_dropout: float = option(0.05, "their dropout")
    lora_bias: str = option("none", "none, all or lora_only", choices=["none", "all", "lora_only"])
    bits: int = option(16, "4 or 8 load the frozen language model quantised (bitsandbytes)", choices=[4, 8, 16])
    double_quant: bool = option(True, "quantise the quantisation constants too")
    quant_type: str = option("nf4", "nf4 or fp4", choices=["nf4", "fp4"])
    cache_dir: str | None = option(None, "where the hub's files are kept")
    peak_tflops: float | None = option(None, "of one device, for its share in use; known for common ones")

    # transformers' own, with other defaults or LLaVA's spelling
    output_dir: str | None = option(None, "checkpoints, report and plot go here")
    eval_strategy: str = option("no", "there is no evaluation while training", aliases=["--evaluation_strategy"])
    logging_steps: float = option(1, "steps between lines of the log")
    logging_nan_inf_filter: bool = option(False, "a loss that is no number stops the run, it is never smoothed over")
    save_total_limit: int | None = option(1, "checkpoints that are kept")
    dataloader_num_workers: int = option(4, "processes that read samples")
    lr_scheduler_type: str = option("cosine", "see transformers")
    warmup_steps: float | None = option(None, "steps in which the rate rises")
    warmup_ratio: float = option(0.03, "share of the steps in which the rate rises, where --warmup_steps says nothing")
    weight_decay: float = option(0.0, "see transformers")
    remove_unused_columns: bool = option(False, "samples are no table: always False")


# Every flag of this file is in one group.
GROUPS = {
    "model and wiring": (
        "model_name_or_path", "vision_tower", "config", "variant", "t2v_layers", "freeze_prefix", "version",
        "mm_projector_type", "mm_vision_select_layer", "mm_vision_select_feature", "pretrain_mm_mlp_adapter",
    ),
    "data": (
        "data_path", "image_folder", "image_aspect_ratio", "streaming", "max_broken_share", "model_max_length",
        "group_by_modality_length", "group_by_length",
    ),
    "what learns": (
        "stage", "freeze_backbone", "freeze_mm_mlp_adapter", "unfreeze_mm_vision_tower", "mm_projector_lr",
        "lora_enable", "lora_r", "lora_alpha", "lora_dropout", "lora_bias", "bits", "double_quant", "quant_type",
    ),
    "the run (transformers' flags with other defaults, and two of ours)": (
        "output_dir", "lr_scheduler_type", "warmup_steps", "warmup_ratio", "weight_decay", "logging_steps",
        "logging_nan_inf_filter", "save_total_limit", "dataloader_num_workers", "cache_dir", "peak_tflops",
    ),
    "LLaVA's flags that its scripts give": (
        "tune_mm_mlp_adapter", "lazy_preprocess", "is_multimodal", "mm_use_im_start_end", "mm_use_im_patch_token",
        "mm_patch_merge_type", "eval_strategy", "remove_unused_columns",
    ),
}  # fmt: skip
