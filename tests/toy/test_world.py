"""Tests the toy world: pictures show the answers, blind guesses are at chance, and files are LLaVA's."""

import json
import os
import random
import re
import subprocess
import sys
from collections import Counter, defaultdict
from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest
from PIL import Image

from scripts.toy.language import language
from scripts.toy.twins import twins
from vica.toy import letters, world, write
from vica.toy.captions import caption
from vica.toy.questions import CHINESE, OPTION_LETTER, OPTION_LETTER_CHINESE, SHORT_ANSWER, questions_about
from vica.toy.score import read_questions, score
from vica.toy.world import COLOURS, GROUNDS, SHAPES, SPLITS, draw, random_scene
from vica.utils.errors import ViCAError

KINDS = (
    "existence claim relation comparison neighbour colour shape ground count place word choice choice_chinese".split()
)
RELATIONS = {"left of": (0, -1), "right of": (0, 1), "above": (1, -1), "below": (1, 1)}
CHINESE_FORMS = {
    "图中的(.+)是什么颜色？": "What colour is the {}?",
    "图中(.+)的物体是什么形状？": "What shape is the {} object?",
    "图中有几个(.+)的物体？": "How many {} objects are there?",
    "图中有几个(.+)？": "How many {}s are there?",
    "(.+)的(.+)在图中的什么位置？": "Where in the image is the {} {}?",
    "(.+)的(.+形|圆环)(..)的物体是什么颜色？": "What colour is the object {2} the {0} {1}?",
    "图中写的是什么单词？": "What word is written in the image?",
    "图片的背景是什么颜色？": "What colour is the background?",
}
CLAIMS = {
    r"Is the word written in the image (\w+)\?": "What word is written in the image?",
    r"Is the background (\w+)\?": "What colour is the background?",
    r"Is the number of (.+) (\d)\?": "How many {} are there?",
    r"Is the (\w+ \w+) at the (.+) of the image\?": "Where in the image is the {}?",
    r"Is the (\w+) object a (\w+)\?": "What shape is the {} object?",
    r"Is the (object .+) (\w+)\?": "What colour is the {}?",
    r"Is the (\w+) (\w+)\?": "What colour is the {}?",
}


