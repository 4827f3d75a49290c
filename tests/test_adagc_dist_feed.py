"""What a method is given: augmentation, labels, mates and weights that depend on seed, epoch, key and pair alone."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from adagc_dist.feed import Feed, TrainingBatch
from adagc_dist.mixup import lambdas_B
from adagc_dist.pixels import Pixels
from sharding.manifest import LabelTable, load_manifest, load_table
from sharding.plan import EpochPlan, Slot, plan_epoch
from sharding.reader import select_bands
from tests.tiny import make_reader, read_batch

CPU = torch.device("cpu")


class Bench:
    """A feed over the tiny train split, and the patches it is given."""

    def __init__(self, shards: Path, *, augment: bool = True, seed: int = 0) -> None:
        manifest = load_manifest(shards)
        self.table: LabelTable = load_table(manifest, "train")
        groups = select_bands(manifest, ["B02", "B11"])
        self.reader = make_reader(shards, ["B02", "B11"])
        self.pixels = Pixels(groups, ["B02", "B11"], statistics=manifest.band_statistics(), size=24)
        self.observed = self.table.labels_NC & (np.cumsum(self.table.labels_NC, axis=1) == 1)
        self.feed = Feed(
            self.table, self.observed, self.pixels, seed=seed, augment=augment, mixup_alpha=1.0, device=CPU
        )

    def prepare(self, slot: Slot, epoch: int = 0) -> TrainingBatch:
        return self.feed.prepare(read_batch(self.reader, slot), epoch)


def plan(world_size: int) -> EpochPlan:
    return plan_epoch(np.array([90]), 2, seed=0, global_batch=13, world_size=world_size)


@pytest.mark.parametrize("world_size", [2, 3])
def test_a_row_is_prepared_alike_on_any_number_of_ranks(tiny_shards: Path, world_size: int) -> None:
    bench = Bench(tiny_shards)
    whole = bench.prepare(plan(1).slot(6, 0, 0), epoch=2)
    parts = [bench.prepare(plan(world_size).slot(6, rank, 0), epoch=2) for rank in range(world_size)]
    assert np.concatenate([part.rows for part in parts]).tolist() == whole.rows.tolist()
    for name in ("images", "observed_BC", "labels_BC", "lambda_B"):
        assert torch.equal(torch.cat([getattr(part, name) for part in parts]), getattr(whole, name)), name
    mates = np.concatenate([part.rows[part.mate_B.numpy()] for part in parts])
    assert mates.tolist() == whole.rows[whole.mate_B.numpy()].tolist()
    assert {part.num_global for part in parts} == {whole.num_global} == {13}


def test_labels_are_those_of_the_rows(tiny_shards: Path) -> None:
    bench = Bench(tiny_shards)
    given = bench.prepare(Slot(0, np.array([7, 80, 3], dtype=np.int32), 0, 3))
    np.testing.assert_array_equal(given.labels_BC.numpy(), bench.table.labels_NC[[7, 80, 3]])
    np.testing.assert_array_equal(given.observed_BC.numpy(), bench.observed[[7, 80, 3]].astype(np.float32))
    assert given.observed_BC.sum(dim=1).tolist() == [1.0, 1.0, 1.0]


def test_weights_are_those_of_the_pairs_of_the_epoch(tiny_shards: Path) -> None:
    given = Bench(tiny_shards, seed=4).prepare(Slot(3, np.arange(5, dtype=np.int32), 17, 5), epoch=6)
    np.testing.assert_array_equal(given.lambda_B.numpy(), lambdas_B(4, 6, np.array([17, 17, 18, 18, 19]), 1.0))
    assert given.mate_B.tolist() == [1, 0, 3, 2, 4]


def test_augmentation_is_drawn_per_row_epoch_and_seed_and_not_per_batch(tiny_shards: Path) -> None:
    bench, rows = Bench(tiny_shards), np.arange(30, dtype=np.int32)
    first = bench.prepare(Slot(0, rows, 0, 30)).images
    backwards = bench.prepare(Slot(5, rows[::-1].copy(), 9, 30)).images
    assert torch.equal(first.flip(0), backwards)
    for other in (
        bench.prepare(Slot(0, rows, 0, 30), epoch=1),
        Bench(tiny_shards, seed=1).prepare(Slot(0, rows, 0, 30)),
    ):
        same = [torch.equal(a, b) for a, b in zip(first, other.images)]
        assert 0 < sum(same) < 15  # one in eight keeps its symmetry by chance


def test_without_augmentation_patches_stay_as_they_are(tiny_shards: Path) -> None:
    bench, slot = Bench(tiny_shards, augment=False), Slot(0, np.arange(8, dtype=np.int32), 0, 8)
    assert torch.equal(bench.prepare(slot, epoch=3).images, bench.pixels(read_batch(bench.reader, slot).groups))
    turned = Bench(tiny_shards).prepare(slot, epoch=3).images
    assert not torch.equal(turned, bench.prepare(slot, epoch=3).images)
    torch.testing.assert_close(turned.mean((2, 3)), bench.prepare(slot).images.mean((2, 3)), rtol=1e-4, atol=1e-4)


# Rows that could not be read (data.on_error=skip)


def prepare_with(shards: Path, slot: Slot, failed: list[int], epoch: int = 0) -> TrainingBatch:
    """``slot`` of which the rows at these places could not be read."""
    bench = Bench(shards)
    mask = np.isin(np.arange(len(slot.rows)), failed)
    return bench.feed.prepare(replace(read_batch(bench.reader, slot), failed=mask), epoch)


@pytest.mark.parametrize("failed", [[1], [0, 1], [4], [2, 4], [0, 1, 2, 3, 4]])
def test_a_row_whose_mate_could_not_be_read_is_mixed_with_nothing_and_nothing_else_changes(
    tiny_shards: Path, failed: list[int]
) -> None:
    """Five rows: pairs (0, 1) and (2, 3), and an odd last one."""
    slot = Slot(3, np.array([7, 80, 3, 51, 12], dtype=np.int32), 17, 9)
    well, found = Bench(tiny_shards).prepare(slot, 6), prepare_with(tiny_shards, slot, failed, 6)
    assert found.read_B is not None
    assert found.read_B.tolist() == [place not in failed for place in range(5)]
    lost = {place // 2 for place in failed}
    expected = [1.0 if place // 2 in lost else weight for place, weight in enumerate(well.lambda_B.tolist())]
    assert found.lambda_B.tolist() == expected
    assert found.lambda_B.dtype == well.lambda_B.dtype == torch.float32
    assert max(well.lambda_B.tolist()[:4]) < 1
    for name in ("images", "observed_BC", "labels_BC", "mate_B"):
        assert torch.equal(getattr(found, name), getattr(well, name)), name
    assert (found.rows.tolist(), found.num_global) == (slot.rows.tolist(), 9)


def test_where_all_rows_could_be_read_there_is_no_mask(tiny_shards: Path) -> None:
    assert Bench(tiny_shards).prepare(Slot(0, np.arange(4, dtype=np.int32), 0, 4)).read_B is None


def batch_of(read: list[bool] | None, num_global: int) -> TrainingBatch:
    nothing = torch.zeros(4)
    mask = None if read is None else torch.tensor(read)
    return TrainingBatch(np.arange(4, dtype=np.int32), nothing, nothing, nothing, nothing, nothing, num_global, mask)


@pytest.mark.parametrize(
    ("read", "expected"),
    [
        (None, 10 / 8),
        ([True] * 4, 10 / 8),
        ([True, False, True, True], 8 / 8),
        ([False, False, False, True], 4 / 8),
        ([False] * 4, 0.0),
    ],
)
def test_a_share_is_the_sum_of_the_rows_read_over_the_divisor_of_all(read: list[bool] | None, expected: float) -> None:
    assert batch_of(read, 8).share(torch.tensor([1.0, 2.0, 3.0, 4.0])).item() == expected


@pytest.mark.parametrize("junk", [0.0, 5.0, float("inf"), float("nan")])
def test_no_loss_and_no_gradient_comes_from_a_row_that_could_not_be_read(junk: float) -> None:
    """Whatever its pixels were: times zero would make not-a-number of infinity."""
    values = torch.tensor([1.0, junk, 3.0, 4.0], requires_grad=True)
    share = batch_of([True, False, True, True], 8).share(values)
    share.backward()
    assert share.item() == 1.0
    assert values.grad is not None
    assert values.grad.tolist() == [0.125, 0.0, 0.125, 0.125]
