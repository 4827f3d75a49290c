"""Shards for comparisons, with a validation split of their own: a fifth of the training patches, drawn by name.

    python -m tests.benchmarks.carve ../shared/data shards

From `eurosat_composites.h5` and `aid_multilabel_150px.zip` of that folder come `shards/composites` and `shards/aid`.
Their validation groups become the test split, so that what is chosen on validation was not chosen on test. A run sees
one observed label of each validation patch; the true ones are for design.
"""

import argparse
import csv
import io
import sys
import zipfile
from collections.abc import Sequence
from pathlib import Path

import h5py
import numpy as np

from launch.cli import main as adagc
from sharding.rng import derive_rng

__all__ = ["main"]

_PART = 5  # one in so many training patches is for validation
_SEED = 0


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="folder of the two files")
    parser.add_argument("out", type=Path, help="folder for the shards; the two made files stay beside them")
    arguments = parser.parse_args(argv)
    arguments.out.mkdir(parents=True, exist_ok=True)
    return _composites(arguments.data, arguments.out) or _aid(arguments.data, arguments.out)


def _composites(data: Path, out: Path) -> int:
    made = out / "composites.h5"
    with h5py.File(data / "eurosat_composites.h5") as source, h5py.File(made, "w") as target:
        target.attrs.update(source.attrs)
        train = source["train"]
        held = _is_held(len(train["images"]))
        for split, group, rows in (
            ("train", train, ~held),
            ("validation", train, held),
            ("test", source["validation"], slice(None)),
        ):
            for name, values in group.items():
                target[f"{split}/{name}"] = values[()][rows]
    return adagc(["shard", "hdf5", "--file", str(made), "--out", str(out / "composites")])


def _aid(data: Path, out: Path) -> int:
    archive, made = data / "aid_multilabel_150px.zip", out / "aid.csv"
    with zipfile.ZipFile(archive) as members:
        rows = list(csv.DictReader(io.TextIOWrapper(members.open("split.csv"), "utf-8")))
    held = iter(_is_held(sum(row["split"] == "train" for row in rows)))
    with made.open("w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(["image", "split"])
        for row in rows:
            split = ("validation" if next(held) else "train") if row["split"] == "train" else "test"
            writer.writerow([row["image"], split])
    words = ["--root", str(archive), "--labels", "multilabel.csv", "--split-file", str(made)]
    return adagc(["shard", "images", *words, "--out", str(out / "aid")])


def _is_held(rows: int) -> np.ndarray[tuple[int], np.dtype[np.bool_]]:
    """bool [rows]: which training patches are for validation, a fifth exactly."""
    held = np.zeros(rows, np.bool_)
    held[derive_rng(_SEED, "validation").permutation(rows)[: rows // _PART]] = True
    return held


if __name__ == "__main__":
    sys.exit(main())
