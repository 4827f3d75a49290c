"""The process over the ranks: what it makes of signals, what it tells the shell, what it leaves behind: no process."""

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

import launch.supervise
import launch.train
from adagc_dist.tracking import write_json
from launch.stop import STOP_FILE
from launch.supervise import EXIT_STOPPED, supervise
from tests.processes import kill, with_environment
from tests.ranks import Ranks
from tests.test_launch_stop import LOADED, Run, at_step, do_nothing, hang, in_a_rank, note_workers, wait_until
from tests.test_training import status_of

# The supervisor alone: ranks() is a function


def status(run: Path, state: str) -> None:
    run.mkdir(exist_ok=True)
    write_json(run / "status.json", {"state": state})


def tell(number: int = signal.SIGTERM) -> None:
    os.kill(os.getpid(), number)


def saves_and_stops(run: Path) -> int:
    status(run, "running")
    tell()
    assert (run / STOP_FILE).exists()
    tell()  # an echo
    status(run, "stopped")
    return 0


def saves_though_told_at_the_end_only(run: Path) -> int:
    """STOP comes when rank 0 has removed it already: a later run must not find it."""
    status(run, "stopped")
    (run / "status.json").write_text('{"state": "running"}')
    tell(signal.SIGUSR1)
    status(run, "stopped")
    return 0


def finishes_all_the_same(run: Path) -> int:
    status(run, "running")
    tell(signal.SIGINT)
    status(run, "finished")
    return 0


def has_not_begun(run: Path) -> int:
    tell(signal.SIGINT)
    raise AssertionError("not reached")


def has_not_begun_to_continue(run: Path) -> int:
    status(run, "stopped")
    return has_not_begun(run)


def cannot_be_told(run: Path) -> int:
    """The launcher ends the ranks: they hear the signal, and stop."""
    status(run, "running")
    (run / STOP_FILE / "in the way").mkdir(parents=True)
    try:
        return has_not_begun(run)
    finally:
        shutil.rmtree(run / STOP_FILE)
        status(run, "stopped")


def fails_to_continue(run: Path) -> int:
    status(run, "stopped")
    return 1


def hangs(run: Path) -> int:
    launch.supervise.ECHO_SECONDS = 0.2  # type: ignore[attr-defined]  # here only: elsewhere an echo must be one, if late
    status(run, "running")
    tell()
    time.sleep(0.3)
    try:
        tell(signal.SIGUSR1)
    finally:  # as the launcher ends the ranks; nothing disturbs it there
        time.sleep(0.3)
        tell()
        (run / "ended").touch()
    raise AssertionError("not reached")


