"""Tests the toy world as nine benchmarks: file formats as the authors publish them, and answers as the pictures show
them. The tests read the files in the plainest way, with no code of the package."""

import base64
import csv
import io
import json
import os
import subprocess
import sys
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.toy.test_world import Eyes, contents, in_english, translated
from vica.toy import benchmark_parts, benchmarks
from vica.toy.world import draw
from vica.utils.errors import ViCAError

SHORT = "Answer the question using a single word or phrase."
LETTER = "Answer with the option's letter from the given choices directly."
NINE = {"vqav2", "gqa", "mme", "mmbench", "mmbench_cn", "pope", "seed", "sqa", "textvqa"}
MME = "MME/MME_Benchmark_release_version"
MME_FLAT = {"existence", "count", "position", "color", "OCR", "commonsense_reasoning"}
MME_APART = {"scene", "artwork"}
QUESTION_FILES = {  # LLaVA's question files, with the folder of the images that they name
    "vqav2/llava_vqav2_mscoco_test2015.jsonl": "vqav2/test2015",
    "vqav2/llava_vqav2_mscoco_test-dev2015.jsonl": "vqav2/test2015",
    "gqa/llava_gqa_testdev_balanced.jsonl": "gqa/data/images",
    "MME/llava_mme.jsonl": MME,
    "pope/llava_pope_test.jsonl": "pope/val2014",
    "seed_bench/llava-seed-bench.jsonl": "seed_bench",
    "textvqa/llava_textvqa_val_v051_ocr.jsonl": "textvqa/train_images",
}
OTHER_FILES = {
    "vqav2/v2_OpenEnded_mscoco_val2014_questions.json",
    "vqav2/v2_mscoco_val2014_annotations.json",
    "gqa/data/testdev_balanced_questions.json",
    "mmbench/mmbench_dev_20230712.tsv",
    "mmbench_cn/mmbench_dev_cn_20231003.tsv",
    "pope/coco/coco_pope_random.json",
    "pope/coco/coco_pope_popular.json",
    "pope/coco/coco_pope_adversarial.json",
    "seed_bench/SEED-Bench.json",
    "scienceqa/pid_splits.json",
    "scienceqa/problems.json",
    "scienceqa/llava_test_CQM-A.json",
    "textvqa/TextVQA_0.5.1_val.json",
    "truth.json",
}
TABLES = {"mmbench": "mmbench/mmbench_dev_20230712.tsv", "mmbench_cn": "mmbench_cn/mmbench_dev_cn_20231003.tsv"}


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    def draw_and_remember(scene):
        scenes.append(scene)
        return draw(scene)

    scenes, folder = [], tmp_path_factory.mktemp("toy") / "eval"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(benchmark_parts, "draw", draw_and_remember)
        benchmarks.write(folder, seed=5)
    return folder, {benchmark_parts.encoded(scene, kind): scene for scene in scenes for kind in ("JPEG", "PNG")}


@pytest.fixture(scope="module")
def folder(written):
    return written[0]


@pytest.fixture(scope="module")
def drawn(written):
    """Returns all scenes of the folder, by the bytes of their pictures."""
    return written[1]


@pytest.fixture(scope="module")
def truth(folder):
    return json.loads((folder / "truth.json").read_text(encoding="utf-8"))


def load(path: Path):
    return json.loads(path.read_text(encoding="utf-8"))


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def table(path: Path) -> list[dict]:
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file, delimiter="\t"))


def image_bytes(folder: Path, name: str, asked: dict) -> bytes:
    if name not in TABLES:
        return (folder / asked["image"]).read_bytes()
    row = next(row for row in table(folder / asked["image"]) if int(row["index"]) == asked["id"])
    return base64.b64decode(row["image"], validate=True)


def keys(records) -> set[tuple]:
    return {tuple(sorted(record)) for record in records}


def is_picture(path: Path) -> bool:
    return path.suffix in (".jpg", ".png") or path.parent.name == "SEED-Bench-image"


def test_the_folder_holds_nine_benchmarks_and_the_truth(folder, truth):
    assert {p.name for p in folder.iterdir()} == {
        "vqav2", "gqa", "MME", "mmbench", "mmbench_cn", "pope", "seed_bench", "scienceqa", "textvqa", "truth.json"
    }  # fmt: skip
    assert {p.name for p in (folder / MME).iterdir()} == MME_FLAT | MME_APART
    files = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file() and not is_picture(p)}
    assert {file for file in files if not file.startswith(MME)} == OTHER_FILES | set(QUESTION_FILES)
    assert truth.keys() == NINE | {"vqav2_test"} and all(30 <= len(truth[name]) <= 80 for name in NINE)
    assert sum(len(truth[name]) for name in truth) < 600
    for asked in (asked for name in truth for asked in truth[name]):
        assert asked.keys() - {"means", "also"} == {"id", "image", "question", "answer", "group"}


