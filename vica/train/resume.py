"""Where a run goes on from that is started again, and whether that is a checkpoint of the same run."""

from pathlib import Path

from transformers.trainer_utils import get_last_checkpoint

from ..errors import ViCAError
from ..model.checkpoint import read_json
from ..model.config import ViCAConfig
from .saving import TRAINED_FILE

# What weights are trained with and the saved model is asked with: other values make it another run.
SETTLED = ("t2v_layers", "freeze_prefix", "conversation", "image_aspect_ratio")


def resume_point(args, config: ViCAConfig, whole: bool) -> str | None:
    """As LLaVA does: the newest checkpoint in the output folder, unless another is named.
    `whole`: this run's checkpoints hold the whole model, not only what learns."""
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
    if differs := differences(Path(point), config, whole):
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


def settled(config: ViCAConfig) -> dict:
    """accel and mask train the same function; a run may change from one to the other."""
    return {"dense": config.variant == "dense", **{name: getattr(config, name) for name in SETTLED}}
