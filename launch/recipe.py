"""Recipes: YAML and dotted overrides become one typed ``Config``, and back.

The command line, the tests and the searches all come through ``load_config``. An unknown key is an error that names the
nearest right one: a misspelt learning rate must not train for a week at the default.
"""

import copy
import dataclasses
import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from textwrap import fill
from typing import Any

import yaml
from docstring_parser import parse_from_object
from jsonargparse import ArgumentError, ArgumentParser

from adagc_dist.config import Config
from launch import shipped

__all__ = ["RECIPES", "describe_keys", "dump_config", "flatten", "load_config", "load_run"]

RECIPES = Path(__file__).parent / "recipes"


def load_config(recipe: str | Path | None, overrides: Sequence[str] = ()) -> Config:
    """The configuration of a recipe with ``section.key=value`` overrides.

    Args:
        recipe: a YAML file, or the name of one under launch/recipes (without .yaml), or None for the defaults.

    Raises:
        ValueError: no such recipe, an unknown key, a value of the wrong type or out of range; the message names the
            key.
    """
    tree = {} if recipe is None else _read(recipe)
    for override in overrides:
        _apply(tree, override)
    _check_keys(tree)
    # As written, and taken before the parser sees it: it would make a number of the string "0".
    kwargs = {section: copy.deepcopy(tree.get(section, {}).get("kwargs")) or {} for section in _open_sections()}
    parser = ArgumentParser(exit_on_error=False, prog="adagc")
    parser.add_class_arguments(Config)
    try:
        values = parser.instantiate(parser.parse_object(tree))
    except ArgumentError as error:
        raise ValueError(_in_words(error)) from error
    config = Config(**{field.name: values[field.name] for field in dataclasses.fields(Config)})
    taken = {section: dataclasses.replace(getattr(config, section), kwargs=kwargs[section]) for section in kwargs}
    return dataclasses.replace(config, **taken)


def _in_words(error: Exception) -> str:
    """The parser's message, without its own terms."""
    told = " ".join(str(error).replace("Parser key", "key").split())
    told = re.sub(r"Does not .* Subtypes: \[(.*)\] Errors: .* Given value:", r"Expected one of \1. Got value:", told)
    told = re.sub(r"Expected a (?:typing\.)?Literal\[(.*?)\]", r"Expected one of \1", told)
    return re.sub(r"<class '(\w+)'>", r"\1", told).replace("NoneType", "null")


def load_run(run: Path, overrides: Sequence[str] = ()) -> Config:
    """The configuration that ``run`` was trained with, with overrides.

    Raises:
        FileNotFoundError: it is no run.
        ValueError: as ``load_config``.
    """
    if not (run / "config.yaml").is_file():
        raise FileNotFoundError(
            f"{run} is no run: it holds no config.yaml. Give the folder that was run.dir in `adagc train`"
        )
    return load_config(run / "config.yaml", overrides)


def dump_config(config: Config) -> str:
    """The configuration as YAML that ``load_config`` reads back equal."""
    tree = {section: _plain(dataclasses.asdict(values)) for section, values in vars(config).items()}
    return yaml.safe_dump(tree, sort_keys=False)


def flatten(config: Config) -> dict[str, Any]:
    """``section.key`` -> value for all keys."""
    return {
        f"{section}.{key}": value for section, values in vars(config).items() for key, value in vars(values).items()
    }


def describe_keys() -> str:
    """Every key with its default and meaning, for --help."""
    lines = []
    for section, key, default, text in _keys():
        lines.append(f"  {section}.{key} = {_yaml_inline(default)}")
        lines.append(fill(" ".join(text.split()), width=110, initial_indent=" " * 6, subsequent_indent=" " * 6))
    return "\n".join(lines)


def _keys() -> Iterator[tuple[str, str, object, str]]:
    for section, kind in _sections().items():
        texts = {param.arg_name: param.description or "" for param in parse_from_object(kind).params}
        for field in dataclasses.fields(kind):
            default = field.default if field.default is not dataclasses.MISSING else {}
            yield section, field.name, default, texts.get(field.name, "")


@cache
def _sections() -> dict[str, type]:
    return {field.name: field.type for field in dataclasses.fields(Config) if isinstance(field.type, type)}


@cache
def _open_sections() -> list[str]:
    """Those with ``kwargs``, whose names are not the configuration's."""
    return [
        section for section, kind in _sections().items() if any(f.name == "kwargs" for f in dataclasses.fields(kind))
    ]


def _read(recipe: str | Path) -> dict[str, Any]:
    def has_sections(tree: Mapping[str, object]) -> bool:
        return all(isinstance(values, dict) for values in tree.values())

    wanted = f"sections ({', '.join(_sections())}) with keys below each"
    return shipped.read(shipped.find(recipe, RECIPES, "recipe"), wanted, has_sections)


def _apply(tree: dict[str, Any], override: str) -> None:
    name, equals, text = override.partition("=")
    if not equals:
        raise ValueError(f"override {override!r} is not of the form section.key=value, e.g. optim.lr=1e-3")
    section, dot, key = name.strip().partition(".")
    if not dot:
        raise ValueError(f"override {override!r} names no section: {_nearest(name, _known())}")
    value = _value(section, key, text)
    subkey, inner, rest = key.partition(".")
    if inner and subkey == "kwargs" and section in _open_sections():  # model.kwargs.img_size=120
        tree.setdefault(section, {}).setdefault(subkey, {})[rest] = value
    else:
        tree.setdefault(section, {})[key] = value


def _value(section: str, key: str, text: str) -> Any:
    """An override's value: YAML, but a name is taken as it stands (run.dir=2024-06-01 is a folder and no date).

    Raises:
        ValueError: it is no YAML.
    """
    kind = _sections().get(section)
    is_name = kind is not None and any(field.name == key and field.type is str for field in dataclasses.fields(kind))
    if is_name or not text:
        return text
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"{section}.{key}={text} is no YAML value: {' '.join(str(error).split())}") from error
    if (section, key) == ("data", "bands") and isinstance(value, str):
        return [band.strip() for band in value.split(",")]
    return value


def _check_keys(tree: Mapping[str, Mapping[str, Any]]) -> None:
    known = _known()
    for section, values in tree.items():
        for key in values:
            if f"{section}.{key}" not in known:
                raise ValueError(f"unknown key {section}.{key}: {_nearest(f'{section}.{key}', known)}")


def _known() -> list[str]:
    return [f"{section}.{field.name}" for section, kind in _sections().items() for field in dataclasses.fields(kind)]


def _nearest(name: str, known: Sequence[str]) -> str:
    last = name.rpartition(".")[2]
    same = [key for key in known if key.rpartition(".")[2] == last]
    close = same or difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"did you mean {' or '.join(close)}?" if close else "`adagc train --help` lists all keys"


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value


def _yaml_inline(value: object) -> str:
    return yaml.safe_dump(_plain(value), default_flow_style=True, width=10_000).removesuffix("...\n").strip()
