"""A sweep's folder read without Ray: what a trial's state is, another sweep is refused, and what is reported of it."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from launch.recipe import load_config
from tuning import results
from tuning.objective import OBJECTIVES
from tuning.record import Plan, SweepFolder, TrialFolder, common
from tuning.space import Base

BASE = Base("demo", ("data.shards=shards",))
SPACE = {"optim.lr": {"uniform": [0.0, 1.0]}, "detector.rule": {"choice": ["plateau", "never"]}}


def make_plan(**changes: Any) -> Plan:
    plan = Plan(
        recipe=common(BASE.config({}, Path("x"))),
        space=SPACE,
        objective="noisy_map",
        scheduler="asha",
        searcher="random",
        seed=0,
        epochs=16,
        rows=90,
        first_rung=8,
    )
    return dataclasses.replace(plan, **changes)


@pytest.fixture
def sweep(tmp_path: Path) -> SweepFolder:
    sweep = SweepFolder(tmp_path / "sweep")
    sweep.begin(make_plan())
    return sweep


def add(sweep: SweepFolder, number: int, *maps: float, state: str = "") -> TrialFolder:
    values = {"optim.lr": 0.1 * number, "detector.rule": "never"}
    trial = sweep.add(number, values, BASE.config(values, sweep.trial_path(number)))
    lines = [
        {"epoch": epoch, "map/noisy_teacher": value, "map/true_teacher": 0.9, "data/rows": 89.0, "data/skipped_rows": 1}
        for epoch, value in enumerate(maps)
    ]
    (trial.path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if state:
        (trial.path / "status.json").write_text(json.dumps({"state": state}))
    return trial


def test_a_trial_is_what_its_folder_says(sweep: SweepFolder) -> None:
    assert add(sweep, 0).state == "unfinished"
    assert add(sweep, 1, 0.1, state="stopped").state == "unfinished"
    assert add(sweep, 2, 0.1, state="finished").state == "finished"
    pruned = add(sweep, 3, 0.1, state="stopped")
    assert (pruned.state, pruned.repeats) == ("unfinished", None)
    TrialFolder(pruned.path).prune()  # by another process
    assert pruned.state == "pruned"
    failed = add(sweep, 4, 0.1, state="failed")
    failed.add_attempt(seconds=2, host="here", error="no memory")
    failed.add_attempt(seconds=3, host="here", error=None)
    failed.add_attempt(seconds=4, host="here", error="no memory")
    assert failed.state == "unfinished"  # in between it went well
    failed.add_attempt(seconds=1, host="here", error="no memory")
    assert (failed.state, failed.seconds) == ("failed", 10)
    assert [trial.number for trial in sweep.trials()] == [0, 1, 2, 3, 4]


def test_lines_that_a_crash_cut_short_are_no_epochs(sweep: SweepFolder) -> None:
    trial = add(sweep, 0, 0.1, 0.2)
    file = trial.path / "metrics.jsonl"
    file.write_text(file.read_text()[:-10])
    assert len(trial.epochs) == 1


def test_another_sweep_is_refused_with_the_difference(sweep: SweepFolder) -> None:
    sweep.check(make_plan(), resume=True)
    with pytest.raises(ValueError, match="holds this sweep already: continue it with --resume"):
        sweep.check(make_plan(), resume=False)
    recipe = common(load_config("demo", ["data.shards=shards", "run.dir=x", "optim.lr=0.5"]))
    with pytest.raises(ValueError, match=r"holds another sweep \(optim.lr: 0.003 there, 0.5 here\)"):
        sweep.check(make_plan(recipe=recipe), resume=True)
    other = {"optim.lr": {"uniform": [0.0, 1.0]}, "method.gc_weight": {"choice": [1]}}
    told = r"space detector.rule: {'choice'.* there, nothing here; space method.gc_weight: nothing there, {'choice'"
    with pytest.raises(ValueError, match=told):
        sweep.check(make_plan(space=other), resume=True)
    with pytest.raises(ValueError, match="seed: 0 there, 1 here"):
        sweep.check(make_plan(seed=1), resume=True)


def test_neither_a_run_nor_a_comparison_is_a_sweep_and_a_new_folder_is_free(sweep: SweepFolder, tmp_path: Path) -> None:
    SweepFolder(tmp_path / "new").check(make_plan(), resume=True)
    with pytest.raises(ValueError, match="is a run's folder: name another with --dir"):
        SweepFolder(add(sweep, 0).path).check(make_plan(), resume=True)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "compare.json").touch()
    with pytest.raises(ValueError, match="is a comparison's folder: name another with --dir"):
        SweepFolder(tmp_path / "other").check(make_plan(), resume=True)
    with pytest.raises(FileNotFoundError, match="is no sweep"):
        _ = SweepFolder(tmp_path / "new").plan


def test_what_a_sweep_has_found(sweep: SweepFolder) -> None:
    add(sweep, 0, 0.1, 0.3, state="finished")
    add(sweep, 1, 0.5, 0.2, state="finished")  # its best epoch is not what it leaves
    add(sweep, 2, 0.9, state="stopped").prune()  # not trained to the end
    failed = add(sweep, 3)
    for _ in range(2):
        failed.add_attempt(seconds=1, host="here", error="exit code 1\nno memory")
    found = results.write(sweep)
    table = pq.read_table(sweep.path / "trials.parquet").to_pylist()  # type: ignore[no-untyped-call]
    assert table[:3] == found[:3]
    assert (table[3]["objective"], table[3]["error"]) == (None, "exit code 1\nno memory")
    assert [row["state"] for row in table] == ["finished", "finished", "pruned", "failed"]
    assert table[0] | {"path": ""} == {
        "number": 0,
        "repeats": None,
        "state": "finished",
        "objective": 0.3,
        "epochs": 2,
        "samples": 180,
        "seconds": 0.0,
        "optim.lr": 0.0,
        "detector.rule": "never",
        "map/noisy_teacher": 0.3,
        "map/true_teacher": 0.9,
        "data/rows": 89.0,
        "data/skipped_rows": 1.0,
        "path": "",
        "error": None,
    }
    told = results.describe(sweep, found)
    assert "2 finished, 1 pruned, 1 failed" in told
    assert "trial 0003 failed twice" in told
    assert "  no memory" in told
    lines = [line.split() for line in told.splitlines()]
    assert lines.index(["0000", "0.3000", "2", "never", "0"]) < lines.index(["0001", "0.2000", "2", "never", "0.1"])


def test_the_best_recipe_is_one_as_it_is(sweep: SweepFolder) -> None:
    add(sweep, 3, 0.3, state="finished")
    results.write(sweep)
    config = load_config(sweep.path / "best.yaml")
    assert config.optim.lr == pytest.approx(0.3)
    assert config.run_path == sweep.path / "best"


def test_an_objective_that_runs_do_not_report_is_told() -> None:
    assert OBJECTIVES["noisy_map"].of({"map/noisy_teacher": 0.5}) == 0.5
    with pytest.raises(ValueError, match=r"--objective pu_score needs pu/noisy_teacher, .*it has map/noisy_teacher"):
        OBJECTIVES["pu_score"].of({"map/noisy_teacher": 0.5, "data/rows": 1})
    assert OBJECTIVES["oracle"].clean


def test_repeats_are_made_once_and_count_for_the_mean(sweep: SweepFolder) -> None:
    for number, value in enumerate([0.5, 0.6, 0.2]):
        add(sweep, number, *[value] * 16, state="finished")
    sweep.repeat(1, 2)
    sweep.repeat(1, 2)
    sweep.repeat(0, 2)
    sweep.repeat(2, 1)
    made = [trial for trial in sweep.trials() if trial.repeats is not None]
    assert [(trial.number, trial.repeats, trial.config.run.seed) for trial in made] == [
        (3, 1, 1), (4, 1, 2), (5, 0, 1), (6, 0, 2), (7, 2, 1),
    ]  # fmt: skip
    assert made[0].values == sweep.trials()[1].values | {"run.seed": 1}
    assert made[0].config.optim == sweep.trials()[1].config.optim
    assert [trial.number for trial in sweep.drawn()] == [0, 1, 2]
    assert sweep.free_numbers(2) == [8, 9]
    for trial, value in zip(made, [0.1, 0.2, 0.5, 0.52]):  # the best one was lucky
        line = {"epoch": 0, "map/noisy_teacher": value, "data/rows": 90.0, "data/skipped_rows": 0.0}
        (trial.path / "metrics.jsonl").write_text(json.dumps(line) + "\n")
        (trial.path / "status.json").write_text(json.dumps({"state": "finished"}))
    assert [row["number"] for row in results.best(results.rows(sweep))] == [1, 0, 2]  # of 2 nothing is known yet
    line = {"epoch": 0, "map/noisy_teacher": 0.2, "data/rows": 90.0, "data/skipped_rows": 0.0}
    (made[4].path / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    (made[4].path / "status.json").write_text(json.dumps({"state": "finished"}))
    rows = results.write(sweep)
    assert [row["number"] for row in results.best(rows)] == [0, 1, 2]
    assert [row["number"] for row in results.best(rows, by_mean=False)] == [1, 0, 2]
    shutil.rmtree(made[0].path)
    sweep.repeat(1, 2)
    assert sorted(trial.config.run.seed for trial in sweep.trials() if trial.repeats == 1) == [1, 2]
    told = results.describe(sweep, rows)
    assert "0.5067 ± 0.0115 (3 seeds)" in told
    assert "3 finished, 5 finished repeats" in told
    assert load_config(sweep.path / "best.yaml").optim.lr == 0.0
    table = pq.read_table(sweep.path / "trials.parquet").to_pydict()  # type: ignore[no-untyped-call]
    assert table["repeats"] == [None, None, None, 1, 1, 0, 0, 2]
    assert table["run.seed"] == [None, None, None, 1, 2, 1, 2, 1]
