"""TextVQA: reading in pictures; soft accuracy over ten people's answers. Questions come with an OCR system's words."""

from collections.abc import Sequence
from pathlib import Path

from ..utils.errors import ViCAError
from .data import hub_rows, need, read_json, stored_image
from .llava import SHORT_ANSWER, eval_zip, records
from .task import Answers, Question, Score, Task, check_answers, percent
from .vqa_text import textvqa_accuracy

REPOSITORY = "lmms-lab/textvqa"
QUESTIONS = "llava_textvqa_val_v051_ocr.jsonl"
ANNOTATIONS = "TextVQA_0.5.1_val.json"
GET_ANNOTATIONS = f"Get it: wget -P {{folder}} https://dl.fbaipublicfiles.com/textvqa/data/{ANNOTATIONS}"
GET_PICTURES = (
    "Get it: wget https://dl.fbaipublicfiles.com/textvqa/images/train_val_images.zip"
    " && unzip train_val_images.zip -d {folder}"
)
OCR = "Reference OCR token: "


def read(folder: Path, split: str) -> list[Question]:
    get = GET_ANNOTATIONS.format(folder=folder)
    annotated = {
        (one["image_id"], one["question"].lower()): one for one in read_json(folder / ANNOTATIONS, get)["data"]
    }
    need(folder / "train_images", GET_PICTURES.format(folder=folder))
    # In this file question_id names the picture; only the words of the question tell which of its questions is meant.
    asked = records(folder / QUESTIONS, eval_zip(folder), "question_id", "text", "image")
    return [_question(folder, picture, text, image, annotated) for picture, text, image in asked]


def _question(folder: Path, picture: str, text: str, image: str, annotated: dict[tuple[str, str], dict]) -> Question:
    asked = next((part for part in text.split("\n") if not part.startswith(OCR)), "")
    one = annotated.get((picture, asked.lower()))
    if one is None:
        raise ViCAError(f"{folder / ANNOTATIONS} has no question {asked!r} for picture {picture}")
    return Question(one["question_id"], text, folder / "train_images" / image, {"answers": one["answers"]})


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
