"""The training loop: epochs of planned steps, validation, the detector's verdict, checkpoints, and the rewind at the
trigger.
"""

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from adagc_dist.checkpoint import Checkpoint, CheckpointStore
from adagc_dist.comm import Comm, Engine, first_error_everywhere
from adagc_dist.config import Config
from adagc_dist.detector import EarlyLearningDetector, Verdict
from adagc_dist.feed import Feed
from adagc_dist.meter import Meter
from adagc_dist.methods import Method, Phase
from adagc_dist.predict import check_bad_rows
from adagc_dist.schedule import learning_rate
from adagc_dist.teacher import EmaTeacher
from adagc_dist.tracking import NullTracker, Tracker
from adagc_dist.validate import Validation, Validator
from sharding.loader import Batch, BatchReader
from sharding.plan import EpochPlan
from sharding.progress import Progress
from sharding.rng import derive_seed

__all__ = ["Moment", "Trainer", "check_same_data"]

log = logging.getLogger(__name__)


@dataclass
class Moment:
    """Where a run stands; saved whole with every checkpoint.

    Attributes:
        epoch: the next one to train, from 0.
        step: steps taken over the whole run; never goes back, not even at a rewind (DESIGN decision 10).
        trigger_epoch: the epoch after which the detector fired, or None.
        best_epoch: the epoch a rewind went back to, or None.
        decay_from: the step from which the learning rate decays, or None.
        calibrating: whether the method is past the trigger.
    """

    epoch: int = 0
    step: int = 0
    trigger_epoch: int | None = None
    best_epoch: int | None = None
    decay_from: int | None = None
    calibrating: bool = False


