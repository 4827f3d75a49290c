"""A run that goes on, from the middle of an epoch, on another number of ranks, with other workers and another
accumulation, is the same run: the same rows in every step, the same learning rates, the same averages to the bit, and
the same losses but for rounding.

Largest deviation of losses and gradient norms from the undisturbed run, of all steps and epochs, as a share of their
values, measured over 32 steps on 2, 3, 1 and 2 ranks, half of them in calibration; BOUND is that of the first row:

    GroupNorm                       6e-7, averages 3e-8 (with ReLU and 40 steps 4e-5: rounding decides at its kink)
    BatchNorm over all ranks        6e-7 until the accumulation changes: it normalises a micro-batch; 0.2 after that
    BatchNorm of a rank's own rows  0.25 in losses, averages 0.11: how many ranks there are is part of such a student

Before the first change of the ranks not a bit differs.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from adagc_dist.checkpoint import Position
from adagc_dist.reasons import StopReason
from adagc_dist.store import PredictionStore
from adagc_dist.trainer import Trainer
from launch.engines.ddp import DdpEngine
from sharding.loader import Batch
from sharding.plan import EpochPlan
from tests.ranks import Ranks
from tests.test_training import command_line, newest
from tests.tiny import tiny_settings

EPOCHS, STEPS, ROWS = 4, 8, 90
SETTINGS = [
    f"optim.epochs={EPOCHS}",
    "detector.rule=fixed",
    "detector.min_epochs=2",  # calibration from the third epoch on
    "run.log_every=1",
    "run.checkpoint_every=epoch",
]
SMOOTH = ["model.kwargs.act_layer=silu", "model.kwargs.replace_stem_pool=true"]  # no kinks, at which rounding decides
GROUPNORM = [*SMOOTH, "model.kwargs.norm_layer=groupnorm1"]
BOUND = 1e-5


@dataclass(frozen=True)
class Part:
    """What one start of the command does of a run.

    Attributes:
        until: stop as soon as this position is reached; None: to the end.
    """

    ranks: int
    until: Position | None = None
    settings: Sequence[str] = ()


WHOLE = [Part(2)]
PARTS = [
    Part(2, Position(1, 3)),
    Part(3, Position(1, 6)),  # in the same epoch
    Part(1, Position(3, 5), ["data.workers=2"]),  # beyond the trigger
    Part(2, None, ["optim.accumulation=2", "data.workers=1", "data.prefetch=1"]),
]


@dataclass
class Trained:
    """What ranks did, by global step.

    Attributes:
        rows: of all micro-batches.
        rates: learning rates that the optimiser was given.
    """

    rows: dict[int, list[int]] = field(default_factory=dict)
    rates: dict[int, set[float]] = field(default_factory=dict)


def train_part(arguments: Sequence[str], until: Position | None, injected: bool) -> Trained:
    """A rank of `adagc train` that notes what it trains on, and asks all to stop when it comes to ``until``."""
    trained = Trained()
    train_step, engine_step, blend = Trainer._train_step, DdpEngine.step, PredictionStore.blend
    now: list[Trainer] = []

    def noted_step(self: Trainer, batches: Iterator[Batch], plan: EpochPlan) -> None:
        now[:] = [self]
        if until == Position(self.moment.epoch, self.moment.epoch_step + 1) and self.comm.rank == 0:
            self.agreement.requests.stopping(StopReason.BUDGET)  # heard of at this step's end, by all ranks
        train_step(self, noted(batches, trained.rows.setdefault(self.moment.step, [])), plan)

    def noted(batches: Iterator[Batch], rows: list[int]) -> Iterator[Batch]:
        for batch in batches:
            rows.extend(batch.rows.tolist())
            yield batch

    def noted_rate(self: DdpEngine, lr: float) -> Tensor:
        trained.rates.setdefault(now[0].moment.step, set()).add(lr)
        return engine_step(self, lr)

    def injected_blend(
        self: PredictionStore, rows: NDArray[np.int32], probs_BC: Tensor, *, read_B: Tensor | None = None
    ) -> Tensor:
        return blend(self, rows, predictions(rows, now[0].moment.epoch, probs_BC.shape[1]), read_B=read_B)

    Trainer._train_step = noted_step  # type: ignore[method-assign]
    DdpEngine.step = noted_rate  # type: ignore[method-assign]
    if injected:
        PredictionStore.blend = injected_blend  # type: ignore[method-assign]
    code, told = command_line(arguments)
    assert code == 0, told
    return trained


def predictions(rows: NDArray[np.int32], epoch: int, classes: int) -> Tensor:
    """Probabilities that depend on row and epoch alone."""
    numbers = torch.from_numpy(rows.astype(np.int64))[:, None] * 7919 + torch.arange(classes) * 31 + epoch * 104_729
    return (numbers % 1009).float() / 1009


def train_parts(run: Path, shards: Path, parts: Sequence[Part], settings: Sequence[str], *, injected: bool) -> Trained:
    """The whole run in ``parts``; each step is trained in one of them."""
    whole = Trained()
    for part in parts:
        arguments = ["demo", *tiny_settings(shards, run, *SETTINGS, *settings, *part.settings)]
        earlier = set(whole.rows)
        for rank in Ranks(part.ranks, train_part, arguments, part.until, injected, timeout=120.0).join():
            assert not earlier & set(rank.rows)
            for step, rows in rank.rows.items():
                whole.rows.setdefault(step, []).extend(rows)
            for step, rates in rank.rates.items():
                whole.rates.setdefault(step, set()).update(rates)
        if part.until is not None:
            assert newest(run).position == part.until
    return whole


def store_of(run: Path) -> dict[str, Tensor]:
    """All rows of the newest checkpoint, in the split's order."""
    state = newest(run).rows(0, 1)
    assert state is not None
    order = state["rows"].argsort()
    return {name: tensor[order] for name, tensor in state.items()}


