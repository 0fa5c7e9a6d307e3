"""Tests VQAv2 and TextVQA: prompts, files, the hub's rows, and scores against answers worked out by hand."""

import json

import pytest

from tests.hub import png, stand_in
from vica.eval import textvqa, vqav2
from vica.eval.task import Question
from vica.eval.vqa_text import evalai_answer, soft_accuracy, textvqa_accuracy, vqa_accuracy, vqa_answer
from vica.utils.errors import ViCAError


@pytest.mark.parametrize(
    "answer, vqav2s, textvqas",
    [
        ("Yes", "yes", "yes"),
        ("the A an cat", "cat", "cat"),
        ("Ten none", "10 0", "10 0"),
        ("two, three", "2 3", "2 3"),
        ("dont IM couldntve Im", "don't im couldntve im", "don't im couldntve im"),
        ("couldn'tve", "couldn't've", "couldn't've"),
        ("somebody'd", "somebodyd", "somebodyd"),
        ("a/b", "b", "b"),  # the slash becomes a space, and a is an article
        ("x-y", "x y", "x y"),
        ("x -y z-w", "x y zw", "x y zw"),  # it touches a space once, so it goes without trace everywhere
        # VQAv2: a comma between digits removes all marks; TextVQA has dropped the comma
        ("1,000-2", "10002", "1000 2"),
        ("1,,2", "1 2", "12"),
        ("what?now", "what now", "whatnow"),
        ("man's hat", "man's hat", "man 's hat"),
        ("3.5 ft.", "3.5 ft", "3.5 ft"),
        (".5 5.", ".5 5", ".5 5"),
        ("a.b." * 20, "ab" * 16 + "a.b." * 4, "ab" * 16 + "a.b." * 4),  # only 32 periods go
        ("3.\u0662", "3\u0662", "3.\u0662"),  # an Arabic digit
        ("你好。", "你好。", "你好。"),
        ("one\ntwo\tthree", "1 2 3", "1 2 3"),
        ("", "", ""),
        ("?!", "", ""),
    ],
)
def test_answers_that_count_as_equal(answer, vqav2s, textvqas):
    assert vqa_answer(answer) == vqav2s
    assert evalai_answer(answer) == textvqas


@pytest.mark.parametrize("agree, worth", [(0, 0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1), (10, 1)])
def test_ten_people_one_left_out(agree, worth):
    """With n people who agree: in n of ten cases n - 1 others do, else n, and three are enough."""
    people = ["x"] * agree + [f"other {n}" for n in range(10 - agree)]
    assert soft_accuracy("x", people) == pytest.approx(worth, abs=1e-12)


def test_the_two_benchmarks_differ():
    assert vqa_accuracy("Yes", ["yes"] * 10) == 0  # all agree, so it is compared as written
    assert vqa_accuracy(" yes\tsir\n", ["yes sir"] * 10) == 1
    assert vqa_accuracy("Yes", ["yes"] * 9 + ["no"]) == 1
    assert textvqa_accuracy("Yes", ["yes"] * 10) == 1
    assert textvqa_accuracy("what?now", ["whatnow"] * 10) == textvqa_accuracy("whatnow", ["what?now"] * 10) == 1
    assert textvqa_accuracy("the dogs", ["Dogs,"] * 3 + [str(n) for n in range(20, 27)]) == pytest.approx(0.9)


def val_folder(folder, people=("red",) * 10):
    asked = [(7, 1, "What color?"), (8, 1, "How many?"), (9, 42, "Is it?")]
    kinds = {7: ("other", "what color"), 8: ("number", "how many"), 9: ("yes/no", "is it")}
    questions = [dict(question_id=id, image_id=image, question=text) for id, image, text in asked]
    annotations = [
        dict(
            question_id=id,
            image_id=image,
            answer_type=kinds[id][0],
            question_type=kinds[id][1],
            multiple_choice_answer="",
            answers=[dict(answer=each, answer_id=n, answer_confidence="yes") for n, each in enumerate(people)],
        )
        for id, image, _ in reversed(asked)
    ]
    (folder / vqav2.VAL_QUESTIONS).write_text(json.dumps({"questions": questions}))
    (folder / vqav2.VAL_ANNOTATIONS).write_text(json.dumps({"annotations": annotations}))
    (folder / "val2014").mkdir(exist_ok=True)
    return folder


def test_vqav2_val(tmp_path):
    questions = vqav2.TASK.read(val_folder(tmp_path), "val")
    assert [one.id for one in questions] == [7, 8, 9]
    assert questions[0].prompt == "What color?\nAnswer the question using a single word or phrase."
    assert questions[2].image == tmp_path / "val2014" / "COCO_val2014_000000000042.jpg"
    assert questions[2].gold == {"answers": ["red"] * 10, "answer_type": "yes/no", "question_type": "is it"}
    assert vqav2.TASK.max_new_tokens == 128


