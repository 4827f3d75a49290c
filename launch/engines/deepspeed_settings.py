"""DeepSpeed's configuration: what follows from the recipe, joined by the settings of a user's JSON file.

DeepSpeed ignores keys that it does not know, so the keys that may be set are listed here. What the recipe states is
stated once: a file that says otherwise is refused, with the recipe's key.
"""

import json
from collections.abc import Iterator, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from adagc_dist.config import Config

__all__ = ["deepspeed_settings"]

_RECIPE_KEYS = {
    "train_batch_size": "optim.global_batch",
    "train_micro_batch_size_per_gpu": "optim.global_batch and optim.accumulation",
    "gradient_accumulation_steps": "optim.accumulation",
    "gradient_clipping": "optim.clip_norm",
    "optimizer": "optim.lr and optim.weight_decay (it is AdamW)",
    "scheduler": "optim.lr, optim.warmup_steps and optim.epochs",
    "fp16": "optim.precision",
    "bf16": "optim.precision",
    "amp": "optim.precision",
    "data_types": "optim.precision",
    "torch_autocast.enabled": "optim.precision",
    "torch_autocast.dtype": "optim.precision",
    "zero_optimization.stage": "engine.zero_stage",
    "checkpoint": "run.checkpoint_every and run.keep_checkpoints",
    "tensorboard": "run.log_every (run.dir holds TensorBoard's events)",
}

_MAY_BE_SET = (
    "communication_data_type",
    "prescale_gradients",
    "gradient_predivide_factor",
    "torch_autocast.lower_precision_safe_modules",
    "zero_optimization.contiguous_gradients",
    "zero_optimization.reduce_scatter",
    "zero_optimization.reduce_bucket_size",
    "zero_optimization.use_multi_rank_bucket_allreduce",
    "zero_optimization.allgather_bucket_size",
    "zero_optimization.allgather_partitions",
    "zero_optimization.overlap_comm",
    "zero_optimization.round_robin_gradients",
    "zero_optimization.parameter_alignment",
    "comms_logger",
    "flops_profiler",
    "wall_clock_breakdown",
    "memory_breakdown",
    "steps_per_print",
    "dump_state",
    "log_level",
)
_SECTIONS = ("zero_optimization", "torch_autocast")  # their keys are looked at one by one


def deepspeed_settings(config: Config, world_size: int) -> dict[str, Any]:
    """The whole configuration, for ``deepspeed.initialize``.

    Raises:
        FileNotFoundError, ValueError: engine.deepspeed_json is not there, is no JSON object, or has a key that the
            recipe states, that nobody knows or that would have no effect.
    """
    path = config.engine.deepspeed_json
    named = {} if path is None else dict(_flat(_read(path)))
    stated = _stated(config, world_size)
    for key, value in named.items():
        if key not in _MAY_BE_SET and stated.get(key, ...) != value:
            raise ValueError(_refusal(f"engine.deepspeed_json={path}: {key}={json.dumps(value)}", key))
    if "communication_data_type" in named and config.optim.precision == "bf16" and config.engine.zero_stage:
        raise ValueError(
            f"engine.deepspeed_json={path}: communication_data_type has no effect with optim.precision=bf16 and "
            f"engine.zero_stage={config.engine.zero_stage}: remove it, and list the modules whose gradients may travel "
            'in bfloat16 in torch_autocast.lower_precision_safe_modules, e.g. ["torch.nn.Conv2d"]'
        )
    return _nested(_defaults() | named | stated)


def _stated(config: Config, world_size: int) -> dict[str, Any]:
    """What follows from the recipe, by dotted key."""
    optim = config.optim
    return {
        # only DeepSpeed's reports use it; slots may be larger by a pair of rows
        "train_micro_batch_size_per_gpu": max(1, optim.global_batch // (world_size * optim.accumulation)),
        "gradient_accumulation_steps": optim.accumulation,
        "gradient_clipping": optim.clip_norm,
        "zero_optimization.stage": config.engine.zero_stage,
        "torch_autocast.enabled": optim.precision == "bf16",
        "torch_autocast.dtype": "bfloat16",
    }


def _defaults() -> dict[str, Any]:
    """Ours where DeepSpeed's suit larger models, or cost a step something."""
    return {
        # gradients travel in float32; DeepSpeed's own list would send those of convolutions in bfloat16
        "torch_autocast.lower_precision_safe_modules": [],
        # 64 MiB of float32; DeepSpeed's 2 GB would be allocated in every backward pass
        "zero_optimization.reduce_bucket_size": 2**24,
        # it would wait for the device twice a step
        "timers": {"throughput": {"enabled": False}},
    }


def _read(path: str) -> dict[str, Any]:
    try:
        found = json.loads(Path(path).read_text())
    except FileNotFoundError as error:
        raise FileNotFoundError(f"engine.deepspeed_json={path} does not exist") from error
    except (OSError, ValueError) as error:
        raise ValueError(f"engine.deepspeed_json={path} cannot be read as JSON: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"engine.deepspeed_json={path} must hold a JSON object, not a {type(found).__name__}")
    return found


def _flat(settings: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for key, value in settings.items():
        if key in _SECTIONS and isinstance(value, dict):
            yield from ((f"{key}.{name}", part) for name, part in value.items())
        else:
            yield key, value


def _nested(settings: Mapping[str, Any]) -> dict[str, Any]:
    nested: dict[str, Any] = {}
    for key, value in settings.items():
        section, _, name = key.rpartition(".")
        (nested.setdefault(section, {}) if section else nested)[name] = value
    return nested


def _refusal(what: str, key: str) -> str:
    if key in _RECIPE_KEYS:
        return f"{what} is for the recipe to state: remove it there, and set {_RECIPE_KEYS[key]}"
    close = get_close_matches(key, [*_MAY_BE_SET, *_RECIPE_KEYS], n=1)
    hint = f"did you mean {close[0]}?" if close else f"it may hold {', '.join(_MAY_BE_SET)}"
    return f"{what} is not a setting that can be made there: {hint}"
