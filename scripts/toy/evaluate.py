"""Asks a model the questions of a toy world, and counts right answers by kind."""

import argparse
import json
import sys
from pathlib import Path

from scripts.toy.base import check_least
from vica.engine import Engine, Request
from vica.loading import load
from vica.toy.score import read_questions, score
from vica.utils.errors import ViCAError
from vica.utils.program import exit_status, quiet_transformers
from vica.utils.table import table

ANSWER = 12  # longest answer in tokens


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m scripts.toy.evaluate", description=__doc__)
    parser.add_argument("model", help="checkpoint folder")
    parser.add_argument("--world", type=Path, required=True, help="folder that vica.toy.write made")
    parser.add_argument("--limit", type=int, help="only so many questions")
    parser.add_argument("--device")
    parser.add_argument("--dtype")
    parser.add_argument("--json", type=Path, help="counts by kind go here")
    quiet_transformers()
    return exit_status("scripts.toy.evaluate", lambda: run(parser.parse_args(argv)))


def run(args) -> None:
    check_least(args, {"limit": 1})
    model, processor = load(args.model, device=args.device, dtype=args.dtype)
    questions = read_questions(args.world / "test.jsonl")[: args.limit]
    found = score(questions, answers(model, processor, questions, args.world / "images"))
    if args.json:
        args.json.write_text(json.dumps(found) + "\n")
    print(table([("kind", "right", "of", "%"), *((k, r, n, f"{100 * r / n:.1f}") for k, (r, n) in found.items())]))


def answers(model, processor, questions: list[dict], images: Path) -> dict[int, str]:
    engine = Engine(model, processor)
    requests = [Request.ask(q["text"], [images / q["image"]], max_new_tokens=ANSWER) for q in questions]
    results = engine.generate(requests, progress=True)
    if failed := next((r for r in results if r.error), None):
        raise ViCAError(f"a question was not answered: {failed.error}")
    return {q["question_id"]: r.text for q, r in zip(questions, results)}


if __name__ == "__main__":
    sys.exit(main())
