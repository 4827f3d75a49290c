"""What ``adagc shard`` reads besides reBEN: the options of each format, and the source that they ask for.

As in ``sharding.convert``, heavy imports happen inside.
"""

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sharding.sources.protocol import PatchSource

__all__ = ["FORMATS", "Format"]

_HDF5 = """\
Reads an HDF5 file with a group per split (train, validation or val, test), each with the arrays images [N, bands, rows,
columns] (uint8, uint16 or int16), labels [N, classes] (bool, or 0 and 1) and, if known, coverage [N, classes] (each
class's share of the area: labels chosen by area need it). Pixels are stored as they are. The classes' names are in an
attribute of the file, or given."""

_HDF5_EXAMPLE = """\
example:
  adagc shard hdf5 --file eurosat.h5 --out /data/eurosat-shards
  adagc shard hdf5 --file s2.h5 --out /data/s2-shards --group tr=train --group va=validation --images x --labels y \\
      --classes Forest,Water,Urban --bands B02,B03,B04,B08 --channels-last

Rows are packed in random order. Where chunks hold many rows and are compressed, a tar of --samples-per-shard rows costs
unpacking each chunk once if --cache-mb holds the whole split, else nearly once a row: then rewrite the file with chunks
of one row (h5repack -l images:CHUNK=1x3x64x64), or raise --samples-per-shard and --cache-mb."""

_IMAGES = """\
Reads a folder or zip (it is not unpacked) of JPEG or PNG images, all of one kind and one size, and a table of labels:
CSV or TSV with a column of names and a column of 0 and 1 per class (AID-multilabel's multilabel.csv is one), or parquet
with key and labels. Names are joined without folder, extension and case. The images' bytes are stored as they are."""

_IMAGES_EXAMPLE = """\
example:
  adagc shard images --root AID_multilabel --labels multilabel.csv --split-file split.csv --out /data/aid-shards
  adagc shard images --root aid.zip --labels multilabel.csv --out /data/aid-shards

Splits come from --split-file (a column of names and one called split; what it does not list is left out), or --split,
or a column split of the labels, or the folders images_tr (train) and images_test (test); else all is train."""


@dataclass(frozen=True)
class Format:
    """A subcommand of ``adagc shard``.

    Attributes:
        name, title, description, example: of its help.
        add_options: adds those that only it has.
        source: what they ask for. Raises ValueError or OSError where it cannot be used.
    """

    name: str
    title: str
    description: str
    example: str
    add_options: Callable[[argparse.ArgumentParser], None]
    source: Callable[[argparse.Namespace], "PatchSource"]


def _add_hdf5(parser: argparse.ArgumentParser) -> None:
    option = parser.add_argument
    option("--file", type=Path, required=True, metavar="FILE", help="the HDF5 file")
    groups = "a group and its split, once for each (default: all groups named like splits)"
    option("--group", action="append", default=[], type=_group, metavar="GROUP=SPLIT", help=groups)
    option("--split", metavar="SPLIT", help="of a file whose arrays are in no group (default: train)")
    option("--images", default="images", metavar="NAME", help="array of pixels (default: %(default)s)")
    option("--labels", default="labels", metavar="NAME", help="array of labels (default: %(default)s)")
    option("--coverage", metavar="NAME", help="array of area shares (default: coverage, where there is one)")
    option("--keys", metavar="NAME", help="array of patch ids (default: group and row number)")
    classes = "an attribute of the file, or the names, with commas between them (default: %(default)s)"
    option("--classes", default="classes", metavar="NAMES", help=classes)
    bands = "names, with commas between them (default: the attribute bands, or R,G,B of three)"
    option("--bands", metavar="NAMES", help=bands)
    option("--channels-last", action="store_true", help="the images are [N, rows, columns, bands]")
    cache = "memory in each process for unpacked chunks (default: %(default)s)"
    option("--cache-mb", type=int, default=512, metavar="MB", help=cache)


def _group(text: str) -> tuple[str, str]:
    group, equals, split = text.rpartition("=")
    if not (group and equals and split):
        raise argparse.ArgumentTypeError(f"{text!r} is no group and split, e.g. tr=train")
    return group, split


def _hdf5_source(asked: argparse.Namespace) -> "PatchSource":
    from sharding.sources.hdf5 import Names, find_groups, open_hdf5

    if asked.cache_mb < 0:
        raise ValueError(f"--cache-mb is {asked.cache_mb}: at least 0")
    if asked.group and asked.split:
        raise ValueError("--split is for a file whose arrays are in no group: leave it, or --group, away")
    names = Names(asked.images, asked.labels, asked.coverage, asked.keys)
    return open_hdf5(
        asked.file,
        names,
        dict(asked.group) or find_groups(asked.file, names, asked.split),
        classes=asked.classes,
        bands=asked.bands.split(",") if asked.bands else (),
        channels_last=asked.channels_last,
        cache_bytes=asked.cache_mb << 20,
    )


def _add_images(parser: argparse.ArgumentParser) -> None:
    option = parser.add_argument
    option("--root", type=Path, required=True, metavar="DIR_OR_ZIP", help="images, at any depth")
    option("--labels", required=True, metavar="FILE", help="CSV, TSV or parquet; a path, or a name inside --root")
    splits = parser.add_mutually_exclusive_group()
    listed = "CSV or TSV of names and splits; a path, or a name inside --root"
    splits.add_argument("--split-file", metavar="FILE", help=listed)
    splits.add_argument("--split", metavar="SPLIT", help="of all images")


def _images_source(asked: argparse.Namespace) -> "PatchSource":
    from sharding.sources.imagefolder import open_images

    source = open_images(asked.root, asked.labels, split_file=asked.split_file, split=asked.split)
    for line in source.unused:
        print(line)
    return source


FORMATS = (
    Format("hdf5", "an HDF5 file with images and labels", _HDF5, _HDF5_EXAMPLE, _add_hdf5, _hdf5_source),
    Format("images", "a folder or zip of JPEG or PNG", _IMAGES, _IMAGES_EXAMPLE, _add_images, _images_source),
)
