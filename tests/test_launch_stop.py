"""A run that is asked to stop: whoever is asked, by whatever, whatever the ranks are doing, all of them save the same
step and end well; the same command goes on as if nothing had been. What does not end by itself ends by force.
"""

import multiprocessing
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from multiprocessing import connection
from pathlib import Path
from typing import Any

import pytest

import launch.build
import launch.stop
import launch.train
from adagc_dist.checkpoint import CheckpointStore
from adagc_dist.config import Config
from adagc_dist.predict import SplitScorer
from adagc_dist.reasons import StopReason
from adagc_dist.store import RowStore
from adagc_dist.trainer import Trainer
from launch.stop import STOP_FILE, StopWatcher
from launch.world import World
from sharding.reader import PatchReader
from sharding.workers import WorkerPool
from tests.ranks import RankError, Ranks
from tests.test_training import assert_as, command_line, newest, prepare_rank, same_bits, status_of, teacher_of
from tests.tiny import tiny_settings

EPOCHS = 3
STEPS = 8  # of an epoch
SETTINGS = [f"optim.epochs={EPOCHS}", "detector.rule=fixed", "detector.min_epochs=1"]  # both phases
STEP_SECONDS = 0.1
LOADED = 6.0  # seconds beyond what a test waits for itself: a machine may have other things to do

Hook = Callable[[Path], object]


# What happens in the ranks


def in_a_rank(arguments: Sequence[str], run: Path, hooks: Sequence[Hook]) -> tuple[int, str]:
    """`adagc train ...`, changed by ``hooks``: the exit code, and what it said."""
    prepare_rank()
    for hook in hooks:
        hook(run)
    return command_line(arguments)


def ask_by_signal(number: int, trainer: Trainer, run: Path) -> None:
    os.kill(os.getpid(), number)


def ask_by_file(trainer: Trainer, run: Path) -> None:
    (run / STOP_FILE).touch()


def lose_the_launcher(trainer: Trainer, run: Path) -> None:
    os.getppid = lambda: 1


def hang(trainer: Trainer, run: Path) -> None:
    while True:
        time.sleep(60)


def at_step(step: int, rank: int, action: Callable[[Trainer, Path], object], run: Path) -> None:
    """Steps take STEP_SECONDS, and before this one this rank does something. ``asked`` notes when."""
    train_step = Trainer._train_step

    def slowly(self: Trainer, *args: Any) -> None:
        if (self.moment.step, self.comm.rank) == (step, rank):
            note(run, "asked")
            action(self, run)
        time.sleep(STEP_SECONDS)
        train_step(self, *args)

    Trainer._train_step = slowly  # type: ignore[method-assign, assignment]


def in_validation(rank: int, run: Path) -> None:
    """A block takes STEP_SECONDS; before its third this rank gets a SIGTERM."""
    score, blocks = SplitScorer._score_block, 0

    def slowly(self: SplitScorer, *args: Any) -> Any:
        nonlocal blocks
        blocks += 1
        if (self._comm.rank, blocks) == (rank, 3):
            note(run, "asked")
            os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(STEP_SECONDS)
        return score(self, *args)

    SplitScorer._score_block = slowly  # type: ignore[method-assign, assignment]


def in_sync(rank: int, run: Path) -> None:
    """The rows' way home after the first epoch takes this rank a second, and at its beginning it gets a SIGTERM."""
    sync = RowStore.sync

    def slowly(self: RowStore, *args: Any) -> Any:
        if self._comm.rank == rank:
            note(run, "asked")
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(1.0)
        return sync(self, *args)

    RowStore.sync = slowly  # type: ignore[method-assign, assignment]


def while_it_builds(action: Callable[[Any, Path], object], rank: int, run: Path) -> None:
    build = launch.build.build_trainer

    def built(config: Config, **parts: Any) -> Trainer:
        if parts["comm"].rank == rank:
            action(None, run)
        return build(config, **parts)

    launch.build.build_trainer = built


def slow_data(seconds: float, reads: int, run: Path) -> None:
    """From its so-manieth read on, each worker sleeps for every one."""
    read, done = PatchReader.read, 0

    def slowly(self: PatchReader, *args: Any, **kwargs: Any) -> Any:
        nonlocal done
        done += 1
        if done > reads:
            (run / "waiting").touch()
            time.sleep(seconds)
        return read(self, *args, **kwargs)

    PatchReader.read = slowly  # type: ignore[method-assign]


