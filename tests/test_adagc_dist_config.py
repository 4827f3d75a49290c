"""The configuration checks itself when it is built: ranges, and the bounds on the warm-up."""

import dataclasses
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from adagc_dist.config import (
    Config,
    DataConfig,
    DetectorConfig,
    MethodConfig,
    OptimConfig,
    RunConfig,
    ScheduleConfig,
)
from launch.recipe import load_config


def config(**sections: Any) -> Config:
    return Config(**({"data": DataConfig(shards="shards"), "run": RunConfig(dir="run")} | sections))


def test_the_defaults_are_valid() -> None:
    assert config().optim == OptimConfig()
    assert config().run_path == Path("run")


@pytest.mark.parametrize(
    ("section", "values", "message"),
    [
        (DataConfig, {"size": 0}, r"data\.size=0 must be positive"),
        (DataConfig, {"workers": -1}, r"data\.workers=-1 must not be negative"),
        (MethodConfig, {"prediction_momentum": 1.1}, r"method\.prediction_momentum=1\.1 must lie in \[0, 1\]"),
        (MethodConfig, {"teacher_weight": -0.1}, r"method\.teacher_weight=-0\.1 must lie in \[0, 1\]"),
        (MethodConfig, {"pseudo_threshold": 2.0}, r"method\.pseudo_threshold=2\.0 must lie in \[0, 1\]"),
        (MethodConfig, {"teacher_momentum": 1.0}, r"method\.teacher_momentum=1\.0 must lie in \[0, 1\)"),
        (MethodConfig, {"teacher_momentum": float("nan")}, r"method\.teacher_momentum=nan must lie in"),
        (MethodConfig, {"teacher_lag": 0.0}, r"method\.teacher_lag=0\.0 must be positive"),
        (MethodConfig, {"gc_weight": -3.0}, r"method\.gc_weight=-3\.0 must not be negative"),
        (MethodConfig, {"mixup_alpha": -1.0}, r"method\.mixup_alpha=-1\.0 must not be negative"),
        (DetectorConfig, {"min_epochs": 0}, r"detector\.min_epochs=0 must be at least 1"),
        (DetectorConfig, {"patience": 0}, r"detector\.patience=0 must be at least 1"),
        (OptimConfig, {"epochs": 0}, r"optim\.epochs=0 must be at least 1"),
        (OptimConfig, {"global_batch": 0}, r"optim\.global_batch=0 must be at least 1"),
        (OptimConfig, {"accumulation": 0}, r"optim\.accumulation=0 must be at least 1"),
        (OptimConfig, {"lr": -1e-3}, r"optim\.lr=-0\.001 must not be negative"),
        (OptimConfig, {"clip_norm": float("nan")}, r"optim\.clip_norm=nan must not be negative"),
        (RunConfig, {"log_every": 0}, r"run\.log_every=0 must be at least 1"),
        (RunConfig, {"keep_checkpoints": 0}, r"run\.keep_checkpoints=0 must be at least 1"),
        (RunConfig, {"max_minutes": 0.0}, r"run\.max_minutes=0\.0 must be positive"),
        (RunConfig, {"max_minutes": float("nan")}, r"run\.max_minutes=nan must be positive"),
        (RunConfig, {"stop_seconds": 0.0}, r"run\.stop_seconds=0\.0 must be positive"),
        (RunConfig, {"panels_every": -1}, r"run\.panels_every=-1 must not be negative \(0 is off\)"),
        (RunConfig, {"sanity_every": -1}, r"run\.sanity_every=-1 must not be negative \(0 is off\)"),
    ],
)
def test_values_out_of_range_are_refused_by_name(section: type, values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        section(**values)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({0: {"optim.lr": 1.0}}, r"schedule\.changes: 0 must be at least 1"),
        ({3: {"optim.epochs": 1.0}}, r"schedule\.changes: optim\.epochs cannot change in mid-run; method\.gc_weight, "),
        ({60: {"optim.lr": 1.0}}, r"schedule\.changes: 60 comes to no effect within optim\.epochs=60"),
        ({3: {"optim.lr": -1.0}}, r"optim\.lr=-1\.0 must not be negative"),
        ({3: {"method.teacher_lag": 1.0}}, r"method\.teacher_lag has no effect beside method\.teacher_momentum"),
    ],
)
def test_a_schedule_that_cannot_be_is_refused(changes: dict[int, dict[str, float]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config(schedule=ScheduleConfig(changes=changes), method=MethodConfig(teacher_momentum=0.9))


def test_changes_hold_from_their_epoch_on() -> None:
    found = config(schedule=ScheduleConfig(changes={5: {"optim.lr": 0.1}, 3: {"optim.lr": 0.2, "method.gc_weight": 2}}))
    assert [found.at(epoch).optim.lr for epoch in (2, 3, 4, 5, 9)] == [1e-3, 0.2, 0.2, 0.1, 0.1]
    assert [found.at(epoch).method.gc_weight for epoch in (2, 3, 5)] == [3, 2, 2]


def test_what_a_run_cannot_do_without() -> None:
    with pytest.raises(ValueError, match=r"data\.shards is not set: the folder that `adagc shard` wrote"):
        config(data=DataConfig())
    with pytest.raises(ValueError, match=r"run\.dir is not set: a folder for this run"):
        config(run=RunConfig())


@pytest.mark.parametrize(
    ("text", "steps", "minutes"),
    [
        ("500 steps", 500, None),
        ("1 step", 1, None),
        ("3steps", 3, None),
        ("15 minutes", None, 15),
        ("1 minute", None, 1),
        ("90minutes", None, 90),
        ("epoch", None, None),
    ],
)
def test_checkpoints_come_by_steps_by_minutes_or_by_epochs(text: str, steps: int | None, minutes: int | None) -> None:
    run = RunConfig(checkpoint_every=text)
    assert (run.checkpoint_steps, run.checkpoint_minutes) == (steps, minutes)
    assert load_config(None, ["data.shards=s", "run.dir=r", f"run.checkpoint_every={text}"]).run == replace(
        run, dir="r"
    )


def test_by_default_checkpoints_come_every_quarter_of_an_hour() -> None:
    assert (RunConfig().checkpoint_steps, RunConfig().checkpoint_minutes) == (None, 15)


@pytest.mark.parametrize(
    "text",
    ["", "10", "0 steps", "-1 steps", "1.5 minutes", "steps", "epochs", "2 epochs", "15 min", "2 hours", "5  steps",
     " 5 steps", "5 steps\n", "007 steps", "5 minutes 3 steps", "never"],
)  # fmt: skip
def test_other_times_for_checkpoints_are_refused_with_examples(text: str) -> None:
    message = rf"run\.checkpoint_every={re.escape(text)} must be like `500 steps`, `15 minutes` or `epoch`"
    with pytest.raises(ValueError, match=message):
        RunConfig(checkpoint_every=text)


@pytest.mark.parametrize(
    ("setting", "choices"),
    [
        ("run.checkpoint_every=10", "500 steps"),
        ("run.on_save_error=ignore", "continue"),
        ("run.resume=always", "never"),
        ("engine.row_exchange=ring", "all_to_all"),
    ],
)
def test_on_the_command_line_what_is_refused_comes_with_what_is_not(setting: str, choices: str) -> None:
    with pytest.raises(ValueError, match=choices) as told:
        load_config(None, ["data.shards=s", "run.dir=r", setting])
    assert setting.split("=")[0] in str(told.value)


def test_it_cannot_be_changed() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        config().optim.lr = 1.0  # type: ignore[misc]


@pytest.mark.parametrize(
    ("epochs", "detector", "shortest", "longest"),
    [
        (60, DetectorConfig(), 3, 24),
        (5, DetectorConfig(), 2, 2),  # the minimum gives way to 0.4 of the epochs
        (1, DetectorConfig(), 1, 1),
        (20, DetectorConfig(min_epochs=4, max_epochs=6), 4, 6),
        (20, DetectorConfig(min_epochs=7, max_epochs=6), 6, 6),
    ],
)
def test_bounds_of_the_warm_up(epochs: int, detector: DetectorConfig, shortest: int, longest: int) -> None:
    built = config(optim=OptimConfig(epochs=epochs), detector=detector)
    assert (built.shortest_warmup, built.longest_warmup) == (shortest, longest)


def test_a_warm_up_longer_than_the_paper_allows_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"detector\.max_epochs=9 is more than 0\.4 of optim\.epochs=20: set it to 8 or less"
    ):
        config(optim=OptimConfig(epochs=20), detector=DetectorConfig(max_epochs=9))
    fixed = DetectorConfig(rule="fixed", min_epochs=9, max_epochs=9)  # who names the epoch means it
    assert config(optim=OptimConfig(epochs=20), detector=fixed).detector.min_epochs == 9
