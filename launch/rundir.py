"""A run's folder: who may write to it, what it holds, and how an unfinished run is found again.

config.yaml        the resolved configuration; itself a recipe that repeats the run
status.json        {state: running | stopped | finished | failed, ...}
STOP               whoever makes this file asks the run to save and stop
log.txt            what the terminal showed
metrics.jsonl      a line per epoch
metrics.json       written by `adagc evaluate`
thresholds.json    the trained teacher's, per class, once `adagc evaluate`, `recover` or `predict` has fitted them
teacher.safetensors   the trained model, with classes, bands and statistics as metadata
checkpoints/  tensorboard/  logs/ (of Slurm jobs: every rank's output, and starts.jsonl)
"""

import json
import logging
import sys
import time
from contextlib import suppress
from pathlib import Path

from safetensors.torch import save_file

from adagc_dist.agreement import Stopped
from adagc_dist.board import begin_board, end_board
from adagc_dist.checkpoint import Checkpoint, CheckpointStore, Position, as_disk_error
from adagc_dist.comm import Comm, PeerError, first_error_everywhere
from adagc_dist.config import Config
from adagc_dist.reasons import StopReason
from adagc_dist.tracking import (
    ForgivingTracker,
    NullTracker,
    RunTracker,
    Tracker,
    read_status,
    replacing,
    write_json,
    write_text,
)
from adagc_dist.trainer import Moment, Trainer
from launch.failure import is_lost_peer
from launch.lock import LOCK_FILE as _LOCK
from launch.lock import RunLock
from launch.recipe import dump_config, flatten, load_config
from launch.stop import STOP_FILE

__all__ = ["LOGS", "TEACHER", "RunFolder", "check_unused", "make_folder", "mark_failed"]

log = logging.getLogger(__name__)

TEACHER = "teacher.safetensors"
LOGS = "logs"
_MAY_CHANGE = (
    "model.views",  # of scoring only
    "spml.file",  # its content is compared
    "data.shards",
    "data.workers",
    "data.prefetch",
    "data.reader",
    "data.check_digests",
    "data.on_error",
    "data.max_bad_fraction",
    "data.cache",
    "data.cache_gb",
    "data.stage",
    "optim.epochs",
    "optim.accumulation",
    "data.window_shards",
    "engine.name",
    "engine.zero_stage",
    "engine.deepspeed_json",
    "engine.device",
    "engine.row_exchange",
    "engine.timeout_minutes",
    "engine.channels_last",  # the same to rounding, as is what follows
    "engine.compile",
)


