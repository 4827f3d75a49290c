"""The baselines against their formulas, written down once more in float64 numpy; their gradients, range and special
cases; and that those which look at the whole micro-batch do so on any number of ranks.
"""

import dataclasses
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args, get_type_hints

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from adagc_dist.comm import Comm, SoloComm
from adagc_dist.config import Config, DataConfig, MethodConfig, OptimConfig, RunConfig
from adagc_dist.feed import TrainingBatch
from adagc_dist.methods import Losses, Phase, make_method
from adagc_dist.methods.table import BASELINES, VARIANTS, method_settings
from adagc_dist.teacher import EmaTeacher
from launch.engines.ddp import DdpEngine
from launch.recipe import describe_keys, dump_config, load_config
from sharding.rng import hashed_uniform
from tests.ranks import run_threads
from tests.test_training import assert_trained, lines_of, refused, status_of
from tests.tiny import Owners, tiny_settings

CPU = torch.device("cpu")
Array = NDArray[np.float64]
B, C, GLOBAL, EPOCHS = 7, 5, 23, 10
KAPPA = {name: {"expected_positives": 2.3} for name in ("epr", "role")}  # what has no default
ENTRYWISE = ("an", "an_ls", "wan", "em", "gr", "hill", "splc", "focal", "asl")


# The formulas: per entry, mean over rows and classes


def log_p(z: Array) -> Array:
    return -np.logaddexp(0, -z)


def sigmoid(z: Array) -> Array:
    return np.exp(log_p(z))


def an(z: Array, y: Array, epoch: int) -> Array:
    return np.where(y > 0, -log_p(z), -log_p(-z))


def an_ls(z: Array, y: Array, epoch: int) -> Array:
    positive, negative = -0.9 * log_p(z) - 0.1 * log_p(-z), -0.9 * log_p(-z) - 0.1 * log_p(z)
    return np.where(y > 0, positive, negative)


def wan(z: Array, y: Array, epoch: int) -> Array:
    return np.where(y > 0, -log_p(z), -log_p(-z) / (C - 1))


def em(z: Array, y: Array, epoch: int) -> Array:
    p = sigmoid(z)
    return np.where(y > 0, -log_p(z), -0.1 * (-p * log_p(z) - (1 - p) * log_p(-z)))


def gr(z: Array, y: Array, epoch: int, held: Array | None = None) -> Array:
    """``held``: the logits that the weights are taken from, where those are not differentiated."""
    p, e, fixed = sigmoid(z), epoch + 1, sigmoid(z if held is None else held)
    w, b = 2 * (e - 1) / EPOCHS, -2
    mu, sigma = 0.5 + 0.3 * e / EPOCHS, 2 - 1.5 * e / EPOCHS
    k, v = 1 / (1 + np.exp(-(w * fixed + b))), np.exp(-((fixed - mu) ** 2) / (2 * sigma**2))
    return np.where(y > 0, -log_p(z), v * (k * (1 - p**0.01) / 0.01 + (1 - k) * p))


def hill(z: Array, y: Array, epoch: int) -> Array:
    p, q = sigmoid(z), sigmoid(z - 1)
    return np.where(y > 0, -((1 - q) ** 2) * np.log(q), (1.5 - p) * p**2)


def splc(z: Array, y: Array, epoch: int) -> Array:
    p, q = sigmoid(z), sigmoid(z - 1)
    as_positive, as_negative = -((1 - p) ** 2) * np.log(p), -(p**2) * np.log(1 - p)
    unobserved = np.where((p > 0.6) & (epoch >= 1), as_positive, as_negative)
    return np.where(y > 0, -((1 - q) ** 2) * np.log(q), unobserved)


def focal(z: Array, y: Array, epoch: int) -> Array:
    p = sigmoid(np.where(y > 0, z, -z))
    return -((1 - p) ** 2) * np.log(p)


def asl(z: Array, y: Array, epoch: int) -> Array:
    p = sigmoid(z)
    shifted = np.maximum(p - 0.05, 0)
    return np.where(y > 0, -(1 - p) * np.log(p), -(shifted**4) * np.log(1 - shifted))


