"""Tests MME: its files in both folder structures, its prompts, its sums."""

import shutil

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
from vica.eval.mme import TASK, yes_or_no
from vica.eval.task import Question

PICTURES = {  # by LLaVA's name: question and answer
    "code_reasoning/0020.png": [("Is a python code shown?", "Yes"), ("Is a c++ code shown?", "No")],
    "posters/images/tt01.jpg": [("Is it from Iran?", "Yes"), ("Is it from Peru?", "No")],
    "color/000000012120.jpg": [("Is there a red coat?", "Yes"), ("Is there a blue coat?", "No")],
}


@pytest.fixture
def folder(tmp_path):
    write_lines(
        tmp_path / "llava_mme.jsonl",
        [
            dict(question_id=name, image=name, text=text + SHORT, category=name.split("/")[0])
            for name, asked in PICTURES.items()
            for text, _ in reversed(asked)
        ],
    )
    root = tmp_path / "MME_Benchmark_release_version"
    for name, asked in PICTURES.items():
        category, file = name.split("/")[0], name.split("/")[-1]
        apart = "images" in name
        write(root / name, "")
        # The release has two spaces before some of its "Please".
        lines = [f"{text}{'  ' if category == 'color' else ' '}Please answer yes or no.\t{a}\n" for text, a in asked]
        text = root / category / ("questions_answers_YN" if apart else "") / file
        write(text.with_suffix(".txt"), "".join(lines))
    return tmp_path


def test_files(folder):
    questions = TASK.read(folder, "test")
    assert questions[0] == Question(
        "code_reasoning/0020.png#1",
        "Is a c++ code shown?\nAnswer the question using a single word or phrase.",
        folder / "MME_Benchmark_release_version" / "code_reasoning" / "0020.png",
        dict(answer="no", category="code_reasoning", picture="code_reasoning/0020.png"),
    )
    assert [question.id.split("#")[1] for question in questions] == ["1", "2"] * 3
    assert [question.gold["answer"] for question in questions] == ["no", "yes"] * 3
    assert all(question.image.exists() for question in questions)


@pytest.mark.parametrize("category", ["posters", "color"])
def test_other_folder_structure(folder, category):
    """Releases differ in the categories that keep pictures and texts apart; LLaVA's file fits one of them."""
    before = TASK.read(folder, "test")
    held = folder / "MME_Benchmark_release_version" / category
    if category == "posters":
        for file in [*held.glob("images/*"), *held.glob("questions_answers_YN/*")]:
            shutil.move(file, held / file.name)
        (held / "images").rmdir(), (held / "questions_answers_YN").rmdir()
    else:
        for file in list(held.iterdir()):
            place = held / ("images" if file.suffix == ".jpg" else "questions_answers_YN")
            place.mkdir()
            shutil.move(file, place / file.name)
    after = TASK.read(folder, "test")
    assert without_pictures(after) == without_pictures(before)
    assert after != before
    assert all(question.image.exists() for question in after)


def test_hub(folder, monkeypatch, tmp_path):
    rows = [
        dict(
            question_id=name,
            image=picture(shade),
            question=f"{text} Please answer yes or no.",
            answer=answer,
            category=name.split("/")[0],
        )
        for shade, (name, asked) in enumerate(PICTURES.items())
        for text, answer in reversed(asked)
    ]
    local_hub(monkeypatch, tmp_path, {("lmms-lab/MME", None, "test"): rows})
    questions = TASK.read_hub("test")
    assert without_pictures(questions) == without_pictures(TASK.read(folder, "test"))
    assert [question.image_key for question in questions] == [name for name in PICTURES for _ in "12"]
    assert questions[4].image.read() == picture(2)


