"""YAML files that a user names by path, or by name where they come with the project: spaces and grids."""

from pathlib import Path
from typing import Any

import yaml

__all__ = ["find", "read"]


def find(name: str | Path, folder: Path, what: str) -> Path:
    """The file ``name``, or the one of this name in ``folder``.

    Raises:
        ValueError: there is neither; the message lists those in ``folder``, each a ``what``.
    """
    path = Path(name)
    if not path.is_file():
        path = folder / f"{name}.yaml"
    if not path.is_file():
        known = ", ".join(sorted(file.stem for file in folder.glob("*.yaml")))
        raise ValueError(f"there is no {what} {str(name)!r}: give a YAML file, or the name of a shipped one ({known})")
    return path


def read(path: Path, wanted: str) -> dict[Any, Any]:
    """A mapping with something in it.

    Args:
        wanted: what it must hold, for the message.

    Raises:
        ValueError: it is no YAML, or no such mapping.
    """
    try:
        tree = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is no YAML: {' '.join(str(error).split())}") from error
    if not isinstance(tree, dict) or not tree:
        raise ValueError(f"{path} must hold {wanted}")
    return tree
