"""Folders import downwards only, and functions fit a screen."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "vica"
# A room is a folder or a file of vica/. It may import from rooms of lower floors, never from its own or from above, so
# there is no cycle either. `__init__` is the package itself: `import vica`.
FLOORS = [
    ["utils"],
    ["data", "kernels", "plan", "toy"],
    ["checkpoint", "vision"],
    ["model"],
    ["auto", "engine", "loading", "testing"],
    ["eval", "train"],
    ["bench", "integrations"],
    ["__init__"],
    ["cli"],
    ["__main__"],
]
LONGEST = 60  # lines of a function, its docstring included


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def imports(path: Path, text: str) -> Iterator[tuple[int, str]]:
    """Yields the line and the room of each import from vica, also of those inside functions."""
    package = ["vica", *path.relative_to(PACKAGE).parent.parts]
    for node in ast.walk(ast.parse(text)):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) + 1 - node.level] if node.level else []
            module = [*base, *(node.module.split(".") if node.module else [])]
            names = [".".join([*module, alias.name]) for alias in node.names]
        for name in names:
            top, _, rest = name.partition(".")
            if top == "vica":
                yield node.lineno, room_named(rest.partition(".")[0])


def room_named(name: str) -> str:
    """Returns the room; a name that is neither folder nor file is one of `vica/__init__.py`."""
    return name if name and ((PACKAGE / name).is_dir() or (PACKAGE / f"{name}.py").is_file()) else "__init__"


def arrows_that_rise(path: Path, text: str) -> list[str]:
    floor = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
    room = room_of(path)
    found = []
    for line, target in imports(path, text):
        if target != room and floor[target] >= floor[room]:
            found.append(f"{path.relative_to(ROOT)}:{line}: {room} must not import from {target}")
    return found


def long_functions(path: Path, text: str) -> list[str]:
    found = []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            lines = (node.end_lineno or 0) - node.lineno + 1
            if lines > LONGEST:
                found.append(f"{path.relative_to(ROOT)}:{node.lineno}: {node.name} has {lines} lines")
    return found


def modules(*folders: str) -> list[tuple[Path, str]]:
    return [
        (path, path.read_text(encoding="utf-8")) for name in folders for path in sorted((ROOT / name).rglob("*.py"))
    ]


def test_every_room_has_a_floor():
    rooms = {room_of(path) for path, _ in modules("vica")}
    assert not rooms - {room for floor in FLOORS for room in floor}, "enter the new rooms into FLOORS"


def test_no_folder_lies_deeper_than_a_room():
    assert not [path for path, _ in modules("vica") if len(path.relative_to(PACKAGE).parts) > 2]


def test_no_import_rises():
    found = [arrow for path, text in modules("vica") for arrow in arrows_that_rise(path, text)]
    assert not found, "\n".join(found)


def test_functions_fit_a_screen():
    found = [function for path, text in modules("vica", "scripts") for function in long_functions(path, text)]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    "room, text, target",
    [
        ("model", "from ..engine import Engine", "engine"),
        ("model", "from .. import engine", "engine"),
        ("model", "import vica.engine.request", "engine"),
        ("model", "from vica.engine import Engine", "engine"),
        ("model", "def late():\n    from ..loading import load", "loading"),
        ("data", "from ..plan.sizes import visual_tokens", "plan"),  # their own floor
        ("engine", "from vica import load", "__init__"),
        ("model", "from ..plan import config\nfrom .cache import ViCACache", None),
        ("cli", "from .. import __version__", None),
    ],
)
def test_arrows_are_seen(room, text, target):
    found = arrows_that_rise(PACKAGE / room / "new.py", text)
    assert [arrow.rsplit(" ", 1)[-1] for arrow in found] == ([target] if target else [])


def test_long_functions_are_seen():
    body = "    pass\n" * LONGEST
    assert long_functions(PACKAGE / "new.py", f"class A:\n  def long(self):\n{body}") == [
        f"vica/new.py:2: long has {LONGEST + 1} lines"
    ]
