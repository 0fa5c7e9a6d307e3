"""GQA: short answers to questions generated from scene graphs, on the balanced half of testdev."""

from collections.abc import Sequence
from pathlib import Path

from ..utils.errors import ViCAError
from .data import hub_rows, need, read_json, stored_image
from .llava import SHORT_ANSWER, eval_zip, records
from .task import Answers, Question, Score, Task, check_answers, percent

HOST = "wget https://downloads.cs.stanford.edu/nlp/data/gqa/"
ANNOTATIONS = HOST + "questions1.2.zip && unzip questions1.2.zip testdev_balanced_questions.json -d {folder}"
PICTURES = HOST + "images.zip && unzip images.zip -d {folder}"
NAME = "testdev_balanced_questions.json"


def read(folder: Path, split: str) -> list[Question]:
    data, path = folder / "data", folder / "llava_gqa_testdev_balanced.jsonl"
    places = [data / NAME, data / "questions1.2" / NAME, data / "questions" / NAME]
    get = ANNOTATIONS.format(folder=data)
    known = read_json(next((place for place in places if place.exists()), places[0]), get)
    if not isinstance(known, dict):
        raise ViCAError(f"{NAME} in {data} is not GQA's own, which has its questions by id. {get}")
    pictures, questions = need(data / "images", PICTURES.format(folder=data)), []
    for id, image, text in records(path, eval_zip(folder), "question_id", "image", "text"):
        if "answer" not in known.get(id, ()):
            raise ViCAError(f"{path} asks {id}, to which {NAME} has no answer. {get}")
        questions.append(Question(id, text, pictures / image, _gold(known[id])))
    return questions


def read_hub(split: str) -> list[Question]:
    asked = hub_rows("lmms-lab/GQA", "testdev", "testdev_balanced_instructions")
    pictures = hub_rows("lmms-lab/GQA", "testdev", "testdev_balanced_images")
    places = {id: row for row, id in enumerate(pictures["id"])}
    if lost := next((row["imageId"] for row in asked if row["imageId"] not in places), None):
        raise ViCAError(f"lmms-lab/GQA has questions about image {lost} but not the image")
    return [
        Question(
            row["id"],
            row["question"] + SHORT_ANSWER,
            stored_image(pictures, places[row["imageId"]], row["imageId"]),
            _gold(row),
        )
        for row in asked
    ]


def score(questions: Sequence[Question], answers: Answers) -> Score:
    check_answers(questions, answers)
    figures = {"all": _count(questions, answers)}
    if structured := [question for question in questions if "structural" in question.gold]:
        kinds: dict[str, list[Question]] = {"binary": [], "open": []}
        for question in structured:
            kinds["open" if question.gold["structural"] == "query" else "binary"].append(question)
        figures |= {kind: _count(asked, answers) for kind, asked in kinds.items()}
    for types in ("structural", "semantic"):
        annotated = [question for question in questions if types in question.gold]
        for type in sorted({question.gold[types] for question in annotated}):
            asked = [question for question in annotated if question.gold[types] == type]
            figures[f"{types}: {type}"] = _count(asked, answers)
    rows = [("questions", "accuracy", "of")]
    rows += [(name, f"{count['accuracy']:.2f}", count["questions"]) for name, count in figures.items()]
    return Score("accuracy", figures["all"]["accuracy"], rows, figures)


def normalised(answer: str) -> str:
    return answer.rstrip(".").lower()


def _count(questions: Sequence[Question], answers: Answers) -> dict:
    right = sum(normalised(answers[question.id]) == question.gold["answer"] for question in questions)
    return dict(questions=len(questions), right=right, accuracy=percent(right, len(questions)))


def _gold(annotated: dict) -> dict[str, str]:
    types = annotated.get("types") or {}
    return dict(answer=annotated["answer"]) | {
        name: types[name] for name in ("structural", "semantic") if types.get(name)
    }


TASK = Task("gqa", "GQA", "gqa", ("testdev",), 128, read, read_hub, score)
