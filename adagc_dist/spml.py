"""Single-positive labels: of each row's full labels, the one that is observed.

A row's observed label is a function of (seed, sample key) alone, whatever its number, shard or rank, and the same in
every epoch (DESIGN decision 7). The policies are those of the paper's experiments: Random and Dominant; Full is the
upper bound.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from sharding.manifest import LabelTable
from sharding.rng import hashed_uniform

__all__ = ["POLICIES", "observe", "refuse_rows"]

POLICIES = ("random", "dominant", "full")


def observe(table: LabelTable, policy: str, seed: int, classes: Sequence[str]) -> NDArray[np.bool_]:
    """bool [N, C]: the observed labels, a subset of ``table.labels_NC``.

    Args:
        table: the rows of one split, with full labels and area shares.
        policy: "random" keeps one of the row's labels, all equally likely; "dominant" the one with the largest area
            share (of equal ones the lowest class index); "full" keeps all.
        seed: of the random draw (``spml.seed``); the other policies ignore it.
        classes: C class names, in the table's order.

    Raises:
        ValueError: unknown policy, a class list of another length, a row without labels, or "dominant" where areas are
            missing.
    """
    if policy not in POLICIES:
        raise ValueError(f"spml.policy={policy!r} is unknown: one of {', '.join(POLICIES)}")
    if table.labels_NC.shape[1] != len(classes):
        raise ValueError(
            f"split {table.split!r} has {table.labels_NC.shape[1]} label columns for {len(classes)} class names: "
            "take both from the same manifest"
        )
    refuse_rows(table, table.labels_NC.sum(axis=1) == 0, "have no label at all: shard again without them")
    if policy == "full":
        return table.labels_NC.copy()
    column_N = _random_column(table, seed) if policy == "random" else _dominant_column(table)
    observed_NC = np.zeros_like(table.labels_NC)
    observed_NC[np.arange(len(table)), column_N] = True
    return observed_NC


def _random_column(table: LabelTable, seed: int) -> NDArray[np.int64]:
    """int64 [N]: the column of the k-th of a row's n labels, k = floor(u n)."""
    position_NC = table.labels_NC.cumsum(axis=1, dtype=np.int16)  # int16: fast, and no data set has 32,768 classes
    count_N = position_NC[:, -1]
    u_N = hashed_uniform(table.key_hashes_N, seed, "spml")
    k_N = np.minimum((u_N * count_N).astype(np.int16), count_N - 1)  # u n may round up to n
    column_N: NDArray[np.int64] = (position_NC > k_N[:, None]).argmax(axis=1)  # the first where k + 1 labels are passed
    return column_N


def _dominant_column(table: LabelTable) -> NDArray[np.int64]:
    """int64 [N]: the label with the largest area; argmax takes the first of equal ones."""
    remedy = (
        "so they have no dominant label: take spml.policy=random, or shard again from a tree with reference maps "
        "(or coverage) for all patches"
    )
    refuse_rows(table, np.isnan(table.coverage_NC).sum(axis=1) > 0, f"have no area shares, {remedy}")
    share_NC = np.where(table.labels_NC, table.coverage_NC, -1)
    refuse_rows(table, share_NC.max(axis=1) <= 0, f"have no area in any of their labels, {remedy}")
    column_N: NDArray[np.int64] = share_NC.argmax(axis=1)
    return column_N


def refuse_rows(table: LabelTable, bad_N: NDArray[np.bool_], text: str) -> None:
    """Raises ValueError where there are bad rows (bool [N]): how many, the first one's key, and ``text``."""
    count = int(bad_N.sum())
    if count:
        first = table.keys[int(bad_N.argmax())].as_py()
        raise ValueError(f"{count} of the {len(table)} rows of split {table.split!r} (the first is {first}) {text}")
