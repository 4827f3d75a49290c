"""The report of a sweep: all trials are in it with their figures, it needs nothing else, and text stays text."""

import dataclasses
import json
import math
import re
import statistics
from collections.abc import Mapping, Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.stats import kendalltau, spearmanr

from tests.browser import find_browser, show
from tuning import results
from tuning.axes import axis_of, linear
from tuning.importance import influences, kendall
from tuning.record import Generation, Move, Plan, SweepFolder, TrialFolder, common
from tuning.report import main, write_report
from tuning.space import Base, Domain

BASE = Base("demo", ("data.shards=shards", "optim.epochs=4"))
SPACE = {
    "optim.lr": {"loguniform": [1e-4, 1e-2]},
    "method.gc_weight": {"uniform": [1.5, 6.0]},
    "detector.rule": {"choice": ["plateau", "never"]},
}
EPOCHS = 4
CONFIG = BASE.config({}, Path("x"))  # of all trials: what was drawn is read from trial.json


def begin(path: Path, **changes: Any) -> SweepFolder:
    plan = Plan(
        recipe=common(CONFIG),
        space=SPACE,
        objective="noisy_map",
        scheduler="asha",
        searcher="random",
        seed=0,
        epochs=EPOCHS,
        rows=90,
        first_rung=2,
    )
    path.mkdir(parents=True, exist_ok=True)
    sweep = SweepFolder(path)
    sweep.begin(dataclasses.replace(plan, **changes))
    return sweep


def record(epoch: int, noisy: float, **more: object) -> dict[str, object]:
    """A line of metrics.jsonl, as runs write it."""
    return {
        "epoch": epoch,
        "step": 8 * (epoch + 1),
        "phase": "warmup" if epoch < 2 else "calibration",
        "trigger": epoch == 1,
        "loss/bce": 0.18,
        "data/rows": 90.0,
        "data/skipped_rows": 0.0,
        "map/noisy_teacher": noisy,
        "map/true_teacher": noisy + 0.1,
        "auc/noisy_teacher": 0.79,
        "pu/noisy_teacher": 8.7,
    } | more


def add(
    sweep: SweepFolder,
    number: int,
    noisy: Sequence[float],
    state: str,
    *,
    repeats: int | None = None,
    **values: object,
) -> TrialFolder:
    drawn = {"optim.lr": 1e-3, "method.gc_weight": 3.0, "detector.rule": "plateau"} | {
        key.replace("__", "."): value for key, value in values.items()
    }
    run = dataclasses.replace(CONFIG.run, dir=str(sweep.trial_path(number)))
    trial = sweep.add(number, drawn, dataclasses.replace(CONFIG, run=run))
    if repeats is not None:
        TrialFolder.write(trial.path, CONFIG, number=number, values=drawn, repeats=repeats)
    lines = [json.dumps(record(epoch, value)) + "\n" for epoch, value in enumerate(noisy)]
    (trial.path / "metrics.jsonl").write_text("".join(lines))
    status = {"finished": "finished", "pruned": "stopped", "failed": "failed", "unfinished": "running"}[state]
    (trial.path / "status.json").write_text(json.dumps({"state": status}))
    if state == "pruned":
        trial.prune()
    for _ in range(2 if state == "failed" else 1):
        error = f"exit code 1 on here; {trial.path / 'output.log'} ends:\nno memory" if state == "failed" else None
        trial.add_attempt(seconds=60, host="here", error=error)
    return trial


@pytest.fixture
def sweep(tmp_path: Path) -> SweepFolder:
    """A trial of each state."""
    sweep = begin(tmp_path / "sweep")
    add(sweep, 0, [0.1, 0.2, 0.3, 0.4], "finished", optim__lr=2e-3)
    add(sweep, 1, [0.1, 0.2, 0.35, 0.45], "finished", method__gc_weight=4.25)
    add(sweep, 2, [0.1, 0.15], "pruned")
    failed = add(sweep, 3, [0.3], "failed")
    (failed.path / "output.log").write_text("[rank 1] epoch 0\n[rank 1] \x1b[31mOutOfMemoryError\x1b[0m: no memory\n")
    add(sweep, 4, [0.12, 0.22, 0.2], "unfinished", detector__rule="never")
    return sweep


