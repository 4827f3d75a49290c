"""What is searched: a YAML file over the recipe's dotted names.

Every value that can be drawn goes through ``load_config``, the same door as a recipe's; what the configuration refuses
at the ends of a range is told before a trial starts.
"""

import itertools
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from adagc_dist.config import Config
from launch import shipped
from launch.recipe import load_config
from sharding.rng import derive_rng

__all__ = ["Base", "Domain", "Space", "load_space"]

_SPACES = Path(__file__).parent / "spaces"

_KINDS = {"uniform": 2, "loguniform": 2, "quniform": 3, "randint": 2, "choice": 0}  # kind -> numbers it takes
_FIXED = {
    "run.": "a trial's folder, seed and reports are the sweep's",
    "schedule.": "it is what --scheduler pbt finds",
    "spml.": "under other observed labels the objective is another one",
    "data.shards": "on other data the objective is another one",
    "optim.epochs": "all trials have the same budget",
}
_DRAWS = 100
_NEAR = 1 / 8  # of the range
_SHORT = 4  # digits say as much as seventeen, and can be read
_STEPPED = 12  # a step stays one, without what binary fractions add: 0.3, not 0.30000000000000004
_EXPONENT = re.compile(r"[+-]?\d+(\.\d*)?e[+-]?\d+", re.IGNORECASE)


@dataclass(frozen=True)
class Base:
    """What all trials have in common: a recipe with its overrides."""

    recipe: str
    overrides: tuple[str, ...]

    def config(self, values: Mapping[str, Any], folder: Path) -> Config:
        """The configuration of a run in ``folder`` with these values.

        Raises:
            ValueError: it refuses them; the message names the key.
        """
        own = [self.override(key, value) for key, value in values.items()]
        return load_config(self.recipe, [*self.overrides, *own, f"run.dir={folder}"])

    @staticmethod
    def override(key: str, value: Any) -> str:
        """As the command line has it."""
        return f"{key}={_text(value)}"


@dataclass(frozen=True)
class Domain:
    """The values of one key.

    Attributes:
        kind: uniform, loguniform, quniform, randint or choice.
        arguments: low and high (both included), the step of quniform; or the values of choice.
    """

    kind: str
    arguments: tuple[Any, ...]

    def draw(self, rng: np.random.Generator) -> Any:
        if self.kind == "choice":
            return self.arguments[int(rng.integers(len(self.arguments)))]
        low, high = self.arguments[:2]
        if self.kind == "randint":
            return int(rng.integers(low, high, endpoint=True))
        if self.kind == "quniform":
            return self._stepped(int(rng.integers(self._steps, endpoint=True)))
        if self.kind == "loguniform":
            return min(max(_short(math.exp(rng.uniform(math.log(low), math.log(high)))), low), high)
        return min(max(_short(rng.uniform(low, high)), low), high)

    def near(self, value: Any, rng: np.random.Generator) -> Any:
        """An eighth of the range up or down, in the domain's own scale, or to its end; of a choice, a neighbour."""
        up = rng.random() < 0.5
        if self.kind == "choice":
            at = self.arguments.index(value) + (1 if up else -1)
            return self.arguments[min(max(at, 0), len(self.arguments) - 1)]
        low, high = self.ends
        if self.kind == "loguniform":
            factor = (high / low) ** _NEAR
            return min(max(_short(value * factor if up else value / factor), low), high)
        step = self.arguments[2] if self.kind == "quniform" else 1 if self.kind == "randint" else 0
        size = max(round((high - low) * _NEAR / step), 1) * step if step else (high - low) * _NEAR
        moved = value + size if up else value - size
        return min(max(_short(moved, _STEPPED if step else _SHORT), low), high)

    @property
    def ends(self) -> tuple[Any, ...]:
        """The lowest and the highest value that can be drawn; of a choice, all."""
        if self.kind == "quniform":  # its last step need not reach the high end
            return self._stepped(0), self._stepped(self._steps)
        return self.arguments if self.kind == "choice" else self.arguments[:2]

    @property
    def _steps(self) -> int:
        """How many steps of quniform there are."""
        low, high, step = self.arguments
        return int((high - low) / step + 1e-9)

    def _stepped(self, steps: int) -> float:
        """The value of quniform after so many."""
        low, _, step = self.arguments
        return _short(low + step * steps, _STEPPED)


