"""Learning curves of a comparison, as charts of its page and as a figure that stands alone. Each method has a colour;
charts carry its place in the grid where a sweep's carry a trial's number.
"""

import colorsys
from collections.abc import Sequence
from xml.etree.ElementTree import Element, tostring

from tuning import charts
from tuning.axes import linear
from tuning.charts import Look
from tuning.compare_results import Outcome
from tuning.compare_tables import Found
from tuning.markup import el, style

__all__ = ["curves", "figure", "legend", "look"]

_TITLES = {
    "noisy_map": ("noisy mAP of the teacher", "on observed labels of validation"),
    "true_map": ("true mAP of the teacher", "on validation, only looked at: no run knew it"),
    "true_f1": ("true F1 of the teacher", "likewise, at thresholds fitted to the observed labels"),
}
_WIDTH, _HEIGHT, _ROW = 530, 330, 18  # of a chart, and of a line of the figure's legend
_PER_ROW = 8


def curves(found: Found, setting: str) -> list[Element]:
    """A chart each of noisy mAP, true mAP and true F1 over epochs, a line a run, with the trigger; none where no run
    has such points.
    """
    runs = [one for one in found.outcomes if one.row["setting"] == setting and one.curve]
    x = linear("epochs trained", [float(one.run.cell.epochs) for one in runs], whole=True)
    drawn = []
    for column, (title, note) in _TITLES.items() if runs else ():
        paths = [_path(found, one, column) for one in runs if column != "noisy_map" or not _sees_all(one)]
        if not any(value is not None for path in paths for _, value in path.points):
            continue
        y = linear(title, (value for path in paths for _, value in path.points))
        drawn.append(charts.curves(title, note, paths, x, y, None))
    return drawn


def legend(found: Found, setting: str) -> list[Element]:
    """The methods' names with their colours."""
    return [el("span", look(found, method).attributes("method"), el("i"), method) for method in found.methods(setting)]


def figure(found: Found, setting: str) -> str:
    """The charts side by side as an SVG file; empty where there are none."""
    drawn, names = curves(found, setting), found.methods(setting)
    if not drawn:
        return ""
    for at, chart in enumerate(drawn):
        place = {"x": _WIDTH * at, "width": _WIDTH, "height": _HEIGHT}
        chart.attrib.update({key: str(value) for key, value in place.items()})
    height = _HEIGHT + _ROW * (1 + (len(names) - 1) // _PER_ROW) + 8
    width = _WIDTH * len(drawn)
    box: dict[str, object] = {"xmlns": "http://www.w3.org/2000/svg", "viewBox": f"0 0 {width} {height}"}
    rules = style(f"svg svg {{ width: {_WIDTH}px; height: {_HEIGHT}px; }} text {{ font-family: sans-serif; }}")
    back = el("rect", {"width": width, "height": height, "fill": "#fff"})
    return tostring(el("svg", box, rules, back, *drawn, *_names(found, names)), encoding="unicode") + "\n"


def look(found: Found, method: str, state: str = "finished") -> Look:
    """How a method is drawn everywhere."""
    names = found.comparison.methods
    at = names.index(method)
    return Look(at, state, _hue(at, len(names)), method == found.comparison.ours)


def _names(found: Found, names: Sequence[str]) -> list[Element]:
    """The figure's legend."""
    drawn = []
    for at, method in enumerate(names):
        x, y = 46 + 126 * (at % _PER_ROW), _HEIGHT + 12 + _ROW * (at // _PER_ROW)
        line = el("path", {"class": "line", "d": f"M{x},{y - 4}h16"})
        drawn.append(el("g", look(found, method).attributes("curve"), line, el("text", {"x": x + 21, "y": y}, method)))
    return drawn


def _sees_all(one: Outcome) -> bool:
    """Its labels are not noisy: on the others' axis it would press them together."""
    return bool(one.run.cell.settings["spml.policy"] == "full")


def _path(found: Found, one: Outcome, column: str) -> charts.Path:
    values = [point.get(column) for point in one.curve]  # an earlier version's curves.csv has no F1
    points = [
        (float(point["epoch"]), None if value is None else 100 * value) for point, value in zip(one.curve, values)
    ]
    trigger = next((float(point["epoch"]) for point in one.curve if point["trigger"]), None)
    return charts.Path(look(found, one.row["method"], one.row["state"]), points, trigger)


def _hue(at: int, count: int) -> str:
    """Colours around the circle but for ours, orange; neighbours apart in lightness as well."""
    red, green, blue = colorsys.hls_to_rgb(0.13 + 0.87 * at / count, (0.34, 0.5)[at % 2], 0.62)
    return "#" + "".join(f"{round(255 * part):02x}" for part in (red, green, blue))
