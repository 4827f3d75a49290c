"""Baselines that keep something of every row, over epochs: role's estimates, em_apl's soft labels, ll_cp's corrected
ones against their recurrences in numpy; on any number of ranks, whose rows move between epochs; and gone on with after
a stop in mid-epoch.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from adagc_dist.checkpoint import CheckpointStore, Position
from adagc_dist.comm import Comm, SoloComm
from adagc_dist.trainer import Trainer
from launch import recover
from launch.build import build_trainer
from launch.recipe import dump_config
from sharding.rng import derive_rng
from tests.ranks import run_threads
from tests.test_adagc_dist_baselines import (
    C,
    an,
    batch_of,
    doubles,
    em,
    example,
    largest,
    log_p,
    make,
    role_side,
    role_start,
    settings,
    sigmoid,
    step_of,
)
from tests.test_training import same_bits
from tests.tiny import Owners, tiny_config

N, STEP_ROWS, EPOCHS, LR = 24, 6, 5, 0.02
STEPS = N // STEP_ROWS
KWARGS: dict[str, dict[str, float]] = {
    "role": {},
    "em_apl": {"warmup_epochs": 2},
    "ll_cp": {"delta_rel": 10},
}
State = dict[str, Tensor]


# A training of logits that change from epoch to epoch, whatever is learnt


def order_of(epoch: int) -> NDArray[np.int32]:
    return derive_rng(1, "order", epoch).permutation(N).astype(np.int32)


def slots_of(epoch: int, step: int, world_size: int, rank: int, micro: int) -> list[list[int]]:
    """A rank's rows of a step, by micro-batch; the rows of a micro-batch are the same for any number of ranks."""
    rows = order_of(epoch)[step * STEP_ROWS : (step + 1) * STEP_ROWS]
    return [np.array_split(part, world_size)[rank].tolist() for part in np.array_split(rows, micro)]


def owners_of(epoch: int, world_size: int, micro: int) -> Owners:
    ranks = []
    for rank in range(world_size):
        slots = [part for step in range(STEPS) for part in slots_of(epoch, step, world_size, rank, micro)]
        ranks.append(np.array([row for part in slots for row in part], dtype=np.int32))
    return Owners(tuple(ranks))


@dataclass
class Seen:
    """What one rank had: losses and gradients by step, and its rows at the end or where it was to stop."""

    losses: list[float] = field(default_factory=list)
    gradients: list[Tensor] = field(default_factory=list)
    state: State = field(default_factory=dict)


def train(
    comm: Comm,
    name: str,
    *,
    micro: int = 1,
    start: tuple[int, int] = (0, 0),
    stop: tuple[int, int] = (EPOCHS, 0),
    states: Sequence[State] = (),
) -> Seen:
    """From ``start`` (epoch, step), with the rows that ranks had there, to ``stop``."""
    config, seen = settings(name, KWARGS[name], epochs=EPOCHS), Seen()
    made = make(config, torch.zeros(N, C), comm=comm, max_rows=STEP_ROWS)
    store, observed = made.method.store, example(0, rows=N)[1]
    store.home(owners_of(start[0], comm.world_size, micro))
    if states:
        store.load_state(share_of(states, comm.rank, comm.world_size))
        store.sync(owners_of(start[0], comm.world_size, micro))
    for epoch in range(start[0], EPOCHS):
        made.method.configure(config.method, epoch)
        with torch.no_grad():
            made.table.copy_(example(100 + epoch, rows=N, dtype=torch.float32)[0])
        for step in range(start[1] if epoch == start[0] else 0, STEPS):
            if (epoch, step) == stop:
                break
            found = [
                made.step(batch_of(rows, observed, num_global=STEP_ROWS))
                for rows in slots_of(epoch, step, comm.world_size, comm.rank, micro)
            ]
            store.step(epoch * STEPS + step + 1, LR)
            seen.losses.append(sum(losses.total.item() for losses, _ in found))
            seen.gradients.append(torch.stack([gradient for _, gradient in found]).sum(0))
        else:
            store.check_visited_once()
            store.sync(owners_of(min(epoch + 1, EPOCHS - 1), comm.world_size, micro))
            store.begin_epoch()
            continue
        break
    seen.state = {key: tensor.clone() for key, tensor in store.state().items()}
    return seen


