"""Tests POPE: its files, its prompts, its figures."""

import pytest

from tests.eval_files import (
    SHORT,
    error_of,
    names_what_is_missing,
    refuses_wrong_answers,
    without_pictures,
    write_lines,
)
from tests.hub import local_hub, picture
from vica.eval.pope import TASK, says_no
from vica.eval.task import Question

KINDS = ("random", "popular", "adversarial")
THINGS = [("dog", "yes"), ("cat", "no"), ("apple", "no"), ("red car", "yes")]
FIRST = dict(adversarial=0, random=10_000_000, popular=20_000_000)


@pytest.fixture
def folder(tmp_path):
    """Writes the files as LLaVA and POPE publish them; the labels are the newer files', with their corrected
    English."""
    lines = []
    for kind in ("adversarial", "popular", "random"):
        asked = [(number, *thing) for number, thing in enumerate(THINGS, 1)]
        lines += [
            dict(
                question_id=FIRST[kind] + number,
                image=f"COCO_val2014_{number % 2}.jpg",
                text=f"Is there a {thing} in the {'imange' if thing == 'apple' else 'image'}?{SHORT}",
                category=kind,
            )
            for number, thing, _ in asked
        ]
        write_lines(
            tmp_path / "coco" / f"coco_pope_{kind}.json",
            [
                dict(
                    question_id=number,
                    image=f"COCO_val2014_{number % 2}.jpg",
                    text=f"Is there {'an' if thing == 'apple' else 'a'} {thing} in the image?",
                    label=label,
                )
                for number, thing, label in reversed(asked)
            ],
        )
    write_lines(tmp_path / "llava_pope_test.jsonl", lines)
    (tmp_path / "val2014").mkdir()
    return tmp_path


def test_files(folder):
    questions = TASK.read(folder, "test")
    assert [question.id for question in questions[:5]] == [1, 2, 3, 4, 20_000_001]
    assert questions[0] == Question(
        1,
        "Is there a dog in the image?\nAnswer the question using a single word or phrase.",
        folder / "val2014" / "COCO_val2014_1.jpg",
        dict(answer="yes", kind="adversarial"),
    )
    assert [question.gold["answer"] for question in questions] == [answer for _, answer in THINGS] * 3
    assert [question.gold["kind"] for question in questions] == ["adversarial"] * 4 + ["popular"] * 4 + ["random"] * 4


def test_questions_in_other_words(folder):
    """A user's own questions may have any words."""
    for path in [folder / "llava_pope_test.jsonl", *folder.glob("coco/*")]:
        asked = path.read_text().replace("an apple", "a apple").replace("imange", "image")
        path.write_text(asked.replace("Is there", "Do you see"))
    questions = TASK.read(folder, "test")
    assert [question.gold["answer"] for question in questions] == [answer for _, answer in THINGS] * 3


def test_hub(folder, monkeypatch, tmp_path):
    rows = [
        dict(
            id=str(4 * place + number),
            question_id=str(number),
            question=f"Is there a {thing} in the {'imange' if thing == 'apple' else 'image'}?",
            answer=answer,
            image_source=f"COCO_val2014_{number % 2}",
            image=picture(number % 2),
            category=kind,
        )
        for place, kind in enumerate(("adversarial", "popular", "random"))
        for number, (thing, answer) in enumerate(THINGS, 1)
    ]
    local_hub(monkeypatch, tmp_path, {("lmms-lab/POPE", None, "test"): rows})
    questions = TASK.read_hub("test")
    assert without_pictures(questions) == without_pictures(TASK.read(folder, "test"))
    assert questions[0].image_key == questions[2].image_key != questions[1].image_key
    assert questions[1].image.read() == picture(0)


def test_missing_files(folder):
    names_what_is_missing(TASK, folder, folder / "llava_pope_test.jsonl", "eval.zip", "gdown")
    names_what_is_missing(TASK, folder, folder / "val2014", "wget", "val2014.zip")
    for kind in KINDS:
        names_what_is_missing(TASK, folder, folder / "coco" / f"coco_pope_{kind}.json", "wget", "RUCAIBox/POPE")


