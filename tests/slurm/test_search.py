"""slurm/tune_reben.sh with `adagc tune` and `adagc compare`: trials on both nodes, gone on with after the time limit
and a loss of Ray.
"""

import csv
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file

from adagc_dist.tracking import read_status
from tests.processes import kill, name_of, wait_until
from tests.slurm.cluster import Cluster
from tests.tiny import tiny_settings, write_tiny
from tuning.comparison import ComparisonFolder
from tuning.record import SweepFolder, TrialsFolder

SCRIPT = Path(__file__).parents[2] / "slurm" / "tune_reben.sh"
START_SECONDS = 180


@pytest.mark.long
@pytest.mark.timeout(900)
def test_a_sweep_trains_on_both_nodes_and_goes_on_after_the_time_limit_and_without_ray(
    slurm: Cluster, tmp_path: Path
) -> None:
    sweep = SweepFolder(tmp_path / "sweep")
    search = [*_tune(tmp_path, sweep.path), "optim.epochs=6", "--trials", "3", "--scheduler", "none"]
    job = _submit(slurm, tmp_path, sweep.path, *search, until=lambda: _has_begun(sweep, 2))
    _end_time(slurm, job)

    def disturbed() -> bool:
        """In its second start it trains a trial, and has finished another."""
        again = slurm.log(job).count("trials are over") == 2
        states = [read_status(trial.path).get("state") for trial in sweep.trials()]
        return again and "finished" in states and "running" in states

    wait_until(disturbed, "a finished trial in the second start", 2 * START_SECONDS)
    assert "stopped (SIGUSR1) and saved; requeued, restart 1 of" in slurm.log(job)
    kill(*(pid for pid in slurm.processes(slurm.nodes[0]) if name_of(pid) == "raylet"))
    logs = [trial.path / "log.txt" for trial in sweep.trials() if trial.state == "finished"]
    said = {log: log.read_text() for log in logs}
    assert slurm.wait(job, "COMPLETED", "FAILED", "CANCELLED", timeout=2 * START_SECONDS) == "COMPLETED", slurm.log(job)
    assert "lost Ray on node n1" in slurm.log(job)
    assert slurm.job(job)["Restarts"] == "2"
    assert {log: log.read_text() for log in said} == said

    trials = sweep.trials()
    assert [trial.state for trial in trials] == ["finished"] * 3, slurm.log(job)
    assert [trial.errors for trial in trials] == [[]] * 3
    slurm.wait_left()
    assert (sweep.path / "best.yaml").exists()


@pytest.mark.long
@pytest.mark.timeout(900)
def test_a_population_trains_on_both_nodes_and_takes_over_after_the_time_limit(slurm: Cluster, tmp_path: Path) -> None:
    """Two trials of three epochs, the worse of which takes over from the other after two."""
    sweep = SweepFolder(tmp_path / "sweep")
    (tmp_path / "space.yaml").write_text(
        "optim.lr: {choice: [0.003, 1e-9]}\nmethod.teacher_weight: {uniform: [0, 1]}\n"
    )
    search = [*_tune(tmp_path, sweep.path), "--space", str(tmp_path / "space.yaml"), "optim.epochs=3", "--trials", "2"]
    job = _submit(slurm, tmp_path, sweep.path, *search, "--scheduler", "pbt", until=lambda: _has_begun(sweep, 2))
    _end_time(slurm, job)
    assert slurm.wait(job, "COMPLETED", "FAILED", "CANCELLED", timeout=2 * START_SECONDS) == "COMPLETED", slurm.log(job)
    assert "stopped (SIGUSR1) and saved; requeued, restart 1 of" in slurm.log(job)

    [generation] = sweep.generations()
    [move] = generation.moves
    trials = sweep.trials()
    assert [trial.state for trial in trials] == ["finished"] * 2, slurm.log(job)
    assert trials[move.number].config.schedule.changes == {2: move.values}
    taken, source = (
        [line["map/noisy_teacher"] for line in trials[number].epochs] for number in (move.number, move.source)
    )
    assert taken[:2] == source[:2]
    one, other = (load_file(trials[number].path / "teacher.safetensors") for number in (move.number, move.source))
    assert not all(one[name].equal(other[name]) for name in one)  # its own settings took effect
    slurm.wait_left()


@pytest.mark.long
@pytest.mark.timeout(900)
def test_a_comparison_trains_on_both_nodes_and_goes_on_after_the_time_limit(slurm: Cluster, tmp_path: Path) -> None:
    out = ComparisonFolder(tmp_path / "out")
    (tmp_path / "grid.yaml").write_text(
        "recipe: recipe.yaml\nsettings: {random: {spml.policy: random}, dominant: {spml.policy: dominant}}\n"
        "methods: {an: {method.name: an}, adagc: {}, full: {spml.policy: full, method.name: an}}\n"
    )
    compare = ["adagc", "compare", "grid.yaml", *_settings(tmp_path), "optim.epochs=4", "--out", str(out.path)]
    job = _submit(slurm, tmp_path, out.path, *compare, "--seeds", "1", until=lambda: _has_begun(out, 2))
    _end_time(slurm, job)
    assert slurm.wait(job, "COMPLETED", "FAILED", "CANCELLED", timeout=2 * START_SECONDS) == "COMPLETED", slurm.log(job)
    assert "stopped (SIGUSR1) and saved; requeued, restart 1 of" in slurm.log(job)
    with (out.path / "results.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["state"] for row in rows] == ["finished"] * 6
    assert len(out.trials()) == 5  # full labels once
    slurm.wait_left()


def _tune(folder: Path, sweep: Path) -> list[str]:
    return ["adagc", "tune", "recipe.yaml", *_settings(folder), "--dir", str(sweep)]


def _settings(folder: Path) -> list[str]:
    """Of all trials; writes the shards and an empty recipe.yaml."""
    write_tiny(folder / "shards")
    (folder / "recipe.yaml").write_text("{}")
    return [word for word in tiny_settings(folder / "shards", folder) if not word.startswith("run.dir=")]


def _submit(slurm: Cluster, cwd: Path, out: Path, *words: str, until: Callable[[], bool]) -> int:
    """A job, once it is so far."""
    env = {
        "ADAGC_SWEEP": str(out),
        "ADAGC_HOME": str(SCRIPT.parents[1]),
        "ADAGC_CLUSTER_OPTIONS": "--object-store 80000000",
        "GOMP_SPINCOUNT": "0",  # both nodes compute on the same cores
    }
    job = slurm.sbatch(SCRIPT, *words, "--ranks-per-trial", "2", "--resume", env=env, cwd=cwd)
    try:
        wait_until(until, "an epoch on both nodes", START_SECONDS)
    except TimeoutError as error:
        raise TimeoutError(f"{error}\n{slurm.log(job)}") from None
    return job


def _has_begun(folder: TrialsFolder, trials: int) -> bool:
    """So many trials have trained an epoch."""
    return sum(bool(trial.epochs) for trial in folder.trials()) >= trials


def _end_time(slurm: Cluster, job: int) -> None:
    """What --signal=B:USR1@... sends before the time limit."""
    slurm.run("scancel", "--signal=USR1", "--batch", str(job))
