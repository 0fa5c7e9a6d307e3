"""Tests MMBench, MMBench_CN and ScienceQA: prompts, files, the hub's rows, and scores against answers worked out by
hand."""

import base64
import csv
import json
import pickle
from xml.etree import ElementTree
from zipfile import ZipFile

import pytest

from tests.hub import png, stand_in
from vica.eval import mmbench, sqa
from vica.eval.choices import chosen
from vica.eval.tables import write_spreadsheet
from vica.utils.errors import ViCAError

LETTER = "Answer with the option's letter from the given choices directly."
COLUMNS = "index question hint A B C D answer category image source l2-category comment split".split()


def mmbench_rows(hint="") -> list[dict]:
    """Returns two questions, with two and three options, each once for every option. A picture is stored once."""
    rows = []
    for number, colour, given in ((3, "red", ("yes", "no")), (8, "blue", ("cat", "dog", "One."))):
        for turn in range(len(given)):
            turned = dict(zip("ABCD", [*given[-turn:], *given[:-turn]] if turn else given))
            rows.append(dict.fromkeys(COLUMNS, "") | turned)
            rows[-1] |= {"index": number + turn * 1_000_000, "question": f"Which\nis {number}?", "answer": "ABCD"[turn]}
            rows[-1] |= {"category": f"kind {number}", "l2-category": "both", "split": "dev", "hint": hint}
            rows[-1]["image"] = str(number) if turn else base64.b64encode(png(colour)).decode()
    return sorted(rows, key=lambda row: row["index"] // 1_000_000)


def write_table(path, rows, columns=COLUMNS):
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, columns, delimiter="\t", lineterminator="\n", extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)


@pytest.fixture
def english(tmp_path):
    write_table(tmp_path / "mmbench_dev_20230712.tsv", mmbench_rows(hint='A "hint",\tso to say.'))
    return mmbench.ENGLISH.read(tmp_path, "dev")


def test_mmbench(english):
    assert [one.id for one in english] == [3, 8, 1000003, 1000008, 2000008]
    assert english[0].prompt == f'A "hint",\tso to say.\nWhich\nis 3?\nA. yes\nB. no\n{LETTER}'
    assert english[4].prompt == f'A "hint",\tso to say.\nWhich\nis 8?\nA. dog\nB. One.\nC. cat\n{LETTER}'
    assert english[4].gold["options"] == {"A": "dog", "B": "One.", "C": "cat"}
    assert [one.gold["answer"] for one in english] == list("AABBC")
    assert mmbench.ENGLISH.max_new_tokens == mmbench.CHINESE.max_new_tokens == 1024


def test_mmbench_pictures_stay_in_the_table(english):
    keys = [one.image_key for one in english]
    assert keys[0] == keys[2] != keys[1] == keys[3] == keys[4]
    pictures = [one.image.read() for one in pickle.loads(pickle.dumps(english))]  # as a worker receives them
    assert pictures == [png(colour) for colour in ("red", "blue", "red", "blue", "blue")]
    assert all(len(pickle.dumps(one.image)) < 1000 for one in english)


def test_mmbench_questions_about_one_picture(tmp_path):
    """Two rows with the same bytes, neither of which points to the other, share one encoding."""
    rows = mmbench_rows()
    rows[1]["image"] = rows[0]["image"]
    write_table(tmp_path / "mmbench_dev_20230712.tsv", rows)
    assert len({one.image_key for one in mmbench.ENGLISH.read(tmp_path, "dev")}) == 1


def test_mmbench_cn(tmp_path):
    rows = mmbench_rows()
    rows[0] |= {"question": "这是什么？", "A": "猫", "B": "None", "C": "狗"}
    write_table(tmp_path / "mmbench_dev_cn_20231003.tsv", rows)
    questions = mmbench.CHINESE.read(tmp_path, "dev")
    assert questions[0].prompt == "这是什么？\nA. 猫\n请直接回答选项字母。"  # LLaVA shows no option after a missing one
    assert questions[0].gold["options"] == {"A": "猫", "C": "狗"}


