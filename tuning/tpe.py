"""Values for a new trial by Optuna's TPE, as a function of the trials in the folder: nothing is kept in between."""

import math
from collections.abc import Callable
from importlib.util import find_spec
from itertools import accumulate
from typing import Any

from sharding.rng import derive_seed
from tuning.record import SweepFolder, TrialFolder, samples
from tuning.space import Domain, Space

__all__ = ["check_installed", "propose"]


def check_installed() -> None:
    """
    Raises:
        ValueError: it is not.
    """
    if find_spec("optuna") is None:
        raise ValueError("--searcher optuna needs a package that is not installed: pip install 'adagc-dist[optuna]'")


def propose(sweep: SweepFolder, space: Space, number: int, fits: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
    """Values for trial ``number``: after ten random ones, where good trials have been and bad ones have not.

    Args:
        fits: whether the configuration takes them.
    """
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    seed = derive_seed(sweep.plan.seed, "optuna", number) % 2**32
    sampler = optuna.samplers.TPESampler(seed=seed, constant_liar=True)
    study = optuna.create_study(direction="maximize", sampler=sampler)
    distributions = {key: _distribution(domain) for key, domain in space.domains.items()}
    for trial in sweep.drawn():
        study.add_trial(_told(trial, sweep, distributions))
    for _ in range(100):
        asked = study.ask(distributions)
        values = {key: _value(space.domains[key], asked.params[key]) for key in distributions}
        if fits(values):
            return values
        study.tell(asked, state=optuna.trial.TrialState.FAIL)
    raise ValueError(f"{space.name}: 100 proposals in a row do not fit together; the last one: {values}")


def _told(trial: TrialFolder, sweep: SweepFolder, distributions: dict[str, Any]) -> Any:
    from optuna.trial import TrialState, create_trial

    epochs = trial.epochs
    values = [sweep.objective.of(record) for record in epochs]
    states = {"finished": TrialState.COMPLETE, "pruned": TrialState.PRUNED, "failed": TrialState.FAIL}
    state = states.get(trial.state, TrialState.RUNNING)
    if state is TrialState.COMPLETE and math.isnan(values[-1]):
        state = TrialState.FAIL  # it was not measured
    return create_trial(
        params={key: _parameter(trial.values[key]) for key in distributions},
        distributions=distributions,
        intermediate_values=dict(zip(accumulate(map(samples, epochs)), values)),
        value=values[-1] if state is TrialState.COMPLETE else None,
        state=state,
    )


def _distribution(domain: Domain) -> Any:
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    if domain.kind == "choice":
        return CategoricalDistribution([_parameter(value) for value in domain.arguments])
    low, high = domain.ends
    if domain.kind == "randint":
        return IntDistribution(low, high)
    if domain.kind == "quniform":
        return FloatDistribution(low, high, step=domain.arguments[2])
    return FloatDistribution(low, high, log=domain.kind == "loguniform")


def _parameter(value: Any) -> Any:
    """What Optuna takes as a category; lists as text."""
    return value if value is None or isinstance(value, (bool, int, float, str)) else str(value)


def _value(domain: Domain, parameter: Any) -> Any:
    if domain.kind == "choice":
        return next(value for value in domain.arguments if _parameter(value) == parameter)
    return parameter
