"""What a shard folder holds, read in the two ways in which others read it."""

import gc
import json
import warnings
from pathlib import Path
from typing import Any

import webdataset

from sharding.manifest import SPLITS, load_manifest, load_table

__all__ = ["members_by_ranges", "members_by_webdataset"]


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
