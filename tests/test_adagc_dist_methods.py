"""The methods' losses against the formulas in float64, and what a step may not touch."""

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from adagc_dist.comm import SoloComm
from adagc_dist.config import Config, DataConfig, MethodConfig, RunConfig
from adagc_dist.feed import TrainingBatch
from adagc_dist.methods import Phase, make_method
from adagc_dist.methods.adagc import AdaGC
from adagc_dist.methods.adagc_levels import AdaGCLevels
from adagc_dist.teacher import EmaTeacher
from adagc_dist.views import make_view
from launch.engines.ddp import DdpEngine
from tests.tiny import Owners

CPU = torch.device("cpu")
B, C, GLOBAL = 6, 4, 20
ROWS = np.array([4, 9, 0, 7, 3, 1], dtype=np.int32)


def random(*shape: int, seed: int) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def batch(lambdas: Tensor | None = None) -> TrainingBatch:
    observed = torch.zeros(B, C)
    observed[torch.arange(B), torch.arange(B) % C] = 1
    return TrainingBatch(
        rows=ROWS,
        images=random(B, 3, 8, 8, seed=1) * 4 - 2,
        observed_BC=observed,
        labels_BC=(observed > 0) | (random(B, C, seed=2) > 0.6),
        mate_B=torch.tensor([1, 0, 3, 2, 5, 4]),
        lambda_B=random(3, seed=3).repeat_interleave(2) / 2 + 0.5 if lambdas is None else lambdas,
        num_global=GLOBAL,
    )


def parts(**settings: Any) -> tuple[Any, DdpEngine, EmaTeacher]:
    """A method on a small student with BatchNorm, so that its mode can be told from its output."""
    torch.manual_seed(0)
    student = nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(24, C)
    )
    config = Config(data=DataConfig(shards="s"), run=RunConfig(dir="r"), method=MethodConfig(**settings))
    engine = DdpEngine(student, config, comm=SoloComm(), device=CPU)
    teacher = EmaTeacher(student, momentum=0.9)
    with torch.no_grad():
        for parameter in teacher.model.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape))
    method = make_method(
        config, engine=engine, teacher=teacher, comm=SoloComm(), num_rows=12, num_classes=C, max_rows=B
    )
    if method.store is not None:
        method.store.home(Owners((np.arange(12, dtype=np.int32),)))
    return method, engine, teacher


def bce(p: np.ndarray, y: np.ndarray) -> float:
    return float((-y * np.log(p) - (1 - y) * np.log(1 - p)).sum() / (C * GLOBAL))


def numpy_of(tensor: Tensor) -> np.ndarray:
    return tensor.detach().double().numpy()


def training_output(engine: DdpEngine, images: Tensor) -> np.ndarray:
    return numpy_of(engine.forward(images).sigmoid())


def clean(model: nn.Module, images: Tensor) -> np.ndarray:
    with torch.no_grad():
        return numpy_of(model.eval()(images).sigmoid())


def state_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def test_assume_negative_is_cross_entropy_with_the_observed_labels() -> None:
    method, engine, _ = parts(name="an")
    losses = method.losses(batch(), Phase.WARMUP)
    expected = bce(training_output(engine, batch().images), numpy_of(batch().observed_BC))
    assert losses.total.item() == pytest.approx(expected, rel=1e-5)
    assert (losses.bce.item(), losses.gc.item()) == (pytest.approx(expected, rel=1e-5), 0.0)
    assert (method.calibrates, method.store, losses.pseudo_counts) == (False, None, None)
    assert losses.total.requires_grad
    assert not losses.bce.requires_grad


def test_the_warm_up_is_assume_negative_and_keeps_the_averages() -> None:
    method, engine, _ = parts()
    losses = method.losses(batch(), Phase.WARMUP)
    p = training_output(engine, batch().images)
    assert losses.total.item() == pytest.approx(bce(p, numpy_of(batch().observed_BC)), rel=1e-5)
    assert losses.gc.item() == 0.0
    np.testing.assert_allclose(method.store.values[ROWS], p, atol=1e-6)
    assert method.store.visits.tolist() == [1 if row in ROWS else 0 for row in range(12)]


