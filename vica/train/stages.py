"""Says in one place which parts of the model each stage trains."""

from dataclasses import dataclass

from torch import nn

from ..checkpoint.adapters import is_adapter
from ..utils.errors import ViCAError

# The model's parts by the beginnings of their parameters' names.
PARTS = {
    "tower": ("model.vision_tower.",),
    "projector": ("model.mm_projector.",),
    "language model": ("model.embed_tokens.", "model.layers.", "model.norm.", "lm_head."),
}


@dataclass(frozen=True)
class Trained:
    """Settings of one stage: the parts of PARTS that learn in full; whether the language model learns through adapters;
    and whether checkpoints hold the whole model, even if little of it learns, or only the trained weights."""

    parts: tuple[str, ...]
    adapters: bool = False
    whole: bool = False

    @classmethod
    def of(cls, args) -> "Trained":
        """Returns the settings for `args`, a TrainArguments."""
        if args.stage == "pretrain":
            wrong = [
                x for x in ("lora_enable", "freeze_mm_mlp_adapter", "unfreeze_mm_vision_tower") if getattr(args, x)
            ]
            if wrong:
                raise ViCAError(f"--{wrong[0]} True belongs to stage finetune; stage pretrain trains the projector")
            return cls(("projector",))
        kept = args.freeze_backbone or args.lora_enable or args.bits < 16
        chosen = {
            "tower": args.unfreeze_mm_vision_tower,
            "projector": not args.freeze_mm_mlp_adapter,
            "language model": not kept,
        }
        whole = not args.lora_enable and args.bits == 16  # a quantised base is not written again
        return cls(tuple(part for part in PARTS if chosen[part]), args.lora_enable, whole)


def part_of(name: str) -> str:
    """Returns the part of a parameter. `name` may carry prefixes of peft and of parallel wrappers."""
    for part, beginnings in PARTS.items():
        if any(beginning in name for beginning in beginnings):
            return part
    raise ViCAError(f"{name} belongs to no part of the model that is known here")


def freeze(model: nn.Module, trained: Trained) -> None:
    """Sets `requires_grad` of every parameter. peft decides for a language model with adapters: it may train biases
    too."""
    for name, parameter in model.named_parameters():
        if not (trained.adapters and part_of(name) == "language model"):
            parameter.requires_grad_(part_of(name) in trained.parts)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ViCAError("nothing is left to train: every part of the model is frozen")


def part_sizes(model: nn.Module) -> list[tuple[str, int, int]]:
    """Returns each part with the number of its parameters and of those that learn. Sharded weights count in full."""
    found: dict[str, list[int]] = {}
    for name, parameter in model.named_parameters():
        part = found.setdefault("adapters" if is_adapter(name) else part_of(name), [0, 0])
        size = getattr(parameter, "ds_numel", parameter.numel())
        part[0] += size
        part[1] += size if parameter.requires_grad else 0
    return [(part, size, learning) for part, (size, learning) in found.items()]


def describe(model: nn.Module) -> str:
    lines = [f"{'part':<16}{'parameters':>16}{'trainable':>16}"]
    return "\n".join(lines + [f"{part:<16}{size:>16,}{learning:>16,}" for part, size, learning in part_sizes(model)])
