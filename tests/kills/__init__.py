"""Kills a run at drawn moments, lets the same command go on, and compares what is left with an undisturbed run, bit for
bit: ``python -m tests.kills --help``.
"""
