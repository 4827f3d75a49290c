"""Which runs are the same run, on whatever machine and by whatever version: what a trained model depends on.

Seeds are left out, which stand beside it, and so is what differs between machines and changes no figure but in its last
digits: paths, hosts, workers, devices. What is compared is what differs from today's defaults: a key that came later
was at its default before, and a result under an earlier default, which was written down, is not today's.
"""

import json
from collections.abc import Mapping
from dataclasses import MISSING, fields
from functools import cache
from pathlib import Path
from typing import Any

import xxhash

from adagc_dist.config import Config
from launch.recipe import flatten
from sharding.manifest import file_digest

__all__ = ["digest_of", "distinctive", "settings_of"]

_NEUTRAL = (
    "data.shards",  # its own digest stands beside
    "data.workers",
    "data.prefetch",
    "data.check_digests",
    "data.stage",
    "data.cache",
    "data.cache_gb",
    "engine.device",
    "engine.timeout_minutes",
    "engine.row_exchange",
    "spml.seed",
    "run.",
)
_FILES = ("spml.file", "model.pretrained", "engine.deepspeed_json")  # by their content
_OF_ADAGC = (
    "method.prediction_momentum",
    "method.averages_of",
    "method.teacher_weight",
    "method.combine",
    "method.pseudo_threshold",
    "method.gc_weight",
    "method.mixup_alpha",
)


def settings_of(config: Config) -> dict[str, Any]:
    """``section.key`` -> value of all that a run depends on, as JSON keeps it; defaults, too.

    Raises:
        OSError: a file of labels, weights or settings cannot be read.
    """
    found = {key: value for key, value in flatten(config).items() if not key.startswith(_NEUTRAL)}
    if config.method.name != "adagc":
        found = {key: value for key, value in found.items() if key not in _OF_ADAGC}
    for key in _FILES:
        if found[key] and Path(found[key]).is_file():
            found[key] = file_digest(Path(found[key]))
    return _as_json(found)


def distinctive(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Those that differ from the defaults."""
    defaults = _defaults()
    return {key: value for key, value in settings.items() if key not in defaults or value != defaults[key]}


def digest_of(settings: Mapping[str, Any]) -> str:
    """Equal where two runs are the same but for their seeds and shards."""
    return xxhash.xxh3_128_hexdigest(json.dumps(distinctive(settings), sort_keys=True).encode())


@cache
def _defaults() -> dict[str, Any]:
    sections = {field.name: field.default_factory() for field in fields(Config) if field.default_factory is not MISSING}
    return _as_json(
        {f"{name}.{key}": value for name, values in sections.items() for key, value in vars(values).items()}
    )


def _as_json(values: Mapping[str, Any]) -> dict[str, Any]:
    plain: dict[str, Any] = json.loads(json.dumps(dict(values)))
    return plain
