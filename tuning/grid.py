"""What is compared: a YAML file of methods and settings over a recipe, and the runs that follow from it.

    recipe: demo                        of all runs, as in `adagc train`
    common: {optim.epochs: 20}          over it; overrides on the command line win over both
    settings:                           label noises, data sets: a name -> dotted settings
      random: {spml.policy: random}
      dominant: {spml.policy: dominant}
      aid:                              it may have a recipe of its own, and numbers of its own for a method
        recipe: aid_random
        methods: {role: {method.kwargs: {expected_positives: 5}}}
    methods:                            a name -> dotted settings, which win over the setting's
      an: {method.name: an}
      role: {method.name: role, method.kwargs: {expected_positives: 3}}
      adagc: {method.name: adagc}
      full: {spml.policy: full, method.name: an}
    only: {adagc: [random]}             a method under these settings alone
    base: an                            of the gap, with its bound; ours: what the others are compared with.
    bound: full                         These are the defaults; null leaves it out
    ours: adagc
    note: how hyper-parameters were chosen; the report shows it

Seed s of a run is that of its initial weights and of the labels that are observed: for all methods of one seed they are
the same, so that differences are paired.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from adagc_dist.config import Config
from launch import shipped
from tuning.space import Base

__all__ = ["Grid", "load_grid", "seeded"]

_GRIDS = Path(__file__).parent / "grids"
_ROLES = {"base": "an", "bound": "full", "ours": "adagc"}
_KEYS = ("recipe", "common", "settings", "methods", "only", *_ROLES, "note")
_OWN = ("run.seed", "spml.seed", "run.dir", "run.max_epochs", "run.max_minutes", "run.resume")
_NAME = re.compile(r"[\w.+-]+")


@dataclass(frozen=True)
class Grid:
    """
    Attributes:
        name: the file.
        recipes: by setting.
        common: dotted settings of all runs, overrides included.
        settings, methods: a name -> dotted settings; of a method they win.
        special: dotted settings of a method under a setting, which win over both.
        only: a method -> its settings, where these are not all.
        base, bound, ours: methods; None where it is left out.
    """

    name: str
    recipes: Mapping[str, str]
    common: tuple[str, ...]
    settings: Mapping[str, Mapping[str, Any]]
    methods: Mapping[str, Mapping[str, Any]]
    special: Mapping[tuple[str, str], Mapping[str, Any]]
    only: Mapping[str, Sequence[str]]
    base: str | None
    bound: str | None
    ours: str | None
    note: str

    @property
    def cells(self) -> list[tuple[str, str]]:
        """(setting, method), in the file's order."""
        return [
            (one, method) for one in self.settings for method in self.methods if one in self.only.get(method, [one])
        ]

    def values(self, setting: str, method: str) -> dict[str, Any]:
        """What a cell has over the recipe and what is common."""
        return {**self.settings[setting], **self.methods[method], **self.special.get((setting, method), {})}

    def config(self, setting: str, method: str) -> Config:
        """The configuration of a cell's runs, but for seed and folder.

        Raises:
            ValueError: it is refused; the message names the cell and the key.
        """
        base = Base(self.recipes[setting], self.common)
        try:
            return base.config(self.values(setting, method), Path("run"))
        except ValueError as error:
            raise ValueError(f"{self.name}: {method} under {setting}: {error}") from error


def load_grid(name: str, overrides: Sequence[str] = ()) -> Grid:
    """A grid file, or the shipped one of this name, with overrides ``section.key=value`` for all runs.

    Raises:
        ValueError: there is none, or it does not say what is compared; the message names the key and the remedy.
    """
    path = shipped.find(name, _GRIDS, "grid")
    tree = _read(path)
    methods, given = _named(f"{path}: methods", tree.get("methods")), _named(f"{path}: settings", tree.get("settings"))
    recipes, special = {}, {}
    for one, values in given.items():
        recipes[one] = str(values.pop("recipe", tree.get("recipe")) or "")
        if not recipes[one]:
            raise ValueError(f"{path}: setting {one} has no recipe: write `recipe: demo` at the top, or one below it")
        own = values.pop("methods", None)
        for method, own_values in _named(f"{path}: settings.{one}.methods", own).items() if own is not None else ():
            _check_name(f"{path}: settings.{one}.methods", "method", method, methods)
            special[one, method] = _dotted(f"{path}: settings.{one}.methods.{method}", own_values)
    methods = {name: _dotted(f"{path}: methods.{name}", values) for name, values in methods.items()}
    settings = {name: _dotted(f"{path}: settings.{name}", values) for name, values in given.items()}
    common = _dotted(f"{path}: common", tree.get("common"))
    grid = Grid(
        str(path),
        recipes,
        (*(Base.override(key, value) for key, value in common.items()), *overrides),
        settings,
        methods,
        special,
        _only(path, tree.get("only"), methods, settings),
        **{role: _role(path, tree, role, methods) for role in _ROLES},
        note=str(tree.get("note") or ""),
    )
    _check_overrides(grid, overrides)
    return grid