class Page(HTMLParser):
    """A document as the list of its elements, each with its attributes and all text in it."""

    _VOID = ("meta", "wbr")

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str]]] = []
        self._texts: list[list[str]] = []
        self._open: list[int] = []
        self.feed(html)
        assert not self._open, "not all elements are closed"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {name: value or "" for name, value in attrs}))
        self._texts.append([])
        if tag not in self._VOID:
            self._open.append(len(self.elements) - 1)

    def handle_endtag(self, tag: str) -> None:
        assert self.elements[self._open.pop()][0] == tag

    def handle_data(self, data: str) -> None:
        for at in self._open:
            self._texts[at].append(data)

    def texts(self, tag: str, **wanted: str) -> list[str]:
        return ["".join(self._texts[at]) for at in self._find(tag, wanted)]

    def attributes(self, tag: str, **wanted: str) -> list[dict[str, str]]:
        return [self.elements[at][1] for at in self._find(tag, wanted)]

    def _find(self, tag: str, wanted: Mapping[str, str]) -> list[int]:
        """With these words in these attributes; of data-trial, just this."""
        names = {name.strip("_").replace("_", "-"): value for name, value in wanted.items()}
        return [
            at
            for at, (name, attributes) in enumerate(self.elements)
            if name == tag and all(value in attributes.get(key, "").split() for key, value in names.items())
        ]

    def table(self) -> dict[int, list[str]]:
        """The trials' table: number -> cells."""
        found: dict[int, list[str]] = {}
        for at in self._find("tr", {"class": "row"}):
            cells = []
            for later in range(at + 1, len(self.elements)):
                if self.elements[later][0] != "td":
                    break
                cells.append("".join(self._texts[later]))
            found[int(self.elements[at][1]["data-trial"])] = cells
        return found


def report(sweep: SweepFolder) -> Page:
    return Page(write_report(sweep).read_text())


def test_all_trials_are_there_with_their_figures(sweep: SweepFolder) -> None:
    page = report(sweep)
    assert page.table() == {
        1: ["0001", "finished", "0.4500", "0.5500", "4", "1.0", "plateau", "4.25", "0.001"],
        0: ["0000", "finished", "0.4000", "0.5000", "4", "1.0", "plateau", "3", "0.002"],
        2: ["0002", "pruned", "0.1500", "0.2500", "2", "1.0", "plateau", "3", "0.001"],
        4: ["0004", "unfinished", "0.2000", "0.3000", "3", "1.0", "never", "3", "0.001"],
        3: ["0003", "failed", "-", "0.4000", "1", "2.0", "plateau", "3", "0.001"],
    }
    assert list(page.table()) == [1, 0, 2, 4, 3]
    assert page.texts("b")[:4] == ["0.4500", "0.55", "5", "1.26 k patches"]
    told = page.texts("div", class_="card")
    assert "2 finished, 1 pruned, 1 unfinished, 1 failed" in told[2]
    assert "70 % of all trials trained to the end; 0.1 h" in told[3]  # 14 of 20 epochs
    assert page.texts("pre", class_="command") == [f"adagc train {sweep.path / 'best.yaml'}"]
    assert [text for text in page.texts("h2") if "0001" in text] == ["Best trial: 0001"]
    assert page.texts("p", class_="empty") == [
        "Importance of the keys is shown from 8 trials on that reached 2 epochs; 4 have."
    ]


