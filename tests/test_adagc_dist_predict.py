"""Scores of a whole split: the same digits on any number of ranks, each row in its place."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from adagc_dist.comm import Comm, PeerError, SoloComm
from adagc_dist.config import Config
from adagc_dist.model import create_student
from adagc_dist.predict import Scores, check_bad_rows
from launch.build import make_scorer
from launch.data import Shards
from sharding.loader import Batch
from sharding.plan import Slot
from tests.ranks import run_ranks
from tests.tiny import tiny_config

CPU = torch.device("cpu")
BLOCKS = (1, 16, 64)  # 40 rows in 40 blocks, in 3 of which the last is short, and in 1: more ranks than blocks


def student(config: Config) -> torch.nn.Module:
    return create_student(config.model, num_bands=12, num_classes=19, seed=3)


def score(comm: Comm, configs: list[Config], threads: int) -> list[Scores]:
    torch.set_num_threads(threads)
    results = []
    for config in configs:
        shards = Shards.open(config)
        scorer = make_scorer(shards, shards.table("test"), shards.pixels(CPU), comm=comm, device=CPU)
        results.append(scorer.score(student(config)))
        assert torch.get_num_threads() == threads  # left as it was
    return results


@pytest.fixture(scope="module")
def configs(tiny_shards: Path) -> list[Config]:
    return [tiny_config(tiny_shards, Path("run"), f"run.eval_block={block}") for block in BLOCKS]


@pytest.fixture(scope="module")
def alone(configs: list[Config]) -> list[Scores]:
    """As one process computes them that has the cores of three for itself."""
    scores: list[Scores] = run_ranks(1, score, configs, 3)[0]
    return scores


@pytest.mark.parametrize("world_size", [2, 3])
def test_any_number_of_ranks_gives_the_same_digits(configs: list[Config], alone: list[Scores], world_size: int) -> None:
    for scores in run_ranks(world_size, score, configs, 1):
        assert [found.values_NC.tobytes() for found in scores] == [found.values_NC.tobytes() for found in alone]


def test_every_row_has_its_own_score(configs: list[Config], alone: list[Scores]) -> None:
    """Against a loop over the rows that knows no blocks."""
    shards = Shards.open(configs[0])
    table = shards.table("test")
    reader, pixels, model = shards.loader(table, CPU, max_rows=1), shards.pixels(CPU), student(configs[0]).eval()
    slots = [Slot(row, np.array([row], dtype=np.int32), 0, 1) for row in range(len(table))]
    with torch.no_grad():
        expected = torch.cat([model(pixels(batch.groups)).sigmoid() for batch in reader.read(slots)]).numpy()
    for scores in alone:
        assert scores.values_NC.shape == (40, 19)
        assert scores.values_NC.dtype == np.float32
        assert scores.read_N.all()
        np.testing.assert_allclose(scores.values_NC, expected, rtol=0, atol=1e-6)
    assert len(np.unique(expected[:, 0])) > 30  # the rows could be told apart


def test_rows_that_were_not_read_are_measured_nowhere() -> None:
    """Scores and labels of the others, side by side in their order."""
    scores = Scores(np.arange(8, dtype=np.float32).reshape(4, 2), np.array([True, False, True, True]))
    labels = np.array([[True, False], [True, True], [False, True], [False, False]])
    values, kept = scores.beside(labels)
    assert values.tolist() == [[0, 1], [4, 5], [6, 7]]
    assert kept.tolist() == [[True, False], [False, True], [False, False]]


@pytest.mark.parametrize(
    ("count", "rows", "limit", "refused"),
    [
        (0, 90, 0.0, False),
        (1, 90, 0.0, True),
        (1, 90, 0.001, True),
        (9, 90, 0.1, False),  # a limit is what may be, not the first that may not
        (10, 90, 0.1, True),
        (90, 90, 1.0, False),
        (549, 549_488, 0.001, False),
        (550, 549_488, 0.001, True),
    ],
)
def test_more_bad_rows_than_the_limit_are_refused(count: int, rows: int, limit: float, refused: bool) -> None:
    if not refused:
        check_bad_rows(count, rows, limit, SoloComm())
        return
    message = f"{count} of {rows} rows could not be read, more than data.max_bad_fraction={limit}: run `adagc verify`"
    with pytest.raises(ValueError, match=message):
        check_bad_rows(count, rows, limit, SoloComm())


def score_with_losses(comm: Comm, config: Config, lost: list[int]) -> Scores:
    """Of a reader whose batches have lost these rows."""
    torch.set_num_threads(1)
    shards = Shards.open(config)
    scorer = make_scorer(shards, shards.table("test"), shards.pixels(CPU), comm=comm, device=CPU)
    loader = scorer._loader

    class Losing:
        def read(self, slots: Any, staged: Any) -> Iterator[Batch]:
            for found in loader.read(slots, staged):
                yield replace(found, failed=np.isin(found.rows, lost))

    scorer._loader = Losing()
    return scorer.score(student(config))


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_lost_rows_are_marked_in_their_place_on_every_rank(tiny_shards: Path, world_size: int) -> None:
    """In blocks of any rank, at their ends, and in the short last one; the scores of the others stay."""
    config = tiny_config(tiny_shards, Path("run"), "run.eval_block=16", "data.max_bad_fraction=0.1")
    for scores in run_ranks(world_size, score_with_losses, config, [0, 15, 16, 39]):
        assert np.flatnonzero(~scores.read_N).tolist() == [0, 15, 16, 39]
        assert scores.values_NC.shape == (40, 19)
        assert len(np.unique(scores.values_NC[scores.read_N, 0])) > 30


def refusal(comm: Comm, config: Config, lost: list[int]) -> str:
    try:
        score_with_losses(comm, config, lost)
    except (ValueError, PeerError) as error:
        return f"{type(error).__name__}: {error}"
    return ""


def test_lost_rows_are_counted_over_all_ranks_and_every_rank_stops(tiny_shards: Path) -> None:
    """Each of the two ranks has lost fewer than the limit."""
    config = tiny_config(tiny_shards, Path("run"), "run.eval_block=16", "data.max_bad_fraction=0.1")
    told = run_ranks(2, refusal, config, [0, 15, 16, 31, 39])
    assert told[0].startswith("ValueError: 5 of 40 rows could not be read, more than data.max_bad_fraction=0.1")
    assert told[1].startswith("PeerError: rank 0 failed: ")  # one of them tells it


class Enough(Exception):
    """Ends a scoring."""


def count_blocks(comm: Comm, config: Config, ends_after: int) -> tuple[int, bool]:
    """How often a rank was asked after a block, and whether that ended it."""
    torch.set_num_threads(1)
    shards = Shards.open(config)
    scorer = make_scorer(shards, shards.table("test"), shards.pixels(CPU), comm=comm, device=CPU)
    calls = 0

    def after_block() -> None:
        nonlocal calls
        calls += 1
        assert comm.all_gather_object(calls) == [calls] * comm.world_size  # a collective, as the trainer's is
        if calls == ends_after:
            raise Enough

    try:
        scorer.score(student(config), after_block=after_block)
    except Enough:
        return calls, True
    return calls, False


@pytest.mark.parametrize(("world_size", "rounds"), [(1, 3), (2, 2), (3, 1), (5, 1)])
def test_every_rank_is_asked_after_each_round_also_those_that_had_no_block(
    tiny_shards: Path, world_size: int, rounds: int
) -> None:
    """40 rows are three blocks of 16."""
    config = tiny_config(tiny_shards, Path("run"), "run.eval_block=16")
    assert run_ranks(world_size, count_blocks, config, 0) == [(rounds, False)] * world_size


def test_a_scoring_may_be_ended_after_a_block_on_all_ranks(tiny_shards: Path) -> None:
    config = tiny_config(tiny_shards, Path("run"), "run.eval_block=8")
    assert run_ranks(2, count_blocks, config, 2) == [(2, True)] * 2
