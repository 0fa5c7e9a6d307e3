"""Finds the checkpoint from which a restarted run resumes, and checks that it is a checkpoint of the same run."""

import json
from pathlib import Path

from transformers.trainer_utils import get_last_checkpoint

from ..plan.config import ViCAConfig
from ..utils.errors import ViCAError
from ..utils.files import one_name, read_json
from .saving import TRAINED_FILE
from .stages import Trained

# Settings that the weights were trained with and the saved model is used with: other values make it another run.
FIXED = ("t2v_layers", "freeze_prefix", "conversation", "image_aspect_ratio")
RUN_FILE = "run.json"  # in a checkpoint: the settings that its optimizer state and adapters fit


def resume_point(args, config: ViCAConfig, trained: Trained) -> str | None:
    """Returns the newest checkpoint in the output folder unless another is named, as LLaVA does; None to start anew."""
    given = str(args.resume_from_checkpoint or "")
    if given.lower() == "false":
        return None
    point = get_last_checkpoint(args.output_dir) if given.lower() in ("", "true") else given
    if point is None:
        return None
    if not Path(point).is_dir():
        raise ViCAError(f"--resume_from_checkpoint is {given!r}, which is no folder")
    if not (Path(point) / "trainer_state.json").is_file():
        raise ViCAError(f"{point} is no checkpoint to go on from: it holds no trainer_state.json")
    if differs := differences(Path(point), args, config, trained):
        raise ViCAError(f"{point} is of another run: {'; '.join(differs)}. Give this one another --output_dir")
    return point


def differences(point: Path, args, config: ViCAConfig, trained: Trained) -> list[str]:
    if (point / TRAINED_FILE).is_file() == trained.whole:
        kinds = ("stage 1 or adapters, now the whole model", "the whole model, now stage 1 or adapters")
        return [kinds[not trained.whole]]
    before: dict = {}
    now = run_settings(args, config, trained) | fixed_settings(config)
    if (point / RUN_FILE).is_file():
        before |= read_json(point / RUN_FILE)
    if (point / "config.json").is_file():  # FSDP's pieces come without it
        before |= fixed_settings(ViCAConfig.from_dict(read_json(point / "config.json")))
    return [
        f"{name} {before[name]!r}, now {now[name]!r}"
        for name in now
        if repr(before.get(name, now[name])) != repr(now[name])
    ]


def write_run(folder: Path, args, config: ViCAConfig, trained: Trained) -> None:
    (folder / RUN_FILE).write_text(json.dumps(run_settings(args, config, trained), indent=1) + "\n", encoding="utf-8")


def run_settings(args, config: ViCAConfig, trained: Trained) -> dict:
    """Returns the settings that must not change when a run resumes. Another value would cause a traceback from deep
    within, a fresh optimizer, or weights beside others than those they were trained with."""
    deepspeed = args.deepspeed_plugin
    engine = f"DeepSpeed ZeRO-{deepspeed.zero_stage}" if deepspeed is not None else "FSDP" if args.fsdp else "none"
    adapters = {name: getattr(args, name) for name in ("lora_r", "lora_alpha", "lora_bias")} if trained.adapters else {}
    return {
        "what learns": [*trained.parts, *["adapters"] * trained.adapters],
        "optim": str(getattr(args.optim, "value", args.optim)).removesuffix("_fused"),
        "a rate of the projector's own": args.mm_projector_lr is not None,
        "engine": engine,
        "processes": args.world_size if deepspeed is not None else None,  # ZeRO's pieces fit this number only
        "model_name_or_path": None if trained.whole else one_name(config.name_or_path),
        **adapters,
    }


def fixed_settings(config: ViCAConfig) -> dict:
    """Returns the model settings of a run. accel and mask train the same function, so a run may change between them."""
    return {"dense": config.variant == "dense", **{name: getattr(config, name) for name in FIXED}}
