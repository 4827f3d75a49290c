"""What has come apart between ranks, or is not finite, is found and named; what is equal passes."""

import copy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from adagc_dist.comm import Comm, PeerError, SoloComm
from adagc_dist.sanity import check_sanity
from adagc_dist.trainer import Trainer
from launch.failure import EXIT_LOST_PEER
from tests.ranks import Ranks, run_ranks, run_threads
from tests.test_training import command_line, status_of
from tests.tiny import tiny_settings

Models = dict[str, dict[str, Tensor]]


def models() -> Models:
    """Student and teacher with tensors of all kinds that models have, and some that they may have."""
    torch.manual_seed(0)
    student = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 2))
    teacher = {
        "half": torch.randn(5, 3).bfloat16(),
        "half.T": torch.randn(5, 3).half().T,
        "scalar": torch.tensor(0.5),
        "count": torch.tensor(7),
        "counts": torch.tensor([2**62, -1]),
        "double": torch.randn(3, dtype=torch.float64),
        "flags": torch.tensor([True, False]),
        "bytes": torch.tensor([0, 255], dtype=torch.uint8),
        "none": torch.empty(0, 3),
    }
    return {"student": {name: tensor.clone() for name, tensor in student.state_dict().items()}, "teacher": teacher}


def flip_lowest_bit(tensor: Tensor) -> None:
    """Of its last value; -0.0 differs from 0.0."""
    tensor.view(-1).view(torch.uint8)[-tensor.element_size()] ^= 1


def told(ranks: int, spoil: Callable[[int, Models], object]) -> list[str]:
    """What each rank knows of models that ``spoil(rank, models)`` has changed; rank 0 tells it, the others quote it."""

    whole = models()  # here: the generator is all threads'

    def work(comm: Comm) -> str:
        found = copy.deepcopy(whole)
        with torch.no_grad():
            spoil(comm.rank, found)
        try:
            check_sanity(found, comm, step=12)
        except ValueError as error:
            assert comm.rank == 0
            return str(error)
        except PeerError as error:
            assert comm.rank > 0
            return str(error).removeprefix("rank 0 failed: ValueError: ")
        return ""

    return run_threads(ranks, work, timeout=10.0)


@pytest.mark.parametrize("ranks", [1, 2, 5])
def test_equal_and_finite_models_pass(ranks: int) -> None:
    assert told(ranks, lambda rank, found: None) == [""] * ranks


def test_equal_on_real_ranks_passes() -> None:
    assert run_ranks(2, passes) == [True, True]


def passes(comm: Comm) -> bool:
    check_sanity(models(), comm, step=1)
    return True


@pytest.mark.parametrize(
    "name",
    [
        "student.0.weight", "student.1.running_var", "student.1.num_batches_tracked", "student.2.bias", "teacher.half",
        "teacher.scalar", "teacher.count", "teacher.counts", "teacher.double", "teacher.flags", "teacher.bytes",
    ],
)  # fmt: skip
@pytest.mark.parametrize("rank", [1, 3])
def test_one_bit_of_one_tensor_on_one_rank_is_found_and_named_on_all(name: str, rank: int) -> None:
    model, tensor = name.split(".", 1)
    messages = told(4, lambda own, found: own == rank and flip_lowest_bit(found[model][tensor]))
    message = (
        f"step 12: {name} of rank {rank} differs from rank 0's: the ranks no longer train one model. A rank "
        "computes wrongly (failing memory or GPU), or runs another version of the code"
    )
    assert messages == [message] * 4


def test_if_rank_0_is_the_odd_one_the_others_are_named() -> None:
    """Two of three against one say who it was."""
    messages = told(3, lambda rank, found: rank == 0 and found["teacher"]["scalar"].add_(1))
    assert all("teacher.scalar of rank 1, 2 differs from rank 0's" in message for message in messages)


def test_the_first_of_several_tensors_is_named_and_the_others_are_counted() -> None:
    def spoil(rank: int, found: Models) -> None:
        if rank == 2:
            for name in ("1.weight", "1.bias", "2.bias"):
                found["student"][name].add_(1)
        if rank == 1:
            found["teacher"]["half"].add_(1)

    messages = told(3, spoil)
    assert all(
        message.startswith("step 12: student.1.weight of rank 2 (and 3 other tensors) differs") for message in messages
    )


