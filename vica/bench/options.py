"""What `vica bench` can be asked for: its verbs, their flags, the device's defaults and the names of columns.

Kept apart from what measures, which imports torch: help and wrong flags are told without it.
"""

import argparse
from collections.abc import Callable
from dataclasses import dataclass

from ..train.flags import STAGES

# Every column that a table or a plot may have: its name on the command line and in the JSON, and its title.
COLUMNS = {
    "transformers": "transformers LLaVA, SDPA",
    "static": "  the same, static cache, compiled",
    "batched": "  the same, best batch",
    "text": "transformers, text only",
    "mask": "ours, mask, plain model",
    "dense": "ours, dense, engine",
    "accel": "ours, accel, plain model",
    "nothing": "ours, accel, engine, nothing kept",
    "prefix": "ours, accel, engine, prefix kept",
    "image": "ours, accel, engine, prefix and image kept",
}
TRAINING_COLUMNS = {
    "transformers": "transformers LLaVA, SDPA, padded",
    "mask": "ours, mask, padded",
    "dense": "ours, dense, packed, flash",
    "accel": "ours, accel, packed, flash",
    "stored": "  the same, without checkpointing",
}
THROUGHPUT_COLUMNS = ("transformers", "batched", "dense", "nothing", "prefix", "image")
# columns, and the variant whose formula applies
MEMORY_COLUMNS = {"transformers": "dense", "dense": "dense", "prefix": "accel"}
PHASES = {
    "tower": "tower and projector, ms",
    "prefill": "prefill from features to the first token, {args.prefix} + {visual} + {args.text} tokens, ms",
    "visual": "the same against visual tokens an image, batch {args.visual_batch}, ms",
    "first": "first token from pixels, {args.prefix} + {visual} + {args.text} tokens, ms",
    "decode": "decode, ms a step, over {args.steps} steps",
    "generate": "decode through engine.generate, ms a step",
}
PRESETS = ("3b", "7b", "13b", "toy")
POPE_QUESTIONS, POPE_IMAGES = 8910, 500


def add_model(parser: argparse.ArgumentParser) -> None:
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--preset", choices=PRESETS, help="random weights of this shape")
    which.add_argument("--model", metavar="M", help="a real checkpoint: folder or hub repository")
    parser.add_argument("--device", help="cpu, cuda or cuda:N (default: cuda where there is one)")
    parser.add_argument("--dtype", help="default: bfloat16 on CUDA, float32 on a CPU")


def add_lengths(parser) -> None:
    parser.add_argument("--prefix", type=int, default=35, help="tokens before the image (35, as in LLaVA's prompt)")
    parser.add_argument("--text", type=int, default=25, help="tokens after it (25)")


def add_columns(parser, names) -> None:
    names = list(names)
    parser.add_argument("--columns", nargs="+", choices=names, default=names, metavar="COLUMN", help=" ".join(names))


def add_latency(parser) -> None:
    phases = list(PHASES)
    parser.add_argument("--phases", nargs="+", choices=phases, default=phases, metavar="PHASE", help=" ".join(phases))
    add_columns(parser, (column for column in COLUMNS if column != "batched"))  # here every column has a batch
    parser.add_argument("--batch", type=int, nargs="+")
    parser.add_argument("--visual", type=int, nargs="+", help="tokens an image, in phase visual")
    parser.add_argument("--visual-batch", type=int, help="the batch there")
    parser.add_argument(
        "--compile-batch", type=int, nargs="*", help="batches that transformers' decode is compiled for"
    )
    parser.add_argument("--steps", type=int, help="of decoding")
    parser.add_argument("--repeats", type=int, help="the median of so many is told")


def add_throughput(parser) -> None:
    parser.add_argument("--questions", type=int)
    parser.add_argument("--images", type=int, help=f"default: as POPE, {POPE_IMAGES} to {POPE_QUESTIONS} questions")
    parser.add_argument("--answer", type=int, default=4, help="tokens of each answer")
    parser.add_argument("--peer-questions", type=int, help="of them for dense and transformers; at least two batches")
    parser.add_argument("--peer-batch", type=int, nargs="+", help="sizes to choose the best from")
    parser.add_argument("--max-batch", type=int, help="of our engine (default: its own)")
    parser.add_argument("--repeats", type=int, help="the median of so many is told")
    add_columns(parser, THROUGHPUT_COLUMNS)


