"""One sample and its lossless, byte-reproducible form as tar members."""

import io
import json
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

__all__ = ["Place", "Sample", "encode_members"]


@dataclass(frozen=True)
class Place:
    """Where a patch lies: EPSG code of its CRS, and the map coordinates (metres) of its upper left corner."""

    epsg: int
    x: float
    y: float


@dataclass(frozen=True)
class Sample:
    """A patch before it is a row.

    Attributes:
        key: the patch id; no dot (webdataset cuts member names at the first) and no slash.
        payload: member extension -> array (``"b10.npy"``: uint16 [4, 120, 120]) or encoded bytes (``"jpg"``).
        labels_C: bool [C], the full label set.
        coverage_C: float32 [C], each class's share of the patch's area, or None where no reference map is at hand.
        place: position, or None where unknown.
    """

    key: str
    payload: Mapping[str, NDArray[np.generic] | bytes]
    labels_C: NDArray[np.bool_]
    coverage_C: NDArray[np.float32] | None
    place: Place | None


def encode_members(sample: Sample, classes: tuple[str, ...]) -> dict[str, bytes]:
    """Member extension -> bytes, payload first (in the payload's order) and ``json`` last.

    Raises:
        ValueError: the key holds a dot or a slash.
    """
    if "." in sample.key or "/" in sample.key or not sample.key:
        raise ValueError(
            f"key {sample.key!r}: a key is not empty and holds no dot and no slash (webdataset cuts at the first dot)"
        )
    members = {name: value if isinstance(value, bytes) else _npy(value) for name, value in sample.payload.items()}
    members["json"] = _json(sample, classes)
    return members


def _npy(array: NDArray[np.generic]) -> bytes:
    """The .npy form, version 1.0: a header of 128 bytes for our shapes, then the pixels, little-endian, C order."""
    buffer = io.BytesIO()
    little = np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("<"))
    np.lib.format.write_array(buffer, little, version=(1, 0), allow_pickle=False)
    return buffer.getvalue()


def _json(sample: Sample, classes: tuple[str, ...]) -> bytes:
    record: dict[str, object] = {
        "key": sample.key,
        "labels": [name for name, present in zip(classes, sample.labels_C.tolist()) if present],
        "coverage": None,
        "crs": None,
        "origin": None,
    }
    if sample.coverage_C is not None:
        record["coverage"] = {
            name: round(share, 9) for name, share in zip(classes, sample.coverage_C.tolist()) if share > 0
        }
    if sample.place is not None:
        record["crs"] = f"EPSG:{sample.place.epsg}"
        record["origin"] = [sample.place.x, sample.place.y]
    return json.dumps(record, ensure_ascii=False, sort_keys=True).encode()
