"""Methods: what is learnt from one observed positive. ``adagc`` is the one to read first; ``make_method`` picks by
name.
"""

from adagc_dist.comm import Comm, Engine
from adagc_dist.config import MethodConfig
from adagc_dist.methods.adagc import AdaGC
from adagc_dist.methods.an import AssumeNegative
from adagc_dist.methods.protocol import Losses, Method, Phase
from adagc_dist.store import PredictionStore
from adagc_dist.teacher import EmaTeacher

__all__ = ["Losses", "Method", "Phase", "make_method"]


def make_method(
    config: MethodConfig,
    *,
    engine: Engine,
    teacher: EmaTeacher,
    comm: Comm,
    num_rows: int,
    num_classes: int,
    row_exchange: str = "all_gather",
) -> Method:
    """The method of ``config.name`` for a split of ``num_rows`` rows, whose values move by ``row_exchange``."""
    if config.name == "an":
        return AssumeNegative(engine=engine)
    store = PredictionStore(
        num_rows,
        num_classes,
        momentum=config.prediction_momentum,
        comm=comm,
        device=engine.device,
        exchange=row_exchange,
    )
    return AdaGC(config, engine=engine, teacher=teacher, store=store)
