"""What a trial is judged by: a column of metrics.jsonl, larger is better.

The value is the last epoch's, that of the model which the run leaves. The best epoch's would be the largest of many
noisy figures, of weights that nobody keeps; a mean over the last ones would credit a trial with epochs that it has
overcome, while the teacher is a mean of the weights already, and the learning rate ends at 0. All trials see the same
validation images, so that much of the noise is common to them.

``python -m tests.benchmarks.objectives`` measures how each of them orders a sweep's trials: noisy_auc most like true
mAP, under random and under dominant labels; noisy_map equals it where validation has many labels, and needs more of
them, for it hangs on the few patches that are ranked first; pu_score is behind under dominant labels.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

__all__ = ["OBJECTIVES", "Objective"]


@dataclass(frozen=True)
class Objective:
    """How trials are ranked.

    Attributes:
        name: as --objective has it.
        column: of metrics.jsonl.
        text: for people.
        clean: whether it looks at true labels, which a search on noisy labels does not have.
    """

    name: str
    column: str
    text: str
    clean: bool = False

    def of(self, record: Mapping[str, Any]) -> float:
        """The value in a line of metrics.jsonl.

        Raises:
            ValueError: runs of this version do not report it.
        """
        if self.column not in record:
            raise ValueError(
                f"--objective {self.name} needs {self.column}, which the run does not report (it has "
                f"{', '.join(name for name in record if name.endswith('_teacher'))}): choose another objective"
            )
        value = record[self.column]
        return math.nan if value is None else float(value)

    def final(self, records: Sequence[Mapping[str, Any]]) -> float | None:
        """The value of the model that a run leaves; None without an epoch, or where it is not reported."""
        return self.of(records[-1]) if records and self.column in records[-1] else None


OBJECTIVES = {
    objective.name: objective
    for objective in (
        Objective("noisy_map", "map/noisy_teacher", "mAP on the observed labels of validation"),
        Objective("noisy_auc", "auc/noisy_teacher", "AUC on the observed labels of validation"),
        Objective("pu_score", "pu/noisy_teacher", "positive-unlabelled score on the observed labels of validation"),
        Objective("oracle", "map/true_teacher", "ORACLE: mAP on the TRUE labels of validation", clean=True),
    )
}
