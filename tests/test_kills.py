"""A run that is killed at four of the moments of ``tests.kills``, the command that tries them all on a longer
evening.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import pytest

from adagc_dist.checkpoint import Position
from tests.kills import __main__ as command
from tests.kills.moments import AT_START, CLOCK, MOMENTS, Kill, draw_kills
from tests.kills.runs import SHAPE, Death, KilledRuns, Outcome, differences, outcome_of

SURVIVORS_SECONDS = 20.0  # measured: 0.2 s, or 5.2 s where rank 0 waits for a rank that knows more; on a busy machine
KILLS = [
    Kill("warm-up, before the update", Position(1, 5), rank=1, everyone=False),
    Kill("rewind, half loaded", Position(3), rank=0, everyone=True),
    Kill("save, before COMPLETE.json", Position(3, 3), rank=0, everyone=False),
    Kill("validating", Position(4, 8), rank=0, everyone=True),
]


def test_a_run_that_is_killed_again_and_again_is_the_undisturbed_one(tiny_shards: Path, tmp_path: Path) -> None:
    runs = KilledRuns(tiny_shards, tmp_path, ranks=2)
    expected = outcome_of(runs.undisturbed())
    deaths: list[Death] = []
    outcome = outcome_of(runs.killed("killed", KILLS, deaths.append))
    assert differences(outcome, expected) == []
    assert (outcome.changed, outcome.rewritten > 0) == (0, True)
    assert [death.kill for death in deaths] == KILLS
    assert [death.resumed_from for death in deaths[1:3]] == [Position(2, 5), Position(3)]
    assert deaths[0].resumed_from in (Position(1, 1), Position(1, 4))  # the last save may have been under way
    assert deaths[3].resumed_from in (Position(4, 4), Position(4, 7))
    assert not any(death.hung for death in deaths)
    assert max(death.survivors or 0.0 for death in deaths) < SURVIVORS_SECONDS


def test_the_seed_draws_the_kills_and_every_moment_has_its_turn() -> None:
    number = len(MOMENTS) + 2
    kills = draw_kills(number, SHAPE, Random(5))
    assert {kill.moment for kill in kills} == {*MOMENTS, CLOCK, AT_START}
    assert kills == draw_kills(number, SHAPE, Random(5)) != draw_kills(number, SHAPE, Random(6))
    assert {kill.rank for kill in draw_kills(100, replace(SHAPE, ranks=3), Random(0))} == {0, 1, 2}


OUTCOME = Outcome(
    tensors={"student": {"weight": b"\0\0\0\0", "bias": b"\1"}},
    state={"moment": {"step": 3}, "detector": {"best_epoch": 1}},
    lines=[{"epoch": 0, "loss/bce": 0.25}],
    curves={"loss/bce": [(3, 0.5), (6, 0.25)]},
    repeated=0,
    rewritten=4,
    changed=0,
)


def test_the_same_outcome_has_no_differences() -> None:
    assert differences(OUTCOME, OUTCOME) == []


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"tensors": {"student": {"weight": b"\0\0\0\1", "bias": b"\1"}}}, "student: 1 of 2 tensors differ, weight"),
        ({"tensors": {}}, "student: 2 of 2 tensors differ, bias first"),
        ({"state": {"moment": {"step": 4}, "detector": {"best_epoch": 1}}}, "moment of state.json differs"),
        ({"lines": []}, "metrics.jsonl differs: 0 entries instead of 1"),
        ({"curves": {"loss/bce": [(3, 0.5), (6, 0.125)]}}, "curve loss/bce differs: (6, 0.125) instead of (6, 0.25)"),
        ({"curves": {**OUTCOME.curves, "more": [(1, 0.0)]}}, "curve more differs: 1 entries instead of 0"),
        ({"repeated": 2}, "TensorBoard shows 2 points twice"),
    ],
)  # fmt: skip
def test_a_difference_is_told(change: dict[str, Any], told: str) -> None:
    (found,) = differences(replace(OUTCOME, **change), OUTCOME)
    assert told in found


def test_the_command_teaches(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        command.main(["--help"])
    assert ended.value.code == 0
    assert "python -m tests.kills --kills 4 --seed 7" in capsys.readouterr().out


def test_the_command_fails_on_a_difference(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    outcomes = iter([OUTCOME, replace(OUTCOME, changed=1, lines=[])])
    monkeypatch.setattr(command, "write_tiny", lambda folder: None)
    monkeypatch.setattr(command, "outcome_of", lambda run: next(outcomes))
    monkeypatch.setattr(command, "KilledRuns", _NoRuns)
    assert command.main(["--kills", "1", "--json", str(tmp_path / "kills.json")]) == 1
    told = capsys.readouterr().out
    assert "\nkilled-0: metrics.jsonl differs: 0 entries instead of 1\n" in told
    assert "\n1 curve points were written again with another value\n" in told
    assert '"survivors_ended_after_s": 0.5' in (tmp_path / "kills.json").read_text()


class _NoRuns(KilledRuns):
    """Every kill is done, and nothing runs."""

    def undisturbed(self) -> Path:
        return Path("undisturbed")

    def killed(self, name: str, kills: Any, told: Callable[[Death], None] = lambda death: None) -> Path:
        for kill in list(kills):
            told(Death(kill, None, Position(1), 0.5))
        return Path(name)
