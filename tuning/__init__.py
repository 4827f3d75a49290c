"""Searches over many runs; the only importer of ray."""
