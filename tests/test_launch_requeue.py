"""When a job goes back into the queue, and when it does not."""

import json
from pathlib import Path
from typing import Any

import pytest

from adagc_dist.reasons import StopReason
from launch.cluster.requeue import End, Limits, Start, StartLog, Verdict, decide

STOPPED = {"state": "stopped", "reason": "SIGUSR1"}
LOST = {"state": "failed", "cause": "lost", "reason": "a rank failed"}
ERROR = {"state": "failed", "cause": "error", "reason": "ValueError: a shard is damaged"}


def verdict(code: int, status: dict[str, Any], *, restarts: int = 0, idle: int = 0) -> Verdict:
    return decide(End(code, status), restarts=restarts, idle=idle, limits=Limits(restarts=5, idle=3))


@pytest.mark.parametrize("reason", [*(set(StopReason) - {StopReason.FILE, StopReason.EPOCHS})])
def test_what_slurm_or_a_clock_has_stopped_goes_on(reason: StopReason) -> None:
    found = verdict(75, {"state": "stopped", "reason": reason.value})
    assert found.requeue
    assert reason.value in found.why
    assert "restart 1 of at most 5" in found.why


@pytest.mark.parametrize(
    ("code", "status", "why"),
    [
        (0, {"state": "finished"}, "finished"),
        (75, {"state": "stopped", "reason": StopReason.FILE.value}, "submit it again"),
        (75, {"state": "stopped", "reason": StopReason.EPOCHS.value}, "submit it again"),
        (1, ERROR, "a shard is damaged"),
        (1, {}, "before it trained"),
    ],
)
def test_what_a_person_or_an_error_has_ended_stays_so(code: int, status: dict[str, Any], why: str) -> None:
    found = verdict(code, status)
    assert not found.requeue
    assert found.code == code
    assert why in found.why


def test_what_keeps_a_job_from_training_may_pass_if_it_has_trained_before() -> None:
    """Its settings were accepted then: a node that is not fit, a network that fails."""
    assert not verdict(1, {}, restarts=0).requeue
    found = verdict(1, {}, restarts=1, idle=1)
    assert found.requeue
    assert "failed before it could go on" in found.why
    assert not verdict(1, {}, restarts=1, idle=3).requeue
    assert not verdict(1, ERROR, restarts=1).requeue


@pytest.mark.parametrize("code", [0, 1])
def test_a_status_that_nobody_could_write_is_no_end(code: int) -> None:
    """A full disk, or a lock that a lost node still holds: the ranks are gone, and it says that they run."""
    for status in ({"state": "running"}, {} if code == 0 else {"state": "running", "step": 3}):
        assert verdict(code, status).requeue
        found = verdict(code, status, idle=3)
        assert not found.requeue
        assert found.code == (code or 75)


@pytest.mark.parametrize("end", [(75, STOPPED), (143, {}), (1, LOST)])
def test_ends_without_progress_are_borne_for_some_starts(end: tuple[int, dict[str, Any]]) -> None:
    assert verdict(*end, idle=2).requeue
    found = verdict(*end, idle=3)
    assert not found.requeue
    assert found.code == end[0]
    assert "no newer checkpoint in 3 starts" in found.why


@pytest.mark.parametrize("end", [(75, STOPPED), (1, LOST), (138, {})])
def test_restarts_are_limited(end: tuple[int, dict[str, Any]]) -> None:
    assert verdict(*end, restarts=4).requeue
    found = verdict(*end, restarts=5)
    assert not found.requeue
    assert "5 restarts are the limit" in found.why


def start(job: str, restart: int, found: list[int] | None) -> Start:
    return Start(job, restart, found, ("n1", "n2"), 0.0)


def test_starts_that_found_the_run_in_the_same_place_are_counted(tmp_path: Path) -> None:
    log = StartLog(tmp_path)
    assert log.idle("7", None) == 0
    log.begin(start("6", 0, [2, 0]))
    for restart, found in enumerate([None, [2, 0], [2, 0], [2, 0]]):
        log.begin(start("7", restart, found))
    assert log.idle("7", [2, 0]) == 3
    assert log.idle("7", [3, 0]) == 0
    assert log.idle("6", [2, 0]) == 1


def test_a_line_cut_by_a_kill_does_no_harm(tmp_path: Path) -> None:
    log = StartLog(tmp_path)
    log.begin(start("7", 0, [1, 0]))
    path = tmp_path / "logs" / "starts.jsonl"
    path.write_text(path.read_text() + '{"job": "7", "rest')
    assert log.idle("7", [1, 0]) == 1
    log.end(start("7", 0, [1, 0]), Verdict(False, 0, "finished"), [2, 0])
    log.begin(start("7", 1, [1, 0]))
    assert log.idle("7", [1, 0]) == 2
    assert json.loads(path.read_text().splitlines()[-1])["restart"] == 1
