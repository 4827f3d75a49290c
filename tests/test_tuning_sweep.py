"""`adagc tune` for real: ranks, Ray and signals. A sweep comes to its end whatever is killed, trains no finished trial
again, and leaves no process, no placement group and no file of Ray's.
"""

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pyarrow.parquet as pq
import pytest
from safetensors.torch import load_file

from launch.recipe import load_config
from tests.processes import kill, wait_until, words_of
from tests.tiny import tiny_settings
from tuning.command import main
from tuning.record import SweepFolder
from tuning.space import Base, load_space

CHECKOUT = Path(__file__).parents[1]
SPACE = "optim.lr: {choice: [0.003, 1e-9]}\nmethod.teacher_weight: {uniform: [0, 1]}\n"
RATES = [1e-9, 0.003]  # of the first trials, by the seed
TIMEOUT = 120


class Tune:
    """A sweep over tiny runs, in a folder of its own."""

    def __init__(self, folder: Path, shards: Path) -> None:
        self.folder, self.log = folder / "sweep", folder / "log"
        self.sweep = SweepFolder(self.folder)
        self._scratch = folder
        self.started: list[int] = []
        (folder / "recipe.yaml").write_text("{}")
        (folder / "space.yaml").write_text(SPACE)
        settings = [word for word in tiny_settings(shards, folder) if not word.startswith("run.dir=")]
        base = Base(str(folder / "recipe.yaml"), tuple(settings))
        space = load_space(folder / "space.yaml")
        self.seed = next(
            seed
            for seed in range(100)
            if [space.draw(base, folder, seed, "trial", number)["optim.lr"] for number in range(len(RATES))] == RATES
        )
        options = ["--dir", self.folder, "--space", folder / "space.yaml", "--seed", self.seed]
        self.words = [base.recipe, *settings, *map(str, options)]
        others = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "RAY"))}
        self.env = others | {"TMPDIR": str(folder)}

    def start(self, *words: str, before: tuple[str, ...] = ()) -> "subprocess.Popen[bytes]":
        command = [*before, sys.executable, "-m", "launch.cli", "tune", *self.words, *words]
        with self.log.open("ab") as out:
            process = subprocess.Popen(command, env=self.env, stdout=out, stderr=out, cwd=CHECKOUT)
        self.started.append(process.pid)
        return process

    def processes(self, *words: str) -> list[psutil.Process]:
        """Those of this sweep whose command line has these words."""
        return [one for one in psutil.process_iter() if self._is_own(one) and set(words) <= {*words_of(one.pid)}]

    def _is_own(self, process: psutil.Process) -> bool:
        try:
            return process.environ().get("TMPDIR") == str(self._scratch)
        except psutil.Error:
            return False

    def epochs(self, number: int) -> int:
        trials = {trial.number: trial for trial in self.sweep.trials()}
        return len(trials[number].epochs) if number in trials else 0


@pytest.fixture
def tune(tmp_path: Path, tiny_shards: Path) -> Iterator[Tune]:
    """Whatever happens to it, it leaves nothing."""
    tune = Tune(tmp_path, tiny_shards)
    yield tune
    assert not tune.processes(), tune.log.read_text()
    assert not list(tmp_path.glob("ray-*"))
    assert not [left for pid in tune.started for left in Path("/tmp").glob(f"ray-local.{pid}-*")]


def test_two_ranks_a_trial_asha_and_a_rank_that_is_killed(tune: Tune, tmp_path: Path) -> None:
    cluster = (sys.executable, "-m", "tuning.cluster", "--dir", str(tune.folder), "--object-store", "80000000", "--")
    census = (sys.executable, "-m", "tests.tune_census", str(tmp_path / "census"))
    process = tune.start("--ranks-per-trial", "2", "--trials", "2", before=(*cluster, *census))
    wait_until(lambda: tune.epochs(0) >= 1, "an epoch of the first trial", TIMEOUT)
    first = [one for one in tune.processes("launch.train") if one.environ().get("RANK") == "1"]
    kill(*(one.pid for one in first))
    assert process.wait(2 * TIMEOUT) == 0, tune.log.read_text()
    told = tune.log.read_text()

    trials = tune.sweep.trials()
    assert [trial.state for trial in trials] == ["pruned", "finished"]  # the first one comes again last
    assert [len(trial.errors) for trial in trials] == [1, 0]
    assert "rank 1 was killed by SIGKILL" in trials[0].errors[0]
    assert "trial 0000 is tried again" in told
    # the trigger is forced after 1 of 4 epochs, and one is left to show; a next one may end while the ranks are told
    assert len(trials[0].epochs) in (2, 3)
    assert len(trials[1].epochs) == 4
    assert "2 rank(s) on cpu" in (trials[0].path / "log.txt").read_text()

    found = json.loads((tmp_path / "census").read_text())
    assert found["groups"] == ["REMOVED"] * 3  # two trials, one of them twice
    assert found["cores"][0] == found["cores"][1]
    rows = pq.read_table(tune.folder / "trials.parquet").to_pylist()  # type: ignore[no-untyped-call]
    assert [row["samples"] for row in rows] == [90 * len(trial.epochs) for trial in trials]
    assert load_config(tune.folder / "best.yaml").optim.lr == 0.003


