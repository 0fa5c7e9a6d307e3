"""Writes the map of docs/architecture.md: a line a file, the first sentence of its docstring.

python scripts/architecture.py [--check]      --check writes nothing and fails where the map is out of date
"""

import argparse
import ast
import re
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs/architecture.md"
BEGIN, END = "<!-- The map: written by scripts/architecture.py -->\n", "<!-- End of the map -->\n"
# A folder imports only from those above it; folders that are not named here come last.
ORDER = "utils data plan kernels vision checkpoint model . engine train eval integrations bench toy cli".split()


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; fail where the map is out of date")
    args = parser.parse_args(argv)
    page = PAGE.read_text(encoding="utf-8")
    head, rest = page.split(BEGIN)
    wanted = head + BEGIN + "\n" + the_map(ROOT) + "\n" + END + rest.split(END)[1]
    if args.check and page != wanted:
        print(f"{PAGE.relative_to(ROOT)} is out of date: python scripts/architecture.py", file=sys.stderr)
        return 1
    if not args.check:
        PAGE.write_text(wanted, encoding="utf-8")
    return 0


def the_map(root: Path) -> str:
    """Return a table for each folder of vica/ and for the scripts."""
    found = {path.parent for path in (root / "vica").rglob("*.py")}
    places = {name: place for place, name in enumerate(ORDER)}
    folders = sorted(found, key=lambda f: (places.get(str(f.relative_to(root / "vica")), len(ORDER)), f))
    tables = [table(root, folder) for folder in (*folders, root / "scripts", root / "scripts/toy")]
    return "\n".join(tables)


def table(root: Path, folder: Path) -> str:
    package = folder / "__init__.py"
    about = first_sentence(package) if package.exists() else ""
    lines = [f"### {folder.relative_to(root).as_posix()}/", "", *([about, ""] if about else [])]
    lines += ["| file | what it is for |", "|---|---|"]
    files = [path for path in sorted(folder.glob("*.py")) if not path.name.startswith("__")]
    return "\n".join([*lines, *(f"| `{path.name}` | {first_sentence(path)} |" for path in files), ""])


def first_sentence(path: Path) -> str:
    """Return the first sentence of a module's docstring, on one line; a module without one is an error."""
    docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
    if not docstring:
        raise SystemExit(f"{path} has no docstring: say in one line what it is for")
    paragraph = " ".join(docstring.split("\n\n")[0].split())
    sentence = re.match(r".*?[.?](?= [A-Z`]|$)", paragraph)
    return (sentence[0] if sentence else paragraph).replace("|", "\\|")


if __name__ == "__main__":
    sys.exit(main())
