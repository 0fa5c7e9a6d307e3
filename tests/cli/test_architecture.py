"""docs/architecture.md: its map is that of the docstrings, and has a line for every file."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from scripts import architecture

ROOT = Path(__file__).parents[2]


def test_the_map_is_up_to_date():
    done = subprocess.run(
        [sys.executable, "scripts/architecture.py", "--check"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_the_map_names_every_file():
    page = architecture.PAGE.read_text(encoding="utf-8")
    for folder in {path.parent for path in (ROOT / "vica").rglob("*.py")} | {ROOT / "scripts", ROOT / "scripts/toy"}:
        section = page.split(f"### {folder.relative_to(ROOT).as_posix()}/\n")[1].split("\n### ")[0]
        named = re.findall(r"^\| `(\w+\.py)` \| \S", section, re.M)
        assert named == sorted(path.name for path in folder.glob("*.py") if not path.name.startswith("__"))


def test_check_finds_an_old_map(tmp_path, monkeypatch, capsys):
    page = tmp_path / "architecture.md"
    page.write_text(architecture.PAGE.read_text(encoding="utf-8").replace("| `errors.py` |", "| `mistakes.py` |"))
    monkeypatch.setattr(architecture, "PAGE", page)
    monkeypatch.setattr(architecture, "ROOT", tmp_path)
    monkeypatch.setattr(architecture, "the_map", lambda root, write=architecture.the_map: write(ROOT))
    old = page.read_text()
    assert architecture.main(["--check"]) == 1 and page.read_text() == old
    assert "python scripts/architecture.py" in capsys.readouterr().err
    assert architecture.main([]) == 0 and architecture.main(["--check"]) == 0


@pytest.mark.parametrize(
    "docstring, sentence",
    [
        ("One line.", "One line."),
        ("Two\nlines, e.g. these. And more.", "Two lines, e.g. these."),
        ("No stop", "No stop"),
        ("Is it? `yes`.\n\nMore.", "Is it?"),
        ("A | b.", "A \\| b."),
    ],
)
def test_first_sentences(docstring, sentence, tmp_path):
    path = tmp_path / "module.py"
    path.write_text(f'"""{docstring}"""\n')
    assert architecture.first_sentence(path) == sentence
    path.write_text("x = 1\n")
    with pytest.raises(SystemExit, match="module.py has no docstring"):
        architecture.first_sentence(path)