def test_a_sign_of_zero_is_a_difference() -> None:
    def negate(rank: int, found: Models) -> None:
        found["teacher"]["scalar"].zero_()
        if rank:
            found["teacher"]["scalar"].neg_()

    assert all("teacher.scalar of rank 1 differs" in message for message in told(2, negate))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("name", ["student.0.weight", "teacher.half", "teacher.half.T"])
def test_what_is_not_finite_is_found_where_it_is(name: str, value: float) -> None:
    model, tensor = name.split(".", 1)
    messages = told(3, lambda rank, found: rank == 2 and found[model][tensor][..., -1:].fill_(value))
    message = (
        f"step 12: {name} of rank 2 holds values that are not finite: training has diverged. Lower optim.lr, or "
        "set optim.clip_norm"
    )
    assert messages == [message] * 3


def test_divergence_that_is_equal_on_all_ranks_is_found_too() -> None:
    messages = told(2, lambda rank, found: found["student"]["0.bias"].fill_(float("nan")))
    assert all("student.0.bias of rank 0, 1 holds values that are not finite" in message for message in messages)


def test_one_process_looks_for_what_is_not_finite() -> None:
    found = models()
    check_sanity(found, SoloComm(), step=3)
    found["teacher"]["scalar"].fill_(float("inf"))
    with pytest.raises(ValueError, match=r"step 3: teacher\.scalar of rank 0 holds values that are not finite"):
        check_sanity(found, SoloComm(), step=3)


# In a run


def disturbed(settings: Sequence[str], rank: int, step: int, model: str) -> tuple[int, str]:
    """The command, on a rank whose weights change by themselves after a step."""
    take = Trainer._train_step

    def watched(self: Trainer, *args: Any) -> None:
        take(self, *args)
        if self.comm.rank == rank and self.moment.step == step:
            found = self.engine.student if model == "student" else self.teacher.model
            with torch.no_grad():
                next(found.parameters()).view(-1)[5] += 1e-6

    Trainer._train_step = watched  # type: ignore[method-assign, assignment]
    return command_line(["demo", *settings])


@pytest.mark.parametrize("model", ["student", "teacher"])
@pytest.mark.parametrize(("every", "found_at"), [(1, 5), (3, 6)])
def test_a_rank_whose_weights_come_apart_ends_the_run_at_the_next_check(
    tiny_shards: Path, tmp_path: Path, model: str, every: int, found_at: int
) -> None:
    """Which may be that of the same step, and names the model that came apart first."""
    settings = tiny_settings(tiny_shards, tmp_path / "run", f"run.sanity_every={every}", "optim.epochs=1")
    ended = Ranks(2, disturbed, settings, 1, 5, model, timeout=60.0).join()
    assert [code for code, _ in ended] == [1, EXIT_LOST_PEER]
    status = status_of(tmp_path / "run")
    assert (status["state"], status["step"]) == ("failed", found_at)
    assert f"step {found_at}: {model}." in ended[0][1]
    assert "of rank 1" in ended[0][1]
    assert "differs from rank 0's: the ranks no longer train one model" in ended[0][1]
    assert f"ValueError: step {found_at}: {model}." in status["reason"]


def test_a_check_that_is_off_finds_nothing(tiny_shards: Path, tmp_path: Path) -> None:
    settings = tiny_settings(tiny_shards, tmp_path / "run", "run.sanity_every=0", "optim.epochs=1")
    ended = Ranks(2, disturbed, settings, 1, 5, "student", timeout=60.0).join()
    assert [code for code, _ in ended] == [0, 0]


@pytest.mark.parametrize(
    "overrides",
    [["engine.batchnorm=local"], ["engine.batchnorm=sync"], ["method.name=an"], ["optim.precision=bf16"]],
    ids=str,
)
def test_a_sound_run_passes_the_check_after_every_step(tiny_shards: Path, tmp_path: Path, overrides: list[str]) -> None:
    """In warm-up and after the trigger, whatever the statistics, the method and the precision."""
    settings = tiny_settings(
        tiny_shards, tmp_path / "run", "run.sanity_every=1", "optim.epochs=2", "detector.rule=fixed",
        "detector.min_epochs=1", *overrides,
    )  # fmt: skip
    ended = Ranks(2, command_line, ["demo", *settings], timeout=60.0).join()
    assert [code for code, _ in ended] == [0, 0], ended