def largest(z: Array, y: Array, k: int) -> NDArray[np.bool_]:
    """The k largest losses among the unobserved: by loss, then row, then class."""
    places = sorted((-an(z, y, 0)[place], *place) for place in np.ndindex(z.shape) if y[place] == 0)
    found = np.zeros(z.shape, dtype=bool)
    for _, row, column in places[:k]:
        found[row, column] = True
    return found


def ll_r(z: Array, y: Array, epoch: int) -> Array:
    return np.where(largest(z, y, int(np.ceil(0.005 * epoch * z.size))), 0, an(z, y, 0))


def ll_ct(z: Array, y: Array, epoch: int) -> Array:
    return np.where(largest(z, y, int(np.ceil(0.002 * epoch * z.size))), -log_p(z), an(z, y, 0))


def ll_cp(z: Array, y: Array, epoch: int) -> Array:
    """Of rows whose labels are still the observed ones."""
    return np.where(largest(z, y, int(np.ceil(0.001 * min(epoch, 1) * z.size))), -log_p(z), an(z, y, 0))


def excess(p: Array) -> float:
    return float(((p.sum(1).mean() - 2.3) / C) ** 2)


def epr(z: Array, y: Array, epoch: int) -> Array:
    return np.where(y > 0, -log_p(z), 0) + excess(sigmoid(z))


def role_start(y: Array) -> Array:
    """Theta of rows 0, 1, ... before they were read."""
    entries = np.arange(y.size, dtype=np.uint64).reshape(y.shape)
    spread = np.log(0.6 / 0.4) * (2 * hashed_uniform(entries, 0, "role") - 1)
    return np.where(y > 0, np.log(0.995 / 0.005), spread).astype(np.float32).astype(np.float64)


def role_side(z: Array, target: Array, y: Array) -> Array:
    return -y * log_p(z) - target * log_p(z) - (1 - target) * log_p(-z) + excess(sigmoid(z))


def role(z: Array, y: Array, epoch: int, held: Array | None = None) -> Array:
    """``held``: the logits that the estimates are compared with, where those are not differentiated."""
    theta = role_start(y)
    return (role_side(z, sigmoid(theta), y) + role_side(theta, sigmoid(z if held is None else held), y)) / 2


def em_apl(z: Array, y: Array, epoch: int) -> Array:
    """Of rows without soft labels."""
    return em(z, y, epoch)


def softmax(z: Array, y: Array, epoch: int) -> Array:
    """A mean over rows, not over classes."""
    return C * -y * np.log(np.exp(z) / np.exp(z).sum(1, keepdims=True))


FORMULAS: dict[str, Callable[..., Array]] = {
    function.__name__: function
    for function in (an, an_ls, wan, em, gr, hill, splc, focal, asl, ll_r, ll_ct, ll_cp, epr, role, em_apl, softmax)
}


# Parts


class Logits(nn.Module):
    """A student whose logits are its weights, one row for each number that the images hold."""

    def __init__(self, logits_NC: Tensor) -> None:
        super().__init__()
        self.table = nn.Parameter(logits_NC.clone())

    def forward(self, images: Tensor) -> Tensor:
        return self.table[images[:, 0, 0, 0].long()]


class WideEngine(DdpEngine):
    """Logits as the student has them: float64, for finite differences."""

    def forward(self, images: Tensor) -> Tensor:
        return self._logits(images)


def settings(name: str, kwargs: dict[str, Any] | None = None, **optim: Any) -> Config:
    numbers = KAPPA.get(name, {}) | (kwargs or {})
    method, optim = MethodConfig(name=name, kwargs=numbers), {"epochs": EPOCHS} | optim  # type: ignore[arg-type]
    return Config(data=DataConfig(shards="s"), run=RunConfig(dir="r"), method=method, optim=OptimConfig(**optim))


@dataclasses.dataclass
class Made:
    method: Any
    table: nn.Parameter

    def step(self, batch: TrainingBatch) -> tuple[Losses, Tensor]:
        """The losses of one micro-batch and the gradient for all rows' logits."""
        losses = self.method.losses(batch, Phase.WARMUP)
        losses.total.backward()
        assert self.table.grad is not None
        gradient, self.table.grad = self.table.grad.clone(), None
        return losses, gradient