def reported(run: Path) -> dict[tuple[str, int], float]:
    """Losses and gradient norms by step and by epoch, from TensorBoard and metrics.jsonl."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    names = ("loss/bce", "loss/gc", "gradient_norm")
    found = {(name, point.step): point.value for name in names for point in events.Scalars(name)}
    for text in (run / "metrics.jsonl").read_text().splitlines():
        line = json.loads(text)
        found |= {(f"epoch/{name}", line["epoch"]): line[name] for name in names}
    return found


def deviation(found: dict[tuple[str, int], float], expected: dict[tuple[str, int], float]) -> float:
    """The largest, as a share of the expected value. The same points must be there."""
    assert found.keys() == expected.keys()
    return max(abs(found[point] - value) / max(abs(value), 1e-12) for point, value in expected.items())


@dataclass(frozen=True)
class Pair:
    """An undisturbed run, and one in parts."""

    whole: Path
    parted: Path
    whole_steps: Trained
    parted_steps: Trained


def make_pair(folder: Path, shards: Path, settings: Sequence[str], *, injected: bool) -> Pair:
    whole, parted = folder / "whole", folder / "parted"
    return Pair(
        whole,
        parted,
        train_parts(whole, shards, WHOLE, settings, injected=injected),
        train_parts(parted, shards, PARTS, settings, injected=injected),
    )


@pytest.fixture(scope="module")
def learnt(tiny_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """Whose averages are those of its student's predictions."""
    return make_pair(tmp_path_factory.mktemp("learnt"), tiny_shards, GROUPNORM, injected=False)


@pytest.fixture(scope="module")
def injected(tiny_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """Whose predictions are given: what the averages make of them does not depend on a student's rounding."""
    return make_pair(tmp_path_factory.mktemp("injected"), tiny_shards, [], injected=True)


def test_every_step_has_the_same_rows(learnt: Pair) -> None:
    steps = range(EPOCHS * STEPS)
    assert sorted(learnt.whole_steps.rows) == sorted(learnt.parted_steps.rows) == [*steps]
    for step in steps:
        assert sorted(learnt.parted_steps.rows[step]) == sorted(learnt.whole_steps.rows[step])
    for epoch in range(EPOCHS):
        rows = [row for step in steps[epoch * STEPS : (epoch + 1) * STEPS] for row in learnt.parted_steps.rows[step]]
        assert sorted(rows) == [*range(ROWS)]


def test_the_schedule_is_the_same(learnt: Pair) -> None:
    assert learnt.parted_steps.rates == learnt.whole_steps.rates
    assert all(len(rates) == 1 for rates in learnt.whole_steps.rates.values())
    assert len(set.union(*learnt.whole_steps.rates.values())) > EPOCHS * STEPS // 2  # it rises and falls


def test_the_averages_are_the_same_to_the_bit(injected: Pair) -> None:
    found, expected = store_of(injected.parted), store_of(injected.whole)
    assert found["rows"].tolist() == [*range(ROWS)]
    assert all(torch.equal(found[name], expected[name]) for name in ("rows", "values", "marks"))
    assert sorted(path.name for path in newest(injected.whole).path.glob("rows-*")) == [
        "rows-00000-of-00002.safetensors",
        "rows-00001-of-00002.safetensors",
    ]


def test_the_losses_are_the_same_but_for_rounding(learnt: Pair) -> None:
    expected = reported(learnt.whole)
    assert len(expected) == 3 * (EPOCHS * STEPS + EPOCHS)
    assert deviation(reported(learnt.parted), expected) < BOUND


def test_an_epoch_ends_in_the_order_in_which_it_began(tiny_shards: Path, tmp_path: Path) -> None:
    """Refused in mid-epoch with key and remedy, before anything in the folder is changed; then the remedy works, and
    at an epoch's end the order may change.
    """
    run = tmp_path / "run"
    settings = ["optim.epochs=1", "detector.rule=never", "optim.global_batch=30"]

    def part(until: Position | None, *others: str) -> Trained:
        return train_parts(run, tiny_shards, [Part(1, until, others)], settings, injected=False)

    part(Position(0, 1))
    before = {path.name: path.read_bytes() for path in run.iterdir() if path.is_file() and path.name != ".lock"}
    arguments = ["demo", *tiny_settings(tiny_shards, run, *SETTINGS, *settings, "data.window_shards=1")]
    ((code, told),) = Ranks(1, command_line, arguments).join()
    assert code == 1
    assert told == (
        f"adagc train: {run}/checkpoints/epoch-0000-step-00001 lies within an epoch that began with "
        "data.window_shards=0, and here it is 1: add data.window_shards=0 to go on\n"
    )
    assert {name: (run / name).read_bytes() for name in before} == before
    assert sorted(part(None, "data.window_shards=0").rows) == [1, 2]
    assert sorted(part(None, "data.window_shards=1", "optim.epochs=2").rows) == [3, 4, 5]
