"""The training loop: epochs of planned steps, validation, the detector's verdict, checkpoints, and the rewind at the
trigger. It may stop after any step and go on there, on any number of ranks.
"""

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from adagc_dist.agreement import Agreement, Answer, Stopped
from adagc_dist.board import Board
from adagc_dist.checkpoint import Checkpoint, CheckpointStore, Content, Position
from adagc_dist.comm import Comm, Engine, first_error_everywhere
from adagc_dist.config import Config
from adagc_dist.detector import EarlyLearningDetector, Verdict
from adagc_dist.feed import Feed
from adagc_dist.meter import Meter, memory_gb
from adagc_dist.methods import Method, Phase
from adagc_dist.predict import check_bad_rows
from adagc_dist.reasons import StopReason
from adagc_dist.sanity import check_sanity
from adagc_dist.schedule import learning_rate
from adagc_dist.teacher import EmaTeacher, teacher_momentum
from adagc_dist.tracking import NullTracker, Tracker
from adagc_dist.validate import Validation, Validator
from sharding.loader import Batch, BatchReader
from sharding.plan import EpochPlan
from sharding.progress import Progress
from sharding.rng import derive_seed

__all__ = ["Moment", "Trainer", "check_same_data", "check_same_order"]

log = logging.getLogger(__name__)


@dataclass
class Moment:
    """Where a run stands; saved whole with every checkpoint.

    Attributes:
        epoch: the one in training, from 0.
        epoch_step: its steps that are done; all of them, if it is not validated yet.
        step: steps taken over the whole run; never goes back, not even at a rewind (DESIGN decision 10).
        trigger_epoch: the epoch after which the detector fired, or None.
        best_epoch: the epoch a rewind went back to, or None.
        decay_from: the step from which the learning rate decays, or None.
        calibrating: whether the method is past the trigger.
        levels: what the newest validation found for ``Method.accept_from``, or None.
    """

    epoch: int = 0
    epoch_step: int = 0
    step: int = 0
    trigger_epoch: int | None = None
    best_epoch: int | None = None
    decay_from: int | None = None
    calibrating: bool = False
    levels: Sequence[float] | None = None

    @property
    def position(self) -> Position:
        return Position(self.epoch, self.epoch_step)