def test_curves_end_where_a_trial_was_pruned_and_show_the_trigger(sweep: SweepFolder) -> None:
    page = report(sweep)
    of_pruned = page.attributes("g", class_="curve", data_trial="2")
    assert len(of_pruned) == 2  # noisy and true
    crosses, rings = page.attributes("path", class_="cross"), page.attributes("circle", class_="ring")
    assert len(crosses) == 2
    assert len(rings) == 2 * 4  # the failed one had no trigger
    half = [ring["cx"] for ring in rings]
    assert len(set(half)) == 1  # all after their second epoch, where the pruned one ended
    x = re.match(r"M([\d.]+),", crosses[0]["d"])
    assert x is not None
    assert float(x[1]) + 3 == pytest.approx(float(half[0]), abs=0.11)
    assert "only looked at: no decision used it" in page.texts("text", class_="note")


def test_a_failed_trial_is_told_with_the_end_of_its_log(sweep: SweepFolder) -> None:
    page = report(sweep)
    assert page.texts("summary")[0] == "Trial 0003  attempt 1: exit code 1 on here; attempt 2: exit code 1 on here"
    assert page.texts("pre")[1].endswith("OutOfMemoryError[0m: no memory")
    (sweep.trial_path(3) / "output.log").unlink()
    assert report(sweep).texts("pre")[1].endswith("ends:\nno memory")


def test_it_needs_nothing_else(sweep: SweepFolder) -> None:
    html = write_report(sweep).read_bytes().decode("ascii")
    assert "://" not in html
    assert "url(" not in html
    assert "@import" not in html
    page = Page(html)
    assert not {name for _, attributes in page.elements for name in attributes} & {"src", "href", "xlink:href"}
    assert {"link", "img", "iframe"}.isdisjoint(tag for tag, _ in page.elements)
    [policy] = [one for one in page.attributes("meta") if one.get("http-equiv") == "Content-Security-Policy"]
    assert policy["content"].startswith("default-src 'none';")
    assert list(sweep.path.glob(".*partial")) == []


def test_text_stays_text(tmp_path: Path) -> None:
    nasty = "</pre></script><script>alert(1)</script><img src=x onerror='alert(2)'>&amp;\"\x00\udc80é"
    space = {"data.shards": {"choice": [nasty, "b"]}}
    sweep = begin(tmp_path / "<b>&'sweep", space=space, recipe={"optim.lr": nasty})
    trial = add(sweep, 0, [0.3], "failed")
    (trial.path / "trial.json").write_text(json.dumps({"number": 0, "values": {"data.shards": nasty}, "pruned": False}))
    (trial.path / "attempts.jsonl").write_text((json.dumps({"seconds": 1, "host": "h", "error": nasty}) + "\n") * 2)
    page = report(sweep)
    assert len(page.attributes("script")) == 1
    assert page.attributes("img") == []
    assert page.texts("h1") == ["Sweep <b>&'sweep"]
    shown = nasty.replace("\x00", "").replace("\udc80", "\ufffd")
    assert page.texts("pre") == [shown]
    assert page.table()[0][-1] == shown


@pytest.mark.parametrize("state", ["finished", "pruned", "failed", "unfinished"])
def test_a_sweep_that_begins(tmp_path: Path, state: str) -> None:
    sweep = begin(tmp_path / "sweep")
    page = report(sweep)
    assert page.table() == {}
    assert "none yet" in page.texts("div", class_="card")[1]
    sweep.trial_path(0).mkdir()  # its trial.json is still to come
    assert report(sweep).table() == {}
    trial = add(sweep, 0, [0.5] if state != "failed" else [], state)
    assert report(sweep).table()[0][1] == state
    with (trial.path / "metrics.jsonl").open("a") as lines:
        lines.write(json.dumps(record(1, math.nan) | {"map/true_teacher": None}) + "\n" + '{"epoch": 2, "ma')
    assert report(sweep).table()[0][2] == "-"


def test_a_search_on_true_labels_says_so(tmp_path: Path) -> None:
    sweep = begin(tmp_path / "sweep", objective="oracle")
    add(sweep, 0, [0.1, 0.2, 0.3, 0.4], "finished")
    page = report(sweep)
    assert page.texts("p", class_="oracle")[0].startswith("ORACLE. Trials were ranked by the true labels")
    assert page.texts("h3")[0] == "best ORACLE"
    assert page.table()[0][2] == "0.5000"
    assert "ORACLE (the objective)" in page.texts("text", class_="heading")


