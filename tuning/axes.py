"""From values to places along an axis, 0 to 1, with the ticks that a reader needs."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from tuning.space import Domain

__all__ = ["Axis", "axis_of", "linear", "short"]

_TICKS = 5


@dataclass(frozen=True)
class Axis:
    """One quantity.

    Attributes:
        ends: of the numbers; on a logarithmic axis the logarithms'.
        ticks: values with their text.
        names: of a choice, its values as texts, evenly spaced; the numbers are their positions then.
        gap: between neighbours, where values are few; 0 where they are many.
    """

    name: str
    ends: tuple[float, float]
    ticks: Sequence[tuple[float, str]]
    is_log: bool = False
    names: tuple[str, ...] = ()
    gap: float = 0.0

    def place(self, value: Any) -> float | None:
        """0 to 1, an end where it lies beyond; None where there is no value."""
        if self.names:
            number = float(self.names.index(short(value))) if short(value) in self.names else math.nan
        elif not isinstance(value, (int, float)) or (self.is_log and value <= 0):
            return None
        else:
            number = math.log10(value) if self.is_log else float(value)
        return min(1.0, max(0.0, self._part(number))) if math.isfinite(number) else None

    def aside(self, number: int) -> float:
        """How far trial ``number`` stands beside its place, so that those of equal values are seen; always the same."""
        low, high = self.ends
        return min(0.02, 0.25 * self.gap / (high - low)) * math.sin(12.9898 * number)

    def marks(self) -> list[tuple[float, str]]:
        """The ticks by place."""
        placed = [(self._part(math.log10(value) if self.is_log else value), text) for value, text in self.ticks]
        return [(place, text) for place, text in placed if -0.001 <= place <= 1.001]

    def _part(self, number: float) -> float:
        low, high = self.ends
        return (number - low) / (high - low)


def axis_of(key: str, domain: Domain, values: Iterable[Any]) -> Axis:
    """The whole domain of a searched key, whether or not all of it was drawn."""
    if domain.kind == "choice":
        names = tuple(dict.fromkeys(map(short, [*domain.arguments, *values])))
        ticks = [(float(at), name) for at, name in enumerate(names)]
        return Axis(key, (-0.25, len(names) - 0.75), ticks, names=names, gap=1.0)
    low, high = float(domain.ends[0]), float(domain.ends[1])
    if domain.kind == "loguniform":
        return Axis(key, (math.log10(low), math.log10(high)), _log_ticks(low, high), is_log=True)
    gap = {"randint": 1.0, "quniform": float(domain.arguments[-1])}.get(domain.kind, 0.0)
    ticks = _ticks(low, high, whole=domain.kind == "randint")
    return Axis(key, (low - 0.25 * gap, high + 0.25 * gap), ticks, gap=gap)


def linear(name: str, values: Iterable[float | None], *, whole: bool = False, robust: bool = False) -> Axis:
    """All of the values, with some room; of counts (``whole``), from 0.

    Args:
        robust: values far below the others share the axis' lower end: collapsed trials do not press the rest together.
    """
    found = sorted(value for value in values if value is not None and math.isfinite(value))
    if whole:
        high = max([1.0, *found])
        return Axis(name, (0.0, high), _ticks(0.0, high, whole=True))
    low, high = (found[0], found[-1]) if found else (0.0, 1.0)
    if robust and len(found) >= 8:
        lower, upper = found[len(found) // 4], found[-1 - len(found) // 4]
        low = max(low, lower - 2.5 * (upper - lower))
    room = 0.06 * (high - low) or 0.05 * abs(high) or 0.5
    return Axis(name, (low - room, high + room), _ticks(low - room, high + room))


def short(value: object) -> str:
    """As a person writes it, or a recipe."""
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return "-"
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _ticks(low: float, high: float, *, whole: bool = False) -> list[tuple[float, str]]:
    """Round numbers in between."""
    raw = (high - low) / _TICKS
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(times * power for times in (1, 2, 2.5, 5, 10) if times * power >= raw * 0.999)
    if whole:
        step = max(1.0, math.ceil(step))
    first = math.ceil(low / step - 1e-9)
    count = math.floor(high / step + 1e-9) - first + 1
    return [((first + at) * step, short(float(f"{(first + at) * step:.10g}"))) for at in range(count)]


def _log_ticks(low: float, high: float) -> list[tuple[float, str]]:
    """1, 2, 5 in each decade; over many decades their beginnings."""
    leads = (1, 2, 5) if math.log10(high / low) < 2.5 else (1,)
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    return [(lead * 10.0**decade, f"{lead * 10.0**decade:g}") for decade in decades for lead in leads]
