"""The public surface as one flat table, name -> what it promises: Python names, the program's verbs and flags, scripts
and what they read from the environment, files of checkpoints.

`frozen.json` holds what was there before the last change of structure, `added.json` what came since.

    python -m tests.surface          lists what differs from both files
    python -m tests.surface --add    enters what is new into added.json; what is frozen is never rewritten
"""

import argparse
import ast
import contextlib
import dataclasses
import inspect
import io
import json
import os
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).parent.parent
FILES = {name: ROOT / "tests" / "core" / "public" / f"{name}.json" for name in ("frozen", "added")}
METHODS = {
    "ViCAForConditionalGeneration": [
        "from_pretrained", "save_pretrained", "forward", "generate", "set_variant", "load_projector",
        "get_image_features",
    ],
    "ViCAProcessor": [
        "from_pretrained", "save_pretrained", "__call__", "ask", "apply_chat_template", "tokenize", "decode",
        "batch_decode", "changed", "post_process_image_text_to_text",
    ],
    "ViCACache": [
        "__init__", "get_seq_length", "reset", "reorder_cache", "batch_select_indices", "batch_repeat_interleave",
        "crop", "kv_bytes",
    ],
    "Engine": ["__init__", "generate", "results", "stream", "cancel", "warm_up"],
    "Request": ["__init__", "ask", "check"],
    "Result": ["__init__"],
    "Token": ["__new__"],
    "ImageMemory": ["__len__", "save", "load", "clear"],
}  # fmt: skip
READ_WITH_DEFAULT = re.compile(r"\$\{([A-Z][A-Z0-9_]+)(:?[-?])((?:[^{}]|\{[^{}]*\})*)\}")


def collect(folder: Path) -> dict[str, str]:
    """Returns the whole table; `folder` takes the checkpoints that are written for it."""
    sources = (
        python_names(), config_fields(), program(), training_flags(), environment(), scripts(), modules(), configs(),
        checkpoints(folder),
    )  # fmt: skip
    return {name: promise for source in sources for name, promise in source}


# --- Python ---


def python_names() -> Iterator[tuple[str, str]]:
    import vica
    import vica.engine
    from vica.engine.image_memory import FORMAT, ImageMemory

    owners = [("vica", vica, name) for name in vica.__all__]
    owners += [("vica.engine", vica.engine, name) for name in vica.engine.__all__]
    things = {f"{path}.{name}": getattr(module, name) for path, module, name in owners}
    for path, thing in {**things, "engine.image_memory": ImageMemory}.items():
        yield path, "class" if inspect.isclass(thing) else "function" if callable(thing) else repr(thing)
        if inspect.isfunction(thing):
            yield from parameters(path, thing)
        for method in METHODS.get(getattr(thing, "__name__", ""), ()):
            yield f"{path}.{method}", "method"
            yield from parameters(f"{path}.{method}", getattr(thing, method))
    yield "vica.engine.Token.text", "attribute"
    yield "the format named in files of the image memory", FORMAT


def parameters(path: str, function: Callable) -> Iterator[tuple[str, str]]:
    """Yields one entry a parameter: its place, where callers may rely on it, and its default."""
    for place, (name, parameter) in enumerate(inspect.signature(function).parameters.items()):
        if name in ("self", "cls"):
            continue
        if parameter.kind in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL):
            yield f"{path}({str(parameter).replace(name, '').partition(':')[0]})", "any more"
            continue
        kind = "keyword" if parameter.kind is parameter.KEYWORD_ONLY else f"place {place}"
        has_default = parameter.default is not parameter.empty
        yield f"{path}({name})", kind + (f", default {plain(parameter.default)}" if has_default else "")


def config_fields() -> Iterator[tuple[str, str]]:
    from vica import ViCAConfig

    for name in inspect.get_annotations(ViCAConfig):
        if name not in ("sub_configs", "attribute_map", "keys_to_ignore_at_inference"):
            yield f"ViCAConfig.{name}", plain(getattr(ViCAConfig, name))
    yield "ViCAConfig.model_type", ViCAConfig.model_type
    yield "ViCAConfig.plan", type(ViCAConfig.plan).__name__


def plain(value: object) -> str:
    """Returns the default's repr without what changes from one process or machine to the next."""
    if type(value).__repr__ is object.__repr__ or inspect.isroutine(value):
        return "an object"
    return str(value.value) if hasattr(value, "value") else repr(value)  # an enum's repr differs among Pythons


# --- the program ---


def program() -> Iterator[tuple[str, str]]:
    """Yields verbs and flags, read off the parsers that the program itself runs --help with."""
    parsers = parsers_of([])
    for verb in subverbs(parsers["vica"]):
        parsers |= parsers_of([verb])
    for name in list(parsers):
        for verb in subverbs(parsers[name]):
            parsers |= parsers_of([*name.split()[1:], verb])
    for name, parser in parsers.items():
        yield name, "a verb"
        if name != "vica train":  # most of its flags are transformers' own; see training_flags
            yield from flags(name, parser)


def parsers_of(argv: list[str]) -> dict[str, argparse.ArgumentParser]:
    """Returns the parsers, by program name, that take part in reading `vica ARGV --help`."""
    from vica.cli.main import main

    seen: dict[str, argparse.ArgumentParser] = {}
    parse = argparse.ArgumentParser.parse_known_args

    def recorded(self, *args, **kwargs):
        seen[self.prog] = self
        return parse(self, *args, **kwargs)

    recording = mock.patch.object(argparse.ArgumentParser, "parse_known_args", recorded)
    cores = mock.patch.object(os, "cpu_count", lambda: 2)  # a default
    with recording, cores, contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit):
        main([*argv, "--help"])
    return seen