def slow_saves(run: Path) -> None:
    """A save goes on until there is a file ``go``."""
    wait = CheckpointStore.wait

    def slowly(self: CheckpointStore, **options: Any) -> None:
        note(run, "saving")
        wait_until((run.parent / "go").exists, 30)
        wait(self, **options)

    CheckpointStore.wait = slowly  # type: ignore[method-assign]


def note_workers(run: Path) -> None:
    """``workers`` has the process ids of all loader workers."""
    begin = WorkerPool.__init__

    def noted(self: WorkerPool, *args: Any) -> None:
        begin(self, *args)
        with (run.parent / "workers").open("a") as stream:
            stream.write("".join(f"{process.pid}\n" for process in self._processes))

    WorkerPool.__init__ = noted  # type: ignore[method-assign, assignment]


def note_saves(run: Path) -> None:
    """``saves-RANK`` has the positions of all saves."""
    save = Trainer._save

    def noted(self: Trainer) -> None:
        with (run.parent / f"saves-{self.comm.rank}").open("a") as stream:
            stream.write(f"{self.moment.position}\n")
        save(self)

    Trainer._save = noted  # type: ignore[method-assign]


def clocks(run: Path, **changed: float) -> None:
    """Other times than a configuration has; the clocks of the ranks' watchers differ by a moment."""
    watcher = launch.train._watcher

    def made(config: Config, world: World) -> StopWatcher:
        time.sleep(0.07 * world.rank)
        made = watcher(config, world)
        for name, value in changed.items():
            setattr(made, name, value)
        return made

    launch.train._watcher = made


def saves_every(seconds: float, run: Path) -> None:
    clocks(run, _save_seconds=seconds)


def note(run: Path, name: str) -> None:
    (run.parent / name).write_text(str(time.time()))


# What a test sees of them


@dataclass
class Run:
    """A run on two ranks that a test looks at from outside."""

    shards: Path
    path: Path
    settings: Sequence[str] = ()

    @property
    def arguments(self) -> list[str]:
        return ["demo", *tiny_settings(self.shards, self.path, *SETTINGS, *self.settings)]

    def start(self, *hooks: Hook, ranks: int = 2, timeout: float = 60.0) -> Ranks:
        return Ranks(ranks, in_a_rank, self.arguments, self.path, hooks, timeout=timeout)

    def finish(self, *hooks: Hook) -> None:
        assert [code for code, _ in self.start(*hooks).join()] == [0, 0]
        assert status_of(self.path)["state"] == "finished"

    def stop(self, *hooks: Hook, ranks: int = 2) -> float:
        """Run until it stops; the seconds since it was asked, if that was noted."""
        started = self.start(*hooks, ranks=ranks)
        assert [code for code, _ in started.join()] == [0] * ranks
        assert [process.exitcode for process in started.processes] == [0] * ranks
        return self.since("asked")

    def since(self, name: str) -> float:
        noted = self.path.parent / name
        return time.time() - float(noted.read_text()) if noted.exists() else 0.0

    def wait_for(self, name: str, seconds: float = 40.0) -> None:
        wait_until((self.path / name).exists, seconds)

    def stopped(self) -> tuple[str, int, int]:
        """Reason, epoch and step, of a run that stopped as it should."""
        status = status_of(self.path)
        assert status.keys() == {"state", "reason", "epoch", "step"}
        assert status["state"] == "stopped"
        assert not (self.path / STOP_FILE).exists()
        assert not (self.path / "teacher.safetensors").exists()
        latest = newest(self.path)
        latest.verify()
        moment = latest.state()["moment"]
        assert (moment["epoch"], moment["step"]) == (status["epoch"], status["step"])
        assert latest.position.epoch * STEPS + latest.position.step == status["step"]
        assert self.left() == []
        return status["reason"], status["epoch"], status["step"]

    def left(self) -> list[int]:
        """Loader workers that are still there."""
        noted = self.path.parent / "workers"
        return [pid for pid in map(int, noted.read_text().split()) if lives(pid)] if noted.exists() else []


def lives(pid: int) -> bool:
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2]
    except OSError:
        return False


def wait_until(condition: Callable[[], bool], seconds: float) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)