@pytest.mark.parametrize(("threshold", "averages_of"), [(0.0, "student"), (0.55, "student"), (0.0, "teacher")])
@pytest.mark.parametrize("mixed", [True, False])
def test_the_calibrated_loss_is_the_formula(mixed: bool, threshold: float, averages_of: str) -> None:
    method, engine, teacher = parts(
        mixup_alpha=1.0 if mixed else 0.0, gc_weight=2.5, teacher_weight=0.3, pseudo_threshold=threshold,
        averages_of=averages_of,
    )  # fmt: skip
    given = batch() if mixed else batch(torch.ones(B))
    old = random(12, C, seed=5)
    marks = torch.full((12,), 1 << 14, dtype=torch.int16)
    method.store.load_state({"rows": torch.arange(12, dtype=torch.int32), "values": old, "marks": marks})
    student = clean(engine.student, given.images) if mixed else None
    losses = method.losses(given, Phase.CALIBRATION)

    x, y, lam, mate = given.images, numpy_of(given.observed_BC), numpy_of(given.lambda_B)[:, None], given.mate_B.numpy()
    p_own = student if student is not None else training_output(engine, x)
    if averages_of == "teacher":
        p_own = clean(teacher.model, x)
    average = 0.9 * numpy_of(old)[ROWS] + 0.1 * p_own
    t = 0.3 * clean(teacher.model, x) + 0.7 * average
    t = np.where(y > 0, 1.0, np.where(t < threshold, 0.0, t))
    x_mixed = given.lambda_B[:, None, None, None] * x + (1 - given.lambda_B[:, None, None, None]) * x[mate]
    y_mixed, t_mixed = lam * y + (1 - lam) * y[mate], lam * t + (1 - lam) * t[mate]
    p = training_output(engine, x_mixed)
    gc = 2.5 * float(((1 - y_mixed) * np.log(1 - p * np.minimum(t_mixed, 1 - 1e-4))).sum() / (C * GLOBAL))
    assert losses.bce.item() == pytest.approx(bce(p, y_mixed), rel=1e-5)
    assert losses.gc.item() == pytest.approx(gc, rel=1e-5)
    assert losses.total.item() == pytest.approx(bce(p, y_mixed) + gc, rel=1e-5)
    assert gc < -0.01
    averages = method.store.values[method.store.locate(ROWS)]
    np.testing.assert_allclose(averages, average, atol=1e-6)  # of the un-mixed images
    hidden = y == 0
    positive, true = (t >= max(threshold, 0.5)) & hidden, given.labels_BC.numpy() & hidden
    counts = [count.sum(axis=0).tolist() for count in (positive, positive & true, true)]
    assert losses.pseudo_counts.tolist() == counts


@pytest.mark.parametrize("alpha", [0.0, 1.0])
def test_one_step_moves_the_statistics_once_and_the_teacher_not_at_all(alpha: float) -> None:
    """The clean passes of student and teacher run in eval mode."""
    method, engine, teacher = parts(mixup_alpha=alpha)
    before, taught = state_of(engine.student), state_of(teacher.model)
    method.losses(batch(), Phase.CALIBRATION).total.backward()
    assert engine.student[1].num_batches_tracked == before["1.num_batches_tracked"] + 1
    assert engine.student.training
    for name, tensor in teacher.model.state_dict().items():
        assert torch.equal(tensor, taught[name])
    assert all(parameter.grad is None for parameter in teacher.model.parameters())


@pytest.mark.parametrize(("averages_of", "passes"), [("student", ["clean", "mixed"]), ("teacher", ["mixed"])])
def test_averages_of_the_teacher_cost_no_pass_of_the_student(averages_of: str, passes: list[str]) -> None:
    method, engine, _ = parts(averages_of=averages_of)
    seen: list[str] = []
    engine.student.register_forward_hook(lambda model, *_: seen.append("mixed" if model.training else "clean"))
    method.losses(batch(), Phase.CALIBRATION)
    assert seen == passes