@dataclass(kw_only=True)
class Trainer:
    """Everything a run needs, put together by ``launch.build``; ``run`` drives it."""

    config: Config
    comm: Comm
    engine: Engine
    teacher: EmaTeacher
    method: Method
    feed: Feed
    loader: BatchReader
    validator: Validator
    detector: EarlyLearningDetector
    checkpoints: CheckpointStore
    plan: Callable[[int], EpochPlan]
    agreement: Agreement
    board: Board
    data: Mapping[str, Any]
    """What a checkpoint must agree with to be resumed: classes, bands, digest of the shards."""
    order: Mapping[str, Any]
    """Settings that a checkpoint in mid-epoch must agree with: what the order of its rows depends on."""
    moment: Moment = field(default_factory=Moment)
    tracker: Tracker = field(default_factory=NullTracker)
    """Silent until the run's folder has been claimed."""

    def __post_init__(self) -> None:
        classes = len(self.data["classes"])
        self._meter = Meter(self.engine.device, self.comm, classes)
        self._epoch_meter = Meter(self.engine.device, self.comm, classes)
        self._homing_seconds = 0.0  # of this rank, before this epoch
        self._bad_rows = 0  # of this rank, in this epoch
        self._saved: Position | None = None  # the newest checkpoint
        self._present = self.config  # the settings of this epoch

    def run(self) -> None:
        """Train from ``moment`` to the last epoch.

        Collective: every rank runs the same steps and decides alike.

        Raises:
            Stopped: somebody asked for it; a checkpoint of this moment is written.
        """
        try:
            while self.moment.epoch < self.config.optim.epochs:
                self._stop_if_enough()
                self._run_epoch(self.moment.epoch)
        except Stopped:
            if self._saved != self.moment.position:
                self._save()
            self.checkpoints.wait(strict=True)
            raise
        self.checkpoints.wait()

    def start(self) -> None:
        """Begin a new run: each row of the store lives where the first epoch reads it."""
        if self.config.detector.rule == "never":
            self.moment.decay_from = 0
        if self.method.store is not None:
            self.method.store.home(self.plan(0))

    def resume(self, checkpoint: Checkpoint) -> None:
        """Collective: go on after ``checkpoint``, on any number of ranks."""
        self._verify(checkpoint)
        with first_error_everywhere(self.comm):
            state = checkpoint.state()
            check_same_data(state["data"], self.data, checkpoint.path)
            if checkpoint.position.step:
                check_same_order(state["order"], self.order, checkpoint.path)
        self.moment = Moment(**state["moment"])
        self.detector = EarlyLearningDetector.from_state(state["detector"])
        self._load_learned(checkpoint)
        self._load_sums(state["sums"])
        self._saved = checkpoint.position

    def _run_epoch(self, epoch: int) -> None:
        """What is left of an epoch: its steps, validation and what follows from it, and the checkpoint at its end."""
        self._configure(epoch)
        self.tracker.status("running", epoch=epoch, step=self.moment.step)
        report = self._train_epoch(self.plan(epoch))
        validation, maps = self._validate()
        self.moment.levels = validation.levels
        # from here to the checkpoint nobody may stop: the detector has seen the epoch, and the run is not in the next
        verdict = self.detector.observe(validation.noisy_map, validation.replicates)
        self._report(epoch, report, maps, verdict)
        self.board.show(
            self.tracker, validation, self._epoch_meter, self.method.store,
            epoch=epoch, step=self.moment.step, trigger_map=self.detector.fired_map,
        )  # fmt: skip
        self.moment.epoch, self.moment.epoch_step = epoch + 1, 0
        if not (verdict.fired and self._trigger(epoch, verdict.best_epoch)):
            self._home_rows()
        self._begin_epoch()
        self._save()

    def _stop_if_enough(self) -> None:
        """Raises Stopped where as many epochs are done as this start was to do."""
        enough = self.config.run.max_epochs
        if enough is not None and self.moment.epoch >= enough:
            self.agreement.obey(Answer(StopReason.EPOCHS, save=False))

    def _configure(self, epoch: int) -> None:
        """What ``schedule.changes`` has for this epoch reaches the parts that use it."""
        self._present = self.config.at(epoch)
        method = self._present.method
        self.method.configure(method, epoch)
        if self.moment.levels is not None:
            self.method.accept_from(self.moment.levels)
        self.feed.mixup_alpha = method.mixup_alpha
        self.teacher.momentum = teacher_momentum(method, self.plan(epoch).num_steps)

    def _train_epoch(self, plan: EpochPlan) -> dict[str, float]:
        """The epoch's remaining steps, and what they add up to."""
        slots = plan.slots(self.comm.rank, self.moment.epoch_step)
        batches = self._meter.waiting(self._epoch_meter.waiting(self.loader.read(slots, plan.staged)))
        with self._progress(plan) as show:
            show(plan.rows_before(self.moment.epoch_step))
            while self.moment.epoch_step < plan.num_steps:
                self._train_step(batches, plan)
                show(plan.rows_before(self.moment.epoch_step))
                self._after_step(plan)
        skipped = self._count_skipped(plan)
        if skipped:
            log.warning("epoch %d: %d of %d rows could not be read", plan.epoch + 1, skipped, plan.num_rows)
        if self.method.store is not None:
            self.method.store.check_visited_once(skipped)
        read = float(plan.num_rows - skipped)  # each once: the store, if there is one, has just said so
        own = {"row_sync_seconds": self._homing_seconds} | memory_gb(self.engine.device)
        return self._epoch_meter.read(own) | {"data/rows": read, "data/skipped_rows": float(skipped)}

    def _after_step(self, plan: EpochPlan) -> None:
        """What does not happen in every step: points for the curves, a look at the ranks' sanity, a checkpoint."""
        run, step = self.config.run, self.moment.step
        if step % run.log_every == 0:
            self._count_skipped(plan)  # too many need not wait for the epoch's end
            self.tracker.scalars(self._meter.read() | {"learning_rate": self._rate(plan)}, step)
            self._meter.reset()
        if run.sanity_every and step % run.sanity_every == 0:
            models = {"student": self.engine.student.state_dict(), "teacher": self.teacher.model.state_dict()}
            check_sanity(models, self.comm, step)
        waiting = time.perf_counter()
        answer = self.agreement.answer()
        for meter in (self._meter, self._epoch_meter):
            meter.synced(time.perf_counter() - waiting)
        self.agreement.obey(answer)
        due = answer.save or (run.checkpoint_steps is not None and step % run.checkpoint_steps == 0)
        if due and self.moment.epoch_step < plan.num_steps:  # the epoch's end has a checkpoint of its own
            self._save()

    def _begin_epoch(self) -> None:
        """Nothing of the epoch is done yet."""
        self._meter.reset()
        self._epoch_meter.reset()
        self._bad_rows = 0
        if self.method.store is not None:
            self.method.store.begin_epoch()

    def _count_skipped(self, plan: EpochPlan) -> int:
        """Collective: rows of the epoch so far that could not be read, over all ranks; too many stop the run."""
        mine = torch.tensor([self._bad_rows], device=self.engine.device)
        skipped = int(self.comm.all_reduce_sum(mine).item())
        check_bad_rows(skipped, plan.num_rows, self.config.data.max_bad_fraction, self.comm)
        return skipped

    def _train_step(self, batches: Iterator[Batch], plan: EpochPlan) -> None:
        """One update of the student, and the teacher after it."""
        for micro in range(plan.accumulation):
            found = next(batches)
            self._bad_rows += int(found.failed.sum())
            batch = self.feed.prepare(found, plan.epoch)
            torch.manual_seed(derive_seed(self.config.run.seed, "dropout", self.moment.step, micro, self.comm.rank))
            losses = self.method.losses(batch, self._phase)
            self.engine.backward(losses.total, last=micro == plan.accumulation - 1)
            for meter in (self._meter, self._epoch_meter):
                meter.add(losses, len(batch.rows))
        self.agreement.ask()  # the answer is on its way while the weights move
        rate = self._rate(plan)
        norm = self.engine.step(rate)
        self.moment.step += 1
        self.moment.epoch_step += 1
        self.teacher.update(self.moment.step)
        if self.method.store is not None:
            self.method.store.step(self.moment.step, rate)
        for meter in (self._meter, self._epoch_meter):
            meter.step(norm)

    @property
    def _phase(self) -> Phase:
        return Phase.CALIBRATION if self.moment.calibrating else Phase.WARMUP

    def _rate(self, plan: EpochPlan) -> float:
        optim = self._present.optim
        total = optim.epochs * plan.num_steps
        return learning_rate(
            self.moment.step,
            peak=optim.lr,
            warmup_steps=optim.warmup_steps,
            total_steps=total,
            decay_from=self.moment.decay_from,
        )

    def _home_rows(self) -> None:
        """Collective: the store's rows go to the ranks that read them in the present epoch."""
        started = time.perf_counter()
        if self.method.store is not None:
            self.method.store.sync(self.plan(self.moment.epoch))
        self._homing_seconds = time.perf_counter() - started

    def _trigger(self, epoch: int, best_epoch: int) -> bool:
        """The warm-up ends: the learning rate decays from here on, and a method that calibrates goes back to the best
        epoch. Returns whether it went back.
        """
        self.moment.trigger_epoch, self.moment.decay_from = epoch, self.moment.step
        self.moment.calibrating = self.method.calibrates
        if not self.method.calibrates or not self.config.detector.rewind or best_epoch == epoch:
            return False
        self.checkpoints.wait()  # it may be the one that is being written
        if not self.comm.broadcast_object(self.checkpoints.has(_end_of(best_epoch))):
            log.warning(
                "there is no checkpoint of epoch %d, the best, to rewind to: it could not be written, or was deleted. "
                "Calibration goes on from epoch %d",
                best_epoch + 1,
                epoch + 1,
            )
            return False
        self.moment.best_epoch = best_epoch
        with first_error_everywhere(self.comm):
            best = self.checkpoints.at(_end_of(best_epoch))
        self._verify(best)
        self._load_learned(best)
        self.moment.levels = best.state()["moment"].get("levels")
        log.info("rewound weights, optimiser and prediction averages to the end of epoch %d", best_epoch + 1)
        return True

    @property
    def _rewind_target(self) -> Position | None:
        """The checkpoint that the trigger would go back to from here, as far as the detector has seen."""
        best = self.detector.best_epoch
        rewinds = self.method.calibrates and self.config.detector.rewind and self.moment.trigger_epoch is None
        return _end_of(best) if rewinds and best is not None else None

    def _verify(self, checkpoint: Checkpoint) -> None:
        """Collective: nothing of ``checkpoint`` is damaged."""
        with first_error_everywhere(self.comm):  # one reader of a file is enough: they lie on a shared file system
            checkpoint.verify(rank=self.comm.rank, world_size=self.comm.world_size)

    def _load_learned(self, checkpoint: Checkpoint) -> None:
        """Collective: student, teacher, optimiser and store values of ``checkpoint``; rows go home to the plan of the
        present epoch.
        """
        self.engine.student.load_state_dict(checkpoint.tensors("student"))
        self.teacher.model.load_state_dict(checkpoint.tensors("teacher"))
        self.engine.load_state(checkpoint.tensors("optimizer"))
        rows = checkpoint.rows(self.comm.rank, self.comm.world_size)
        if self.method.store is not None and rows is not None:
            homes = self.plan(self.moment.epoch).rank_rows(self.comm.rank)
            self.method.store.load_state(rows, places=len(homes))
            self._home_rows()

    def _load_sums(self, sums: Sequence[Mapping[str, Any]]) -> None:
        """What each rank that saved had summed up for the reports, taken over by those that go on."""
        self._meter.load_state([rank["steps"] for rank in sums])
        self._epoch_meter.load_state([rank["epoch"] for rank in sums])
        bad = [rank["bad_rows"] for rank in sums]
        same = len(bad) == self.comm.world_size
        self._bad_rows = bad[self.comm.rank] if same else sum(bad) if self.comm.rank == 0 else 0

    def _save(self) -> None:
        """Collective: begin a checkpoint of this moment."""
        self.tracker.flush()  # a resume reports what comes after, and nothing before
        store = self.method.store
        sums = {"steps": self._meter.state(), "epoch": self._epoch_meter.state(), "bad_rows": self._bad_rows}
        state = {
            "moment": asdict(self.moment),
            "detector": self.detector.state(),
            "data": dict(self.data),
            "order": dict(self.order),
            "sums": self.comm.all_gather_object(sums),
        }
        shared = {
            "student": self.engine.student.state_dict(),
            "teacher": self.teacher.model.state_dict(),
            "optimizer": self.engine.state(),
        }
        rows = None if store is None else store.state()
        self.checkpoints.save(self.moment.position, Content(shared, rows, state, needs=self._rewind_target))
        self._saved = self.moment.position
        self.agreement.requests.saved()

    def _validate(self) -> tuple[Validation, dict[str, float]]:
        """Collective: the teacher's validation, on which all depends; and its means for the curves, the student's mAPs
        beside where that is asked for.
        """
        teacher = self.validator.measure(self.teacher.model, after_block=self.agreement.check)
        maps = {
            "map/noisy_teacher": teacher.noisy_map,
            "map/true_teacher": teacher.true_map,
            "f1/true_teacher": teacher.true_f1,
            "auc/noisy_teacher": teacher.noisy_auc,
            "auc/true_teacher": teacher.true_auc,
            "pu/noisy_teacher": teacher.noisy_pu,
        }
        if self.config.run.eval_student:
            student = self.validator.measure(self.engine.student, after_block=self.agreement.check)
            maps |= {"map/noisy_student": student.noisy_map, "map/true_student": student.true_map}
        return teacher, maps

    def _report(self, epoch: int, report: dict[str, float], maps: dict[str, float], verdict: Verdict) -> None:
        phase, values = self._phase.value, report | maps
        curves = {f"epoch/{name}" if name in report else name: value for name, value in values.items()}
        if verdict.fired:
            curves["trigger_epoch"] = float(epoch)
        self.tracker.scalars(curves, self.moment.step)
        self.tracker.epoch(
            {"epoch": epoch, "step": self.moment.step, "phase": phase, "trigger": verdict.fired} | values
        )
        detector = f" | {verdict.reason}" if self.moment.trigger_epoch is None else ""
        log.info("%s%s", _summary(epoch, self.config.optim.epochs, phase, values), detector)

    @contextmanager
    def _progress(self, plan: EpochPlan) -> Iterator[Callable[[int], None]]:
        """Rank 0's bar over the epoch's patches, as a function that is told how many are done; silence on the other
        ranks.
        """
        if self.comm.rank != 0:
            yield lambda done: None
            return
        name = f"epoch {plan.epoch + 1}/{self.config.optim.epochs} {self._phase.value}"
        with Progress(name, plan.num_rows, unit="patch", seconds=60.0) as progress:
            yield progress.at


