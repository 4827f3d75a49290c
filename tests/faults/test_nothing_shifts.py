"""A run that leaves bad rows out, watched from inside: the rest stays as it was planned, on any number of ranks."""

import re
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from adagc_dist.feed import TrainingBatch
from adagc_dist.methods import Losses, Phase
from adagc_dist.methods.adagc import AdaGC
from adagc_dist.store import PredictionStore
from launch.data import Shards, make_plan
from launch.engines.ddp import DdpEngine
from sharding.plan import EpochPlan
from tests.damages import flip_rows
from tests.faults.commands import SKIP, WRITTEN, Told, assert_trained, command, in_a_rank, plan_of, result_of, rows_of
from tests.ranks import Ranks, run_ranks
from tests.test_invariance import BOUNDS, GRADIENT_BOUND, METHODS, STUDENTS, compare, settings, take_steps
from tests.test_training import lines_of, status_of
from tests.tiny import make_reader

# Skipping. Nine bad rows of the first epoch's plan: all rows of the last pairs of a step, which are a whole slot on two
# ranks; a row whose mate is well; an odd last row, and a pair.


def bad_rows(plan: EpochPlan) -> list[int]:
    third, fourth, odd = plan.step_rows(2), plan.step_rows(3), plan.step_rows(5)
    assert len(odd) % 2 == 1
    return [*third[2 * (((len(third) + 1) // 2) // 2) :].tolist(), int(fourth[4]), int(odd[-1]), *odd[:2].tolist()]


@dataclass(frozen=True)
class Seen:
    """One micro-batch of a run, as its method saw it, and what it made of it."""

    phase: Phase
    batch: TrainingBatch
    logits_BC: Tensor
    pseudo_BC: Tensor | None
    losses: Losses


def watch(arguments: Sequence[str]) -> tuple[Told, list[Seen], list[dict[int, int]]]:
    """A run, its micro-batches, and for each epoch how often each row of the store was written."""
    seen: list[Seen] = []
    visits: list[dict[int, int]] = []
    last: dict[str, Tensor] = {}
    losses, forward, pseudo = AdaGC.losses, DdpEngine.forward, AdaGC._pseudo_labels
    audit = PredictionStore.check_visited_once

    def watched_losses(self: AdaGC, batch: TrainingBatch, phase: Phase) -> Losses:
        last.clear()
        found = losses(self, batch, phase)
        values = {name: getattr(found, name).detach() for name in ("total", "bce", "gc")}
        light = replace(batch, images=torch.empty(0))
        seen.append(Seen(phase, light, last["logits"], last.get("pseudo"), Losses(**values)))
        return found

    def watched_audit(self: PredictionStore, skipped: int = 0) -> None:
        visits.append(dict(zip(self.rows.tolist(), self.visits.tolist())))
        audit(self, skipped)

    def keeping(name: str, function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def kept(*args: Any) -> Tensor:
            found = function(*args)
            last[name] = found.detach().clone()
            return found

        return kept

    AdaGC.losses = watched_losses  # type: ignore[method-assign]
    AdaGC._pseudo_labels = keeping("pseudo", pseudo)  # type: ignore[method-assign]
    DdpEngine.forward = keeping("logits", forward)  # type: ignore[method-assign]
    PredictionStore.check_visited_once = watched_audit  # type: ignore[method-assign, assignment]
    (told,) = in_a_rank([arguments])
    return told, seen, visits


@dataclass(frozen=True)
class Skipped:
    """The same skipping run on one rank and on two, and the undamaged one on one."""

    root: Path
    shards: Path
    bad: list[int]
    ranks: dict[str, list[tuple[Told, list[Seen], list[dict[int, int]]]]]


@pytest.fixture(scope="module")
def skipped(tiny_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Skipped:
    """With GroupNorm and smooth activations, so that ranks can be compared (tests.test_invariance says why)."""
    root = tmp_path_factory.mktemp("skipped")
    bad = bad_rows(plan_of(tiny_shards, 0))
    shutil.copytree(tiny_shards, root / "shards")
    flip_rows(root / "shards", bad)
    found = {}
    for name, shards, ranks in (("whole", tiny_shards, 1), ("one", root / "shards", 1), ("two", root / "shards", 2)):
        arguments = command(shards, root / name, *STUDENTS["groupnorm"], *(SKIP if name != "whole" else []))
        found[name] = Ranks(ranks, watch, arguments, timeout=120.0).join()
    return Skipped(root, root / "shards", bad, found)


@pytest.mark.parametrize("name", ["one", "two"])
def test_a_skipping_run_ends_well_and_counts_and_names_what_it_skipped(skipped: Skipped, name: str) -> None:
    assert_trained(*(told for told, _, _ in skipped.ranks[name]))
    assert status_of(skipped.root / name)["state"] == "finished"
    assert [line["data/skipped_rows"] for line in lines_of(skipped.root / name)] == [9, 9]
    log = (skipped.root / name / "log.txt").read_text()
    assert [f"epoch {epoch}: 9 of 90 rows could not be read" in log for epoch in (1, 2)] == [True, True]
    table = make_reader(skipped.shards).table
    named = re.findall(r"skipped: (tiny_\d+) in \S+/train-00000\d\.tar at offset \d+: b10\.npy is not what", log)
    if name == "one":  # the log is rank 0's; each other rank tells its own on the terminal
        assert sorted(named) == sorted(2 * [table.keys[row].as_py() for row in skipped.bad])


@pytest.mark.parametrize("name", ["one", "two"])
def test_skipped_rows_are_not_touched_and_all_others_written_once(skipped: Skipped, name: str) -> None:
    for epoch in (0, 1):
        visits = {row: count for _, _, epochs in skipped.ranks[name] for row, count in epochs[epoch].items()}
        assert visits == {row: int(row not in skipped.bad) for row in range(90)}
    for epoch in (0, 1):
        rows = rows_of(skipped.root / name, epoch)
        assert sorted(rows) == list(range(90))
        for row, (value, mark) in rows.items():
            assert mark == (0 if row in skipped.bad else WRITTEN)
            assert (value == [0.0] * 19) == (row in skipped.bad)


def by_hand(seen: Seen, divisor: int) -> tuple[float, float]:
    """Both terms of the loss in float64, from the logits that were made, the labels, and who could be read."""
    batch = seen.batch
    read_B = np.ones(len(batch.rows), dtype=bool) if batch.read_B is None else batch.read_B.numpy()
    y = batch.observed_BC.double().numpy()
    lam, mate = np.ones((len(y), 1)), np.arange(len(y))
    if seen.phase is Phase.CALIBRATION:
        mate = np.minimum(mate ^ 1, len(y) - 1)
        lam = batch.lambda_B.double().numpy()[:, None]
        lam = np.where((read_B & read_B[mate])[:, None], lam, 1.0)
    y = lam * y + (1 - lam) * y[mate]
    p = 1 / (1 + np.exp(-seen.logits_BC.double().numpy()))
    bce_B = -(y * np.log(p) + (1 - y) * np.log(1 - p)).mean(axis=1)
    gc_B = np.zeros(len(y))
    if seen.pseudo_BC is not None:
        t = seen.pseudo_BC.double().numpy()
        t = np.minimum(lam * t + (1 - lam) * t[mate], 1 - 1e-4)
        gc_B = 3.0 * ((1 - y) * np.log(1 - p * t)).mean(axis=1)
    return float(bce_B[read_B].sum() / divisor), float(gc_B[read_B].sum() / divisor)


@pytest.mark.parametrize("name", ["one", "two"])
def test_losses_are_those_of_the_rows_that_were_read_over_the_planned_divisor(skipped: Skipped, name: str) -> None:
    for epoch in (0, 1):
        plan, total = plan_of(skipped.shards, epoch), np.zeros(2)
        for _, seen, _ in skipped.ranks[name]:
            for step, micro in enumerate(seen[8 * epoch : 8 * epoch + 8]):
                expected = by_hand(micro, len(plan.step_rows(step)))
                found = micro.losses
                assert (found.bce.item(), found.gc.item()) == pytest.approx(expected, rel=2e-5, abs=1e-9)
                assert found.total.item() == pytest.approx(sum(expected), rel=2e-5, abs=1e-9)
                total += expected
        line = lines_of(skipped.root / name)[epoch]
        assert [line["loss/bce"], line["loss/gc"]] == pytest.approx((total / plan.num_steps).tolist(), rel=2e-5)
        assert (line["loss/gc"] < -1e-3) == (epoch == 1)


def test_a_slot_of_which_nothing_could_be_read_adds_nothing(skipped: Skipped) -> None:
    lost = skipped.ranks["two"][1][1][2]
    assert lost.batch.read_B is not None
    assert not lost.batch.read_B.any()
    assert lost.losses.total.item() == 0.0


@pytest.mark.parametrize("name", ["one", "two"])
def test_nothing_shifts_where_rows_are_skipped(skipped: Skipped, name: str) -> None:
    """The rows of every step, their labels, mates and Mixup weights are those of the undamaged run, but that a row
    whose mate could not be read is mixed with nothing.
    """
    ranks = [seen for _, seen, _ in skipped.ranks[name]]
    (whole,) = [seen for _, seen, _ in skipped.ranks["whole"]]
    assert {len(seen) for seen in [*ranks, whole]} == {16}
    for step, expected in enumerate(whole):
        parts = [seen[step].batch for seen in ranks]
        rows = np.concatenate([part.rows for part in parts])
        assert rows.tolist() == expected.batch.rows.tolist()
        read = np.concatenate([np.ones(len(p.rows), bool) if p.read_B is None else p.read_B.numpy() for p in parts])
        assert read.tolist() == [row not in skipped.bad for row in rows.tolist()]
        assert torch.equal(torch.cat([part.observed_BC for part in parts]), expected.batch.observed_BC)
        assert {part.num_global for part in parts} == {len(rows)}
        mates = np.minimum(np.arange(len(rows)) ^ 1, len(rows) - 1)
        weights = np.where(read & read[mates], expected.batch.lambda_B.numpy(), np.float32(1))
        np.testing.assert_array_equal(torch.cat([part.lambda_B for part in parts]).numpy(), weights)
    assert any(weight < 1 for weight in whole[9].batch.lambda_B.tolist())


def test_a_skipping_run_is_the_same_on_two_ranks(skipped: Skipped) -> None:
    """Measured after the sixteen steps: 5e-8 of the losses, 2e-7 in the averages."""
    for one, two in zip(result_of(skipped.root / "one"), result_of(skipped.root / "two")):
        assert one.pop("phase") == two.pop("phase")
        assert one == pytest.approx(two, rel=1e-5, abs=1e-7)
    tables = [rows_of(skipped.root / name, 1) for name in ("one", "two")]
    values = [np.array([table[row][0] for row in range(90)]) for table in tables]
    np.testing.assert_allclose(values[0], values[1], atol=1e-5)
    undamaged = rows_of(skipped.root / "whole", 1)
    assert np.abs(values[0] - np.array([undamaged[row][0] for row in range(90)])).max() > 0.01


MICRO = [(method, micro) for method in ("warmup", "calibration with mixup") for micro in (1, 2)]


@pytest.fixture(scope="module")
def steps(tiny_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[Any]]:
    """Ranks -> each rank's outcomes of the step of test_invariance, three of whose thirteen rows are bad: a pair's
    first row, and the pair after it.
    """
    folder = tmp_path_factory.mktemp("step") / "shards"
    shutil.copytree(tiny_shards, folder)
    plan = make_plan(Shards.open(settings(folder)), 1, 1)
    flip_rows(folder, plan.step_rows(6)[[2, 4, 5]].tolist())
    overrides = [[*STUDENTS["groupnorm"], *METHODS[method], f"optim.accumulation={micro}"] for method, micro in MICRO]
    configs = [(settings(folder, *SKIP, *chosen), "calib" in name) for chosen, (name, _) in zip(overrides, MICRO)]
    return {world: run_ranks(world, take_steps, configs, timeout=120.0) for world in (1, 2, 3)}


@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("case", range(len(MICRO)), ids=[str(case) for case in MICRO])
def test_a_step_with_bad_rows_does_not_depend_on_the_ranks(steps: dict[int, list[Any]], world: int, case: int) -> None:
    """Gradient, student, teacher and averages, with test_invariance's bounds."""
    found = compare([rank[case] for rank in steps[world]], [rank[case] for rank in steps[1]])
    bounds = BOUNDS | {"gradient": GRADIENT_BOUND["groupnorm"]}
    assert {name: value for name, value in found.items() if value > bounds[name]} == {}
