"""How every program of the project ends (exit code, one-line errors), and how transformers is kept quiet."""

import sys
from collections.abc import Callable

import torch
from transformers.utils import logging as transformers_logging

from .errors import ViCAError

DEFAULT = "(default: %(default)s)"  # argparse fills it in


def exit_status(name: str, work: Callable[[], int | None], interrupted: str = "") -> int:
    """What a user can mend is one line on stderr, anything else a traceback; Ctrl-C says no more than `interrupted`."""
    try:
        return work() or 0
    except (ViCAError, OSError) as error:
        said = " ".join(str(error).split())  # transformers writes OSErrors of many lines
    except torch.OutOfMemoryError as error:
        said = f"out of memory: {str(error).splitlines()[0]}"
    except KeyboardInterrupt:
        if interrupted:
            print(f"{name}: {interrupted}", file=sys.stderr)
        return 130
    print(f"{name}: {said}", file=sys.stderr)
    return 1


def quiet_transformers() -> None:
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
