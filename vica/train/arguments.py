"""Training's flags: LLaVA's names, transformers' TrainingArguments, and the wiring."""

from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from transformers import HfArgumentParser, TrainingArguments

from ..plan.vica import VARIANTS
from ..plan.wiring import read_recipe
from ..utils.errors import ViCAError
from .stages import STAGES

ABOUT = "Train stage 1 (the projector) or stage 2 (projector and language model) on LLaVA's data formats."


# What less of would be a traceback from somewhere in torch, with the model already loaded.
LEAST = {
    "per_device_train_batch_size": 1,
    "gradient_accumulation_steps": 1,
    "dataloader_num_workers": 0,
    "learning_rate": 0,
    "mm_projector_lr": 0,
    "seed": 0,
}
# Of transformers' flags those that this model or its batches cannot follow, and why.
FOREIGN = {
    "label_smoothing_factor": "the loss is made without logits",
    "neftune_noise_alpha": "rows are packed",
    "torch_compile": "the batch's layout is planned on the host",
    "use_liger_kernel": "the decoder is our own",
    "eval_on_start": "there is no evaluation while training",
}


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
class TrainArguments(TrainingArguments):
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

    def __post_init__(self):
        self.settle_stage()
        for name, least in LEAST.items():
            if getattr(self, name) is not None and not getattr(self, name) >= least:
                raise ViCAError(f"--{name} is {getattr(self, name)}; it must be {least} at least")
        if self.eval_strategy != "no":
            raise ViCAError(f"--eval_strategy is {str(self.eval_strategy)!r}; there is no evaluation while training")
        self.remove_unused_columns = False  # the collator's columns are not all the model's
        for name, reason in FOREIGN.items():
            if getattr(self, name, None):
                raise ViCAError(f"--{name} is not supported: {reason}")
        if self.fp16 and self.use_cpu:
            raise ViCAError("--fp16 needs a GPU")
        if self.warmup_steps is None:
            self.warmup_steps = self.warmup_ratio  # one name for both since transformers 5
        if self.unfreeze_mm_vision_tower and self.ddp_find_unused_parameters is None:
            self.ddp_find_unused_parameters = True  # the tower's layers behind the one that is read get no gradient
        rename_checkpointing(self)
        super().__post_init__()

    @property
    def n_gpu(self) -> int:
        """A process trains on one card. Of all that it sees transformers would make a DataParallel, with a batch for
        each of them, which cuts images and the rows that they belong to at different places."""
        return min(1, super().n_gpu)

    @property
    def order_seed(self) -> int:
        return self.seed if self.data_seed is None else self.data_seed

    def settle_stage(self) -> None:
        if self.stage is None:
            self.stage = "pretrain" if self.tune_mm_mlp_adapter else "finetune"
        elif self.stage not in STAGES:
            raise ViCAError(f"--stage is {self.stage!r}; it must be one of {', '.join(STAGES)}")
        elif self.tune_mm_mlp_adapter and self.stage != "pretrain":
            raise ViCAError(f"--tune_mm_mlp_adapter True means --stage pretrain, not {self.stage!r}")


def rename_checkpointing(args: TrainingArguments) -> None:
    """transformers 5.23 warns of the name that is the only one in 5.17."""
    kwargs = args.gradient_checkpointing_kwargs or {"use_reentrant": False}
    if hasattr(args, "activation_checkpointing"):
        args.activation_checkpointing = args.activation_checkpointing or bool(args.gradient_checkpointing)
        args.activation_checkpointing_kwargs = args.activation_checkpointing_kwargs or kwargs
        args.gradient_checkpointing = args.gradient_checkpointing_kwargs = None
    else:
        args.gradient_checkpointing_kwargs = kwargs


UNSUPPORTED = {"mm_use_im_start_end": False, "mm_use_im_patch_token": False, "mm_patch_merge_type": "flat"}


@contextmanager
def one_line_complaints():
    """transformers and peft raise nearly anything at settings that they cannot follow."""
    try:
        yield
    except (ViCAError, torch.OutOfMemoryError):
        raise
    except (ValueError, TypeError, ImportError, OSError, RuntimeError) as error:
        raise ViCAError(" ".join(str(error).split())) from error


def build_parser() -> HfArgumentParser:
    return HfArgumentParser(
        (ModelArguments, DataArguments, TrainArguments),
        prog="vica train",
        usage="vica train --stage STAGE --model_name_or_path M --data_path FILE --output_dir FOLDER [more flags]",
        description=ABOUT,
    )


def parse(argv: list[str] | None = None) -> tuple[ModelArguments, DataArguments, TrainArguments]:
    with one_line_complaints():
        model, data, train = build_parser().parse_args_into_dataclasses(argv)
    for name, supported in UNSUPPORTED.items():
        if getattr(model, name) != supported:
            raise ViCAError(f"--{name} is {getattr(model, name)!r}; only {supported!r} is supported")
    for given, name in ((model, "model_name_or_path"), (data, "data_path"), (train, "output_dir")):
        if not getattr(given, name):
            raise ViCAError(f"--{name} is missing")
    return model, data, train