def subverbs(parser: argparse.ArgumentParser) -> list[str]:
    actions = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    return [name for action in actions for name in action.choices]


def flags(path: str, parser: argparse.ArgumentParser) -> Iterator[tuple[str, str]]:
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            continue
        for flag in action.option_strings or [action.dest.upper()]:
            yield f"{path} {flag}", describe(action)
            for choice in action.choices or ():
                yield f"{path} {flag} {choice}", "a choice"


def describe(action: argparse.Action) -> str:
    kind = type(action).__name__.strip("_").removesuffix("Action").lower()
    parts = [kind, f"default {plain(action.default)}"]
    parts += [f"type {getattr(action.type, '__name__', action.type)}"] if action.type else []
    parts += [f"nargs {action.nargs}"] if action.nargs not in (None, 0) else []
    return ", ".join(parts + (["required"] if action.required else []))


def training_flags() -> Iterator[tuple[str, str]]:
    """Yields the flags that are ours; transformers' own change with its version."""
    from vica.train.arguments import DataArguments, ModelArguments, TrainArguments

    for owner in (ModelArguments, DataArguments, TrainArguments):
        classes = [one for one in owner.__mro__ if one.__module__.startswith("vica.")]
        ours = {name for one in classes for name in inspect.get_annotations(one)}
        for field in dataclasses.fields(owner):
            if field.name not in ours:
                continue
            made = field.default_factory is not dataclasses.MISSING
            default = plain(field.default_factory() if made else field.default)
            for name in [f"--{field.name}", *field.metadata.get("aliases", [])]:
                yield f"vica train {name}", f"default {default}"
                for choice in field.metadata.get("choices", ()):
                    yield f"vica train {name} {choice}", "a choice"


# --- the environment, scripts, configs ---


def environment() -> Iterator[tuple[str, str]]:
    """Yields the variables that modules read: every upper-case string constant of a file that uses os.environ."""
    for path in sorted((ROOT / "vica").rglob("*.py")):
        tree = ast.parse(text := path.read_text(encoding="utf-8"))
        if "environ" not in text:
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.Constant) and re.fullmatch(r"[A-Z][A-Z0-9]*_[A-Z0-9_]+|RANK", str(node.value)):
                yield f"the environment's {node.value}", "read"


def scripts() -> Iterator[tuple[str, str]]:
    for path in sorted(ROOT.glob("scripts/**/*")):
        if path.suffix not in (".sh", ".slurm"):
            continue
        name = path.relative_to(ROOT).as_posix()
        yield name, "a script"
        for variable, rule, default in READ_WITH_DEFAULT.findall(path.read_text(encoding="utf-8")):
            told = "required" if "?" in rule else "default computed" if "$" in default else f"default {default!r}"
            yield f"{name} reads {variable}", told


def modules() -> Iterator[tuple[str, str]]:
    """Yields the modules that `python -m` runs."""
    for path in sorted((ROOT / "vica").rglob("*.py")):
        if path.name == "__main__.py" or '\nif __name__ == "__main__":' in path.read_text(encoding="utf-8"):
            name = path.relative_to(ROOT).with_suffix("").as_posix().replace("/", ".").removesuffix(".__main__")
            yield f"python -m {name}", "a program"


def configs() -> Iterator[tuple[str, str]]:
    for path in sorted(ROOT.glob("configs/*.json")):
        for key, value in json.loads(path.read_text()).items():
            yield f"configs/{path.name} {key}", json.dumps(value)


# --- checkpoints ---


def checkpoints(folder: Path) -> Iterator[tuple[str, str]]:
    import vica
    from vica import testing

    saved = testing.save(folder / "vica")
    model = vica.ViCAForConditionalGeneration.from_pretrained(saved)
    keys = {key: str(list(tensor.shape)) for key, tensor in model.state_dict().items()}
    yield from ((f"state_dict: {key}", shape) for key, shape in keys.items())
    for variant in ("mask", "dense"):
        model.set_variant(variant)
        yield f"state_dict of {variant}", "that of accel" if list(model.state_dict()) == list(keys) else "its own"
    for to in ("llava", "hf"):
        vica.convert(saved, folder / to, to=to)
    for layout in ("vica", "llava", "hf"):
        for path in sorted((folder / layout).iterdir()):
            yield f"{layout} checkpoint: {path.name}", "a file"
        for key, value in json.loads((folder / layout / "config.json").read_text()).items():
            if key != "transformers_version":
                yield f"{layout} checkpoint: config.json: {key}", type(value).__name__


# --- comparing ---


def recorded(name: str) -> dict[str, str]:
    return json.loads(FILES[name].read_text(encoding="utf-8"))


def differences(now: dict[str, str]) -> list[str]:
    """Returns a line for each promise that is gone, changed, or not written down yet."""
    told = recorded("frozen") | recorded("added")
    gone = [f"gone: {name} ({promise})" for name, promise in told.items() if name not in now]
    changed = [f"changed: {n}: {p}, now {now[n]}" for n, p in told.items() if n in now and now[n] != p]
    new = [f"new: {name} ({promise})" for name, promise in now.items() if name not in told]
    return gone + changed + new


def write(name: str, table: dict[str, str]) -> None:
    FILES[name].parent.mkdir(exist_ok=True)
    FILES[name].write_text(json.dumps(dict(sorted(table.items())), indent=0) + "\n", encoding="utf-8")


def main(argv: list[str]) -> int:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        now = collect(Path(folder))
    if "--add" in argv:
        told = recorded("frozen") | recorded("added")
        write("added", recorded("added") | {name: now[name] for name in now if name not in told})
    print(*(found := differences(now)), sep="\n")
    return bool(found)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