def test_repeats_stand_beside_what_they_repeat(tmp_path: Path) -> None:
    sweep = begin(tmp_path / "sweep")
    repeats = [0.40, 0.43, 0.47]
    for number, value in enumerate(repeats):
        add(sweep, number, [0.1, 0.2, 0.3, value], "finished", repeats=0 if number else None)
    add(sweep, 3, [0.1, 0.2, 0.3, 0.9], "finished", optim__lr=5e-3)
    add(sweep, 4, [0.1, 0.2], "unfinished", repeats=3)
    page = report(sweep)
    cells = page.texts("td")
    at = cells.index("trial 0000, 3 seeds")
    spread = f"{statistics.mean(repeats):.4f} ± {statistics.stdev(repeats):.4f}"
    assert cells[at : at + 5] == ["trial 0000, 3 seeds", "noisy_map", spread, "3", "0.4000, 0.4300, 0.4700"]
    assert sum("seeds" in cell for cell in cells) == 2  # the second line: true mAP


def test_generations_tell_who_took_over_from_whom(tmp_path: Path) -> None:
    sweep = begin(tmp_path / "sweep", scheduler="pbt")
    for number in range(2):
        add(sweep, number, [0.1, 0.2, 0.3, 0.4 + 0.1 * number], "finished")
    assert "Generations" not in report(sweep).texts("h2")
    sweep.add_generation(Generation(2, {"0": 0.2, "1": 0.25}, [Move(0, 1, {"optim.lr": 0.002})]))
    page = report(sweep)
    assert "Generations" in page.texts("h2")
    cells = page.texts("td")
    at = cells.index("2 epochs")
    assert cells[at + 1 : at + 4] == ["0000 (0.2)", "0001 (0.25)", "optim.lr = 0.002"]


def test_importance_finds_what_matters_in_the_middle_too() -> None:
    rng = np.random.default_rng(3)
    drawn = [
        {"middle": float(rng.uniform(0, 1)), "up": float(rng.uniform(0, 1)), "no": float(rng.uniform(0, 1)), "kind": k}
        for k in rng.choice(["a", "b"], 80).tolist()
    ]
    scores = [
        -4 * (one["middle"] - 0.5) ** 2 + 0.6 * one["up"] + 0.4 * (one["kind"] == "a") + float(rng.normal(0, 0.05))
        for one in drawn
    ]
    choices = {"no": False, "up": False, "middle": False, "kind": True}
    found = {one.key: one for one in influences(drawn, scores, choices)}
    assert next(iter(found)) == "middle"
    alone = spearmanr([one["middle"] for one in drawn], scores).statistic  # it hardly sees a best value in the middle
    assert found["middle"].share > 5 * alone**2
    assert all(found[key].share > found[key].chance for key in ("middle", "up", "kind"))
    assert found["no"].share < found["no"].chance
    assert found["up"].direction == pytest.approx(spearmanr([one["up"] for one in drawn], scores).statistic)
    assert influences(drawn[:7], scores[:7], choices) == []
    assert influences(drawn[:9], [1.0] * 9, choices) == []


def test_importance_compares_at_one_budget_and_counts_no_repeats(tmp_path: Path) -> None:
    sweep = begin(tmp_path / "sweep")
    for number in range(12):  # the larger the rate the better at the first rung; those that are pruned later get worse
        noisy = [0.1, 0.1 + 0.01 * number, *([0.5, 0.6] if number < 6 else [0.0])]
        add(sweep, number, noisy, "finished" if number < 6 else "pruned", optim__lr=1e-4 * (number + 1))
    add(sweep, 12, [0.1, 0.1, 0.1, 0.1], "finished", repeats=0, optim__lr=1e-4)
    page = report(sweep)
    [told] = [text for text in page.texts("figcaption") if text.startswith("Share of the variance")]
    assert "after 2 epochs" in told
    assert "over the 12 trials" in told
    assert "100 % ↗" in page.texts("text", class_="label")


