"""POPE: is there such a thing in the picture? An absent thing was drawn at random, from things that are frequent in
pictures (popular), or from things that often occur beside present ones (adversarial)."""

import re
from collections.abc import Sequence
from pathlib import Path

from ..utils.errors import ViCAError
from .data import hub_rows, need, stored_image
from .llava import SHORT_ANSWER, eval_zip, records
from .task import Answers, Question, Score, Task, check_answers

FIRST_ID = {"adversarial": 0, "random": 10_000_000, "popular": 20_000_000}  # LLaVA's id is this plus POPE's own
KINDS = ("random", "popular", "adversarial")
FIGURES = ("accuracy", "precision", "recall", "f1", "yes_ratio")
LABELS = (
    "for kind in random popular adversarial; do wget -P {folder}/coco "
    "https://raw.githubusercontent.com/RUCAIBox/POPE/e3e39262c85a6a83f26cf5094022a782cb0df58d/output/coco/"
    "coco_pope_$kind.json; done"
)
PICTURES = "wget http://images.cocodataset.org/zips/val2014.zip && unzip val2014.zip 'val2014/*' -d {folder}"


def read(folder: Path, split: str) -> list[Question]:
    get = LABELS.format(folder=folder)
    labels = {kind: _labels(folder / "coco" / f"coco_pope_{kind}.json", get) for kind in KINDS}
    pictures, questions = need(folder / "val2014", PICTURES.format(folder=folder)), []
    path = folder / "llava_pope_test.jsonl"
    for id, image, text, kind in records(path, eval_zip(folder), "question_id", "image", "text", "category"):
        answer = labels.get(kind, {}).get(_question_key(image, text))
        if answer is None:
            raise ViCAError(f"{path} asks {id}, of which {folder}/coco/coco_pope_{kind}.json knows nothing. {get}")
        questions.append(Question(id, text, pictures / image, dict(answer=answer, kind=kind)))
    return questions


def read_hub(split: str) -> list[Question]:
    """Returns the questions of POPE's newer files: 90 more random questions than LLaVA's, and "an apple" instead of
    LLaVA's "a apple"."""
    rows = hub_rows("lmms-lab/POPE", split)
    return [
        Question(
            FIRST_ID[row["category"]] + int(row["question_id"]),
            row["question"].strip() + SHORT_ANSWER,
            stored_image(rows, number, row["image_source"]),
            dict(answer=row["answer"].lower().strip(), kind=row["category"]),
        )
        for number, row in enumerate(rows.remove_columns("image"))
    ]


def wrong(question: Question) -> str:
    """Returns a wrong answer. An empty answer would not do: it counts as yes."""
    return "yes" if question.gold["answer"] == "no" else "no"


def score(questions: Sequence[Question], answers: Answers) -> Score:
    check_answers(questions, answers)
    figures: dict[str, dict] = {}
    for kind in KINDS:
        if asked := [question for question in questions if question.gold["kind"] == kind]:
            said = [(not says_no(answers[question.id]), question.gold["answer"] != "no") for question in asked]
            figures[kind] = _count(said)
    average = {name: sum(split[name] for split in figures.values()) / len(figures) for name in FIGURES}
    figures["average"] = average
    rows: list[tuple] = [("split", "accuracy", "precision", "recall", "F1", "yes ratio")]
    rows += [(kind, *(f"{split[name]:.2f}" for name in FIGURES)) for kind, split in figures.items()]
    return Score("F1", average["f1"], rows, figures)


def says_no(answer: str) -> bool:
    """Returns whether the answer counts as a no. Everything else counts as a yes, even an empty answer."""
    words = answer.split(".")[0].replace(",", "").split(" ")
    return not {"No", "no", "not"}.isdisjoint(words)


def _count(said: list[tuple[bool, bool]]) -> dict:
    """Returns the figures of (answered yes?, should be yes?) pairs. A share of nothing is 0; the authors' script would
    stop."""
    right, wrong = said.count((True, True)), said.count((True, False))
    missed, refused = said.count((False, True)), said.count((False, False))
    precision, recall = right / max(1, right + wrong), right / max(1, right + missed)
    f1 = 2 * precision * recall / (precision + recall) if right else 0.0
    shares = ((right + refused) / len(said), precision, recall, f1, (right + wrong) / len(said))
    counts = dict(questions=len(said), tp=right, fp=wrong, tn=refused, fn=missed)
    return counts | {name: 100 * share for name, share in zip(FIGURES, shares)}


def _labels(path: Path, get: str) -> dict[tuple[str, str], str]:
    return {_question_key(image, text): label for image, text, label in records(path, get, "image", "text", "label")}


def _question_key(image: str, text: str) -> tuple[str, str]:
    """Returns the key of a question. POPE's authors corrected "a apple" and "imange" after LLaVA had taken its copy, so
    the full text does not match."""
    thing = re.match("Is there an? (.+) in the ", text)
    return image, thing[1] if thing else text.removesuffix(SHORT_ANSWER)


TASK = Task("pope", "POPE", "pope", ("test",), 128, read, read_hub, score, wrong=wrong)