def share_of(states: Sequence[State], rank: int, world_size: int) -> State:
    """As a checkpoint gives the saved rows to any number of ranks."""
    whole = {key: torch.cat([state[key] for state in states]) for key in states[0]}
    part = slice(rank * N // world_size, (rank + 1) * N // world_size)
    return {key: tensor[part] for key, tensor in whole.items()}


def by_row(ranks: Sequence[Seen], name: str = "values") -> Tensor:
    whole = {key: torch.cat([seen.state[key] for seen in ranks]) for key in ranks[0].state}
    return whole[name][whole["rows"].argsort()]


# Recurrences


def test_role_moves_every_estimate_as_a_dense_adam_does() -> None:
    """The authors' one: a parameter [N, C] whose gradient is zero where nothing was read."""
    seen = train(SoloComm(), "role")
    y = doubles(example(0, rows=N)[1])
    theta, first, second = role_start(y), np.zeros((N, C)), np.zeros((N, C))
    for number in range(1, EPOCHS * STEPS + 1):
        epoch, step = divmod(number - 1, STEPS)
        rows = slots_of(epoch, step, 1, 0, 1)[0]
        z = doubles(example(100 + epoch, rows=N, dtype=torch.float32)[0])[rows]
        p, q, gradient = sigmoid(z), sigmoid(theta[rows]), np.zeros((N, C))
        loss = (role_side(z, q, y[rows]) + role_side(theta[rows], p, y[rows])).mean() / 2
        assert seen.losses[number - 1] == pytest.approx(loss, rel=1e-5)
        slope = (q - p) - y[rows] * (1 - q) + 2 * (q.sum(1).mean() - 2.3) / C * q * (1 - q)
        gradient[rows] = slope / 2 / p.size
        first, second = 0.9 * first + 0.1 * gradient, 0.999 * second + 0.001 * gradient**2
        scaled = np.sqrt(second / (1 - 0.999**number)) + 1e-8
        theta = theta - 10 * LR * first / (1 - 0.9**number) / scaled
    values = by_row([seen])
    np.testing.assert_allclose(doubles(values[:, C : 2 * C]), theta, atol=2e-5)
    assert np.abs(theta - role_start(y)).mean() > 0.3


def test_role_with_estimates_that_stay_learns_from_what_they_start_as() -> None:
    logits, observed = example(1)
    config = settings("role", {"lr_factor": 0})
    made = make(config, logits)
    batch = batch_of(list(range(len(logits))), observed)
    (before, gradient), _ = made.step(batch), made.method.store.step(1, 0.1)
    after, again = made.step(batch)
    assert (after.total.item(), after.gc.item()) == (before.total.item(), before.gc.item())
    assert torch.equal(gradient, again)
    assert torch.equal(
        made.method.store.values.double(), torch.from_numpy(role_start(doubles(observed))).float().sigmoid().double()
    )


def test_em_apl_softens_the_lowest_scores_of_each_class_epoch_by_epoch() -> None:
    seen = train(SoloComm(), "em_apl")
    y = doubles(example(0, rows=N)[1])
    soft, hidden = np.full((N, C), np.nan), (y == 0).sum(0)
    for epoch in range(EPOCHS):
        z = doubles(example(100 + epoch, rows=N, dtype=torch.float32)[0])
        s = np.nan_to_num(soft)
        cross = 0.2 * (-s * log_p(z) - (1 - s) * log_p(-z))
        entries = np.where(np.isnan(soft), em(z, y, epoch), cross)
        for step in range(STEPS):
            rows = slots_of(epoch, step, 1, 0, 1)[0]
            assert seen.losses[epoch * STEPS + step] == pytest.approx(entries[rows].mean(), rel=1e-5, abs=1e-7)
        if 2 <= epoch + 1 < EPOCHS:
            for c in range(C):
                left = [row for row in range(N) if y[row, c] == 0 and np.isnan(soft[row, c])]
                lowest = sorted(left, key=lambda row: (z[row, c], row))[: int(0.9 * hidden[c] / (EPOCHS - 2))]
                soft[lowest, c] = sigmoid(z[lowest, c])
    found = doubles(by_row([seen])[:, C:])
    assert ((found == 2) == (y > 0)).all()
    np.testing.assert_allclose(found[y == 0], np.where(np.isnan(soft), -1, soft)[y == 0], atol=1e-6)
    assert (~np.isnan(soft)).sum(0).tolist() == [3 * int(0.9 * n / 3) for n in hidden]


@pytest.mark.parametrize("epoch", [0, 9])
def test_em_apl_without_soft_labels_is_em(epoch: int) -> None:
    logits, observed = example(3)
    (found, gradient), (expected, slope) = (step_of(name, logits, observed, epoch) for name in ("em_apl", "em"))
    assert torch.equal(found.total, expected.total)
    assert torch.equal(gradient, slope)


def test_equal_scores_soften_by_row_and_rows_that_were_never_read_do_not() -> None:
    config = settings("em_apl", {"warmup_epochs": 1}, epochs=2)
    made = make(config, torch.zeros(8, C))
    made.method.configure(config.method, 0)
    made.step(batch_of(list(range(8)), torch.zeros(8, C), lost=(1, 2)))
    made.method.store.begin_epoch()
    soft = made.method.store.state()["values"][:, C:]
    assert (soft[:, 0] == 0.5).nonzero().flatten().tolist() == [0, 3, 4, 5, 6]  # 0.9 of 6
    assert made.method.store.visits.tolist() == [0] * 8


def test_ll_cp_keeps_what_it_has_corrected() -> None:
    seen = train(SoloComm(), "ll_cp")
    y = doubles(example(0, rows=N)[1])
    labels = y.copy()
    for epoch in range(EPOCHS):
        z = doubles(example(100 + epoch, rows=N, dtype=torch.float32)[0])
        for step in range(STEPS):
            rows = slots_of(epoch, step, 1, 0, 1)[0]
            large = largest(z[rows], labels[rows], 3 if epoch else 0)  # 10 % of 30
            labels[rows] = np.where(large, 1, labels[rows])
            assert seen.losses[epoch * STEPS + step] == pytest.approx(an(z[rows], labels[rows], 0).mean(), rel=1e-5)
    np.testing.assert_array_equal(doubles(by_row([seen])), labels)
    assert labels.sum() == N + 3 * STEPS * (EPOCHS - 1)


# Ranks, micro-batches and stops


@pytest.mark.parametrize("micro", [1, 2])
@pytest.mark.parametrize("name", KWARGS)
def test_any_number_of_ranks_learns_the_same(name: str, micro: int) -> None:
    alone = train(SoloComm(), name, micro=micro)
    for world_size in (2, 3):
        ranks = run_threads(world_size, lambda comm: train(comm, name, micro=micro))
        np.testing.assert_allclose(np.sum([seen.losses for seen in ranks], axis=0), alone.losses, rtol=1e-5, atol=1e-7)
        for number, gradient in enumerate(alone.gradients):
            total = torch.stack([seen.gradients[number] for seen in ranks]).sum(0)
            torch.testing.assert_close(total, gradient, rtol=1e-4, atol=1e-7)
        torch.testing.assert_close(by_row(ranks), by_row([alone]), rtol=1e-4, atol=2e-5)
        assert torch.equal(by_row(ranks, "marks"), by_row([alone], "marks"))
    if name == "em_apl":  # a score's last bit depends on its place in the batch: vectors and their rest differ
        torch.testing.assert_close(by_row(ranks), by_row([alone]), rtol=1e-6, atol=0.0)
    if name == "ll_cp":  # labels are chosen, never summed
        assert torch.equal(by_row(ranks), by_row([alone]))


@pytest.mark.parametrize("stop", [(3, 0), (3, 2)], ids=["between epochs", "in mid-epoch"])
@pytest.mark.parametrize("name", KWARGS)
def test_who_goes_on_has_what_an_unbroken_training_has(name: str, stop: tuple[int, int]) -> None:
    whole = run_threads(2, lambda comm: train(comm, name))
    before = run_threads(2, lambda comm: train(comm, name, stop=stop))
    states = [seen.state for seen in before]
    same = run_threads(2, lambda comm: train(comm, name, start=stop, states=states))
    assert torch.equal(by_row(same), by_row(whole))
    for one, other in zip(same, whole):
        assert one.losses == other.losses[stop[0] * STEPS + stop[1] :]
    others = run_threads(3, lambda comm: train(comm, name, start=stop, states=states))
    torch.testing.assert_close(by_row(others), by_row(whole), rtol=1e-4, atol=2e-5)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Threads that share so small a model wait for one another, where cores are busy for minutes."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("name", KWARGS)
def test_a_run_resumed_in_mid_epoch_ends_with_the_same_bits(tiny_shards: Path, tmp_path: Path, name: str) -> None:
    kwargs = {"expected_positives": 2.5} if name == "role" else {"warmup_epochs": 1} if name == "em_apl" else {}
    numbers = [f"method.kwargs.{key}={value}" for key, value in kwargs.items()]
    overrides = [f"method.name={name}", *numbers, "optim.epochs=3", "detector.rule=never"]
    config = tiny_config(tiny_shards, tmp_path, *overrides, "run.checkpoint_every=3 steps", "run.panels_every=0")

    def trainer() -> Trainer:
        checkpoints = CheckpointStore(tmp_path / "checkpoints", comm=SoloComm(), keep=99)
        return build_trainer(config, comm=SoloComm(), device=torch.device("cpu"), checkpoints=checkpoints)

    taken: list[tuple[int, float]] = []
    ends: list[tuple[State, State]] = []
    for resumed in (False, True):
        made = trainer()
        store: Any = made.method.store
        if resumed:
            made.resume(made.checkpoints.at(Position(1, 4)))
        else:
            made.start()
            store.step = watched(store.step, taken)
        made.run()
        ends.append((clone(made.engine.student.state_dict()), clone(store.state())))
    assert same_bits(ends[0][0], ends[1][0])
    kept, again = ({key: state[key][state["rows"].argsort()] for key in state} for _, state in ends)
    assert same_bits(kept, again)
    assert [number for number, _ in taken] == list(range(1, made.moment.step + 1))
    assert max(lr for _, lr in taken) == pytest.approx(config.optim.lr, rel=0.1)
    (tmp_path / "config.yaml").write_text(dump_config(config))
    assert recover.main([str(tmp_path), "--out", str(tmp_path / "labels.csv"), "--averages-only"]) == 0
    frame = pd.read_csv(tmp_path / "labels.csv")
    written = frame[[column for column in frame if column.startswith("average/")]].to_numpy(np.float32)
    np.testing.assert_allclose(written, kept["values"][:, :19].numpy(), rtol=1e-5)
    assert 0 <= written.min() < written.max() <= 1


def watched(step: Callable[[int, float], None], taken: list[tuple[int, float]]) -> Callable[[int, float], None]:
    def told(number: int, lr: float) -> None:
        taken.append((number, lr))
        step(number, lr)

    return told


def clone(tensors: State) -> State:
    return {name: tensor.clone() for name, tensor in tensors.items()}
