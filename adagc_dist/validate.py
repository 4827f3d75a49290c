"""The teacher on the validation split: its mAP against the noisy labels decides, its mAP against the true ones is only
looked at.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np
from numpy.typing import NDArray
from torch import nn

from adagc_dist.comm import Comm
from adagc_dist.metrics import bootstrap_map, macro_map
from adagc_dist.predict import Scores, SplitScorer

__all__ = ["Validation", "Validator"]


@dataclass(frozen=True)
class Validation:
    """One model on the validation split.

    Attributes:
        noisy_map: macro mAP against the observed labels; with ``replicates``, the only thing a decision may use.
        replicates: paired bootstrap replicates of it.
        true_map: macro mAP against the full labels, for the log.
    """

    noisy_map: float
    replicates: Sequence[float]
    true_map: float


class Validator:
    """Scores models on the validation split and measures them on rank 0."""

    def __init__(
        self,
        scorer: SplitScorer,
        *,
        observed_NC: NDArray[np.bool_],
        labels_NC: NDArray[np.bool_],
        comm: Comm,
        seed: int,
    ) -> None:
        self._scorer, self._observed_NC, self._labels_NC, self._comm, self._seed = (
            scorer,
            observed_NC,
            labels_NC,
            comm,
            seed,
        )

    def measure(self, model: nn.Module, *, after_block: Callable[[], None] = lambda: None) -> Validation:
        """Collective: the same Validation on every rank, computed on rank 0 (DESIGN decision 9).

        Args:
            after_block: called after each block of rows, equally often on every rank; may end the validation by
                raising.

        Raises:
            ValueError: the model's scores are not finite: training has diverged.
        """
        scores = self._scorer.score(model, after_block=after_block)
        if not np.isfinite(scores.values_NC).all():
            raise ValueError(
                "the model's scores are not finite: training has diverged. Lower optim.lr, or set optim.clip_norm"
            )

        on_rank_0 = self._metrics(scores) if self._comm.rank == 0 else None
        return cast(Validation, self._comm.broadcast_object(on_rank_0))

    def _metrics(self, scores: Scores) -> Validation:
        replicates = bootstrap_map(scores.values_NC, self._observed_NC, seed=self._seed, kept_N=scores.read_N)
        return Validation(
            noisy_map=macro_map(*scores.beside(self._observed_NC)),
            replicates=replicates.tolist(),
            true_map=macro_map(*scores.beside(self._labels_NC)),
        )