def test_a_sweep_goes_on_after_a_stop_and_after_a_kill_of_its_driver(tune: Tune) -> None:
    words = ("--trials", "3", "--scheduler", "none", "--resume")
    process = tune.start(*words)
    wait_until(lambda: tune.epochs(0) >= 1, "an epoch of the first trial", TIMEOUT)
    process.terminate()
    assert process.wait(TIMEOUT) == 75, tune.log.read_text()
    trials = tune.sweep.trials()
    assert not any(trial.is_training for trial in trials)
    # others may have been starting: their status is written a moment before their first step
    assert json.loads((trials[0].path / "status.json").read_text())["state"] != "running"

    process = tune.start(*words)
    wait_until(lambda: tune.epochs(2) >= 1, "an epoch of the third trial", TIMEOUT)
    ranks = tune.processes("launch.train")
    for one in ranks:  # they are not to come to their end meanwhile
        one.suspend()
    done = [trial for trial in tune.sweep.trials() if trial.state == "finished"]
    lines = {trial.number: (trial.path / "log.txt").read_text() for trial in done}
    assert lines
    kill(*(one.pid for one in tune.processes("tuning.sweep") if "tuning.step" not in words_of(one.pid)))
    for one in ranks:
        with suppress(psutil.NoSuchProcess):
            one.resume()
    assert process.wait(TIMEOUT) != 0
    assert not tune.processes()

    assert tune.start(*words).wait(2 * TIMEOUT) == 0, tune.log.read_text()
    trials = tune.sweep.trials()
    assert [trial.state for trial in trials] == ["finished"] * 3
    assert {number: (trials[number].path / "log.txt").read_text() for number in lines} == lines
    assert "epoch-000" in (trials[2].path / "log.txt").read_text()  # from its own checkpoint


@pytest.mark.long
def test_a_population_goes_on_after_a_kill_and_its_best_is_trained_again_by_its_recipe(
    tune: Tune, tmp_path: Path
) -> None:
    """Two trials of three epochs, the worse of which takes over from the other after two."""
    words = ("--trials", "2", "--scheduler", "pbt", "optim.epochs=3", "--resume")
    process = tune.start(*words)
    wait_until(lambda: any(trial.taken_over for trial in tune.sweep.trials()), "a generation", TIMEOUT)
    kill(*(one.pid for one in tune.processes("tuning.sweep") if "tuning.step" not in words_of(one.pid)))
    assert process.wait(TIMEOUT) != 0

    assert tune.start(*words, "--repeats", "1").wait(2 * TIMEOUT) == 0, tune.log.read_text()
    [generation] = tune.sweep.generations()
    [move] = generation.moves
    assert generation.epoch == 2
    assert set(move.values) & {"optim.lr", "method.teacher_weight"}
    trials = tune.sweep.trials()
    assert [trial.state for trial in trials] == ["finished"] * 4
    assert sorted(trial.repeats for trial in trials[2:] if trial.repeats is not None) == [0, 1]
    taken, source = trials[move.number], trials[move.source]
    assert taken.config.schedule.changes == {2: move.values}
    assert [one["map/noisy_teacher"] for one in taken.epochs[:2]] == [
        one["map/noisy_teacher"] for one in source.epochs[:2]
    ]

    again = tmp_path / "again"
    one_core = ("taskset", "--cpu-list", "0")  # as a trial of one rank has it: sums by more threads differ in last bits
    command = [*one_core, sys.executable, "-m", "launch.cli", "train", str(taken.path / "config.yaml")]
    subprocess.run([*command, f"run.dir={again}"], check=True, cwd=CHECKOUT, env=tune.env)
    teachers = [load_file(path / "teacher.safetensors") for path in (again, taken.path, source.path)]
    same = [all(teachers[0][name].equal(other[name]) for name in other) for other in teachers[1:]]
    assert same == [True, False]  # as the sweep has trained it, and not as without the change


def test_what_cannot_be_is_told_before_anything_starts(tune: Tune, capsys: pytest.CaptureFixture[str]) -> None:
    def told(*words: str) -> str:
        assert main([*tune.words, *words], {}) == 2
        return capsys.readouterr().err

    (tune.folder.parent / "wrong.yaml").write_text("optim.lrate: {uniform: [0, 1]}")
    wrong = told("--space", str(tune.folder.parent / "wrong.yaml"))
    assert re.search(r"adagc tune: .*wrong.yaml: optim.lrate=0.0: unknown key optim.lrate: did you mean", wrong)
    assert "--gpus-per-trial and engine.device=cpu" in told("--gpus-per-trial", "1")
    assert "data.shards" in told("data.shards=")
    assert not tune.folder.exists()
