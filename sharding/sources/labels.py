"""Labels from a file beside the pixels: a table of 0 and 1, or lists of class names, as CSV, TSV or parquet.

Letters: N keys, C classes.
"""

import csv
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from sharding import reben
from sharding.images import IMAGE_NAMES
from sharding.manifest import SPLITS

__all__ = ["SPLIT_NAMES", "LabelFile", "TableFile", "join_name", "parse_labels", "parse_splits", "read_labels",
           "split_name"]  # fmt: skip

# Names of splits as data sets use them, and ours.
SPLIT_NAMES = {name: name for name in SPLITS} | dict.fromkeys(("val", "valid", "dev"), "validation")

_KEY_COLUMNS = ("key", "patch_id")


@dataclass(frozen=True)
class LabelFile:
    """Labels by key.

    Attributes:
        keys: N names as the file has them, each once.
        classes: C names.
        labels_NC: bool; a row may be without any label.
        splits: N names out of ``manifest.SPLITS``, or None where no file tells them.
    """

    keys: list[str]
    classes: tuple[str, ...]
    labels_NC: NDArray[np.bool_]
    splits: list[str] | None


@dataclass(frozen=True)
class TableFile:
    """A file's name, for messages, and its bytes: it may lie inside an archive."""

    name: str
    content: bytes


def read_labels(path: Path, split_file: Path | None) -> LabelFile:
    """The labels in ``path``, and the splits in its column ``split`` or else in ``split_file``.

    Three forms are read: CSV or TSV (a column of keys, under any name, then a column of 0 and 1 per class); the same as
    parquet (keys in ``key`` or ``patch_id``); parquet with a list of class names per key in ``labels``, whose classes
    are all names that occur, sorted, or reBEN's 19 in their order where all that occur are among these.

    Keys are compared by ``join_name``. What the split file does not list is left out.

    Raises:
        ValueError: a file that cannot be used; names file, line and column.
        OSError: no such file.
    """
    split_table = None if split_file is None else TableFile(str(split_file), split_file.read_bytes())
    return parse_labels(TableFile(str(path), path.read_bytes()), split_table)


def parse_labels(file: TableFile, split_file: TableFile | None = None) -> LabelFile:
    """As ``read_labels``, of files already read."""
    found = _parquet_labels(file) if file.content.startswith(b"PAR1") else _csv_labels(file)
    if not found.keys:
        raise ValueError(f"{file.name} lists no labels")
    return found if split_file is None else _selected(found, file.name, split_file)


def parse_splits(file: TableFile) -> dict[str, str]:
    """``join_name`` of each key in a CSV or TSV of keys and splits -> its split, out of ``manifest.SPLITS``.

    Raises:
        ValueError: as ``read_labels`` does.
    """
    rows = _csv_rows(file)
    _, header = next(rows)
    columns = [i for i, name in enumerate(header) if name.lower() == "split" and i > 0]
    if len(columns) != 1:
        raise ValueError(f"{file.name} is no list of keys and splits: its columns are {', '.join(header)}")
    splits: dict[str, str] = {}
    for line, cells in rows:
        name = join_name(cells[0])
        if name in splits:
            raise ValueError(f"{file.name}, line {line}: {cells[0]} is listed twice")
        splits[name] = split_name(cells[columns[0]], f"{file.name}, line {line}")
    return splits


def join_name(key: str) -> str:
    """What two keys have in common that name the same image: no folder, no image extension, no case."""
    name = PurePosixPath(key.strip().replace("\\", "/")).name.lower()
    stem, dot, extension = name.rpartition(".")
    return stem if dot and extension in IMAGE_NAMES else name


def split_name(text: str, where: str) -> str:
    """The split out of ``manifest.SPLITS`` that ``text`` means. Raises ValueError, which begins with ``where``."""
    split = SPLIT_NAMES.get(text.strip().lower())
    if split is None:
        raise ValueError(f"{where}: split {text!r} is unknown: known are {', '.join(SPLIT_NAMES)}")
    return split


def _selected(found: LabelFile, name: str, split_file: TableFile) -> LabelFile:
    """What the split file lists."""
    if found.splits is not None:
        raise ValueError(f"{name} has a column of splits already: leave {split_file.name} away, or remove the column")
    by_name = parse_splits(split_file)
    names = [join_name(key) for key in found.keys]
    rows = [row for row, joined in enumerate(names) if joined in by_name]
    if not rows:
        raise ValueError(
            f"no key of {name} is in {split_file.name}: the first are {found.keys[0]!r} and {next(iter(by_name), '')!r}"
        )
    keys, splits = [found.keys[row] for row in rows], [by_name[names[row]] for row in rows]
    return LabelFile(keys, found.classes, found.labels_NC[rows], splits)


# CSV and TSV


def _csv_labels(file: TableFile) -> LabelFile:
    rows = _csv_rows(file)
    _, header = next(rows)
    columns = [i for i, name in enumerate(header) if i > 0 and name.lower() != "split"]
    split_column = next((i for i, name in enumerate(header) if i > 0 and name.lower() == "split"), None)
    classes = _checked_classes([header[i] for i in columns], file.name)
    keys: dict[str, int] = {}  # and the line of each
    lines, splits = [], []
    for line, cells in rows:
        if cells[0] in keys:
            raise ValueError(f"{file.name}: {cells[0]} is in line {keys[cells[0]]} and again in line {line}")
        keys[cells[0]] = line
        lines.append(_zeros_and_ones([cells[i] for i in columns], classes, f"{file.name}, line {line}"))
        if split_column is not None:
            splits.append(split_name(cells[split_column], f"{file.name}, line {line}"))
    labels = np.array(lines, dtype=np.bool_).reshape(len(keys), len(classes))
    return LabelFile([*keys], classes, labels, None if split_column is None else splits)


