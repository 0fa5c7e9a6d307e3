"""Draws the README's picture: one image, one question, both toy models' answers, and what each answer cost.

python -m scripts.toy.picture        writes docs/picture.png and docs/results/toy/picture.json
"""

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from scripts.toy.quickstart import PICTURES, PLAYGROUND
from vica.loading import load
from vica.plan.flops import visual_flops
from vica.plan.sizes import kv_bytes, visual_tokens
from vica.toy.score import read_questions
from vica.utils.program import exit_status, quiet_transformers

DOCS = Path(__file__).parents[2] / "docs"
MODELS = (("dense", "toy-dense"), ("ViCA", "toy-vica"))
COLOURS = {"dense": "#b4532a", "ViCA": "#1f7a6d"}
INK, PALE = "#22262b", "#e3e6ea"
ROUNDS = 40  # in which the models take turns; the quickest pass counts

# A line of the bill: its title, where its figure stands in `bill`, how it is written.
ROWS: tuple[tuple[str, str, Callable[[float], str]], ...] = (
    ("updates of visual tokens", "updated", "{:,}".format),
    ("FLOPs of the image", "visual_flops", lambda flops: f"{flops / 1e6:,.0f} million"),
    ("K/V cache of the image", "kv_bytes", lambda size: f"{size / 1024:,.0f} KiB"),
    ("prefill on one CPU core", "prefill_ms", "{:.1f} ms".format),
)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m scripts.toy.picture", description=__doc__.splitlines()[0])
    parser.add_argument("--question", type=int, default=3, metavar="N", help="of playground/toy/pictures (default: 3)")
    parser.add_argument("--png", type=Path, default=DOCS / "picture.png")
    parser.add_argument("--json", type=Path, default=DOCS / "results/toy/picture.json")
    quiet_transformers()
    return exit_status("scripts.toy.picture", lambda: run(parser.parse_args(argv)))


def run(args) -> None:
    asked = read_questions(PICTURES / "questions.jsonl")[args.question]
    torch.set_num_threads(1)
    bills = bill(asked)
    about = dict(
        command="python -m scripts.toy.picture",
        device="CPU, one thread, float32, processor time",
        torch=torch.__version__,
    )
    question = {"image": asked["image"], "text": asked["text"].splitlines()[0], "answer": asked["answer"]}
    args.json.write_text(json.dumps({**about, "question": question, "bills": bills}, indent=1) + "\n")
    draw(args.png, question, bills)
    print(f"wrote {args.png} and {args.json}")


def bill(asked: dict) -> dict[str, dict]:
    """Return each model's answer and its price: what `counted` says, and milliseconds measured here."""
    loaded = {name: load(PLAYGROUND / "checkpoints" / folder, device="cpu", dtype="float32") for name, folder in MODELS}
    inputs = {
        name: processor.ask(asked["text"], [PICTURES / asked["image"]]) for name, (_, processor) in loaded.items()
    }
    best = dict.fromkeys(loaded, float("inf"))
    for _ in range(ROUNDS):
        for name, (model, _) in loaded.items():
            best[name] = min(best[name], prefill_seconds(model, inputs[name]))
    bills = {}
    for name, (model, processor) in loaded.items():
        out = model.generate(**inputs[name], max_new_tokens=12, do_sample=False)
        answer = processor.decode(out[0, inputs[name]["input_ids"].shape[1] :], skip_special_tokens=True).strip()
        bills[name] = {"answer": answer, **counted(model.config), "prefill_ms": round(1000 * best[name], 1)}
    return bills


@torch.inference_mode()
def prefill_seconds(model, inputs) -> float:
    """Return the processor time of one pass over the prompt; the tower's is not in it, as it costs both models the
    same. Processor time, because other work on the machine does not count in it."""
    features = list(model.get_image_features(inputs["pixel_values"]))
    start = time.process_time()
    model(inputs["input_ids"], attention_mask=inputs["attention_mask"], image_features=features, use_cache=True)
    return time.process_time() - start


