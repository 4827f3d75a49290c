"""BatchNorm over ranks: `sync` is nn.BatchNorm of the whole step, `local` ends with equal and rightly weighted
statistics.
"""

import copy
from collections.abc import Callable, Sequence

import pytest
import torch
from timm.layers import BatchNormAct2d
from torch import Tensor, nn

from adagc_dist.batchnorm import SyncedBatchNorm, average_statistics, batchnorm_layers, synchronise
from adagc_dist.comm import Comm, SoloComm
from tests.ranks import run_ranks, run_threads

TOLERANCE = {"rtol": 1e-4, "atol": 1e-5}  # measured on values of order 1: at most 1e-6


def trained(layer: nn.Module) -> nn.Module:
    """Weights and running statistics as in mid-training."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.rand(parameter.shape, generator=generator) + 0.5)
        for buffer in layer.buffers():
            buffer.copy_(torch.rand(buffer.shape, generator=generator) + 0.5 if buffer.is_floating_point() else 7)
    return layer


def random(shape: Sequence[int], seed: int) -> Tensor:
    scale = torch.linspace(0.5, 3.0, shape[1]).view(1, -1, *[1] * (len(shape) - 2))
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale + 1.5 * scale


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


Result = tuple[Tensor, Tensor, dict[str, Tensor], dict[str, Tensor]]


def forward_backward(model: nn.Module, x: Tensor, weights: Tensor) -> Result:
    """Output, gradient of the input, of the parameters, and the state after it, for the loss sum(weights * output)."""
    x = x.clone().requires_grad_()
    output = model(x)
    (output * weights).sum().backward()
    assert x.grad is not None
    return output.detach(), x.grad, gradients(model), {name: t.clone() for name, t in model.state_dict().items()}


def compare_with_whole_batch(model: nn.Module, shape: Sequence[int], sizes: Sequence[int]) -> None:
    """``model`` on slots of ``sizes`` rows on as many ranks against the plain ``model`` on all rows."""
    x, weights = (
        random((sum(sizes), *shape), 1),
        torch.randn(sum(sizes), *shape, generator=torch.Generator().manual_seed(2)),
    )
    whole = forward_backward(copy.deepcopy(model), x, weights)
    slots = list(zip(x.split(list(sizes)), weights.split(list(sizes))))
    results = run_threads(
        len(sizes), lambda comm: forward_backward(synchronise(copy.deepcopy(model), comm), *slots[comm.rank])
    )
    torch.testing.assert_close(torch.cat([result[0] for result in results]), whole[0], **TOLERANCE)
    torch.testing.assert_close(torch.cat([result[1] for result in results]), whole[1], **TOLERANCE)
    for name, expected in whole[2].items():
        torch.testing.assert_close(
            sum(result[2][name] for result in results), expected, rtol=1e-4, atol=1e-4
        )  # measured: 5e-6
    for result in results:
        assert list(result[3]) == list(whole[3])  # state dictionaries fit both
        torch.testing.assert_close(result[3], whole[3], **TOLERANCE)
        assert all(torch.equal(result[3][name], results[0][3][name]) for name in whole[3])


LAYERS: dict[str, Callable[[], nn.Module]] = {
    "plain": lambda: nn.BatchNorm2d(5),
    "momentum": lambda: nn.BatchNorm2d(5, momentum=0.3, eps=1e-3),
    "cumulative": lambda: nn.BatchNorm2d(5, momentum=None),
    "no affine": lambda: nn.BatchNorm2d(5, affine=False),
    "activation": lambda: BatchNormAct2d(5, act_layer=nn.SiLU),
    "no statistics": lambda: nn.BatchNorm2d(5, track_running_stats=False),
}


@pytest.mark.parametrize("sizes", [(2, 2), (4, 2), (6, 4, 3), (2, 2, 2, 3)])
@pytest.mark.parametrize("name", LAYERS)
def test_synced_layers_equal_batchnorm_of_the_whole_batch(name: str, sizes: tuple[int, ...]) -> None:
    compare_with_whole_batch(nn.Sequential(trained(LAYERS[name]())), (5, 4, 3), sizes)


def test_vectors_are_normalised_too() -> None:
    compare_with_whole_batch(nn.Sequential(trained(nn.BatchNorm1d(5))), (5,), (4, 3))


def test_a_whole_network_of_them() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 6, 3, bias=False),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.Conv2d(6, 4, 3),
        BatchNormAct2d(4),
        nn.Flatten(),
    )
    x, weights = random((7, 3, 8, 8), 1), torch.randn(7, 64, generator=torch.Generator().manual_seed(2))
    whole = forward_backward(copy.deepcopy(model), x, weights)
    slots = list(zip(x.split([4, 3]), weights.split([4, 3])))
    results = run_threads(2, lambda comm: forward_backward(synchronise(copy.deepcopy(model), comm), *slots[comm.rank]))
    for name, expected in whole[2].items():
        largest = float(expected.abs().max())
        torch.testing.assert_close(
            sum(result[2][name] for result in results), expected, rtol=0, atol=1e-4 * largest + 1e-4
        )


def test_synced_layers_follow_an_untracked_start() -> None:
    """From fresh statistics (mean 0), where sums about the running mean do not help against cancellation."""
    compare_with_whole_batch(nn.Sequential(nn.BatchNorm2d(4)), (4, 6, 6), (4, 2))


@pytest.mark.parametrize("value", [0.0, 3.0, 1000.0, -77.7])
def test_a_constant_channel_stays_finite(value: float) -> None:
    def work(comm: Comm) -> Tensor:
        layer = synchronise(nn.Sequential(nn.BatchNorm2d(1)), comm)
        x = torch.full((2 + 2 * comm.rank, 1, 3, 3), value, requires_grad=True)
        output = layer(x)
        output.sum().backward()
        assert x.grad is not None
        assert torch.isfinite(x.grad).all()
        return output.detach()

    assert all(torch.isfinite(output).all() for output in run_threads(2, work))


def test_evaluation_uses_the_running_statistics_and_no_peers() -> None:
    layer = trained(BatchNormAct2d(5, act_layer=nn.ReLU)).eval()
    synced = SyncedBatchNorm(copy.deepcopy(layer), _Unreachable()).eval()
    x = random((3, 5, 4, 4), 3)
    torch.testing.assert_close(synced(x), layer(x), rtol=0, atol=0)


class _Unreachable(SoloComm):
    def all_reduce_sum(self, tensor: Tensor) -> Tensor:
        raise AssertionError("evaluation exchanged something")


def test_half_precision_input_gives_half_precision_output() -> None:
    layer = SyncedBatchNorm(trained(nn.BatchNorm2d(5)), SoloComm())
    x = random((4, 5, 4, 4), 3)
    half = layer(x.bfloat16())
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), layer(x), rtol=0.05, atol=0.05)


def test_replaced_layers_keep_their_mode_weights_and_names() -> None:
    model = nn.Sequential(nn.Conv2d(3, 5, 1), nn.BatchNorm2d(5)).eval()
    weight, names = model[1].weight, list(model.state_dict())
    synchronise(model, SoloComm())
    assert isinstance(model[1], SyncedBatchNorm)
    assert model[1].weight is weight
    assert not model[1].training
    assert list(model.state_dict()) == names


def test_a_flat_input_is_refused() -> None:
    with pytest.raises(ValueError, match=r"takes \[B, features, \.\.\.\], got shape \(5,\)"):
        SyncedBatchNorm(nn.BatchNorm1d(5), SoloComm())(torch.zeros(5))


def layers_of_rank(rank: int) -> nn.Module:
    model = nn.Sequential(nn.BatchNorm2d(3), nn.BatchNorm2d(2, track_running_stats=False), nn.BatchNorm1d(4))
    for number, buffer in enumerate(model.buffers()):
        if buffer.is_floating_point():
            buffer.copy_(torch.arange(buffer.numel()) + 10.0 * rank + number)
    return model


def averaged(comm: Comm, weights: Sequence[float]) -> list[Tensor]:
    model = layers_of_rank(comm.rank)
    average_statistics(batchnorm_layers(model), weights[comm.rank], comm)
    return list(model.buffers())


def check_averaged(results: list[list[Tensor]], weights: Sequence[float]) -> None:
    own = [list(layers_of_rank(rank).buffers()) for rank in range(len(weights))]
    for number, first in enumerate(results[0]):
        parts = [weight * buffers[number].double() for weight, buffers in zip(weights, own)]
        expected = (sum(parts) / sum(weights)) if first.is_floating_point() else own[0][number]
        torch.testing.assert_close(first.double(), expected.double(), rtol=1e-6, atol=0)
        assert all(torch.equal(buffers[number], first) for buffers in results)


@pytest.mark.parametrize("weights", [(1.0, 1.0), (6.0, 4.0, 3.0)])
def test_statistics_are_averaged_by_rows(weights: tuple[float, ...]) -> None:
    check_averaged(run_threads(len(weights), lambda comm: averaged(comm, weights)), weights)


def test_statistics_are_averaged_by_rows_on_real_ranks() -> None:
    check_averaged(run_ranks(2, averaged, (4.0, 2.0)), (4.0, 2.0))


def test_a_model_without_batchnorm_exchanges_nothing() -> None:
    model = nn.Sequential(nn.GroupNorm(1, 4), nn.BatchNorm2d(2, track_running_stats=False))
    assert batchnorm_layers(model) == []
    comm = _Unreachable()
    comm.world_size = 2
    average_statistics(batchnorm_layers(model), 1.0, comm)
