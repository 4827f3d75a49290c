"""Which tars are meant: folders, files, patterns and URLs become one place and the names below it."""

import itertools
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from sharding.cache import is_url
from sharding.tars.read import close_system, open_system

__all__ = ["Tars", "find_tars"]

_BRACES = re.compile(r"\{([^{}]*)\}")


@dataclass(frozen=True)
class Tars:
    """Tars of one place.

    Attributes:
        origin: an absolute folder, or a URL.
        names: below it, sorted.
    """

    origin: str
    names: tuple[str, ...]

    def where(self, name: str) -> str:
        return f"{self.origin}/{name}"


def find_tars(locations: Sequence[str]) -> Tars:
    """All tars of ``locations``: folders (their ``*.tar``), files, both as paths or URLs, with {000..123} and {a,b}.

    Raises:
        ValueError: nothing is there, a tar is named twice, or some are remote and some are not.
        OSError: a URL that cannot be asked.
    """
    expanded = [each for location in locations for each in _expand(location)]
    remote = {is_url(location) for location in expanded}
    if len(remote) > 1:
        raise ValueError("some tars are local and some remote: index them apart")
    found = [tar for location in expanded for tar in (_remote if is_url(location) else _local)(location)]
    twice = {tar for tar in found if found.count(tar) > 1} if len(set(found)) < len(found) else set()
    if twice or not found:
        raise ValueError(f"{min(twice)} is named twice" if twice else f"no *.tar in {', '.join(locations)}")
    origin = os.path.commonpath([tar.rpartition("/")[0] for tar in found]) if remote == {False} else _common(found)
    return Tars(origin, tuple(sorted(tar[len(origin) :].lstrip("/") for tar in found)))


def _expand(location: str) -> list[str]:
    """shard-{000..123}.tar: as in bash, with as many digits as are written."""
    parts = _BRACES.split(location)
    choices = [[part] if i % 2 == 0 else _choices(part) for i, part in enumerate(parts)]
    return ["".join(chosen) for chosen in itertools.product(*choices)]


def _choices(inside: str) -> list[str]:
    if span := re.fullmatch(r"(\d+)\.\.(\d+)", inside):
        first, last = span.groups()
        width = max(len(first), len(last)) if first.startswith("0") or last.startswith("0") else 1
        return [f"{number:0{width}d}" for number in range(int(first), int(last) + 1)]
    return inside.split(",") if "," in inside else [f"{{{inside}}}"]


def _local(location: str) -> list[str]:
    path = Path(location).absolute()
    if path.is_dir():
        return sorted(os.path.normpath(tar) for tar in path.glob("*.tar"))
    if not path.is_file():
        raise ValueError(f"{location}: no such file or folder")
    return [os.path.normpath(path)]


def _remote(location: str) -> list[str]:
    location = location.rstrip("/")
    if location.endswith(".tar"):
        return [location]
    system, path = open_system(location)
    try:
        found = sorted(system.unstrip_protocol(tar) for tar in system.glob(f"{path}/*.tar"))
    except Exception as error:  # each file system has its own
        raise OSError(f"{location} cannot be listed ({type(error).__name__}: {error}): name the tars") from error
    finally:
        close_system(system)
    if not found:
        raise OSError(f"{location} lists no *.tar: name them, e.g. '{location}/train-{{000000..000099}}.tar'")
    return found


def _common(urls: Sequence[str]) -> str:
    """The longest URL of a folder that all of them lie in."""
    parts = [url.split("/")[:-1] for url in urls]
    same = itertools.takewhile(lambda names: len(set(names)) == 1, zip(*parts))
    origin = "/".join(names[0] for names in same)
    if not origin.partition("://")[2]:
        raise ValueError("the tars lie on different hosts: index them apart")
    return origin
