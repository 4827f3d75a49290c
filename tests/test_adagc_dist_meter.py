"""What is told of many steps and ranks: global means, whatever the slots."""

import json
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from adagc_dist.comm import Comm, SoloComm
from adagc_dist.meter import Meter
from adagc_dist.methods.protocol import Losses
from tests.ranks import run_threads

CPU = torch.device("cpu")


def losses(bce: float, gc: float = 0.0, counts: list[float] | None = None) -> Losses:
    total = torch.tensor(bce + gc)
    pseudo = None if counts is None else torch.tensor(counts)[:, None]
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


# Saved and gone on with

VARIED = [(0, 0.125), (1, 3.7), (2, -0.3), (3, 1e-3), (4, 19.0), (5, 0.7)]


def add_step(meter: Meter, comm: Comm, step: int, value: float, ranks: int) -> None:
    """What a step leaves, dealt to the ranks: the same sums for any number of them."""
    for part in range(6):  # of a step, as whole as can be: rank after rank
        if part % ranks == comm.rank:
            meter.add(losses(value + part, -0.25 * part, [2.0 + part, 1.0 + part, 4.0 + part]), 3)
    meter.step(torch.tensor(1.0 + step))


def steps_with_a_break(ranks: list[int], cut: int) -> list[dict[str, float]]:
    """The first ``cut`` steps on ``ranks[0]`` ranks, the others on ``ranks[1]``; what each of the latter reads."""

    def before(comm: Comm) -> list[float]:
        meter = Meter(CPU, comm)
        for step, value in VARIED[:cut]:
            add_step(meter, comm, step, value, ranks[0])
        return meter.state()

    states = run_threads(ranks[0], before)
    assert json.loads(json.dumps(states)) == states

    def after(comm: Comm) -> dict[str, float]:
        meter = Meter(CPU, comm)
        meter.load_state(states)
        for step, value in VARIED[cut:]:
            add_step(meter, comm, step, value, ranks[1])
        return {name: value for name, value in meter.read().items() if not name.startswith("speed/")}

    return run_threads(ranks[1], after)


def steps_at_once(ranks: int) -> dict[str, float]:
    def work(comm: Comm) -> dict[str, float]:
        meter = Meter(CPU, comm)
        for step, value in VARIED:
            add_step(meter, comm, step, value, ranks)
        return {name: value for name, value in meter.read().items() if not name.startswith("speed/")}

    return run_threads(ranks, work)[0]


@pytest.mark.parametrize("cut", [0, 1, 4, 6])
@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_on_as_many_ranks_a_break_changes_no_bit_of_what_is_told(ranks: int, cut: int) -> None:
    whole = steps_at_once(ranks)
    assert steps_with_a_break([ranks, ranks], cut) == [whole] * ranks
    assert whole["pseudo/count"] == 6 * sum(2 + part for part in range(6))


@pytest.mark.parametrize("cut", [0, 1, 4, 6])
@pytest.mark.parametrize("ranks", [[1, 2], [2, 1], [2, 3], [3, 2], [1, 6]], ids=str)
def test_on_other_ranks_a_break_changes_only_the_rounding(ranks: list[int], cut: int) -> None:
    whole = steps_at_once(1)
    for found in steps_with_a_break(ranks, cut):
        assert found == pytest.approx(whole, rel=1e-5)


def test_a_break_is_not_counted_as_time(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr("adagc_dist.meter.time.perf_counter", lambda: now)
    meter = Meter(CPU, SoloComm())
    meter.add(losses(1.0), 6)
    now = 102.0
    state = meter.state()
    now = 5000.0
    later = Meter(CPU, SoloComm())
    later.load_state([state])
    now = 5001.0
    later.add(losses(1.0), 6)
    assert later.read()["speed/samples_per_second"] == 12 / 3.0


def test_a_state_does_not_change_with_the_meter() -> None:
    meter = Meter(CPU, SoloComm())
    meter.add(losses(1.0), 6)
    state = meter.state()
    kept = list(state)
    meter.add(losses(5.0), 6)
    assert state == kept
    meter.reset()
    meter.load_state([state])
    meter.step(torch.tensor(2.0))
    assert (meter.read()["loss/bce"], meter.read()["gradient_norm"]) == (1.0, 2.0)


def test_sums_of_a_version_that_summed_up_less_are_left_out() -> None:
    meter = Meter(CPU, SoloComm(), num_classes=2)
    meter.load_state([[1.0, -0.5, 4.0, 3.0, 6.0, 2.0, 1, 4, 0.1, 2.5]])
    meter.add(Losses(torch.tensor(1.0), torch.tensor(1.0), torch.tensor(0.0)), 2)
    meter.step(torch.tensor(1.0))
    assert meter.read()["loss/bce"] == 1.0


# What differs between ranks, classes and rows


def test_the_least_and_the_most_of_the_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("adagc_dist.meter.time.perf_counter", lambda: 100.0)

    def work(comm: Comm) -> dict[str, float]:
        meter = Meter(CPU, comm)
        meter._start = 98.0
        meter.add(losses(1.0), 10 + comm.rank)
        meter.synced(0.5 * comm.rank)
        return meter.read({"memory_gb": 3.0 - comm.rank})

    for values in run_threads(3, work):
        assert (values["speed/samples_per_second_min"], values["speed/samples_per_second_max"]) == (5.0, 6.0)
        assert values["speed/samples_per_second"] == 33 / 2
        assert (values["speed/sync_share_min"], values["speed/sync_share_max"]) == (0.0, 0.5)
        assert (values["speed/memory_gb_min"], values["speed/memory_gb_max"]) == (1.0, 3.0)


def test_pseudo_labels_are_counted_by_class_over_all_ranks() -> None:
    def work(comm: Comm) -> list[list[float]]:
        meter = Meter(CPU, comm, num_classes=2)
        given = losses(1.0)
        for _ in range(2):
            meter.add(replace(given, pseudo_counts=torch.tensor([[4.0, 1.0], [3.0, 0.0], [6.0, comm.rank]])), 3)
        assert meter.read()["pseudo/count"] == 4 * 5
        return meter.class_counts().tolist()

    assert run_threads(2, work) == [[[16.0, 4.0], [12.0, 0.0], [24.0, 2.0]]] * 2


def test_movement_is_the_mean_over_rows_that_had_an_average() -> None:
    meter = Meter(CPU, SoloComm())
    meter.add(replace(losses(1.0), moved=torch.tensor([0.0, 0.0])), 3)
    assert "ema/movement" not in meter.read()
    for change, rows in ((0.5, 2.0), (0.1, 4.0)):
        meter.add(replace(losses(1.0), moved=torch.tensor([change, rows])), 3)
    assert meter.read()["ema/movement"] == pytest.approx(0.1)
