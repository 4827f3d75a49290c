"""One step on 1, 2 and 3 real ranks gives the same gradient, student, teacher and rows: the promise the rest stands on.

The step is the trainer's own, with the plan, loader, feed, method, store and engine of a run, from the middle of a
training: weights, statistics, optimiser moments and averages are such as no start has. The step has 13 rows, so slots
differ: 13, or 6 and 7, or 4, 4 and 5; with two micro-batches 6 and 7, or 2 to 4.

Deviations are those of the worst entry of a tensor, as a share of the tensor's largest entry. Measured over all cases,
and the bound on it (a unit in the last place of float32 is 1.2e-7):

    gradient    GroupNorm 5.5e-6, bound 2e-5; BatchNorm over all ranks 1.5e-5, bound 5e-5: sums in another order
    student     4e-7, bound 2e-6              teacher   4e-7, bound 2e-6
    averages    8e-8, bound 1e-6              losses and gradient norm   6e-7, bound 5e-6
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from adagc_dist.batchnorm import batchnorm_layers
from adagc_dist.checkpoint import CheckpointStore
from adagc_dist.comm import Comm
from adagc_dist.config import Config
from adagc_dist.trainer import Moment, Trainer
from launch.build import build_trainer
from sharding.rng import derive_rng
from tests.ranks import run_ranks
from tests.tiny import tiny_config

CPU = torch.device("cpu")
BOUNDS = {"student": 2e-6, "teacher": 2e-6, "averages": 1e-6, "report": 5e-6}
GRADIENT_BOUND = {"groupnorm": 2e-5, "batchnorm": 5e-5}
EPOCH, STEP, ROWS = 1, 6, 13  # 90 rows make 7 steps of 12 or 13 rows
WRITTEN = 1 << 14
WORLDS = (1, 2, 3)

# A smooth student: at the kink of a ReLU, or where two pixels of a max-pool tie, rounding decides which way a gradient
# goes, and one such place in 200,000 moved a kernel's gradient by a thousandth.
SMOOTH = ["model.kwargs.act_layer=silu", "model.kwargs.replace_stem_pool=true"]
STUDENTS = {
    "groupnorm": [*SMOOTH, "model.kwargs.norm_layer=groupnorm1", "engine.batchnorm=local"],
    "batchnorm": [*SMOOTH, "engine.batchnorm=sync"],
}
METHODS = {
    "an": ["method.name=an"],
    "warmup": [],
    "calibration with mixup": ["method.mixup_alpha=1.0"],
    "calibration": ["method.mixup_alpha=0"],
}
# Parameters of the rows, which the trainer moves with the student's. Its loss is of a micro-batch: other ones, another.
ESTIMATES = ["method.name=role", "method.kwargs.expected_positives=2.5"]
CASES = [(student, method, micro) for student in STUDENTS for method in METHODS for micro in (1, 2)]
CASES += [("groupnorm", "role", 2)]
Case = tuple[str, str, int]


@dataclass(frozen=True)
class Outcome:
    """What one rank has after one step, before the weights' change and after it."""

    rows: list[int]
    gradient: dict[str, Tensor]
    student: dict[str, Tensor]
    teacher: dict[str, Tensor]
    averages: dict[int, Tensor]
    report: dict[str, float]
    statistics_before: list[Tensor]
    statistics_after: list[Tensor]


def settings(shards: Path, *overrides: str) -> Config:
    return tiny_config(shards, Path("run"), "optim.global_batch=13", *overrides)


def random_like(tensor: Tensor, name: str, *, low: float, high: float) -> Tensor:
    values = derive_rng(0, "mid-training", name).uniform(low, high, tuple(tensor.shape))
    return torch.from_numpy(np.asarray(values, dtype=np.float32))


def set_mid_training(trainer: Trainer) -> None:
    """The same state on every rank, whatever their number."""
    with torch.no_grad():
        for owner, model in (("student", trainer.engine.student), ("teacher", trainer.teacher.model)):
            for name, parameter in model.named_parameters():
                parameter.add_(random_like(parameter, f"{owner} {name}", low=-0.02, high=0.02))
            for name, buffer in model.named_buffers():
                if buffer.is_floating_point():
                    buffer.copy_(random_like(buffer, f"statistics {name}", low=0.2, high=0.9))
    trainer.engine.load_state(dict(optimizer_state(trainer)))
    if trainer.method.store is not None:
        rows = torch.from_numpy(trainer.plan(EPOCH).rank_rows(trainer.comm.rank))
        everyone = random_like(torch.empty(90, trainer.method.store.width), "averages", low=0.0, high=1.0)
        marks = torch.full((len(rows),), WRITTEN, dtype=torch.int16)
        trainer.method.store.load_state({"rows": rows, "values": everyone[rows.long()], "marks": marks})


