"""Answer a file of questions about images, fast, and write the answers down.

python examples/batch.py [QUESTIONS.jsonl IMAGES ANSWERS.jsonl [MODEL]]

A question is a line {"question_id": ..., "image": "a name below IMAGES", "text": "..."}, as in LLaVA's model_vqa.
Without arguments: the toy model, on six questions that the repository holds; the answers are printed.
"""

import json
import sys
from pathlib import Path

import vica
from vica.engine import Engine, Request

TOY = Path(__file__).parents[1] / "playground"
DEFAULTS = [TOY / "toy/pictures/questions.jsonl", TOY / "toy/pictures", None, TOY / "checkpoints/toy-vica"]
given = sys.argv[1:]
questions, images, answers, model_path = [*given, *DEFAULTS[len(given) :]]

model, processor = vica.load(model_path)
engine = Engine(model, processor)  # an image's share of the work is done once for all questions about it
asked = [json.loads(line) for line in Path(questions).read_text(encoding="utf-8").splitlines()]
requests = [Request.ask(q["text"], [Path(images, q["image"])], max_new_tokens=128, id=q["question_id"]) for q in asked]

with open(answers, "w", encoding="utf-8") if answers else sys.stdout as file:
    for request in engine.results(requests):  # in any order, each as soon as it is there
        result = request.result
        line = {"question_id": result.id, "text": result.text}
        if result.error:  # such as an image that cannot be read; the others are answered nevertheless
            line["error"] = result.error
        file.write(json.dumps(line, ensure_ascii=False) + "\n")