def test_a_seed_gives_one_folder(folder, tmp_path):
    command = [sys.executable, "-m", "vica.toy.benchmarks", "--out", str(tmp_path / "again"), "--seed", "5"]
    done = subprocess.run(command, env={**os.environ, "PYTHONHASHSEED": "1"}, capture_output=True, text=True)
    assert done.returncode == 0 and "pope 72" in done.stdout, done.stderr
    files = contents(folder)
    assert contents(tmp_path / "again") == files
    benchmarks.write(tmp_path / "few", pictures=9, seed=5)
    few = {name: data for name, data in contents(tmp_path / "few").items() if is_picture(Path(name))}
    assert len(few) > 60 and all(files[name] == data for name, data in few.items())
    benchmarks.write(tmp_path / "other", pictures=9, seed=6)
    other = contents(tmp_path / "other")
    assert not [name for name in few if other.get(name) == few[name]]


def test_every_picture_is_asked_about_and_opens(folder, truth):
    for file, images in QUESTION_FILES.items():
        for record in lines(folder / file):
            if not record["image"].startswith("SEED-Bench-video-image/"):
                assert (folder / images / record["image"]).is_file(), record
    asked = {asked["image"] for name in truth if name not in TABLES for asked in truth[name]} - {None}
    assert asked == {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file() and is_picture(p)}
    for name in asked:
        with Image.open(folder / name) as picture:
            picture.load()
            assert picture.size == (112, 112) and picture.mode == "RGB"
            assert picture.format == ("PNG" if name.endswith(".png") else "JPEG"), name
    for file in TABLES.values():
        for row in table(folder / file):
            assert Image.open(io.BytesIO(base64.b64decode(row["image"], validate=True))).format == "JPEG"


def test_the_truth_matches_the_pictures(folder, truth, drawn):
    kinds = Counter()
    for name in truth:
        for asked in truth[name]:
            if asked["image"] is None:
                assert name == "sqa" and asked["group"] == "text"
                continue
            scene = drawn[image_bytes(folder, name, asked)]
            eyes, question, answer = Eyes(scene, draw(scene)), asked["question"], asked.get("means", asked["answer"])
            if name == "mmbench_cn":
                assert not question.isascii()
                question, answer = in_english(question), translated(answer)
            assert eyes.answer(question).lower() == answer.lower(), (name, asked)
            kinds[name] += 1
    assert set(kinds) == set(truth) and kinds["sqa"] == 24


def test_colours_survive_jpeg(drawn):
    for data, scene in drawn.items():
        exact, seen = np.asarray(draw(scene)).astype(int), np.asarray(Image.open(io.BytesIO(data))).astype(int)
        assert abs(exact - seen).max() <= (0 if data.startswith(b"\x89PNG") else 12)


def test_llavas_questions(folder, truth):
    """Checks the questions' words, the official sentence after them, and the official keys."""
    names = ("vqav2_test", None, "gqa", "mme", "pope", "seed", "textvqa")
    for (file, images), name in zip(QUESTION_FILES.items(), names):
        records = lines(folder / file)
        assert keys(records) == {("category", "image", "question_id", "text")}, file
        for record in records:
            words, *rest, sentence = record["text"].split("\n")
            assert sentence == (LETTER if name == "seed" else SHORT) and "<image>" not in record["text"]
            assert (len(rest) == 4) if name == "seed" else (len(rest) == (name == "textvqa")), record
            if name in ("vqav2_test", "gqa", "textvqa"):
                assert record["category"] == "default"
        if name:
            found = [(r["question_id"], f"{images}/{r['image']}", r["text"].split("\n")[0]) for r in records]
            expected = [(asked["id"], asked["image"], asked["question"]) for asked in truth[name]]
            assert [one for one in found if not str(one[0]).startswith("v")] == expected, file


