"""How every program of the project ends (exit code, one-line errors), what it logs, and how transformers is kept
quiet."""

import logging
import sys
from collections.abc import Callable

from .errors import ViCAError

log = logging.getLogger(__name__)

DEFAULT = "(default: %(default)s)"  # argparse fills it in
LEVELS = ("debug", "info", "warning", "error")


def exit_status(name: str, work: Callable[[], int | None], interrupted: str = "") -> int:
    """Does the work and returns the program's exit code. An error that a user can fix is one line on stderr, any other
    a traceback; Ctrl-C says no more than `interrupted`."""
    try:
        return work() or 0
    except (ViCAError, OSError) as error:
        said = " ".join(str(error).split())  # transformers writes OSErrors of many lines
        log.debug("raised here:", exc_info=True)
    except KeyboardInterrupt:
        if interrupted:
            print(f"{name}: {interrupted}", file=sys.stderr)
        return 130
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        said = f"out of memory: {str(error).splitlines()[0]}"
    print(f"{name}: {said}", file=sys.stderr)
    return 1


def is_out_of_memory(error: Exception) -> bool:
    """Whether torch raised it, which is not imported to ask."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(error, torch.OutOfMemoryError)


def start_logging(level: str) -> None:
    """Shows our log, and transformers', from a level of LEVELS on. At "warning" nothing is set up: Python then prints
    warnings as they are, and a program around us may have handlers of its own."""
    if level != "warning":
        logging.basicConfig(format="%(levelname)s %(name)s: %(message)s")
        logging.getLogger("vica").setLevel(level.upper())


def quiet_transformers() -> None:
    """Silences transformers' bars and warnings, unless the user asked for a log."""
    from transformers.utils import logging as transformers_logging

    asked = logging.getLogger("vica").level
    transformers_logging.set_verbosity(asked if 0 < asked < logging.WARNING else logging.ERROR)
    transformers_logging.disable_progress_bar()