def make(config: Config, logits_NC: Tensor, *, comm: Comm | None = None, max_rows: int = B) -> Made:
    student = Logits(logits_NC)
    engine = WideEngine(student, config, comm=SoloComm(), device=CPU)  # gradients stay with each rank
    method = make_method(
        config, engine=engine, teacher=EmaTeacher(student, momentum=0.9), comm=comm or SoloComm(),
        num_rows=len(logits_NC), num_classes=logits_NC.shape[1], max_rows=max_rows,
    )  # fmt: skip
    if method.store is not None:
        everything = np.arange(len(logits_NC), dtype=np.int32)  # of any rank: nothing is traded here
        method.store.home(Owners((everything,) * (comm.world_size if comm else 1)))
    return Made(method, student.table)


def batch_of(
    rows: list[int], observed_NC: Tensor, *, lost: tuple[int, ...] = (), num_global: int = GLOBAL
) -> TrainingBatch:
    """``rows`` of the split, of which ``lost`` could not be read."""
    read = torch.tensor([row not in lost for row in rows])
    return TrainingBatch(
        rows=np.array(rows, dtype=np.int32),
        images=torch.tensor(rows).float().view(-1, 1, 1, 1),
        observed_BC=observed_NC[rows],
        labels_BC=observed_NC[rows] > 0,
        mate_B=torch.arange(len(rows)),
        lambda_B=torch.ones(len(rows)),
        num_global=num_global,
        read_B=read if lost else None,
    )


