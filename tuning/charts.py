"""The report's charts as SVG. What belongs to a trial has its number (data-trial), by which report.js links charts."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from xml.etree.ElementTree import Element

from tuning.axes import Axis
from tuning.importance import Influence
from tuning.markup import el

__all__ = ["Look", "Mark", "Path", "bars", "colour", "curves", "histogram", "parallel", "ramp", "scatter", "strips"]

# Pale to dark, for the best are to be seen on white.
_STOPS = ((172, 190, 208), (112, 166, 208), (38, 115, 178), (8, 48, 107))
_WIDTH = 1080.0


@dataclass(frozen=True)
class Look:
    """How a trial is drawn everywhere."""

    number: int
    state: str
    colour: str
    is_best: bool = False

    def attributes(self, kind: str) -> dict[str, object]:
        best = " best" if self.is_best else ""
        return {"data-trial": self.number, "class": f"{kind} {self.state}{best}", "style": f"--c:{self.colour}"}


@dataclass(frozen=True)
class Path:
    """A trial as a line.

    Attributes:
        points: (x, y) of a curve; one value an axis in parallel coordinates, where x is the axis.
        trigger: the x at which warm-up ended.
    """

    look: Look
    points: Sequence[tuple[float, float | None]]
    trigger: float | None = None


@dataclass(frozen=True)
class Mark:
    """A trial as a point."""

    look: Look
    x: object
    y: float | None


def colour(part: float | None) -> str:
    """Of the rank among trials, 0 (worst) to 1; grey without one."""
    if part is None:
        return "#b8b8b8"
    at = min(max(part, 0.0), 1.0) * (len(_STOPS) - 1)
    below = min(int(at), len(_STOPS) - 2)
    mixed = [round(a + (b - a) * (at - below)) for a, b in zip(_STOPS[below], _STOPS[below + 1])]
    return "#" + "".join(f"{channel:02x}" for channel in mixed)


def ramp(worst: str, best: str) -> Element:
    """What the colours say."""
    stops = ", ".join(colour(at / 8) for at in range(9))
    bar = el("i", {"style": f"background: linear-gradient(to right, {stops})"})
    return el("span", {"class": "ramp"}, worst, bar, best)


def parallel(axes: Sequence[Axis], trials: Sequence[tuple[Look, Sequence[object]]]) -> Element:
    """An upright axis a key; a line a trial, the last of ``trials`` on top. Dragging along an axis selects."""
    top, bottom, height, edge = 58.0, 18.0, 410.0, 56.0
    length = height - top - bottom
    step = (_WIDTH - 2 * edge) / max(1, len(axes) - 1)
    xs = [edge + step * at for at in range(len(axes))]
    svg = _svg(_WIDTH, height, "parallel", len(trials))
    for look, values in trials:
        places = [axis.place(value) for axis, value in zip(axes, values)]
        beside = [None if place is None else place + axis.aside(look.number) for axis, place in zip(axes, places)]
        points = [(x, None if place is None else top + (1 - place) * length) for x, place in zip(xs, beside)]
        if any(y is not None for _, y in points):
            svg.append(el("path", {**look.attributes("line"), "d": _path(points)}))
    for x, axis in zip(xs, axes):
        column = el("g", {"class": "axis", "data-x": _f(x)}, el("title", None, f"{axis.name}: drag to select"))
        column.append(el("line", {"x1": _f(x), "x2": _f(x), "y1": _f(top), "y2": _f(top + length)}))
        for place, text in axis.marks():
            y = top + (1 - place) * length
            column.append(el("line", {"x1": _f(x - 4), "x2": _f(x), "y1": _f(y), "y2": _f(y)}))
            column.append(el("text", {"x": _f(x - 7), "y": _f(y + 3.5), "class": "tick end"}, text))
        for line, text in enumerate(_broken(axis.name)):
            column.append(
                el("text", {"x": _f(x), "y": _f(13 + 14 * line), "class": "name" if line else "section"}, text)
            )
        box = {"x": _f(x - 14), "y": _f(top - 4), "width": 28, "height": _f(length + 8)}
        column.append(el("rect", {**box, "class": "grip"}))
        column.append(el("rect", {**box, "height": 0, "class": "brush"}))
        svg.append(column)
    return svg


def curves(title: str, note: str, paths: Sequence[Path], x: Axis, y: Axis, rung: float | None) -> Element:
    """Learning curves; a ring where warm-up ended, a cross where a trial was pruned."""
    frame = _Frame(530.0, 330.0, x, y, x_title="epochs trained", top=40.0, count=len(paths))
    svg = frame.svg
    svg.insert(0, el("text", {"x": 46, "y": 16, "class": "heading"}, title))
    svg.insert(1, el("text", {"x": 46, "y": 31, "class": "note"}, note))
    if rung is not None:
        svg.append(el("path", {"class": "rung", "d": f"M{_f(frame.x(rung))},{_f(frame.top)}V{_f(frame.bottom)}"}))
    for path in paths:
        points = [(frame.x(at), frame.y(value)) for at, value in path.points]
        drawn = [(at, value) for at, value in points if value is not None]
        if not drawn:
            continue
        group = el("g", path.look.attributes("curve"), el("path", {"class": "line", "d": _path(points)}))
        ring = [value for (at, _), (_, value) in zip(path.points, points) if at == path.trigger and value is not None]
        if ring and path.trigger is not None:
            group.append(el("circle", {"class": "ring", "cx": _f(frame.x(path.trigger)), "cy": _f(ring[0]), "r": 3}))
        if path.look.state == "pruned":
            at, value = drawn[-1]
            group.append(el("path", {"class": "cross", "d": f"M{_f(at - 3)},{_f(value - 3)}l6,6m0,-6l-6,6"}))
        elif len(drawn) == 1:
            group.append(el("circle", {"class": "dot", "cx": _f(drawn[0][0]), "cy": _f(drawn[0][1]), "r": 2}))
        svg.append(group)
    return svg


def scatter(marks: Sequence[Mark], x: Axis, y: Axis, *, width: float, height: float, upright: bool = False) -> Element:
    """A point a trial. ``upright``: the y axis has its name beside it."""
    frame = _Frame(width, height, x, y, x_title=x.name, y_title=y.name if upright else "")
    for mark in marks:
        at, value = x.place(mark.x), frame.y(mark.y)
        if at is None or value is None:
            continue
        at += x.aside(mark.look.number)
        place = {"cx": _f(frame.across(at)), "cy": _f(value), "r": 5 if mark.look.is_best else 3.5}
        frame.svg.append(el("circle", {**mark.look.attributes("point"), **place}))
    return frame.svg


def bars(found: Sequence[Influence]) -> Element:
    """A bar a key, with what chance alone reaches."""
    row, left, right = 30.0, 208.0, 78.0
    width = 530.0
    length = width - left - right
    longest = max([0.25, *(max(one.share, one.chance) for one in found)])
    svg = _svg(width, row * len(found) + 26, "bars")
    for number, one in enumerate(found):
        y = row * number + 6
        section, _, name = one.key.partition(".")
        label = el("text", {"x": _f(left - 10), "y": _f(y + 14), "class": "label end"})
        label.append(el("tspan", {"class": "section"}, f"{section}."))
        label.append(el("tspan", None, name))
        bar = {"x": _f(left), "y": _f(y), "height": 19, "width": _f(length * one.share / longest), "rx": 2}
        svg.append(label)
        svg.append(el("rect", {**bar, "class": "bar" if one.share > one.chance else "bar weak"}))
        chance = left + length * one.chance / longest
        svg.append(el("path", {"class": "chance", "d": f"M{_f(chance)},{_f(y - 3)}v25"}))
        text = f"{100 * one.share:.0f} %" + (_arrow(one.direction) if one.share > one.chance else "")
        end = left + length * max(one.share, one.chance) / longest
        svg.append(el("text", {"x": _f(end + 7), "y": _f(y + 14), "class": "label"}, text))
    y = row * len(found) + 18
    svg.append(el("path", {"class": "chance", "d": f"M{_f(left)},{_f(y - 9)}v11"}))
    svg.append(el("text", {"x": _f(left + 7), "y": _f(y), "class": "note"}, "95 of 100 shuffles stay below this line"))
    return svg


def histogram(counts: Sequence[int], x: Axis, y: Axis) -> Element:
    """A column a whole number from 0 on, its share of all in percent above it."""
    frame = _Frame(530.0, 250.0, x, y, x_title=x.name, y_title=y.name)
    for number, count in enumerate(counts):
        share = 100 * count / sum(counts)
        top = frame.y(share)
        if not count or top is None:
            continue
        left, right = frame.x(number - 0.4), frame.x(number + 0.4)
        box = {"x": _f(left), "y": _f(top), "width": _f(right - left), "height": _f(frame.bottom - top)}
        frame.svg.append(el("rect", {**box, "class": "bar"}))
        text = f"{share:.1f}" if share < 10 else f"{share:.0f}"
        frame.svg.append(el("text", {"x": _f(frame.x(number)), "y": _f(top - 4), "class": "tick middle"}, text))
    return frame.svg


def strips(groups: Sequence[tuple[str, Sequence[Mark], float, float]], x: Axis) -> Element:
    """A row a group of repeats: its points, their mean, and a deviation to each side.

    Args:
        groups: name, marks (x: the value), mean, deviation.
    """
    row, left = 34.0, 150.0
    height = row * len(groups) + 46
    frame = _Frame(_WIDTH, height, x, None, x_title=x.name, left=left)
    for number, (name, marks, mean, deviation) in enumerate(groups):
        y = 8 + row * (number + 0.5)
        low, middle, high = (frame.x(value) for value in (mean - deviation, mean, mean + deviation))
        frame.svg.append(el("text", {"x": _f(left - 10), "y": _f(y + 4), "class": "label end"}, name))
        box = {"x": _f(low), "y": _f(y - 9), "width": _f(max(1.0, high - low)), "height": 18, "rx": 3}
        frame.svg.append(el("rect", {**box, "class": "spread"}))
        frame.svg.append(el("path", {"class": "mean", "d": f"M{_f(middle)},{_f(y - 12)}v24"}))
        for mark in marks:
            at = x.place(mark.x)
            if at is not None:
                place = {"cx": _f(frame.across(at)), "cy": _f(y), "r": 4}
                frame.svg.append(el("circle", {**mark.look.attributes("point"), **place}))
    return frame.svg


class _Frame:
    """Two axes with their grid, in an SVG of its own."""

    def __init__(
        self,
        width: float,
        height: float,
        x: Axis,
        y: Axis | None,
        *,
        x_title: str,
        y_title: str = "",
        left: float = 46.0,
        top: float = 8.0,
        count: int = 0,
    ) -> None:
        self._x, self._y = x, y
        self.left, self.right = left + (14.0 if y_title else 0.0), width - 12.0
        self.top, self.bottom = top, height - 38.0
        self.svg = _svg(width, height, "chart", count)
        for place, text in x.marks():
            at = self.across(place)
            self.svg.append(el("path", {"class": "grid", "d": f"M{_f(at)},{_f(self.top)}V{_f(self.bottom)}"}))
            self.svg.append(el("text", {"x": _f(at), "y": _f(self.bottom + 15), "class": "tick middle"}, text))
        for place, text in y.marks() if y else ():
            at = self.bottom - place * (self.bottom - self.top)
            self.svg.append(el("path", {"class": "grid", "d": f"M{_f(self.left)},{_f(at)}H{_f(self.right)}"}))
            self.svg.append(el("text", {"x": _f(self.left - 6), "y": _f(at + 3.5), "class": "tick end"}, text))
        middle = (self.left + self.right) / 2
        self.svg.append(el("text", {"x": _f(middle), "y": _f(height - 6), "class": "title middle"}, x_title))
        if y_title:
            turn = f"translate(12 {_f((self.top + self.bottom) / 2)}) rotate(-90)"
            self.svg.append(el("text", {"transform": turn, "class": "title middle"}, y_title))

    def across(self, place: float) -> float:
        return self.left + place * (self.right - self.left)

    def x(self, value: float) -> float:
        return self.across(self._x.place(value) or 0.0)

    def y(self, value: float | None) -> float | None:
        place = self._y.place(value) if self._y else None
        return None if place is None else self.bottom - place * (self.bottom - self.top)


def _svg(width: float, height: float, kind: str, count: int = 0) -> Element:
    """The more lines, the more they let through."""
    box, opacity = f"0 0 {_f(width)} {_f(height)}", min(0.85, max(0.3, math.sqrt(25 / max(1, count))))
    style = f"max-width:{_f(width)}px;--opacity:{opacity:.2f}"
    return el("svg", {"viewBox": box, "class": kind, "role": "img", "style": style})


def _path(points: Sequence[tuple[float, float | None]]) -> str:
    """Broken where there is no value."""
    words, joined = [], False
    for x, y in points:
        if y is not None:
            words.append(f"{'L' if joined else 'M'}{_f(x)},{_f(y)}")
        joined = y is not None
    return "".join(words)


def _broken(key: str) -> list[str]:
    """A key in up to three short lines: its section, and its name where an underscore allows."""
    section, dot, name = key.partition(".")
    if not dot:
        section, name = "", key
    first, bar, rest = name.rpartition("_") if len(name) > 12 else (name, "", "")
    return [section, *([first + bar, rest] if bar else [name])]


def _arrow(direction: float | None) -> str:
    if direction is None or abs(direction) < 0.2:
        return ""
    return " ↗" if direction > 0 else " ↘"


def _f(number: float) -> str:
    return f"{number:.1f}".removesuffix(".0")
