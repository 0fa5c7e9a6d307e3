"""The generation config beside a checkpoint, read and made fit to be written."""

import copy
from pathlib import Path

from transformers import GenerationConfig

from ..utils.errors import ViCAError
from ..utils.files import read_json

FILE = "generation_config.json"


def read_generation(folder: Path) -> GenerationConfig | None:
    """Returns the saved generation config, or None where none was saved."""
    if not (folder / FILE).is_file():
        return None
    settings = read_json(folder / FILE)
    try:
        return GenerationConfig.from_dict(settings)
    except (ValueError, TypeError) as error:
        raise ViCAError(f"{folder / FILE} is no generation config: {' '.join(str(error).split())}") from error


def savable(generation: GenerationConfig) -> GenerationConfig:
    """Returns `generation`, or a copy without what greedy decoding does not use, such as Vicuna's temperature, which
    transformers refuses to write."""
    if generation.do_sample:
        return generation
    greedy = copy.deepcopy(generation)
    greedy.temperature = greedy.top_p = greedy.top_k = None
    return greedy
