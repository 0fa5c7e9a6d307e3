"""TextVQA: reading in pictures; soft accuracy over ten people's answers. Questions come with an OCR system's words."""

from collections.abc import Sequence
from pathlib import Path

from ..errors import ViCAError
from .data import hub_rows, read_json, read_lines, stored_image
from .llava import SHORT_ANSWER, eval_zip
from .task import Answers, Question, Score, Task, check_answers, percent
from .vqa_text import textvqa_accuracy

REPOSITORY = "lmms-lab/textvqa"
QUESTIONS = "llava_textvqa_val_v051_ocr.jsonl"
ANNOTATIONS = "TextVQA_0.5.1_val.json"
GET_ANNOTATIONS = f"Get it: wget -P {{folder}} https://dl.fbaipublicfiles.com/textvqa/data/{ANNOTATIONS}"
OCR = "Reference OCR token: "


def read(folder: Path, split: str) -> list[Question]:
    get = GET_ANNOTATIONS.format(folder=folder)
    annotated = {
        (one["image_id"], one["question"].lower()): one for one in read_json(folder / ANNOTATIONS, get)["data"]
    }
    return [_question(folder, line, annotated) for line in read_lines(folder / QUESTIONS, eval_zip(folder))]


def _question(folder: Path, line: dict, annotated: dict[tuple[str, str], dict]) -> Question:
    # In this file question_id names the picture: the words of the question tell which one of its questions is meant.
    asked = next((part for part in line["text"].split("\n") if not part.startswith(OCR)), "")
    one = annotated.get((line["question_id"], asked.lower()))
    if one is None:
        raise ViCAError(f"{folder / ANNOTATIONS} has no question {asked!r} for picture {line['question_id']}")
    gold = {"answers": one["answers"]}
    return Question(one["question_id"], line["text"], folder / "train_images" / line["image"], gold)


def read_hub(split: str) -> list[Question]:
    rows = hub_rows(REPOSITORY, "validation")
    return [
        Question(
            row["question_id"],
            # capitalize as LLaVA's file does: it lowers the rest of the line
            f"{row['question'].capitalize()}\n{OCR}{', '.join(row['ocr_tokens'])}{SHORT_ANSWER}",
            stored_image(rows, number, f"textvqa/{row['image_id']}"),
            {"answers": row["answers"]},
        )
        for number, row in enumerate(rows.remove_columns("image"))
    ]


def score(questions: Sequence[Question], answers: Answers) -> Score:
    check_answers(questions, answers)
    right = sum(textvqa_accuracy(answers[one.id], one.gold["answers"]) for one in questions)
    accuracy = percent(right, len(questions))
    rows = [("answers", "accuracy", "questions"), ("all", f"{accuracy:.2f}", len(questions))]
    return Score("accuracy", accuracy, rows, {"accuracy": accuracy, "questions": len(questions)})


TASK = Task("textvqa", "TextVQA", "textvqa", ("val",), 128, read, read_hub, score)