def test_no_gradient_flows_through_the_pseudo_labels() -> None:
    """With weight 0 the calibrated gradient is that of cross-entropy, with its averages and teacher at work or not."""
    gradients = []
    for settings, phase in (({"gc_weight": 0.0, "mixup_alpha": 0.0}, Phase.CALIBRATION), ({}, Phase.WARMUP)):
        method, engine, _ = parts(**settings)
        method.losses(batch(), phase).total.backward()
        gradients.append([parameter.grad for parameter in engine.student.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients))


def test_losses_are_local_sums_over_the_global_count() -> None:
    """The loss of a batch is the sum of the losses of its parts: so accumulation and ranks add up to the whole."""
    whole_method, engine, _ = parts(mixup_alpha=0.0)
    engine.student[1] = nn.GroupNorm(1, 6)  # BatchNorm would see other batches
    whole = whole_method.losses(batch(), Phase.CALIBRATION).total.item()
    method, engine, _ = parts(mixup_alpha=0.0)
    engine.student[1] = nn.GroupNorm(1, 6)
    full, sums = batch(), 0.0
    for part in (slice(0, 2), slice(2, 6)):
        piece = TrainingBatch(
            rows=full.rows[part], images=full.images[part], observed_BC=full.observed_BC[part],
            labels_BC=full.labels_BC[part], mate_B=torch.arange(part.stop - part.start),
            lambda_B=full.lambda_B[part], num_global=GLOBAL,
        )  # fmt: skip
        sums += method.losses(piece, Phase.CALIBRATION).total.item()
    assert math.isclose(sums, whole, rel_tol=1e-5)


@pytest.mark.parametrize(
    "settings",
    [{}, {"gc_weight": 2.0, "mixup_alpha": 0.5, "pseudo_threshold": 0.9, "teacher_weight": 0.2, "combine": "max"}],
)
@pytest.mark.parametrize("view", ["quarters", "whole"])
def test_with_levels_the_loss_is_cross_entropy_without_what_reaches_its_classes_level(
    view: str, settings: dict[str, Any]
) -> None:
    method, engine, teacher = parts(
        name="adagc_levels", kwargs={"quantile": 0.4, "quarters": int(view == "quarters")}, **settings
    )
    assert (method.calibrates, method.level_quantile, method.views) == (True, 0.4, view)
    given = batch()
    p, y = training_output(engine, given.images), numpy_of(given.observed_BC)
    with torch.no_grad():
        t = numpy_of(make_view(view)(teacher.model.eval(), given.images).sigmoid())
    levels = np.float32([*np.quantile(t, 0.5, axis=0)[:-1], 2.0])  # of the last class none was seen
    method.accept_from(levels.tolist())
    losses = method.losses(given, Phase.CALIBRATION)

    left = (t >= levels) & (y == 0)
    assert 3 < left.sum() < 12
    assert not left[:, -1].any()
    assert losses.total.item() == pytest.approx(bce(np.where(left, 1e-9, p), y), rel=1e-3)  # t is at most 1 - 1e-4
    assert losses.bce.item() == pytest.approx(bce(p, y), rel=1e-5)
    assert losses.pseudo_counts[0].tolist() == left.sum(axis=0).tolist()
    np.testing.assert_allclose(method.store.values[method.store.locate(ROWS)], t, atol=1e-6)


def test_a_label_that_is_left_out_has_no_gradient() -> None:
    method, engine, _ = parts(name="adagc_levels")
    given = replace(batch(), observed_BC=torch.zeros(B, C))
    method.accept_from([2.0, 2.0, 2.0, 0.0])  # of the last class all are left out
    method.losses(given, Phase.CALIBRATION).total.backward()
    biases = engine.student[-1].bias.grad.abs()
    assert biases[3] < 1e-3 * biases[:3].min()


def test_names_choose_methods() -> None:
    assert type(parts(name="adagc")[0]) is AdaGC
    assert type(parts(name="adagc_levels")[0]) is AdaGCLevels
    assert parts(name="adagc")[0].calibrates
    assert parts(name="adagc")[0].level_quantile is None


# Rows that could not be read


