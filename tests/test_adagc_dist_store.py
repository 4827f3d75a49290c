"""Rows that live with ranks and move between epochs: the table is bit for bit that of a single numpy process."""

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

from adagc_dist import store as store_module
from adagc_dist.comm import Comm, SoloComm
from adagc_dist.store import PredictionStore, RowStore
from sharding.plan import EpochPlan, plan_epoch
from sharding.rng import derive_rng
from tests.ranks import run_ranks, run_threads

CPU = torch.device("cpu")
Rows = NDArray[np.int32]


def predictions(rows: Rows, epoch: int, num_classes: int) -> NDArray[np.float32]:
    """What some student says of the rows in an epoch: a function of row and epoch alone."""
    return np.stack([derive_rng(epoch, "student", int(row)).random(num_classes, dtype=np.float32) for row in rows])


@dataclass
class NumpyTable:
    """The averages of one process, written in four lines of numpy."""

    num_rows: int
    num_classes: int
    momentum: float
    values: NDArray[np.float32] = field(init=False)
    epochs: int = 0

    def __post_init__(self) -> None:
        self.values = np.zeros((self.num_rows, self.num_classes), dtype=np.float32)

    def epoch(self, epoch: int) -> None:
        new = predictions(np.arange(self.num_rows, dtype=np.int32), epoch, self.num_classes)
        weight = np.float32(1.0 - self.momentum)
        self.values = new if self.epochs == 0 else self.values + weight * (new - self.values)
        self.epochs += 1


@dataclass(frozen=True)
class Run:
    """A number of epochs on a number of ranks each, over the same table."""

    num_rows: int
    num_classes: int
    momentum: float
    batch: int
    worlds: tuple[int, ...]  # ranks of epoch 0, 1, ...

    def plan(self, epoch: int, world_size: int) -> EpochPlan:
        return plan_epoch(np.array([self.num_rows]), epoch, seed=1, global_batch=self.batch, world_size=world_size)

    def new_store(self, comm: Comm) -> PredictionStore:
        return PredictionStore(self.num_rows, self.num_classes, momentum=self.momentum, comm=comm, device=CPU)

    def train(self, store: PredictionStore, comm: Comm, epoch: int) -> None:
        """One epoch of a rank, step by step, and the hand-over to the next epoch's plan."""
        for slot in self.plan(epoch, comm.world_size).slots(comm.rank):
            given = torch.from_numpy(predictions(slot.rows, epoch, self.num_classes))
            returned = store.blend(slot.rows, given)
            place = store.locate(slot.rows)
            assert isinstance(place, slice)  # a batch is a contiguous piece of the table
            assert torch.equal(returned, store.values[place])
        store.check_visited_once()
        store.sync(self.plan(epoch + 1, comm.world_size).rank_rows(comm.rank))


States = list[dict[str, Tensor]]


def dealt(states: States, rank: int, world_size: int) -> dict[str, Tensor]:
    """A rank's share of the states that other ranks left, as a checkpoint deals them."""
    parts = states[rank::world_size]
    return {key: torch.cat([part[key] for part in parts]) if parts else states[0][key][:0] for key in states[0]}


def one_epoch(comm: Comm, run: Run, epoch: int, states: States | None) -> dict[str, Tensor]:
    """An epoch of a new process that starts from what the ranks of the epoch before left behind."""
    store = run.new_store(comm)
    first = run.plan(epoch, comm.world_size).rank_rows(comm.rank)
    if states is None:
        store.home(first)
    else:
        store.load_state(dealt(states, comm.rank, comm.world_size))
        store.sync(first)
    run.train(store, comm, epoch)
    return {name: tensor.clone() for name, tensor in store.state().items()}


def whole_table(states: States, num_rows: int) -> NDArray[np.float32]:
    rows = torch.cat([state["rows"] for state in states]).numpy()
    np.testing.assert_array_equal(np.sort(rows), np.arange(num_rows))  # together the ranks own every row once
    table = np.empty((num_rows, states[0]["values"].shape[1]), dtype=np.float32)
    table[rows] = torch.cat([state["values"] for state in states]).numpy()
    return table


