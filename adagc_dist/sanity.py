"""Are the ranks still one model? What must be equal is compared, what must be finite is looked at."""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from adagc_dist.comm import Comm, first_error_everywhere

__all__ = ["check_sanity"]

_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def check_sanity(models: Mapping[str, Mapping[str, Tensor]], comm: Comm, step: int) -> None:
    """Every tensor of every model is finite, and has the same bits on all ranks.

    Collective: 16 bytes a tensor are gathered; reads each tensor twice. The bits are compared by their sum, so that one
    changed value is always found.

    Args:
        models: e.g. {"student": its state_dict, "teacher": its state_dict}.

    Raises:
        ValueError: the message names the first tensor, how many others, and the ranks.
        PeerError: the same, on the other ranks.
    """
    names = [f"{model}.{name}" for model, tensors in models.items() for name in tensors]
    prints_T = torch.stack([_fingerprint(tensor) for tensors in models.values() for tensor in tensors.values()])
    prints_RT = comm.all_gather(prints_T).cpu()
    infinite_RT, other_RT = prints_RT[..., 1] > 0, prints_RT[..., 0] != prints_RT[:1, :, 0]
    if not infinite_RT.any() and not other_RT.any():
        return
    with first_error_everywhere(comm):  # all ranks know it, one tells
        if infinite_RT.any():
            raise ValueError(
                f"step {step}: {_told(names, infinite_RT)} holds values that are not finite: training has diverged. "
                "Lower optim.lr, or set optim.clip_norm"
            )
        raise ValueError(
            f"step {step}: {_told(names, other_RT)} differs from rank 0's: the ranks no longer train one model. "
            "A rank computes wrongly (failing memory or GPU), or runs another version of the code"
        )


def _fingerprint(tensor: Tensor) -> Tensor:
    """int64 [2]: the sum of the bits as integers, and the number of values that are not finite."""
    values = tensor.detach().reshape(-1)
    bits = values.view(_BITS[values.element_size()]).sum(dtype=torch.int64)
    finite = values.isfinite().all() if values.is_floating_point() else torch.tensor(True, device=values.device)
    return torch.stack([bits, (~finite).long()])


def _told(names: Iterable[str], found_RT: Tensor) -> str:
    """The first tensor with its ranks, and the number of others."""
    wrong = [name for name, found in zip(names, found_RT.any(dim=0).tolist()) if found]
    ranks = found_RT[:, found_RT.any(dim=0).nonzero()[0, 0]].nonzero().flatten().tolist()
    others = f" (and {len(wrong) - 1} other tensors)" if len(wrong) > 1 else ""
    return f"{wrong[0]} of rank {', '.join(map(str, ranks))}{others}"