def test_vqav2_score(tmp_path):
    people = ["red"] * 2 + ["The Red."] + ["blue"] * 7
    questions = vqav2.TASK.read(val_folder(tmp_path, people), "val")
    score = vqav2.TASK.score(questions, {7: "red", 8: "Blue!", 9: "green"})
    assert score.value == pytest.approx((90 + 100 + 0) / 3)
    assert score.figures["answer_type"] == pytest.approx({"number": 100, "other": 90, "yes/no": 0})
    assert score.figures["question_type"] == pytest.approx({"how many": 100, "is it": 0, "what color": 90})
    assert score.rows[1:3] == [("all", "63.33", 3), ("number", "100.00", 1)]
    json.dumps(score.figures)
    with pytest.raises(ViCAError, match="1 of 3 questions have no answer: 9"):
        vqav2.TASK.score(questions, {7: "", 8: ""})
    with pytest.raises(ViCAError, match="1 questions share their id with another: 7"):
        vqav2.TASK.score([*questions, questions[0]], {7: "", 8: "", 9: ""})


def test_vqav2_results_of_val(tmp_path):
    questions = vqav2.TASK.read(val_folder(tmp_path), "val")
    path = vqav2.TASK.submit(questions, {9: "The Dog.", 7: "x", 8: ""}, tmp_path)
    ids_and_answers = [(7, "x"), (8, ""), (9, "The Dog.")]
    assert json.loads(path.read_text()) == [dict(question_id=id, answer=text) for id, text in ids_and_answers]


def dev_folder(folder, whole=(5, 6, 30)):
    lines = [
        dict(question_id=id, image=f"COCO_test2015_{id:012d}.jpg", text=f"Q{id}?\nA.", category="") for id in (6, 30)
    ]
    (folder / vqav2.TEST_DEV).write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / vqav2.WHOLE_TEST).write_text("".join(json.dumps(dict(question_id=id)) + "\n" for id in whole))
    (folder / "test2015").mkdir(exist_ok=True)
    return folder


def test_vqav2_test_dev(tmp_path):
    questions = vqav2.TASK.read(dev_folder(tmp_path), "test-dev")
    assert [(one.id, one.prompt) for one in questions] == [(6, "Q6?\nA."), (30, "Q30?\nA.")]
    assert questions[0].image == tmp_path / "test2015" / "COCO_test2015_000000000006.jpg"
    answers = {6: "The Two Dogs.", 30: "isnt"}
    assert vqav2.TASK.score(questions, answers).value is None
    path = vqav2.TASK.submit(questions, answers, tmp_path)
    assert json.loads(path.read_text()) == [
        dict(question_id=5, answer=""),
        dict(question_id=6, answer="2 dogs"),
        dict(question_id=30, answer="isn't"),
    ]
    with pytest.raises(ViCAError, match="1 of 2 questions have no answer: 30"):
        vqav2.TASK.submit(questions, {6: ""}, tmp_path)
    dev_folder(tmp_path, whole=(5, 6))
    with pytest.raises(ViCAError, match="lacks questions that were answered: 30"):
        vqav2.TASK.submit(questions, answers, tmp_path)


@pytest.mark.parametrize("split", ["val", "test-dev"])
def test_vqav2_from_the_hub(tmp_path, monkeypatch, split):
    answers = [dict(answer="red", answer_confidence="yes", answer_id=n) for n in range(10)] if split == "val" else None
    common = dict(question_type="what color", multiple_choice_answer="red", answers=answers, answer_type="other")
    rows = [
        dict(common, image_id=image, question_id=id, question=f"Q{id}?", image=png("red"))
        for id, image in ((7, 1), (8, 1), (9, 2))
    ]
    stand_in(monkeypatch, tmp_path, rows, "lmms-lab/VQAv2", None, {"val": "validation", "test-dev": "testdev"}[split])
    monkeypatch.setattr(vqav2, "HUB_FOLDER", dev_folder(tmp_path, whole=(7, 8, 9, 10)))
    questions = vqav2.TASK.read_hub(split)
    assert [one.prompt for one in questions][1] == "Q8?\nAnswer the question using a single word or phrase."
    keys = [one.image_key for one in questions]
    assert keys[0] == keys[1] != keys[2]
    assert questions[0].image.read() == png("red")
    if split == "val":
        assert questions[0].gold == {"answers": ["red"] * 10, "answer_type": "other", "question_type": "what color"}
    else:
        path = vqav2.TASK.submit(questions, {7: "a", 8: "b", 9: "c"}, tmp_path)
        assert [line["question_id"] for line in json.loads(path.read_text())] == [7, 8, 9, 10]


def test_vqav2_lost_files(tmp_path, monkeypatch):
    with pytest.raises(
        ViCAError, match=f"{vqav2.VAL_ANNOTATIONS} is not there. Get it: wget .*v2_Annotations_Val_mscoco"
    ):
        vqav2.TASK.read(tmp_path, "val")
    with pytest.raises(ViCAError, match=f"{vqav2.WHOLE_TEST} is not there. It is in LLaVA's eval.zip"):
        vqav2.TASK.read(tmp_path, "test-dev")
    monkeypatch.setattr(vqav2, "HUB_FOLDER", tmp_path)
    # before gigabytes are downloaded from the hub
    with pytest.raises(ViCAError, match=f"{vqav2.WHOLE_TEST} is not there"):
        vqav2.TASK.read_hub("test-dev")
    for folder, split, pictures in ((val_folder, "val", "val2014"), (dev_folder, "test-dev", "test2015")):
        (folder(tmp_path) / pictures).rmdir()
        with pytest.raises(ViCAError, match=rf"{pictures} is not there. Get it: wget .*/{pictures}.zip && unzip .* -d"):
            vqav2.TASK.read(tmp_path, split)
    val_folder(tmp_path)
    (tmp_path / vqav2.VAL_ANNOTATIONS).write_text('{"annotations": []}')
    with pytest.raises(ViCAError, match="has no answers to question 7"):
        vqav2.TASK.read(tmp_path, "val")