def example(seed: int = 0, *, rows: int = B, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Logits and single positives of ``rows`` rows."""
    generator = torch.Generator().manual_seed(seed)
    logits_NC = 2.5 * torch.randn(rows, C, generator=generator, dtype=torch.float64)
    observed_NC = torch.zeros(rows, C)
    observed_NC[torch.arange(rows), torch.randint(C, (rows,), generator=generator)] = 1
    return logits_NC.to(dtype), observed_NC


def doubles(tensor: Tensor) -> Array:
    array: Array = tensor.detach().double().numpy()
    return array


def step_of(name: str, logits: Tensor, observed: Tensor, epoch: int = 0, **kwargs: Any) -> tuple[Losses, Tensor]:
    config = settings(name, kwargs)
    made = make(config, logits, max_rows=len(logits) + 2)
    made.method.configure(config.method, epoch)
    return made.step(batch_of(list(range(len(logits))), observed))


# Formulas, gradients, range


@pytest.mark.parametrize("epoch", [0, 1, 7])
@pytest.mark.parametrize("name", FORMULAS)
def test_the_loss_is_the_formula_and_its_gradient_the_finite_difference(name: str, epoch: int) -> None:
    logits, observed = example(epoch)
    losses, gradient = step_of(name, logits, observed, epoch)
    z, y = doubles(logits), doubles(observed)

    def total(at: Array) -> float:
        held = {"held": z} if name in ("gr", "role") else {}
        return float(FORMULAS[name](at, y, epoch, **held).sum() / (C * GLOBAL))

    assert losses.total.item() == pytest.approx(total(z), rel=1e-12)
    assert (losses.bce + losses.gc).item() == pytest.approx(total(z), rel=1e-12)
    assert losses.total.dtype == torch.float64
    for place in np.ndindex(z.shape):
        nudge = np.zeros_like(z)
        nudge[place] = 1e-5
        slope = (total(z + nudge) - total(z - nudge)) / 2e-5
        assert gradient[place].item() == pytest.approx(slope, rel=1e-6, abs=1e-10)


def slopes(p: Array, name: str) -> Array:
    """d/dz on unobserved labels, in closed form (adagc_dist/methods, the docstrings)."""
    shifted = np.maximum(p - 0.05, 0)
    return {
        "an": p,
        "an_ls": p - 0.1,
        "wan": p / (C - 1),
        "em": 0.1 * p * (1 - p) * np.log(p / (1 - p)),
        "hill": (3 * p - 3 * p**2) * p * (1 - p),
        "focal": p**2 * (p - 2 * (1 - p) * np.log(1 - p)),
        "asl": p * (1 - p) * shifted**3 * (shifted / (1 - shifted) - 4 * np.log(1 - shifted)),
        "gr": np.exp(-((p - 0.53) ** 2) / (2 * 1.85**2))
        * (-sigmoid(np.array(-2.0)) * p**0.01 * (1 - p) + sigmoid(np.array(2.0)) * p * (1 - p)),
    }[name]


@pytest.mark.parametrize("name", ["an", "an_ls", "wan", "em", "hill", "focal", "asl", "gr"])
def test_the_slope_on_unobserved_labels_has_its_closed_form(name: str) -> None:
    logits, observed = example(4)
    _, gradient = step_of(name, logits, observed)
    expected = slopes(sigmoid(doubles(logits)), name) / (C * GLOBAL)
    hidden = observed.numpy() == 0
    np.testing.assert_allclose(doubles(gradient)[hidden], expected[hidden], rtol=1e-9, atol=1e-15)


@pytest.mark.parametrize("autocast", [False, True], ids=["plain", "bf16 autocast"])
@pytest.mark.parametrize("name", BASELINES)
def test_loss_and_gradient_are_finite_for_saturated_logits(name: str, autocast: bool) -> None:
    sizes = torch.tensor([-100.0, -30.0, -17.0, -1e-4, 0.0, 17.0, 30.0, 89.0, 100.0])
    for dtype in (torch.float32, torch.bfloat16) if autocast else (torch.float32,):
        for epoch, kwargs in (
            (0, {}),
            (9, {}),
            (9, {"gamma_neg": 0.5, "clip": 0}),
            (9, {"gamma_neg": 0.5, "clip": 0.5}),
        ):
            if kwargs and name != "asl":
                continue
            for observed in (torch.zeros(9, C), torch.ones(9, C), torch.eye(9, C)):
                with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                    losses, gradient = step_of(name, sizes[:, None].repeat(1, C).to(dtype), observed, epoch, **kwargs)
                assert losses.total.dtype == torch.float32
                assert losses.total.isfinite()
                assert gradient.isfinite().all()


def test_half_precision_costs_no_more_than_the_rounding_of_the_logits() -> None:
    logits, observed = example(1, dtype=torch.bfloat16)
    for name in FORMULAS:
        with torch.autocast("cpu", torch.bfloat16):
            rounded, _ = step_of(name, logits, observed, 5)
        exact, _ = step_of(name, logits.double(), observed, 5)
        assert rounded.total.item() == pytest.approx(exact.total.item(), rel=1e-5)


class NoWaiting(TorchDispatchMode):
    """Refuses what makes the host wait for a device: reading a value, or a shape that depends on values."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func.overloadpacket is torch.ops.aten.index:  # of integers it is not
            assert not any(index is not None and index.dtype == torch.bool for index in args[1]), func
        else:
            assert not set(func.tags) & {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}, func
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", BASELINES)
def test_a_step_never_waits_for_the_device(name: str) -> None:
    logits, observed = example(9, dtype=torch.float32)
    config = settings(name)
    made, batch = make(config, logits), batch_of(list(range(B)), observed, lost=(2,))
    made.method.configure(config.method, 7)
    with NoWaiting():
        made.step(batch)
        with pytest.raises(AssertionError):
            logits.sum().item()


# Special cases


@pytest.mark.parametrize(
    ("name", "kwargs", "epoch"),
    [
        ("an_ls", {"epsilon": 0}, 0),
        ("wan", {"gamma": 1}, 0),
        ("ll_r", {"delta_rel": 0}, 7),
        ("ll_ct", {"delta_rel": 0}, 7),
        ("ll_cp", {"delta_rel": 0}, 7),
        ("ll_r", {}, 0),  # not in the first epoch
        ("ll_ct", {}, 0),
        ("ll_cp", {}, 0),
        ("focal", {"gamma": 0}, 0),
        ("asl", {"gamma_neg": 0, "gamma_pos": 0, "clip": 0}, 0),
        ("splc", {"gamma": 0, "margin": 0, "tau": 1}, 3),
        ("elr", {"weight": 0}, 0),
        ("sat", {}, 0),  # in its warm-up
        ("sat", {"momentum": 1}, 7),
    ],
    ids=str,
)
def test_what_is_assume_negative_in_the_end(name: str, kwargs: dict[str, float], epoch: int) -> None:
    logits, observed = example(2)
    found, gradient = step_of(name, logits.float(), observed, epoch, **kwargs)
    expected, expected_gradient = step_of("an", logits.float(), observed)
    assert found.total.item() == pytest.approx(expected.total.item(), rel=1e-6)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-5, atol=1e-9)
    if name in ("an_ls", "wan", "ll_r", "ll_ct", "ll_cp", "elr", "sat"):  # the very same arithmetic
        assert torch.equal(found.total, expected.total)


