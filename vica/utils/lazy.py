"""Packages whose names are imported when they are first used, so that importing the package itself costs nothing."""

import importlib
import importlib.util
import sys
from collections.abc import Callable


def lazy_names(package: str, homes: dict[str, str]) -> tuple[Callable[[str], object], Callable[[], list[str]]]:
    """Returns a module's `__getattr__` and `__dir__` (PEP 562). `homes` gives for each public name the module that
    defines it, such as ".loading"; beside these names every submodule is an attribute, as if it had been imported."""

    def get(name: str) -> object:
        if name in homes:
            value = getattr(importlib.import_module(homes[name], package), name)
        elif not name.startswith("_") and importlib.util.find_spec(f"{package}.{name}") is not None:
            return importlib.import_module(f"{package}.{name}")  # which sets the attribute itself
        else:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        setattr(sys.modules[package], name, value)  # the next look does not come here
        return value

    def listed() -> list[str]:
        return sorted({*vars(sys.modules[package]), *homes})

    return get, listed
