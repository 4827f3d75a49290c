"""The TensorBoard of a run as a cockpit: what it shows beyond the curves of step and epoch, and how these are grouped.

    Scalars         by class: AP, pseudo-labels; calibration of the teacher; quantiles of the prediction averages
    Custom scalars  all curves in groups, noisy beside true; a level line begins at the trigger
    Histograms      the prediction averages of all rows
    PR curves, Images   every ``run.panels_every`` epochs
    HParams         the settings, beside the last values of the validation's means

Everything is written by rank 0, after the validation, from what is at hand there: no pass over data is added. A step
only adds up on the device: pseudo-labels by class (``Meter``), how far the averages moved (``PredictionStore.moved``).
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from adagc_dist.buckets import STEPS, Buckets, precision_recall
from adagc_dist.comm import Comm
from adagc_dist.meter import Meter
from adagc_dist.panels import Quicklooks, draw_panel, write_captions
from adagc_dist.store import PredictionStore
from adagc_dist.tracking import Tracker
from adagc_dist.validate import Details, Validation
from sharding.manifest import LabelTable

if TYPE_CHECKING:  # importing it takes a second, and only rank 0 needs it
    from torch.utils.tensorboard import SummaryWriter

__all__ = ["Board", "begin_board", "end_board"]

_PATCHES = 8  # pictures a time
_EMA_STEPS = 100
_ROWS_AT_ONCE = 1 << 16
_QUANTILES = (50, 90, 99)

_METRICS = (
    "map/noisy_teacher", "auc/noisy_teacher", "pu/noisy_teacher", "map/true_teacher", "auc/true_teacher",
    "f1/true_teacher",
)  # fmt: skip
_SETTINGS = ("spml.", "model.", "method.", "detector.", "optim.", "data.augment", "data.bands", "data.size", "run.seed")

# Regular expressions of tags, matched from their beginning.
_CHARTS: Mapping[str, Mapping[str, Sequence[str]]] = {
    "losses": {
        "by epoch": ["epoch/loss/"],
        "by step": ["loss/"],
        "gradient norm": ["gradient_norm"],
        "learning rate": ["learning_rate"],
    },
    "validation of the teacher": {
        "mAP: noisy, true; level: since the trigger": ["map/noisy_teacher", "map/true_teacher", "map/at_trigger"],
        "F1 (true)": ["f1/"],
        "AUC: noisy, true": ["auc/"],
        "PU score (noisy)": ["pu/"],
        "calibration error: noisy, true": ["ece/"],
    },
    "classes": {"AP against noisy labels": ["ap_noisy/"], "AP against true labels": ["ap_true/"]},
    "pseudo-labels": {
        "precision and recall": ["epoch/pseudo/(precision|recall)$"],
        "precision by class": ["pseudo_precision/"],
        "recall by class": ["pseudo_recall/"],
        "count by class": ["pseudo_count/"],
    },
    "prediction averages": {
        "movement an epoch": ["epoch/ema/movement"],
        "quantiles, share from 0.5 on": ["ema/(quantile_|above_half)"],
    },
    "ranks, least and most": {
        "samples a second": ["epoch/speed/samples_per_second_(min|max)"],
        "share of time: waiting for data, for other ranks": ["epoch/speed/(data_wait|sync)_share_(min|max)"],
        "seconds until rows are home": ["epoch/speed/row_sync_seconds_"],
        "memory (GB)": ["epoch/speed/(gpu_)?memory_gb_"],
    },
}


def begin_board(writer: "SummaryWriter", settings: Mapping[str, Any]) -> None:
    """Layout and hyperparameters.

    Args:
        settings: of the configuration, ``section.key`` -> value; those of learning are taken.
    """
    from torch.utils.tensorboard.summary import hparams

    writer.add_custom_scalars({
        group: {title: ["Multiline", tags] for title, tags in charts.items()} for group, charts in _CHARTS.items()
    })  # fmt: skip
    shown = {key: _plain(value) for key, value in settings.items() if key.startswith(_SETTINGS) and value is not None}
    experiment, start, _ = hparams(shown, dict.fromkeys(_METRICS, 0.0))  # type: ignore[no-untyped-call]
    _add(writer, experiment, start)


def end_board(writer: "SummaryWriter") -> None:
    """The run of these hyperparameters has finished."""
    from torch.utils.tensorboard.summary import hparams

    *_, end = hparams({}, {})  # type: ignore[no-untyped-call]
    _add(writer, end)


@dataclass(frozen=True)
class Board:
    """What is shown of each epoch (N rows of validation, C classes).

    Attributes:
        classes: their names.
        table: of the validation split.
        observed_NC: bool, its observed labels.
        quicklooks: where pictures come from; None for none.
        is_due: whether an epoch (from 0) has pictures and precision-recall curves.
    """

    classes: Sequence[str]
    table: LabelTable
    observed_NC: NDArray[np.bool_]
    quicklooks: Quicklooks | None
    is_due: Callable[[int], bool]
    comm: Comm

    def show(
        self,
        tracker: Tracker,
        validation: Validation,
        meter: Meter,
        store: PredictionStore | None,
        *,
        epoch: int,
        step: int,
        trigger_map: float | None,
    ) -> None:
        """Collective: everything of ``epoch``, at the global ``step``; ``trigger_map`` is the noisy mAP that the
        trigger, if it has come, came at.
        """
        counts_3C = meter.class_counts()
        averages_B = None if store is None else _count_averages(store, self.comm)

        def draw(writer: "SummaryWriter") -> None:
            assert validation.details is not None, "rank 0 draws"
            if trigger_map is not None:  # an upright would need two points at one step
                writer.add_scalar("map/at_trigger", trigger_map, step)
            if averages_B is not None:
                _draw_averages(writer, averages_B, step)
            self._draw_classes(writer, counts_3C, validation.details, step)
            self._draw_buckets(writer, validation.details, step, curves=self.is_due(epoch))
            if self.is_due(epoch):
                self._draw_patches(writer, validation.details, step)

        tracker.draw(draw)

    def _draw_classes(
        self, writer: "SummaryWriter", counts_3C: NDArray[np.float64], details: Details, step: int
    ) -> None:
        positive_C, correct_C, hidden_C = counts_3C
        values = {"ap_noisy": details.noisy_ap_C, "ap_true": details.true_ap_C}
        if hidden_C.any():  # pseudo-labels were made
            values |= {
                "pseudo_precision": _share(correct_C, positive_C),
                "pseudo_recall": _share(correct_C, hidden_C),
                "pseudo_count": positive_C,
            }
        for name, values_C in values.items():
            for label, value in zip(self.classes, values_C):
                if np.isfinite(value):
                    writer.add_scalar(f"{name}/{label}", value, step)

    def _draw_buckets(self, writer: "SummaryWriter", details: Details, step: int, *, curves: bool) -> None:
        """Calibration, and the ``curves`` of precision and recall."""
        scores, observed = details.scores.beside(self.observed_NC)
        labels = self.table.labels_NC[details.scores.read_N]
        buckets = Buckets(scores)
        for name, positives_CB in (("noisy", buckets.positives_CB(observed)), ("true", buckets.positives_CB(labels))):
            writer.add_scalar(f"ece/{name}_teacher", buckets.calibration_error(positives_CB), step)
            if not curves:
                continue
            _draw_curve(writer, f"pr_micro/{name}", buckets.rows_CB.sum(axis=0), positives_CB.sum(axis=0), step)
            for label, rows_B, positives_B in zip(self.classes, buckets.rows_CB, positives_CB):
                if positives_B.any():
                    _draw_curve(writer, f"pr_{name}/{label}", rows_B, positives_B, step)

    def _draw_patches(self, writer: "SummaryWriter", details: Details, step: int) -> None:
        if self.quicklooks is None:
            return
        rows = self._most_different(details, self.quicklooks.candidates)
        for number, (row, picture) in enumerate(self.quicklooks.read(rows), start=1):
            captions = write_captions(
                self.table.keys[row].as_py(),
                self.classes,
                details.scores.values_NC[row],
                details.thresholds_C,
                self.observed_NC[row],
                self.table.labels_NC[row],
            )
            writer.add_image(f"patches/{number}", draw_panel(picture, captions), step, dataformats="HWC")

    def _most_different(self, details: Details, candidates: range) -> NDArray[np.int32]:
        """The rows in which teacher and observed labels are farthest apart, the farthest first."""
        part = slice(candidates.start, candidates.stop)
        apart_N = np.abs(details.scores.values_NC[part] - self.observed_NC[part]).sum(axis=1)
        apart_N[~details.scores.read_N[part]] = -1
        order: NDArray[np.int64] = np.argsort(-apart_N, kind="stable")[:_PATCHES]
        rows: NDArray[np.int64] = order[apart_N[order] >= 0] + candidates.start
        return rows.astype(np.int32)


def _add(writer: "SummaryWriter", *summaries: Any) -> None:
    """What ``writer.add_hparams`` would write into a second run beside this one."""
    files = writer._get_file_writer()  # type: ignore[no-untyped-call]
    for summary in summaries:
        files.add_summary(summary)


def _draw_curve(
    writer: "SummaryWriter", tag: str, rows_B: NDArray[np.int64], positives_B: NDArray[np.int64], step: int
) -> None:
    hits, wrong, rest, missed, precision, recall = precision_recall(rows_B, positives_B)
    writer.add_pr_curve_raw(tag, hits, wrong, rest, missed, precision, recall, step, num_thresholds=STEPS + 1)


def _draw_averages(writer: "SummaryWriter", counts_B: NDArray[np.int64], step: int) -> None:
    total, edges = int(counts_B.sum()), np.arange(_EMA_STEPS + 1) / _EMA_STEPS
    if not total:
        return
    middles, shares = (edges[:-1] + edges[1:]) / 2, np.append(0, counts_B.cumsum()) / total
    writer.add_histogram_raw(
        "ema/distribution", 0.0, 1.0, total, float(counts_B @ middles), float(counts_B @ middles**2),
        edges[1:].tolist(), counts_B.tolist(), step,
    )  # fmt: skip
    for percent in _QUANTILES:
        writer.add_scalar(f"ema/quantile_{percent}", np.interp(percent / 100, shares, edges), step)
    writer.add_scalar("ema/above_half", 1 - shares[_EMA_STEPS // 2], step)


def _count_averages(store: PredictionStore, comm: Comm) -> NDArray[np.int64]:
    """Collective: int64 [100], the values of all ranks' rows that were ever written, in equal buckets of [0, 1]."""
    counts_B = torch.zeros(_EMA_STEPS, dtype=torch.int64, device=store.values.device)
    for values in _written(store):
        places = (values * _EMA_STEPS).clamp_(0, _EMA_STEPS - 1).to(torch.int32)
        counts_B += places.flatten().bincount(minlength=_EMA_STEPS)
    total_B: NDArray[np.int64] = comm.all_reduce_sum(counts_B).cpu().numpy()
    return total_B


def _written(store: PredictionStore) -> Iterator[torch.Tensor]:
    """The store's values, a few megabytes at a time."""
    values, written = store.values, store.written
    for start in range(0, len(values), _ROWS_AT_ONCE):
        part = slice(start, start + _ROWS_AT_ONCE)
        yield values[part] if written[part].all() else values[part][written[part]]


def _share(part_C: NDArray[np.float64], whole_C: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.where(whole_C > 0, part_C / np.maximum(whole_C, 1), np.nan)


def _plain(value: Any) -> Any:
    if isinstance(value, bool):  # which would be shown as a number
        return str(value).lower()
    return value if isinstance(value, (int, float, str)) else str(value)
