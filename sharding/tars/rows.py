"""The samples of all tars as columns, and what cannot be used of them.

Letters: N samples, M payload members.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from sharding.tars.samples import Kind, TarSamples

__all__ = ["TarRows", "UnusableError", "check_rows", "finding", "join_tars"]

_NAMED = 10  # of each finding


class UnusableError(ValueError):
    """Samples or tars that cannot be used; one finding a line."""

    def __init__(self, findings: Sequence[str]) -> None:
        super().__init__(list(findings))
        self.findings = list(findings)

    def __str__(self) -> str:
        return "\n  ".join([f"{len(self.findings)} findings; nothing was written", *self.findings])


@dataclass
class TarRows:
    """All samples of all tars as columns; those that cannot be used fall out.

    Attributes:
        keys: string [N].
        tar_N: number of each sample's tar.
        offsets_NM, sizes_NM: bytes of the contents in the tar; offset -1 where a sample lacks a member.
        digests_NM: xxh3-64 of the contents, where all bytes were read.
        findings: why samples fell out, a line each.
    """

    keys: pa.Array
    tar_N: NDArray[np.int64]
    offsets_NM: NDArray[np.int64]
    sizes_NM: NDArray[np.int64]
    digests_NM: NDArray[np.uint64] | None
    findings: list[str] = field(default_factory=list)

    def drop(self, wrong_N: NDArray[np.bool_], what: str, of_each: Callable[[int], str] = lambda row: "") -> None:
        """Leave rows out; the first are named."""
        if not wrong_N.any():
            return
        rows = np.flatnonzero(wrong_N)
        names = [f"{self.keys[row].as_py()}{of_each(row)}" for row in rows[:_NAMED].tolist()]
        self.findings.append(finding(what, len(rows), names))
        self.take(np.flatnonzero(~wrong_N))

    def take(self, rows: NDArray[np.int64]) -> None:
        """Keep these, in this order."""
        self.keys = self.keys.take(pa.array(rows))
        self.tar_N, self.offsets_NM, self.sizes_NM = self.tar_N[rows], self.offsets_NM[rows], self.sizes_NM[rows]
        self.digests_NM = None if self.digests_NM is None else self.digests_NM[rows]


def join_tars(found: Sequence[TarSamples]) -> tuple[TarRows, dict[str, Kind], list[str]]:
    """All samples, and what each payload member is according to the first tar that has it."""
    kinds: dict[str, Kind] = {}
    extensions: dict[str, None] = {}
    ignored: dict[str, int] = {}
    for one in found:
        kinds = one.kinds | kinds
        extensions |= dict.fromkeys(one.columns)
        for extension, count in one.ignored.items():
            ignored[extension] = ignored.get(extension, 0) + count
    names = [name for name in extensions if name in kinds]
    if not names:
        broken = [f"{one.broken}" for one in found if one.broken]
        wrong = [f"{one.task.where}, {key}: {reason}" for one in found for key, reason in one.wrong.items()][:_NAMED]
        reasons = broken + wrong or ["no member is a .npy array or an image (.jpg, .jpeg, .png)"]
        raise UnusableError(reasons)
    rows = TarRows(
        pa.concat_arrays([one.keys for one in found]),
        np.repeat(np.arange(len(found)), [len(one.keys) for one in found]),
        _column(found, names, "offsets_N", -1),
        _column(found, names, "sizes_N", 0),
        _column(found, names, "digests_N", 0).astype(np.uint64) if found[0].task.whole else None,
    )
    notes = [f"members not read: {count} {extension or 'without a key'}" for extension, count in ignored.items()]
    return rows, {name: kinds[name] for name in names}, notes


def _column(found: Sequence[TarSamples], extensions: Sequence[str], name: str, missing: int) -> NDArray[Any]:
    """[N, M]"""
    parts = [
        np.stack(
            [
                getattr(one.columns[extension], name)
                if extension in one.columns
                else np.full(len(one.keys), missing, np.int64)
                for extension in extensions
            ],
            axis=1,
        )
        for one in found
    ]
    return np.concatenate(parts)


def check_rows(rows: TarRows, found: Sequence[TarSamples], kinds: Mapping[str, Kind]) -> None:
    """Drop tars and samples that cannot be used."""
    broken = np.array([one.broken is not None for one in found])
    others = [_other_kinds(one, kinds) for one in found]
    rows.findings += [f"{one.broken}: the tar is left out" for one in found if one.broken]
    rows.findings += [f"{one.task.where}: {other}" for one, other in zip(found, others) if other]
    rows.take(np.flatnonzero(~(broken | np.array([bool(other) for other in others]))[rows.tar_N]))
    reasons: dict[tuple[int, str], str] = {}
    for number, one in enumerate(found):
        reasons |= {(number, key): reason for key, reason in one.wrong.items()}
    if reasons:
        tars = sorted({number for number, _ in reasons})
        candidates = np.flatnonzero(np.isin(rows.tar_N, tars))
        wrong_N = np.zeros(len(rows.keys), np.bool_)
        of_key = {}
        for row in candidates.tolist():
            reason = reasons.get((int(rows.tar_N[row]), rows.keys[row].as_py()))
            if reason:
                wrong_N[row] = True
                of_key[row] = f" ({found[rows.tar_N[row]].task.name}: {reason})"
        rows.drop(wrong_N, "samples that cannot be used", lambda row: of_key[row])
    for number, name in enumerate(kinds):
        rows.drop(rows.offsets_NM[:, number] < 0, f"samples without {name}", _in_tar(rows, found))
    for number, (name, kind) in enumerate(kinds.items()):
        if kind.header:
            size = kind.header + int(np.prod(kind.shape)) * np.dtype(kind.dtype).itemsize
            rows.drop(rows.sizes_NM[:, number] != size, f"samples whose {name} is not of {size} bytes")
    _drop_repeated(rows, found)


def _other_kinds(one: TarSamples, kinds: Mapping[str, Kind]) -> str:
    differing = [
        f"{name} is {kind}, others are {kinds[name]}" for name, kind in one.kinds.items() if kind != kinds[name]
    ]
    return "; ".join(differing)


def _in_tar(rows: TarRows, found: Sequence[TarSamples]) -> Callable[[int], str]:
    tar_N = rows.tar_N
    return lambda row: f" ({found[tar_N[row]].task.name})"


def _drop_repeated(rows: TarRows, found: Sequence[TarSamples]) -> None:
    """A key names one sample: of several the first stays."""
    if pc.count_distinct(rows.keys).as_py() == len(rows.keys):
        return
    names = rows.keys.to_pylist()
    first: dict[str, int] = {}
    wrong_N = np.array([first.setdefault(name, row) != row for row, name in enumerate(names)])
    tar_N = rows.tar_N

    def where(row: int) -> str:
        tars = [found[tar_N[first[names[row]]]].task.name, found[tar_N[row]].task.name]
        return f" (in {tars[0]} and {tars[1]})"

    rows.drop(wrong_N, "samples whose key occurs twice", where)


def finding(what: str, count: int, names: Sequence[str]) -> str:
    """One line, with the first names."""
    return f"{count} {what}: {', '.join(names[:_NAMED])}{', ...' if count > _NAMED else ''}"
