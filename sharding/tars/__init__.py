"""Tars as they are: their structure, a manifest for those that others made, and the comparison of both."""