def optimizer_state(trainer: Trainer) -> Iterator[tuple[str, Tensor]]:
    """Moments as after 50 steps. From zero AdamW's first change is the gradient's sign, which rounding decides where
    the gradient is nothing but rounding."""
    for name, parameter in trainer.engine.student.named_parameters():
        yield f"{name}/step", torch.tensor(50.0)
        yield f"{name}/exp_avg", random_like(parameter, f"first {name}", low=-0.01, high=0.01)
        yield f"{name}/exp_avg_sq", random_like(parameter, f"second {name}", low=1e-4, high=1e-3)


def take_step(comm: Comm, config: Config, calibrating: bool) -> Outcome:
    """The step ``STEP`` of epoch ``EPOCH`` through the trainer's own code."""
    trainer = build_trainer(config, comm=comm, device=CPU, checkpoints=CheckpointStore(Path("none"), comm=comm, keep=1))
    set_mid_training(trainer)
    trainer.moment = Moment(epoch=EPOCH, epoch_step=STEP, step=50, calibrating=calibrating)
    layers, before, gradient = batchnorm_layers(trainer.engine.student), [], {}
    engine_step = trainer.engine.step

    def watched_step(lr: float) -> Tensor:
        before.extend(statistics(layers))
        gradient.update({n: p.grad.clone() for n, p in trainer.engine.student.named_parameters() if p.grad is not None})
        return engine_step(lr)

    trainer.engine.step = watched_step  # type: ignore[method-assign]
    plan = trainer.plan(EPOCH)
    slots = [plan.slot(STEP, comm.rank, micro) for micro in range(plan.accumulation)]
    trainer._train_step(trainer.loader.read(slots), plan)
    trainer.agreement.answer()
    rows = [row for slot in slots for row in slot.rows.tolist()]
    store = trainer.method.store
    return Outcome(
        rows=rows,
        gradient=gradient,
        student=clone(trainer.engine.student.state_dict()),
        teacher=clone(trainer.teacher.model.state_dict()),
        averages={} if store is None else {row: store.fetch(np.array([row]))[0].clone() for row in rows},
        report=trainer._meter.read(),
        statistics_before=before,
        statistics_after=statistics(layers),
    )


def clone(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in tensors.items()}


def statistics(layers: list[Any]) -> list[Tensor]:
    return [tensor.clone() for layer in layers for tensor in (layer.running_mean, layer.running_var)]


def take_steps(comm: Comm, configs: list[tuple[Config, bool]]) -> list[Outcome]:
    torch.set_num_threads(1)
    return [take_step(comm, config, calibrating) for config, calibrating in configs]


def case_settings(shards: Path, case: Case) -> tuple[Config, bool]:
    student, method, micro = case
    overrides = ESTIMATES if method == "role" else METHODS[method]
    config = settings(shards, *STUDENTS[student], *overrides, f"optim.accumulation={micro}")
    return config, method.startswith("calibration")


@pytest.fixture(scope="module")
def outcomes(tiny_shards: Path) -> dict[tuple[int, Case], list[Outcome]]:
    """(ranks, case) -> each rank's outcome; all cases of a number of ranks in one start of them."""
    configs = [case_settings(tiny_shards, case) for case in CASES]
    by_world = {world: run_ranks(world, take_steps, configs, timeout=180.0) for world in WORLDS}
    return {(w, case): [ranks[i] for ranks in by_world[w]] for w in WORLDS for i, case in enumerate(CASES)}


def deviation(found: Mapping[Any, Tensor], expected: Mapping[Any, Tensor]) -> float:
    """The largest deviation of any tensor, as a share of that tensor's largest entry."""
    assert set(found) == set(expected)
    shares = [float((found[k].double() - expected[k].double()).abs().max() / expected[k].abs().max()) for k in expected]
    return max(shares)


def joined(outcomes: list[Outcome]) -> dict[int, Tensor]:
    return {row: value for outcome in outcomes for row, value in outcome.averages.items()}


def compare(found: list[Outcome], expected: list[Outcome]) -> dict[str, float]:
    """Deviations of the outcomes of some ranks from those of others."""
    return {
        "gradient": deviation(found[0].gradient, expected[0].gradient),
        "student": deviation(found[0].student, expected[0].student),
        "teacher": deviation(found[0].teacher, expected[0].teacher),
        "averages": deviation(joined(found), joined(expected)) if joined(expected) else 0.0,
        "report": max(
            abs(found[0].report[name] - value) / max(1e-6, abs(value))
            for name, value in expected[0].report.items()
            if not name.startswith("speed/")
        ),
    }


Outcomes = dict[tuple[int, Case], list[Outcome]]


