"""Labels of patches as a file for others: parquet, CSV or GeoJSON, a line per patch.

Columns: ``patch_id`` (named as in reBEN's metadata), lists of class names (joined by ``;`` in CSV), a column
``<model>/<class>`` per probability, and, where places are known, ``crs`` (EPSG:n), ``xmin``, ``ymin``, ``xmax`` and
``ymax`` in metres of that CRS; GeoJSON has the footprint in longitude and latitude. What is unknown is null. Letters: N
patches, C classes.
"""

import argparse
import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet as pq
from numpy.typing import NDArray

from adagc_dist.tracking import replacing
from sharding.places import Places

__all__ = ["add_output", "check_output", "chosen_format", "labels_table", "write_labels"]

_ENDINGS = {".parquet": "parquet", ".pq": "parquet", ".csv": "csv", ".geojson": "geojson", ".json": "geojson"}
_PIECE_ROWS = 4096
_DEGREE_DIGITS = 6  # 0.1 m


def add_output(parser: argparse.ArgumentParser) -> None:
    """--out and --format."""
    parser.add_argument("--out", type=_file, required=True, metavar="FILE", help="the file to write")
    parser.add_argument("--format", choices=("parquet", "csv", "geojson"), help="of FILE (default: by its ending)")


def check_output(out: Path) -> None:
    """Whether it can be written, before hours are spent on what it is to hold; makes the folder.

    Raises:
        OSError: nothing can be written there.
    """
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out.parent):
            return
    except OSError as error:
        reason = "a part of its path is a file" if isinstance(error, FileExistsError) else error.strerror
        raise OSError(f"{out} cannot be written ({reason}): name another file with --out") from error


def chosen_format(out: Path, form: str | None, places: Places | None) -> str:
    """parquet, csv or geojson: ``form``, or what the ending of ``out`` says.

    Raises:
        ValueError: the ending says nothing; or GeoJSON, and no patch has a place.
    """
    chosen = form or _ENDINGS.get(out.suffix.lower())
    if chosen is None:
        raise ValueError(f"{out} ends in none of {', '.join(_ENDINGS)}: name such a file, or give its --format")
    if chosen == "geojson" and (places is None or not places.known_N.any()):
        raise ValueError(f"{out}: no patch has a known place to draw it at; take --format parquet or csv")
    return chosen


def labels_table(
    keys: pa.Array,
    classes: Sequence[str],
    *,
    sets: Mapping[str, NDArray[np.bool_]],
    scores: Mapping[str, NDArray[np.float32]],
    places: Places | None,
    unknown: Mapping[str, NDArray[np.bool_]],
) -> pa.Table:
    """The table of N patches.

    Args:
        keys: patch ids.
        sets: column -> bool [N, C], the classes in it.
        scores: model -> float32 [N, C] probabilities; NaN where it has none.
        places: None where none is known.
        unknown: column of ``sets`` -> bool [N], the patches that it says nothing about.
    """
    columns: dict[str, Any] = {"patch_id": keys}
    columns |= {name: _names(chosen_NC, classes, unknown.get(name)) for name, chosen_NC in sets.items()}
    for model, values_NC in scores.items():
        columns |= {f"{model}/{name}": _nullable(values_NC[:, c]) for c, name in enumerate(classes)}
    if places is not None and places.known_N.any():
        crs = [f"EPSG:{epsg}" if epsg else None for epsg in places.epsg_N.tolist()]
        columns["crs"] = pa.array(crs, pa.string())
        columns |= dict(zip(("xmin", "ymin", "xmax", "ymax"), map(_nullable, places.bounds_N4().T)))
    return pa.table(columns)


def write_labels(table: pa.Table, out: Path, form: str, places: Places | None, notes: Mapping[str, Any]) -> None:
    """Write ``table`` as ``form``; ``out`` appears whole or not at all.

    Args:
        notes: about the whole; parquet and GeoJSON carry them, as the JSON value ``adagc``.
    """
    with replacing(out) as partial:
        if form == "parquet":
            pq.write_table(table.replace_schema_metadata({"adagc": json.dumps(notes)}), partial, compression="zstd")
        elif form == "csv":
            pyarrow.csv.write_csv(_flat(table), partial)
        else:
            assert places is not None
            with partial.open("w", encoding="utf-8") as stream:
                _write_geojson(table, stream, places.rings_N52(), notes)


def _write_geojson(table: pa.Table, stream: TextIO, rings_N52: NDArray[np.float64], notes: Mapping[str, Any]) -> None:
    """A feature a line (RFC 7946), without the columns that the geometry says."""
    table = table.drop_columns(["xmin", "ymin", "xmax", "ymax"])
    stream.write(f'{{"type": "FeatureCollection", "adagc": {json.dumps(notes)}, "features": [')
    for start in range(0, len(table), _PIECE_ROWS):
        rings = rings_N52[start : start + _PIECE_ROWS].round(_DEGREE_DIGITS).tolist()
        for number, (row, ring) in enumerate(zip(table.slice(start, _PIECE_ROWS).to_pylist(), rings), start):
            known = row["crs"] is not None
            feature = {
                "type": "Feature",
                "id": row["patch_id"],
                "geometry": {"type": "Polygon", "coordinates": [ring]} if known else None,
                "properties": {name: _short(value) for name, value in row.items()},
            }
            stream.write(("," if number else "") + "\n" + json.dumps(feature, ensure_ascii=False))
    stream.write("\n]}\n")


def _short(value: object) -> object:
    return round(value, 6) if isinstance(value, float) else value


def _flat(table: pa.Table) -> pa.Table:
    """Lists as one text each."""
    columns = {
        name: pc.binary_join(column, ";") if pa.types.is_list(column.type) else column
        for name, column in zip(table.column_names, table.columns)
    }
    return pa.table(columns)


def _names(chosen_NC: NDArray[np.bool_], classes: Sequence[str], unknown_N: NDArray[np.bool_] | None) -> pa.ListArray:
    """Per row the names of its classes."""
    if unknown_N is not None:
        chosen_NC = chosen_NC & ~unknown_N[:, None]
    stops = np.concatenate([[0], np.cumsum(chosen_NC.sum(axis=1))]).astype(np.int32)
    names = pa.array(classes).take(pa.array(np.nonzero(chosen_NC)[1]))
    mask = None if unknown_N is None else pa.array(unknown_N)
    return pa.ListArray.from_arrays(pa.array(stops), names, mask=mask)


def _nullable(values_N: NDArray[np.floating]) -> pa.Array:
    return pa.array(np.ascontiguousarray(values_N), from_pandas=True)


def _file(text: str) -> Path:
    """A type of arguments: a file to be written."""
    if Path(text).is_dir():
        raise argparse.ArgumentTypeError(f"{text} is a folder: name a file, e.g. {Path(text, 'labels.parquet')}")
    return Path(text)