def _end_of(epoch: int) -> Position:
    """Where the checkpoint at an epoch's end stands."""
    return Position(epoch + 1)


def _summary(epoch: int, epochs: int, phase: str, values: Mapping[str, float]) -> str:
    """One line for the log."""
    return (
        f"epoch {epoch + 1}/{epochs} {phase}: {values['data/rows']:.0f} rows once | "
        f"bce {values['loss/bce']:.4f} gc {values['loss/gc']:.4f} | "
        f"teacher mAP noisy {values['map/noisy_teacher']:.4f} true {values['map/true_teacher']:.4f} | "
        f"{values['speed/samples_per_second']:.0f} samples/s, waiting for data {values['speed/data_wait_share']:.1%}"
    )


def check_same_data(saved: Mapping[str, Any], present: Mapping[str, Any], path: object) -> None:
    """What was learnt on one set of classes, bands, shards and given labels goes on with the same.

    Raises:
        ValueError: one of them differs; the message names it and the first difference.
    """
    for name, value in saved.items():
        other = present.get(name)
        if value == other:
            continue
        if isinstance(value, list) and isinstance(other, list):
            pairs = [(a, b) for a, b in zip(value, other) if a != b]
            detail = f"{len(value)} against {len(other)}" if not pairs else f"{pairs[0][0]!r} against {pairs[0][1]!r}"
        else:
            detail = "the digests or values differ"
        keep = "the content of spml.file" if name == "labels of spml.file" else "data.shards and data.bands"
        raise ValueError(
            f"the {name} of {path} are not those of this configuration ({detail}): keep {keep} as in its training"
        )


def check_same_order(saved: Mapping[str, Any], present: Mapping[str, Any], path: object) -> None:
    """The rest of an epoch follows from the same settings as its beginning.

    Raises:
        ValueError: one of them differs; the message names it and the remedy.
    """
    for key, value in saved.items():
        if present.get(key) != value:
            raise ValueError(
                f"{path} lies within an epoch that began with {key}={value}, and here it is {present.get(key)}: "
                f"add {key}={value} to go on"
            )