class RunFolder:
    """The folder ``run.dir`` of one run, as seen by one rank; rank 0 writes."""

    def __init__(self, config: Config, comm: Comm) -> None:
        self._config, self._comm, self._path = config, comm, config.run_path
        self._lock = RunLock(self._path / _LOCK, f"run.dir={config.run.dir}")
        self._started = time.monotonic()
        self._continued: Position | None = None
        self._log_handlers: list[logging.Handler] = []
        self.stop_file = self._path / STOP_FILE
        self.checkpoints = CheckpointStore(
            self._path / "checkpoints",
            comm=comm,
            keep=config.run.keep_checkpoints,
            on_error=config.run.on_save_error,
            guard=self._lock.check,
        )

    def check(self) -> None:
        """Collective: may this run use the folder? Writes nothing.

        Raises:
            ValueError: the folder holds a finished run, another run, or something else.
        """
        with first_error_everywhere(self._comm):
            if self._comm.rank == 0:
                self._check_free()

    def latest(self) -> Checkpoint | None:
        """Collective: the newest complete checkpoint as rank 0 sees it, on every rank.

        Raises:
            ValueError: a rank does not see it: the folder is not shared between the machines.
        """
        found = self.checkpoints.latest() if self._comm.rank == 0 else None
        position = self._comm.broadcast_object(None if found is None else found.position)
        self._continued = position
        if position is None:
            return None
        with first_error_everywhere(self._comm):
            return self.checkpoints.at(position)

    def claim(self) -> None:
        """Collective: make the folder, or enter that of the same run to continue it; the log starts.

        Raises:
            ValueError: another process is training there.
        """
        with first_error_everywhere(self._comm):
            if self._comm.rank == 0:
                make_folder(self._config)
                self._lock.hold()
                self._check_unchanged()
                for left in self._path.glob(".*.partial"):  # by a process that was killed
                    left.unlink()
                write_text(self._path / "config.yaml", dump_config(self._config))
        self._start_log()
        with first_error_everywhere(self._comm):  # no rank looks for STOP before
            if self._comm.rank == 0:
                self._forget_old_stop()

    def tracker(self, moment: Moment) -> Tracker:
        """Where this rank reports to, continuing after ``moment``."""
        if self._comm.rank != 0:
            return NullTracker()
        tracker: Tracker = RunTracker(self._path, first_step=moment.step, first_epoch=moment.epoch)
        if self._config.run.on_save_error == "continue":
            tracker = ForgivingTracker(tracker)
        settings = flatten(self._config)
        tracker.draw(lambda writer: begin_board(writer, settings))
        return tracker

    def train(self, trainer: Trainer) -> None:
        """Collective: run ``trainer`` to its end, and leave behind which end it was.

        Raises:
            Stopped: somebody asked for it, and the run is saved.
        """
        try:
            stopped = _run(trainer)
            if stopped is None:
                self._finished(trainer)
            else:
                self._stopped(trainer, stopped.reason)
        except Exception as error:
            self._failed(trainer, error)
            if not is_lost_peer(error):
                trainer.checkpoints.linger()
            raise
        finally:
            self._end_log()
        if stopped is not None:
            raise stopped

    def _finished(self, trainer: Trainer) -> None:
        """Write the trained teacher and the final status; a request to stop came too late."""
        if self._comm.rank == 0:
            self._lock.check()
            self.stop_file.unlink(missing_ok=True)
            metadata = {name: json.dumps(value) for name, value in trainer.data.items()}
            tensors = {name: tensor.cpu().contiguous() for name, tensor in trainer.teacher.model.state_dict().items()}
            with replacing(self._path / TEACHER) as partial, as_disk_error(self._path / TEACHER):
                save_file(tensors, partial, metadata=metadata)
            trainer.tracker.draw(end_board)
            moment = trainer.moment
            trainer.tracker.status(
                "finished", epochs=moment.epoch, step=moment.step, trigger_epoch=moment.trigger_epoch
            )
        trainer.tracker.close()

    def _stopped(self, trainer: Trainer, reason: StopReason) -> None:
        """Write the status of a run that was asked to stop and is saved; the request is done with."""
        if self._comm.rank == 0:
            self.stop_file.unlink(missing_ok=True)
            moment = trainer.moment
            trainer.tracker.status("stopped", reason=reason.value, epoch=moment.epoch, step=moment.step)
            how = "With more of them it" if reason is StopReason.EPOCHS else "The same command"
            log.info("stopped at step %d: %s. %s goes on from here", moment.step, reason.value, how)
        trainer.tracker.close()

    def _failed(self, trainer: Trainer, error: Exception) -> None:
        """Write the failed run's status: by the rank that knows the cause; by rank 0, where no other does in time."""
        reason, cause = f"{type(error).__name__}: {error}", "error"
        if isinstance(error, PeerError) or is_lost_peer(error):
            if self._comm.rank != 0 or self._told_by_another():
                return
            reason = f"rank 0 lost another rank, whose output has the cause ({reason.splitlines()[0]})"
            cause = "lost"
        moment, rank = trainer.moment, self._comm.rank
        status = {"state": "failed", "step": moment.step, "rank": rank, "cause": cause, "reason": reason}
        with suppress(OSError, ValueError):  # a full disk may be what failed, or the lock
            if rank == 0:
                self._lock.check()
            write_json(self._path / "status.json", status)

    def _told_by_another(self, seconds: float = 5.0) -> bool:
        """Whether a rank that knows the cause writes it: it may still be busy dying."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if read_status(self._path).get("state") == "failed":
                return True
            time.sleep(0.1)
        return False

    def _check_unchanged(self) -> None:
        """Whoever held the lock until now may have saved since we looked."""
        newest = self.checkpoints.latest()
        if newest is not None and newest.position != self._continued:
            raise ValueError(
                f"run.dir={self._config.run.dir} was in use until a moment ago, and has a newer checkpoint: start again"
            )

    def _forget_old_stop(self) -> None:
        """A request that is older than this start by more than a minute was for an earlier one; both times by the file
        system's clock.
        """
        if not self.stop_file.exists():
            return
        age = (self._path / "config.yaml").stat().st_mtime - self.stop_file.stat().st_mtime
        if age > time.monotonic() - self._started + 60:
            self.stop_file.unlink()
            log.warning("%s was there before this run began: removed", self.stop_file)

    def _check_free(self) -> None:
        if not self._path.is_dir() or all(_is_beginning(path) for path in self._path.iterdir()):
            return
        name = self._config.run.dir
        if not (self._path / "config.yaml").is_file():
            raise ValueError(f"run.dir={name} exists and is no run: name another folder with run.dir=...")
        status = read_status(self._path)
        finished, learnt = status.get("state") == "finished", self.checkpoints.latest() is not None
        if not finished and not learnt:  # a start that failed may be mended
            return
        self._check_same_run()
        if learnt and not finished and self._config.run.resume == "never":
            raise ValueError(
                f"run.dir={name} holds an unfinished run, and run.resume=never: name another folder with run.dir=..., "
                f"or continue it with run.resume=auto"
            )
        if finished and (self._config.optim.epochs <= status["epochs"] or not learnt):
            raise ValueError(
                f"run.dir={name} holds a finished run of {status['epochs']} epochs. Name another folder with "
                f"run.dir=... to train anew, raise optim.epochs to continue this one, or see its results with "
                f"`adagc evaluate {name}`"
            )

    def _check_same_run(self) -> None:
        there = load_config(self._path / "config.yaml")
        saved, wanted = flatten(there), flatten(self._config)
        latest = self.checkpoints.latest()
        if latest is not None:  # what is yet to come may be changed
            done = latest.position.epoch - (latest.position.step == 0)
            for config, flat in ((there, saved), (self._config, wanted)):
                flat["schedule.changes"] = _until(done, config)
        differing = [
            f"{key}: {saved[key]!r} there, {wanted[key]!r} here"
            for key in wanted
            if saved[key] != wanted[key]
            and key not in _MAY_CHANGE
            and (not key.startswith("run.") or key == "run.seed")
        ]
        if differing:
            raise ValueError(
                f"run.dir={self._config.run.dir} holds another run ({'; '.join(differing)}). Name another folder with "
                f"run.dir=..., or repeat that run's settings to continue it"
            )

    def _start_log(self) -> None:
        handlers: list[logging.Handler] = [logging.StreamHandler(sys.stdout)]
        if self._comm.rank == 0:
            handlers.append(_LogFile(self._path / "log.txt"))
        level = logging.INFO if self._comm.rank == 0 else logging.WARNING
        logging.basicConfig(
            level=level, format="%(asctime)s %(message)s", datefmt="%H:%M:%S", handlers=handlers, force=True
        )
        self._log_handlers = handlers

    def _end_log(self) -> None:
        """What this process says from now on is not this run's."""
        root = logging.getLogger()
        root.setLevel(logging.WARNING)  # as it is where nobody has set it
        for handler in self._log_handlers:
            root.removeHandler(handler)
            handler.close()


