"""Losses: binary cross-entropy (BCE) and gradient calibration (GC).

Every loss here returns one value per sample, the mean over the C classes; the sum over samples and the division by the
global number of rows are the method's (DESIGN decision 3). BCE and GC are reduced alike, so the weight between them
means the same for any C.

**The sign.** With p = sigmoid(z) and pseudo-label t, gradient calibration is the per-entry form of early-learning
regularisation (ELR, Liu et al., NeurIPS 2020, arXiv 2007.00151; multi-label form in arXiv 2601.08446), restricted to
unobserved entries::

    L = L_BCE + gc_weight * L_GC        L_GC = 1/C sum_c mask_c log(1 - p_c t_c)  <= 0
    C dL/dz_c = (p_c - y_c) - gc_weight * mask_c * t_c p_c (1 - p_c) / (1 - p_c t_c)

L_GC is ADDED with a positive weight, although its value is negative: its gradient is what takes back the push p that
assume-negative BCE exerts on a missing positive. Subtracting it (as "-log(1 - p t)" invites to) would strengthen that
push. The total may be negative.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = [
    "COMBINATIONS",
    "MAX_PSEUDO",
    "bce_B",
    "calibration_B",
    "combine_pseudo_labels",
    "mask_unobserved",
    "wide",
]

COMBINATIONS = ("mean", "max", "product")
MAX_PSEUDO = 1 - 1e-4  # log(1 - p t) is bounded below by log(1e-4) only because t stays below 1


def bce_B(logits_BC: Tensor, targets_BC: Tensor) -> Tensor:
    """[B]: mean over classes of -y log p - (1 - y) log(1 - p), p = sigmoid(z); at least float32, also under autocast.

    Args:
        logits_BC: z, any float dtype.
        targets_BC: y in [0, 1]: observed labels (bool or float), or mixed ones.

    Raises:
        ValueError: the shapes differ.
    """
    _require_same_shape(logits_BC, targets=targets_BC)
    with torch.autocast(logits_BC.device.type, enabled=False):
        z_BC = wide(logits_BC)
        return F.binary_cross_entropy_with_logits(z_BC, targets_BC.to(z_BC.dtype), reduction="none").mean(dim=1)


def calibration_B(logits_BC: Tensor, pseudo_BC: Tensor, mask_BC: Tensor) -> Tensor:
    """[B]: mean over classes of mask * log(1 - p t), at most 0 (to rounding); to be ADDED with a positive weight.

    Evaluated as logaddexp(log(1 - p), log p + log(1 - t)) from the logits, in at least float32 also under autocast, so
    that value and gradient stay finite and accurate for saturated logits. No gradient flows into t. Entries with t = 0
    give exactly 0 in both.

    Args:
        logits_BC: z, any float dtype.
        pseudo_BC: t in [0, 1]; values above ``MAX_PSEUDO`` count as that.
        mask_BC: 1 where the entry takes part, 0 where not, or between (``mask_unobserved`` of mixed labels).

    Raises:
        ValueError: the shapes differ.
    """
    _require_same_shape(logits_BC, pseudo=pseudo_BC, mask=mask_BC)
    with torch.autocast(logits_BC.device.type, enabled=False):
        z_BC = wide(logits_BC)
        t_BC = wide(pseudo_BC.detach()).clamp(max=MAX_PSEUDO)
        log_BC = torch.logaddexp(F.logsigmoid(-z_BC), F.logsigmoid(z_BC) + torch.log1p(-t_BC))
        # at t = 0 the terms cancel only to rounding; the factor makes an absent pseudo-label exactly assume-negative
        return (wide(mask_BC) * (t_BC > 0) * log_BC).mean(dim=1)


def mask_unobserved(observed_BC: Tensor) -> Tensor:
    """[B, C] float: 1 - y, one where the label is unobserved; soft for mixed labels (1(y = 0) without Mixup)."""
    return 1 - wide(observed_BC)


@torch.no_grad()
def combine_pseudo_labels(
    teacher_BC: Tensor,
    ema_BC: Tensor,
    *,
    combine: str,
    teacher_weight: float,
    threshold: float,
    observed_BC: Tensor,
) -> Tensor:
    """[B, C] pseudo-labels t in [0, 1], at least float32, without gradient.

    Args:
        teacher_BC: the EMA teacher's probabilities pT for the un-mixed images.
        ema_BC: the moving average pS of the student's own probabilities for the same rows.
        combine: "mean" w pT + (1 - w) pS; "product" pT^w pS^(1 - w), the weighted geometric mean (precise: both must
            agree); "max" the larger (complete: one suffices), which ignores w.
        teacher_weight: w in [0, 1]; 1 is the teacher alone, 0 the moving average alone.
        threshold: t below it becomes 0; 0 is off.
        observed_BC: observed labels before Mixup (bool, or float where > 0 is observed); there t = 1. Masked by its own
            row, it still counts after Mixup, where the mask is soft.

    Raises:
        ValueError: unknown ``combine``, weight or threshold outside [0, 1], or different shapes.
    """
    _require_same_shape(teacher_BC, ema=ema_BC, observed=observed_BC)
    for name, value in (("teacher_weight", teacher_weight), ("threshold", threshold)):
        if not 0 <= value <= 1:
            raise ValueError(f"{name}={value} is outside [0, 1]: pseudo-labels are combined from probabilities")
    combined_BC = _combine(wide(teacher_BC), wide(ema_BC), combine=combine, teacher_weight=teacher_weight)
    kept_BC = torch.where(combined_BC < threshold, torch.zeros_like(combined_BC), combined_BC)
    return torch.where(observed_BC > 0, torch.ones_like(kept_BC), kept_BC)


def wide(x: Tensor) -> Tensor:
    """Half precision, bool and integers as float32; float64 stays, so that finite differences can check gradients."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _combine(teacher_BC: Tensor, ema_BC: Tensor, *, combine: str, teacher_weight: float) -> Tensor:
    if combine == "mean":
        return teacher_weight * teacher_BC + (1 - teacher_weight) * ema_BC
    if combine == "product":
        return teacher_BC.pow(teacher_weight) * ema_BC.pow(1 - teacher_weight)
    if combine == "max":
        return torch.maximum(teacher_BC, ema_BC)
    raise ValueError(f"combine={combine!r} is unknown: one of {', '.join(COMBINATIONS)}")


def _require_same_shape(reference_BC: Tensor, **others: Tensor) -> None:
    """Broadcasting [B] against [B, C] would give a number, and a wrong one."""
    for name, tensor in others.items():
        if reference_BC.ndim != 2 or tensor.shape != reference_BC.shape:
            raise ValueError(
                f"{name} has shape {tuple(tensor.shape)} beside {tuple(reference_BC.shape)}: give both as one [B, C]"
            )
