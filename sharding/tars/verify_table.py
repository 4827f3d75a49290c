"""What the manifest's table must fulfil by itself, before any tar is opened.

Letters: N rows, C classes.
"""

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from sharding import reben
from sharding.manifest import MANIFEST_PARQUET, SPLITS, Manifest

__all__ = ["Fault", "check_table"]


@dataclass(frozen=True)
class Fault:
    """One thing that is wrong: what kind, in which file, of which sample (empty: of none)."""

    kind: str
    shard: str
    key: str
    message: str

    def __str__(self) -> str:
        return f"{self.shard}: {f'{self.key}: ' if self.key else ''}{self.message}"


def check_table(manifest: Manifest, table: pa.Table) -> list[Fault]:
    """All faults of the table, whose columns are those of ``table_schema``."""
    return [*_numbering(manifest, table), *_keys(manifest, table), *_labels(manifest, table)]


def _fault(kind: str, message: str, key: str = "") -> Fault:
    return Fault(kind, MANIFEST_PARQUET, key, message)


def _numbering(manifest: Manifest, table: pa.Table) -> list[Fault]:
    """Rows of a split are 0, 1, 2, ... along its shards, in the order of each tar."""
    faults = []
    unknown = sorted(set(pc.unique(table["split"]).to_pylist()) - set(SPLITS), key=str)
    if unknown:
        faults.append(_fault("rows", f"there are splits {unknown}: known are {', '.join(SPLITS)}"))
    first_offset = table["offset"].combine_chunks().flatten().to_numpy()[:: len(manifest.members)]
    for split in SPLITS:
        chosen = pc.equal(table["split"], split).to_numpy().astype(np.bool_)
        row_N, shard_N = table["row"].to_numpy()[chosen], table["shard"].to_numpy()[chosen]
        order = np.argsort(row_N, kind="stable")
        numbers = [number for number, shard in enumerate(manifest.shards) if shard.split == split]
        sizes = manifest.rows_per_shard(split)
        if len(row_N) != sizes.sum():
            faults.append(_fault("rows", f"{split} has {len(row_N)} rows, {sizes.sum()} in manifest.json"))
            continue
        wrong = np.flatnonzero(row_N[order] != np.arange(len(row_N)))
        if len(wrong):
            faults.append(_fault("rows", f"{split} is not numbered 0, 1, 2, ...: row {wrong[0]} is missing or double"))
            continue
        wrong = np.flatnonzero(shard_N[order] != np.repeat(numbers, sizes))
        if len(wrong):
            faults.append(_fault("rows", f"{split}: row {wrong[0]} is not in the shard that its number says"))
            continue
        steps = np.diff(first_offset[chosen][order])
        wrong = np.flatnonzero((steps <= 0) & (np.diff(shard_N[order]) == 0))
        if len(wrong):
            faults.append(_fault("rows", f"{split}: row {wrong[0] + 1} does not lie behind row {wrong[0]} in its tar"))
    return faults


def _keys(manifest: Manifest, table: pa.Table) -> list[Fault]:
    faults = []
    if pc.count_distinct(table["key"]).as_py() < len(table):
        counts = pc.value_counts(table["key"].combine_chunks())
        twice = counts.filter(pc.greater(counts.field("counts"), 1))
        faults += [_fault("keys", f"occurs {one['counts']} times", str(one["values"])) for one in twice.to_pylist()]
    if manifest.dataset == reben.DATASET:
        for key, split in zip(table["key"].to_pylist(), table["split"].to_pylist()):
            try:
                rule = reben.split_of(key)
            except ValueError as error:
                faults.append(_fault("split", str(error), key))
                continue
            if rule != split:
                faults.append(_fault("split", f"is in {split}, by reBEN's rule in {rule}", key))
    return faults


def _labels(manifest: Manifest, table: pa.Table) -> list[Fault]:
    keys = table["key"].combine_chunks()
    column = table["labels"].combine_chunks()
    if column.null_count:
        return [_fault("labels", f"{column.null_count} rows have no labels at all")]
    labels_NC = column.flatten().to_numpy(zero_copy_only=False).reshape(-1, len(manifest.classes))
    faults = [_fault("labels", "has no label", keys[row].as_py()) for row in _rows(~labels_NC.any(axis=1))]
    coverage = table["coverage"].combine_chunks()
    known = np.flatnonzero(coverage.is_valid().to_numpy(zero_copy_only=False))
    shares = coverage.drop_null().flatten().to_numpy(zero_copy_only=False).reshape(len(known), len(manifest.classes))
    # float32 shares of one map; not (0 <= x) also finds NaN
    wrong = ~((shares >= 0) & (shares <= 1)).all(axis=1) | (shares.sum(axis=1) > 1.001)
    for row in _rows(wrong):
        message = f"area shares from {shares[row].min()} to {shares[row].max()}, sum {shares[row].sum():.4f}"
        faults.append(_fault("coverage", message, keys[known[row]].as_py()))
    return faults


def _rows(wrong_N: NDArray[np.bool_]) -> list[int]:
    return [int(row) for row in np.flatnonzero(wrong_N)]
