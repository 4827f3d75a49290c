"""The commands ``adagc index`` and ``adagc verify``: arguments in, an exit code out.

Exit codes: 0 done and all right, 1 faults, or the data or the disk do not allow it, 2 wrong usage. Heavy imports happen
inside, so that ``--help`` answers at once.
"""

import argparse
import os
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

from sharding.arguments import add_workers, guarded, make_parser, positive, target

if TYPE_CHECKING:
    from sharding.tars.indexing import Indexed
    from sharding.tars.verify import Verified

__all__ = ["index", "verify"]

_INDEX = """\
Makes WebDataset tars that others wrote trainable: reads which sample lies where, joins labels by key, and writes a
manifest. The tars stay as they are and where they are, also behind a URL. What could be lost without a word (a sample
without one of its members, a key that occurs twice, a damaged or cut tar, a sample without labels) is an error."""

_INDEX_EXAMPLE = """\
examples:
  adagc index /data/tars --labels labels.csv --bands npy=B02,B03,B04,B08 --digests
  adagc index 'https://host/train-{000000..000099}.tar' --labels labels.parquet --out shards/remote

Payload are .npy arrays [bands, side, side] (uint8, uint16, int16) and images (.jpg, .jpeg, .png); other members are not
read. Splits come from the labels' column split, else from --split-file, else from the tars' names (train-*, val*-*,
test-*); tars of other names are train."""

_VERIFY = """\
Compares the tars of a shard folder with its manifest, each byte read once, and names every difference: damage, cuts,
exchanged and missing shards, rows too few or too many, labels, splits, leftovers. Nothing is changed."""

_VERIFY_EXAMPLE = """\
example:
  adagc verify shards/reben --workers 16 --report faults.json

Exit code: 0 all right, 1 faults, 2 wrong usage."""

_PRINTED = 100  # faults
_INTERRUPTED = "nothing was written"


def index(argv: list[str]) -> int:
    """``adagc index``: a manifest for tars made by others. Returns the exit code."""
    parser = make_parser("adagc index", _INDEX, _INDEX_EXAMPLE)
    option = parser.add_argument
    where = "folder of tars, tar, URL of either; {000..123} and {a,b} stand for several"
    option("tars", nargs="+", metavar="TARS", help=where)
    option("--labels", type=Path, required=True, metavar="FILE", help="CSV, TSV or parquet: keys and their classes")
    option("--split-file", type=Path, metavar="FILE", help="CSV or TSV: keys and their splits")
    option("--out", type=target, metavar="DIR", help="folder of the manifest (default: that of the tars, if local)")
    bands = "band names of a member, e.g. npy=B02,B03; may be repeated (default: reBEN's, R,G,B of images, npy_0 ...)"
    option("--bands", type=_bands, action="append", default=[], metavar="MEMBER=NAMES", help=bands)
    option("--name", metavar="NAME", help="of the dataset (default: that of the tars' folder)")
    option("--digests", action="store_true", help="read all bytes, so that damage is noticed later")
    most = "train rows that mean and deviation of the bands are taken from (default: %(default)s)"
    option("--statistics-samples", type=positive, default=2000, metavar="N", help=most)
    unusable = "what cannot be used: stop, or leave it out and list it (default: %(default)s)"
    option("--on-error", choices=("stop", "skip"), default="stop", help=unusable)
    option("--force", action="store_true", help="replace a manifest that is there")
    add_workers(parser)
    asked = parser.parse_args(argv)
    if asked.out is None and any("://" in location for location in asked.tars):
        parser.error("--out is needed where the tars are at a URL")
    return guarded("adagc index", lambda: _index(asked), interrupted=_INTERRUPTED)


def verify(argv: list[str]) -> int:
    """``adagc verify``: the tars against their manifest. Returns the exit code."""
    parser = make_parser("adagc verify", _VERIFY, _VERIFY_EXAMPLE)
    option = parser.add_argument
    option("folder", type=Path, metavar="DIR", help="folder with manifest.json")
    option("--quick", action="store_true", help="structure and sizes only, without reading all bytes")
    option("--report", type=Path, metavar="FILE", help=f"all faults as JSON (the first {_PRINTED} are printed)")
    add_workers(parser)
    asked = parser.parse_args(argv)
    if asked.report is not None and (asked.report.is_dir() or not asked.report.parent.is_dir()):
        parser.error(f"--report {asked.report}: give a file in a folder that exists")
    return guarded("adagc verify", lambda: _verify(asked), interrupted=_INTERRUPTED)


