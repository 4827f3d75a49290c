"""YAML files that a user names by path, or by name where they come with the project: recipes, spaces and grids."""

import difflib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import yaml

__all__ = ["find", "nearest", "read"]


def find(name: str | Path, folder: Path, what: str) -> Path:
    """The file ``name``, or the one of this name in ``folder``.

    Raises:
        ValueError: there is neither; the message names the nearest and lists all in ``folder``, each a ``what``.
    """
    path = Path(name)
    if not path.is_file():
        path = folder / f"{name}.yaml"
    if not path.is_file():
        known = sorted(file.stem for file in folder.glob("*.yaml"))
        close = difflib.get_close_matches(str(name), known, n=1)
        raise ValueError(
            f"there is no {what} {str(name)!r}: give a YAML file, or the name of a shipped one ({', '.join(known)})"
            + (f"; did you mean {close[0]}?" if close else "")
        )
    return path


def read(path: Path, wanted: str, fits: Callable[[dict[Any, Any]], bool] = bool) -> dict[Any, Any]:
    """A mapping; an empty file is an empty one.

    Args:
        wanted: what it must hold, for the message.
        fits: whether it does; without it, anything at all.

    Raises:
        ValueError: it is no YAML, or no such mapping.
    """
    try:
        tree = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is no YAML: {' '.join(str(error).split())}") from error
    tree = {} if tree is None else tree
    if not isinstance(tree, dict) or not fits(tree):
        raise ValueError(f"{path} must hold {wanted}")
    return tree


def nearest(name: str, known: Iterable[str]) -> str:
    """What may have been meant, as the end of a message."""
    names = list(known)
    close = difflib.get_close_matches(name, names, n=1)
    return f"did you mean {close[0]}?" if close else f"there are {', '.join(names)}"