def seeded(config: Config, seed: int, folder: Path) -> Config:
    """The configuration of one run."""
    run = replace(config.run, seed=seed, dir=str(folder))
    return replace(config, run=run, spml=replace(config.spml, seed=seed))


def _read(path: Path) -> dict[str, Any]:
    tree = shipped.read(path, ", ".join(_KEYS))
    for key in tree:
        if key not in _KEYS:
            raise ValueError(f"{path}: unknown key {key}: {shipped.nearest(str(key), _KEYS)}")
    return tree


def _named(where: str, given: object) -> dict[str, dict[str, Any]]:
    """A mapping of names to what they hold."""
    if not isinstance(given, dict) or not given:
        raise ValueError(f"{where} must hold names, each with settings, like `an: {{method.name: an}}`")
    for name, values in given.items():
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            raise ValueError(f"{where}: {name!r} is no name: letters, digits and . + - _, in quotes if need be")
        if not isinstance(values, dict | None):
            raise ValueError(f"{where}.{name}: {values!r} must be settings like `{{optim.lr: 1e-3}}`")
    return {name: dict(values or {}) for name, values in given.items()}


def _dotted(where: str, given: object) -> dict[str, Any]:
    if given is None:
        return {}
    if not isinstance(given, dict) or not all(isinstance(key, str) for key in given):
        raise ValueError(f"{where}: {given!r} must be settings like `{{optim.lr: 1e-3}}`")
    for key in given:
        if "." not in key:
            raise ValueError(f"{where}: {key} is no setting: write section.key, like optim.lr")
        if key in _OWN:
            raise ValueError(f"{where}: {key} is the comparison's own: leave it out (--seeds says how many there are)")
    return dict(given)


def _only(
    path: Path, given: object, methods: Mapping[str, object], settings: Mapping[str, object]
) -> dict[str, list[str]]:
    if given is None:
        return {}
    if not isinstance(given, dict) or not all(isinstance(names, list) and names for names in given.values()):
        raise ValueError(f"{path}: only: {given!r} must be like `{{full: [random]}}`")
    for method, names in given.items():
        _check_name(f"{path}: only", "method", method, methods)
        for name in names:
            _check_name(f"{path}: only.{method}", "setting", name, settings)
    return given


def _check_name(where: str, kind: str, name: object, known: Mapping[str, object]) -> None:
    if name not in known:
        raise ValueError(f"{where}: there is no {kind} {name!r}: {shipped.nearest(str(name), known)}")


def _role(path: Path, tree: Mapping[str, Any], role: str, methods: Mapping[str, object]) -> str | None:
    name = tree.get(role, _ROLES[role])
    if name is not None and name not in methods:
        raise ValueError(
            f"{path}: {role}: there is no method {name!r}: add it, name another ({', '.join(methods)}), or write "
            f"`{role}: null`"
        )
    return None if name is None else str(name)


def _check_overrides(grid: Grid, overrides: Sequence[str]) -> None:
    """
    Raises:
        ValueError: an override has no effect, for the grid or the comparison sets that key itself.
    """
    there = {f"settings.{name}": values for name, values in grid.settings.items()}
    there |= {f"methods.{name}": values for name, values in grid.methods.items()}
    there |= {f"settings.{setting}.methods.{name}": values for (setting, name), values in grid.special.items()}
    for override in overrides:
        key = override.partition("=")[0].strip()
        if key in _OWN:
            raise ValueError(f"{key} is the comparison's own: leave it out (--seeds says how many there are)")
        for where, values in there.items():
            for own in values:
                if f"{key}.".startswith(f"{own}."):  # method.kwargs wins over method.kwargs.alpha, too
                    raise ValueError(f"{override}: {grid.name} has {own} in {where}, which wins: change it there")
