"""Tests SEED-Bench: its files, its prompts, its accuracy by type."""

import json

import pytest

from tests.eval_files import (
    error_of,
    names_what_is_missing,
    refuses_wrong_answers,
    without_pictures,
    write,
    write_lines,
)
from tests.hub import local_hub, picture
from vica.eval.seed import TASK, TYPES
from vica.eval.task import Question

PROMPT = """How many towels are in the image?
A. One
B. Two
C. Three
D. Four
Answer with the option's letter from the given choices directly."""


def published(id, answer, type, data_id, data_type="image", words="How many towels are in the image?"):
    options = dict(choice_a="One", choice_b="Two", choice_c="Three", choice_d="Four")
    return options | dict(
        answer=answer,
        data_id=data_id,
        data_type=data_type,
        question=words,
        question_id=id,
        question_type_id=type,
    )


QUESTIONS = [
    published("101669", "A", 1, "1454426_2591111986"),
    published("101670", "B", 5, "1454426_2591111986"),
    published("v9", "D", 9, "scene/v9"),
    published("105000", "C", 10, "1.webm", "video"),
]


@pytest.fixture
def folder(tmp_path):
    types = {name: number for number, name in enumerate([*TYPES, "Action Recognition"], 1)}
    write(tmp_path / "SEED-Bench.json", json.dumps(dict(questions=QUESTIONS, question_type=types)))
    write_lines(tmp_path / "llava-seed-bench.jsonl", [line(held) for held in QUESTIONS])
    (tmp_path / "SEED-Bench-image").mkdir()
    return tmp_path


def line(held):
    """Returns a question in the form of LLaVA's file."""
    return dict(
        question_id=int(held["question_id"]) if held["question_id"].isdigit() else held["question_id"],
        image=("SEED-Bench-image/" if held["data_type"] == "image" else "SEED-Bench-video-image/") + held["data_id"],
        text=PROMPT.replace(QUESTIONS[0]["question"], held["question"]),
        category=held["question_type_id"],
    )


def test_files(folder):
    questions = TASK.read(folder, "test")
    assert [question.id for question in questions] == [101669, 101670, "v9"]
    assert questions[0] == Question(
        101669,
        PROMPT,
        folder / "SEED-Bench-image" / "1454426_2591111986",
        dict(answer="A", type="Scene Understanding"),
    )
    assert [question.gold["type"] for question in questions[1:]] == ["Instances Counting", "Text Understanding"]


def test_hub(folder, monkeypatch, tmp_path):
    shades = {"1454426_2591111986": 1, "scene/v9": 2, "1.webm": 3}
    rows = [held | dict(image=[picture(shades[held["data_id"]])], segment=[]) for held in QUESTIONS]
    rows = [row | dict(question_type_id=str(row["question_type_id"])) for row in rows]
    rows[-1]["image"] *= 8  # frames of a video
    local_hub(monkeypatch, tmp_path, {("lmms-lab/SEED-Bench", None, "test"): rows})
    questions = TASK.read_hub("test")
    assert without_pictures(questions) == without_pictures(TASK.read(folder, "test"))
    assert questions[0].image_key == questions[1].image_key != questions[2].image_key
    assert questions[2].image.read() == picture(2)


@pytest.mark.parametrize("other", [dict(words="What is it?"), dict(data_id="another")])
def test_two_questions_of_one_id(other, folder, monkeypatch, tmp_path):
    """Each is asked with its own answer and type, in any order of the two files."""
    second = published(**dict(id="101669", answer="C", type=3, data_id="1454426_2591111986") | other)
    file = json.loads((folder / "SEED-Bench.json").read_text())
    write(folder / "SEED-Bench.json", json.dumps({**file, "questions": [second, *QUESTIONS]}))
    lines = folder / "llava-seed-bench.jsonl"
    lines.write_text(lines.read_text() + json.dumps(line(second)) + "\n")
    questions = TASK.read(folder, "test")
    assert [question.id for question in questions] == [101669, 101670, "v9", "101669#2"]
    assert [question.gold["answer"] for question in questions] == ["A", "B", "D", "C"]
    assert questions[3].gold["type"] == TYPES[2] and questions[3].image == folder / line(second)["image"]
    rows = [held | dict(image=[picture(place)], segment=[]) for place, held in enumerate([*QUESTIONS, second])]
    local_hub(monkeypatch, tmp_path, {("lmms-lab/SEED-Bench", None, "test"): rows})
    assert without_pictures(TASK.read_hub("test")) == without_pictures(questions)
    lines.write_text(lines.read_text().replace(json.dumps(line(second)), ""))  # LLaVA's file may have only one line
    assert without_pictures(TASK.read(folder, "test")) == without_pictures(questions[:3])


def test_missing_files(folder):
    names_what_is_missing(TASK, folder, folder / "llava-seed-bench.jsonl", "eval.zip", "gdown")
    names_what_is_missing(TASK, folder, folder / "SEED-Bench.json", "hf download ", "AILab-CVC/SEED-Bench")
    names_what_is_missing(TASK, folder, folder / "SEED-Bench-image", "hf download ", "SEED-Bench-image.zip")


def test_files_that_do_not_belong_together(folder):
    path = folder / "llava-seed-bench.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[1:]))
    assert "leaves out 1 questions of SEED-Bench.json: 101669" in error_of(lambda: TASK.read(folder, "test"))
    write(folder / "SEED-Bench.json", '{"questions": []}')
    assert "'question_type' is amiss" in error_of(lambda: TASK.read(folder, "test"))
    write(folder / "SEED-Bench.json", "{")
    assert "is no JSON" in error_of(lambda: TASK.read(folder, "test"))


def test_figures():
    """Two types; only the bare letter counts."""
    said = ["A", "A.", "a", "(A)", "A", "", "A A", "答案是A", "A" * 20000, "B"]
    types = [TYPES[1]] * 4 + [TYPES[0]] * 6
    asked = [Question(i, "?", None, dict(answer="A", type=type)) for i, type in enumerate(types)]
    score = TASK.score(asked, dict(enumerate(said)))
    assert score.figures[TYPES[1]] == dict(questions=4, right=1, accuracy=25)
    assert score.figures[TYPES[0]]["accuracy"] == pytest.approx(100 / 6)
    assert (score.metric, score.value) == ("accuracy", 20)
    assert score.rows == [
        ("type", "accuracy", "questions"),
        ("Scene Understanding", "16.67", 6),
        ("Instance Identity", "25.00", 4),
        ("all", "20.00", 10),
    ]


def test_wrong_answers(folder):
    refuses_wrong_answers(TASK, TASK.read(folder, "test"), "A")


def test_limits():
    assert (TASK.max_new_tokens, TASK.folder) == (128, "seed_bench")
