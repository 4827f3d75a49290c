"""Scores of a whole split: the same digits on any number of ranks, each row in its place."""

from pathlib import Path

import numpy as np
import pytest
import torch

from adagc_dist.comm import Comm
from adagc_dist.config import Config
from adagc_dist.model import create_student
from adagc_dist.predict import Scores
from launch.build import make_scorer
from launch.data import Shards
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
