"""Writes toy benchmarks answered by a word: VQAv2, GQA and TextVQA, in their authors' file formats."""

import random
from collections import Counter
from pathlib import Path

from .benchmark_parts import cases, entry, facts, line, save_picture, write_json, write_lines
from .forms import ocr_line, read_tokens
from .questions import COUNTS, SHORT_ANSWER, Question, questions_about
from .world import COLOURS, GROUNDS, PLACES, SHAPES, WORDS, Scene

INFO = {"description": "A toy world in VQA's format", "version": "2.0", "year": 2017}
VQA_KINDS = ("colour", "shape", "ground", "count", "place", "word", "existence", "claim")
VQA_TYPES = ("is there a", "how many", "is there", "is the", "where", "what", "none of the above")  # longest first
ANSWERS = (("yes", "no"), COUNTS, tuple(COLOURS), tuple(GROUNDS), tuple(SHAPES), sum(PLACES, ()), WORDS)
VOTES_WORTH = {1: 0.3, 2: 0.6}  # points for an answer that this many of ten people gave

# Structural, semantic and detailed type, by the toy world's kinds.
GQA_TYPES = {
    "existence": ("verify", "obj", "exist"),
    "claim": ("verify", "attr", "verifyAttr"),
    "relation": ("verify", "rel", "relVerify"),
    "comparison": ("compare", "attr", "comparativeChoose"),
    "neighbour": ("query", "rel", "relS"),
    "colour": ("query", "attr", "directOf"),
    "shape": ("query", "cat", "categoryThis"),
    "place": ("query", "attr", "positionQuery"),
    "ground": ("query", "global", "place"),
}


def write_vqav2(folder: Path, pictures: int, seed: int) -> list[dict]:
    """Writes the validation split, whose answers are public."""
    questions, annotations, truth = [], [], []
    for index, scene, asked, rng in cases("vqav2", pictures, seed, _vqa_questions):
        image_id = 391 + 1009 * index
        image = f"vqav2/val2014/COCO_val2014_{image_id:012}.jpg"
        save_picture(scene, folder / image)
        for place, question in enumerate(asked):
            words, id = question.text.split("\n")[0], 1000 * image_id + place
            answers = _ten_answers(question, rng)
            questions.append({"image_id": image_id, "question": words, "question_id": id})
            annotations.append(_annotation(id, image_id, words, answers))
            kind = annotations[-1]["answer_type"]
            truth.append(entry(id, image, words, question.answer.lower(), kind, **_also(answers)))
    about = {"info": INFO, "license": {"name": "", "url": ""}, "data_type": "mscoco", "data_subtype": "val2014"}
    write_json(
        folder / "vqav2/v2_OpenEnded_mscoco_val2014_questions.json",
        {**about, "task_type": "Open-Ended", "questions": questions},
    )
    write_json(folder / "vqav2/v2_mscoco_val2014_annotations.json", {**about, "annotations": annotations})
    return truth


