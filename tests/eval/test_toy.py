"""Tests the nine benchmarks from end to end on the toy world, which writes each in its authors' files. The expected
scores come from the world's own list of right answers, without any reader or scorer."""

import json
from collections import defaultdict
from fractions import Fraction
from pathlib import Path
from random import Random

import pytest

from vica.eval.ranks import Ranks
from vica.eval.run import read_questions, run_task
from vica.eval.tasks import TASKS
from vica.toy.benchmarks import write

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("toy") / "eval"
    write(folder, 16)
    return folder


def truth_of(data: Path, name: str) -> list[dict]:
    """Returns the entries in the order of the benchmark's file."""
    entries = json.loads((data / "truth.json").read_text())[name]
    return [e for e in entries if e["group"] == "image"] if name == "sqa" else entries


def said(entry: dict, right: bool) -> str:
    answer = entry["answer"]
    if right:
        return answer
    if answer.lower() in ("yes", "no"):
        return "no" if answer.lower() == "yes" else "yes"
    return "AB"[answer == "A"] if len(answer) == 1 and answer in "ABCD" else "nothing of the kind"


def share(rights: list[bool]) -> Fraction:
    return Fraction(100 * sum(rights), len(rights))


def points(entries: list[dict], rights: list[bool]) -> Fraction:
    """Returns the score in percent. Some wrong answers are those of a few people and earn a share of a point."""
    also = [Fraction(str(entry.get("also", {}).get(said(entry, False), 0))) for entry in entries]
    return sum(100 * (1 if right else worth) for right, worth in zip(rights, also)) / Fraction(len(rights))


def parts(entries: list[dict], rights: list[bool], key) -> dict[str, list[tuple[dict, bool]]]:
    found = defaultdict(list)
    for entry, right in zip(entries, rights):
        found[key(entry)].append((entry, right))
    return found


def pope(entries, rights) -> Fraction:
    scores = []
    for part in parts(entries, rights, lambda e: e["group"]).values():
        found = sum(right for entry, right in part if entry["answer"] == "yes")
        yes = sum((entry["answer"] == "yes") == right for entry, right in part)
        scores.append(Fraction(200 * found, yes + sum(entry["answer"] == "yes" for entry, _ in part)))
    return sum(scores) / len(scores)


def mme(entries, rights) -> Fraction:
    total = Fraction(0)
    for category, part in parts(entries, rights, lambda e: e["group"]).items():
        if category != "commonsense_reasoning":
            pictures = parts(*zip(*part), lambda e: e["image"])
            both = [all(right for _, right in pair) for pair in pictures.values()]
            total += share([right for _, right in part]) + share(both)
    return total


def circular(entries, rights) -> Fraction:
    turned = parts(entries, rights, lambda e: e["id"] % 1_000_000)
    return share([all(right for _, right in rows) for rows in turned.values()])


COUNTS = dict(pope=pope, mme=mme, mmbench=circular, mmbench_cn=circular)


@pytest.mark.parametrize("name", TASKS)
@pytest.mark.parametrize("rate", (1.0, 0.7))
def test_scores_are_the_worlds_own_count(name, rate, data, tmp_path):
    task, entries, dice = TASKS[name], truth_of(data, name), Random(name)
    questions = read_questions(task, data, None, None)
    assert len(questions) == len(entries) >= 16
    for question, entry in zip(questions, entries):
        assert entry["question"].lower() in question.prompt.lower()
    rights = [dice.random() < rate for _ in entries]
    texts = {q.id: said(entry, right) for q, entry, right in zip(questions, entries, rights)}
    outcome = run_task(task, questions, lambda qs, n: ((q, texts[q.id], None) for q in qs), tmp_path, {}, Ranks())
    expected = COUNTS.get(name, points)(entries, rights)
    assert outcome.score.value == pytest.approx(float(expected), abs=1e-9)
    assert rate < 1 or outcome.score.value in (100, outcome.score.full, 1400)
    assert all(len(row) == len(outcome.score.rows[0]) for row in outcome.score.rows)


def test_every_benchmark_has_a_script():
    scripts = {path.stem for path in (ROOT / "scripts/v1_5/eval").glob("*.sh")} - {"run"}
    assert scripts == set(TASKS)
    for name in TASKS:
        assert f'\nevaluate {name} "$@"\n' in (ROOT / f"scripts/v1_5/eval/{name}.sh").read_text()
