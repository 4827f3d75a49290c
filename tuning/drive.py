"""What a sweep and a comparison do alike on Ray's cluster: hear signals, know what a trial takes, follow, and save."""

import signal
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import ray

from adagc_dist.tracking import write_text
from launch.stop import STOP_FILE
from sharding.progress import Progress
from tuning.child import GRACE_SECONDS
from tuning.record import TrialFolder, TrialsFolder

__all__ = ["POLL_SECONDS", "Signals", "bundle", "connect", "follow", "in_words", "save"]

POLL_SECONDS = 0.2
_SHOW_SECONDS = 10


def bundle(nodes: Sequence[Mapping[str, float]], *, ranks: int, gpus: int | None, device: str) -> dict[str, float]:
    """What one trial takes, on one node: a core for each rank, and with GPUs one each and its share of the cores.

    Args:
        nodes: what each has, by Ray's names.
        gpus: as asked for, or None.
        device: engine.device.

    Raises:
        ValueError: no node has so much.
    """
    cores, most = (int(max(node.get(kind, 0) for node in nodes)) for kind in ("CPU", "GPU"))
    if gpus and not most:
        raise ValueError(f"--gpus-per-trial {gpus}: no node has a GPU; leave it out to train on cores")
    if device == "cuda" and not most:
        raise ValueError("engine.device=cuda: no node has a GPU")
    if device == "cpu" or not most:
        if ranks > cores:
            raise ValueError(
                f"--ranks-per-trial {ranks}: the largest node has {cores} cores, and a trial runs on one node with a "
                f"core for each rank; ask for {cores} or fewer"
            )
        return {"CPU": ranks}
    if ranks > most:
        raise ValueError(
            f"a trial of {ranks} GPUs: the largest node has {most}, and a trial runs on one node; ask for {most} or "
            "fewer"
        )
    share = min(node["CPU"] // node["GPU"] for node in nodes if node.get("GPU", 0) >= ranks)
    return {"CPU": max(1, int(share)) * ranks, "GPU": ranks}


class Signals:
    """Those that ask to stop; ``heard`` is the first one's number, or 0."""

    def __init__(self) -> None:
        self.heard = 0
        self.listen()

    def listen(self) -> None:
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            signal.signal(number, self._hear)

    def _hear(self, number: int, frame: object) -> None:
        self.heard = self.heard or number


def connect(signals: Signals) -> tuple[list[Mapping[str, float]], Path]:
    """To the cluster of RAY_ADDRESS: what each of its nodes has, by Ray's names, and Ray's folder on this one."""
    session = Path(ray.init(log_to_driver=False, logging_level="ERROR").address_info["session_dir"])
    signals.listen()  # Ray has taken them
    return [node["Resources"] for node in ray.nodes() if node["Alive"]], session


def follow(
    work: Callable[[], None],
    stopping: Callable[[], bool],
    *,
    progress: Progress,
    done: Callable[[], int],
    look: Callable[[], None] = lambda: None,
) -> BaseException | None:
    """Wait for ``work`` in a thread of its own, to its end or until it is to stop, and show how far it is: the main
    thread hears the signals meanwhile.

    Args:
        done: how many patches are; it looks into every trial's folder.
        look: called all the time.

    Returns:
        What has ended ``work``, if it did not end well.
    """
    errors: list[BaseException] = []

    def run() -> None:
        try:
            work()
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run, name="Ray", daemon=True)
    with progress:
        progress.resume(done())
        thread.start()
        shown = time.monotonic()
        while thread.is_alive() and not stopping():
            thread.join(POLL_SECONDS)
            look()
            if time.monotonic() > shown + _SHOW_SECONDS:
                progress.at(done())
                shown = time.monotonic()
        progress.at(done())
    return errors[0] if errors else None


def save(
    folder: TrialsFolder, begun: Sequence[TrialFolder], signals: Signals, seconds: float, say: Callable[[str], None]
) -> None:
    """Ask trials that are training to save and end, and wait for it.

    Args:
        begun: those whose ranks have been started.
        signals: what asks for it.
        seconds: run.stop_seconds.
    """
    folder.stopping.touch()
    name = signal.Signals(signals.heard or signal.SIGTERM).name
    say(f"{name}: saving {sum(trial.is_training for trial in begun)} trial(s)")
    asked: set[int] = set()
    ends = time.monotonic() + seconds + GRACE_SECONDS
    # each time anew: ranks that are still starting train a moment later
    while (running := [trial for trial in begun if trial.is_training]) and time.monotonic() < ends:
        for trial in running:
            if trial.number not in asked:
                asked.add(trial.number)
                with suppress(OSError):
                    write_text(trial.path / STOP_FILE, name)
        time.sleep(POLL_SECONDS)


def in_words(resources: Mapping[str, float]) -> str:
    return ", ".join(f"{count:g} {kind}s" for kind, count in resources.items())
