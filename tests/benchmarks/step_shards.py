"""Shards for the benchmarks of training: synthetic patches again and again, under keys of their own.

Written here and not by ``sharding.writer``, whose webdataset a machine that only trains may lack, and GDAL with it. The
reader sees no difference: it finds headers, keys and digests as everywhere.
"""

import tarfile
from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import xxhash

from sharding import reben
from sharding.manifest import Manifest, Member, Shard, file_digest, table_schema, write_manifest
from sharding.rng import derive_rng
from sharding.sample import Place, Sample, encode_members
from sharding.statistics import add_sums, largest_side, measure, statistics_of
from sharding.synthetic.labelsets import draw_labels
from sharding.synthetic.scenes import make_scene

__all__ = ["scenes", "write_repeated"]

ROWS_PER_SHARD = 1000


def scenes(count: int) -> list[Sample]:
    """Patches of a synthetic reBEN tree: 12 bands at native size, 160 kB each."""
    return [_scene(number) for number in range(count)]


def _scene(number: int) -> Sample:
    rng = derive_rng(0, "benchmark", "scene", number)
    classes = draw_labels(rng)
    scene = make_scene(rng, classes, month=6)
    labels_C = np.zeros(len(reben.CLASSES), dtype=np.bool_)
    labels_C[classes] = True
    payload = {member.name: pixels for member, pixels in zip(reben.MEMBERS, scene.pixels)}
    return Sample(f"scene{number}", payload, labels_C, None, Place(32633, 600_000.0, 5_300_040.0))


def write_repeated(
    folder: Path,
    samples: Sequence[Sample],
    *,
    rows: Mapping[str, int],
    members: tuple[Member, ...] = reben.MEMBERS,
    classes: tuple[str, ...] = reben.CLASSES,
) -> Manifest:
    """A shard folder with so many ``rows`` of each split, which are ``samples`` in turn."""
    folder.mkdir(parents=True)
    shards: list[Shard] = []
    lines: list[dict[str, Any]] = []
    for split, count in rows.items():
        for first in range(0, count, ROWS_PER_SHARD):
            path = folder / f"{split}-{first // ROWS_PER_SHARD:06d}.tar"
            numbers = range(first, min(first + ROWS_PER_SHARD, count))
            with path.open("wb") as stream:
                for number in numbers:
                    sample = samples[number % len(samples)]
                    named = Sample(f"{split}{number:07d}", sample.payload, sample.labels_C, None, sample.place)
                    lines.append(
                        {"split": split, "row": number, "shard": len(shards)} | _append(stream, named, classes)
                    )
                stream.write(bytes(2 * tarfile.BLOCKSIZE))
            shards.append(Shard(path.name, split, len(numbers), path.stat().st_size, file_digest(path)))
    table = pa.Table.from_pylist(lines, schema=table_schema(len(classes), len(members)))
    sums = [_sums(samples, members, side) for side in dict.fromkeys((0, largest_side(members)))]
    return write_manifest(Manifest(folder, "synthetic", classes, members, tuple(shards), tuple(sums), 0, ""), table)


def _append(stream: Any, sample: Sample, classes: tuple[str, ...]) -> dict[str, Any]:
    """Write a sample's members; where they lie and what they are, as the manifest has it."""
    encoded = encode_members(sample, classes)
    offsets = []
    for name, content in encoded.items():
        header = tarfile.TarInfo(f"{sample.key}.{name}")
        header.size = len(content)
        stream.write(header.tobuf(tarfile.USTAR_FORMAT))
        offsets.append(stream.tell())
        stream.write(content + bytes(-len(content) % tarfile.BLOCKSIZE))
    payload = [encoded[name] for name in sample.payload]
    place = sample.place
    return {
        "key": sample.key,
        "offset": offsets[: len(payload)],  # json comes last
        "size": [len(content) for content in payload],
        "digest": [xxhash.xxh3_64_intdigest(content) for content in payload],
        "labels": sample.labels_C.tolist(),
        "coverage": None,
        "epsg": place and place.epsg,
        "origin_x": place and place.x,
        "origin_y": place and place.y,
    }


def _sums(samples: Sequence[Sample], members: tuple[Member, ...], side: int) -> Any:
    """Statistics over each of the samples once."""
    *_, total = accumulate(_measured(samples, members, side), add_sums)
    return statistics_of(total, sum(len(member.bands) for member in members), side)


def _measured(samples: Sequence[Sample], members: tuple[Member, ...], side: int) -> Iterator[Any]:
    return (measure(members, sample.payload, side) for sample in samples)
