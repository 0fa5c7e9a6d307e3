"""Half precision against float32: how far mask and accel stray, kernel by kernel.

    python -m vica.bench.precision --layers 4 32 --dtype bfloat16 float16 --markdown out.md

Random weights of LLaVA-1.5-7B's width. The reference is mask in float32 on the same (rounded) weights, so that only
arithmetic differs. Error is ||x - ref|| / ||ref|| over the text logits; accel is held to 1.25 times mask's own.
"""

import argparse
import math
import platform
import sys
from importlib.util import find_spec

import torch
import transformers

from ..model.llava import ViCAForConditionalGeneration
from ..plan.config import ViCAConfig
from .models import random_model
from .report import git_commit

BOUND = 1.25
IMAGE = -200
SEVEN_B = dict(hidden_size=4096, num_attention_heads=32, intermediate_size=11008, vocab_size=32000)
T2V_LAYERS = [0, 1, 7, 8, 9, 10, 11, 14]
# Sequences as (tokens before, image sizes each followed by text). "ragged" mixes lengths, sizes, counts and a sequence
# without an image.
BATCHES = {
    "uniform": [(35, [(576, 25)])] * 4,
    "ragged": [(35, [(576, 25)]), (12, [(576, 3), (144, 60)]), (0, [(576, 90)]), (70, [])],
}


def build(layers: int, device, dtype) -> ViCAForConditionalGeneration:
    t2v = [x for x in T2V_LAYERS if x < layers] if layers > 8 else [0, layers // 2]
    config = ViCAConfig(
        text_config=dict(SEVEN_B, num_hidden_layers=layers, max_position_embeddings=4096), t2v_layers=t2v
    )
    return random_model(config, device, dtype)


def make_inputs(batch, width: int, device) -> dict:
    random = torch.Generator().manual_seed(1)
    sequences, features = [], []
    for before, images in batch:
        one = torch.randint(3, 32000, (before,), generator=random).tolist()
        for size, after in images:
            one += [IMAGE, *torch.randint(3, 32000, (after,), generator=random).tolist()]
            features.append((torch.randn(size, width, generator=random) * 0.8).to(device))
        sequences.append(one)
    longest = max(map(len, sequences))
    ids = torch.tensor([[0] * (longest - len(s)) + s for s in sequences])
    mask = torch.tensor([[0] * (longest - len(s)) + [1] * len(s) for s in sequences])
    return dict(input_ids=ids.to(device), attention_mask=mask.to(device), image_features=features)


@torch.no_grad()
def text_logits(model, inputs, variant: str, kernel: str | None) -> torch.Tensor:
    model.set_variant(variant)
    model.model.kernel_name = kernel
    features = [x.to(model.dtype) for x in inputs["image_features"]]
    logits = model(inputs["input_ids"], inputs["attention_mask"], image_features=features, use_cache=False).logits
    text = (inputs["attention_mask"] == 1) & (inputs["input_ids"] != IMAGE)
    return logits[text].float()


def gradients(model, inputs, variant: str, kernel: str | None) -> torch.Tensor:
    """Returns all gradients that reach the image features, as one vector."""
    model.set_variant(variant)
    model.model.kernel_name = kernel
    features = [x.to(model.dtype).requires_grad_() for x in inputs["image_features"]]
    labels = inputs["input_ids"]
    model(inputs["input_ids"], inputs["attention_mask"], image_features=features, labels=labels).loss.backward()
    model.zero_grad(set_to_none=True)
    return torch.cat([x.grad.flatten() for x in features]).float()


def relative(x: torch.Tensor, reference: torch.Tensor) -> float:
    return ((x - reference).norm() / reference.norm()).item()


def runs() -> list[tuple[str, str]]:
    """Returns (variant, kernel) pairs, mask first."""
    kernels = ["sdpa", "varlen"] if torch.cuda.is_available() else ["sdpa"]
    kernels += ["flash_attn"] if find_spec("flash_attn") else []
    return [("mask", "sdpa"), ("mask", "eager"), *(("accel", k) for k in [*kernels, "eager"])]


def compare(layers: int, dtype: torch.dtype, device) -> list[tuple]:
    model = build(layers, device, dtype)
    inputs = {name: make_inputs(batch, SEVEN_B["hidden_size"], device) for name, batch in BATCHES.items()}
    half = {(n, r): text_logits(model, x, *r) for n, x in inputs.items() for r in runs()}
    half_grads = {r: gradients(model, inputs["ragged"], *r) for r in runs()} if layers <= 8 else {}
    model = model.float()
    rows: list[tuple] = []
    for name, x in inputs.items():
        reference = text_logits(model, x, "mask", "sdpa")
        own = relative(half[name, ("mask", "sdpa")], reference)
        for run in runs():
            logits = half[name, run]
            agree = (logits.argmax(-1) == reference.argmax(-1)).float().mean().item()
            rows.append((layers, dtype, name, "logits", *run, relative(logits, reference), own, agree))
    if half_grads:
        reference = gradients(model, inputs["ragged"], "mask", "sdpa")
        own = relative(half_grads["mask", "sdpa"], reference)
        for run, grad in half_grads.items():
            rows.append((layers, dtype, "ragged", "gradient", *run, relative(grad, reference), own, None))
    return rows


def render(rows: list[tuple]) -> str:
    lines = [
        "| layers | dtype | batch | of | variant | kernel | error | times mask's | greedy agreement |",
        "|" + "---|" * 9,
    ]
    for layers, dtype, batch, what, variant, kernel, error, own, agree in rows:
        greedy = "" if agree is None else f"{100 * agree:.1f}%"
        name = str(dtype).removeprefix("torch.")
        cells = (layers, name, batch, what, variant, kernel, f"{error:.3e}", f"{error / own:.3f}", greedy)
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def header(args: argparse.Namespace) -> str:
    card = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or "CPU"
    layers, dtypes = " ".join(map(str, args.layers)), " ".join(args.dtype)
    command = f"python -m vica.bench.precision --layers {layers} --dtype {dtypes}"
    return (
        f"# Precision\n\n{__doc__.split(chr(10) * 2, 2)[2]}\n"
        f"- command: `{command}`\n- commit: {args.commit or git_commit() or 'unknown'}\n- hardware: {card}\n"
        f"- torch {torch.__version__}, transformers {transformers.__version__}, Python {platform.python_version()}\n"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, nargs="+", default=[4, 32])
    parser.add_argument("--dtype", nargs="+", default=["bfloat16", "float16"], choices=["bfloat16", "float16"])
    parser.add_argument("--commit", help="where the code is no git checkout: what commit it is of")
    parser.add_argument("--markdown", help="write the report here too")
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rows = [row for n in args.layers for d in args.dtype for row in compare(n, getattr(torch, d), device)]
    ratios = [row[6] / row[7] for row in rows if row[4] == "accel"]
    worst = max(ratios, key=lambda x: math.inf if math.isnan(x) else x)
    verdict = f"Largest error of accel: {worst:.3f} times mask's own (bound {BOUND})."
    report = f"{header(args)}\n{render(rows)}\n\n{verdict}\n"
    print(report)
    if args.markdown:
        with open(args.markdown, "w", encoding="utf-8") as file:
            file.write(report)
    return 0 if worst <= BOUND else 1  # NaN fails


if __name__ == "__main__":
    sys.exit(main())