def exit_codes(ranks: Ranks, seconds: float) -> tuple[list[int | None], str]:
    """Of ranks that are to end by themselves, and what they said."""
    end = time.monotonic() + seconds
    for process in ranks.processes:
        connection.wait([process.sentinel], max(0.0, end - time.monotonic()))
    codes = [process.exitcode for process in ranks.processes]
    with pytest.raises(RankError) as told:
        ranks.join()
    return codes, str(told.value)


@pytest.fixture(scope="module")
def whole(tiny_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that nobody disturbed."""
    run = Run(tiny_shards, tmp_path_factory.mktemp("whole") / "run")
    run.finish()
    return run.path


@pytest.fixture
def run(tiny_shards: Path, tmp_path: Path) -> Run:
    return Run(tiny_shards, tmp_path / "run")


# One rank of two is asked


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_signal_to_one_rank_stops_both_and_they_go_on(run: Run, whole: Path, number: signal.Signals) -> None:
    """In the warm-up, after the trigger, and with reading processes, which get the signal too, as from a terminal."""
    workers = {signal.SIGTERM: ["data.workers=1", "data.reader=webdataset"], signal.SIGINT: ["data.workers=1"]}
    run.settings = workers.get(number, [])
    step = {signal.SIGTERM: 3, signal.SIGUSR1: 10, signal.SIGINT: 12}[number]
    seconds = run.stop(partial(at_step, step, 1, partial(until_heard, partial(ask_and_tell_workers, number))))
    reason, epoch, stopped_at = run.stopped()
    print(f"training: {seconds:.2f} s from {number.name} to the exit of both ranks")
    assert (reason, epoch) == (number.name, step // STEPS)
    assert step < stopped_at <= step + 3
    assert seconds < STEP_SECONDS + 2 + LOADED
    if number is signal.SIGUSR1:
        run.finish()
        assert_as(whole, run.path)


def until_heard(action: Callable[[Trainer, Path], object], trainer: Trainer, run: Path) -> None:
    """``action``, and no next step before it has asked for a stop: later the run might be in validation."""
    action(trainer, run)
    wait_until(lambda: trainer.agreement.requests.stop is not None, 10)


def ask_and_tell_workers(number: int, trainer: Trainer, run: Path) -> None:
    """From another process: a reading process obeys its own."""
    workers = [str(process.pid) for process in multiprocessing.active_children()]
    (run.parent / "workers").write_text(" ".join(workers))
    subprocess.run(["kill", f"-{number}", *workers, str(os.getpid())], check=True)


@pytest.mark.parametrize(
    ("action", "reason"), [(ask_by_file, StopReason.FILE), (lose_the_launcher, StopReason.ORPHANED)]
)
def test_what_one_rank_finds_stops_both(run: Run, action: Any, reason: StopReason) -> None:
    seconds = run.stop(partial(at_step, 9, 1, partial(until_heard, action)))
    told, epoch, step = run.stopped()
    assert (told, epoch) == (reason.value, step // STEPS)
    assert step > 9
    assert seconds < 0.5 + STEP_SECONDS + 2 + LOADED


def test_a_budget_of_minutes_stops_the_run(run: Run) -> None:
    run.settings = ["run.max_minutes=0.02"]
    run.stop(partial(at_step, 1, 1, hang_a_second))
    assert run.stopped()[0] == "run.max_minutes is spent"


def hang_a_second(trainer: Trainer, run: Path) -> None:
    time.sleep(1.0)


def test_a_rank_that_fails_while_streams_are_read_ends(run: Run) -> None:
    """Its exit waits for the reading process, which hears no SIGTERM but the rank's own."""
    run.settings = ["data.workers=1", "data.reader=webdataset"]
    codes, told = exit_codes(run.start(partial(at_step, 3, 1, fail), timeout=60.0), 50.0)
    assert codes[1] == 1
    assert "a bug" in told
    assert run.since("asked") < 20


def fail(trainer: Trainer, run: Path) -> None:
    raise AssertionError("a bug")


# Whatever the ranks are doing


def test_a_stop_is_seen_in_validation_and_the_run_goes_on_there(run: Run, whole: Path) -> None:
    """Of 20 blocks a rank, at 0.1 s each, a few are scored; the validation is done anew, with the same result. A STOP
    of an hour ago does not stop it again.
    """
    run.settings = ["run.eval_block=1"]
    seconds = run.stop(partial(in_validation, 1))
    print(f"validation: {seconds:.2f} s from SIGTERM to the exit of both ranks")
    assert run.stopped() == ("SIGTERM", 0, STEPS)
    assert not (run.path / "metrics.jsonl").exists()
    assert seconds < STEP_SECONDS + 2 + LOADED
    stale = run.path / STOP_FILE
    stale.touch()
    os.utime(stale, (time.time() - 3600,) * 2)
    run.finish()
    assert f"{stale} was there before this run began: removed" in (run.path / "log.txt").read_text()
    assert not stale.exists()
    assert same_bits(teacher_of(run.path), teacher_of(whole))


def test_a_stop_is_seen_after_the_rows_moved(run: Run) -> None:
    seconds = run.stop(partial(in_sync, 1))
    assert run.stopped() == ("SIGTERM", 1, STEPS + 1)
    assert seconds < 1.0 + 2 + LOADED


def test_a_stop_is_seen_when_the_data_for_which_a_rank_waits_have_come(run: Run) -> None:
    """Reading takes three seconds; those that are read ahead are not waited for, and their processes are gone."""
    run.settings = ["data.workers=1"]
    ranks = run.start(partial(slow_data, 3.0, 4), note_workers)
    run.wait_for("waiting")
    time.sleep(1.0)
    os.kill(ranks.processes[1].pid or 0, signal.SIGUSR1)
    start = time.monotonic()
    assert [code for code, _ in ranks.join()] == [0, 0]
    assert time.monotonic() - start < 3.0 + 2 + LOADED
    reason, epoch, step = run.stopped()
    assert (reason, epoch) == ("SIGUSR1", 0)
    assert step in (4, 5)


def test_a_request_during_the_build_stops_at_the_first_step(run: Run) -> None:
    run.stop(partial(while_it_builds, partial(ask_by_signal, signal.SIGTERM), 1))
    assert run.stopped() == ("SIGTERM", 0, 1)
    run.stop(partial(while_it_builds, ask_by_file, 0))  # a STOP of this start, not of an earlier one
    assert run.stopped() == ("the file STOP in the run's folder", 0, 2)


def test_a_signal_before_anything_is_done_ends_it_and_leaves_nothing(run: Run) -> None:
    command = [sys.executable, "-m", "launch.cli", "train", *run.arguments]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    time.sleep(0.3)
    process.terminate()
    assert process.communicate(timeout=20)[0] == b""
    assert process.returncode == -signal.SIGTERM
    assert not run.path.exists()


def test_without_its_launcher_a_run_saves_even_what_would_be_its_first_checkpoint(run: Run) -> None:
    """The launcher holds the store at which ranks meet when they open a channel."""
    ranks = run.start(partial(at_step, 3, 1, wait_until_the_store_has_gone))
    wait_until((run.path.parent / "asked").exists, 40)
    del ranks._store
    (run.path.parent / "gone").touch()
    ended = ranks.join()
    assert [code for code, _ in ended] == [0, 0], ended
    assert run.stopped()[0] == "the launcher has gone"


def wait_until_the_store_has_gone(trainer: Trainer, run: Path) -> None:
    wait_until((run.parent / "gone").exists, 20)
    os.getppid = lambda: 1


def test_alone_a_run_says_so_by_its_exit_code(run: Run) -> None:
    """Without torchrun, to which any other code than 0 is a failure of all ranks."""
    ask = partial(at_step, 3, 0, partial(ask_by_signal, signal.SIGINT))
    ((code, said),) = Ranks(1, alone, run.arguments, run.path, [ask]).join()
    assert code == launch.train.EXIT_STOPPED == 75, said
    assert "SIGINT: saving and stopping. Once more ends it at once" in said
    assert run.stopped()[0] == "SIGINT"


def alone(arguments: Sequence[str], run: Path, hooks: Sequence[Hook]) -> tuple[int, str]:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        del os.environ[name]
    code, _ = in_a_rank(arguments, run, hooks)
    os.kill(os.getpid(), signal.SIGTERM)  # an echo, while the process is on its way out
    return code, Path("/proc/self/fd/2").resolve().read_text()


# What does not end by itself


def test_a_second_signal_ends_a_run_that_hangs_and_says_where(run: Run) -> None:
    ranks = run.start(partial(at_step, 3, 1, hang))
    wait_until((run.path.parent / "asked").exists, 40)
    for wait in (0.3, 0.3, 2.9):  # the second and the third are echoes of the first, which may be heard late
        for process in ranks.processes:
            os.kill(process.pid or 0, signal.SIGTERM)
        time.sleep(wait)
        assert all(process.is_alive() for process in ranks.processes)
    for process in ranks.processes:
        os.kill(process.pid or 0, signal.SIGUSR1)
    codes, told = exit_codes(ranks, LOADED)
    assert codes == [1, 1]
    assert told.count("adagc train: asked to stop a second time (SIGUSR1): ending now, the newest complete") == 2
    assert re.search(r"test_launch_stop\.py\", line \d+ in hang", told)
    assert re.search(r"agreement\.py\", line \d+ in answer|collectives\.py\"|distributed_c10d\.py\"|graph\.py\"", told)
    assert not run.path.joinpath("checkpoints").exists()


def test_an_echo_does_not_disturb_a_slow_save(run: Run) -> None:
    """A launcher passes a signal on that a batch system has sent to every process already; and the second signal of a
    clock's stop is the first that anybody sent.
    """
    run.settings = ["run.max_minutes=0.02"]
    ranks = run.start(partial(at_step, 1, 1, hang_a_second), slow_saves)
    wait_until((run.path.parent / "saving").exists, 40)
    for wait in (2.2, 0.3, 0.0):
        time.sleep(wait)
        for process in ranks.processes:
            os.kill(process.pid or 0, signal.SIGTERM)
    (run.path.parent / "go").touch()
    assert [code for code, _ in ranks.join()] == [0, 0]
    assert run.stopped()[0] == "run.max_minutes is spent"


def test_a_stop_that_hangs_ends_by_force_on_all_ranks(run: Run) -> None:
    run.settings = ["run.stop_seconds=1.5", "data.workers=1"]
    ranks = run.start(partial(at_step, 3, 1, hang), note_workers)
    wait_until((run.path.parent / "asked").exists, 40)
    start = time.monotonic()
    (run.path / STOP_FILE).touch()
    codes, told = exit_codes(ranks, 1.5 + 0.5 + LOADED)
    assert time.monotonic() - start > 1.5
    assert codes == [1, 1]
    assert told.count("the stop (the file STOP in the run's folder) did not come to an end within 1.5 s: ending") == 2
    wait_until(lambda: run.left() == [], 5)


# Checkpoints by the clock


def test_all_ranks_save_at_the_step_at_which_rank_0s_clock_says_so(run: Run) -> None:
    run.settings = ["optim.epochs=2", "run.keep_checkpoints=99"]
    ranks = run.start(partial(at_step, 0, 0, do_nothing), partial(saves_every, 0.3), note_saves)
    assert [code for code, _ in ranks.join()] == [0, 0]
    saves, of_rank_1 = [(run.path.parent / f"saves-{rank}").read_text().split() for rank in range(2)]
    assert saves == of_rank_1
    assert len([save for save in saves if not save.endswith("step-00000")]) >= 2  # an epoch takes 0.8 s at least
    complete = {marker.parent.name for marker in (run.path / "checkpoints").glob("*/COMPLETE.json")}
    assert complete == set(saves)


def do_nothing(trainer: Trainer, run: Path) -> None:
    return None


# The watcher alone


def in_own_process(function: Callable[[Path], object], folder: Path) -> None:
    Ranks(1, function, folder, timeout=20.0).join()


def soon(condition: Callable[[], bool]) -> None:
    wait_until(condition, 5.0)


def leaves_everything_as_it_was(folder: Path) -> None:
    calls = []
    signal.signal(signal.SIGUSR1, lambda number, frame: calls.append(number))
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)]
    _, writer = os.pipe()
    os.set_blocking(writer, False)
    signal.set_wakeup_fd(writer)
    descriptors = os.listdir("/proc/self/fd")
    with StopWatcher(grace=5):
        os.kill(os.getpid(), signal.SIGCHLD)  # nobody's
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)] == before
    assert signal.set_wakeup_fd(-1) == writer
    assert os.listdir("/proc/self/fd") == descriptors
    assert threading.active_count() == 1
    os.kill(os.getpid(), signal.SIGUSR1)
    assert calls == [signal.SIGUSR1]


