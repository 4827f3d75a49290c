"""The parts of a sweep's report, each a section of the page, or None where there is nothing to be shown."""

import json
import math
import shlex
import time
from itertools import chain
from statistics import mean, stdev
from xml.etree.ElementTree import Element

from tuning import charts
from tuning.axes import linear, short
from tuning.charts import Mark
from tuning.importance import FEWEST, influences, kendall
from tuning.markup import Node, el, plain_table, section
from tuning.objective import OBJECTIVES
from tuning.record import State, tail
from tuning.view import TRUE, Trial, View, finite, or_lowest, repeated

__all__ = [
    "best",
    "curves",
    "failures",
    "generations",
    "headline",
    "importance",
    "parallel",
    "recipe",
    "repeats",
    "slices",
    "table",
]

_NOISY = OBJECTIVES["noisy_map"].column
_STATES: tuple[State, ...] = ("finished", "pruned", "unfinished", "failed")
_FACTS = ("data.shards", "spml.policy", "method.name", "model.name", "optim.epochs", "optim.global_batch")
_FEW = 8  # groups of repeats that are shown


def headline(view: View) -> Element:
    plan, trials = view.plan, view.trials
    counts = {state: sum(trial.look.state == state for trial in trials) for state in _STATES}
    taken = sum(trial.row["samples"] for trial in trials)
    whole = len(trials) * plan.epochs * plan.rows
    hours = sum(trial.row["seconds"] for trial in trials) / 3600
    header = el("header", None, el("h1", None, f"Sweep {view.sweep.path.absolute().name}"))
    facts = "  ·  ".join(f"{key}={short(plan.recipe[key])}" for key in _FACTS if key in plan.recipe)
    header.append(el("p", {"class": "facts"}, facts))
    if view.objective.clean:
        header.append(
            el(
                "p",
                {"class": "oracle"},
                el("b", None, "ORACLE. "),
                "Trials were ranked by the true labels of validation, which a search on noisy labels does not have: "
                "what is found here is a bound, not a result.",
            )
        )
    cards = el("div", {"class": "cards"})
    cards.append(_card(f"best {view.title}", view.spread, view.objective.text))
    if view.best and view.knows_truth:
        cards.append(_card("true mAP of that trial", short(view.best.true), "only looked at: no decision used it"))
    states = el("div", {"class": "states"})
    for state, count in counts.items():
        if count:
            states.append(el("i", {"class": state, "style": f"flex:{count}"}))
    told = ", ".join(f"{count} {state}" for state, count in counts.items() if count)
    again = sum(trial.row["repeats"] is not None for trial in trials)
    told += f"; {again} of them repeat others with other seeds" if again else ""
    cards.append(_card("trials", str(len(trials)), told or "none yet", states if trials else ""))
    share = f"{100 * taken / whole:.0f} % of all trials trained to the end" if whole else "nothing yet"
    cards.append(_card("budget used", f"{_thousands(taken)} patches", f"{share}; {hours:.1f} h of training"))
    rung = f" after {plan.first_rung} epochs" if plan.scheduler == "asha" else ""
    scheduler = f"scheduler {plan.scheduler}{', first rung' + rung if rung else ''}"
    header.append(cards)
    written = time.strftime("%Y-%m-%d %H:%M")
    header.append(
        el("p", {"class": "note"}, f"{scheduler}; searcher {plan.searcher}, seed {plan.seed}; written {written}")
    )
    return header


def best(view: View) -> Element | None:
    if view.best is None:
        return None
    row = view.best.row
    values = el("dl")
    for key in view.keys:
        values.append(el("div", None, el("dt", None, key), el("dd", None, short(row.get(key)))))
    told = f"{view.title} {view.spread} after {row['epochs']} epochs. To train it again:"
    command = f"adagc train {shlex.quote(str(view.sweep.path / 'best.yaml'))}"
    title = f"Best trial: {row['number']:04d}"
    return section(title, el("p", None, told), el("pre", {"class": "command"}, command), values)


