"""Where a checkpoint lies: a folder here, or a repository of the Hugging Face hub.

Kept apart from what reads checkpoints: a wrong path is told before torch and transformers are imported.
"""

import os
from pathlib import Path
from typing import Any

from ..utils.errors import ViCAError

SHARD_SIZE = "5GB"
SMALL_FILES = ["*.json", "*.model", "*.txt", "*.jinja"]
NON_LORA_FILE = "non_lora_trainables.bin"  # LLaVA's name for the weights that learned beside adapters


def find_folder(path_or_repo: str | os.PathLike, weights: bool = True, **hub_kwargs: Any) -> Path:
    """Returns a local folder as it is, or a hub repository's folder, from the hub's cache or downloaded. Without
    `weights`, only small files are downloaded."""
    folder = Path(path_or_repo)
    if folder.is_dir():
        return folder
    if folder.exists() or folder.is_absolute() or str(path_or_repo).startswith("."):
        raise ViCAError(f"{path_or_repo} is no folder with a checkpoint")
    import huggingface_hub  # half a second, which a path need not wait for
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        found = huggingface_hub.snapshot_download(str(path_or_repo), allow_patterns=SMALL_FILES, **hub_kwargs)
        kinds = ("*.safetensors", "*.bin")
        for kind in kinds if weights else ():
            if not any(Path(found).glob(kinds[0])):
                patterns = [kind, NON_LORA_FILE]
                huggingface_hub.snapshot_download(str(path_or_repo), allow_patterns=patterns, **hub_kwargs)
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ViCAError(f"{path_or_repo} is no folder here and cannot be had from the hub: {reason}") from error
    return Path(found)