def ignores_echoes_after_a_stop(folder: Path) -> None:
    with StopWatcher(grace=5) as watcher:
        os.kill(os.getpid(), signal.SIGTERM)
        soon(lambda: watcher.stop is StopReason.SIGTERM)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        os.kill(os.getpid(), number)


def hears_other_handlers_signals_without_a_stop(folder: Path) -> None:
    calls: list[int] = []
    numbers = [signal.SIGCHLD, signal.SIGRTMIN + 1]  # the second has no name
    for number in numbers:
        signal.signal(number, lambda number, frame: calls.append(number))
    with StopWatcher(grace=5) as watcher:
        for number in numbers:
            os.kill(os.getpid(), number)
        soon(lambda: set(calls) == set(numbers))
        time.sleep(0.1)
        assert watcher.stop is None
        os.kill(os.getpid(), signal.SIGINT)
        soon(lambda: watcher.stop is StopReason.SIGINT)


def does_not_hear_what_a_forked_child_is_told(folder: Path) -> None:
    reader, writer = os.pipe()
    with StopWatcher(grace=5) as watcher:
        child = os.fork()
        if child == 0:
            os.write(writer, bytes(1))
            time.sleep(60)
            os._exit(0)
        os.read(reader, 1)  # the child has come out of its fork
        os.kill(child, signal.SIGUSR1)
        time.sleep(0.3)
        assert watcher.stop is None
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def hears_files_and_clocks_in_any_thread_but_no_signals(folder: Path) -> None:
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    found = []

    def work() -> None:
        with StopWatcher(grace=5) as watcher:
            os.kill(os.getpid(), signal.SIGUSR1)
            watcher.look_for(folder / STOP_FILE)
            time.sleep(0.1)
            found.append(watcher.stop)
            (folder / STOP_FILE).touch()
            soon(lambda: watcher.stop is not None)
            found.append(watcher.stop)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [None, StopReason.FILE]
    assert signal.getsignal(signal.SIGUSR1) is signal.SIG_IGN


