"""VQAv2: short answers about photographs. On val, the accuracy over ten people's answers. Only the benchmark's server
scores test-dev, and it needs an answer, perhaps an empty one, to every question of the whole test."""

import json
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..utils.errors import ViCAError
from .data import hub_rows, need, read_json, stored_image
from .llava import SHORT_ANSWER, eval_zip, records
from .task import Answers, Question, Score, Task, check_answers, listed, percent
from .vqa_text import evalai_answer, vqa_accuracy

REPOSITORY = "lmms-lab/VQAv2"
HUB_SPLITS = {"val": "validation", "test-dev": "testdev"}
TEST_DEV = "llava_vqav2_mscoco_test-dev2015.jsonl"
WHOLE_TEST = "llava_vqav2_mscoco_test2015.jsonl"
HUB_FOLDER = Path("playground/data/eval/vqav2")  # read_hub looks for the list here: the hub does not have it
VAL_QUESTIONS = "v2_OpenEnded_mscoco_val2014_questions.json"
VAL_ANNOTATIONS = "v2_mscoco_val2014_annotations.json"
GET_VAL = (
    "Get it: wget https://s3.amazonaws.com/cvmlp/vqa/mscoco/vqa/{archive} && unzip {archive} -d {folder}"
    " (images: http://images.cocodataset.org/zips/val2014.zip)"
)
GET_PICTURES = "Get it: wget http://images.cocodataset.org/zips/{name}.zip && unzip {name}.zip -d {folder}"


def read(folder: Path, split: str) -> list[Question]:
    return _read_val(folder) if split == "val" else _read_test_dev(folder)


def _read_val(folder: Path) -> list[Question]:
    get_questions = GET_VAL.format(folder=folder, archive="v2_Questions_Val_mscoco.zip")
    get_annotations = GET_VAL.format(folder=folder, archive="v2_Annotations_Val_mscoco.zip")
    annotations = {
        one["question_id"]: one for one in read_json(folder / VAL_ANNOTATIONS, get_annotations)["annotations"]
    }
    asked = read_json(folder / VAL_QUESTIONS, get_questions)["questions"]
    if strays := [one["question_id"] for one in asked if one["question_id"] not in annotations]:
        raise ViCAError(f"{folder / VAL_ANNOTATIONS} has no answers to question {strays[0]}")
    pictures = _pictures(folder, "val2014")
    return [
        Question(
            one["question_id"],
            one["question"] + SHORT_ANSWER,
            pictures / f"COCO_val2014_{one['image_id']:012d}.jpg",
            _gold(annotations[one["question_id"]]),
        )
        for one in asked
    ]


def _read_test_dev(folder: Path) -> list[Question]:
    need(folder / WHOLE_TEST, eval_zip(folder))  # fail now, not after hours of answers
    pictures = _pictures(folder, "test2015")
    return [
        Question(id, text, pictures / image, {"whole_test": str(folder)})
        for id, text, image in records(folder / TEST_DEV, eval_zip(folder), "question_id", "text", "image")
    ]


def _pictures(folder: Path, name: str) -> Path:
    return need(folder / name, GET_PICTURES.format(folder=folder, name=name))


def read_hub(split: str) -> list[Question]:
    if split == "test-dev":
        need(HUB_FOLDER / WHOLE_TEST, eval_zip(HUB_FOLDER))
    rows = hub_rows(REPOSITORY, HUB_SPLITS[split])
    return [
        Question(
            row["question_id"],
            row["question"] + SHORT_ANSWER,
            stored_image(rows, number, f"vqav2/{split}/{row['image_id']}"),
            _gold(row) if split == "val" else {"whole_test": str(HUB_FOLDER)},
        )
        for number, row in enumerate(rows.remove_columns("image"))
    ]


def _gold(one: dict) -> dict:
    people = [answer["answer"] for answer in one["answers"]]
    return {"answers": people, "answer_type": one["answer_type"], "question_type": one["question_type"]}


def score(questions: Sequence[Question], answers: Answers) -> Score:
    check_answers(questions, answers)
    if any("answers" not in one.gold for one in questions):
        return Score(
            "accuracy", None, [("answers", "questions"), ("all", len(questions))], {"questions": len(questions)}
        )
    each = [vqa_accuracy(answers[one.id], one.gold["answers"]) for one in questions]
    overall = percent(sum(each), len(each))
    figures: dict[str, Any] = {"accuracy": overall, "questions": len(each)}
    rows: list[tuple] = [("answers", "accuracy", "questions"), ("all", f"{overall:.2f}", len(each))]
    for kind in ("answer_type", "question_type"):
        parts = defaultdict(list)
        for one, accuracy in zip(questions, each):
            parts[one.gold[kind]].append(accuracy)
        figures[kind] = {name: percent(sum(part), len(part)) for name, part in sorted(parts.items())}
        if kind == "answer_type":  # there are 65 question types
            rows += [(name, f"{value:.2f}", len(parts[name])) for name, value in figures[kind].items()]
    return Score("accuracy", overall, rows, figures)


def submit(questions: Sequence[Question], answers: Answers, folder: Path) -> Path:
    """Writes on val the file that the authors' own script scores, and on test-dev the server's, with normalised answers
    and all questions of the whole test."""
    check_answers(questions, answers)
    if not all("whole_test" in one.gold for one in questions):
        return _write(folder / "vqav2_val.json", {one.id: answers[one.id] for one in questions})
    whole = Path(questions[0].gold["whole_test"]) / WHOLE_TEST
    given = {id: "" for (id,) in records(whole, eval_zip(whole.parent), "question_id")}
    if strays := [one.id for one in questions if one.id not in given]:
        raise ViCAError(f"{whole} lacks questions that were answered: {listed(strays)}")
    return _write(folder / "vqav2_test-dev.json", given | {one.id: evalai_answer(answers[one.id]) for one in questions})


def _write(path: Path, given: dict[int | str, str]) -> Path:
    path.write_text(json.dumps([{"question_id": id, "answer": answer} for id, answer in given.items()]))
    return path


TASK = Task("vqav2", "VQAv2", "vqav2", ("val", "test-dev"), 128, read, read_hub, score, submit)
