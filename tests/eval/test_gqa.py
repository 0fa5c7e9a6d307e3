"""Tests GQA: its files, its prompts, its accuracy by kind of question."""

import json

import pytest

from tests.eval_files import (
    SHORT,
    error_of,
    names_what_is_missing,
    refuses_wrong_answers,
    without_pictures,
    write,
    write_lines,
)
from tests.hub import local_hub, picture
from vica.eval.gqa import NAME, TASK, normalised
from vica.eval.task import Question

QUESTIONS = {
    "201307251": ("n161313", "Is it overcast?", "no", "verify", "global"),
    "201640614": ("n235859", "Who is wearing the dress?", "woman", "query", "rel"),
    "201640615": ("n235859", "What color is it?", "red", "query", "attr"),
}


def annotated(id):
    image, question, answer, structural, semantic = QUESTIONS[id]
    types = dict(structural=structural, semantic=semantic, detailed="weather")
    return dict(imageId=image, question=question, answer=answer, isBalanced=True, types=types)


@pytest.fixture
def folder(tmp_path):
    lines = [
        dict(question_id=id, image=f"{image}.jpg", text=question + SHORT, category="default")
        for id, (image, question, *_) in QUESTIONS.items()
    ]
    write_lines(tmp_path / "llava_gqa_testdev_balanced.jsonl", lines)
    write(tmp_path / "data" / NAME, json.dumps({id: annotated(id) for id in QUESTIONS}))
    (tmp_path / "data" / "images").mkdir()
    return tmp_path


def test_files(folder):
    questions = TASK.read(folder, "testdev")
    assert [question.id for question in questions] == list(QUESTIONS)
    assert questions[0] == Question(
        "201307251",
        "Is it overcast?\nAnswer the question using a single word or phrase.",
        folder / "data" / "images" / "n161313.jpg",
        dict(answer="no", structural="verify", semantic="global"),
    )


@pytest.mark.parametrize("place", ["questions1.2", "questions"])
def test_annotations_in_the_folder_of_their_archive(folder, place):
    before = TASK.read(folder, "testdev")
    (folder / "data" / place).mkdir()
    (folder / "data" / NAME).rename(folder / "data" / place / NAME)
    assert TASK.read(folder, "testdev") == before


def test_hub(folder, monkeypatch, tmp_path):
    asked = [dict(id=id) | annotated(id) for id in QUESTIONS]
    pictures = [dict(id=id, image=picture(shade)) for shade, id in enumerate(["n235859", "n161313"])]
    held = {
        ("lmms-lab/GQA", "testdev_balanced_instructions", "testdev"): asked,
        ("lmms-lab/GQA", "testdev_balanced_images", "testdev"): pictures,
    }
    local_hub(monkeypatch, tmp_path, held)
    questions = TASK.read_hub("testdev")
    assert without_pictures(questions) == without_pictures(TASK.read(folder, "testdev"))
    assert [question.image_key for question in questions] == ["n161313", "n235859", "n235859"]
    assert [question.image.read() for question in questions] == [picture(1), picture(0), picture(0)]


def test_hub_without_an_image(monkeypatch, tmp_path):
    asked = [dict(id=id) | annotated(id) for id in QUESTIONS]
    held = {
        ("lmms-lab/GQA", "testdev_balanced_instructions", "testdev"): asked,
        ("lmms-lab/GQA", "testdev_balanced_images", "testdev"): [dict(id="n235859", image=picture(0))],
    }
    local_hub(monkeypatch, tmp_path, held)
    assert "about image n161313" in error_of(lambda: TASK.read_hub("testdev"))


def test_missing_files(folder):
    names_what_is_missing(TASK, folder, folder / "llava_gqa_testdev_balanced.jsonl", "eval.zip", "gdown")
    names_what_is_missing(TASK, folder, folder / "data" / NAME, "wget", "questions1.2.zip")
    names_what_is_missing(TASK, folder, folder / "data" / "images", "wget", "images.zip")


def test_a_question_without_annotations(folder):
    write(folder / "data" / NAME, json.dumps({id: annotated(id) for id in list(QUESTIONS)[1:]}))
    assert "asks 201307251, to which" in error_of(lambda: TASK.read(folder, "testdev"))
    write(folder / "data" / NAME, json.dumps([annotated(id) for id in QUESTIONS]))  # as other sources publish it
    assert "not GQA's own" in error_of(lambda: TASK.read(folder, "testdev"))


@pytest.mark.parametrize(
    ("answer", "left"),
    [
        ("Red.", "red"),
        ("red...", "red"),
        ("T-Shirt", "t-shirt"),
        ("the red", "the red"),
        ("two", "two"),
        ("2", "2"),
        ("red!", "red!"),
        ("a. b", "a. b"),
        ("", ""),
        ("红色。", "红色。"),
        ("A" * 20000, "a" * 20000),
    ],
)
def test_reading(answer, left):
    assert normalised(answer) == left


def test_figures():
    kinds = [("verify", "obj"), ("logical", "obj"), ("query", "attr"), ("query", "rel"), ("query", "rel")]
    asked = [
        Question(str(i), "?", None, dict(answer="yes", structural=structural, semantic=semantic))
        for i, (structural, semantic) in enumerate(kinds)
    ]
    said = ["Yes.", "no", "YES", "the yes", ""]
    score = TASK.score(asked, dict(zip("01234", said)))
    assert {name: (count["right"], count["questions"]) for name, count in score.figures.items()} == {
        "all": (2, 5),
        "binary": (1, 2),
        "open": (1, 3),
        "structural: logical": (0, 1),
        "structural: query": (1, 3),
        "structural: verify": (1, 1),
        "semantic: attr": (1, 1),
        "semantic: obj": (1, 2),
        "semantic: rel": (0, 2),
    }
    assert (score.metric, score.value) == ("accuracy", 40)
    assert score.rows[:4] == [
        ("questions", "accuracy", "of"),
        ("all", "40.00", 5),
        ("binary", "50.00", 2),
        ("open", "33.33", 3),
    ]


def test_without_types(folder):
    """A file may have answers only, or some of the types; a hub's row then has None."""
    answer, types = dict(answer="yes"), [{}, dict(types=None), dict(types=dict(structural="query", semantic=None))]
    write(folder / "data" / NAME, json.dumps({id: answer | held for id, held in zip(QUESTIONS, types)}))
    questions = TASK.read(folder, "testdev")
    assert [question.gold for question in questions] == [answer, answer, dict(answer="yes", structural="query")]
    score = TASK.score(questions, {question.id: "yes" for question in questions})
    assert list(score.figures) == ["all", "binary", "open", "structural: query"]
    score = TASK.score([Question("1", "?", None, dict(answer="yes"))], {"1": "yes"})
    assert score.figures == {"all": dict(questions=1, right=1, accuracy=100)}


def test_wrong_answers(folder):
    refuses_wrong_answers(TASK, TASK.read(folder, "testdev"), "yes")


def test_limits():
    assert (TASK.max_new_tokens, TASK.folder) == (128, "gqa")
