"""Headers of many samples of one shape, checked at once: none passes that the careful walk would not take as well.

Letters: S samples of a run, M members of a sample.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sharding.tars.structure import key_and_extension

__all__ = ["Run", "Segment", "Shape", "check_run"]

_BLOCK = 512
_NAME = 100
_FIELDS, _SUM, _KIND, _PREFIX = 124, 148, 156, 345
_LANES = np.uint64(0x00FF00FF00FF00FF)

Bools = NDArray[np.bool_]
Bytes = NDArray[np.uint8]
Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Run:
    """Samples of the same members in a row.

    Attributes:
        keys: S of them.
        extensions: M of them.
        offsets_SM, sizes_SM: of the contents.
        end: where the next header lies.
    """

    keys: list[str]
    extensions: tuple[str, ...]
    offsets_SM: Ints
    sizes_SM: Ints
    end: int


@dataclass(frozen=True)
class Segment:
    """Headers near enough to each other to be read at once.

    Attributes:
        row, length: place in a sample's row of the buffer.
        size_at: place of the size field that decides on where the next segment lies; -1 where that is known.
        step: bytes from this segment to the next, without what varies.
    """

    row: int
    length: int
    size_at: int
    step: int


@dataclass(frozen=True)
class Shape:
    """What all samples of a run have in common; ``places``: of the M headers in a sample's row of the buffer."""

    extensions: tuple[str, ...]
    blocks: tuple[int, ...]
    heads: tuple[bytes, ...]
    segments: tuple[Segment, ...]
    places: tuple[int, ...]
    row: int


def check_run(rows: Bytes, position: int, total: int, shape: Shape) -> Run | None:
    """The first samples of ``rows`` of which everything is as usual; None if there are none.

    Args:
        rows: what was read of each sample.
        position: of the first header.
        total: bytes of the file.
    """
    fields = np.stack([rows[:, at + _FIELDS : at + _KIND + 1] for at in shape.places], axis=1)
    sizes_SM, good = _octal(fields[..., :11])
    blocks_SM = (sizes_SM + _BLOCK - 1) // _BLOCK
    usual_M, kinds = np.array(shape.blocks), fields[..., _KIND - _FIELDS]
    good &= _zero_or_blank(fields[..., 11]) & ((kinds == ord("0")) | (kinds == 0))
    good &= ((usual_M == 0) | (blocks_SM == usual_M)) & _sums_are_right(rows, shape.places, fields)
    good_S: Bools = np.all(good, axis=1)
    for at, head in zip(shape.places, shape.heads):
        good_S &= rows[:, at + _PREFIX] == 0  # no more of the name
        if head:
            content = np.ascontiguousarray(rows[:, at + _BLOCK : at + _BLOCK + len(head)])
            good_S &= np.all(content == np.frombuffer(head, np.uint8), axis=1)
    count = _first_bad(good_S)
    keys = _keys([rows[:count, at : at + _NAME] for at in shape.places], shape.extensions)
    count = len(keys)
    if not count:
        return None
    ends = position + np.cumsum((1 + blocks_SM[:count]).ravel()) * _BLOCK
    offsets_SM = np.concatenate([[position], ends[:-1]]).reshape(count, -1) + _BLOCK
    count = _first_bad(np.all(offsets_SM + sizes_SM[:count] <= total, axis=1))
    if not count:
        return None
    end = int(ends[count * len(shape.places) - 1])
    return Run(keys[:count], shape.extensions, offsets_SM[:count], sizes_SM[:count], end)


def _first_bad(good: Bools) -> int:
    return len(good) if good.all() else int(np.argmin(good))


def _octal(field: Bytes) -> tuple[Ints, Bools]:
    """The numbers, and whether they are digits only."""
    digits = field - np.uint8(ord("0"))
    number = np.zeros(digits.shape[:-1], np.int64)
    all_bits = np.zeros(digits.shape[:-1], np.uint8)
    for place in range(digits.shape[-1]):  # sums along so short an axis take longer
        number <<= 3
        number += digits[..., place]
        all_bits |= digits[..., place]
    return number, all_bits < 8