def check_against_numpy(run: Run, spawn: Callable[..., States]) -> None:
    reference = NumpyTable(run.num_rows, run.num_classes, run.momentum)
    states = None
    for epoch, world_size in enumerate(run.worlds):
        states = spawn(world_size, run, epoch, states)
        reference.epoch(epoch)
        assert whole_table(states, run.num_rows).tobytes() == reference.values.tobytes()


def on_threads(world_size: int, run: Run, epoch: int, states: States | None) -> States:
    return run_threads(world_size, lambda comm: one_epoch(comm, run, epoch, states))


def on_processes(world_size: int, run: Run, epoch: int, states: States | None) -> States:
    return run_ranks(world_size, one_epoch, run, epoch, states)


runs = st.builds(
    Run,
    num_rows=st.integers(8, 90),
    num_classes=st.integers(1, 24),
    momentum=st.sampled_from([0.0, 0.5, 0.7, 0.9, 0.999, 1.0]),
    batch=st.integers(16, 40),
    worlds=st.lists(st.integers(1, 4), min_size=1, max_size=4).map(tuple),
)


@given(run=runs)
@settings(deadline=None, max_examples=40)
def test_any_ranks_and_changes_of_their_number_give_the_table_of_one_process(run: Run) -> None:
    if run.num_rows // -(-run.num_rows // run.batch) < 2 * max(run.worlds):
        run = Run(run.num_rows, run.num_classes, run.momentum, run.num_rows, run.worlds)  # one step an epoch
    check_against_numpy(run, on_threads)