def test_asl_forgets_unobserved_labels_below_its_margin() -> None:
    logits, observed = torch.logit(torch.tensor([[0.01, 0.04, 0.3, 0.9, 0.99]])), torch.zeros(1, C)
    for gamma in (0, 0.5, 4):
        losses, gradient = step_of("asl", logits, observed, gamma_neg=gamma, clip=0.05)
        assert (gradient[0] > 0).tolist() == [False, False, True, True, True]
        shifted = np.maximum(sigmoid(doubles(logits)) - 0.05, 0)
        expected = -(shifted**gamma * np.log(1 - shifted)).sum() / (C * GLOBAL)
        assert losses.total.item() == pytest.approx(expected, rel=1e-5)


def test_splc_recovers_what_it_scores_high_only_after_its_first_epochs() -> None:
    logits, observed = torch.full((1, C), 3.0), torch.zeros(1, C)
    slope = [step_of("splc", logits, observed, epoch, change_epoch=2)[1][0, 0].item() for epoch in (0, 1, 2, 3)]
    assert slope[0] == slope[1] > 0 > slope[2] == slope[3]


def test_sorting_out_takes_exactly_k_where_losses_are_equal_by_row_and_class() -> None:
    logits, observed = torch.zeros(4, C), torch.eye(4, C)
    _, gradient = step_of("ll_r", logits, observed, 8, delta_rel=100 * 3 / 20 / 8)  # k = 3
    left_out = (gradient == 0).nonzero().tolist()
    assert left_out == [[0, 1], [0, 2], [0, 3]]


def test_more_than_there_is_is_left_out_to_the_last_and_no_observed_label() -> None:
    logits, observed = example(3)
    losses, gradient = step_of("ll_r", logits, observed, 9, delta_rel=100)
    z, y = doubles(logits), doubles(observed)
    assert losses.total.item() == pytest.approx(float((y * -log_p(z)).sum()) / (C * GLOBAL))
    assert ((gradient != 0) == (observed > 0)).all()


# Values per sample


@pytest.mark.parametrize("name", ["elr", "sat"])
def test_averages_over_epochs_are_the_recurrence(name: str) -> None:
    """Three epochs with other logits each, and a row that could not be read in the second."""
    config = settings(name, {"warmup_epochs": 1} if name == "sat" else {})
    logits, observed = example(5)
    made = make(config, logits)
    state = np.zeros((B, C)) if name == "elr" else doubles(observed)
    for epoch in range(3):
        made.method.configure(config.method, epoch)
        with torch.no_grad():
            made.table.copy_(example(10 + epoch)[0])
        z, y = doubles(made.table), doubles(observed)
        p, read = sigmoid(z), np.arange(B) != (3 if epoch == 1 else -1)
        losses, gradient = made.step(batch_of(list(range(B)), observed, lost=(3,) if epoch == 1 else ()))
        if name == "elr":
            state = np.where(read[:, None], 0.7 * state + 0.3 * p, state)
            entries = an(z, y, 0) + 3 * np.log(1 - p * state)
            slope = p - y - 3 * state * p * (1 - p) / (1 - p * state)
            assert losses.gc.item() < 0
        else:
            state = np.where(read[:, None], 0.9 * state + 0.1 * p, state) if epoch >= 1 else state
            entries, slope = -state * log_p(z) - (1 - state) * log_p(-z), p - state
        assert losses.total.item() == pytest.approx((entries * read[:, None]).sum() / (C * GLOBAL), rel=1e-6)
        np.testing.assert_allclose(doubles(gradient), slope * read[:, None] / (C * GLOBAL), rtol=1e-5, atol=1e-8)
        np.testing.assert_allclose(doubles(made.method.store.values), state, atol=1e-6)
    assert made.method.store.visits.tolist() == [2 if row == 3 else 3 for row in range(B)]


