"""Arguments and steps that several verbs share.

Help and mistakes are told before torch and transformers are imported, which takes seconds: here and in the verbs, what
needs them is imported where it is used.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, redirect_stdout
from typing import TYPE_CHECKING

from ..plan.vica import VARIANTS
from ..plan.wiring import Wiring
from ..utils.errors import ViCAError
from ..utils.program import DEFAULT, LEVELS, quiet_transformers

if TYPE_CHECKING:
    from ..data.processor import ViCAProcessor
    from ..model.llava import ViCAForConditionalGeneration

ANSWERS = dict(max_new_tokens=512, temperature=0.0, top_p=1.0, top_k=0)  # the engine's Request has the same defaults


def add_logging(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--log-level", choices=LEVELS, default="warning", help=f"least severe messages on stderr {DEFAULT}"
    )


def add_json(parser: argparse.ArgumentParser, schema: str) -> None:
    """`schema`: what the object holds, for --help."""
    parser.add_argument("--json", action="store_true", help="print the result as JSON, and nothing else on stdout")
    parser.epilog = f"With --json stdout holds one JSON object: {schema}"


@contextmanager
def json_alone(args: argparse.Namespace) -> Iterator[None]:
    """With --json, sends to stderr what else is printed: libraries greet on stdout. `print_json` keeps the real one."""
    args.stdout = sys.stdout
    with redirect_stdout(sys.stderr) if getattr(args, "json", None) is True else nullcontext():
        yield


def print_json(args: argparse.Namespace, result: dict) -> None:
    """In ASCII: JSON may hold half a character, which no terminal takes."""
    print(json.dumps(result, indent=1), file=args.stdout)


def add_wiring(parser: argparse.ArgumentParser, variant: str | None = None) -> None:
    """`variant` given: the verb leaves no choice of it."""
    group = parser.add_argument_group("wiring (default: as the checkpoint says)")
    if variant is None:
        group.add_argument("--variant", choices=VARIANTS)
    parser.set_defaults(variant=variant)
    group.add_argument("--t2v-layers", metavar="LIST", help='a JSON list such as "[0,1,7,8]"; goes before T2V_LAYERS')
    group.add_argument("--freeze-prefix", metavar="RULE", help="true, false, or the first layer that freezes it")
    group.add_argument(
        "--config", metavar="FILE", help="a file of configs/: layers and prefix rule of a published model"
    )


def add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", required=True, metavar="M", help="checkpoint folder or hub repository")
    parser.add_argument("--device", help="cpu, cuda or cuda:N (default: cuda where there is one)")
    parser.add_argument("--dtype", help="float32, float16, bfloat16 (default: the checkpoint's)")
    add_wiring(parser)


def add_generation(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("answers")
    group.add_argument("--max-new-tokens", type=int, default=ANSWERS["max_new_tokens"], metavar="N", help=DEFAULT)
    group.add_argument("--temperature", type=float, default=ANSWERS["temperature"], help=f"0: greedy {DEFAULT}")
    group.add_argument("--top-p", type=float, default=ANSWERS["top_p"], help=DEFAULT)
    group.add_argument("--top-k", type=int, default=ANSWERS["top_k"], help=f"0: all tokens {DEFAULT}")
    group.add_argument("--seed", type=int, default=0, help=DEFAULT)
    group.add_argument(
        "--stop", action="append", default=[], metavar="TEXT", help="end the answer before this text; again for several"
    )
    group.add_argument("--template", metavar="NAME", help="prompt template (default: the checkpoint's)")
    group.add_argument("--image-mode", metavar="MODE", help="pad, resize or crop (default: the checkpoint's)")


def load_for_answers(args: argparse.Namespace) -> tuple[ViCAForConditionalGeneration, ViCAProcessor]:
    from ..loading import load_wired

    quiet_transformers()
    model, processor = load_wired(args.model, Wiring.of_flags(args), args.device, args.dtype)
    if processor is None:
        raise ViCAError(f"{args.model} holds no tokenizer, so it cannot be asked anything")
    return model, processor.changed(args.template, args.image_mode)


def generation_options(args: argparse.Namespace) -> dict:
    """Returns what `add_generation` asks for, checked, as settings of a Request."""
    from ..engine import Request

    options = {name: getattr(args, name) for name in (*ANSWERS, "seed", "stop")}
    Request([], **options).check()
    return options
