"""Tasks over processes, and the progress that is told of them."""

import io
import os
import time

import pytest

from sharding.pool import run_tasks
from sharding.progress import Progress


def square(number: int) -> int:
    return number * number


def refuse(number: int) -> int:
    if number == 3:
        raise ValueError("three is refused")
    time.sleep(0 if number < 3 else 60)
    return number


def vanish(number: int) -> int:
    os._exit(number)


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_every_task_once(workers: int) -> None:
    assert sorted(run_tasks(square, range(20), workers=workers)) == [number**2 for number in range(20)]


@pytest.mark.parametrize("workers", [0, 2])
def test_no_task(workers: int) -> None:
    assert not list(run_tasks(square, [], workers=workers))


def test_an_error_arrives_and_does_not_wait_for_the_others() -> None:
    start = time.monotonic()
    with pytest.raises(ValueError, match="three is refused"):
        list(run_tasks(refuse, [4, 3, 5, 6, 7], workers=2))
    assert time.monotonic() - start < 30


def test_leaving_early_ends_the_workers() -> None:
    start = time.monotonic()
    for _ in run_tasks(refuse, [1, 4, 5], workers=2):
        break
    assert time.monotonic() - start < 30


def test_a_worker_that_vanishes() -> None:
    with pytest.raises(RuntimeError, match="one of 2 worker processes died without a word"):
        list(run_tasks(vanish, [1, 2], workers=2))


def test_poll_is_called_while_waiting() -> None:
    calls = []
    list(run_tasks(time.sleep, [1.2], workers=1, poll=lambda: calls.append(time.monotonic())))
    assert len(calls) >= 2


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_bar_on_a_terminal() -> None:
    stream = Terminal()
    with Progress("sharding", 10, unit="patches", stream=stream) as progress:
        progress.resume(2)
        progress.at(7)
        progress.at(5)  # an estimate that was too high is not taken back
        progress.at(99)
    last = stream.getvalue().split("\r")[-1]
    assert "sharding: 100%" in last
    assert "10/10" in last
    assert "patches/s" in last


def test_lines_in_a_log() -> None:
    stream = io.StringIO()
    with Progress("sharding", 10, unit="patches", stream=stream, seconds=0.0) as progress:
        progress.at(4)
        progress.at(4)
        progress.at(10)
    lines = stream.getvalue().splitlines()
    assert [line.split(",")[0] for line in lines] == [f"sharding: {n}/10 patches" for n in (4, 10, 10)]


def test_few_lines_in_a_log() -> None:
    stream = io.StringIO()
    with Progress("sharding", 10, unit="patches", stream=stream) as progress:
        for done in range(11):
            progress.at(done)
    assert stream.getvalue().count("\n") == 1


def test_rate_leaves_out_what_was_there_before() -> None:
    with Progress("sharding", 1000, unit="patches", stream=io.StringIO()) as progress:
        progress.resume(990)
        time.sleep(0.05)
        progress.at(1000)
        assert 0 < progress.rate <= 10 / 0.05
