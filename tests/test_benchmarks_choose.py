"""What is chosen by noisy labels, from a results.csv."""

from pathlib import Path
from typing import Any

import pytest

from adagc_dist.config import Config, DataConfig, MethodConfig, OptimConfig, RunConfig
from tests.benchmarks.choose import choose, main
from tuning.fingerprint import settings_of
from tuning.grid import load_grid

GRID = Path(__file__).parent / "benchmarks/results/search/grid.yaml"


def row(method: str, seed: int, auc: float | None, score: float, lr: float = 0.001) -> dict[str, Any]:
    config = Config(
        data=DataConfig(shards="s"), run=RunConfig(dir="r"), method=MethodConfig(name="em"), optim=OptimConfig(lr=lr)
    )
    return {
        "setting": "random", "method": method, "seed": seed, "noisy_auc": auc, "map": score,
        "settings": settings_of(config),
    }  # fmt: skip


ROWS = [
    row("em-1", 0, 0.7, 0.9), row("em-1", 1, 0.6, 0.7),
    row("em-2", 0, 0.9, 0.6, lr=0.002), row("em-2", 1, 0.5, 0.8, lr=0.002),
    row("an_ls-1", 0, 0.1, 0.2),
]  # fmt: skip


def test_the_mean_over_seeds_of_the_noisy_auc_chooses_and_true_labels_tell_what_it_cost() -> None:
    em, other = choose(ROWS)
    assert (em.method, em.trial, em.trials) == ("em", 2, 2)
    assert (em.noisy_auc, em.true_map, em.best_map) == pytest.approx((0.7, 0.7, 0.8))
    assert em.settings["optim.lr"] == 0.002
    assert (other.method, other.trial, other.settings.get("optim.lr")) == ("an_ls", 1, None)


@pytest.mark.parametrize(
    ("rows", "told"),
    [
        ([row("em", 0, 0.1, 0.1)], "em is no trial"),
        ([row("em-1", 0, None, 0.1)], "has no noisy_auc"),
        ([*ROWS, row("em-3", 0, 0.1, 0.1)], "different seeds"),
    ],
)
def test_what_cannot_be_compared_is_told(rows: list[dict[str, Any]], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        choose(rows)


def test_a_file_that_is_none_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path / "none.csv")]) == 2
    assert "none.csv" in capsys.readouterr().err


def test_the_search_has_as_many_trials_of_each_method() -> None:
    grid = load_grid(str(GRID), [])
    trials = [name.rpartition("-")[0] for name in grid.methods]
    assert {trials.count(name) for name in trials} == {4}
    assert len({*trials}) == 12