def _until(epoch: int, config: Config) -> dict[int, dict[str, float]]:
    """The changes that the epochs up to this one have seen."""
    return {start: changes for start, changes in config.schedule.changes.items() if start <= epoch}


class _LogFile(logging.FileHandler):
    """What finds no room in it stands on the terminal, which is not to show a traceback for each line."""

    def handleError(self, record: logging.LogRecord) -> None:
        if not isinstance(sys.exc_info()[1], OSError):
            super().handleError(record)


def _run(trainer: Trainer) -> Stopped | None:
    """Collective: run ``trainer``; what stopped it, if it was stopped."""
    try:
        trainer.run()
    except Stopped as stopped:
        return stopped
    return None


def make_folder(config: Config) -> None:
    """``run.dir``, if it is not there.

    Raises:
        OSError: it cannot be made.
    """
    try:
        config.run_path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        reason = "it, or a part of its path, is a file" if config.run_path.is_file() else error.strerror
        raise OSError(f"run.dir={config.run.dir} cannot be made ({reason}): name another folder") from error


def check_unused(config: Config) -> None:
    """Before ranks are started: is nobody training in ``run.dir``?

    Raises:
        ValueError: another process is.
    """
    if (config.run_path / _LOCK).exists():
        with RunLock(config.run_path / _LOCK, f"run.dir={config.run.dir}"):
            return


def mark_failed(run: Path) -> None:
    """A run whose ranks are gone is not running, whoever of them failed; one whose lock is held is somebody else's."""
    if not (run / "status.json").is_file():
        return
    with suppress(OSError, ValueError), RunLock(run / _LOCK, str(run)):  # a full disk may be what failed
        status = read_status(run)
        if status.get("state") == "running":
            reason = "a rank failed; see the terminal's output"
            write_json(run / "status.json", status | {"state": "failed", "cause": "lost", "reason": reason})


def _is_beginning(path: Path) -> bool:
    """What a run leaves that was killed before it had a config.yaml, and what a job writes before its ranks start."""
    return path.name in (_LOCK, LOGS) or (path.name.startswith(".") and path.name.endswith(".partial"))