def test_a_row_that_is_first_read_after_the_warm_up_begins_at_its_observed_labels() -> None:
    config = settings("sat", {"warmup_epochs": 0})
    logits, observed = example(6)
    made = make(config, logits)
    made.step(batch_of(list(range(B)), observed))
    expected = 0.9 * doubles(observed) + 0.1 * sigmoid(doubles(logits))
    np.testing.assert_allclose(doubles(made.method.store.values), expected, atol=1e-6)


# On several ranks


@pytest.mark.parametrize("lost", [(), (4,), (0, 1, 2)], ids=["all read", "one lost", "a rank's all lost"])
@pytest.mark.parametrize("cuts", [(0, 3, 7), (0, 2, 4, 7)], ids=["2 ranks", "3 ranks"])
@pytest.mark.parametrize("name", ["ll_r", "ll_ct", "ll_cp", "epr", "role"])
def test_ragged_ranks_have_the_loss_and_gradient_of_one(
    name: str, cuts: tuple[int, ...], lost: tuple[int, ...]
) -> None:
    logits, observed = example(7, dtype=torch.float32)
    logits[5, 1:4] = logits[2, 1:4] = 9.0  # equal ones on two ranks, of which some are taken
    observed[5], observed[2] = torch.eye(C)[0], torch.eye(C)[0]
    # k = 4 of 35, or less
    config = settings(name, {"delta_rel": 100 * 4 / 35 / (1 if name == "ll_cp" else 6)} if name[:2] == "ll" else {})

    def steps(rows: list[int], comm: Comm) -> tuple[Losses, Tensor]:
        made = make(config, logits, comm=comm, max_rows=B if comm.world_size == 1 else 4)
        made.method.configure(config.method, 6)
        return made.step(batch_of(rows, observed, lost=lost))

    alone, gradient = steps(list(range(B)), SoloComm())
    parts = run_threads(len(cuts) - 1, lambda comm: steps(list(range(cuts[comm.rank], cuts[comm.rank + 1])), comm))
    total = sum(losses.total.item() for losses, _ in parts)
    assert total == pytest.approx(alone.total.item(), rel=1e-6)
    torch.testing.assert_close(sum(part for _, part in parts), gradient, rtol=1e-6, atol=1e-9)
    assert not gradient[list(lost)].any()
    without = [row for row in range(B) if row not in lost]
    kept = make(config, logits)
    kept.method.configure(config.method, 6)
    expected, expected_gradient = kept.step(batch_of(without, observed))
    assert alone.total.item() == pytest.approx(expected.total.item(), rel=1e-6)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("name", BASELINES)
def test_a_batch_of_which_nothing_could_be_read_has_a_gradient_and_it_is_zero(name: str) -> None:
    logits, observed = example(8)
    made = make(settings(name), logits)
    losses, gradient = made.step(batch_of(list(range(B)), observed, lost=tuple(range(B))))
    assert (losses.total.item(), gradient.abs().max().item()) == (0.0, 0.0)
    assert made.method.store is None or not made.method.store.written.any()


# Configuration


def test_every_name_of_the_configuration_is_a_method_and_help_tells_its_numbers() -> None:
    names = get_args(get_type_hints(MethodConfig)["name"])
    assert sorted(names) == sorted(["adagc", *VARIANTS, *BASELINES])
    told = " ".join(describe_keys().split())
    keys = told[told.index("method.kwargs ") :]
    for name, kind in {**BASELINES, **VARIANTS}.items():
        assert re.search(rf"\b{name}\b", told)
        for field in dataclasses.fields(kind):
            assert re.search(rf"\b{field.name}\b", keys), f"--help does not tell {field.name} of {name}"


@pytest.mark.parametrize("name", BASELINES)
def test_baselines_do_not_calibrate(name: str) -> None:
    made = make(settings(name), example()[0])
    assert not made.method.calibrates
    assert (made.method.store is not None) == (name in ("elr", "sat", "role", "em_apl", "ll_cp"))


def test_numbers_come_from_the_command_line_and_are_written_back(tmp_path: Path) -> None:
    overrides = [
        "data.shards=s",
        "run.dir=r",
        "method.name=asl",
        "method.kwargs.clip=1e-2",
        "method.kwargs.gamma_neg=2",
    ]
    config = load_config(None, overrides)
    found = method_settings(config.method)
    assert (found.clip, found.gamma_neg, found.gamma_pos) == (0.01, 2.0, 1.0)
    (tmp_path / "config.yaml").write_text(dump_config(config))
    assert load_config(tmp_path / "config.yaml") == config