def _zero_or_blank(field: Bytes) -> Bools:
    known: Bools = (field == 0) | (field == ord(" "))
    return known


def _sums_are_right(rows: Bytes, places: tuple[int, ...], fields: Bytes) -> Bools:
    """Six digits, or seven, as some write it; anything else is for the careful walk."""
    words, fours = rows.view(np.uint64), np.empty((len(rows), len(places)), np.uint64)
    for m, at in enumerate(places):
        of_header = words[:, at // 8 : (at + _BLOCK) // 8]
        pairs = of_header >> np.uint64(8)
        pairs &= _LANES
        pairs += of_header & _LANES
        pairs.sum(axis=1, out=fours[:, m])  # four sums of 16 bits, none of which overflows
    counted = np.full(fours.shape, 8 * ord(" "), np.int64)
    for lane in range(4):
        counted += ((fours >> np.uint64(16 * lane)) & np.uint64(0xFFFF)).astype(np.int64)
    field = fields[..., _SUM - _FIELDS : _KIND - _FIELDS]
    for place in range(8):
        counted -= field[..., place]
    stated, digits = _octal(field[..., :6])
    seventh = field[..., 6] - np.uint8(ord("0"))
    stated = np.where(seventh < 8, stated * 8 + seventh, stated)
    ends = ((seventh < 8) | _zero_or_blank(field[..., 6])) & _zero_or_blank(field[..., 7])
    right: Bools = digits & ends & (stated == counted)
    return right


def _keys(names_M: list[Bytes], extensions: tuple[str, ...]) -> list[str]:
    """Keys of the first samples whose names are one key with the usual extensions."""
    suffixes = [f".{extension}".encode() for extension in extensions]
    lengths = np.char.str_len(np.ascontiguousarray(names_M[0]).view(f"S{_NAME}").ravel()) - len(suffixes[0])
    room = _NAME - max(map(len, suffixes))
    found = [""] * len(lengths)
    for length in np.unique(lengths).tolist():
        if not 0 < length <= room:
            continue
        chosen = np.flatnonzero(lengths == length)
        names = names_M if len(chosen) == len(lengths) else [name[chosen] for name in names_M]
        first, good = np.ascontiguousarray(names[0][:, :length]), np.ones(len(chosen), np.bool_)
        for name, suffix in zip(names, suffixes):  # numpy's strings end before the zeros at their end
            good &= _strings(name[:, :length]) == _strings(first)
            good &= _strings(name[:, length:]) == suffix
        text = first.tobytes()
        keys = [text[at : at + length] for at in range(0, len(text), length)]
        for sample, usual, key in zip(chosen.tolist(), good.tolist(), _texts(text, keys, extensions)):
            found[sample] = key if usual else ""
    return found[: found.index("")] if "" in found else found


def _strings(field: Bytes) -> NDArray[np.bytes_]:
    return np.ascontiguousarray(field).view(f"S{field.shape[1]}").ravel()


def _texts(text: bytes, keys: list[bytes], extensions: tuple[str, ...]) -> list[str]:
    """Keys as the careful walk has them; empty where a name is cut elsewhere, or cannot be read."""
    if text.isascii() and not any(odd in text for odd in (b".", b"/", b"__", b"\0")):
        return [key.decode() for key in keys]  # what most are
    return [_text(key, extensions) for key in keys]


def _text(key: bytes, extensions: tuple[str, ...]) -> str:
    try:
        name = key.decode()
    except UnicodeDecodeError:
        return ""
    name = name[2:] if name.startswith("./") else name
    cut = all(key_and_extension(f"{name}.{extension}") == (name, extension) for extension in extensions)
    return name if cut and "\0" not in name else ""