def importance(view: View) -> Element | None:
    """Beside it, whether the objective can be trusted, where that is known."""
    if not view.trials:
        return None
    panels = el("div", {"class": "pair"}, _influences(view))
    if view.knows_truth:
        panels.append(_agreement(view))
    return section("What matters", panels)


def _influences(view: View) -> Element:
    if view.plan.scheduler == "pbt":
        told = "Trials of a population took over from each other: importance over independent draws is not defined."
        return el("div", None, el("p", {"class": "empty"}, told))
    at = view.plan.first_rung if view.plan.scheduler == "asha" else view.plan.epochs
    reached = [trial for trial in view.trials if len(trial.epochs) >= at]
    scores = {trial.look.number: finite(trial.epochs[at - 1].get(view.objective.column)) for trial in reached}
    firsts = [trial for trial in reached if trial.row["repeats"] is None]  # repeats are no further draws
    judged = [
        (one.row, score) for one in firsts if (score := scores[one.look.number]) is not None and _is_whole(view, one)
    ]
    choices = {key: bool(axis.names) for key, axis in view.axes.items()}
    found = influences([row for row, _ in judged], [score for _, score in judged], choices)
    if not found:
        told = f"Importance of the keys is shown from {FEWEST} trials on that reached {at} epochs; {len(judged)} have."
        return el("div", None, el("p", {"class": "empty"}, told))
    told = (
        f"Share of the variance (of ranks) of {view.title} after {at} epochs that each key explains alone, over the "
        f"{len(judged)} trials that reached them. Arrows: larger values are better (↗) or worse (↘). A bar "
        "that does not pass its line is no evidence"
        + (", and with so few trials a passing one is weak evidence." if len(judged) < 30 else ".")
    )
    return el("figure", None, charts.bars(found), el("figcaption", None, told))


def _is_whole(view: View, trial: Trial) -> bool:
    """Whether it has a value of every searched key."""
    return all(axis.place(trial.row.get(key)) is not None for key, axis in view.axes.items())


def _agreement(view: View) -> Element:
    judged = [trial for trial in view.worst_first() if trial.objective is not None and trial.true is not None]
    finished = [trial for trial in judged if trial.look.state == "finished" and trial.row["repeats"] is None]
    marks = [Mark(trial.look, trial.true, trial.objective) for trial in judged]
    across = linear("true mAP (only looked at)", (trial.true for trial in judged), robust=True)
    chart = charts.scatter(marks, across, view.objective_axis, width=530, height=300, upright=True)
    tau = kendall([or_lowest(one.objective) for one in finished], [or_lowest(one.true) for one in finished])
    told = "Does the objective rank trials as true labels would? "
    told += (
        f"Kendall's tau {tau:.2f} over {len(finished)} finished trials."
        if len(finished) >= FEWEST and math.isfinite(tau)
        else f"Kendall's tau is shown from {FEWEST} finished trials on."
    )
    return el("figure", None, chart, el("figcaption", None, told))


def parallel(view: View) -> Element | None:
    if not view.trials:
        return None
    axes = [*view.axes.values(), view.objective_axis]
    lines = [
        (trial.look, [*(trial.row.get(key) for key in view.keys), trial.objective]) for trial in view.worst_first()
    ]
    told = (
        "A line a trial, darker the better by rank; the best finished one is orange. Pruned trials are thin: their "
        "objective is the one at which they were stopped. Drag along an axis to select trials in all charts, click it "
        "to select all again."
    )
    caption = el("figcaption", None, f"{told} ")
    judged = sorted(trial.objective for trial in view.trials if trial.objective is not None)
    if judged:
        caption.append(charts.ramp(f"{view.title} {short(judged[0])}", short(judged[-1])))
    return section("Searched values", el("figure", None, charts.parallel(axes, lines), caption))