def without(full: TrainingBatch, lost: list[int]) -> TrainingBatch:
    """The batch as if these rows had never been in the step, but for its divisor; their mates mix with nothing."""
    kept = [place for place in range(B) if place not in lost]
    mate = [kept.index(place ^ 1) if place ^ 1 in kept else kept.index(place) for place in kept]
    return TrainingBatch(
        rows=full.rows[kept], images=full.images[kept], observed_BC=full.observed_BC[kept],
        labels_BC=full.labels_BC[kept], mate_B=torch.tensor(mate), lambda_B=full.lambda_B[kept], num_global=GLOBAL,
    )  # fmt: skip


def masked(full: TrainingBatch, lost: list[int]) -> TrainingBatch:
    """The batch as the feed gives it where these rows could not be read: their pixels are other rows' copies."""
    pairs = [place ^ 1 for place in lost] + lost
    images, lambda_B = full.images.clone(), full.lambda_B.clone()
    images[lost] = full.images[lost].flip(2) * 3
    lambda_B[pairs] = 1.0
    read_B = torch.tensor([place not in lost for place in range(B)])
    return replace(full, images=images, lambda_B=lambda_B, read_B=read_B)


@pytest.mark.parametrize("lost", [[2], [0, 1], [1, 4, 5], [0, 2, 4]], ids=str)
@pytest.mark.parametrize(
    ("settings", "phase"),
    [
        ({"name": "an"}, Phase.WARMUP),
        ({}, Phase.WARMUP),
        ({"mixup_alpha": 1.0}, Phase.CALIBRATION),
        ({"mixup_alpha": 0.0}, Phase.CALIBRATION),
    ],
    ids=str,
)
def test_a_row_that_could_not_be_read_is_in_no_loss_gradient_average_or_count(
    settings: dict[str, Any], phase: Phase, lost: list[int]
) -> None:
    """All are those of the batch without it, over the same divisor. For students without BatchNorm: its statistics are
    of all rows of a batch.
    """
    found = []
    for given in (masked(batch(), lost), without(batch(), lost)):
        method, engine, teacher = parts(**settings)
        for model in (engine.student, teacher.model):
            model[1] = nn.GroupNorm(1, 6)
        if method.store is not None:
            old = {"rows": torch.arange(12, dtype=torch.int32), "values": random(12, C, seed=5)}
            method.store.load_state(old | {"marks": torch.full((12,), 1 << 14, dtype=torch.int16)})
        losses = method.losses(given, phase)
        losses.total.backward()
        state = {} if method.store is None else method.store.state()
        gradients = [parameter.grad for parameter in engine.student.parameters()]
        found.append((losses, gradients, {name: tensor.clone() for name, tensor in state.items()}))
    (losses, gradients, state), (expected, expected_gradients, expected_state) = found
    assert losses.total.item() == pytest.approx(expected.total.item(), rel=1e-5)
    assert losses.bce.item() == pytest.approx(expected.bce.item(), rel=1e-5)
    assert losses.gc.item() == pytest.approx(expected.gc.item(), rel=1e-5)
    for gradient, other in zip(gradients, expected_gradients):
        torch.testing.assert_close(gradient, other, rtol=1e-4, atol=1e-7)
    assert max(gradient.abs().max().item() for gradient in expected_gradients) > 1e-3
    for name, tensor in state.items():
        torch.testing.assert_close(tensor, expected_state[name], rtol=1e-6, atol=1e-7)
    if losses.pseudo_counts is not None:
        assert losses.pseudo_counts.tolist() == expected.pseudo_counts.tolist()


def test_a_batch_of_which_nothing_could_be_read_moves_no_weight() -> None:
    """Its gradient is zero, and is there: ranks that wait for it in an all-reduce get it."""
    for phase in Phase:
        method, engine, _ = parts()
        losses = method.losses(masked(batch(), list(range(B))), phase)
        losses.total.backward()
        assert losses.total.item() == 0.0
        assert all(p.grad is not None and p.grad.abs().max() == 0 for p in engine.student.parameters())
        assert not method.store.written.any()