@dataclass(kw_only=True)
class Trainer:
    """Everything a run needs, put together by ``launch.train``; ``run`` drives it."""

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
    data: Mapping[str, Any]
    """What a checkpoint must agree with to be resumed: classes, bands, digest of the shards."""
    moment: Moment = field(default_factory=Moment)
    tracker: Tracker = field(default_factory=NullTracker)
    """Silent until the run's folder has been claimed."""

    def __post_init__(self) -> None:
        self._meter = Meter(self.engine.device, self.comm)
        self._bad_rows = 0  # of this rank, in this epoch

    def run(self) -> None:
        """Train from ``moment`` to the last epoch.

        Collective: every rank runs the same steps and decides alike.
        """
        while self.moment.epoch < self.config.optim.epochs:
            epoch = self.moment.epoch
            self.tracker.status("running", epoch=epoch, step=self.moment.step)
            report = self._train_epoch(self.plan(epoch))
            self._hand_rows_on(epoch + 1)
            validation = self.validator.measure(self.teacher.model)
            verdict = self.detector.observe(validation.noisy_map, validation.replicates)
            self._report(epoch, report, validation, verdict)
            self.moment.epoch += 1
            if verdict.fired:
                self._trigger(epoch, verdict.best_epoch)
            self._save(epoch)
            self.checkpoints.prune(
                None if verdict.fired or self.moment.trigger_epoch is not None else verdict.best_epoch
            )

    def start(self) -> None:
        """Begin a new run: each row of the store lives where the first epoch reads it."""
        if self.config.detector.rule == "never":
            self.moment.decay_from = 0
        if self.method.store is not None:
            self.method.store.home(self.plan(0).rank_rows(self.comm.rank))

    def resume(self, checkpoint: Checkpoint) -> None:
        """Collective: go on after ``checkpoint``, on any number of ranks."""
        with first_error_everywhere(self.comm):
            state = checkpoint.state()
            check_same_data(state["data"], self.data, checkpoint.path)
        self.moment = Moment(**state["moment"])
        self.detector = EarlyLearningDetector.from_state(state["detector"])
        self._load_learned(checkpoint)

    def _train_epoch(self, plan: EpochPlan) -> dict[str, float]:
        epoch_meter = Meter(self.engine.device, self.comm)
        self._meter.reset()
        self._bad_rows = 0
        batches = self._meter.waiting(epoch_meter.waiting(self.loader.read(plan.slots(self.comm.rank), plan.staged)))
        with self._progress(plan) as show:
            for step in range(plan.num_steps):
                self._train_step(batches, plan, epoch_meter)
                show(plan.rows_before(step + 1))
                if self.moment.step % self.config.run.log_every == 0:
                    self._count_skipped(plan)  # too many need not wait for the epoch's end
                    self.tracker.scalars(self._meter.read() | {"learning_rate": self._rate(plan)}, self.moment.step)
                    self._meter.reset()
        skipped = self._count_skipped(plan)
        if skipped:
            log.warning("epoch %d: %d of %d rows could not be read", plan.epoch + 1, skipped, plan.num_rows)
        if self.method.store is not None:
            self.method.store.check_visited_once(skipped)
        return epoch_meter.read() | {"data/skipped_rows": float(skipped)}

    def _count_skipped(self, plan: EpochPlan) -> int:
        """Collective: rows of the epoch so far that could not be read, over all ranks; too many stop the run."""
        mine = torch.tensor([self._bad_rows], device=self.engine.device)
        skipped = int(self.comm.all_reduce_sum(mine).item())
        check_bad_rows(skipped, plan.num_rows, self.config.data.max_bad_fraction, self.comm)
        return skipped

    def _train_step(self, batches: Iterator[Batch], plan: EpochPlan, epoch_meter: Meter) -> None:
        """One update of the student, and the teacher after it."""
        for micro in range(plan.accumulation):
            found = next(batches)
            self._bad_rows += int(found.failed.sum())
            batch = self.feed.prepare(found, plan.epoch)
            torch.manual_seed(derive_seed(self.config.run.seed, "dropout", self.moment.step, micro, self.comm.rank))
            losses = self.method.losses(batch, self._phase)
            self.engine.backward(losses.total, last=micro == plan.accumulation - 1)
            for meter in (self._meter, epoch_meter):
                meter.add(losses, len(batch.rows))
        norm = self.engine.step(self._rate(plan))
        self.moment.step += 1
        self.teacher.update(self.moment.step)
        for meter in (self._meter, epoch_meter):
            meter.step(norm)

    @property
    def _phase(self) -> Phase:
        return Phase.CALIBRATION if self.moment.calibrating else Phase.WARMUP

    def _rate(self, plan: EpochPlan) -> float:
        optim = self.config.optim
        total = optim.epochs * plan.num_steps
        return learning_rate(
            self.moment.step,
            peak=optim.lr,
            warmup_steps=optim.warmup_steps,
            total_steps=total,
            decay_from=self.moment.decay_from,
        )

    def _hand_rows_on(self, epoch: int) -> None:
        if self.method.store is not None:
            self.method.store.sync(self.plan(epoch).rank_rows(self.comm.rank))

    def _trigger(self, epoch: int, best_epoch: int) -> None:
        """The warm-up ends: the learning rate decays from here on, and a method that calibrates goes back to the best
        epoch.
        """
        self.moment.trigger_epoch, self.moment.decay_from = epoch, self.moment.step
        if not self.method.calibrates:
            return
        self.moment.calibrating = True
        if self.config.detector.rewind and best_epoch != epoch:
            self.moment.best_epoch = best_epoch
            self._load_learned(self.checkpoints.of_epoch(best_epoch))
            log.info("rewound weights, optimiser and prediction averages to the end of epoch %d", best_epoch + 1)

    def _load_learned(self, checkpoint: Checkpoint) -> None:
        """Collective: student, teacher, optimiser and store values of ``checkpoint``; rows go home to the next epoch's
        plan.
        """
        with first_error_everywhere(self.comm):
            if self.comm.rank == 0:  # one reader of all files is enough: they lie on a shared file system
                checkpoint.verify()
        self.engine.student.load_state_dict(checkpoint.tensors("student"))
        self.teacher.model.load_state_dict(checkpoint.tensors("teacher"))
        self.engine.load_state(checkpoint.tensors("optimizer"))
        rows = checkpoint.rows(self.comm.rank, self.comm.world_size)
        if self.method.store is not None and rows is not None:
            self.method.store.load_state(rows)
            self._hand_rows_on(self.moment.epoch)

    def _save(self, epoch: int) -> Checkpoint:
        store = self.method.store
        return self.checkpoints.save(
            epoch,
            shared={
                "student": self.engine.student.state_dict(),
                "teacher": self.teacher.model.state_dict(),
                "optimizer": self.engine.state(),
            },
            rows=None if store is None else store.state(),
            state={"moment": asdict(self.moment), "detector": self.detector.state(), "data": dict(self.data)},
        )

    def _report(self, epoch: int, report: dict[str, float], validation: Validation, verdict: Verdict) -> None:
        phase = self._phase.value
        values = report | {"map/noisy_teacher": validation.noisy_map, "map/true_teacher": validation.true_map}
        if self.config.run.eval_student:
            student = self.validator.measure(self.engine.student)
            values |= {"map/noisy_student": student.noisy_map, "map/true_student": student.true_map}
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


def _summary(epoch: int, epochs: int, phase: str, values: Mapping[str, float]) -> str:
    """One line for the log."""
    return (
        f"epoch {epoch + 1}/{epochs} {phase}: bce {values['loss/bce']:.4f} gc {values['loss/gc']:.4f} | "
        f"teacher mAP noisy {values['map/noisy_teacher']:.4f} true {values['map/true_teacher']:.4f} | "
        f"{values['speed/samples_per_second']:.0f} samples/s, waiting for data {values['speed/data_wait_share']:.1%}"
    )


def check_same_data(saved: Mapping[str, Any], present: Mapping[str, Any], path: object) -> None:
    """What was learnt on one set of classes, bands and shards goes on with the same.

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
        raise ValueError(
            f"the {name} of {path} are not those of this configuration ({detail}): "
            "keep data.shards and data.bands as in its training"
        )