def test_files_that_do_not_belong_together(folder):
    path = folder / "llava_pope_test.jsonl"
    whole = path.read_text()
    path.write_text(whole.replace("red car", "green car"))
    assert "asks 4, of which" in error_of(lambda: TASK.read(folder, "test"))
    path.write_text(whole.replace("adversarial", "hard"))
    assert "coco_pope_hard.json" in error_of(lambda: TASK.read(folder, "test"))
    path.write_text(whole.replace('"image"', '"picture"'))
    assert "without question_id, image" in error_of(lambda: TASK.read(folder, "test"))


@pytest.mark.parametrize(
    ("answer", "no"),
    [
        ("no", True),
        ("No", True),
        ("No, there is none", True),
        ("There is not a dog", True),
        ("no.", True),
        ("no,", True),
        ("NO", False),  # as the authors' script reads it
        ("none", False),
        ("no!", False),
        ("nothing", False),
        ("\nno", False),
        ("Yes. No, wait", False),  # only the first sentence counts
        ("Yes, no doubt", True),
        (". no", False),
        ("yes", False),
        ("", False),
        ("没有", False),
        ("yes " * 3000 + "no", True),
    ],
)
def test_reading(answer, no):
    assert says_no(answer) == no


def test_figures():
    """random: 2 right yes, 1 wrong yes, 1 missed, 4 right no. popular: all yes. adversarial: all no."""

    def questions(kind, golds):
        return [Question(f"{kind}{i}", "?", None, dict(answer=gold, kind=kind)) for i, gold in enumerate(golds)]

    asked = questions("random", ["yes"] * 3 + ["no"] * 5)
    answers = dict(zip((q.id for q in asked), ["yes", "Yes.", "no", "yes", "no", "no", "no", "No"]))
    popular, adversarial = questions("popular", ["yes", "no"]), questions("adversarial", ["yes", "no"])
    answers |= {q.id: "yes" for q in popular} | {q.id: "no" for q in adversarial}
    score = TASK.score(asked + popular + adversarial, answers)
    random = score.figures["random"]
    assert (random["tp"], random["fp"], random["fn"], random["tn"]) == (2, 1, 1, 4)
    assert random["accuracy"] == 75
    assert random["precision"] == random["recall"] == pytest.approx(200 / 3)
    assert random["f1"] == pytest.approx(200 / 3)
    # the share among the answers; that among the questions would be 37.5 too, hence the next check
    assert random["yes_ratio"] == 37.5
    assert score.figures["popular"]["yes_ratio"] == 100
    assert (score.figures["popular"]["precision"], score.figures["popular"]["recall"]) == (50, 100)
    assert score.figures["popular"]["f1"] == pytest.approx(200 / 3)
    nothing = score.figures["adversarial"]
    assert (nothing["accuracy"], nothing["precision"], nothing["recall"], nothing["f1"]) == (50, 0, 0, 0)
    assert score.value == score.figures["average"]["f1"] == pytest.approx((200 / 3 + 200 / 3 + 0) / 3)
    assert score.figures["average"]["accuracy"] == pytest.approx((75 + 50 + 50) / 3)
    assert score.metric == "F1"
    assert [row[0] for row in score.rows] == ["split", "random", "popular", "adversarial", "average"]
    assert score.rows[1] == ("random", "75.00", "66.67", "66.67", "66.67", "37.50")


def test_part_of_the_questions(folder):
    """--limit takes the first questions, which are all of one kind."""
    questions = TASK.read(folder, "test")[:3]
    score = TASK.score(questions, {question.id: "no" for question in questions})
    assert list(score.figures) == ["adversarial", "average"]
    assert score.figures["average"]["accuracy"] == pytest.approx(200 / 3)


def test_wrong_answers(folder):
    refuses_wrong_answers(TASK, TASK.read(folder, "test"), "yes")


def test_limits():
    assert (TASK.max_new_tokens, TASK.folder) == (128, "pope")