@pytest.mark.parametrize("task, config", [(mmbench.ENGLISH, "en"), (mmbench.CHINESE, "cn")])
def test_mmbench_from_the_hub(tmp_path, monkeypatch, task, config):
    file = tmp_path / mmbench.TABLES[task.name]["dev"]
    write_table(file, mmbench_rows(hint="Look."))
    rows = []
    for row in mmbench_rows(hint="Look."):
        row["image"] = png("red" if row["index"] % 10 == 3 else "blue")
        row["L2-category"] = row.pop("l2-category")
        rows.append({name: "nan" if value == "" else value for name, value in row.items()})
    stand_in(monkeypatch, tmp_path, rows, "lmms-lab/MMBench", config, "dev")
    ours, files = task.read_hub("dev"), task.read(tmp_path, "dev")
    told = [[(one.id, one.prompt, one.gold) for one in questions] for questions in (ours, files)]
    assert told[0] == told[1]
    keys = [one.image_key for one in ours]
    assert keys[0] == keys[2] != keys[1] == keys[3] == keys[4]
    assert ours[1].image.read() == png("blue")


def test_mmbench_lost_and_broken_tables(tmp_path):
    with pytest.raises(ViCAError, match=rf"mmbench_dev_20230712.tsv is not there. Get it: wget -P {tmp_path} https"):
        mmbench.ENGLISH.read(tmp_path, "dev")
    with pytest.raises(ViCAError, match="mmbench_test_cn_20231003.tsv is not there"):
        mmbench.CHINESE.read(tmp_path, "test")
    path = tmp_path / "mmbench_dev_20230712.tsv"
    write_table(path, mmbench_rows()[1:])
    with pytest.raises(ViCAError, match="picture of these rows is not there: 1000003$"):
        mmbench.ENGLISH.read(tmp_path, "dev")
    write_table(path, mmbench_rows(), [name for name in COLUMNS if name != "image"])
    with pytest.raises(ViCAError, match="has no column image"):
        mmbench.ENGLISH.read(tmp_path, "dev")
    path.write_text("\t".join(COLUMNS) + "\n1\tWhat?\n")
    with pytest.raises(ViCAError, match="the row at byte 83 has 2 values, its heading 14"):
        mmbench.ENGLISH.read(tmp_path, "dev")


def test_mmbench_score(english):
    answers = {3: "A", 1000003: "The answer is B.", 8: "A. cat", 1000008: "(B)", 2000008: "cat"}
    score = mmbench.ENGLISH.score(english, answers)
    assert (score.value, score.metric) == (100, "circular accuracy")
    score = mmbench.ENGLISH.score(english, answers | {2000008: "A"})  # one rotation of the second question is wrong
    assert (score.value, score.figures["vanilla"], score.figures["vanilla_all"]) == (50, 100, 80)
    assert score.figures["parts"]["category: kind 8"] == dict(questions=1, circular=0, vanilla=100, vanilla_all=200 / 3)
    assert score.figures["parts"]["l2-category: both"]["circular"] == 50
    assert score.rows[1] == ("all", "50.00", "100.00", "80.00", 2)
    json.dumps(score.figures)
    with pytest.raises(ViCAError, match="1 of 5 questions have no answer: 2000008"):
        mmbench.ENGLISH.score(english, dict(list(answers.items())[:4]))
    with pytest.raises(ViCAError, match="share their id with another: 3"):
        mmbench.ENGLISH.score([*english, english[0]], answers)


def test_mmbench_unrotated_table(english):
    score = mmbench.ENGLISH.score(english[:2], {3: "A", 8: "B"})
    assert score.value == score.figures["vanilla"] == 50


OPTIONS = {"A": "a cat", "B": "Two dogs", "C": "dogs"}


@pytest.mark.parametrize(
    "answer, letter",
    [
        ("B", "B"),
        ("B.", "B"),
        ("(B)", "B"),
        ("[B]: dogs", "B"),
        ("Option *B*!", "B"),
        ("b", None),
        ("B。", None),  # a Chinese full stop becomes no space
        ("A or B", None),
        ("A bird sits on a warm mat", None),  # more than four words after A
        ("I see a nice cat: A", "A"),
        ("B it is what I see", None),
        ("D", None),
        ("Z", "Z"),
        ("A Z", "A"),
        ("the answer is b", "B"),
        ("The correct ANSWER is **C** as one of A or B is no dog", "C"),
        ("The answer is D", None),
        ("A CAT", "A"),
        ("it's a cat", "A"),
        ("two dogs", None),  # which contains C's text
        ("dogs", "C"),
        ("dogs, " * 6, None),  # longer than twice all options
        ("I can't process this file. B", "Z"),
        ("你好", None),
        ("", None),
    ],
)
def test_the_option_that_an_answer_means(answer, letter):
    assert chosen(answer, OPTIONS) == letter


