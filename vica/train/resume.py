"""Where a run goes on from that is started again, and whether that is a checkpoint of the same run."""

import json
from pathlib import Path

from transformers.trainer_utils import get_last_checkpoint

from ..plan.config import ViCAConfig
from ..utils.errors import ViCAError
from ..utils.files import one_name, read_json
from .saving import TRAINED_FILE
from .stages import Trained

# What weights are trained with and the saved model is asked with: other values make it another run.
SETTLED = ("t2v_layers", "freeze_prefix", "conversation", "image_aspect_ratio")
RUN_FILE = "run.json"  # in a checkpoint: what its optimizer's state and its adapters fit


def resume_point(args, config: ViCAConfig, trained: Trained) -> str | None:
    """As LLaVA does: the newest checkpoint in the output folder, unless another is named."""
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
    held, now = {}, run_settings(args, config, trained) | settled(config)
    if (point / RUN_FILE).is_file():
        held |= read_json(point / RUN_FILE)
    if (point / "config.json").is_file():  # not where FSDP leaves pieces
        held |= settled(ViCAConfig.from_dict(read_json(point / "config.json")))
    return [
        f"{name} {held[name]!r}, now {now[name]!r}"
        for name in now
        if repr(held.get(name, now[name])) != repr(now[name])
    ]


def write_run(folder: Path, args, config: ViCAConfig, trained: Trained) -> None:
    (folder / RUN_FILE).write_text(json.dumps(run_settings(args, config, trained), indent=1) + "\n", encoding="utf-8")


def run_settings(args, config: ViCAConfig, trained: Trained) -> dict:
    """Other values than at the last start would be a traceback from deep within, an optimizer that begins anew, or
    weights beside others than they have learned with."""
    deepspeed = args.deepspeed_plugin
    engine = f"DeepSpeed ZeRO-{deepspeed.zero_stage}" if deepspeed is not None else "FSDP" if args.fsdp else "none"
    adapters = {name: getattr(args, name) for name in ("lora_r", "lora_alpha", "lora_bias")} if trained.adapters else {}
    return {
        "what learns": [*trained.parts, *["adapters"] * trained.adapters],
        "optim": str(getattr(args.optim, "value", args.optim)).removesuffix("_fused"),
        "a rate of the projector's own": args.mm_projector_lr is not None,
        "engine": engine,
        "processes": args.world_size if deepspeed is not None else None,  # ZeRO's pieces are for so many
        "model_name_or_path": None if trained.whole else one_name(config.name_or_path),
        **adapters,
    }


def settled(config: ViCAConfig) -> dict:
    """accel and mask train the same function; a run may change from one to the other."""
    return {"dense": config.variant == "dense", **{name: getattr(config, name) for name in SETTLED}}