def _csv_rows(file: TableFile) -> Iterator[tuple[int, list[str]]]:
    """Line number and stripped cells; the header first. All have as many cells as the header, and a key."""
    try:
        text = file.content.decode("utf-8-sig")  # spreadsheets write a byte order mark
    except UnicodeDecodeError as error:
        raise ValueError(f"{file.name} is neither parquet nor UTF-8 text ({error.reason})") from error
    first = text.partition("\n")[0]
    reader = csv.reader(io.StringIO(text, newline=""), delimiter="\t" if "\t" in first else ",", strict=True)
    width = 0
    try:
        for cells in reader:
            if not any(cells):
                continue
            cells = [cell.strip() for cell in cells]
            where = f"{file.name}, line {reader.line_num}"
            if width and len(cells) != width:
                raise ValueError(f"{where}: {len(cells)} cells where the header has {width}")
            if width and not cells[0]:
                raise ValueError(f"{where}: no key in the first column")
            width = width or len(cells)
            yield reader.line_num, cells
    except csv.Error as error:
        raise ValueError(f"{file.name}, line {reader.line_num}: {error}") from error
    if not width:
        raise ValueError(f"{file.name} is empty")


def _zeros_and_ones(cells: Sequence[str], classes: Sequence[str], where: str) -> list[bool]:
    if not {*cells} <= {"0", "1"}:
        place = next(i for i, cell in enumerate(cells) if cell not in ("0", "1"))
        raise ValueError(f"{where}, column {classes[place]}: {cells[place]!r} is neither 0 nor 1")
    return [cell == "1" for cell in cells]


def _checked_classes(classes: Sequence[str], name: str) -> tuple[str, ...]:
    if not classes:
        raise ValueError(f"{name} has no column of a class: a first column of keys, then one column of 0 and 1 a class")
    wrong = next((c for i, c in enumerate(classes) if not c or c in classes[:i]), None)
    if wrong is not None:
        raise ValueError(f"{name}: class {wrong!r} heads two columns" if wrong else f"{name}: a column without a name")
    return tuple(classes)


# parquet


def _parquet_labels(file: TableFile) -> LabelFile:
    try:
        table = pq.read_table(pa.BufferReader(file.content))
    except pa.ArrowException as error:
        raise ValueError(f"{file.name} is no parquet file, or damaged: {error}") from error
    key_column = next((name for name in _KEY_COLUMNS if name in table.column_names), None)
    if key_column is None:
        raise ValueError(
            f"{file.name} has no column {' or '.join(_KEY_COLUMNS)}; it has {', '.join(table.column_names)}"
        )
    keys = table[key_column].to_pylist()
    _check_parquet_keys(keys, file.name)
    splits = None
    if "split" in table.column_names:
        splits = [split_name(str(s), f"{file.name}, {key}") for key, s in zip(keys, table["split"].to_pylist())]
    if "labels" in table.column_names:
        classes, labels = _from_lists(table["labels"], keys, file.name)
    else:
        columns = [name for name in table.column_names if name not in (key_column, "split")]
        classes = _checked_classes(columns, file.name)
        labels = np.stack([_flags(table[name], keys, f"{file.name}, column {name}") for name in classes], axis=1)
    return LabelFile(keys, classes, labels, splits)


def _check_parquet_keys(keys: list[Any], name: str) -> None:
    wrong = next((row for row, key in enumerate(keys) if not isinstance(key, str) or not key), None)
    if wrong is not None:
        raise ValueError(f"{name}, row {wrong}: the key {keys[wrong]!r} is no text")
    if len({*keys}) < len(keys):
        seen: set[str] = set()
        twice = next(key for key in keys if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"{name}: {twice} is listed twice")


def _from_lists(column: pa.ChunkedArray, keys: list[str], name: str) -> tuple[tuple[str, ...], NDArray[np.bool_]]:
    kind = column.type
    if not (pa.types.is_list(kind) or pa.types.is_large_list(kind)) or not pa.types.is_string(kind.value_type):
        raise ValueError(f"{name}: the column labels is {kind}; lists of class names are expected")
    lists: list[list[str | None]] = [names or [] for names in column.to_pylist()]
    found: set[str | None] = {label for names in lists for label in names}
    if found & {None, ""}:
        row = next(row for row, names in enumerate(lists) if {*names} & {None, ""})
        raise ValueError(f"{name}, {keys[row]}: a label without a name")
    if not found:
        raise ValueError(f"{name} lists no labels")
    classes = reben.CLASSES if found <= {*reben.CLASSES} else tuple(sorted(str(label) for label in found))
    numbers = {label: number for number, label in enumerate(classes)}
    labels = np.zeros((len(lists), len(classes)), dtype=np.bool_)
    for row, names in enumerate(lists):
        labels[row, [numbers[str(label)] for label in names]] = True
    return classes, labels


def _flags(column: pa.ChunkedArray, keys: list[str], where: str) -> NDArray[np.bool_]:
    """bool [N] of a column of bool, 0 and 1."""
    values = column.to_pylist()
    row = next((row for row, value in enumerate(values) if value not in (0, 1)), None)  # False and True are 0 and 1
    if row is not None:
        raise ValueError(f"{where}, {keys[row]}: {values[row]!r} is neither 0 nor 1")
    return np.array(values, dtype=np.bool_)