def test_vqav2(folder, truth):
    asked = load(folder / "vqav2/v2_OpenEnded_mscoco_val2014_questions.json")
    answered = load(folder / "vqav2/v2_mscoco_val2014_annotations.json")
    assert asked.keys() == {"info", "task_type", "data_type", "license", "data_subtype", "questions"}
    assert answered.keys() == {"info", "data_type", "license", "data_subtype", "annotations"}
    assert asked["task_type"] == "Open-Ended" and asked["data_subtype"] == answered["data_subtype"] == "val2014"
    assert keys(asked["questions"]) == {("image_id", "question", "question_id")}
    assert keys(answered["annotations"]) == {
        ("answer_type", "answers", "image_id", "multiple_choice_answer", "question_id", "question_type")
    }
    assert len(asked["questions"]) == len(answered["annotations"]) == len(truth["vqav2"])
    for question, annotation, right in zip(asked["questions"], answered["annotations"], truth["vqav2"]):
        assert question["question_id"] == annotation["question_id"] == right["id"]
        assert question["image_id"] == annotation["image_id"] == right["id"] // 1000
        assert right["image"] == f"vqav2/val2014/COCO_val2014_{question['image_id']:012}.jpg"
        assert question["question"] == right["question"]
        assert annotation["multiple_choice_answer"] == right["answer"] and annotation["answer_type"] == right["group"]
        assert keys(annotation["answers"]) == {("answer", "answer_confidence", "answer_id")}
        assert [answer["answer_id"] for answer in annotation["answers"]] == [*range(1, 11)]
        check_votes([answer["answer"] for answer in annotation["answers"]], right)
    assert set(Counter(a["answer_type"] for a in answered["annotations"])) == {"yes/no", "number", "other"}
    whole = lines(folder / "vqav2/llava_vqav2_mscoco_test2015.jsonl")
    dev = lines(folder / "vqav2/llava_vqav2_mscoco_test-dev2015.jsonl")
    assert 0 < len(dev) < len(whole) and all(record in whole for record in dev)


def check_votes(answers: list[str], right: dict) -> None:
    """Computes VQA's rule by hand: in each group of nine people, three must agree for a whole point."""
    worth = {}
    for answer in set(answers):
        nines = [answers[:left_out] + answers[left_out + 1 :] for left_out in range(10)]
        worth[answer] = round(sum(min(1, nine.count(answer) / 3) for nine in nines) / 10, 6)
    assert worth == {right["answer"]: 1, **right.get("also", {})}


def test_some_of_ten_people_disagree(truth):
    for name in ("vqav2", "textvqa"):
        shares = Counter(share for asked in truth[name] for share in asked.get("also", {0: 0}).values())
        assert set(shares) == {0, 0.3, 0.6}


def test_gqa(folder, truth):
    records = load(folder / "gqa/data/testdev_balanced_questions.json")
    assert keys(records.values()) == {
        tuple(sorted("semantic entailed equivalent question imageId isBalanced groups answer semanticStr annotations "
                     "types fullAnswer".split()))
    }  # fmt: skip
    assert keys(record["types"] for record in records.values()) == {("detailed", "semantic", "structural")}
    assert [*records] == [asked["id"] for asked in truth["gqa"]]
    for asked in truth["gqa"]:
        record = records[asked["id"]]
        assert record["answer"] == asked["answer"] and record["question"] == asked["question"]
        assert asked["image"] == f"gqa/data/images/{record['imageId']}.jpg"
        assert record["types"]["structural"] == asked["group"]
        assert (record["answer"] in ("yes", "no")) == (asked["group"] == "verify")
    assert {record["types"]["structural"] for record in records.values()} == {"verify", "query", "compare"}


def test_mme(folder, truth):
    by_image = defaultdict(list)
    for asked in truth["mme"]:
        by_image[asked["id"]].append(asked)
        assert asked["group"] == asked["id"].split("/")[0] and asked["image"] == f"{MME}/{asked['id']}"
    spaces = Counter()
    for id, (one, other) in by_image.items():
        assert {one["answer"], other["answer"]} == {"yes", "no"}
        image = folder / MME / id
        assert (image.parent.name == "images") == (one["group"] in MME_APART)
        beside = image.parent.parent / "questions_answers_YN" if one["group"] in MME_APART else image.parent
        found = [line.split("\t") for line in (beside / f"{image.stem}.txt").read_text().splitlines()]
        for (text, answer), asked in zip(found, (one, other), strict=True):
            words = text.removesuffix("Please answer yes or no.")
            assert words.rstrip() == asked["question"] and answer == asked["answer"].capitalize()
            spaces[len(words) - len(words.rstrip())] += 1
    assert set(spaces) == {1, 2} and spaces[2] < spaces[1]  # both occur in the real files
    assert {asked["answer"] for asked in truth["mme"][::2]} == {"yes", "no"}, "the order must not tell"