def cells(path) -> list[list]:
    names = {"s": "http://schemas.openxmlformats.org/spreadsheetml/2006/main"}
    with ZipFile(path) as file:
        for part in file.namelist():
            ElementTree.fromstring(file.read(part))
        rows = ElementTree.fromstring(file.read("xl/worksheets/sheet1.xml")).iterfind(".//s:row", names)
        found = [[(cell.find("s:v", names), cell.find("s:is/s:t", names)) for cell in row] for row in rows]
    return [
        [int(v.text) if v is not None else t.text or "" if t is not None else None for v, t in row] for row in found
    ]


def test_mmbench_spreadsheet(english, tmp_path):
    answers = {3: "A", 1000003: "=1+1", 8: "<B> & 'C'", 1000008: "", 2000008: "猫\x00\x1b\ufffe"}
    path = mmbench.ENGLISH.submit(english, answers, tmp_path)
    heading, *rows = cells(path)
    assert heading == "index question A B C D prediction answer split".split()  # as in LLaVA's own file
    assert rows[0] == [3, "Which\nis 3?", "yes", "no", None, None, "A", "A", "dev"]
    assert [row[6] for row in rows] == ["A", "<B> & 'C'", "=1+1", "", "猫"]
    first = path.read_bytes()
    assert mmbench.ENGLISH.submit(english, answers, tmp_path).read_bytes() == first
    with pytest.raises(ViCAError, match="1 of 5 questions have no answer: 3"):
        mmbench.ENGLISH.submit(english, {id: text for id, text in answers.items() if id != 3}, tmp_path)


def test_a_cell_has_a_longest_text(tmp_path):
    assert len(cells(write_spreadsheet(tmp_path / "long.xlsx", [["x" * 40000]]))[0][0]) == 32767


def test_mmbench_test_split_is_only_submitted(tmp_path):
    columns = [name for name in COLUMNS if name not in ("answer", "split")]
    write_table(tmp_path / "mmbench_test_20230712.tsv", mmbench_rows(), columns)
    questions = mmbench.ENGLISH.read(tmp_path, "test")
    answers = {one.id: "A" for one in questions}
    assert mmbench.ENGLISH.score(questions, answers).value is None
    heading, *rows = cells(mmbench.ENGLISH.submit(questions, answers, tmp_path))
    assert heading == "index question A B C D prediction".split()
    assert len(rows) == 5


PROBLEM = {
    "question": "Which is  blue?",
    "choices": ["the sea", "a lemon"],
    "answer": 0,
    "hint": "Look at the picture.",
    "subject": "natural science",
    "topic": "physics",
    "grade": "grade6",
}
BARE = PROBLEM | dict(question="Is it?", choices=list("vwxyz"), answer=4, hint="", grade="grade7", topic="verbs")
BARE["subject"] = "language science"
SQA_PROMPTS = (
    f"Context: Look at the picture.\nWhich is blue?\nA. the sea\nB. a lemon\n{LETTER}",
    f"Is it?\nA. v\nB. w\nC. x\nD. y\nE. z\n{LETTER}",
)


def sqa_folder(folder):
    values = [f"<image>\n{SQA_PROMPTS[0].removesuffix(LETTER)}", SQA_PROMPTS[1].removesuffix(LETTER)]
    lines = [dict(id=id, conversations=[{"from": "human", "value": value}]) for id, value in zip(("7", "9"), values)]
    lines[0]["image"] = "7/image.png"
    for name, content in {
        "pid_splits.json": {"train": ["1"], "test": ["7", "9"]},
        "problems.json": {"7": PROBLEM | {"image": "image.png"}, "9": BARE | {"image": None}, "1": {}},
        sqa.QUESTIONS: lines,
    }.items():
        (folder / name).write_text(json.dumps(content))
    (folder / "images" / "test").mkdir(parents=True, exist_ok=True)
    return folder


