"""What an HDF5 file, or else the user, says of its bands, classes, patches and labels. Letters: D bands, H W pixels."""

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sharding.images import RGB

__all__ = ["attribute_texts", "band_names", "check_keys", "class_names", "key_prefix",
           "label_matrix", "numbered_keys", "text_of"]  # fmt: skip


def band_names(
    bands: Sequence[str], shape_DHW: tuple[int, int, int], channels_last: bool, path: Path
) -> tuple[str, ...]:
    """Those named, if they are as many as the image has; else the message that tells what to do.

    Raises:
        ValueError: another number of bands, or axes that look swapped.
    """
    count, height, width = shape_DHW
    if bands and len(bands) == count and len({*bands}) == count and all(bands):
        return tuple(bands)
    if channels_last and height < min(count, width):
        raise ValueError(
            f"{path}: images of {height}x{width}x{count} look like bands first: leave --channels-last away"
        )
    if not channels_last and width < min(count, height):
        raise ValueError(
            f"{path}: images of {count}x{height}x{width} look like bands last: give --channels-last (if they really "
            f"have {count} bands, name them with --bands)"
        )
    if bands:
        raise ValueError(f"{path}: images have {count} bands; {len({*bands})} different are named: {','.join(bands)}")
    if count != len(RGB):
        raise ValueError(f"{path}: images have {count} bands: name them with --bands, e.g. --bands B02,B03,B04,B08")
    return RGB


def class_names(holders: Sequence[Any], asked: str, count: int, path: Path) -> tuple[str, ...]:
    """The names in the attribute ``asked`` of one of ``holders``, or in ``asked`` itself; ``count`` different ones.

    Raises:
        ValueError: none, or another number.
    """
    # quotes as in CSV: some of reBEN's names hold commas
    names = tuple(next(csv.reader([asked], skipinitialspace=True))) if "," in asked else attribute_texts(holders, asked)
    if not names:
        raise ValueError(f"{path} has no attribute {asked!r}: name its {count} classes, --classes NAME,NAME,...")
    if len(names) != count or len({*names}) < count or not all(names):
        raise ValueError(
            f"{path}: labels have {count} columns; {len({*names} - {''})} different classes are named: "
            f"{', '.join(names)}"
        )
    return names


def attribute_texts(holders: Sequence[Any], name: str) -> tuple[str, ...]:
    """An attribute of the first holder that has it: an array of texts, or one text with commas."""
    for holder in holders:
        if name in holder.attrs:
            value = np.asarray(holder.attrs[name])
            texts = [text_of(item) for item in value.ravel().tolist()]
            return tuple(texts) if value.ndim else tuple(part.strip() for part in texts[0].split(","))
    return ()


def text_of(value: object) -> str:
    """Of what HDF5 gives for a text."""
    return value.decode() if isinstance(value, bytes) else str(value)


def label_matrix(labels: Any, where: str) -> NDArray[np.bool_]:
    """bool, of an array of bool, 0 and 1. Raises ValueError that names the row of anything else."""
    try:
        values = labels[:]
    except OSError as error:
        raise ValueError(f"{where}: the labels cannot be read, the file is damaged: {error}") from error
    wrong = (values != 0) & (values != 1)
    if wrong.any():
        row, column = np.argwhere(wrong)[0].tolist()
        raise ValueError(f"{where}: the label in row {row}, column {column} is {values[row, column]}, neither 0 nor 1")
    return values.astype(np.bool_)  # type: ignore[no-any-return]


def key_prefix(group: str, split: str) -> str:
    """The group's name without what no key can hold; of the file itself the split's."""
    return group.strip("/").replace("/", "_").replace(".", "_") or split


def numbered_keys(prefix: str, rows: int) -> list[str]:
    """All of one length, so that they sort like the rows."""
    digits = len(str(rows - 1))
    return [f"{prefix}_{row:0{digits}d}" for row in range(rows)]


def check_keys(keys: list[str], where: str) -> None:
    """Raises ValueError where a key is there twice, or no name inside a tar."""
    seen: set[str] = set()
    for row, key in enumerate(keys):
        if not key or "." in key or "/" in key:
            raise ValueError(f"{where}: key {key!r} (row {row}) is empty or holds a dot or a slash, which no key can")
        if key in seen:
            raise ValueError(f"{where}: key {key!r} is there twice")
        seen.add(key)
