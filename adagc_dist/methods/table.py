"""The methods beside adagc by name, and what ``method.kwargs`` sets of each."""

import difflib
from collections.abc import Mapping
from dataclasses import MISSING, fields
from typing import Any, get_type_hints

from adagc_dist.config import MethodConfig
from adagc_dist.methods.adagc_levels import Levels
from adagc_dist.methods.an import AssumeNegative
from adagc_dist.methods.an_ls import LabelSmoothing
from adagc_dist.methods.asl import Asymmetric
from adagc_dist.methods.elr import EarlyLearning
from adagc_dist.methods.em import EntropyMaximisation
from adagc_dist.methods.em_apl import AsymmetricPseudoLabels
from adagc_dist.methods.epr import ExpectedPositives
from adagc_dist.methods.focal import Focal
from adagc_dist.methods.gr import GeneralisedRobust
from adagc_dist.methods.hill import Hill
from adagc_dist.methods.large_loss import Correction, PermanentCorrection, Rejection
from adagc_dist.methods.role import LabelEstimation
from adagc_dist.methods.sat import SelfAdaptive
from adagc_dist.methods.softmax import SingleDraw
from adagc_dist.methods.splc import SelfPacedCorrection
from adagc_dist.methods.wan import WeakNegatives

__all__ = ["BASELINES", "VARIANTS", "method_settings"]

# They have adagc's own numbers, too.
VARIANTS: Mapping[str, type[Any]] = {"adagc_levels": Levels}

BASELINES: Mapping[str, type[Any]] = {
    "an": AssumeNegative,
    "an_ls": LabelSmoothing,
    "wan": WeakNegatives,
    "epr": ExpectedPositives,
    "role": LabelEstimation,
    "em": EntropyMaximisation,
    "em_apl": AsymmetricPseudoLabels,
    "ll_r": Rejection,
    "ll_ct": Correction,
    "ll_cp": PermanentCorrection,
    "gr": GeneralisedRobust,
    "hill": Hill,
    "splc": SelfPacedCorrection,
    "focal": Focal,
    "asl": Asymmetric,
    "elr": EarlyLearning,
    "sat": SelfAdaptive,
    "softmax": SingleDraw,
}


def method_settings(config: MethodConfig) -> Any:
    """The numbers of the method ``config.name``, checked; None for adagc, whose numbers are the configuration's own.

    Raises:
        ValueError: ``config.kwargs`` names what the method does not have, leaves out what it needs, or holds no number
            or one out of range; the message names the key.
    """
    kind = {**BASELINES, **VARIANTS}.get(config.name)
    hints = get_type_hints(kind) if kind else {}
    for key in config.kwargs:
        if key not in hints:
            raise ValueError(f"unknown key method.kwargs.{key}: {_remedy(config.name, key, list(hints))}")
    if kind is None:
        return None
    for field in fields(kind):
        if field.default is MISSING and field.name not in config.kwargs:
            raise ValueError(
                f"method.name={config.name} needs method.kwargs.{field.name}: there is no default that fits all data"
            )
    return kind(**{key: _number(key, value, hints[key]) for key, value in config.kwargs.items()})


def _remedy(name: str, key: str, known: list[str]) -> str:
    """The nearest right key, or all of them."""
    keys = {number: f"method.kwargs.{number}" for number in known}
    if name not in BASELINES:
        keys = {field.name: f"method.{field.name}" for field in fields(MethodConfig)}
    close = difflib.get_close_matches(key, list(keys), n=1, cutoff=0.5)
    hint = f"did you mean {keys[close[0]]}? " if close else ""
    return f"{hint}method.name={name} has {', '.join(known) if known else 'no kwargs'}"


def _number(key: str, value: object, kind: Any) -> float | int | None:
    """``value`` as the type that the settings ask for: float, int, or float | None."""
    if value is None and kind == float | None:
        return None
    try:
        if isinstance(value, (bool, list, dict)) or value is None:
            raise ValueError
        number = float(str(value))  # YAML reads 1e-3 as text
        if kind is int and not number.is_integer():
            raise ValueError
    except ValueError as error:
        wanted = "a whole number" if kind is int else "a number"
        raise ValueError(f"method.kwargs.{key}={value} must be {wanted}") from error
    return int(number) if kind is int else number
