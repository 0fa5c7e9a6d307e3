"""The wiring that a caller asks for, as one value, and the order in which its settings are found.

A setting comes from the first that names it of: the call (an argument or a flag), `recipe` (a file of configs/), its
environment variable, the checkpoint's config. No other file knows this order. A new setting is a field of Wiring and a
line of SETTINGS.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from ..utils.errors import ViCAError
from ..utils.files import read_json
from .vica import check_freeze_prefix, check_variant, parse_prefix_rule, parse_t2v_layers, replaces_plan

if TYPE_CHECKING:  # transformers takes seconds to import: the command line reads its flags without it
    from .config import ViCAConfig


@dataclass(frozen=True)
class Setting:
    """A field of both Wiring and ViCAConfig.

    `parse` takes a value, the model's number of layers and what an error calls the value. `variable` is read from the
    environment.
    """

    name: str
    parse: Callable[[Any, int, str], Any]
    variable: str | None = None
    in_recipes: bool = True


SETTINGS = (
    Setting("variant", check_variant, in_recipes=False),
    Setting("t2v_layers", parse_t2v_layers, variable="T2V_LAYERS"),
    Setting("freeze_prefix", check_freeze_prefix),
)
Found = list[tuple[Setting, Any, str]]  # settings with a value, as given, and what an error calls it


class Flags(Protocol):
    """The flags of every verb that takes a wiring, as parsed from the command line."""

    variant: str | None
    t2v_layers: str | None
    freeze_prefix: str | None
    config: str | None


@dataclass(frozen=True)
class Wiring:
    """The settings that a caller names. None names nothing."""

    variant: str | None = None
    t2v_layers: Sequence[int] | str | None = None
    freeze_prefix: bool | int | None = None
    recipe: str | os.PathLike | None = None

    @classmethod
    def of_flags(cls, flags: Flags) -> Wiring:
        return cls(flags.variant, flags.t2v_layers, parse_prefix_rule(flags.freeze_prefix), flags.config)

    def on(self, config: ViCAConfig) -> ViCAConfig:
        """Returns a copy of a checkpoint's config with every setting that the call, its recipe or the environment
        names."""
        return changed(config, self._found())

    def only_on(self, config: ViCAConfig) -> ViCAConfig:
        """Returns a copy of a config, which is settled already, with the settings that the call itself names."""
        return changed(config, self._given())

    def change(self, config: ViCAConfig) -> None:
        """Gives a settled config the settings that the call itself names. An error leaves it as it was."""
        wired = self.only_on(config)
        wired.check()
        for name in (*(setting.name for setting in SETTINGS), "custom_plan"):
            setattr(config, name, getattr(wired, name))

    def names(self, setting: str) -> bool:
        """Returns whether the call, or the recipe that it brings, answers for a setting."""
        return getattr(self, setting) is not None or self.recipe is not None

    def _given(self) -> Found:
        values = [(setting, getattr(self, setting.name), setting.name) for setting in SETTINGS]
        return [found for found in values if found[1] is not None]

    def _found(self) -> Found:
        found, recipe = self._given(), read_recipe(self.recipe) if self.recipe is not None else {}
        for setting in SETTINGS:
            if getattr(self, setting.name) is not None:
                continue
            if setting.in_recipes and recipe.get(setting.name) is not None:
                found.append((setting, recipe[setting.name], setting.name))
            elif setting.variable and os.environ.get(setting.variable):
                found.append((setting, os.environ[setting.variable], setting.variable))
        return found


def changed(config: ViCAConfig, found: Found) -> ViCAConfig:
    """Returns a copy of `config` with the settings found, each parsed once. Raises ViCAError where the result names no
    layers and needs some."""
    config = copy.deepcopy(config)
    for setting, value, name in found:
        setattr(config, setting.name, setting.parse(value, config.text_config.num_hidden_layers, name))
    if replaces_plan({setting.name: value for setting, value, _ in found}):
        config.custom_plan = None
    config.require_layers()
    return config


def read_recipe(path: str | os.PathLike) -> dict:
    """Returns a file of configs/, which names a published model's wiring and parts."""
    if not Path(path).is_file():
        raise ViCAError(f"config {str(path)!r} is no file; configs/ holds those of the published models")
    recipe, keys = read_json(Path(path)), {setting.name for setting in SETTINGS if setting.in_recipes}
    if not keys.intersection(recipe):
        raise ViCAError(f"config {str(path)!r} is none of a model: it names neither {' nor '.join(sorted(keys))}")
    return recipe