@pytest.mark.parametrize("world", WORLDS[1:])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_step_does_not_depend_on_the_number_of_ranks(outcomes: Outcomes, case: Case, world: int) -> None:
    found = compare(outcomes[world, case], outcomes[1, case])
    bounds = BOUNDS | {"gradient": GRADIENT_BOUND[case[0]]}
    assert {name: value for name, value in found.items() if value > bounds[name]} == {}


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("method", METHODS)
def test_without_batchnorm_micro_batches_change_nothing(outcomes: Outcomes, method: str, world: int) -> None:
    found = compare(outcomes[world, ("groupnorm", method, 2)], outcomes[world, ("groupnorm", method, 1)])
    assert found.pop("report") < 5e-6
    bounds = BOUNDS | {"gradient": GRADIENT_BOUND["groupnorm"]}
    assert {name: value for name, value in found.items() if value > bounds[name]} == {}


@pytest.mark.parametrize("world", WORLDS[1:])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_all_ranks_have_the_same_bits_after_a_step(outcomes: Outcomes, case: Case, world: int) -> None:
    first, *others = outcomes[world, case]
    for other in others:
        for name in ("gradient", "student", "teacher"):
            assert all(torch.equal(tensor, getattr(other, name)[key]) for key, tensor in getattr(first, name).items())


@pytest.mark.parametrize(("world", "sizes"), [(1, [13]), (2, [6, 7]), (3, [4, 4, 5])])
def test_the_step_reads_each_of_its_rows_once(outcomes: Outcomes, world: int, sizes: list[int]) -> None:
    whole = outcomes[1, CASES[0]][0].rows
    assert len(set(whole)) == ROWS
    for case in CASES:
        ranks = [outcome.rows for outcome in outcomes[world, case]]
        assert sorted(row for rows in ranks for row in rows) == sorted(whole)
        if case[2] == 1:
            assert [len(rows) for rows in ranks] == sizes


def test_the_cases_are_different_steps(outcomes: Outcomes) -> None:
    """Nothing above would be worth much if all phases did the same, or nothing."""
    alone = {case: outcomes[1, case][0] for case in CASES}
    assert alone["groupnorm", "role", 2].report["loss/gc"] > 1e-5
    for student in STUDENTS:
        steps = [alone[student, method, 1] for method in METHODS]
        for i, step in enumerate(steps):
            for other in steps[:i]:
                same = {id(step), id(other)} == {id(steps[0]), id(steps[1])}  # AN is AdaGC's warm-up, without averages
                assert (deviation(step.gradient, other.gradient) < 1e-6) == same
        assert [step.report["loss/gc"] < -0.01 for step in steps] == [False, False, True, True]
        assert [len(step.averages) for step in steps] == [0, ROWS, ROWS, ROWS]
    assert deviation(alone["batchnorm", "warmup", 1].gradient, alone["batchnorm", "warmup", 2].gradient) > 1e-3


@pytest.fixture(scope="module")
def local(tiny_shards: Path) -> dict[tuple[int, int], list[Outcome]]:
    """(ranks, micro-batches) -> each rank's outcome with BatchNorm over each rank's own slot."""
    configs = [(settings(tiny_shards, "engine.batchnorm=local", f"optim.accumulation={n}"), False) for n in (1, 2)]
    by_world = {world: run_ranks(world, take_steps, configs, timeout=180.0) for world in (2, 3)}
    return {(world, n): [ranks[n - 1] for ranks in by_world[world]] for world in by_world for n in (1, 2)}


@pytest.mark.parametrize("micro", [1, 2])
@pytest.mark.parametrize("world", [2, 3])
def test_local_statistics_become_the_mean_of_the_ranks_by_their_rows(
    local: dict[tuple[int, int], list[Outcome]], world: int, micro: int
) -> None:
    ranks = local[world, micro]
    assert len(ranks[0].statistics_before) > 20
    for number, after in enumerate(ranks[0].statistics_after):
        own = [outcome.statistics_before[number].double() for outcome in ranks]
        assert not torch.equal(own[0], own[1])
        expected = sum(len(outcome.rows) * part for outcome, part in zip(ranks, own)) / ROWS
        torch.testing.assert_close(after.double(), expected, rtol=2e-6, atol=1e-7)
        assert all(torch.equal(outcome.statistics_after[number], after) for outcome in ranks)


@pytest.mark.parametrize("micro", [1, 2])
@pytest.mark.parametrize("world", [2, 3])
def test_local_statistics_reach_the_teacher_averaged(
    local: dict[tuple[int, int], list[Outcome]], world: int, micro: int
) -> None:
    for outcome in local[world, micro]:
        for name, tensor in outcome.student.items():
            if "running" in name or "num_batches" in name:
                assert torch.equal(outcome.teacher[name], tensor)
            assert torch.equal(tensor, local[world, micro][0].student[name])
