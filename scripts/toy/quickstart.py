"""Compares three variants on the repository's two trained toy models, with pictures that they never saw.

toy-vica    reads pictures in a quarter of its layers: as accel (the fast way) and as mask (the same, the slow way)
toy-dense   plain LLaVA, trained alike
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path

import torch

from scripts.toy.evaluate import answers
from vica.data.images import load_image
from vica.loading import load
from vica.plan.flops import visual_flops
from vica.plan.sizes import kv_bytes, visual_tokens
from vica.toy.score import read_questions, score
from vica.toy.write import write
from vica.utils.errors import ViCAError
from vica.utils.program import exit_status, quiet_transformers
from vica.utils.table import table

PLAYGROUND = Path(__file__).parents[2] / "playground"
PICTURES = PLAYGROUND / "toy" / "pictures"
REPEATS = 5
TITLES = (
    "", "same answers as mask", "largest logit difference", "prefill, ms", "answer, ms", "FLOPs of visual tokens",
    "KV bytes, the picture", "KV bytes, a text token",
)  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoints", type=Path, default=PLAYGROUND / "checkpoints")
    parser.add_argument("--image", help="a picture of your own; needs --question")
    parser.add_argument("--question", help="one that the toy world knows, such as: What colour is the background?")
    parser.add_argument("--pictures", type=int, default=40, metavar="N", help="of the test world (default: 40)")
    parser.add_argument("--max-new-tokens", type=int, default=12)
    quiet_transformers()
    return exit_status("quickstart", lambda: run(parser.parse_args(argv)))


def run(args) -> None:
    if (args.image is None) != (args.question is None):
        raise ViCAError("--image and --question go together")
    vica, processor = load(args.checkpoints / "toy-vica", device="cpu", dtype="float32")
    dense, _ = load(args.checkpoints / "toy-dense", device="cpu", dtype="float32")
    models = {"mask": vica, "accel": vica, "dense": dense}
    if args.image:
        asked = [dict(image=args.image, text=args.question)]
    else:
        asked = [{**q, "image": PICTURES / q["image"]} for q in read_questions(PICTURES / "questions.jsonl")]
    runs = {name: [measure(model, name, processor, q, args) for q in asked] for name, model in models.items()}
    show_answers(asked, runs)
    show_costs(models, runs)
    if not args.image:
        show_accuracy(vica, dense, processor, args.pictures)


@torch.inference_mode()
def measure(model, variant: str, processor, question: dict, args) -> dict:
    model.set_variant(variant)
    inputs = processor.ask(question["text"], [load_image(question["image"])])
    features = list(model.get_image_features(inputs["pixel_values"]))  # the tower costs the same in every variant
    inputs = {"input_ids": inputs["input_ids"], "attention_mask": inputs["attention_mask"], "image_features": features}
    times = []
    for _ in range(REPEATS + 1):  # the first warms up
        start = time.perf_counter()
        logits = model(**inputs, use_cache=True).logits
        times.append(time.perf_counter() - start)
    start = time.perf_counter()
    out = model.generate(**inputs, max_new_tokens=args.max_new_tokens, do_sample=False, pad_token_id=3)
    seconds = time.perf_counter() - start
    text = processor.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()
    return dict(logits=logits, text=text, prefill=sorted(times[1:])[REPEATS // 2], answer=seconds)


def show_answers(asked: list[dict], runs: dict[str, list[dict]]) -> None:
    for place, question in enumerate(asked):
        print(f"{Path(question['image']).name}  {question['text'].splitlines()[0]}")
        said = [f"{name}: {runs[name][place]['text']}" for name in ("accel", "mask", "dense")]
        right = f"   (right: {question['answer']})" if "answer" in question else ""
        print(f"    {'   '.join(said)}{right}")
    print()


def show_costs(models: dict, runs: dict[str, list[dict]]) -> None:
    print(table(list(zip(TITLES, *(costs(models[name], name, runs[name], runs["mask"]) for name in runs)))))
    print("mask and accel are one function of the same weights; dense is plain LLaVA, another model.\n")


def costs(model, variant: str, runs: list[dict], referee: list[dict]) -> tuple[str, ...]:
    model.set_variant(variant)
    visual = visual_tokens(model.config)
    image_token, text_token = kv_bytes(model.config, bytes_each=model.dtype.itemsize)
    cost = (f"{visual_flops(model.config, visual):.2e}", f"{image_token * visual:,}")
    if variant == "mask":  # the referee computes and keeps everything; the cost of its function is accel's
        compared, cost = ("-", "-"), ("as dense", "as dense")
    elif variant == "dense":
        compared = ("another model", "-")
    else:
        same = sum(a["text"] == b["text"] for a, b in zip(runs, referee))
        apart = max(float((a["logits"] - b["logits"]).abs().max()) for a, b in zip(runs, referee))
        compared = (f"{same} of {len(runs)}", f"{apart:.1e}")
    prefill, answer = (1000 * sorted(r[x] for r in runs)[len(runs) // 2] for x in ("prefill", "answer"))
    return (variant, *compared, f"{prefill:.1f}", f"{answer:.0f}", *cost, f"{text_token:,}")


def show_accuracy(vica, dense, processor, pictures: int) -> None:
    """Prints the accuracy on a new test world: each picture holds a pair of things that no training picture holds."""
    with tempfile.TemporaryDirectory() as folder:
        world = write(Path(folder) / "world", train=1, test=pictures, seed=1)
        questions = read_questions(world / "test.jsonl")
        found = {}
        for name, model, variant in (("ViCA", vica, "accel"), ("dense", dense, "dense")):
            model.set_variant(variant)
            found[name] = score(questions, answers(model, processor, questions, world / "images"))
    rows: list[tuple] = [("right answers, %", "questions", *found)]
    for kind in found["ViCA"]:
        rows.append((kind, found["ViCA"][kind][1], *(f"{100 * r[kind][0] / r[kind][1]:.0f}" for r in found.values())))
    print(table(rows))


if __name__ == "__main__":
    sys.exit(main())
