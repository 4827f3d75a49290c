"""Native bands -> the student's input, on the device: augmentation, resampling, normalisation.

Patches travel at native size (160,000 bytes instead of 691,200 as float32 at 120 x 120, DESIGN decision 8), so the
symmetries are applied to the small tensors first: bilinear resampling without aligned corners commutes with them.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from sharding.reader import BandGroup

__all__ = ["Pixels", "symmetry"]


class Pixels(nn.Module):
    """Groups of bands at native size -> float32 [B, D, size, size], bands in the order asked for, mean 0 and deviation
    1 each.

    Args:
        groups: what the reader delivers.
        bands: D names, in the student's order.
        statistics: mean and standard deviation per band name, in digital numbers.
        size: output side in pixels.
    """

    def __init__(
        self,
        groups: Sequence[BandGroup],
        bands: Sequence[str],
        *,
        statistics: Mapping[str, tuple[float, float]],
        size: int,
    ) -> None:
        super().__init__()
        read_order = [band for group in groups for band in group.bands]
        mean = torch.tensor([statistics[band][0] for band in bands])
        # a constant band stays constant: DN steps are 1
        std = torch.tensor([statistics[band][1] for band in bands]).clamp_min(1.0)
        self._size = size
        self._in_order = read_order == list(bands)
        order = torch.tensor([read_order.index(band) for band in bands])
        self.register_buffer("order_D", order, persistent=False)
        self.register_buffer("scale_D", 1.0 / std, persistent=False)
        self.register_buffer("shift_D", -mean / std, persistent=False)

    def forward(self, groups: Sequence[Tensor], codes_B: NDArray[np.int64] | None = None) -> Tensor:
        """[B, planes, h, w] per group, in the shards' dtype; ``codes_B`` (0..7, on the host) names each patch's
        symmetry, None leaves patches as they are.
        """
        if codes_B is not None:
            groups = symmetry(groups, codes_B)
        resampled = [self._resample(group.to(torch.float32)) for group in groups]
        images = torch.cat(resampled, dim=1)
        if not self._in_order:
            images = images.index_select(1, self.get_buffer("order_D"))
        scale, shift = self.get_buffer("scale_D"), self.get_buffer("shift_D")
        return images.mul_(scale[:, None, None]).add_(shift[:, None, None])

    def _resample(self, images: Tensor) -> Tensor:
        if images.shape[-1] == self._size:
            return images
        return F.interpolate(
            images, size=(self._size, self._size), mode="bilinear", align_corners=False, antialias=False
        )


def symmetry(groups: Sequence[Tensor], codes_B: NDArray[np.int64]) -> list[Tensor]:
    """Each patch under one of the eight symmetries of the square: bit 0 flips columns, bit 1 flips rows, bit 2
    transposes.

    Seen from above, a patch has no preferred direction, so all eight are equally likely views. The codes are known on
    the host: nothing waits for the device. Values are only moved, hence the view of uint16 as int16, which every
    operation knows.
    """
    device = groups[0].device
    found = [(code, torch.from_numpy(np.flatnonzero(codes_B == code))) for code in range(8)]
    members = [(code, index.to(device, non_blocking=True)) for code, index in found if len(index)]
    results = []
    for group in groups:
        source = group.view(torch.int16) if group.dtype == torch.uint16 else group
        result = torch.empty_like(source)
        for code, index in members:
            result.index_copy_(0, index, _transform(source.index_select(0, index), code))
        results.append(result.view(group.dtype))
    return results


def _transform(images: Tensor, code: int) -> Tensor:
    axes = [axis for bit, axis in ((1, -1), (2, -2)) if code & bit]
    images = images.flip(axes) if axes else images
    return images.transpose(-1, -2) if code & 4 else images
