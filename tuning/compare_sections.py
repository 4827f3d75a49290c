"""The parts of a comparison's page: its tables, with their figures as charts."""

import shlex
import time
from collections.abc import Iterator
from statistics import mean, stdev
from xml.etree.ElementTree import Element

from tuning import charts
from tuning import compare_tables as tables
from tuning.axes import linear
from tuning.charts import Mark
from tuning.compare_curves import curves, legend, look
from tuning.compare_tables import Found
from tuning.markup import el, plain_table, section

__all__ = ["sections"]


def sections(found: Found, name: str) -> Iterator[Element]:
    """In the order of reading."""
    comparison = found.comparison
    header = el("header", None, el("h1", None, f"Comparison {name}"))
    header.append(el("p", {"class": "facts"}, tables.facts(found)))
    if comparison.note:
        header.append(el("p", None, comparison.note.strip()))
    header.append(el("p", {"class": "note"}, f"written {time.strftime('%Y-%m-%d %H:%M')}"))
    yield header
    for title, group in tables.groups(found):
        parts: list[Element] = []
        for table in group:
            parts += [el("h3", None, table.title)] if table.title != title else []
            parts += [el("div", {"class": "scroll"}, plain_table(table.head, table.rows))]
            parts += [el("p", {"class": "note"}, table.told)] if table.told else []
            strips = _strips(found, table.title) if title == "Results" else None
            parts += [strips] if strips is not None else []
        if title == "Labels per patch":
            parts += _histograms(found)
        yield section(title, *parts)
        if title == "Results":
            yield from _curves(found)
    yield section("Command", el("pre", {"class": "command"}, shlex.join(comparison.command)))


def _strips(found: Found, setting: str) -> Element | None:
    """The table's mAP as a figure: a point a seed."""
    groups, reach = [], list[float]()
    for method in found.methods(setting):
        values = [*found.scores(setting, method).values()]
        if values:
            marks = [Mark(look(found, method), value, None) for value in values]
            middle, wide = mean(values), stdev(values) if len(values) > 1 else 0.0
            groups.append((method, marks, middle, wide))
            reach += [middle - wide, middle + wide, *values]
    if not groups:
        return None
    axis = linear("mAP in percent", reach)
    told = "A point a seed; line and band: their mean, and a standard deviation to each side."
    return el("figure", None, charts.strips(groups, axis), el("figcaption", None, told))


def _histograms(found: Found) -> list[Element]:
    drawn = []
    for shards, names in found.settings_by_shards.items():
        if counts := found.comparison.labels.get(shards):
            shares = [100 * count / sum(counts) for count in counts]
            x = linear("true labels of a patch", [len(counts) - 0.5], whole=True)
            chart = charts.histogram(counts, x, linear("% of train", [1.08 * max(shares)], whole=True))
            drawn.append(el("figure", None, chart, el("figcaption", None, ", ".join(names))))
    return [el("div", {"class": "pair"}, *drawn)]


def _curves(found: Found) -> Iterator[Element]:
    for setting in found.settings:
        drawn = curves(found, setting)
        told = "A line a run; rings: the trigger, where warm-up ended. "
        caption = el("figcaption", None, told, *legend(found, setting))
        if drawn:
            pair = el("div", {"class": "pair"}, *drawn)
            yield section(f"Learning curves: {setting}", el("figure", None, pair, caption))
