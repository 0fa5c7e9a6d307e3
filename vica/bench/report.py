"""Reports a measurement: tables to read, and one JSON object with all raw figures and their origin."""

import json
import platform
import shlex
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import torch
import transformers

OWN = ("mask", "dense", "accel", "stored", "nothing", "prefix", "image")


@dataclass
class Report:
    sections: list[str]  # for print
    figures: dict  # raw, in JSON's types only
    failures: list[str] = field(default_factory=list)


def origin(commit: str | None) -> dict:
    """Returns the hardware, versions, command and commit that belong to every figure."""
    cuda = torch.cuda.is_available()
    # without folders, which say nothing to others
    words = [Path(word).name if Path(word).is_absolute() else word for word in sys.argv[1:]]
    return {
        "hardware": torch.cuda.get_device_name()
        if cuda
        else f"{platform.machine()} CPU, {torch.get_num_threads()} threads",
        "torch": torch.__version__,
        "cuda": torch.version.cuda if cuda else None,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "command": shlex.join(["vica", *words]),
        "commit": commit or git_commit() or "unknown",
    }


def git_commit() -> str:
    """Returns the commit of the checkout that holds this file; empty if there is none."""
    command = ["git", "describe", "--always", "--dirty", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent).stdout.strip()
    except OSError:
        return ""


def heading(about: dict, what: dict) -> str:
    cuda = f" (CUDA {about['cuda']})" if about["cuda"] else ""
    return (
        f"{title(about, what)}\ntorch {about['torch']}{cuda}, transformers {about['transformers']}, "
        f"Python {about['python']}, commit {about['commit']}: {about['command']}"
    )


def title(about: dict, what: dict) -> str:
    weights = "random weights, " if what["random_weights"] else ""
    dtype = f"{what['dtype']}, " if what["dtype"] else ""
    prefix = {True: "frozen", False: "not frozen"}.get(
        what["freeze_prefix"], f"frozen from layer {what['freeze_prefix']}"
    )
    return f"{what['model']}, {weights}{dtype}T2V layers {what['t2v_layers']}, prefix {prefix}; {about['hardware']}"


def as_json(about: dict, figures: dict) -> str:
    return json.dumps({**about, **figures}, allow_nan=False)


def own_failures(cells: list[dict]) -> list[str]:
    """Returns the failures of our own columns, which are bugs. A peer's failure or a full card is a finding."""
    bugs = [c for c in cells if c["column"] in OWN and c["failure"] not in (None, "out of memory")]
    return [f"{c['column']}: {c['failure']}" for c in bugs]


def ratio(value: float | None, by: float | None) -> str:
    return f"{by / value:.1f}x" if value and by else ""