@pytest.mark.parametrize(
    ("ranks", "code"),
    [
        (saves_and_stops, EXIT_STOPPED),
        (saves_though_told_at_the_end_only, EXIT_STOPPED),
        (finishes_all_the_same, 0),
        (has_not_begun, 128 + signal.SIGINT),
        (has_not_begun_to_continue, EXIT_STOPPED),
        (cannot_be_told, EXIT_STOPPED),
        (fails_to_continue, 1),
        (hangs, 128 + signal.SIGUSR1),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_a_supervised_run_that(ranks: Callable[[Path], int], code: int, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert Ranks(1, supervised, run, ranks, timeout=20.0).join() == [code]
    assert run.exists() == (ranks is not has_not_begun)
    assert not (run / STOP_FILE).exists()
    assert (run / "ended").exists() == (ranks is hangs)


def supervised(run: Path, ranks: Callable[[Path], int]) -> int:
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
    before = [signal.getsignal(number) for number in numbers]
    code = supervise(run, lambda: ranks(run))
    assert [signal.getsignal(number) for number in numbers] == before
    return code


def test_in_another_thread_signals_are_somebody_elses(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGUSR1)
    codes: list[Any] = []

    def ranks() -> int:
        codes.append(signal.getsignal(signal.SIGUSR1))
        return 1

    thread = threading.Thread(target=lambda: codes.append(supervise(tmp_path, ranks)))
    thread.start()
    thread.join()
    assert codes == [before, 1]


# The command itself: launcher, ranks, reading processes


def die(trainer: Any, run: Path) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


HOOKS = {
    "slow": [partial(at_step, 0, 0, do_nothing), note_workers],
    "hang": [partial(at_step, 3, 1, hang), note_workers],
    "die": [partial(at_step, 3, 1, die), note_workers],
}
COMMAND = """
import sys, launch.spawn, launch.train
run_ranks = launch.spawn.run_ranks
launch.spawn.run_ranks = lambda module, *args, **options: run_ranks("tests.test_launch_supervise", *args, **options)
sys.exit(launch.train.main(sys.argv[1:]))
"""


class Command:
    """`adagc train ... --nproc-per-node 2`, its ranks changed by hooks."""

    def __init__(self, run: Run, hooks: str) -> None:
        self.mark = f"RUN_OF_TEST={run.path}"
        self.output = run.path.parent / "output"
        with self.output.open("w") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-c", COMMAND, *run.arguments, "--nproc-per-node", "2"],
                cwd=Path(__file__).parents[1],
                env=os.environ | {"HOOKS_OF_TEST": hooks, "RUN_OF_TEST": str(run.path)},
                stdout=output,
                stderr=subprocess.STDOUT,
            )

    def tell(self, number: int) -> None:
        self.process.send_signal(number)

    def code(self, seconds: float) -> int:
        return self.process.wait(seconds)

    def left(self) -> list[int]:
        """The processes of this command that are still there, however they are related to it."""
        return with_environment(self.mark)

    def end(self) -> None:
        kill(*self.left())
        self.process.wait()


@pytest.fixture
def run(tiny_shards: Path, tmp_path: Path) -> Run:
    return Run(tiny_shards, tmp_path / "run", ["data.workers=1"])


@pytest.fixture
def start(run: Run, request: pytest.FixtureRequest) -> Callable[[str], Command]:
    def started(hooks: str) -> Command:
        command = Command(run, hooks)
        request.addfinalizer(command.end)
        return command

    return started


def test_a_signal_to_the_launcher_stops_the_run_which_goes_on(run: Run, start: Callable[[str], Command]) -> None:
    command = start("slow")
    run.wait_for("status.json", 60)
    asked = time.monotonic()
    command.tell(signal.SIGUSR1)
    code = command.code(2 + 2 * LOADED)
    print(f"launcher: {time.monotonic() - asked:.2f} s from SIGUSR1 to its exit")
    output = command.output.read_text()
    assert code == EXIT_STOPPED, output
    wait_until(lambda: command.left() == [], 5)
    reason, _, step = run.stopped()
    assert reason == "SIGUSR1"
    assert step < 12
    assert output.count("SIGUSR1: saving and stopping. Once more ends it at once") == 1
    run.finish()


def test_a_run_that_hangs_ends_with_its_launcher(run: Run, start: Callable[[str], Command]) -> None:
    run.settings = ["run.stop_seconds=1.5", "data.workers=1"]
    command = start("hang")
    wait_until((run.path.parent / "asked").exists, 60)
    command.tell(signal.SIGTERM)
    assert command.code(0.5 + 1.5 + 2 * LOADED) == 1
    wait_until(lambda: command.left() == [], 5)
    assert status_of(run.path)["state"] == "failed"
    assert not (run.path / STOP_FILE).exists()
    output = command.output.read_text()
    assert "the stop (SIGTERM) did not come to an end within 1.5 s: ending now" in output
    assert "in hang" in output


def test_a_second_signal_to_the_launcher_ends_a_run_that_hangs(run: Run, start: Callable[[str], Command]) -> None:
    command = start("hang")
    wait_until((run.path.parent / "asked").exists, 60)
    command.tell(signal.SIGINT)
    time.sleep(3.0)
    assert command.process.poll() is None
    command.tell(signal.SIGINT)
    assert command.code(2 * LOADED) == 128 + signal.SIGINT
    wait_until(lambda: command.left() == [], 5)
    assert status_of(run.path)["state"] == "failed"
    output = command.output.read_text()
    assert output.count("asked to stop a second time (SIGTERM): ending now") == 2
    assert "in hang" in output


def test_ranks_whose_launcher_was_killed_save_and_end(run: Run, start: Callable[[str], Command]) -> None:
    run.settings = [*run.settings, "optim.epochs=100"]  # it must not come to its end before the launcher does
    command = start("slow")
    wait_until(lambda: any(run.path.glob("checkpoints/*/COMPLETE.json")), 60)
    command.tell(signal.SIGKILL)
    wait_until(lambda: command.left() == [], 0.5 + 2 + 2 * LOADED)
    assert run.stopped()[0] == "the launcher has gone"


def test_a_rank_that_was_killed_is_told_with_the_remedy(run: Run, start: Callable[[str], Command]) -> None:
    command = start("die")
    assert command.code(60) == 1
    assert command.output.read_text().splitlines()[-1] == (
        "rank 1 was killed by SIGKILL, from outside or for using too much memory: start the same command again to go on"
    )
    assert status_of(run.path)["state"] == "failed"
    wait_until(lambda: command.left() == [], 5)


if __name__ == "__main__":  # a rank of Command
    code, told = in_a_rank(sys.argv[1:], Path(os.environ["RUN_OF_TEST"]), HOOKS[os.environ["HOOKS_OF_TEST"]])
    print(told, file=sys.stderr)
    sys.exit(code)