def _bands(text: str) -> tuple[str, tuple[str, ...]]:
    member, equals, names = text.partition("=")
    bands = tuple(names.split(","))
    if not member or not equals or not all(bands) or len(set(bands)) < len(bands):
        raise argparse.ArgumentTypeError(f"{text!r} is not MEMBER=NAME,NAME,... with each name once, e.g. npy=B02,B03")
    return member, bands


def _index(asked: argparse.Namespace) -> int:
    from sharding.manifest import MANIFEST_JSON
    from sharding.sources.labels import read_labels
    from sharding.tars.indexing import index_shards
    from sharding.tars.listing import find_tars
    from sharding.tars.rows import UnusableError

    tars = find_tars(asked.tars)
    out = asked.out or Path(tars.origin)
    if (out / MANIFEST_JSON).exists() and not asked.force:
        raise ValueError(f"{out} holds a manifest already: give another --out, or --force to replace it")
    if out.exists() and not os.access(out, os.W_OK):
        raise ValueError(f"{out} cannot be written to: give --out")
    labels = read_labels(asked.labels, asked.split_file)
    try:
        done = index_shards(
            tars,
            labels,
            out,
            bands=dict(asked.bands),
            dataset=asked.name or tars.origin.rstrip("/").rpartition("/")[2],
            digests=asked.digests,
            statistics_samples=asked.statistics_samples,
            workers=asked.workers,
            skip=asked.on_error == "skip",
        )
    except UnusableError as error:
        hint = "" if asked.on_error == "skip" else "\nUse --on-error skip to leave out what cannot be used."
        raise ValueError(f"{error}{hint}") from error
    print(_indexed(out, done))
    return 0


def _indexed(out: Path, done: "Indexed") -> str:
    manifest, reading = done.manifest, max(done.seconds[0], 1e-9)
    splits = Counter[str]()
    for shard in manifest.shards:
        splits[shard.split] += shard.rows
    sizes = {shard.name: shard.bytes for shard in manifest.shards}
    rows = ", ".join(f"{split} {count}" for split, count in splits.items())
    left_out = done.samples - splits.total()
    return "\n".join([
        f"manifest {out}: {splits.total()} rows ({rows}) in {len(sizes)} tars, {sum(sizes.values()) / 1e6:.1f} MB",
        *(f"  {m.name}: {m.dtype} {list(m.shape)}, bands {','.join(m.bands)}" for m in manifest.members),
        f"{len(manifest.classes)} classes; digests {'known' if manifest.shards[0].digest else 'unknown'}",
        *done.notes,
        f"read at {done.samples / reading:.0f} samples/s, {done.seconds[1]:.1f} s in all",
        f"samples left out: {left_out}",
        *(f"  {finding}" for finding in done.findings),
    ])  # fmt: skip


def _verify(asked: argparse.Namespace) -> int:
    from sharding.tars.verify import verify_shards

    found = verify_shards(asked.folder, workers=asked.workers, quick=asked.quick)
    if asked.report is not None:
        _write_report(asked.report, asked.folder, found)
    for fault in found.faults[:_PRINTED]:
        print(f"[{fault.kind}] {fault}")
    if len(found.faults) > _PRINTED:
        print(f"... and {len(found.faults) - _PRINTED} more" + ("" if asked.report else ": see --report FILE"))
    for note in found.notes:
        print(f"note: {note}")
    kinds = ", ".join(f"{count} {kind}" for kind, count in Counter(fault.kind for fault in found.faults).items())
    verdict = f"{len(found.faults)} faults ({kinds})" if found.faults else "no faults"
    speed = (
        f", {found.size / 1e6:.0f} MB at {found.size / 1e6 / max(found.seconds, 1e-9):.0f} MB/s" if found.size else ""
    )
    print(f"{asked.folder}: {verdict} in {found.rows} rows, {found.shards} tars{speed}")
    return 1 if found.faults else 0


def _write_report(path: Path, folder: Path, found: "Verified") -> None:
    import dataclasses
    import json

    faults = [dataclasses.asdict(fault) for fault in found.faults]
    record = {"folder": str(folder), "rows": found.rows, "bytes": found.size, "notes": found.notes, "faults": faults}
    path.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n")