def test_agreement_with_the_truth_is_kendalls_tau(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    first, second = rng.integers(0, 8, 40).tolist(), rng.integers(0, 8, 40).tolist()
    assert kendall(first, second) == pytest.approx(kendalltau(first, second).statistic)
    assert math.isnan(kendall([1, 1], [1, 2]))
    sweep = begin(tmp_path / "sweep")
    for number in range(8):
        add(sweep, number, [0.1, 0.1, 0.1, 0.1 + 0.01 * number], "finished", optim__lr=1e-4 * (number + 1))
    assert any("Kendall's tau 1.00 over 8 finished trials" in text for text in report(sweep).texts("figcaption"))


def test_places_on_axes() -> None:
    log = axis_of("lr", Domain("loguniform", (1e-4, 1e-2)), [])
    assert [log.place(value) for value in (1e-4, 1e-3, 1e-2, 0, None)] == [0, pytest.approx(0.5), 1, None, None]
    assert [text for _, text in log.marks()] == ["0.0001", "0.0002", "0.0005", "0.001", "0.002", "0.005", "0.01"]
    whole = axis_of("n", Domain("randint", (2, 6)), [])
    assert [text for _, text in whole.marks()] == ["2", "3", "4", "5", "6"]
    choice = axis_of("c", Domain("choice", (True, None, "x")), ["later"])
    assert [text for _, text in choice.marks()] == ["true", "-", "x", "later"]
    assert choice.place(True) == choice.marks()[0][0]
    collapsed = linear("map", [0.05, *(0.5 + 0.01 * step for step in range(9))], robust=True)
    assert collapsed.ends[0] > 0.3
    assert collapsed.place(0.05) == 0
    assert linear("map", []).place(0.5) is not None


def test_the_command(sweep: SweepFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(sweep.path)]) == 0
    assert (sweep.path / "best.yaml").is_file()
    assert (sweep.path / "trials.parquet").is_file()
    assert capsys.readouterr().out == f"{sweep.path / 'report.html'}\n"
    assert main([str(tmp_path)]) == 2
    assert "is no sweep" in capsys.readouterr().err
    assert main([]) == 2
    assert "usage" in capsys.readouterr().err


_ACT = """
const grips = [...document.querySelectorAll(".parallel .grip")];
const grip = grips[grips.length - 1], box = grip.getBoundingClientRect();
grip.setPointerCapture = () => {};  // there is no pointer
for (const [name, at] of [["pointerdown", 0], ["pointermove", 0.5], ["pointerup", 0.5]])
  grip.dispatchEvent(new PointerEvent(name, {clientX: box.x + 5, clientY: box.y + at * box.height}));
document.querySelectorAll("#trials th")[2].click();
document.querySelectorAll("#trials th")[2].click();
const one = document.querySelector('.parallel [data-trial="0"]');
one.dispatchEvent(new PointerEvent("pointermove", {bubbles: true, clientX: 300, clientY: 300}));
"""


def test_a_browser_shows_it_without_network(sweep: SweepFolder, tmp_path: Path) -> None:
    browser = find_browser()
    if browser is None:
        pytest.skip("no chromium, and no apt to install it by")
    results.write(sweep)
    shown = show(browser, write_report(sweep), _ACT, tmp_path)
    assert shown.complaints == []
    page = Page(shown.html)
    marked = [(tag, one["data-trial"]) for tag, one in page.elements if "on" in one.get("class", "").split()]
    assert {number for _, number in marked} == {"0"}
    assert {"path", "g", "circle", "tr"} == {tag for tag, _ in marked}
    assert "noisy_map  0.4000" in page.texts("div", id="tip")[0]
    out = {one["data-trial"] for one in page.attributes("tr", class_="out")}
    assert out == {"2", "3", "4"}  # below half of the objective's axis, or without one
    assert list(page.table()) == [2, 4, 0, 1, 3]  # by the objective, the smallest first, and none last