def write_vqav2_test(folder: Path, pictures: int, seed: int) -> list[dict]:
    """Writes test-dev and the whole test, which includes it: questions only, for the benchmark's server."""
    lines, truth = [], []
    for index, scene, asked, _ in cases("vqav2 test", (pictures + 1) // 2, seed, _vqa_questions):
        image_id = 262144 + 1013 * index
        name = f"COCO_test2015_{image_id:012}.jpg"
        save_picture(scene, folder / "vqav2/test2015" / name)
        for place, question in enumerate(asked):
            id, words = 1000 * image_id + place, question.text.split("\n")[0]
            lines.append(line(id, name, question.text))
            group = "test" if index % 2 else "test-dev"
            truth.append(entry(id, f"vqav2/test2015/{name}", words, question.answer.lower(), group))
    dev = [line for line, asked in zip(lines, truth) if asked["group"] == "test-dev"]
    write_lines(folder / "vqav2/llava_vqav2_mscoco_test2015.jsonl", lines)
    write_lines(folder / "vqav2/llava_vqav2_mscoco_test-dev2015.jsonl", dev)
    return truth


def _vqa_questions(scene: Scene, rng: random.Random) -> list[Question]:
    return [question for question in questions_about(scene, rng) if question.kind in VQA_KINDS][:2]


def _ten_answers(question: Question, rng: random.Random) -> list[str]:
    """Returns ten people's answers in lower case, as in VQA. Sometimes one or two people disagree."""
    alike = next(values for values in ANSWERS if question.answer in values)
    wrong = rng.choice([answer for answer in alike if answer != question.answer])
    answers = [question.answer.lower()] * 10
    for place in rng.sample(range(10), rng.choice((0, 0, 1, 2))):
        answers[place] = wrong.lower()
    return answers


def _also(answers: list[str]) -> dict:
    (_, *others) = Counter(answers).most_common()
    return {"also": {answer: VOTES_WORTH[votes] for answer, votes in others}} if others else {}


def _annotation(id: int, image_id: int, words: str, answers: list[str]) -> dict:
    most = Counter(answers).most_common(1)[0][0]
    return {
        "question_type": next((kind for kind in VQA_TYPES if words.lower().startswith(kind)), VQA_TYPES[-1]),
        "multiple_choice_answer": most,
        "answers": [
            {"answer": answer, "answer_confidence": "yes" if answer == most else "maybe", "answer_id": place}
            for place, answer in enumerate(answers, 1)
        ],
        "image_id": image_id,
        "answer_type": "yes/no" if most in ("yes", "no") else "number" if most.isdigit() else "other",
        "question_id": id,
    }


def write_gqa(folder: Path, pictures: int, seed: int) -> list[dict]:
    lines, records, truth = [], {}, []
    for index, scene, asked, _ in cases("gqa", pictures, seed, _gqa_questions):
        image = f"n{100000 + 17 * index}"
        save_picture(scene, folder / f"gqa/data/images/{image}.jpg")
        for place, question in enumerate(asked):
            id, words = f"20{1000 * (index + 1) + place}", question.text.split("\n")[0]
            lines.append(line(id, f"{image}.jpg", question.text))
            records[id] = _gqa_record(id, image, words, question)
            group = records[id]["types"]["structural"]
            truth.append(entry(id, f"gqa/data/images/{image}.jpg", words, question.answer, group))
    write_lines(folder / "gqa/llava_gqa_testdev_balanced.jsonl", lines)
    write_json(folder / "gqa/data/testdev_balanced_questions.json", records)
    return truth


def _gqa_questions(scene: Scene, rng: random.Random) -> list[Question]:
    """Returns the rarest kinds first: they need two things, and not all scenes allow them."""
    asked = [question for question in questions_about(scene, rng) if question.kind in GQA_TYPES]
    rare = [question for question in asked if question.kind in ("relation", "comparison", "neighbour")]
    return (rare[:1] + [question for question in asked if question not in rare])[:2]


def _gqa_record(id: str, image: str, words: str, question: Question) -> dict:
    structural, semantic, detailed = GQA_TYPES[question.kind]
    return {
        "semantic": [{"operation": structural, "dependencies": [], "argument": question.kind}],
        "entailed": [],
        "equivalent": [id],
        "question": words,
        "imageId": image,
        "isBalanced": True,
        "groups": {"global": None, "local": f"toy-{question.kind}"},
        "answer": question.answer,
        "semanticStr": f"{structural}: {question.kind}",
        "annotations": {"answer": {}, "question": {}, "fullAnswer": {}},
        "types": {"detailed": detailed, "semantic": semantic, "structural": structural},
        "fullAnswer": f"{question.answer[0].upper()}{question.answer[1:]}.",
    }


def write_textvqa(folder: Path, pictures: int, seed: int) -> list[dict]:
    """Writes two questions about each printed word, one open and one to answer with yes or no."""
    lines: list[dict] = []
    records: list[dict] = []
    truth: list[dict] = []
    for _, scene, fact, rng in cases("textvqa", pictures, seed, lambda *of: facts(*of).get("word")):
        id = f"{rng.getrandbits(64):016x}"  # the image's id, which two questions share, as in the real files
        image = f"textvqa/train_images/{id}.jpg"
        save_picture(scene, folder / image)
        tokens = read_tokens(fact, rng)
        claimed = rng.choice((fact.answer, fact.wrong[0]))
        claim = Question("claim", fact.claim.format(claimed), "yes" if claimed == fact.answer else "no")
        for question in (Question("word", fact.english, fact.answer), claim):
            answers = _ten_answers(question, rng)
            text = f"{question.text}\n{ocr_line(tokens)}\n{SHORT_ANSWER}"
            lines.append(line(id, f"{id}.jpg", text))
            records.append(_textvqa_record(34602 + len(records), id, question.text, answers, scene))
            answer = question.answer.lower()
            truth.append(entry(id, image, question.text, answer, question.kind, **_also(answers)))
    about = {"dataset_type": "val", "dataset_name": "textvqa", "dataset_version": "0.5.1"}
    write_lines(folder / "textvqa/llava_textvqa_val_v051_ocr.jsonl", lines)
    write_json(folder / "textvqa/TextVQA_0.5.1_val.json", {**about, "data": records})
    return truth


def _textvqa_record(id: int, image_id: str, words: str, answers: list[str], scene: Scene) -> dict:
    words = words.lower()  # in these files only; LLaVA's begin with a capital
    return {
        "question": words,
        "image_id": image_id,
        "image_classes": sorted({thing.shape.capitalize() for thing in scene.things}),
        "flickr_original_url": "",
        "flickr_300k_url": "",
        "image_width": 112,
        "image_height": 112,
        "answers": answers,
        "question_tokens": words.rstrip("?").split(),
        "question_id": id,
        "set_name": "val",
    }