def goes_on_where_the_disk_fails(folder: Path) -> None:
    failing = True

    def stat(path: Any, **options: Any) -> Any:
        if failing and str(path).endswith(STOP_FILE):
            raise OSError(116, "Stale file handle")
        return real(path, **options)

    real, os.stat = os.stat, stat
    with StopWatcher(grace=5) as watcher:
        watcher.look_for(folder / STOP_FILE)
        time.sleep(0.7)
        assert watcher.stop is None
        failing = False
        (folder / STOP_FILE).touch()
        soon(lambda: watcher.stop is StopReason.FILE)


@pytest.mark.parametrize(
    "behaviour",
    [
        leaves_everything_as_it_was,
        ignores_echoes_after_a_stop,
        hears_other_handlers_signals_without_a_stop,
        does_not_hear_what_a_forked_child_is_told,
        hears_files_and_clocks_in_any_thread_but_no_signals,
        goes_on_where_the_disk_fails,
    ],
    ids=lambda function: function.__name__,
)
def test_a_watcher(behaviour: Callable[[Path], object], tmp_path: Path) -> None:
    in_own_process(behaviour, tmp_path)


def ends_though_nobody_reads(folder: Path) -> None:
    """Both the main thread and the last words get stuck in a pipe that is full."""
    launch.stop.ECHO_SECONDS, launch.stop._LAST_WORDS_SECONDS = 0.1, 1
    _, writer = os.pipe()
    os.dup2(writer, 2)
    with StopWatcher(grace=0.3, launcher=os.getppid()):
        (folder / "asked").touch()
        os.kill(os.getpid(), signal.SIGTERM)
        while True:
            os.write(2, bytes(1 << 16))


def test_a_stop_by_force_does_not_wait_for_a_reader(tmp_path: Path) -> None:
    ranks = Ranks(1, ends_though_nobody_reads, tmp_path, timeout=40.0)
    wait_until((tmp_path / "asked").exists, 20)  # the process has begun: what follows measures its end alone
    codes, _ = exit_codes(ranks, 1.3 + LOADED)
    assert codes == [-signal.SIGALRM]
