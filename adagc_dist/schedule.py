"""The learning rate, as a pure function of the step and of when the trigger came (DESIGN decision 11)."""

from math import cos, pi

__all__ = ["learning_rate"]


def learning_rate(step: int, *, peak: float, warmup_steps: int, total_steps: int, decay_from: int | None) -> float:
    """Linear to ``peak`` over ``warmup_steps``, constant until ``decay_from``, then half a cosine that reaches 0 after
    the last step.

    Constant before the trigger: a decaying rate makes the noisy mAP creep up to the last epoch, and the detector would
    never fire.

    Args:
        step: from 0, over the whole run.
        decay_from: the first step of the decay, or None as long as it is not known.
    """
    rate = peak * min(1.0, (step + 1) / (warmup_steps + 1))
    if decay_from is None or step < decay_from:
        return rate
    done = (step - decay_from) / max(1, total_steps - decay_from)
    return rate * 0.5 * (1.0 + cos(pi * min(1.0, done)))