def test_sqa(tmp_path):
    questions = sqa.TASK.read(sqa_folder(tmp_path), "test")
    assert [(one.id, one.prompt) for one in questions] == list(zip(("7", "9"), SQA_PROMPTS))
    assert questions[0].image == tmp_path / "images" / "test" / "7" / "image.png"
    assert questions[1].image is None
    assert [one.id for one in sqa.TASK.read(tmp_path, "image")] == ["7"]
    assert (sqa.TASK.splits[0], sqa.TASK.max_new_tokens) == ("image", 1024)


@pytest.mark.parametrize("split, config", [("image", "ScienceQA-IMG"), ("test", "ScienceQA-FULL")])
def test_sqa_from_the_hub(tmp_path, monkeypatch, split, config):
    rows = [PROBLEM | {"image": png("red")}]
    rows += [BARE | {"image": None}] if split == "test" else []
    stand_in(monkeypatch, tmp_path, rows, "lmms-lab/ScienceQA", config, "test")
    questions, files = sqa.TASK.read_hub(split), sqa.TASK.read(sqa_folder(tmp_path), split)
    assert [(one.prompt, one.gold) for one in questions] == [(one.prompt, one.gold) for one in files]
    assert [one.image and one.image.read() for one in questions] == [png("red"), None][: len(rows)]


@pytest.mark.parametrize(
    "answer, choice",
    [
        ("B", 1),
        ("B. dogs", 1),
        ("B.", None),
        ("B.dogs", None),
        ("(B)", None),
        ("b", None),
        (" B", None),
        ("The answer is C.", 2),
        ("So. The answer is C because", 2),
        ("The answer is C", None),  # nothing after the letter
        ("The answer is C.\nThe answer is C.", None),  # said twice
        ("D", None),  # there are only three
        ("D. dogs. The answer is A.", None),
        ("E", None),
        ("AB", None),
        ("", None),
        ("答案是 B", None),
    ],
)
def test_the_choice_that_an_answer_names(answer, choice):
    assert sqa.chosen(answer, 3) == choice


def test_sqa_score(tmp_path):
    questions = sqa.TASK.read(sqa_folder(tmp_path), "test")
    score = sqa.TASK.score(questions, {"7": "B", "9": "E. z"})
    assert score.value == 50
    parts = {name: (part["questions"], part["accuracy"]) for name, part in score.figures["parts"].items()}
    assert parts == {
        "all": (2, 50),
        "natural science": (1, 0),
        "social science": (0, 0),
        "language science": (1, 100),
        "text context": (1, 0),
        "image context": (1, 0),
        "no context": (1, 100),
        "grades 1-6": (1, 0),
        "grades 7-12": (1, 100),
        "topic: physics": (1, 0),
        "topic: verbs": (1, 100),
    }
    assert score.rows[1:3] == [("all", "50.00", 2), ("natural science", "0.00", 1)]
    with pytest.raises(ViCAError, match="1 of 2 questions have no answer: 9"):
        sqa.TASK.score(questions, {"7": "B"})


def test_sqa_lost_and_broken_files(tmp_path):
    for name, told in (("pid_splits.json", "wget"), ("problems.json", "wget"), (sqa.QUESTIONS, "eval.zip")):
        sqa_folder(tmp_path)
        (tmp_path / name).unlink()
        with pytest.raises(ViCAError, match=f"{name} is not there. .*{told}"):
            sqa.TASK.read(tmp_path, "test")
    (sqa_folder(tmp_path) / "images" / "test").rmdir()
    with pytest.raises(ViCAError, match="images/test is not there. Get it: wget .*test.zip && unzip"):
        sqa.TASK.read(tmp_path, "test")
    for splits, problems, stray in (
        (["7"], ["7", "9"], "9"),
        (["7", "9", "11"], ["7", "9"], "11"),
        (["7", "9"], ["9"], "7"),
    ):
        sqa_folder(tmp_path)
        (tmp_path / "pid_splits.json").write_text(json.dumps({"test": splits}))
        (tmp_path / "problems.json").write_text(json.dumps({id: PROBLEM | {"image": None} for id in problems}))
        with pytest.raises(ViCAError, match=f"differ in their questions: {stray}$"):
            sqa.TASK.read(tmp_path, "test")
