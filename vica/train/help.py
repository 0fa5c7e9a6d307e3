"""The help of `vica train`: our flags in groups first, then LLaVA's, then transformers' own.

transformers' flags are the fields of a class that takes seconds to import with torch. Their names, defaults and help
are read from its source instead, which is only parsed.
"""

import argparse
import ast
from collections.abc import Iterator
from dataclasses import MISSING, fields
from importlib.util import find_spec
from pathlib import Path

from .flags import ABOUT, GROUPS, USAGE, DataArguments, ModelArguments, RunArguments

SETTINGS = (
    "SETTINGS is a .yaml or .json file with the flags' names as keys (learning_rate: 2e-5, data_path: [a.json, "
    "b.json], t2v_layers: [0, 1, 7]); flags of the command line go before it."
)
THEIRS = "transformers' own (TrainingArguments)"


def help_parser() -> argparse.ArgumentParser:
    """Returns a parser that knows --help; what parses a run's flags is `arguments.build_parser`."""
    parser = argparse.ArgumentParser(prog="vica train", usage=USAGE, description=ABOUT, epilog=SETTINGS)
    ours = {one.name: one for kind in (ModelArguments, DataArguments, RunArguments) for one in fields(kind)}
    for title, names in GROUPS.items():
        group = parser.add_argument_group(title)
        for name in names:
            one = ours[name]
            add(group, name, str(one.type), shown(one.default), one.metadata["help"])
    group = parser.add_argument_group(THEIRS)
    for name, *told in transformers_flags():
        if name not in ours:
            add(group, name, *told)
    return parser


def add(group, name: str, kind: str, default: str, told: str) -> None:
    value = "BOOL" if "bool" in kind else "N" if "int" in kind or "float" in kind else name.split("_")[-1].upper()
    if default and "default" not in told:
        told += f" (default: {default})"
    group.add_argument(f"--{name}", metavar=value, help=told.replace("%", "%%"))


def shown(default) -> str:
    return "" if default is None or default is MISSING else str(default)


def transformers_flags() -> Iterator[tuple[str, str, str, str]]:
    """Yields name, type, default and help of each field of TrainingArguments that is a flag. A default that is no
    literal is left empty."""
    folder = Path(find_spec("transformers").origin).parent  # found, not imported
    module = ast.parse((folder / "training_args.py").read_text(encoding="utf-8"))
    kinds = {node.name: node for node in module.body if isinstance(node, ast.ClassDef)}
    for node in kinds["TrainingArguments"].body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and isinstance(node.value, ast.Call):
            given = {one.arg: one.value for one in node.value.keywords}
            if literal(given.get("init")) is not False:
                default, told = shown(literal(given.get("default"))), entry(given.get("metadata"), "help")
                yield node.target.id, ast.unparse(node.annotation), default, told


def literal(node: ast.expr | None):
    return node.value if isinstance(node, ast.Constant) else None


def entry(node: ast.expr | None, key: str) -> str:
    """Returns the text under that key of a dict in the source, on one line."""
    pairs = zip(node.keys, node.values) if isinstance(node, ast.Dict) else ()
    return next((" ".join(str(literal(value) or "").split()) for name, value in pairs if literal(name) == key), "")