def test_pope(folder, truth):
    asked, firsts = truth["pope"], {"adversarial": 0, "random": 10_000_000, "popular": 20_000_000}
    assert [*dict.fromkeys(a["group"] for a in asked)] == [*firsts]
    for split, first in firsts.items():
        labels, mine = lines(folder / f"pope/coco/coco_pope_{split}.json"), [a for a in asked if a["group"] == split]
        assert keys(labels) == {("image", "label", "question_id", "text")}
        assert [label["question_id"] for label in labels] == [*range(1, len(labels) + 1)]
        assert [first + label["question_id"] for label in labels] == [a["id"] for a in mine]
        assert [(f"pope/val2014/{label['image']}", label["text"], label["label"]) for label in labels] == [
            (a["image"], a["question"], a["answer"]) for a in mine
        ]
        assert Counter(label["label"] for label in labels) == {"yes": len(labels) / 2, "no": len(labels) / 2}
    absent = {
        split: Counter(a["question"] for a in asked if (a["group"], a["answer"]) == (split, "no")) for split in firsts
    }
    assert max(absent["popular"].values()) > max(absent["random"].values())


def test_mmbench(folder, truth):
    official = "index question hint A B C D answer category image source l2-category comment split".split()
    for name, file in TABLES.items():
        rows = table(folder / file)
        assert all([*row] == official and row["split"] == "dev" for row in rows)
        assert [int(row["index"]) for row in rows] == [asked["id"] for asked in truth[name]]
        assert len({int(row["index"]) for row in rows}) == len(rows)
        rounds = defaultdict(list)
        for row, asked in zip(rows, truth[name]):
            options = [row[letter] for letter in "ABCD" if row[letter]]
            assert [row[letter] for letter in "ABCD"[: len(options)]] == options and len({*options}) == len(options)
            assert row["answer"] == asked["answer"] and row[row["answer"]] == asked["means"]
            assert row["question"] == asked["question"] and row["category"] == asked["group"]
            rounds[int(row["index"]) % 1_000_000].append((row, options))
        for same in rounds.values():
            (first, options), *_ = same
            assert [int(row["index"]) // 1_000_000 for row, _ in same] == [*range(len(options))]
            for turn, (row, turned) in enumerate(same):
                assert turned == options[-turn:] + options[:-turn] if turn else turned == options
                assert all(row[c] == first[c] for c in ("question", "hint", "category", "image", "l2-category"))
        assert {len(same) for same in rounds.values()} == {2, 3, 4}
        hints = [same[0][0]["hint"] for same in rounds.values()]
        assert any("\n" in hint for hint in hints) and any(hint == "" for hint in hints)
        assert len({row["category"] for row in rows}) > len({row["l2-category"] for row in rows}) > 1
    english, chinese = (table(folder / file) for file in TABLES.values())
    for row, other in zip(english, chinese, strict=True):
        assert all(row[key] == other[key] for key in ("index", "answer", "image", "category", "l2-category"))
        assert other["question"] != row["question"] == in_english(other["question"])
        assert [translated(other[letter]) for letter in "ABCD"] == [row[letter] for letter in "ABCD"]


def test_seed_bench(folder, truth):
    data = load(folder / "seed_bench/SEED-Bench.json")
    assert data.keys() == {"questions", "question_type"} and sorted(data["question_type"].values()) == [*range(1, 13)]
    official = set(
        "answer choice_a choice_b choice_c choice_d data_id data_type question question_id question_type_id".split()
    )
    assert all(record.keys() - {"segment"} == official for record in data["questions"])
    images = [record for record in data["questions"] if record["data_type"] == "image"]
    videos = [record for record in data["questions"] if record["data_type"] == "video"]
    assert {r["question_type_id"] for r in videos} == {10, 11, 12} and len(images) == len(truth["seed"])
    assert all(("segment" in record) == (record["question_type_id"] > 10) for record in data["questions"])
    asked = {record["question_id"]: record for record in lines(folder / "seed_bench/llava-seed-bench.jsonl")}
    assert len(asked) == len(images) + len(videos)
    for record, right in zip(images, truth["seed"]):
        assert int(record["question_id"]) == right["id"] and 1 <= record["question_type_id"] <= 9
        assert record["answer"] == right["answer"] and record["question"] == right["question"]
        assert record[f"choice_{right['answer'].lower()}"] == right["means"]
        assert data["question_type"][right["group"]] == record["question_type_id"]
        assert right["image"] == f"seed_bench/SEED-Bench-image/{record['data_id']}" and "." not in record["data_id"]
    for record in data["questions"]:
        id = record["question_id"]
        options = [f"{letter}. {record[f'choice_{letter.lower()}']}" for letter in "ABCD"]
        assert asked[id if id.startswith("v") else int(id)]["text"] == "\n".join([record["question"], *options, LETTER])
    assert not (folder / "seed_bench/SEED-Bench-video-image").exists()


def test_scienceqa(folder, truth):
    splits, problems, samples = (
        load(folder / "scienceqa" / file) for file in ("pid_splits.json", "problems.json", "llava_test_CQM-A.json")
    )
    assert splits.keys() == {"train", "val", "test", "trainval", "minitrain", "minival", "minitest"}
    assert [asked["id"] for asked in truth["sqa"]] == splits["test"] == [sample["id"] for sample in samples]
    assert problems.keys() == {*splits["test"], *splits["train"]} and not {*splits["test"]} & {*splits["train"]}
    assert keys(problems.values()) == {
        tuple(sorted("question choices answer hint image task grade subject topic category skill lecture solution "
                     "split".split()))
    }  # fmt: skip
    counts = Counter()
    for asked, sample in zip(truth["sqa"], samples):
        problem, (human, gpt) = problems[asked["id"]], sample["conversations"]
        assert problem["split"] == "test" and (problem["image"] is None) == ("image" not in sample)
        assert "ABCDE"[problem["answer"]] == gpt["value"] == asked["answer"]
        assert problem["choices"][problem["answer"]] == asked["means"] and problem["question"] == asked["question"]
        options = [f"{letter}. {choice}" for letter, choice in zip("ABCDE", problem["choices"])]
        context = [f"Context: {problem['hint']}"] if problem["hint"] else []
        image = ["<image>"] if "image" in sample else []
        assert human["value"] == "\n".join([*image, *context, problem["question"], *options])
        if image:
            assert sample["image"] == f"{asked['id']}/image.png"
            assert asked["image"] == f"scienceqa/images/test/{sample['image']}"
        counts.update([asked["group"], f"{len(options)} options", *(["hint"] if context else [])])
    assert counts.keys() == {"image", "text", "hint", "2 options", "3 options", "4 options"}


def test_textvqa(folder, truth):
    data = load(folder / "textvqa/TextVQA_0.5.1_val.json")
    assert data.keys() == {"dataset_type", "dataset_name", "dataset_version", "data"}
    assert keys(data["data"]) == {
        tuple(sorted("question image_id image_classes flickr_original_url flickr_300k_url image_width image_height "
                     "answers question_tokens question_id set_name".split()))
    }  # fmt: skip
    asked = lines(folder / "textvqa/llava_textvqa_val_v051_ocr.jsonl")
    by_words = {(record["image_id"], record["question"]): record for record in data["data"]}
    assert len(by_words) == len(asked) == len(truth["textvqa"])
    tokens = Counter()
    for record, right in zip(asked, truth["textvqa"]):
        words, reference, _ = record["text"].split("\n")
        annotation = by_words[record["question_id"], words.lower()]
        assert record["image"] == f"{record['question_id']}.jpg" and len(annotation["answers"]) == 10
        assert reference.startswith("Reference OCR token: ")
        tokens[reference.count(",") if reference.removeprefix("Reference OCR token: ") else "none"] += 1
        check_votes(annotation["answers"], right)
    assert set(tokens) == {"none", 0, 1}
    assert Counter(right["group"] for right in truth["textvqa"]) == {"word": 24, "claim": 24}


def test_mistakes_are_one_line_and_leave_nothing(tmp_path, capsys, monkeypatch):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("kept")
    for arguments, told in ((["full"], "full exists and is not empty"), (["new", "--pictures", "0"], "pictures is 0")):
        assert benchmarks.main(["--out", str(tmp_path / arguments[0]), *arguments[1:]]) == 1
        error = capsys.readouterr().err
        assert told in error and error.count("\n") == 1
    benchmarks.write(tmp_path / "one", pictures=1)
    with pytest.raises(ViCAError, match="one exists and is not empty"):
        benchmarks.write(tmp_path / "one", pictures=1)

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setitem(benchmarks.WRITERS, "textvqa", interrupted)
    assert benchmarks.main(["--out", str(tmp_path / "new"), "--pictures", "2"]) == 130
    assert {p.name for p in tmp_path.iterdir()} == {"full", "one"}
