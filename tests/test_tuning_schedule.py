"""Which trial is stopped and which is next, from a sweep's folder; and what a trial takes of a node."""

import json
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest

from sharding.progress import Progress
from tests.test_tuning_record import BASE, add, make_plan
from tuning.child import Order
from tuning.cores import CoreClaim
from tuning.drive import bundle, follow
from tuning.record import SweepFolder
from tuning.schedule import Numbers, make_scheduler
from tuning.space import Domain, Space, load_space
from tuning.tpe import propose

CPUS, GPUS = {"CPU": 16.0}, {"CPU": 64.0, "GPU": 4.0}


@pytest.fixture
def sweep(tmp_path: Path) -> SweepFolder:
    sweep = SweepFolder(tmp_path / "sweep")
    sweep.begin(make_plan())
    return sweep


@pytest.mark.parametrize(("value", "decision"), [(0.2, "STOP"), (0.6, "CONTINUE")])
def test_rungs_are_as_the_trials_that_are_over_have_left_them(sweep: SweepFolder, value: float, decision: str) -> None:
    add(sweep, 0, *[0.5] * 16, state="finished")
    add(sweep, 1, *[0.1] * 8, state="stopped").prune()
    add(sweep, 2, *[0.9] * 9, state="stopped")  # goes on, and tells itself
    asha = make_scheduler(sweep.plan, sweep)
    trial = SimpleNamespace(trial_id="new")
    asha.on_trial_add(None, trial)
    told = [asha.on_trial_result(None, trial, {"samples": 90 * n, "objective": value}) for n in range(1, 10)]
    assert told == ["CONTINUE"] * 7 + [decision, "CONTINUE"]


def test_begun_trials_go_first_and_new_ones_follow(sweep: SweepFolder) -> None:
    begun = [add(sweep, 2, 0.1, state="stopped")]
    numbers = Numbers(
        begun, lambda number: add(sweep, number), [3, 4], lambda trial: Order("sweep", trial.number, 16, 2, 2, "/")
    )
    found = [numbers.suggest("x") for _ in range(4)]
    assert [one["number"] for one in found[:3] if isinstance(one, dict)] == [2, 3, 4]
    assert found[3] == "FINISHED"


def test_a_trial_takes_a_core_for_each_rank_or_gpus_and_their_share_of_the_cores() -> None:
    assert bundle([CPUS], ranks=2, gpus=None, device="auto") == {"CPU": 2}
    assert bundle([GPUS], ranks=2, gpus=None, device="cpu") == {"CPU": 2}
    assert bundle([CPUS, GPUS], ranks=1, gpus=None, device="auto") == {"CPU": 16, "GPU": 1}
    assert bundle([GPUS], ranks=4, gpus=4, device="auto") == {"CPU": 64, "GPU": 4}
    with pytest.raises(ValueError, match="--ranks-per-trial 17: the largest node has 16 cores"):
        bundle([CPUS, {"CPU": 8.0}], ranks=17, gpus=None, device="auto")
    with pytest.raises(ValueError, match=r"a trial of 5 GPUs: the largest node has 4, .* ask for 4 or fewer"):
        bundle([CPUS, GPUS], ranks=5, gpus=5, device="auto")
    with pytest.raises(ValueError, match="--gpus-per-trial 1: no node has a GPU"):
        bundle([CPUS], ranks=1, gpus=1, device="auto")


def test_trials_at_the_same_time_do_not_share_cores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    one, other = CoreClaim(1), CoreClaim(1)
    assert len(one.cores) == len(other.cores) == 1
    assert one.cores != other.cores
    one.release()
    assert CoreClaim(1).cores == one.cores


def test_optuna_proposes_from_what_the_folder_tells(sweep: SweepFolder) -> None:
    space = load_space("adagc")
    sweep.begin(make_plan(space=space.tree, searcher="optuna"))
    for number in range(12):
        values = propose(sweep, space, number, lambda drawn: True)
        assert values == propose(sweep, space, number, lambda drawn: True)
        trial = sweep.add(number, values, BASE.config(values, sweep.trial_path(number)))
        value = 1 - abs(values["method.teacher_weight"] - 0.8)
        record = {"epoch": 0, "map/noisy_teacher": value, "data/rows": 90.0, "data/skipped_rows": 0.0}
        (trial.path / "metrics.jsonl").write_text(json.dumps(record) + "\n")
        if number == 5:
            trial.prune()
        elif number != 7:
            (trial.path / "status.json").write_text(json.dumps({"state": "finished"}))
    drawn = [trial.values["method.teacher_weight"] for trial in sweep.trials()]
    assert all(0 <= weight <= 1 for weight in drawn)
    proposals = [propose(sweep, space, number, lambda drawn: True) for number in range(20, 30)]
    near = sum(abs(one["method.teacher_weight"] - 0.8) < 0.3 for one in proposals)
    assert near >= 9  # 5 without the trials


def test_optuna_proposes_the_last_step(sweep: SweepFolder) -> None:
    space = Space("space.yaml", {"optim.lr": Domain("quniform", (0.0, 1.0, 0.3))})
    proposals = {propose(sweep, space, number, lambda drawn: True)["optim.lr"] for number in range(40)}
    assert sorted(proposals) == pytest.approx([0.0, 0.3, 0.6, 0.9])


def test_work_is_followed_to_its_end_or_until_it_is_to_stop() -> None:
    failed, stopped = Progress("x", 10, unit="patch"), Progress("x", 10, unit="patch")

    def fail() -> None:
        raise KeyError("gone")

    assert repr(follow(fail, lambda: False, progress=failed, done=lambda: 3)) == "KeyError('gone')"
    looks, release = list[int](), threading.Event()
    error = follow(
        release.wait, lambda: len(looks) == 2, progress=stopped, done=lambda: 4, look=lambda: looks.append(0)
    )
    release.set()
    assert (error, len(looks)) == (None, 2)


def test_a_run_that_has_finished_untold_is_told_and_not_trained_again(sweep: SweepFolder) -> None:
    trial = add(sweep, 0, *[0.5] * 16, state="finished")
    code = (
        "import sys; from tuning.child import Order, Trainer; trainer = Trainer(Order(sys.argv[1], 0, 16, 1, 0, '/'))\n"
        "epochs = []\n"
        "while not trainer.is_over: epochs.append(trainer.next_epoch()['epoch'])\n"
        "trainer.stop(); print(epochs)"
    )
    told = subprocess.run([sys.executable, "-c", code, sweep.path], check=True, capture_output=True, text=True).stdout
    assert json.loads(told) == [*range(16)]
    assert not (trial.path / "output.log").exists()