@pytest.mark.parametrize("chunk_rows", [1, 3, 7, 10, 11])
def test_chunks_of_the_exchange_lose_and_repeat_nothing(chunk_rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two ranks own 22 and 21 of 43 rows: chunks that divide them, that do not, and that end on one rank only."""
    monkeypatch.setattr(store_module, "_CHUNK_BYTES", chunk_rows * (4 * 5 + 6))
    check_against_numpy(Run(43, 5, 0.9, 16, (2, 2, 3, 1)), on_threads)


def test_an_exchange_is_as_large_as_the_rows_and_no_larger_than_a_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_module, "_CHUNK_BYTES", 10 * (4 * 5 + 6))

    def lengths(comm: Comm) -> list[int]:
        sent: list[int] = []
        gather = comm.all_gather
        monkeypatch.setattr(comm, "all_gather", lambda tensor: sent.append(len(tensor)) or gather(tensor))
        store = RowStore(24, 5, comm=comm, device=CPU)
        store.home(np.arange(24, dtype=np.int32)[comm.rank * 13 : comm.rank * 13 + 13])  # 13 rows and 11
        store.sync(np.arange(24, dtype=np.int32)[comm.rank :: 2])
        return sent[::3]  # of each chunk rows, values and marks are sent

    assert run_threads(2, lengths) == [[10, 3], [10, 3]]


@pytest.mark.parametrize("worlds", [(2, 2), (3, 2)])
def test_real_ranks_give_the_table_of_one_process(worlds: tuple[int, ...]) -> None:
    check_against_numpy(Run(61, 19, 0.9, 20, worlds), on_processes)


def small_store(comm: Comm, rows: list[int] | None = None, momentum: float = 0.9) -> PredictionStore:
    store = PredictionStore(6, 2, momentum=momentum, comm=comm, device=CPU)
    store.home(np.array(range(6) if rows is None else rows, dtype=np.int32))
    return store


def index(*rows: int) -> Rows:
    return np.array(rows, dtype=np.int32)


def test_the_first_prediction_is_taken_as_it_is_and_later_ones_blend() -> None:
    store = small_store(SoloComm())
    first, second = torch.tensor([[0.3, 0.7]]), torch.tensor([[1.0, 0.1]])
    assert torch.equal(store.blend(index(4), first), first)
    assert torch.equal(store.blend(index(4), second), first + torch.tensor(1 - 0.9) * (second - first))
    assert store.written.tolist() == [False, False, False, False, True, False]
    assert store.visits.tolist() == [0, 0, 0, 0, 2, 0]


def test_what_stands_in_a_row_that_was_never_written_is_no_matter() -> None:
    store = small_store(SoloComm())
    old = torch.full((6, 2), 1e8)
    store.load_state(
        {"rows": torch.arange(6, dtype=torch.int32), "values": old, "marks": torch.zeros(6, dtype=torch.int16)}
    )
    value = torch.tensor([[0.3, 0.7]])
    assert torch.equal(store.blend(index(2), value), value)


@pytest.mark.parametrize("rows", [(1, 2, 3), (3, 0, 2)], ids=["slice", "index"])
def test_rows_that_could_not_be_read_are_not_touched(rows: tuple[int, ...]) -> None:
    """Neither value nor mark, before their first prediction and after it; the others are blended as ever."""
    store, plain = small_store(SoloComm()), small_store(SoloComm())
    for read in ([True, False, True], [False, True, True], [True, True, False]):
        before = {name: tensor.clone() for name, tensor in store.state().items()}
        given, mask = torch.rand(3, 2), torch.tensor(read)
        returned = store.blend(index(*rows), given, read_B=mask)
        for place, row in enumerate(rows):
            if read[place]:
                plain.blend(index(row), given[place : place + 1])
            else:
                assert torch.equal(store.values[row], before["values"][row])
                assert store.state()["marks"][row] == before["marks"][row]
            assert torch.equal(returned[place], store.values[row])
        assert torch.equal(store.values, plain.values)
        assert torch.equal(store.state()["marks"], plain.state()["marks"])
    assert store.visits[list(rows)].tolist() == [2, 2, 2]
    assert store.written.sum() == 3


def test_what_a_row_that_could_not_be_read_predicts_is_no_matter() -> None:
    """Not even where it is not a number."""
    store = small_store(SoloComm())
    store.blend(index(0, 1), torch.tensor([[0.3, 0.7], [0.1, 0.2]]))
    store.blend(index(0, 1), torch.tensor([[float("nan")] * 2, [0.1, 0.2]]), read_B=torch.tensor([False, True]))
    assert torch.equal(store.values[0], torch.tensor([0.3, 0.7]))


def test_a_batch_that_was_read_whole_is_blended_alike_with_and_without_a_mask() -> None:
    stores, given = [small_store(SoloComm()) for _ in range(2)], torch.rand(2, 3, 2)
    for epoch in range(2):
        returned = [stores[0].blend(index(2, 3, 4), given[epoch])]
        returned.append(stores[1].blend(index(2, 3, 4), given[epoch], read_B=torch.ones(3, dtype=torch.bool)))
        assert torch.equal(*returned)
    assert torch.equal(stores[0].values, stores[1].values)
    assert torch.equal(stores[0].state()["marks"], stores[1].state()["marks"])


def test_a_row_that_failed_in_its_first_epoch_takes_its_first_prediction_later() -> None:
    store = small_store(SoloComm())
    lost = torch.tensor([False, True])
    store.blend(index(4, 5), torch.rand(2, 2), read_B=lost)
    store.sync(index(*range(6)))
    assert store.written.tolist() == [False] * 5 + [True]
    first = torch.tensor([[0.3, 0.7]])
    assert torch.equal(store.blend(index(4), first), first)


def test_predictions_in_half_precision_are_averaged_in_float32_and_carry_no_gradient() -> None:
    store = small_store(SoloComm(), momentum=0.999)
    value = torch.full((1, 2), 0.5, dtype=torch.bfloat16, requires_grad=True)
    store.blend(index(0), value)
    moved = store.blend(index(0), torch.ones((1, 2), dtype=torch.bfloat16))
    assert moved.dtype == torch.float32
    assert not moved.requires_grad
    assert moved[0, 0].item() == pytest.approx(0.5005, abs=1e-7)  # in bfloat16 it would still be 0.5


def test_rows_in_any_order_are_found() -> None:
    store = small_store(SoloComm(), [3, 5, 0, 2, 4, 1])
    assert store.locate(index(0, 2, 4)) == slice(2, 5)
    places = store.locate(index(4, 3))
    assert isinstance(places, Tensor)
    assert places.tolist() == [4, 0]
    values = torch.rand(2, 2)
    assert torch.equal(store.blend(index(4, 3), values), values)
    assert torch.equal(store.values[[4, 0]], values)


def test_a_row_of_another_rank_is_refused() -> None:
    def work(comm: Comm) -> str:
        store = small_store(comm, [0, 1, 2] if comm.rank == 0 else [3, 4, 5])
        with pytest.raises(KeyError, match="are not owned by rank") as caught:
            store.blend(index(2, 3), torch.zeros(2, 2))
        return str(caught.value)

    told = run_threads(2, work)
    assert "rows [3] are not owned by rank 0: sync with the plan that reads them first" in told[0]
    assert "rows [2] are not owned by rank 1" in told[1]


def blend_rows(store: PredictionStore, *rows: int) -> None:
    for row in rows:
        store.blend(index(row), torch.ones(1, 2))


def test_the_audit_passes_when_every_row_was_written_once() -> None:
    def work(comm: Comm) -> None:
        store = small_store(comm, [0, 1, 2] if comm.rank == 0 else [3, 4, 5])
        blend_rows(store, *store.rows.tolist())
        store.check_visited_once()

    run_threads(2, work)


@pytest.mark.parametrize(
    ("written", "skipped", "message"),
    [
        ([3, 4], 0, r"of 6 rows the epoch wrote 0 more than once and left out 1 \(reported skips: 0\)"),
        ([3, 4, 5, 5], 0, "wrote 1 more than once and left out 0"),
        ([3, 3, 4], 0, "wrote 1 more than once and left out 1"),
        ([3, 3, 4], 1, "wrote 1 more than once and left out 1"),
        ([3, 4, 5], 1, r"left out 0 \(reported skips: 1\)"),
    ],
)
def test_the_audit_tells_every_rank_of_missed_and_repeated_rows(written: list[int], skipped: int, message: str) -> None:
    def work(comm: Comm) -> None:
        store = small_store(comm, [0, 1, 2] if comm.rank == 0 else [3, 4, 5])
        blend_rows(store, *([0, 1, 2] if comm.rank == 0 else written))
        with pytest.raises(RuntimeError, match=message):
            store.check_visited_once(skipped)

    run_threads(2, work)


def test_reported_skips_are_no_error() -> None:
    store = small_store(SoloComm())
    blend_rows(store, 0, 1, 2, 4, 5)
    store.check_visited_once(skipped=1)


def test_visits_count_within_an_epoch_and_what_was_written_stays_so() -> None:
    store = small_store(SoloComm())
    blend_rows(store, 0, 1, 2, 3, 4)
    store.sync(index(5, 4, 3, 2, 1, 0))
    assert store.visits.tolist() == [0] * 6
    assert store.written.tolist() == [False, True, True, True, True, True]
    with pytest.raises(RuntimeError, match="left out 6"):
        store.check_visited_once()


def test_a_plan_that_asks_for_a_row_of_nobody_is_told() -> None:
    def work(comm: Comm) -> None:
        store = small_store(comm, [0, 1, 2] if comm.rank == 0 else [3, 4])
        rows = index(0, 1, 5) if comm.rank == 0 else index(2, 3)
        if comm.rank == 0:
            with pytest.raises(
                RuntimeError, match="rank 0 received 2 of 3 rows: the ranks' rows do not cover the split"
            ):
                store.sync(rows)
        else:
            store.sync(rows)

    run_threads(2, work)


def test_state_and_load_state_are_copies_of_everything() -> None:
    store = small_store(SoloComm(), [2, 0, 1, 3, 5, 4])
    blend_rows(store, 2, 3)
    saved = {name: tensor.clone() for name, tensor in store.state().items()}
    other = small_store(SoloComm())
    other.load_state(saved)
    blend_rows(store, 2, 2, 4)
    assert other.rows.tolist() == [2, 0, 1, 3, 5, 4]
    assert {name: tensor.tolist() for name, tensor in other.state().items()} == {
        n: t.tolist() for n, t in saved.items()
    }
    blend_rows(other, 0)
    assert saved["values"][1].tolist() == [0.0, 0.0]  # loading took a copy


def test_saving_changes_nothing() -> None:
    store = small_store(SoloComm())
    blend_rows(store, 1)
    first, second = ({name: tensor.tolist() for name, tensor in store.state().items()} for _ in range(2))
    assert first == second
