"""Estimates the hours of nine benchmarks: vica eval from JPEG files to answers on disk, against one question at a
time."""

import argparse
import random
import tempfile
from dataclasses import asdict, dataclass
from functools import cache, partial
from itertools import islice
from pathlib import Path

import torch

from ..engine import Engine
from ..eval.answering import by_engine
from ..eval.ranks import Ranks
from ..eval.run import run_task
from ..eval.task import Question, Score, Task
from ..plan.sizes import visual_tokens
from ..utils.errors import ViCAError
from ..utils.table import table
from .clock import progress, timed
from .inputs import Prompts, Shape, write_pictures
from .models import Models
from .report import Report, ratio


@dataclass(frozen=True)
class Workload:
    """A benchmark's size, and the tokens of a typical question and of a typical answer with its end mark."""

    name: str
    questions: int
    images: int
    text: int
    answer: int


WORKLOADS = (
    Workload("VQAv2 (test-dev)", 107394, 36807, 27, 3),
    Workload("GQA", 12578, 398, 30, 3),
    Workload("ScienceQA (images)", 2017, 2017, 120, 2),
    Workload("TextVQA", 5000, 3166, 70, 4),
    Workload("POPE", 8910, 500, 26, 2),
    Workload("MME", 2374, 1187, 35, 2),
    Workload("MMBench (circular)", 4377, 1164, 95, 2),
    Workload("MMBench CN (circular)", 4377, 1164, 130, 2),
    Workload("SEED (images)", 14233, 14233, 85, 2),
)
VICUNA = 35
TEMPLATE = 5  # approximate number of a chat template's tokens after the question
DISTINCT = 64  # distinct pictures; the others are the same JPEG data under another hash
NOTE = (
    "ours: files read, decoded and hashed, answers appended to disk; transformers: batch 1, one process, its pixels "
    "and ids prepared beforehand, which favours it"
)


def run(args: argparse.Namespace, models: Models) -> Report:
    if models.processor is None or models.config.vision_config is None:
        raise ViCAError("eval starts from images: the model needs a vision tower and a tokenizer")
    with tempfile.TemporaryDirectory() as folder:
        progress(f"eval: writing {DISTINCT} pictures of 640 x 480")
        drawn = [path.read_bytes() for path in write_pictures(Path(folder), DISTINCT)]
        slow = [one_by_one(args, models, work, drawn[0]) for work in WORKLOADS]
        engine = models.engine("accel", max_batch=args.max_batch)
        # Warm up apart: compiling and capturing happen once a process, and would count many times in hours extrapolated
        # from a sample.
        (first_use := Path(folder) / "first_use").mkdir()
        first_s = engine.warm_up() + all_at_once(args, engine, WORKLOADS[0], drawn, first_use)["seconds"]
        fast = []
        for work in WORKLOADS:
            fast.append(all_at_once(args, engine, work, drawn, Path(folder)))
            progress(f"eval, {work.name}: {fast[-1]['asked'] / fast[-1]['seconds']:.1f} questions/s")
    cells = [asdict(work) | one | other for work, one, other in zip(WORKLOADS, slow, fast)]
    return Report([hours_table(cells), NOTE], dict(note=NOTE, first_s=first_s, cells=cells))


def one_by_one(args: argparse.Namespace, models: Models, work: Workload, picture: bytes) -> dict:
    """Measures LLaVA's way: one question at a time, the image encoded anew for each. The first question is not
    timed."""
    count, place = args.peer_questions, models.config.image_token_index
    ids = models.processor.ask(text_of(models.processor, work, 0), [picture])["input_ids"][0].tolist()
    before = ids.index(place)
    # Vicuna has 35 tokens before the image; the small tokenizer of the random weights makes more of the same text.
    shape = Shape(min(before, VICUNA), visual_tokens(models.config), len(ids) - before - 1, work.answer)
    shape.check(models.config)
    peer = models.transformers
    prompts = Prompts(models.config, count + 1, shape, models.device, models.dtype)
    sequences = prompts.expanded(peer.image_token).split(1)
    pixels = torch.from_numpy(models.processor.process_images([picture])[0])[None].to(models.device, models.dtype)
    peer.generate(sequences[0], pixels, work.answer)
    seconds, _ = timed(lambda: [peer.generate(ids, pixels, work.answer) for ids in sequences[1:]], models.device)
    progress(f"eval, {work.name}, {shape} tokens, one by one: {count / seconds:.1f} questions/s")
    return dict(prompt=str(shape), peer_questions=count, peer_seconds=seconds)


def all_at_once(args: argparse.Namespace, engine: Engine, work: Workload, drawn: list[bytes], folder: Path) -> dict:
    """Measures vica.eval's own runner on images that it has not seen before."""
    count = min(args.questions, work.questions)
    images = max(1, round(count * work.images / work.questions))
    paths = [folder / f"{work.name.split()[0]}-{n}.jpg" for n in range(images)]
    for n, path in enumerate(paths):
        path.write_bytes(drawn[n % len(drawn)] + f"{path.name}".encode())  # bytes after a JPEG's end are not decoded
    questions = [Question(n, text_of(engine.processor, work, n), paths[n * images // count]) for n in range(count)]
    task = Task(work.name, work.name, "", ("",), work.answer, lambda *_: [], lambda *_: [], no_score)
    answer = partial(by_engine, engine, ignore_eos=True)
    engine.image_memory.clear()
    outcome = run_task(task, questions, answer, folder / "answers" / work.name, {}, Ranks())
    assert outcome is not None  # this is the first process
    if outcome.failed:
        raise ViCAError(f"{len(outcome.failed)} questions failed: {next(iter(outcome.failed.values()))}")
    return dict(asked=count, of_images=images, seconds=outcome.seconds)


def text_of(processor, work: Workload, seed: int) -> str:
    """Returns as many words, of one token each, as the benchmark's question has tokens, less the template's after
    it."""
    return " ".join(random.Random(seed).choices(whole_words(processor), k=work.text - TEMPLATE))


@cache
def whole_words(processor, most: int = 500) -> list[str]:
    words = sorted({piece.strip("\u2581\u0120") for piece in processor.tokenizer.get_vocab()})
    single = (w for w in words if w.isascii() and w.isalpha() and len(processor.tokenize(f"{w} {w}", False)) == 2)
    return list(islice(single, most))


def no_score(questions, answers) -> Score:
    return Score("none", None, [("",)], {})


def hours_table(cells: list[dict]) -> str:
    rows: list[tuple] = [
        ("", "questions", "images", "prompt", "answer", "questions/s", "one by one", "gain", "hours", "one by one")
    ]
    total = [0.0, 0.0]
    for c in cells:
        ours, theirs = c["asked"] / c["seconds"], c["peer_questions"] / c["peer_seconds"]
        hours = [c["questions"] / rate / 3600 for rate in (ours, theirs)]
        total = [a + b for a, b in zip(total, hours)]
        rates = (f"{ours:.1f}", f"{theirs:.1f}", ratio(theirs, ours))
        told = (f"{hours[0]:.3f}", f"{hours[1]:.2f}")
        rows.append((c["name"], c["questions"], c["images"], c["prompt"], c["answer"], *rates, *told))
    rows.append(("all nine", *[""] * 6, ratio(total[0], total[1]), f"{total[0]:.3f}", f"{total[1]:.2f}"))
    return table(rows)
