"""Training's flags: LLaVA's names, transformers' TrainingArguments, and the wiring."""

import sys
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from transformers import HfArgumentParser, TrainingArguments

from ..utils.errors import ViCAError
from .flags import STAGES, USAGE, DataArguments, ModelArguments, RunArguments
from .help import help_parser
from .settings import with_file

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


@dataclass
class TrainArguments(RunArguments, TrainingArguments):
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


class Parser(HfArgumentParser):
    def format_help(self) -> str:
        return help_parser().format_help()


def build_parser() -> Parser:
    return Parser((ModelArguments, DataArguments, TrainArguments), prog="vica train", usage=USAGE)


def parse(argv: list[str] | None = None) -> tuple[ModelArguments, DataArguments, TrainArguments]:
    parser = build_parser()
    argv = with_file(parser, sys.argv[1:] if argv is None else argv)
    with one_line_complaints():
        model, data, train = parser.parse_args_into_dataclasses(argv)
    for name, supported in UNSUPPORTED.items():
        if getattr(model, name) != supported:
            raise ViCAError(f"--{name} is {getattr(model, name)!r}; only {supported!r} is supported")
    for given, name in ((model, "model_name_or_path"), (data, "data_path"), (train, "output_dir")):
        if not getattr(given, name):
            raise ViCAError(f"--{name} is missing")
    return model, data, train
