"""The optimiser's state under ZeRO 1 and 2, by the names of the student's parameters.

ZeRO lays the parameters of each group out in one flat tensor, and cuts it into a slice per rank: a slice holds parts of
parameters, and a parameter may lie in several slices. The optimiser knows its rank's slice of each group only.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from adagc_dist.comm import Comm

__all__ = ["Partitions"]

_MOMENTS = ("exp_avg", "exp_avg_sq")


class Partitions:
    """What DeepSpeed's ZeRO optimiser of stage 1 or 2 holds, gathered and set as whole tensors."""

    def __init__(self, student: nn.Module, zero: Any, comm: Comm) -> None:
        self._zero, self._comm = zero, comm
        self._names: dict[Tensor, str] = {parameter: name for name, parameter in student.named_parameters()}

    def state(self) -> dict[str, Tensor]:
        """Collective: ``optimizer_state`` of the unpartitioned optimiser, on the host."""
        return {
            name: tensor
            for flat, values in self._zero.optimizer.state.items()
            for name, tensor in self._named(self._group_of(flat), values)
        }

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Take the weights from the student, moments and step counts from ``state``."""
        self._zero.refresh_fp32_params()  # it steps copies of the weights, and the student may have been loaded
        self._zero.optimizer.state.clear()
        self._zero._hp_optimizer_states_linked = False  # or it would hold on to the tensors of before
        for group, flat in enumerate(self._zero.single_partition_of_fp32_groups):
            steps = [state[f"{name}/step"] for name, _, _ in self._places(group) if f"{name}/step" in state]
            if steps:
                moments = {key: self._slice(group, key, state) for key in _MOMENTS}
                self._zero.optimizer.state[flat] = {"step": steps[0].to(flat.device, copy=True), **moments}

    def _named(self, group: int, values: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        """Collective: a group's state, by name."""
        # on the host: the device would have to hold what ZeRO keeps from it
        whole = {key: self._comm.all_gather(values[key]).flatten().cpu() for key in _MOMENTS}
        for name, parameter, start in self._places(group):
            for key in _MOMENTS:
                yield f"{name}/{key}", whole[key].narrow(0, start, parameter.numel()).view_as(parameter)
            yield f"{name}/step", values["step"].clone()

    def _slice(self, group: int, key: str, state: Mapping[str, Tensor]) -> Tensor:
        """What this rank holds of a group's moments; those that ``state`` lacks are 0."""
        whole = torch.zeros_like(self._zero.bit16_groups_flat[group])
        for name, parameter, start in self._places(group):
            if f"{name}/{key}" in state:
                whole.narrow(0, start, parameter.numel()).copy_(state[f"{name}/{key}"].flatten())
        return whole.chunk(self._comm.world_size)[self._comm.rank].clone()

    def _places(self, group: int) -> Iterator[tuple[str, Tensor, int]]:
        """Name, parameter and where it starts in the group's flat tensor, into which it is a view. (DeepSpeed's own
        ``_hp_mapping`` is wrong with round_robin_gradients.)
        """
        flat: Tensor = self._zero.bit16_groups_flat[group]
        for parameter in self._zero.bit16_groups[group]:
            yield self._names[parameter], parameter, (parameter.data_ptr() - flat.data_ptr()) // flat.element_size()

    def _group_of(self, flat: Tensor) -> int:
        return next(i for i, other in enumerate(self._zero.single_partition_of_fp32_groups) if other is flat)