def add_evaluation(parser) -> None:
    parser.add_argument("--questions", type=int, help="at most, of each benchmark; as many images as belong to them")
    parser.add_argument("--peer-questions", type=int, help="of them for transformers")
    parser.add_argument("--max-batch", type=int, help="of our engine (default: its own)")


def add_memory(parser) -> None:
    parser.add_argument("--requests", type=int, help="at once")
    parser.add_argument("--answer", type=int, help="tokens each may answer")
    parser.add_argument("--questions", type=int, nargs="+", default=[1, 18], help="on each image (1 18)")
    parser.add_argument("--visual", type=int, help="tokens an image (default: the model's own)")
    add_columns(parser, MEMORY_COLUMNS)


def add_counted(parser) -> None:
    parser.add_argument(
        "--visual", type=int, nargs="+", help="tokens an image (default: the model's own, 1152 and 2880)"
    )


def add_training(parser) -> None:
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES), metavar="STAGE")
    parser.add_argument("--samples", type=int, help="in one round; batches are of like lengths, as the recipe's")
    parser.add_argument("--batch", type=int, nargs=2, metavar="N", help="samples a step in stage 1 and in stage 2")
    parser.add_argument("--repeats", type=int, help="rounds")
    parser.add_argument("--seed", type=int, default=0)
    add_columns(parser, TRAINING_COLUMNS)


@dataclass(frozen=True)
class Verb:
    """One measurement. `module` of this folder runs it; `cuda` and `cpu` are the device's defaults of its flags."""

    module: str
    summary: str
    add_arguments: Callable
    cuda: dict
    cpu: dict
    one_length: bool = True  # prompts are of one length, which flags set
    plots: bool = False

    @property
    def epilog(self) -> str:
        def told(defaults: dict) -> str:
            return " ".join(f"--{name.replace('_', '-')} {value}" for name, value in defaults.items())

        return f"Defaults on CUDA: {told(self.cuda)}. On a CPU: {told(self.cpu)}." if self.cuda else ""


VERBS = {
    "latency": Verb(
        "latency",
        "Measure the time of each phase: tower, prefill (against batch and visual tokens), first token, decode.",
        add_latency,
        cuda=dict(
            batch=[1, 8, 32, 64], visual=[576, 1152, 2880], visual_batch=8, compile_batch=[1], steps=32, repeats=5
        ),
        # Only as much as runs in a minute; compiling transformers' decode alone takes that long.
        cpu=dict(batch=[1, 2], visual=[576, 1152], visual_batch=1, compile_batch=[], steps=8, repeats=2),
        plots=True,
    ),
    "throughput": Verb(
        "throughput",
        "Measure questions a second on a workload shaped like POPE: many questions on few images, answers of up to "
        "four tokens.",
        add_throughput,
        cuda=dict(questions=POPE_QUESTIONS, peer_questions=128, peer_batch=[8, 16, 32, 64], repeats=3),
        cpu=dict(questions=54, peer_questions=2, peer_batch=[2, 4], repeats=1),
    ),
    "eval": Verb(
        "evaluation",
        "Estimate the hours of nine benchmarks: vica eval from JPEG files to answers on disk, against one question at "
        "a time.",
        add_evaluation,
        cuda=dict(questions=4455, peer_questions=64),
        cpu=dict(questions=12, peer_questions=2),
        one_length=False,
    ),
    "memory": Verb(
        "memory",
        "Measure the memory of running requests: K/V by measurement and by formula, and the device's peak.",
        add_memory,
        cuda=dict(requests=36, answer=16),
        cpu=dict(requests=18, answer=4),
    ),
    "flops": Verb(
        "counted", "Count the FLOPs of a prompt by formula from the config alone.", add_counted, cuda={}, cpu={}
    ),
    "train": Verb(
        "training",
        "Measure training steps of both stages: samples a second and peak memory of accel beside dense, mask and "
        "transformers.",
        add_training,
        cuda=dict(samples=128, batch=[32, 16], repeats=3),
        cpu=dict(samples=8, batch=[4, 4], repeats=1),
        one_length=False,
    ),
}
