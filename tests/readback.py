"""What a folder of shards and a tar hold: bytes, and samples in the two ways in which others read them."""

import gc
import json
import warnings
from pathlib import Path
from typing import Any

import webdataset

from sharding.manifest import SPLITS, file_digest, load_manifest, load_table
from sharding.tars.read import HopReader
from sharding.tars.structure import walk_tar

__all__ = ["digests", "members_by_ranges", "members_by_webdataset", "members_of_tar"]


def digests(root: Path) -> dict[str, str]:
    """Of all files below ``root``, by their names below it."""
    return {str(path.relative_to(root)): file_digest(path) for path in sorted(root.rglob("*")) if path.is_file()}


def members_of_tar(path: Path) -> list[tuple[str, int, int]]:
    """(name, offset, size) of each regular file. Raises TarFault."""
    with HopReader(path) as reader:
        return list(walk_tar(reader, str(path)))


def members_by_webdataset(root: Path) -> dict[str, tuple[bytes, dict[str, Any]]]:
    """Key -> payload and json, through plain webdataset without decoding."""
    [member] = load_manifest(root).members
    urls = [str(path) for path in sorted(root.glob("*.tar"))]
    found = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # webdataset leaves closing its files to the garbage collector
        for sample in webdataset.WebDataset(urls, shardshuffle=False, empty_check=False):
            assert {name for name in sample if not name.startswith("__")} == {member.name, "json"}
            found[sample["__key__"]] = (sample[member.name], json.loads(sample["json"]))
        gc.collect()
    return found


def members_by_ranges(root: Path) -> dict[str, tuple[str, bytes]]:
    """Key -> split and payload, through the manifest's byte ranges."""
    manifest = load_manifest(root)
    found = {}
    for split in SPLITS:
        if not manifest.num_rows(split):
            continue
        table = load_table(manifest, split)
        for row, key in enumerate(table.keys.to_pylist()):
            with (root / manifest.shards[table.shard_N[row]].name).open("rb") as stream:
                stream.seek(int(table.offsets_NM[row, 0]))
                found[key] = (split, stream.read(int(table.sizes_NM[row, 0])))
    return found