def curves(view: View) -> Element | None:
    if not view.trials:
        return None
    columns = {view.objective.column: f"{view.title} (the objective)"}
    columns.setdefault(_NOISY, "noisy mAP")
    if view.knows_truth:
        columns[TRUE] = "true mAP"
    notes = {TRUE: "on true labels" if view.objective.clean else "only looked at: no decision used it"}
    pair = el("div", {"class": "pair"})
    x = linear("epochs trained", [float(view.plan.epochs)], whole=True)
    rung = float(view.plan.first_rung) if view.plan.scheduler == "asha" else None
    for column, title in columns.items():
        paths = [charts.Path(trial.look, trial.curve(column), trial.trigger) for trial in view.worst_first()]
        y = linear(title, chain.from_iterable((value for _, value in path.points) for path in paths))
        pair.append(charts.curves(title, notes.get(column, "on observed labels of validation"), paths, x, y, rung))
    told = "Rings: the trigger, where warm-up ended. Crosses: the trial was pruned there."
    told += " Dashed: the first rung, before which no trial is stopped." if rung is not None else ""
    return section("Learning curves", el("figure", None, pair, el("figcaption", None, told)))


def slices(view: View) -> Element | None:
    if not view.trials:
        return None
    grid = el("div", {"class": "grid"})
    for key in view.keys:
        marks = [Mark(trial.look, trial.row.get(key), trial.objective) for trial in view.worst_first()]
        grid.append(charts.scatter(marks, view.axes[key], view.objective_axis, width=352, height=220))
    told = f"Upwards: {view.title} at each trial's last epoch. Filled: finished; open: pruned or not finished."
    if any(trial.objective is not None and trial.objective < view.objective_axis.ends[0] for trial in view.trials):
        told += " Trials far below the others lie on the lower edge."
    return section("Objective by value", el("figure", None, grid, el("figcaption", None, told)))


def repeats(view: View) -> Element | None:
    groups = repeated(view)
    if not groups:
        return None
    lines, marked = [], []
    for trials in groups[:_FEW]:
        name = f"trial {trials[0].look.number:04d}, {len(trials)} seeds"
        for title, values in (
            (view.title, [one.objective for one in trials]),
            ("true mAP", [one.true for one in trials]),
        ):
            found = [value for value in values if value is not None]
            if len(found) < 2 or (title == "true mAP" and not view.knows_truth):
                continue
            spread = f"{mean(found):.4f} ± {stdev(found):.4f}"
            lines.append((name, title, spread, str(len(found)), ", ".join(f"{value:.4f}" for value in found)))
            if title == view.title:
                marks = [Mark(one.look, one.objective, None) for one in trials]
                marked.append((name, marks, mean(found), stdev(found)))
    reach = chain.from_iterable(
        (middle - deviation, middle + deviation, *(mark.x for mark in marks)) for _, marks, middle, deviation in marked
    )
    x = linear(view.title, (finite(value) for value in reach))
    head = ("settings of", "measure", "mean ± standard deviation", "n", "values")
    told = "The best once more with other values of run.seed. Band: a standard deviation to each side of the mean."
    figure = el("figure", None, charts.strips(marked, x), el("figcaption", None, told))
    return section("Spread over seeds", figure, plain_table(head, lines))


def generations(view: View) -> Element | None:
    """Of a population: who took over from whom, and what was changed."""
    found = view.sweep.generations()
    lines = [
        (
            f"{one.epoch} epochs",
            f"{move.number:04d} ({short(one.objectives[str(move.number)])})",
            f"{move.source:04d} ({short(one.objectives[str(move.source)])})",
            ", ".join(f"{key} = {short(value)}" for key, value in move.values.items()) or "nothing",
        )
        for one in found
        for move in one.moves
    ]
    if not lines:
        return None
    head = ("after", f"gave up ({view.title})", "took over from", "with other values")
    told = (
        "A trial that took over is its source's run up to that epoch; schedule.changes of its recipe has all changes."
    )
    return section("Generations", plain_table(head, lines), el("p", {"class": "note"}, told))


