"""What is told of many steps and ranks: global means, whatever the slots."""

from collections.abc import Iterator

import pytest
import torch

from adagc_dist.comm import Comm, SoloComm
from adagc_dist.meter import Meter
from adagc_dist.methods.protocol import Losses
from tests.ranks import run_threads

CPU = torch.device("cpu")


def losses(bce: float, gc: float = 0.0, counts: list[float] | None = None) -> Losses:
    total = torch.tensor(bce + gc)
    pseudo = None if counts is None else torch.tensor(counts)
    return Losses(total=total, bce=torch.tensor(bce), gc=torch.tensor(gc), pseudo_counts=pseudo)


def two_steps(comm: Comm) -> dict[str, float]:
    """Rank r adds 10 r to each loss, in two micro-batches a step, and 3 + r rows."""
    meter = Meter(CPU, comm)
    for step in range(2):
        for _ in range(2):
            meter.add(losses(1.0 + step + 10 * comm.rank, -0.5, [4.0, 3.0, 6.0]), 3 + comm.rank)
        meter.step(torch.tensor(2.0 + step))
    return meter.read()


def test_means_over_steps_of_sums_over_ranks_and_micro_batches() -> None:
    first, second = run_threads(2, two_steps)
    for values in (first, second):
        assert values["loss/bce"] == 2 * (1.5 + 11.5)
        assert values["loss/gc"] == 2 * 2 * -0.5
        assert values["gradient_norm"] == 2.5
        assert values["pseudo/precision"] == 0.75
        assert values["pseudo/recall"] == 0.5
        assert values["pseudo/count"] == 4 * 2 * 4


def test_what_was_not_there_is_not_told() -> None:
    meter = Meter(CPU, SoloComm())
    meter.add(losses(1.0), 4)
    meter.step(torch.tensor(1.0))
    assert not [name for name in meter.read() if name.startswith("pseudo")]
    meter.add(losses(1.0, counts=[0.0, 0.0, 5.0]), 4)
    values = meter.read()
    assert values["pseudo/recall"] == 0.0
    assert "pseudo/precision" not in values  # of nothing


def test_a_reset_forgets() -> None:
    meter = Meter(CPU, SoloComm())
    meter.add(losses(8.0, counts=[1.0, 1.0, 1.0]), 4)
    meter.step(torch.tensor(8.0))
    meter.reset()
    meter.add(losses(1.0), 2)
    meter.step(torch.tensor(3.0))
    values = meter.read()
    assert (values["loss/bce"], values["gradient_norm"]) == (1.0, 3.0)
    assert not [name for name in values if name.startswith("pseudo")]


def test_waiting_is_the_share_of_time_in_which_no_batch_was_there(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0

    def slow() -> Iterator[int]:
        nonlocal now
        for number in range(3):
            now += 2.0
            yield number

    monkeypatch.setattr("adagc_dist.meter.time.perf_counter", lambda: now)
    meter = Meter(CPU, SoloComm())
    for _ in meter.waiting(slow()):
        now += 0.5  # training
    meter.add(losses(1.0), 6)
    values = meter.read()
    assert values["speed/data_wait_share"] == 6.0 / 7.5
    assert values["speed/samples_per_second"] == 6 / 7.5