TEXTVQA_PROMPT = (
    "What is the BRAND?\nReference OCR token: ACME, 20%\nAnswer the question using a single word or phrase.",
    "what is it?\nReference OCR token: \nAnswer the question using a single word or phrase.",
)


def textvqa_folder(folder):
    lines = [dict(question_id="00ab", image="00ab.jpg", text=text, category="default") for text in TEXTVQA_PROMPT]
    (folder / textvqa.QUESTIONS).write_text("".join(json.dumps(line) + "\n" for line in lines))
    data = [
        dict(image_id="00ab", question_id=11, question="What is it?", answers=["two"] * 3 + ["box"] * 7),
        dict(image_id="00ab", question_id=10, question="what is the brand?", answers=["acme"] * 10),
        dict(image_id="ffff", question_id=12, question="what is it?", answers=["car"] * 10),
    ]
    (folder / textvqa.ANNOTATIONS).write_text(json.dumps({"data": data}))
    (folder / "train_images").mkdir(exist_ok=True)
    return folder


def test_textvqa(tmp_path):
    questions = textvqa.TASK.read(textvqa_folder(tmp_path), "val")
    assert [(one.id, one.prompt) for one in questions] == list(zip((10, 11), TEXTVQA_PROMPT))
    assert questions[0].image == tmp_path / "train_images" / "00ab.jpg"
    score = textvqa.TASK.score(questions, {10: "The ACME,", 11: "2"})
    assert score.value == pytest.approx((100 + 90) / 2)
    assert score.rows[1] == ("all", "95.00", 2)
    with pytest.raises(ViCAError, match="1 of 2 questions have no answer: 11"):
        textvqa.TASK.score(questions, {10: ""})
    with pytest.raises(ViCAError, match="1 answers belong to no question: 12"):
        textvqa.TASK.score(questions, {10: "", 11: "", 12: ""})
    assert textvqa.TASK.max_new_tokens == 128


def test_textvqa_scores_an_answer_for_each_person(tmp_path):
    """The mean is over as many people as there are."""
    question = Question(1, "", None, {"answers": ["a b", "x", "x"]})
    assert textvqa.TASK.score([question], {1: "x"}).value == pytest.approx(100 * (2 / 3 + 1 / 3 + 1 / 3) / 3)


def test_textvqa_from_the_hub(tmp_path, monkeypatch):
    common = dict(image_id="00ab", image=png("blue"), question_tokens=["what"], set_name="val")
    rows = [
        dict(common, question_id=10, question="what is the BRAND?", ocr_tokens=["ACME", "20%"], answers=["acme"] * 10),
        dict(common, question_id=11, question="what is it?", ocr_tokens=[], answers=["two"] * 3 + ["box"] * 7),
    ]
    stand_in(monkeypatch, tmp_path, rows, "lmms-lab/textvqa", None, "validation")
    questions = textvqa.TASK.read_hub("val")
    assert [one.prompt for one in questions] == [
        "What is the brand?\nReference OCR token: ACME, 20%\nAnswer the question using a single word or phrase.",
        "What is it?\nReference OCR token: \nAnswer the question using a single word or phrase.",
    ]
    assert [one.gold for one in questions] == [one.gold for one in textvqa.TASK.read(textvqa_folder(tmp_path), "val")]
    assert questions[0].image_key == questions[1].image_key
    assert questions[1].image.read() == png("blue")


def test_textvqa_lost_files(tmp_path):
    with pytest.raises(ViCAError, match=rf"{textvqa.ANNOTATIONS} is not there. Get it: wget -P {tmp_path} https"):
        textvqa.TASK.read(tmp_path, "val")
    (textvqa_folder(tmp_path) / "train_images").rmdir()
    with pytest.raises(ViCAError, match="train_images is not there. Get it: wget .*train_val_images.zip"):
        textvqa.TASK.read(tmp_path, "val")
    textvqa_folder(tmp_path)
    (tmp_path / textvqa.QUESTIONS).unlink()
    with pytest.raises(ViCAError, match=f"{textvqa.QUESTIONS} is not there. It is in LLaVA's eval.zip"):
        textvqa.TASK.read(tmp_path, "val")
    textvqa_folder(tmp_path)
    (tmp_path / textvqa.ANNOTATIONS).write_text('{"data": []}')
    with pytest.raises(ViCAError, match=r"has no question 'What is the BRAND\?' for picture 00ab"):
        textvqa.TASK.read(tmp_path, "val")