def table(view: View) -> Element | None:
    if not view.trials:
        return None
    head = ["trial", "state", view.title, *(["true mAP"] if view.knows_truth else []), "epochs", "minutes", *view.keys]
    order = {state: place for place, state in enumerate(_STATES)}
    rows = sorted(view.trials, key=lambda one: (order[one.row["state"]], -or_lowest(one.objective), one.look.number))
    body = el("tbody")
    for trial in rows:
        cells: list[tuple[object, str]] = [(trial.look.number, f"{trial.look.number:04d}"), (None, trial.look.state)]
        cells.append((trial.objective, _fixed(trial.objective)))
        if view.knows_truth:
            cells.append((trial.true, _fixed(trial.true)))
        minutes = trial.row["seconds"] / 60
        cells += [(trial.row["epochs"], str(trial.row["epochs"])), (minutes, f"{minutes:.1f}")]
        cells += [(_number(trial.row.get(key)), short(trial.row.get(key))) for key in view.keys]
        line = el("tr", trial.look.attributes("row"))
        line.extend(el("td", {"data-v": value}, text) for value, text in cells)
        body.append(line)
    titles = [_column_title(name) for name in head]
    listing = el("table", {"id": "trials"}, el("thead", None, el("tr", None, *titles)), body)
    told = "Click a column to sort, a trial to keep it marked in all charts."
    return section("Trials", el("div", {"class": "scroll"}, listing), el("p", {"class": "note"}, told))


def failures(view: View) -> Element | None:
    failed = [trial for trial in view.trials if trial.look.state == "failed"]
    if not failed:
        return None
    entries = []
    for trial in failed:
        errors = trial.folder.errors
        attempts = "; ".join(f"attempt {at}: {_first_line(error)}" for at, error in enumerate(errors, 1))
        end = tail(trial.folder.path / "output.log") or (errors[-1] if errors else "")
        summary = el("summary", None, el("b", None, f"Trial {trial.look.number:04d}"), f"  {attempts}")
        entries.append(el("details", {"open": "" if len(failed) == 1 else None}, summary, el("pre", None, end)))
    return section("Failed trials", *entries)


def recipe(view: View) -> Element:
    fixed = {key: value for key, value in sorted(view.plan.recipe.items()) if key not in view.plan.space}
    lines = [(key, short(value)) for key, value in fixed.items()]
    domains = [(key, json.dumps(view.plan.space[key])) for key in view.keys]
    return section(
        "What was searched, and what was fixed",
        plain_table(("searched", "domain"), domains),
        el("details", None, el("summary", None, f"{len(lines)} fixed settings"), plain_table(("key", "value"), lines)),
    )


def _card(title: str, figure: str, told: str, extra: Node = "") -> Element:
    return el("div", {"class": "card"}, el("h3", None, title), el("b", None, figure), extra, el("p", None, told))


def _first_line(error: str) -> str:
    """Why; without the log's path and end, which follow."""
    return (error.splitlines() or [""])[0].partition(";")[0]


def _column_title(name: str) -> Element:
    """Its section above, and lines that may break after an underscore."""
    section, dot, key = name.rpartition(".")
    words = key.split("_")
    parts: list[Node] = [part for word in words[:-1] for part in (f"{word}_", el("wbr"))]
    return el("th", {"scope": "col"}, el("small", None, section + dot), *parts, words[-1])


def _number(value: object) -> float | None:
    return None if isinstance(value, bool) else finite(value)


def _fixed(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def _thousands(count: int) -> str:
    """1.36 M of 1360000."""
    for unit, size in ((" G", 1e9), (" M", 1e6), (" k", 1e3)):
        if count >= size:
            return f"{count / size:.3g}{unit}"
    return str(count)
