"""Methods: what is learnt from one observed positive. ``adagc`` is the one to read first; ``make_method`` picks by
name, ``table`` lists the baselines.
"""

from functools import partial
from typing import Any

from adagc_dist.comm import Comm, Engine
from adagc_dist.config import Config
from adagc_dist.methods.adagc import AdaGC
from adagc_dist.methods.adagc_levels import AdaGCLevels, Levels
from adagc_dist.methods.elr import EarlyLearning, EarlyLearningRegularisation
from adagc_dist.methods.em_apl import AsymmetricPseudoLabels, PseudoLabelling, ScoreStore
from adagc_dist.methods.entrywise import Entrywise
from adagc_dist.methods.epr import ExpectedPositives, ExpectedPositivesLoss
from adagc_dist.methods.large_loss import Correction, LargeLoss, PermanentCorrection, Rejection
from adagc_dist.methods.protocol import Losses, Method, Phase
from adagc_dist.methods.role import EstimateStore, LabelEstimation, OnlineLabelEstimation
from adagc_dist.methods.sat import SelfAdaptive, SelfAdaptiveTraining
from adagc_dist.methods.softmax import SingleDraw, SoftmaxLoss
from adagc_dist.methods.table import method_settings
from adagc_dist.store import PredictionStore
from adagc_dist.teacher import EmaTeacher

__all__ = ["Losses", "Method", "Phase", "make_method", "method_settings"]


def make_method(
    config: Config,
    *,
    engine: Engine,
    teacher: EmaTeacher,
    comm: Comm,
    num_rows: int,
    num_classes: int,
    max_rows: int,
) -> Method:
    """The method of ``config.method`` for a split of ``num_rows`` rows.

    Args:
        max_rows: no micro-batch of a rank has more, on any rank.

    Raises:
        ValueError: see ``method_settings``.
    """

    rows: dict[str, Any] = {"comm": comm, "device": engine.device, "exchange": config.engine.row_exchange}
    store = partial(PredictionStore, num_rows, num_classes, **rows)
    averages = partial(store, momentum=config.method.prediction_momentum)
    settings = method_settings(config.method)
    common: dict[str, Any] = {"engine": engine, "epochs": config.optim.epochs}
    match settings:
        case None:
            return AdaGC(config.method, engine=engine, teacher=teacher, store=averages())
        case Levels():
            return AdaGCLevels(settings, config.method, engine=engine, teacher=teacher, store=averages())
        case Rejection() | Correction():
            return LargeLoss(settings, comm=comm, max_rows=max_rows, **common)
        case PermanentCorrection():
            return LargeLoss(settings, comm=comm, max_rows=max_rows, store=store(momentum=0.0), **common)
        case ExpectedPositives():
            return ExpectedPositivesLoss(settings, comm=comm, **common)
        case LabelEstimation():
            estimates = EstimateStore(num_rows, num_classes, lr_factor=settings.lr_factor, **rows)
            return OnlineLabelEstimation(settings, comm=comm, store=estimates, seed=config.run.seed, **common)
        case AsymmetricPseudoLabels():
            return PseudoLabelling(settings, store=ScoreStore(num_rows, num_classes, **rows), **common)
        case EarlyLearning():
            return EarlyLearningRegularisation(settings, store=store(momentum=settings.momentum), **common)
        case SelfAdaptive():
            return SelfAdaptiveTraining(settings, store=store(momentum=settings.momentum), **common)
        case SingleDraw():
            return SoftmaxLoss(**common)
        case _:
            return Entrywise(settings, **common)