def test_missing_files(folder):
    root = folder / "MME_Benchmark_release_version"
    names_what_is_missing(TASK, folder, folder / "llava_mme.jsonl", "eval.zip", "gdown")
    names_what_is_missing(TASK, folder, root, "Awesome-Multimodal-Large-Language-Models")
    names_what_is_missing(TASK, folder, root / "color" / "000000012120.txt", "Awesome-Multimodal")
    names_what_is_missing(TASK, folder, root / "posters" / "questions_answers_YN" / "tt01.txt", "Awesome-Multimodal")


def test_wrong_files(folder):
    path = folder / "llava_mme.jsonl"
    whole = path.read_text()
    path.write_text(whole.replace("c++", "rust"))
    assert "Is a rust code shown?" in error_of(lambda: TASK.read(folder, "test"))
    path.write_text("".join(whole.splitlines(keepends=True)[1:]))
    assert "not of code_reasoning/0020.png" in error_of(lambda: TASK.read(folder, "test"))
    path.write_text(whole.replace('"category": "color"', '"category": "colour"'))
    assert "no category 'colour'" in error_of(lambda: TASK.read(folder, "test"))
    path.write_text(whole)
    write(folder / "MME_Benchmark_release_version" / "color" / "000000012120.txt", "Is there a red coat? Yes\n")
    assert "not a question, a tab and an answer" in error_of(lambda: TASK.read(folder, "test"))


@pytest.mark.parametrize(
    ("answer", "word"),
    [
        ("Yes", "yes"),
        ("no", "no"),
        ("NO.", "no"),
        ("Yes, it is not", "yes"),
        ("not at all", "no"),
        ("none", "no"),
        ("(no)", "no"),
        ("It is no", "other"),
        ("It's yes", "other"),
        ("noye", "no"),
        ("nyes", "yes"),
        ("yno", "no"),
        ("y", "other"),
        ("", "other"),
        ("是的", "other"),
        ("yes " * 5000, "yes"),
    ],
)
def test_answers_are_read_as_yes_no_or_other(answer, word):
    assert yes_or_no(answer) == word


def test_sums():
    """existence: one picture of two wholly right, 3 answers of 4. count: no readable answer. code: all right."""

    def questions(category, pictures):
        return [
            Question(f"{category}{i}#{n}", "?", None, dict(answer=answer, category=category, picture=f"{category}{i}"))
            for i in range(pictures)
            for n, answer in enumerate(["yes", "no"])
        ]

    asked = [*questions("code_reasoning", 1), *questions("existence", 2), *questions("count", 1)]
    said = ["Yes.", "No.", "yes", "no", "yes", "yes", "maybe", ""]
    score = TASK.score(asked, dict(zip((question.id for question in asked), said)))
    perception = score.figures["perception"]["categories"]
    assert list(perception) == ["existence", "count"]
    assert (perception["existence"]["accuracy"], perception["existence"]["accuracy+"]) == (75, 50)
    assert perception["existence"]["score"] == 125
    assert perception["existence"]["pictures"] == 2
    assert perception["count"] == {
        "questions": 2, "pictures": 1, "other": 2, "accuracy": 0, "accuracy+": 0, "score": 0
    }  # fmt: skip
    assert score.figures["cognition"]["score"] == 200
    assert (score.metric, score.value, score.full) == ("perception", 125, 2000)
    assert score.rows == [
        ("category", "accuracy", "accuracy+", "score"),
        ("existence", "75.00", "50.00", "125.00"),
        ("count", "0.00", "0.00", "0.00"),
        ("code_reasoning", "100.00", "100.00", "200.00"),
        ("perception", "", "", "125.00"),
        ("cognition", "", "", "200.00"),
    ]


def test_half_a_picture(folder):
    """--limit may cut a pair."""
    questions = TASK.read(folder, "test")[:3]
    score = TASK.score(questions, {question.id: "no" for question in questions})
    assert score.figures["perception"]["score"] == 200
    assert score.figures["cognition"]["score"] == 50


def test_wrong_answers(folder):
    refuses_wrong_answers(TASK, TASK.read(folder, "test"), "yes")


def test_limits():
    assert (TASK.max_new_tokens, TASK.folder) == (128, "MME")
