"""slurm/tune_reben.sh with `adagc tune`: trials on both nodes, saved before the time limit, and gone on with."""

from pathlib import Path

from tests.slurm.cluster import Cluster
from tests.slurm.processes import wait_until
from tests.tiny import tiny_settings, write_tiny
from tuning.record import SweepFolder

SCRIPT = Path(__file__).parents[2] / "slurm" / "tune_reben.sh"
START_SECONDS = 180


def test_a_sweep_trains_on_both_nodes_and_goes_on_after_the_time_limit(slurm: Cluster, tmp_path: Path) -> None:
    sweep, shards = SweepFolder(tmp_path / "sweep"), tmp_path / "shards"
    write_tiny(shards)
    (tmp_path / "recipe.yaml").write_text("{}")
    settings = [word for word in tiny_settings(shards, tmp_path, "optim.epochs=6") if not word.startswith("run.dir=")]
    words = ["adagc", "tune", str(tmp_path / "recipe.yaml"), *settings, "--dir", str(sweep.path), "--trials", "3"]
    options = ["--ranks-per-trial", "2", "--scheduler", "none", "--resume"]
    env = {
        "ADAGC_SWEEP": str(sweep.path),
        "ADAGC_HOME": str(SCRIPT.parents[1]),
        "ADAGC_CLUSTER_OPTIONS": "--object-store 80000000",
        "GOMP_SPINCOUNT": "0",  # both nodes compute on the same cores
    }
    job = slurm.sbatch(SCRIPT, *words, *options, env=env, cwd=tmp_path)

    def begun() -> bool:
        return len(sweep.trials()) >= 2 and all(trial.epochs for trial in sweep.trials()[:2])

    try:
        wait_until(begun, "an epoch on both nodes", START_SECONDS)
    except TimeoutError as error:
        raise TimeoutError(f"{error}\n{slurm.log(job)}") from None
    slurm.run("scancel", "--signal=USR1", "--batch", str(job))  # what --signal=B:USR1@... sends before the time limit
    wait_until(lambda: "saving 2 trial(s)" in slurm.log(job), "the trials to be saved", START_SECONDS)
    assert slurm.wait(job, "COMPLETED", "FAILED", "CANCELLED", timeout=2 * START_SECONDS) == "COMPLETED", slurm.log(job)

    trials = sweep.trials()
    assert [trial.state for trial in trials] == ["finished"] * 3, slurm.log(job)
    assert [trial.errors for trial in trials] == [[]] * 3
    wait_until(lambda: not any(slurm.processes(node) for node in slurm.nodes), "all processes to end", 30)
    assert (sweep.path / "best.yaml").exists()
