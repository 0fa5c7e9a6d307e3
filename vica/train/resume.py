"""Where a run goes on from that is started again, and whether that is a checkpoint of the same run."""

import json
from pathlib import Path

from transformers.trainer_utils import get_last_checkpoint

from ..errors import ViCAError
from ..model.checkpoint import read_json
from ..model.config import ViCAConfig
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
    if differs := differences(Path(point), config, trained.whole) or other_settings(Path(point), args, trained):
        raise ViCAError(f"{point} is of another run: {'; '.join(differs)}. Give this one another --output_dir")
    return point


def differences(point: Path, config: ViCAConfig, whole: bool) -> list[str]:
    if (point / TRAINED_FILE).is_file() == whole:
        kinds = ("stage 1 or adapters, now the whole model", "the whole model, now stage 1 or adapters")
        return [kinds[not whole]]
    if not (point / "config.json").is_file():  # where FSDP leaves pieces
        return []
    held, now = (settled(x) for x in (ViCAConfig.from_dict(read_json(point / "config.json")), config))
    return [f"{name} {held[name]!r}, now {now[name]!r}" for name in now if repr(held[name]) != repr(now[name])]


def write_run(folder: Path, args, trained: Trained) -> None:
    (folder / RUN_FILE).write_text(json.dumps(run_settings(args, trained), indent=1) + "\n", encoding="utf-8")


def other_settings(point: Path, args, trained: Trained) -> list[str]:
    if not (point / RUN_FILE).is_file():
        return []
    held, now = read_json(point / RUN_FILE), run_settings(args, trained)
    return [f"{name} {held[name]!r}, now {now[name]!r}" for name in now if name in held and held[name] != now[name]]


def run_settings(args, trained: Trained) -> dict:
    """Other values than at the last start would be a traceback from deep within, or an optimizer that begins anew."""
    zero = 0 if args.deepspeed_plugin is None else args.deepspeed_plugin.zero_stage
    engine = f"DeepSpeed ZeRO-{zero}" if args.deepspeed_plugin is not None else "FSDP" if args.fsdp else "none"
    adapters = {name: getattr(args, name) for name in ("lora_r", "lora_alpha", "lora_bias")} if trained.adapters else {}
    return {
        "what learns": [*trained.parts, *["adapters"] * trained.adapters],
        "optim": str(getattr(args.optim, "value", args.optim)).removesuffix("_fused"),
        "a rate of the projector's own": args.mm_projector_lr is not None,
        "engine": engine,
        "processes": args.world_size if args.deepspeed_plugin is not None else None,  # ZeRO's pieces are for so many
        **adapters,
    }


def settled(config: ViCAConfig) -> dict:
    """accel and mask train the same function; a run may change from one to the other."""
    return {"dense": config.variant == "dense", **{name: getattr(config, name) for name in SETTLED}}
