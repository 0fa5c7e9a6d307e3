"""Tests the runner of vica eval: which questions it asks, which answers it keeps, what it refuses. Scorers have their
own tests."""

import importlib.util
import json
import shutil
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from random import Random

import pytest
from PIL import Image

from vica.engine import Engine
from vica.eval.answering import answerer, by_engine, by_model
from vica.eval.answers import FINAL, AnswerFiles, read_answers
from vica.eval.ranks import Ranks
from vica.eval.report import cells, read_baseline, save, summarise
from vica.eval.run import digest, read_questions, run_task
from vica.eval.task import Question, Score, StoredImage, Task, check_answers
from vica.eval.tasks import TASKS, choose
from vica.model.llava import ViCAForConditionalGeneration
from vica.plan.config import ViCAConfig
from vica.testing import build
from vica.toy.world import draw, random_scene
from vica.utils.errors import ViCAError


def count_yes(questions, answers) -> Score:
    found = sum(answers[q.id] == q.gold["answer"] for q in questions)
    return Score("accuracy", 100 * found / len(questions), [("", "%"), ("all", "1")], {"right": found})


TASK = Task("small", "Small", "small", ("val",), 4, lambda *_: [], lambda *_: [], count_yes)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Returns twelve questions, on four pictures in turn; one has no picture."""
    folder = tmp_path_factory.mktemp("pictures")
    paths = []
    for n in range(4):
        draw(random_scene(Random(n))).save(folder / f"{n}.png")
        paths.append(folder / f"{n}.png")
    questions = [Question(n, f"What is in corner {n}?", paths[n % 4], {"answer": "x"}) for n in range(11)]
    return [*questions, Question("last", "Say yes.", None, {"answer": "x"})]


@pytest.fixture(scope="module")
def model():
    return build()


@pytest.fixture(scope="module")
def engine_answers(model):
    return answerer(*model, max_batch=3)


def told(question: Question) -> str:
    return f"answer to {question.id}"


def instant(questions, tokens):
    yield from ((q, told(q), None) for q in questions)


def dies_after(count: int):
    """Returns an answerer that fails after `count` answers."""

    def answer(questions, tokens):
        for place, one in enumerate(instant(questions, tokens)):
            if place == count:
                raise RuntimeError("the power failed")
            yield one

    return answer


def run(folder, questions, answer=instant, settings=None, **options):
    return run_task(TASK, questions, answer, folder, settings or {"model": "m"}, Ranks(), **options)


def test_answers_are_the_models_own(world, model, engine_answers, tmp_path):
    """Compares with `generate`, one question at a time."""
    accel, processor = model
    outcome = run(tmp_path, world, engine_answers)
    lines = [json.loads(line) for line in (tmp_path / FINAL).read_text().splitlines()]
    assert [line["question_id"] for line in lines] == [q.id for q in world] and outcome.asked == len(world)
    for question, line in zip(world, lines):
        images = [] if question.image is None else [Image.open(question.image)]
        inputs = processor.ask(question.prompt, images)
        ids = accel.generate(**inputs, max_new_tokens=TASK.max_new_tokens, do_sample=False)
        text = processor.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        assert line == {"question_id": question.id, "prompt": question.prompt, "text": text.strip()}
    assert len({line["text"] for line in lines}) > 3


def test_questions_on_one_picture_are_asked_together(world):
    for processes in (1, 2, 3):
        shares = [Ranks(rank, processes).share(world) for rank in range(processes)]
        assert sorted(str(q.id) for share in shares for q in share) == sorted(str(q.id) for q in world)
        for share in shares:
            keys = [q.image_key for q in share]
            assert sum(a != b for a, b in zip(keys, keys[1:])) == len(set(keys)) - 1
        pictures = [{q.image_key for q in share} - {None} for share in shares]
        assert sum(map(len, pictures)) == len(set().union(*pictures)) == 4
    assert max(len(Ranks(rank, 2).share(world)) for rank in range(2)) <= 7


def test_a_run_resumes_where_it_was_stopped(world, tmp_path):
    undisturbed = run(tmp_path / "undisturbed", world)
    with pytest.raises(RuntimeError, match="power"):
        run(tmp_path / "broken", world, dies_after(5))
    part = next((tmp_path / "broken").glob("part-*"))
    part.write_text(part.read_text() + '{"question_id": 6, "pro')  # truncated by a kill
    with pytest.raises(RuntimeError, match="power"):
        run(tmp_path / "broken", world, dies_after(1))
    asked = []
    outcome = run(tmp_path / "broken", world, lambda qs, n: ((asked.append(q.id), (q, told(q), None))[1] for q in qs))
    assert outcome.asked == len(asked) == 6 and outcome.score == undisturbed.score
    assert (tmp_path / "broken" / FINAL).read_bytes() == (tmp_path / "undisturbed" / FINAL).read_bytes()
    assert not list((tmp_path / "broken").glob("part-*"))
    again = run(tmp_path / "broken", world, dies_after(0))
    assert again.asked == 0 and again.score == undisturbed.score


def test_any_text_is_kept_and_may_be_cut_anywhere(world, tmp_path):
    texts = ["图像", "a\u2028b\u2029c\x85d\r\n\x00", "half a pair \ud83d", "é" * 100_000, '"\\', ""]
    answers = dict(zip((q.id for q in world), texts * 2))
    answer = lambda qs, n: ((q, answers[q.id], None) for q in qs)  # noqa: E731
    run(tmp_path / "whole", world, answer)
    whole = (tmp_path / "whole" / FINAL).read_bytes()
    assert {id: line["text"] for id, line in read_answers(tmp_path / "whole" / FINAL).items()} == answers
    assert "图像".encode() in whole
    first = whole[: whole.index(b"\n") + 1]
    for cut in range(1, len(first) + 1):  # of the second process's part, which the first process leaves alone
        out = tmp_path / str(cut)
        out.mkdir()
        (out / "part-0001.jsonl").write_bytes(first[:cut])
        assert run(out, world, answer).asked == len(world) - (cut == len(first))
        assert (out / FINAL).read_bytes() == whole


def test_a_run_resumes_from_the_parts_of_more_processes(world, tmp_path):
    for rank in range(3):
        for question in Ranks(rank, 3).share(world)[: rank + 1]:
            AnswerFiles(tmp_path, rank).append({"question_id": question.id, "prompt": "", "text": told(question)})
    assert run(tmp_path, world).asked == len(world) - 6


def test_other_settings_do_not_mix(world, tmp_path):
    run(tmp_path, world)
    with pytest.raises(ViCAError, match="model 'm', now 'other'. --restart drops them, --out FOLDER keeps them"):
        run(tmp_path, world, settings={"model": "other"})
    with pytest.raises(ViCAError, match="holds answers of another run: questions"):
        run(tmp_path, world[:-1])
    with pytest.raises(ViCAError, match="holds answers of another run: model 'm', now None. --restart"):
        run(tmp_path, world, settings={"other": None})
    assert run(tmp_path, world, settings={"model": "other"}, restart=True).asked == len(world)
    (tmp_path / "run.json").write_text("[")
    with pytest.raises(ViCAError, match="run.json does not say what the answers beside it are of. --restart"):
        run(tmp_path, world)


def test_a_restart_killed_midway_does_not_mix(world, tmp_path, monkeypatch):
    """Any remaining old answers are still known to belong to the old settings."""
    unlink, held = Path.unlink, 0
    for files in range(4):
        out = tmp_path / str(files)
        run(out, world)
        (out / "part-0000.jsonl").write_bytes((out / FINAL).read_bytes())
        left = [files]

        def dying(path, missing_ok=False):
            if not left[0]:  # noqa: B023
                raise KeyboardInterrupt
            left[0] -= 1  # noqa: B023
            unlink(path, missing_ok)

        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(Path, "unlink", dying)
            run(out, world, settings={"model": "other"}, restart=True)
        assert files < 3 or not (out / "result.json").exists()  # it would show the old score
        if (out / FINAL).exists() or list(out.glob("part-*")):
            held += 1
            with pytest.raises(ViCAError, match="another run"):
                run(out, world, settings={"model": "other"})
        assert run(out, world, settings={"model": "other"}, restart=True).asked == len(world)
    assert held >= 2


def test_a_restart_leaves_no_submission_file(world, tmp_path):
    def submit(questions, answers, folder) -> Path:
        path = folder / "answers.xlsx"
        path.write_text("of these answers")
        return path

    task = replace(TASK, submit=submit)
    (tmp_path / "mine.txt").write_text("not the run's")
    run_task(task, world, instant, tmp_path, {}, Ranks())
    assert (tmp_path / "answers.xlsx").exists()
    with pytest.raises(RuntimeError, match="power"):
        run_task(task, world, dies_after(3), tmp_path, {}, Ranks(), restart=True)
    assert not (tmp_path / "answers.xlsx").exists() and (tmp_path / "mine.txt").exists()


class TwoMachines(Ranks):
    """Two processes that run one after the other: each has its own folder, and none sees the other's files."""

    def wait(self) -> None:
        pass

    def gather(self, value):
        return None


