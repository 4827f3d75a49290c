"""Pixels and rows: from GeoTIFF to tar shards, and from shards to batches. Knows no method and no process group."""