class Eyes:
    """Sees a picture as blobs of one colour each. It takes only their shapes from the scene."""

    def __init__(self, scene, picture):
        self.pixels = np.asarray(picture).astype(int)
        self.word = scene.word
        shapes = {(thing.row, thing.column): thing.shape for thing in scene.things}
        self.things = []
        for colour, value in COLOURS.items():
            for points in blobs((self.pixels == value).all(-1)):
                x, y = (points.min(0) + points.max(0)) / 2
                shape = shapes[int(y // (112 / 3)), int(x // (112 / 3))]
                self.things.append(dict(colour=colour, shape=shape, at=(x, y), width=np.ptp(points[:, 0])))

    def find(self, **named) -> list[dict]:
        return [t for t in self.things if all(t[key] == value for key, value in named.items())]

    def the(self, name: str) -> dict:
        colour, shape = name.split()
        (thing,) = self.find(colour=colour, shape=shape)
        return thing

    def beside(self, relation: str, other: dict) -> list[dict]:
        """Returns the things on one side of another. A distance under 8 pixels is too small to decide."""
        axis, sign = RELATIONS[relation]
        return [t for t in self.things if sign * (t["at"][axis] - other["at"][axis]) > 8]

    def answer(self, text: str) -> str:
        for form, found in (
            (r"What word is", self.read),
            (r"What colour is the background", self.ground),
            (r"Is there an? (\w+) (\w+) in", lambda c, s: yes(self.find(colour=c, shape=s))),
            (r"What colour is the object (.+) the (\w+ \w+)\?", self.neighbour),
            (r"What colour is the (\w+)\?", lambda s: only(self.find(shape=s))["colour"]),
            (r"What shape is the (\w+) object", lambda c: only(self.find(colour=c))["shape"]),
            (r"How many (\w+) objects", lambda c: str(len(self.find(colour=c)))),
            (r"How many (crosse|\w+)s are", lambda s: str(len(self.find(shape="cross" if s == "crosse" else s)))),
            (r"Where in the image is the (\w+ \w+)", self.place),
            (r"Which is (larger|smaller), the (.+) or the (.+)\?", self.compare),
            (r"Is the (\w+ \w+) (left of|right of|above|below) the (\w+ \w+)\?", self.relation),
        ):
            if match := re.match(form, text):
                return found(*match.groups())
        return self.claim(text)

    def claim(self, text: str) -> str:
        form, question = next((f, q) for f, q in CLAIMS.items() if re.fullmatch(f, text))
        *named, claimed = re.fullmatch(form, text).groups()
        return yes(self.answer(question.format(*named)) == claimed)

    def read(self) -> str:
        return self.word.text

    def ground(self) -> str:
        value = Counter(map(tuple, self.pixels.reshape(-1, 3))).most_common(1)[0][0]
        return only([name for name, ground in GROUNDS.items() if ground == value])

    def neighbour(self, relation: str, name: str) -> str:
        other = self.the(name)
        thing = only(self.beside(relation, other))
        axis, sign = RELATIONS[relation]
        opposite = next(name for name, rule in RELATIONS.items() if rule == (axis, -sign))
        assert len(self.beside(opposite, other)) == len(self.things) - 2, "another might be meant"
        return thing["colour"]

    def place(self, name: str) -> str:
        x, y = self.the(name)["at"]
        across, down = ("left", "centre", "right")[int(x * 3 / 112)], ("top", "centre", "bottom")[int(y * 3 / 112)]
        return "centre" if across == down else f"{down} {across}"

    def compare(self, word: str, first: str, second: str) -> str:
        widths = {name: self.the(name)["width"] for name in (first, second)}
        assert abs(widths[first] - widths[second]) > 5
        return (max if word == "larger" else min)(widths, key=widths.get)

    def relation(self, first: str, relation: str, second: str) -> str:
        axis, _ = RELATIONS[relation]
        assert abs(self.the(first)["at"][axis] - self.the(second)["at"][axis]) > 8
        return yes(self.the(first) in self.beside(relation, self.the(second)))


def blobs(ink: np.ndarray) -> list[np.ndarray]:
    """Returns the connected parts as arrays of points (x, y)."""
    left, parts = set(zip(*np.nonzero(ink.T))), []
    while left:
        part, edge = [], [left.pop()]
        while edge:
            x, y = edge.pop()
            part.append((x, y))
            near = {(x + a, y + b) for a in (-1, 0, 1) for b in (-1, 0, 1)} & left
            left -= near
            edge += near
        parts.append(np.array(part))
    return parts


def only(found: list):
    (one,) = found
    return one


def yes(true) -> str:
    return "yes" if true else "no"


def in_english(text: str) -> str:
    form, question = next((f, q) for f, q in CHINESE_FORMS.items() if re.fullmatch(f, text))
    return question.format(*(translated(group) for group in re.fullmatch(form, text).groups()))


def translated(text: str) -> str:
    return next((english for english, chinese in CHINESE.items() if chinese == text), text)


def drawn(split: str, count: int, seed: int = 0):
    for number in range(count):
        rng = random.Random(f"{seed} {number}")
        yield random_scene(rng, split), rng


@pytest.mark.parametrize("split", SPLITS)
def test_pictures_show_the_answers(split):
    kinds = Counter()
    for scene, rng in drawn(split, 100):
        eyes = Eyes(scene, draw(scene))
        assert len(eyes.things) == len(scene.things)
        for question in questions_about(scene, rng):
            kinds[question.kind] += 1
            text, *options, prompt = question.text.split("\n")
            if question.kind == "choice_chinese":
                assert prompt == OPTION_LETTER_CHINESE
                text, options = in_english(text), [o[:3] + translated(o[3:]) for o in options]
            if not options:
                assert prompt == SHORT_ANSWER and eyes.answer(text) == question.answer, question
                continue
            assert prompt in (OPTION_LETTER, OPTION_LETTER_CHINESE)
            assert [o[:3] for o in options] == ["A. ", "B. ", "C. ", "D. "]
            right = [o[0] for o in options if o[3:] == eyes.answer(text)]
            assert right == [question.answer] and len({*options}) == 4, question
    assert set(kinds) == set(KINDS) and min(kinds.values()) > 20


def test_captions_describe_the_picture():
    place = "(?:top |centre |bottom )?(?:left|centre|right)"
    for scene, rng in drawn("train", 80):
        eyes, text = Eyes(scene, draw(scene)), caption(scene, rng)
        found = re.findall(rf"[aA] (large|small) (\w+ \w+) at the ({place})", text)
        assert [name for _, name, _ in found] == [thing.name for thing in scene.things]
        for size, name, where in found:
            assert (eyes.the(name)["width"] > 24) == (size == "large") and eyes.place(name) == where
        assert eyes.ground() in text and not text[0].islower() and text[-1] == "."
        said = re.search(r"(The word|At the) (\w+) (is written at the|it says) (\w+)\.", text)
        assert (said is None) == (scene.word is None)
        if said:
            assert {said[2], said[4]} == {scene.word.text, ("top", "centre", "bottom")[scene.word.row]}


def test_chinese_names():
    by_hand = {
        "star": "星形", "ring": "圆环", "green": "绿色", "pink": "粉色", "brown": "棕色", "centre left": "左中",
        "bottom right": "右下", "left of": "左边", "above": "上面",
    }  # fmt: skip
    assert by_hand.items() <= CHINESE.items()
    assert len(set(CHINESE.values())) == len(CHINESE)


def test_shapes_and_letters_look_different():
    """Each pair must differ by at least a twentieth of its ink, at small sizes too."""
    shapes = {shape: np.asarray(world._shape_mask(shape, 20)) / 255 for shape in SHAPES}
    glyphs = {letter: letters.cover(letter) / 255 for letter in letters.STROKES}
    assert set("".join(world.WORDS)) == set(glyphs)
    for masks in (shapes, glyphs):
        for one, other in combinations(masks, 2):
            assert abs(masks[one] - masks[other]).sum() > 0.05 * (masks[one] + masks[other]).sum(), (one, other)


def test_words_are_inside_the_picture_and_alone_in_their_row():
    for scene, _ in drawn("train", 300):
        if scene.word:
            assert all(thing.row != scene.word.row for thing in scene.things)
            pixels = np.asarray(draw(scene)).astype(int)
            ink = (pixels == (0 if scene.ground in ("white", "grey") else 255)).all(-1)
            bare = np.asarray(draw(world.Scene(scene.things, scene.ground, None))).astype(int)
            assert len(scene.word.text) * 50 < (ink & (pixels != bare).any(-1)).sum()
            assert not (pixels != bare).any(-1)[:, [0, -1]].any()


def test_splits_share_no_combination():
    things = [(shape, colour) for shape in SHAPES for colour in COLOURS]
    pairs = list(combinations(things, 2))
    test_pairs = {pair for pair in pairs if world.hold_test_pair(pair)}
    assert 0.15 < len(test_pairs) / len(pairs) < 0.25 and test_pairs == {
        p for p in pairs if world.hold_test_pair(p[::-1])
    }
    # each thing occurs in pairs of both splits
    assert all(5 < sum(thing in pair for pair in test_pairs) < 15 for thing in things)
    for split in SPLITS:
        for scene, _ in drawn(split, 1000):
            names = sorted(((t.shape, t.colour) for t in scene.things), key=things.index)
            assert (split == "test") == bool(test_pairs & set(combinations(names, 2)))
            assert world.is_train_scene(scene) == (split == "train")


def test_twins_differ_in_one_thing_or_have_exchanged_one():
    changed = Counter()
    for scene, rng in drawn("train", 300):
        first, *others = twins(scene, 3, rng)
        assert first == scene
        assert len({tuple(replace(t, shift=0) for t in s.things) + (s.word,) for s in (first, *others)}) == 4
        for other in others:
            assert world.is_train_scene(other) and other.ground == scene.ground
            alike = {*other.things} & {*scene.things}
            if other.word != scene.word:
                assert other.things == scene.things and len(other.word.text) == len(scene.word.text)
                changed["word"] += 1
                continue
            assert len(other.things) == len(scene.things)
            if len(alike) == len(scene.things) - 2:
                pairs = list(zip(*([t for t in s.things if t not in alike] for s in (scene, other))))
                (field,) = {n for pair in pairs for n in vars(pair[0]) if len({getattr(t, n) for t in pair}) > 1}
                (one, new_one), (two, new_two) = pairs
                assert [getattr(t, field) for t in (one, two)] == [getattr(t, field) for t in (new_two, new_one)]
                changed[f"exchanged {field}"] += 1
                continue
            (before,), (after,) = {*scene.things} - alike, {*other.things} - alike
            fields = {name for name in vars(before) if getattr(before, name) != getattr(after, name)}
            changed[" ".join(sorted(fields - {"shift"} - {"row", "column"})) or "place"] += 1
    assert set(changed) == {"word", "shape", "colour", "size", "place", "exchanged shape", "exchanged colour"}
    assert min(changed.values()) > 40


# Upper bounds: the best constant answer's share of a kind, and that of the best answer learned for each text.
CONSTANT = dict.fromkeys(KINDS, 0.55) | dict(
    comparison=0.08, neighbour=0.2, colour=0.2, shape=0.2, ground=0.3, count=0.3, place=0.15, word=0.07, choice=0.3,
    choice_chinese=0.3,
)  # fmt: skip
LEARNED = CONSTANT | dict(comparison=0.55, neighbour=0.25)


@pytest.mark.parametrize("split", SPLITS)
def test_blind_guesses_are_chance(split):
    constant, learned = defaultdict(Counter), defaultdict(Counter)
    for scene, rng in drawn("train", 8000):
        for question in questions_about(scene, rng):
            constant[question.kind][question.answer] += 1
            learned[question.text][question.answer] += 1
    right, asked, answers = Counter(), Counter(), defaultdict(Counter)
    for scene, rng in drawn(split, 4000, seed=1):
        for question in questions_about(scene, rng):
            guesses = learned.get(question.text) or constant[question.kind]
            right[question.kind] += guesses.most_common(1)[0][0] == question.answer
            asked[question.kind] += 1
            answers[question.kind][question.answer] += 1
    assert set(asked) == set(KINDS)
    for kind in KINDS:
        assert max(answers[kind].values()) / asked[kind] <= CONSTANT[kind], kind
        assert right[kind] / asked[kind] <= LEARNED[kind], kind


WORD = r"[A-Za-z]+|\d|[\u4e00-\u9fff]"


def test_the_language_is_closed():
    words, said = (set(re.findall(WORD, "\n".join(language(n, seed)))) for n, seed in ((3000, 0), (500, 1)))
    assert said <= words and len(words) < 260
    said = "".join(said)
    said += "".join(f"{q.text}{q.answer}" for scene, rng in drawn("test", 500) for q in questions_about(scene, rng))
    assert not set(re.findall(r"[^\W_]", said)) - set("".join(words))


def test_the_language_has_sentences_and_conversations():
    """Both occur with a picture's caption and without."""
    talks, sentences = [], []
    for text in language(200):
        (talks if "USER:" in text else sentences).append(text)
    for some in (talks, sentences):
        assert any(" plus " in text for text in some) and any("What colour is the" in text for text in some)
    assert all(text.count("USER:") == text.count("ASSISTANT:") <= 8 for text in talks)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write.write(tmp_path_factory.mktemp("toy") / "world", train=60, test=10, seed=3)


def contents(folder) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_a_seed_gives_one_world(folder, tmp_path):
    files = contents(folder)
    assert len(files) == 60 + 10 + 3 == len({*files.values()})
    command = [sys.executable, "-m", "vica.toy.write", "--folder", str(tmp_path / "again")]
    options = ["--train", "60", "--test", "10", "--seed", "3"]
    done = subprocess.run(
        [*command, *options], env={**os.environ, "PYTHONHASHSEED": "1"}, capture_output=True, text=True
    )
    assert done.returncode == 0 and "60 pictures to train on, 10 to ask about" in done.stdout, done.stderr
    assert contents(tmp_path / "again") == files
    other = contents(write.write(tmp_path / "other", 60, 10, seed=4))
    assert not [name for name, data in other.items() if files[name] == data]
    larger = contents(write.write(tmp_path / "larger", 70, 12, seed=3))
    assert all(larger[name] == data for name, data in files.items() if name.endswith(".png"))
    assert larger["finetune.json"].startswith(files["finetune.json"].removesuffix(b"\n]\n"))


def test_training_files_are_llavas(folder):
    for name in ("pretrain", "finetune"):
        samples = json.loads((folder / f"{name}.json").read_text())
        assert len({s["id"] for s in samples}) == len(samples) == (60 if name == "pretrain" else 64)
        for sample in samples:
            turns = sample["conversations"]
            assert [turn["from"] for turn in turns] == ["human", "gpt"] * (len(turns) // 2)
            assert all(turn.keys() == {"from", "value"} and turn["value"].strip() for turn in turns)
            pictures = [turn["value"].count("<image>") for turn in turns]
            if "image" not in sample:
                assert sample.keys() == {"id", "conversations"} and not any(pictures)
                continue
            assert sample.keys() == {"id", "image", "conversations"}
            assert turns[0]["value"].startswith("<image>\n") and sum(pictures) == 1
            with Image.open(folder / "images" / sample["image"]) as picture:
                assert picture.size == (112, 112) and picture.mode == "RGB"
            assert len(turns) == 2 if name == "pretrain" else 10 <= len(turns) <= 12


def test_training_questions_have_many_forms_and_right_answers(folder):
    forms = Counter()
    for sample in json.loads((folder / "finetune.json").read_text()):
        if "image" in sample:
            scene = write.scene_at("train", int(sample["id"].removeprefix("train-")), seed=3)
            with Image.open(folder / "images" / sample["image"]) as picture:
                eyes = Eyes(scene, picture)
            for human, gpt in zip(sample["conversations"][::2], sample["conversations"][1::2]):
                forms.update(check_form(eyes, human["value"].removeprefix("<image>\n"), gpt["value"]))
    options = {f"{n} options" for n in (2, 3, 4)}
    prompts = {SHORT_ANSWER, OPTION_LETTER, OPTION_LETTER_CHINESE, "no prompt"}
    assert set(forms) == {"hint", "context", "OCR", "OCR nothing", "OCR word", "OCR parts", *options, *prompts}


def check_form(eyes: Eyes, text: str, answer: str) -> list[str]:
    """Returns the parts of a question beside itself. All of them must be true, and the answer right."""
    lines, found = text.split("\n"), []
    found.append(lines.pop() if lines[-1] in (SHORT_ANSWER, OPTION_LETTER, OPTION_LETTER_CHINESE) else "no prompt")
    options = [line for line in lines if re.match("[A-D]. ", line)]
    lines = [line for line in lines if line not in options]
    if options:
        assert [o[0] for o in options] == [*"ABCD"[: len(options)]] and len({o[3:] for o in options}) == len(options)
        found.append(f"{len(options)} options")
    if read := [line for line in lines if line.startswith("Reference OCR token: ")]:
        tokens = only(read).removeprefix("Reference OCR token: ").split(", ")
        lines.remove(read[0])
        assert "".join(tokens) in ("", eyes.word.text)
        found += ["OCR", "OCR parts" if len(tokens) > 1 else "OCR word" if tokens[0] else "OCR nothing"]
    *hints, question = lines
    if hints and hints[0].startswith("Context: "):
        found.append("context")
        hints[0] = hints[0].removeprefix("Context: ")
    elif hints:
        found.append("hint")
    english = in_english(question) if re.search("[\u4e00-\u9fff]", question) else question
    right = eyes.answer(english)
    for hint in hints:
        told = only(re.findall("背景是(.+)。|写的是(.+)。|background is (.+)\\.|word (.+) is written", hint))
        told = translated("".join(told))
        assert told in (eyes.ground(), eyes.word and eyes.word.text) and told != right
    if options:
        right = only([o[0] for o in options if translated(o[3:]) == right])
    assert right == answer, (text, answer)
    return found


def test_questions_are_scored_by_kind(folder):
    questions = read_questions(folder / "test.jsonl")
    assert [q["question_id"] for q in questions] == list(range(len(questions)))
    assert all(q.keys() == {"question_id", "image", "text", "answer", "kind"} for q in questions)
    assert all((folder / "images" / q["image"]).exists() and "<image>" not in q["text"] for q in questions)
    right = score(questions, {q["question_id"]: f" {q['answer'].upper()}. " for q in questions})
    assert all(count == total for count, total in right.values()) and right["all"] == (len(questions),) * 2
    hand = [
        dict(question_id=i, kind=k, answer=a) for i, k, a in ((0, "word", "SUN"), (1, "word", "CAT"), (5, "a", "no"))
    ]
    assert score(hand, {0: "Sun", 1: "a cat", 5: "yes"}) == {"a": (0, 1), "word": (1, 2), "all": (1, 3)}
    for answers, told in (
        ({0: "SUN", 1: "CAT"}, "1 of 3 questions have no answer"),
        ({0: "", 1: "", 5: "", 7: ""}, "7"),
    ):
        with pytest.raises(ViCAError, match=told):
            score(hand, answers)


def test_mistakes_are_one_line_and_leave_nothing(tmp_path, capsys, monkeypatch):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("kept")
    for arguments, told in ((["full"], "full exists and is not empty"), (["new", "--train", "0"], "train is 0")):
        assert write.main(["--folder", str(tmp_path / arguments[0]), "--test", "2", *arguments[1:]]) == 1
        error = capsys.readouterr().err
        assert told in error and error.count("\n") == 1
    with pytest.raises(ViCAError, match="unknown split 'val'"):
        random_scene(random.Random(0), "val")

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(write, "_write_list", interrupted)
    assert write.main(["--folder", str(tmp_path / "new"), "--train", "2", "--test", "2"]) == 130
    assert [p.name for p in tmp_path.rglob("*")] == ["full", "mine.txt"]