def test_machines_without_common_files_keep_settings_apart(world, tmp_path):
    def second(answer, model, **options):
        run_task(TASK, world, answer, tmp_path, {"model": model}, TwoMachines(1, 2), **options)

    with pytest.raises(RuntimeError, match="power"):
        second(dies_after(2), "m")
    assert len(list(tmp_path.glob("part-*"))) == 1
    with pytest.raises(ViCAError, match="model 'm', now 'other'"):
        second(instant, "other")
    with pytest.raises(RuntimeError, match="power"):
        second(dies_after(0), "m", restart=True)
    assert not list(tmp_path.glob("part-*"))


def test_a_broken_image_fails_only_its_questions(world, engine_answers, tmp_path):
    broken, missing = tmp_path / "broken.png", tmp_path / "missing.png"
    broken.write_bytes(b"no picture")

    def unreadable() -> bytes:
        raise OSError("the disk is gone")

    bad = [
        Question("a", "What?", broken, {"answer": ""}),
        Question("b", "What?", missing, {"answer": ""}),
        Question("c", "What?", StoredImage("c", unreadable), {"answer": "x"}),
    ]
    outcome = run(tmp_path / "out", [*bad, *world], engine_answers)
    assert outcome.score is None and set(outcome.failed) == {"a", "b", "c"}
    assert outcome.failed["c"] == "image c cannot be read: the disk is gone"
    allowed = run(tmp_path / "out", [*bad, *world], engine_answers, allow_errors=True)
    assert allowed.asked == 3 and allowed.failed.keys() == outcome.failed.keys()  # only the failed ones are asked again
    assert allowed.score.figures["right"] == 2  # counted as answered with nothing
    draw(random_scene(Random(9))).save(missing)
    answered = {"question_id": "b", "prompt": "What?", "text": "before the next kill"}
    AnswerFiles(tmp_path / "out").append(answered)
    broken.write_bytes(missing.read_bytes())
    assert set(run(tmp_path / "out", [*bad, *world], engine_answers).failed) == {"c"}
    assert read_answers(tmp_path / "out" / FINAL)["b"] == answered