@pytest.mark.parametrize(
    ("name", "kwargs", "message"),
    [
        ("an_ls", {"epsilo": 0.2}, r"unknown key method\.kwargs\.epsilo: did you mean method\.kwargs\.epsilon\?"),
        ("an_ls", {"zzz": 0.2}, r"unknown key method\.kwargs\.zzz: method\.name=an_ls has epsilon$"),
        ("an", {"epsilon": 0.2}, r"unknown key method\.kwargs\.epsilon: method\.name=an has no kwargs"),
        ("adagc", {"gc_weigth": 2}, r"unknown key method\.kwargs\.gc_weigth: did you mean method\.gc_weight\?"),
        ("an_ls", {"epsilon": "much"}, r"method\.kwargs\.epsilon=much must be a number"),
        ("an_ls", {"epsilon": None}, r"method\.kwargs\.epsilon=None must be a number"),
        ("an_ls", {"epsilon": True}, r"method\.kwargs\.epsilon=True must be a number"),
        ("an_ls", {"epsilon": [1]}, r"method\.kwargs\.epsilon=\[1\] must be a number"),
        ("an_ls", {"epsilon": 2}, r"method\.kwargs\.epsilon=2\.0 must lie in \[0, 1\]"),
        ("an_ls", {"epsilon": float("nan")}, r"method\.kwargs\.epsilon=nan must lie in \[0, 1\]"),
        ("focal", {"gamma": -1}, r"method\.kwargs\.gamma=-1\.0 must not be negative"),
        ("sat", {"warmup_epochs": 2.5}, r"method\.kwargs\.warmup_epochs=2\.5 must be a whole number"),
        ("ll_r", {"delta_rel": 101}, r"method\.kwargs\.delta_rel=101\.0 must lie in \[0, 100\]"),
        ("gr", {"q2": 0}, r"method\.kwargs\.q2=0\.0 must be positive"),
        ("em_apl", {"share": 1.5}, r"method\.kwargs\.share=1\.5 must lie in \[0, 1\]"),
        ("role", {"lr_factor": 5}, r"method\.name=role needs method\.kwargs\.expected_positives"),
        ("softmax", {"gamma": 1}, r"unknown key method\.kwargs\.gamma: method\.name=softmax has no kwargs"),
        ("epr", {}, r"method\.name=epr needs method\.kwargs\.expected_positives"),
    ],
    ids=str,
)
def test_numbers_that_cannot_be_are_refused_by_name(name: str, kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        method_settings(MethodConfig(name=name, kwargs=kwargs))  # type: ignore[arg-type]


# Whole runs


@pytest.mark.parametrize(
    "overrides",
    [
        ["method.name=asl", "method.kwargs.gamma_neg=2"],
        ["method.name=ll_r", "method.kwargs.delta_rel=5", "optim.accumulation=2"],
        ["method.name=epr", "method.kwargs.expected_positives=2.5"],
        ["method.name=sat", "method.kwargs.warmup_epochs=1"],
    ],
    ids=lambda overrides: overrides[0],
)
def test_a_whole_run(tiny_shards: Path, tmp_path: Path, overrides: list[str]) -> None:
    run = tmp_path / "run"
    assert_trained("demo", tiny_settings(tiny_shards, run, "optim.epochs=2", "detector.rule=never", *overrides))
    assert status_of(run)["state"] == "finished"
    lines = lines_of(run)
    assert [line["phase"] for line in lines] == ["warmup", "warmup"]
    assert lines[1]["loss/bce"] < lines[0]["loss/bce"]
    assert ("ema/movement" in lines[1]) == ("method.name=sat" in overrides)


def test_a_run_with_a_wrong_number_is_refused_and_leaves_no_folder(tiny_shards: Path, tmp_path: Path) -> None:
    told = refused(tiny_settings(tiny_shards, tmp_path / "run", "method.name=an_ls", "method.kwargs.epsilo=1"))
    assert "unknown key method.kwargs.epsilo: did you mean method.kwargs.epsilon?" in told
    assert not (tmp_path / "run").exists()
