"""Our loader, opened for the benchmarks: the one place that knows its interface."""

from sharding.files import LocalFiles
from sharding.loader import ShardLoader
from sharding.manifest import LabelTable, Manifest
from sharding.reader import PatchReader, select_bands

__all__ = ["open_ours"]


def open_ours(
    manifest: Manifest, table: LabelTable, *, max_rows: int, workers: int, check_digests: bool = True
) -> ShardLoader:
    """All bands of local shards."""
    groups = select_bands(manifest, manifest.bands)
    reader = PatchReader(manifest, table, groups, LocalFiles(manifest.root), check_digests=check_digests)
    return ShardLoader(reader, max_rows=max_rows, workers=workers)