@pytest.mark.parametrize("variant", ("accel", "mask"))
def test_a_broken_dataset_fails_only_its_questions(variant, model, tmp_path):
    def damaged() -> bytes:
        return [][0]

    def silent() -> bytes:
        raise RuntimeError

    stored = (StoredImage("p", damaged), StoredImage("q", silent), StoredImage("r", lambda: None), None)
    questions = [Question(n, "What?", image, {"answer": ""}) for n, image in enumerate(stored)]
    held, processor = model[0].config.variant, model[1]
    model[0].config.variant = variant
    try:
        outcome = run(tmp_path, questions, answerer(model[0], processor))
    finally:
        model[0].config.variant = held
    assert list(outcome.failed) == [0, 1, 2] and outcome.questions == 4
    assert outcome.failed[0] == "image p cannot be read: list index out of range"
    assert outcome.failed[1] == "image q cannot be read: RuntimeError" and "NoneType" in outcome.failed[2]


def test_the_progress_bar_counts_earlier_answers(world, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    with pytest.raises(RuntimeError, match="power"):
        run(tmp_path, world, dies_after(5))
    capsys.readouterr()
    run(tmp_path, world)
    shown = capsys.readouterr().err
    assert "| 5/12 [" in shown and "| 12/12 [" in shown


def test_all_may_stand_beside_names():
    assert choose(["pope", "all"]) == choose(["all"]) == list(TASKS.values())
    assert [task.name for task in choose(["pope", "gqa", "pope"])] == ["pope", "gqa"]
    with pytest.raises(ViCAError, match="no benchmark 'popes'; there are vqav2, .*, and all of them together: all"):
        choose(["all", "popes"])


def test_each_process_has_its_own_card(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    second = Ranks(9, 16, 1)
    assert second.device(None) == second.device("cuda") == "cuda:1"
    assert second.device("cpu") == "cpu" and second.device("cuda:3") == "cuda:3"
    assert Ranks().device(None) is None and Ranks().device("cuda") == "cuda"
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert second.device(None) is None and second.device("cuda") == "cuda"


def test_a_failing_worker_fails_the_run(world, tmp_path):
    with pytest.raises(RuntimeError, match="the power failed"):
        run(tmp_path, world, dies_after(3))
    assert not (tmp_path / FINAL).exists()


def test_missing_and_double_answers_are_named(world, tmp_path):
    run(tmp_path, world)
    lines = (tmp_path / FINAL).read_text().splitlines(keepends=True)
    answers = {line["question_id"]: line["text"] for line in map(json.loads, lines)}
    check_answers(world, answers)
    with pytest.raises(ViCAError, match="2 of 12 questions have no answer: 3, 7"):
        check_answers(world, {id: text for id, text in answers.items() if id not in (3, 7)})
    with pytest.raises(ViCAError, match="1 answers belong to no question: 99"):
        check_answers(world, answers | {99: ""})
    with pytest.raises(ViCAError, match="1 questions share their id with another: 4"):
        check_answers([*world, world[4]], answers)
    (tmp_path / FINAL).write_text("".join([*lines, lines[2]]))
    with pytest.raises(ViCAError, match="answers 1 questions more than once: 2"):
        read_answers(tmp_path / FINAL)
    with pytest.raises(ViCAError, match="more than once: 2"):
        run(tmp_path, world, dies_after(0))


def test_mask_and_accel_answer_alike(world, model, tmp_path):
    accel, processor = model
    mask = ViCAForConditionalGeneration(ViCAConfig(**{**accel.config.to_dict(), "variant": "mask"})).eval()
    mask.load_state_dict(accel.state_dict())
    for name, answer in (("accel", answerer(accel, processor)), ("mask", answerer(mask, processor))):
        run(tmp_path / name, world, answer)
    assert (tmp_path / "mask" / FINAL).read_bytes() == (tmp_path / "accel" / FINAL).read_bytes()


def test_mask_refuses_the_same_questions_as_the_engine(model, tmp_path):
    """Uses a prompt longer than the model, one that is not text, and an answer for which the model has too little
    room."""
    accel, processor = model
    window = accel.config.text_config.max_position_embeddings
    taken = len(processor.ask("What?")["input_ids"][0])
    fits = "What?" + "?" * (window - taken - 1)
    assert len(processor.ask(fits)["input_ids"][0]) == window - 1
    texts = ["What?", "What? " * window, "half a pair \ud83d", fits]
    questions = [Question(n, text, None, {"answer": ""}) for n, text in enumerate(texts)]
    lines = []
    for name, answer in (("accel", answerer(accel, processor)), ("mask", partial(by_model, accel, processor))):
        run(tmp_path / name, questions, answer)
        lines.append(read_answers(tmp_path / name / FINAL))
    assert lines[0] == lines[1] and ["error" in line for line in lines[0].values()] == [False, True, True, False]


def test_options_reach_the_requests(world, model):
    engine = Engine(*model, max_batch=4)
    assert any("e" in text for _, text, _ in by_engine(engine, world, 20))
    assert not any("e" in text for _, text, _ in by_engine(engine, world, 20, stop="e"))


def test_the_summary_compares(world, model, tmp_path):
    config = model[0].config
    outcomes = [run(tmp_path / "a", world, lambda qs, n: ((q, "x" if q.id in (1, 2, 3) else "", None) for q in qs))]
    first = summarise(outcomes, {"model": "m"}, config, {})
    assert [path.name for path in save(first, tmp_path)] == ["summary.json", "summary.csv", "summary.md"]
    assert json.loads((tmp_path / "summary.json").read_bytes()) == first
    other = [run(tmp_path / "b", world, lambda qs, n: ((q, "x" if q.id in (1, 2) else "", None) for q in qs))]
    second = summarise(other * 3, {"model": "m"}, config, read_baseline(tmp_path / "summary.json", {}))
    (row, *_) = cells(second)
    assert row[:4] == ("Small", "accuracy", "16.67", "66.7%") and row[5] == "12" and float(row[4]) > 0
    drawn = importlib.util.find_spec("matplotlib") is not None
    assert ("summary.png" in {path.name for path in save(second, tmp_path / "b")}) == drawn
    table = (tmp_path / "b" / "summary.md").read_text().splitlines()
    assert len(table) == 5 and table[2].startswith("| Small | accuracy | 16.67 | 66.7% |")
    save(first, tmp_path / "b")  # one benchmark alone is not plotted
    assert not (tmp_path / "b" / "summary.png").exists()
    (tmp_path / "no.json").write_text("[]")
    with pytest.raises(ViCAError, match="no summary.json"):
        read_baseline(tmp_path / "no.json", {})


def test_a_run_resumes_after_its_data_moved(world, tmp_path):
    with pytest.raises(RuntimeError, match="power"):
        run(tmp_path / "out", world, dies_after(5))
    pictures = tmp_path / "elsewhere"
    shutil.copytree(world[0].image.parent, pictures)
    moved = [replace(q, image=q.image and pictures / q.image.name) for q in world]
    assert run(tmp_path / "out", moved).asked == len(world) - 5
    for wrong in (world[0].image, tmp_path / "another.png"):
        others = [*moved[:1], replace(moved[1], image=wrong), *moved[2:]]
        with pytest.raises(ViCAError, match=r"questions '12 \(\w+\)', now '12 \("):
            run(tmp_path / "out", others)
    assert digest([world[-1]]) != digest([replace(world[-1], image=world[0].image)]) != digest(world[:1])


def test_duplicate_question_ids_are_refused_at_once(world):
    task = replace(TASK, read=lambda folder, split: [*world, world[4]])
    assert len(read_questions(task, Path(), None, 12)) == 12
    with pytest.raises(ViCAError, match="1 questions share their id with another: 4"):
        read_questions(task, Path(), None, None)


def test_unknown_names_are_errors():
    with pytest.raises(ViCAError, match="small has no split 'test'; it has val"):
        read_questions(TASK, None, "test", None)
    with pytest.raises(ViCAError, match="Small has no questions in the hub"):
        read_questions(TASK, None, None, None)
