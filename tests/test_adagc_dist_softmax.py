"""The model of a single random draw: what its logits mean, and that this is so wherever a model is scored."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

from adagc_dist.comm import SoloComm
from adagc_dist.config import Config
from adagc_dist.metrics import average_precision_C
from adagc_dist.model import create_student
from adagc_dist.scores import draw_probabilities, to_probabilities
from launch import evaluate as evaluation
from launch import predict as prediction
from launch import recover as recovery
from launch.build import make_scorer
from launch.data import Shards
from launch.recipe import dump_config
from sharding.images import RGB
from tests.test_adagc_dist_baselines import GLOBAL, C, doubles, step_of
from tests.tiny import tiny_config

CPU = torch.device("cpu")


def logits_of(seed: int = 0, *, rows: int = 40, classes: int = 7) -> Tensor:
    return 3 * torch.randn(rows, classes, generator=torch.Generator().manual_seed(seed))


def test_a_score_is_the_chance_of_the_class_times_the_number_of_labels() -> None:
    logits = logits_of().double()
    q = np.exp(doubles(logits)) / np.exp(doubles(logits)).sum(1, keepdims=True)
    s = q * np.exp(-(q * np.log(q)).sum(1, keepdims=True))
    assert s.max() > 1.05
    found = doubles(draw_probabilities(logits))
    np.testing.assert_allclose(found, s / (1 + s), rtol=1e-12)
    assert (np.argsort(found, axis=0) == np.argsort(s, axis=0)).all()
    assert 0 <= found.min() < 0.1 < 0.5 < found.max() <= 1


@pytest.mark.parametrize("present", [1, 2, 5])
def test_labels_that_are_equally_likely_to_be_drawn_score_a_half(present: int) -> None:
    """k labels, each drawn with chance 1 / k: s = 1 for them, and 0 for the others. One-hot is k = 1."""
    logits = torch.full((1, 7), -200.0)
    logits[0, :present] = 31.0
    expected = [0.5] * present + [0.0] * (7 - present)
    assert draw_probabilities(logits)[0].tolist() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("size", [0.0, 1e-3, 30.0, 100.0, 1e4])
def test_scores_are_finite_for_any_logits(size: float) -> None:
    found = draw_probabilities(size * logits_of())
    assert found.isfinite().all()
    assert found.min() >= 0
    assert found.max() <= 1


def test_every_other_method_has_one_chance_a_label() -> None:
    logits = logits_of()
    assert torch.equal(to_probabilities("softmax")(logits), draw_probabilities(logits))
    for name in ("adagc", "an", "role"):
        assert torch.equal(to_probabilities(name)(logits), logits.sigmoid())


def test_of_several_observed_labels_the_mean_is_taken_and_a_row_without_one_has_no_loss() -> None:
    logits = logits_of(1, rows=3, classes=C).double()
    observed = torch.tensor([[1.0, 0, 1, 1, 0], [0, 0, 0, 0, 0], [0, 1, 0, 0, 0]])
    losses, gradient = step_of("softmax", logits, observed)
    log_q = doubles(logits.log_softmax(1))
    expected = -(log_q[0, [0, 2, 3]].mean() + log_q[2, 1]) / GLOBAL
    assert losses.total.item() == pytest.approx(expected, rel=1e-12)
    assert not gradient[1].any()
    chance = doubles(observed) / np.maximum(1, doubles(observed).sum(1, keepdims=True))
    np.testing.assert_allclose(doubles(gradient)[[0, 2]], ((np.exp(log_q) - chance) / GLOBAL)[[0, 2]], atol=1e-15)


def save_run(run: Path, config: Config, data: dict[str, Any]) -> nn.Module:
    """What is left of a finished run; its teacher is as it was made, so that its logits are known."""
    teacher = create_student(config.model, num_bands=len(data["bands"]), num_classes=len(data["classes"]), seed=3)
    run.mkdir()
    (run / "config.yaml").write_text(dump_config(config))
    save_file(teacher.state_dict(), run / "teacher.safetensors", {key: json.dumps(data[key]) for key in data})
    return teacher


def written_in(table: Path, classes: Sequence[str]) -> Tensor:
    return torch.from_numpy(pd.read_csv(table)[[f"teacher/{name}" for name in classes]].to_numpy(np.float32))


def test_runs_are_validated_evaluated_and_recovered_by_these_scores(tiny_shards: Path, tmp_path: Path) -> None:
    run, out = tmp_path / "run", tmp_path / "labels.csv"
    config, plain = (tiny_config(tiny_shards, run, f"method.name={name}") for name in ("softmax", "an"))
    shards = Shards.open(config)
    teacher = save_run(run, config, shards.identity())
    table, pixels = shards.table("validation"), shards.pixels(CPU)
    ours, logits = (
        make_scorer(replace(shards, config=settings), table, pixels, comm=SoloComm(), device=CPU).score(teacher)
        for settings in (config, plain)
    )
    expected = draw_probabilities(torch.from_numpy(logits.values_NC).logit())
    torch.testing.assert_close(torch.from_numpy(ours.values_NC), expected, rtol=1e-4, atol=1e-6)
    assert recovery.main([str(run), "--out", str(out), "--split", "validation"]) == 0
    torch.testing.assert_close(written_in(out, shards.manifest.classes), expected, rtol=1e-4, atol=1e-6)
    assert evaluation.main([str(run), "--split", "validation"]) == 0
    measured = json.loads((run / "metrics.json").read_text())["validation"]["per_class"]
    ap_C = average_precision_C(ours.values_NC, table.labels_NC)
    assert [entry["ap"] for entry in measured] == pytest.approx(ap_C.tolist())


def test_predictions_for_new_images_are_these_scores(tmp_path: Path) -> None:
    run, images, out = tmp_path / "run", tmp_path / "images", tmp_path / "labels.csv"
    images.mkdir()
    values = np.random.default_rng(0).integers(0, 255, (2, 32, 32, 3)).astype(np.uint8)
    for number, pixels in enumerate(values):
        Image.fromarray(pixels).save(images / f"image_{number}.png")
    config = tiny_config(tmp_path / "elsewhere", run, "method.name=softmax")
    data = {"classes": ["a", "b", "c"], "bands": list(RGB), "statistics": {band: [0.0, 255.0] for band in RGB}}
    teacher = save_run(run, config, data)
    assert prediction.main([str(run), "--images", str(images), "--out", str(out), "--threshold", "0.5"]) == 0
    with torch.no_grad():
        logits = teacher.eval()(torch.from_numpy(values).permute(0, 3, 1, 2) / 255)
    torch.testing.assert_close(written_in(out, data["classes"]), draw_probabilities(logits), rtol=1e-4, atol=1e-6)
