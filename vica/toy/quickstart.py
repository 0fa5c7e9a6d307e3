"""The main job on what the repository holds: one picture, one question, three variants, one table."""

import argparse
import sys
import tempfile
import time
from pathlib import Path

import torch
from transformers.utils import logging as transformers_logging

from ..data.images import load_image
from ..errors import ViCAError
from ..loading import load
from ..model.flops import visual_flops
from ..model.sizes import kv_bytes, visual_tokens
from ..table import table
from .model import save

PICTURE = Path(__file__).parents[2] / "playground" / "toy" / "picture.png"
TITLES = (
    "",
    "same tokens as mask",
    "largest logit difference",
    "prefill, ms",
    "answer, ms",
    "FLOPs of visual tokens",
    "KV bytes, the picture",
    "KV bytes, a text token",
)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--image", default=str(PICTURE))
    parser.add_argument("--question", default="What is in the picture?")
    parser.add_argument("--max-new-tokens", type=int, default=16)
    args = parser.parse_args(argv)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        picture = load_image(args.image)
        with tempfile.TemporaryDirectory() as folder:
            model, processor = load(save(Path(folder) / "toy"), device="cpu")
    except ViCAError as error:
        print(f"quickstart: {error}", file=sys.stderr)
        return 1
    report(model, processor, picture, args)
    return 0


def report(model, processor, picture, args) -> None:
    inputs = processor.ask(args.question, [picture])
    config = model.config
    millions = sum(p.numel() for p in model.parameters()) / 1e6
    wiring = f"T2V layers {config.t2v_layers} of {config.text_config.num_hidden_layers}"
    print(f"A small model ({millions:.1f}M parameters, {wiring}) with RANDOM weights: its answers mean nothing,")
    print("its arithmetic does.")
    print(f"Picture {Path(args.image).name}: {visual_tokens(config)} visual tokens. Question: {args.question}\n")
    runs = {variant: measure(model, inputs, variant, args.max_new_tokens) for variant in ("mask", "accel", "dense")}
    print(table(list(zip(TITLES, *(table_column(model, name, run, runs["mask"]) for name, run in runs.items())))))
    answer = processor.decode(runs["accel"]["tokens"], skip_special_tokens=True)
    print(f"\naccel answers: {answer!r}")
    print("mask and accel are one function; dense is plain LLaVA, another function of the same weights.")


@torch.inference_mode()
def measure(model, inputs, variant: str, new_tokens: int, repeats: int = 5) -> dict:
    model.set_variant(variant)
    features = list(model.get_image_features(inputs["pixel_values"]))  # the tower costs every variant the same
    inputs = {"input_ids": inputs["input_ids"], "attention_mask": inputs["attention_mask"], "image_features": features}
    times = []
    for _ in range(repeats + 1):  # the first warms up
        start = time.perf_counter()
        logits = model(**inputs, use_cache=True).logits
        times.append(time.perf_counter() - start)
    start = time.perf_counter()
    out = model.generate(**inputs, max_new_tokens=new_tokens, do_sample=False, eos_token_id=None, pad_token_id=3)
    answer = time.perf_counter() - start
    tokens = out[0, inputs["input_ids"].shape[1] :]
    return dict(logits=logits, tokens=tokens, prefill=sorted(times[1:])[repeats // 2], answer=answer)


def table_column(model, variant: str, run: dict, referee: dict) -> tuple[str, ...]:
    model.set_variant(variant)
    visual = visual_tokens(model.config)
    image_token, text_token = kv_bytes(model.config, bytes_each=model.dtype.itemsize)
    if variant == "mask":  # computes and keeps all, to be the plain referee; what it stands for is accel's cost
        compared, cost = ("-", "-"), ("as dense", "as dense")
    else:
        same = "yes" if torch.equal(run["tokens"], referee["tokens"]) else "no"
        compared = (same, f"{(run['logits'] - referee['logits']).abs().max():.1e}")
        cost = (f"{visual_flops(model.config, visual):.2e}", f"{image_token * visual:,}")
    if variant == "dense":
        compared = ("another function", "-")
    return (variant, *compared, f"{1000 * run['prefill']:.1f}", f"{1000 * run['answer']:.0f}", *cost, f"{text_token:,}")


if __name__ == "__main__":
    sys.exit(main())
