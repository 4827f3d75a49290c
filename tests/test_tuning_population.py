"""Population based training from a sweep's folder: who takes over from whom, what changes, and what a kill leaves."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adagc_dist.config import CHANGEABLE
from launch.recipe import load_config
from sharding.rng import derive_rng
from tests.test_tuning_record import BASE, make_plan
from tuning.population import check_space, settle, turn
from tuning.record import Generation, SweepFolder, TrialFolder
from tuning.space import Domain, Space, load_space

SPACE = load_space("pbt")
EPOCH = 8


def decide(sweep: SweepFolder, epoch: int = EPOCH) -> Generation:
    """And bring the folders into line."""
    turn(sweep, SPACE, epoch)
    found = sweep.generations()[-1]
    assert found.epoch == epoch
    assert settle(sweep) == found.moves
    return found


def make(path: Path) -> SweepFolder:
    """Eight trials, the worse the higher their number; 7 has failed, so that two of seven give up."""
    sweep = SweepFolder(path)
    sweep.begin(make_plan(space=SPACE.tree, scheduler="pbt"))
    for number in range(8):
        values = SPACE.draw(BASE, sweep.trial_path(number), 0, "trial", number)
        trial = sweep.add(number, values, BASE.config(values, sweep.trial_path(number)))
        lines = [{"epoch": epoch, "map/noisy_teacher": 0.9 - 0.1 * number} for epoch in range(EPOCH)]
        (trial.path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        (trial.path / "status.json").write_text(json.dumps({"state": "stopped"}))
        (trial.path / "checkpoints").mkdir()
        (trial.path / "checkpoints" / "weights").write_text(str(number))
        (trial.path / "STOP").touch()
        (trial.path / ".lock").touch()
        (trial.path / "output.log").write_text(f"of {number}")
        for _ in range(2 if number == 7 else 1):
            trial.add_attempt(seconds=number, host="here", error="no memory" if number == 7 else None)
    return sweep


@pytest.fixture
def sweep(tmp_path: Path) -> SweepFolder:
    return make(tmp_path / "sweep")


def contents(sweep: SweepFolder) -> dict[str, str]:
    files = [path for path in sweep.path.rglob("*") if path.is_file()]
    return {str(path.relative_to(sweep.path)): path.read_text().replace(str(sweep.path), "") for path in files}


def test_the_worst_quarter_goes_on_from_the_best_with_other_values(sweep: SweepFolder) -> None:
    before = contents(sweep)
    found = decide(sweep)
    assert [move.number for move in found.moves] == [5, 6]
    assert {move.source for move in found.moves} <= {0, 1}
    for move in found.moves:
        trial, source = TrialFolder(sweep.trial_path(move.number)), TrialFolder(sweep.trial_path(move.source))
        assert trial.state == "unfinished"
        assert trial.has_come_to(EPOCH)
        assert not trial.has_come_to(EPOCH + 1)
        assert (trial.path / "checkpoints" / "weights").read_text() == str(move.source)
        assert (trial.path / "output.log").read_text() == f"of {move.number}"  # its own
        assert trial.seconds == move.number
        assert not (trial.path / "STOP").exists()
        assert move.values
        assert set(move.values) <= set(CHANGEABLE)
        assert trial.values == {**source.values, **move.values}
        assert trial.taken_over == [{"epoch": EPOCH, "source": move.source}]
        config = load_config(trial.path / "config.yaml")
        assert config.run.dir == str(trial.path)
        assert config.schedule.changes == {EPOCH: move.values}
        assert config.at(EPOCH - 1).method == source.config.method
        assert config.at(EPOCH).optim.lr == trial.values["optim.lr"]
    kept = {name: text for name, text in before.items() if name[:11] not in ("trials/0005", "trials/0006")}
    assert kept.items() <= contents(sweep).items()
    assert not list(sweep.path.glob(".taking-over*"))


def test_it_is_decided_once(sweep: SweepFolder, tmp_path: Path) -> None:
    assert decide(sweep) == decide(make(tmp_path / "again"))  # by the seed
    turn(sweep, SPACE, EPOCH)
    assert not settle(sweep)
    assert [one.epoch for one in sweep.generations()] == [EPOCH]


def test_a_later_generation_takes_over_what_was_changed_before(sweep: SweepFolder) -> None:
    """Trial 5 has become the best: whoever takes over from it has its history, and nothing is copied twice."""
    decide(sweep)
    for number in range(7):
        file = sweep.trial_path(number) / "metrics.jsonl"
        with file.open("a") as stream:
            stream.write(json.dumps({"epoch": EPOCH, "map/noisy_teacher": 0.99 if number in (5, 6) else 0.1}) + "\n")
    found = decide(sweep, EPOCH + 1)
    assert {move.source for move in found.moves} <= {5, 6}
    move = found.moves[0]
    trial, source = TrialFolder(sweep.trial_path(move.number)), TrialFolder(sweep.trial_path(move.source))
    assert trial.taken_over == [*source.taken_over, {"epoch": EPOCH + 1, "source": move.source}]
    assert trial.config.schedule.changes == source.config.schedule.changes | {EPOCH + 1: move.values}
    before = contents(sweep)
    assert not settle(sweep)
    assert contents(sweep) == before


def test_a_trial_that_somebody_removes_is_drawn_anew_and_takes_over_nothing(sweep: SweepFolder) -> None:
    """As the sweep advises where one has failed."""
    move = decide(sweep).moves[0]
    shutil.rmtree(sweep.trial_path(move.number))
    assert not settle(sweep)
    assert sweep.free_numbers(1) == [move.number]
    values = SPACE.draw(BASE, sweep.trial_path(move.number), 0, "trial", move.number)
    drawn = sweep.add(move.number, values, BASE.config(values, sweep.trial_path(move.number)))
    assert not settle(sweep)
    assert drawn.values == values


@pytest.mark.parametrize("calls", range(1, 9))
def test_a_kill_at_any_moment_is_made_up_for(
    sweep: SweepFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, calls: int
) -> None:
    """Killed before its n-th change of the folder; then another process goes on."""
    undisturbed = make(tmp_path / "undisturbed")
    decide(undisturbed)
    left = calls

    def killed(real: Any) -> Any:
        def call(*arguments: Any, **named: Any) -> Any:
            nonlocal left
            left -= 1
            if not left:
                raise KeyboardInterrupt
            return real(*arguments, **named)

        return call

    turn(sweep, SPACE, EPOCH)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "copytree", killed(shutil.copytree))
        patch.setattr(Path, "rename", killed(Path.rename))
        patch.setattr(shutil, "rmtree", killed(shutil.rmtree))
        with pytest.raises(KeyboardInterrupt):
            settle(sweep)
    assert left == 0
    settle(sweep)
    assert contents(sweep) == contents(undisturbed)
    assert not list(sweep.path.glob(".taking-over*"))


def test_a_population_of_two_learns_from_the_better_one(tmp_path: Path) -> None:
    sweep = make(tmp_path / "sweep")
    for number in range(2, 8):
        shutil.rmtree(sweep.trial_path(number))
    found = decide(sweep)
    assert [(move.number, move.source) for move in found.moves] == [(1, 0)]


def test_who_is_alone_goes_on(tmp_path: Path) -> None:
    sweep = make(tmp_path / "sweep")
    for number in range(1, 8):
        shutil.rmtree(sweep.trial_path(number))
    found = decide(sweep)
    assert not found.moves


def test_what_the_configuration_refuses_is_not_tried(sweep: SweepFolder) -> None:
    wide = Space("mine.yaml", {"method.teacher_weight": Domain("uniform", (0.0, 9.0))})  # it must lie in [0, 1]
    for trial in sweep.trials():
        TrialFolder.write(trial.path, trial.config, number=trial.number, values={"method.teacher_weight": 0.5})
    turn(sweep, wide, EPOCH)
    moves = sweep.generations()[-1].moves
    assert all(0 <= move.values["method.teacher_weight"] <= 1 for move in moves)


def test_a_space_must_have_what_can_change_in_mid_run_and_has_an_effect() -> None:
    config = BASE.config({}, Path("x"))
    check_space(SPACE, config)
    fixed = Space("mine.yaml", {"detector.patience": Domain("randint", (2, 5))})
    with pytest.raises(ValueError, match=r"--scheduler pbt .* mine\.yaml has none that can: add one of method\.gc_"):
        check_space(fixed, config)
    named = BASE.config({"method.teacher_momentum": 0.99}, Path("x"))
    with pytest.raises(ValueError, match=r"method\.teacher_lag has no effect beside method\.teacher_momentum"):
        check_space(SPACE, named)


@given(st.integers(0, 10**6))
def test_a_value_moves_within_its_domain(seed: int) -> None:
    for domain in [*SPACE.domains.values(), Domain("randint", (2, 5)), Domain("quniform", (0.0, 1.0, 0.3))]:
        rng = derive_rng(seed, "near")
        value = domain.draw(rng)
        moved = domain.near(value, rng)
        low, high = min(domain.ends), max(domain.ends)
        assert low <= moved <= high
        assert moved != value or value in (low, high, 0.9)
        if domain.kind == "quniform":
            assert moved / domain.arguments[2] == pytest.approx(round(moved / domain.arguments[2]))
        elif domain.kind == "choice":
            assert abs(domain.arguments.index(moved) - domain.arguments.index(value)) <= 1
