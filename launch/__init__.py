"""Processes: the only reader of the environment and the only maker of process groups."""
