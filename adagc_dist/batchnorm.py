"""BatchNorm over several ranks, decided and not inherited (DESIGN decision 6).

``local``: each rank normalises by the statistics of its own slot; after the step ``average_statistics`` makes the
running statistics equal on all ranks. ``sync``: ``synchronise`` replaces the layers by ones that normalise by the whole
step's statistics, so that a step gives the same gradient on any number of ranks; torch's own SyncBatchNorm does that on
GPUs only and not through ``Comm``.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import FunctionCtx
from torch.nn.modules.batchnorm import _BatchNorm

from adagc_dist.comm import Comm

__all__ = ["SyncedBatchNorm", "average_statistics", "batchnorm_layers", "synchronise"]


def batchnorm_layers(model: nn.Module) -> list[_BatchNorm]:
    """The layers that keep running statistics, in the model's order."""
    layers = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    return [layer for layer in layers if layer.track_running_stats]


@torch.no_grad()
def average_statistics(layers: Sequence[_BatchNorm], weight: float, comm: Comm) -> None:
    """Collective: running mean and variance become their mean over ranks, weighted by ``weight`` (this rank's rows);
    one all-reduce.
    """
    if comm.world_size == 1 or not layers:
        return
    statistics = [
        tensor for layer in layers for tensor in (layer.running_mean, layer.running_var) if tensor is not None
    ]
    flat = torch.cat(
        [*(tensor.flatten() * weight for tensor in statistics), torch.full_like(statistics[0][:1], weight)]
    )
    comm.all_reduce_sum(flat)
    parts = (flat[:-1] / flat[-1]).split([tensor.numel() for tensor in statistics])  # type: ignore[no-untyped-call]
    torch._foreach_copy_(statistics, [part.view_as(tensor) for part, tensor in zip(parts, statistics)])


def synchronise(model: nn.Module, comm: Comm) -> nn.Module:
    """``model`` with every BatchNorm over 2-D feature maps replaced in place by a SyncedBatchNorm of the same weights
    and names.
    """
    for name, child in model.named_children():
        if isinstance(child, _BatchNorm):
            setattr(model, name, SyncedBatchNorm(child, comm))
        else:
            synchronise(child, comm)
    return model


class SyncedBatchNorm(_BatchNorm):
    """BatchNorm whose training statistics are those of all ranks' samples together; slots may differ in size.

    Takes over parameters, buffers and (timm's BatchNormAct2d) dropout and activation of ``source``, so state
    dictionaries fit both.
    """

    def __init__(self, source: _BatchNorm, comm: Comm) -> None:
        super().__init__(source.num_features, source.eps, source.momentum, source.affine, source.track_running_stats)
        self.weight, self.bias = source.weight, source.bias
        self.running_mean, self.running_var = source.running_mean, source.running_var
        self.num_batches_tracked = source.num_batches_tracked
        self.after = nn.Sequential(*(module for module in source.children()))  # parameter-free: dropout and activation
        self.train(source.training)
        self._comm = comm

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() < 2:
            raise ValueError(f"SyncedBatchNorm takes [B, features, ...], got shape {tuple(input.shape)}")

    def forward(self, input: Tensor) -> Tensor:
        if not self.training:
            return self.after(super().forward(input))  # type: ignore[no-any-return]
        self._check_input_dim(input)
        axes = [0, *range(2, input.dim())]
        count = input.numel() // input.shape[1]
        mean, variance, total = self._global_statistics(input.float(), axes, count)
        self._track(mean.detach(), variance.detach(), total)
        shape = [1, -1] + [1] * (input.dim() - 2)
        scale = torch.rsqrt(variance + self.eps) * (self.weight if self.affine else 1.0)
        offset = (self.bias if self.affine else 0.0) - mean * scale
        normalised = torch.addcmul(offset.view(shape), input.float(), scale.view(shape))
        return self.after(normalised.to(input.dtype))  # type: ignore[no-any-return]

    def _global_statistics(self, x: Tensor, axes: list[int], count: int) -> tuple[Tensor, Tensor, Tensor]:
        """Mean and (biased) variance per feature over all ranks, and the number of values; sums are taken about the
        running mean, which keeps the difference of squares from cancelling."""
        shift = self.running_mean.detach().clone() if self.running_mean is not None else x.new_zeros(x.shape[1])
        centred = x - shift.view([1, -1] + [1] * (x.dim() - 2))
        sums = torch.cat(
            [centred.sum(axes), centred.square().sum(axes), torch.full_like(centred.flatten()[:1], float(count))]
        )
        sums = _SumOverRanks.apply(sums, self._comm)
        total = sums[-1].detach()
        first, second = (sums[:-1] / total).chunk(2)
        return first + shift, (second - first.square()).clamp_min(0.0), total  # rounding may take a constant below 0

    @torch.no_grad()
    def _track(self, mean: Tensor, variance: Tensor, total: Tensor) -> None:
        if self.running_mean is None or self.running_var is None or self.num_batches_tracked is None:
            return
        self.num_batches_tracked.add_(1)
        rate = self.momentum if self.momentum is not None else 1.0 / float(self.num_batches_tracked)
        self.running_mean.lerp_(mean, rate)
        self.running_var.lerp_(variance * total / (total - 1), rate)  # unbiased, as torch's BatchNorm keeps it


class _SumOverRanks(Function):
    """A differentiable all-reduce: the gradient of a sum over ranks is the sum of the gradients over ranks."""

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, comm: Comm) -> Tensor:
        ctx.comm = comm  # type: ignore[attr-defined]
        return comm.all_reduce_sum(x.clone())

    @staticmethod
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.comm.all_reduce_sum(grad.clone()), None  # type: ignore[attr-defined]