def counted(config) -> dict:
    """Return what one image costs the decoder by the config alone. `updated`: token updates, one a token and layer."""
    visual = visual_tokens(config)
    return {
        "layers": [bool(layer.reads) for layer in config.plan],
        "visual_tokens": visual,
        "updated": visual * sum(layer.updates for layer in config.plan),
        "visual_flops": visual_flops(config, visual),
        "kv_bytes": visual * kv_bytes(config, bytes_each=4)[0],
    }


def draw(path: Path, question: dict, bills: dict[str, dict]) -> None:
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    pyplot.rcParams.update({"font.size": 11, "text.color": INK})
    figure = pyplot.figure(figsize=(11, 4.7))
    draw_question(figure, question)
    sheet = figure.add_axes((0.34, 0.02, 0.65, 0.96), xlim=(0, 100), ylim=(0, 100))
    sheet.axis("off")
    for place, (name, about) in enumerate((("dense", "plain LLaVA"), ("ViCA", "visual tokens stay frozen"))):
        draw_answer(sheet, 91 - 14 * place, name, about, bills[name]["answer"], bills[name]["layers"])
    for place, (title, key, form) in enumerate(ROWS):
        draw_row(sheet, 56 - 15.5 * place, title, [(name, bills[name][key]) for name in bills], form)
    figure.savefig(path, dpi=130, facecolor="white")
    pyplot.close(figure)


def draw_question(figure, question: dict) -> None:
    from PIL import Image

    axes = figure.add_axes((0.02, 0.2, 0.29, 0.74))
    axes.imshow(Image.open(PICTURES / question["image"]).resize((448, 448), Image.Resampling.LANCZOS))
    axes.set(xticks=[], yticks=[])
    for side in axes.spines.values():
        side.set_color("#b9bec5")
    figure.text(0.165, 0.085, question["text"], ha="center", fontsize=13, weight="bold")


def draw_answer(sheet, y: float, name: str, about: str, answer: str, reads: list[bool]) -> None:
    """Draw a model's name, its answer, and a square for each decoder layer, filled where text reads the image."""
    colour = COLOURS[name]
    sheet.text(0, y, name, fontsize=16, weight="bold", color=colour, va="center")
    sheet.text(0, y - 5.5, about, fontsize=9, color="#6a7078", va="center")
    box = dict(boxstyle="round,pad=0.25", facecolor="white", edgecolor=colour, linewidth=1.6)
    sheet.text(38, y - 1.3, answer, fontsize=15, weight="bold", va="center", ha="center", bbox=box)
    for layer, read in enumerate(reads):
        place = 48 + layer * 52 / len(reads)
        sheet.add_patch(rectangle((place, y - 4), 0.82 * 52 / len(reads), 6, colour if read else PALE))
    if name == "dense":
        sheet.text(48, y + 5, "decoder layers in which text sees the image", fontsize=9, color="#6a7078", va="center")
        sheet.text(38, y + 5, "answer", fontsize=9, color="#6a7078", va="center", ha="center")


def draw_row(sheet, y: float, title: str, values: list[tuple[str, float]], form: Callable[[float], str]) -> None:
    """Draw one line of the bill: a bar a model, the longest for the largest value."""
    most = max(value for _, value in values)
    sheet.text(0, y, title, fontsize=11, va="center")
    for place, (name, value) in enumerate(values):
        low = y + 0.4 - 5.4 * place
        sheet.add_patch(rectangle((38, low), 44 * value / most, 4.4, COLOURS[name]))
        sheet.text(39 + 44 * value / most, low + 2.1, form(value), fontsize=11, va="center", color=COLOURS[name])


def rectangle(corner: tuple[float, float], width: float, height: float, colour: str):
    from matplotlib.patches import Rectangle

    return Rectangle(corner, width, height, facecolor=colour, edgecolor="none")


if __name__ == "__main__":
    sys.exit(main())
