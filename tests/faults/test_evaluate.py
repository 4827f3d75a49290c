"""Validation and `adagc evaluate` over splits with bad rows: measured are the rows that were read."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from adagc_dist.comm import SoloComm
from adagc_dist.evaluate import measure_split
from adagc_dist.metrics import f1_report, fit_thresholds_C, macro_map
from adagc_dist.predict import Scores
from adagc_dist.validate import Validator
from launch.build import make_scorer
from launch.data import Shards
from launch.recipe import load_config
from launch.teacher import load_teacher
from tests.damages import (
    BAD,
    flip_rows,
)
from tests.faults.commands import (
    SKIP,
    alone,
    assert_failed_in,
    assert_trained,
    command,
    in_a_rank,
)
from tests.ranks import Ranks
from tests.test_training import lines_of

CPU = torch.device("cpu")


LOST = {"validation": [3, 17, 18, 39], "test": [0, 21], "train": [5, BAD]}


@pytest.fixture(scope="module")
def lost(tiny_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards with bad rows in each split."""
    folder = tmp_path_factory.mktemp("lost") / "shards"
    shutil.copytree(tiny_shards, folder)
    for split, rows in LOST.items():
        flip_rows(folder, rows, split)
    return folder


def scores_by_hand(run: Path, shards: Path, split: str) -> tuple[Scores, Shards]:
    """What the run's teacher says of an undamaged split; rows that are lost elsewhere are marked."""
    opened = Shards.open(load_config(run / "config.yaml", [f"data.shards={shards}"]))
    model = load_teacher(run, opened.config, comm=SoloComm(), device=CPU).model
    table = opened.table(split)
    scores = make_scorer(opened, table, opened.pixels(CPU), comm=SoloComm(), device=CPU).score(model)
    read = np.ones(len(table), dtype=np.bool_)
    read[LOST[split]] = False
    return Scores(scores.values_NC, read), opened


def test_a_skipping_run_is_validated_on_the_rows_that_were_read(lost: Path, tiny_shards: Path, tmp_path: Path) -> None:
    """The last epoch's mAP is that of the finished teacher."""
    run = tmp_path / "run"
    assert_trained(*alone(command(lost, run, *SKIP)))
    scores, shards = scores_by_hand(run, tiny_shards, "validation")
    table = shards.table("validation")
    line = lines_of(run)[-1]
    for name, labels in (("noisy", shards.observed(table)), ("true", table.labels_NC)):
        values, kept = scores.beside(labels)
        assert len(values) == 36
        assert line[f"map/{name}_teacher"] == pytest.approx(macro_map(values, kept), abs=1e-6)
        assert line[f"map/{name}_teacher"] != pytest.approx(macro_map(scores.values_NC, labels), abs=1e-4)
    thresholds_C = fit_thresholds_C(*scores.beside(shards.observed(table)))
    true_f1 = f1_report(*scores.beside(table.labels_NC), thresholds_C).macro_f1
    assert line["f1/true_teacher"] == pytest.approx(true_f1, abs=1e-6)
    assert true_f1 > 0


def test_a_skipping_evaluation_measures_the_rows_that_were_read(
    lost: Path, tiny_shards: Path, whole: Path, tmp_path: Path
) -> None:
    """Thresholds, metrics and recovery; on one rank as on two."""
    metrics = []
    for ranks in (1, 2):
        run = tmp_path / f"run{ranks}"
        shutil.copytree(whole / "whole", run)
        evaluate = ["evaluate", str(run), f"data.shards={lost}", *SKIP, "--recovered"]
        assert_trained(*(told for (told,) in Ranks(ranks, in_a_rank, [evaluate], timeout=60.0).join()))
        metrics.append(json.loads((run / "metrics.json").read_text()))
        del metrics[-1]["run"]
    assert metrics[0] == metrics[1]
    validation, shards = scores_by_hand(whole / "whole", tiny_shards, "validation")
    thresholds_C = fit_thresholds_C(*validation.beside(shards.observed(shards.table("validation"))))
    test = scores_by_hand(whole / "whole", tiny_shards, "test")[0].beside(shards.table("test").labels_NC)
    assert metrics[0]["test"] == measure_split(*test, thresholds_C, shards.manifest.classes)
    assert metrics[0]["test"]["rows"] == 38
    assert "recovered" in metrics[0]


@pytest.mark.parametrize("ranks", [1, 2])
def test_an_evaluation_stops_at_bad_rows_and_at_too_many(lost: Path, whole: Path, tmp_path: Path, ranks: int) -> None:
    """One sentence on some rank, exit code not 0 on any, no metrics.json."""
    run = tmp_path / "run"
    shutil.copytree(whole / "whole", run)
    place = rf"tiny_\d+ in {lost}/validation-00000\d\.tar at offset \d+: b10\.npy is not what"
    count = r"4 of 40 rows could not be read, more than data\.max_bad_fraction=0\.05"
    for settings_, message in (([], place), (["data.on_error=skip", "data.max_bad_fraction=0.05"], count)):
        arguments = ["evaluate", str(run), f"data.shards={lost}", *settings_]
        told = [one for (one,) in Ranks(ranks, in_a_rank, [arguments], timeout=60.0).join()]
        assert 0 not in [one.code for one in told]
        told_lines = [line for one in told for line in one.lines]
        assert re.match(rf"adagc evaluate: (rank 1: )?{message}", told_lines[0]), told_lines
        assert ranks > 1 or len(told_lines) == 1
        assert not (run / "metrics.json").exists()


def test_too_many_bad_validation_rows_stop_a_run(tiny_shards: Path, tmp_path: Path) -> None:
    """The share is that of the split they are in."""
    folder = tmp_path / "copy"
    shutil.copytree(tiny_shards, folder)
    flip_rows(folder, LOST["validation"], "validation")
    told = alone(command(folder, tmp_path / "run", "data.on_error=skip", "data.max_bad_fraction=0.05"))
    assert_failed_in(tmp_path / "run", told[0])
    assert "4 of 40 rows could not be read, more than data.max_bad_fraction=0.05" in told[0].sentence


class _Given:
    """A scorer that has scored already."""

    def __init__(self, *scores: Scores) -> None:
        self._scores = iter(scores)

    def score(self, model: object, *, after_block: object) -> Scores:
        return next(self._scores)


def test_replicates_of_two_epochs_stay_paired_where_a_row_is_lost_in_one_of_them() -> None:
    """The detector's standard error is that of a difference: what is common to both epochs has to cancel."""
    rng = np.random.default_rng(0)
    values, labels = rng.random((200, 5)).astype(np.float32), rng.random((200, 5)) < 0.3
    read = np.arange(200) != 0
    scorer = _Given(Scores(values, np.ones(200, dtype=np.bool_)), Scores(values, read))
    validator = Validator(scorer, observed_NC=labels, labels_NC=labels, comm=SoloComm(), seed=0)  # type: ignore[arg-type]
    first, second = (np.array(validator.measure(torch.nn.Identity()).replicates) for _ in range(2))
    assert np.std(first - second) < 0.3 * np.std(first)