@dataclass(frozen=True)
class Space:
    """The domains by key, and where they stand."""

    name: str
    domains: Mapping[str, Domain]

    @property
    def tree(self) -> dict[str, dict[str, list[Any]]]:
        """As in its file."""
        return {key: {domain.kind: list(domain.arguments)} for key, domain in self.domains.items()}

    def check(self, base: Base) -> None:
        """Does the configuration take every key, with the values at its ends?

        Raises:
            ValueError: the recipe itself, or a key or value of the space, is refused.
        """
        base.config({}, Path("trial"))
        for key, domain in self.domains.items():
            for value in domain.ends:
                try:
                    base.config({key: value}, Path("trial"))
                except ValueError as error:
                    if not self._refused_alone(base, key, value):
                        continue
                    raise ValueError(f"{self.name}: {key}={_text(value)}: {error}") from error

    def draw(self, base: Base, folder: Path, *path: str | int) -> dict[str, Any]:
        """Values for a trial, a function of ``path`` (a seed and names); drawn again where the configuration refuses
        them in combination.

        Raises:
            ValueError: it refuses a hundred draws.
        """
        seed, *names = path
        for attempt in range(_DRAWS):
            rng = derive_rng(int(seed), *names, attempt)
            values = {key: domain.draw(rng) for key, domain in self.domains.items()}
            try:
                base.config(values, folder)
            except ValueError as error:
                refused = error
            else:
                return values
        raise ValueError(f"{self.name}: {_DRAWS} draws in a row do not fit together; the last one: {refused}")

    def latest_trigger(self, base: Base) -> int:
        """The epochs after which warm-up has ended in all trials, wherever the space may have moved the detector."""
        keys = [key for key in ("detector.rule", "detector.min_epochs", "detector.max_epochs") if key in self.domains]
        latest = 0
        for ends in itertools.product(*(self.domains[key].ends for key in keys)):
            try:
                config = base.config(dict(zip(keys, ends)), Path("trial"))
            except ValueError:  # no trial has these together
                continue
            rule = config.detector.rule
            after = {"plateau": config.longest_warmup, "fixed": config.detector.min_epochs, "never": 0}
            latest = max(latest, after[rule])
        return latest

    def _refused_alone(self, base: Base, key: str, value: Any) -> bool:
        """Whether no value of the section's other keys goes with this one: those that depend on each other are tried
        together.
        """
        section = f"{key.partition('.')[0]}."
        others = {name: domain for name, domain in self.domains.items() if name != key and name.startswith(section)}
        for ends in itertools.islice(itertools.product(*(domain.ends for domain in others.values())), 32):
            try:
                base.config(dict(zip(others, ends)) | {key: value}, Path("trial"))
            except ValueError:
                continue
            return False
        return True


def load_space(name: str | Path) -> Space:
    """A space file, or the shipped one of this name.

    Raises:
        ValueError: there is none, or it does not say what is searched; the message names the key and the remedy.
    """
    path = shipped.find(name, _SPACES, "space")
    tree = shipped.read(path, "lines like `method.gc_weight: {uniform: [1.5, 6]}`")
    return Space(str(path), {str(key): _domain(path, str(key), given) for key, given in tree.items()})


def _domain(path: Path, key: str, given: object) -> Domain:
    where = f"{path}: {key}"
    for start, why in _FIXED.items():
        if key.startswith(start):
            raise ValueError(f"{where} cannot be searched: {why}. Set it in the recipe or as an override")
    if not isinstance(given, dict) or len(given) != 1:
        raise ValueError(
            f"{where}: {given!r} is no domain; write e.g. {key}: {{uniform: [0, 1]}}, of {', '.join(_KINDS)}"
        )
    [(kind, arguments)] = given.items()
    if kind not in _KINDS:
        raise ValueError(f"{where}: there is no domain {kind!r}: {shipped.nearest(str(kind), _KINDS)}")
    if not isinstance(arguments, list) or not arguments:
        raise ValueError(f"{where}: {kind} takes a list, not {arguments!r}")
    if kind == "choice":
        return Domain(kind, tuple(map(_plain, arguments)))
    return Domain(kind, _bounds(where, kind, arguments))


def _bounds(where: str, kind: str, arguments: Sequence[object]) -> tuple[float, ...]:
    """Low and high, and the step of quniform."""
    names = ("low", "high", "step")[: _KINDS[kind]]
    if len(arguments) != len(names):
        raise ValueError(f"{where}: {kind} takes [{', '.join(names)}], not {list(arguments)!r}")
    numbers = tuple(_number(where, argument) for argument in arguments)
    low, high = numbers[:2]
    if not low < high:
        raise ValueError(f"{where}: {kind} from {low:g} to {high:g}: the first must be less than the second")
    if kind == "loguniform" and low <= 0:
        raise ValueError(f"{where}: loguniform must begin above 0, not at {low:g}; uniform may begin there")
    if kind == "quniform" and not 0 < numbers[2] <= high - low:
        raise ValueError(f"{where}: the step {numbers[2]:g} must be positive, and no more than {high - low:g}")
    if kind == "randint" and not all(float(number).is_integer() for number in numbers):
        raise ValueError(f"{where}: randint takes whole numbers, not {list(arguments)!r}; quniform takes others")
    return tuple(int(number) for number in numbers) if kind == "randint" else numbers


def _plain(given: object) -> object:
    """YAML takes 1e-4 for a text."""
    is_number = isinstance(given, str) and _EXPONENT.fullmatch(given)
    return float(str(given)) if is_number else given


def _number(where: str, given: object) -> float:
    """Of a range; a text may be one, too."""
    try:
        number = math.nan if isinstance(given, bool) else float(str(given))
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise ValueError(f"{where}: {given!r} is no number")
    return number


def _short(value: float, digits: int = _SHORT) -> float:
    return float(f"{value:.{digits}g}")


def _text(value: Any) -> str:
    """As an override has it."""
    if isinstance(value, str):
        return value
    return yaml.safe_dump(value, default_flow_style=True).removesuffix("...\n").strip()
