"""The commands ``adagc synth`` and ``adagc shard``: arguments in, an exit code out.

Exit codes: 0 done, 1 the data or the disk do not allow it (one message, no traceback), 2 wrong usage. Heavy imports
happen inside, so that ``--help`` answers at once and a machine without rasterio can still train.
"""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from sharding.arguments import add_workers, guarded, make_parser, part, positive, target
from sharding.convert_formats import FORMATS

if TYPE_CHECKING:
    from sharding.manifest import Manifest
    from sharding.partial import Part
    from sharding.sources.protocol import PatchSource
    from sharding.writer import Outcome, PartDone, Staging

__all__ = ["shard", "synth"]

_SYNTH = """\
Writes a SYNTHETIC tree in reBEN's official layout: 12 GeoTIFFs per patch, reference maps, metadata.parquet. Its pixels
are made up (regions, class spectra, season, texture, haze, noise): it is for trying the project without data, never
for reporting accuracy. Killed and started again, it goes on; the same seed gives the same tree for any --workers."""

_SYNTH_EXAMPLE = """\
example:
  adagc synth --out /tmp/tree --patches 3000 --seed 0
  adagc shard reben --root /tmp/tree --out /tmp/shards"""

_SHARD = """\
Converts a dataset into WebDataset tars plus a manifest, which training reads. Killed at any moment and started again
with the same arguments, it goes on where it was. The result is the same bytes for any --workers and --part."""

_REBEN = """\
Reads reBEN (BigEarthNet v2.0) in its official layout: --root holds BigEarthNet-S2, Reference_Maps and metadata.parquet
(without the maps all works but labels chosen by area). The 12 bands are stored as they are: native size, uint16.

--archives reads BigEarthNet-S2.tar.zst and Reference_Maps.tar.zst as they are downloaded (also .tar.gz, .tar), with
metadata.parquet beside them, and unpacks none of their 7 million files: the shards are the same, to the byte. OUT needs
space for the shards and little more."""

_REBEN_EXAMPLE = """\
example:
  adagc shard reben --archives /downloads/reben --out /data/reben-shards --workers 32
  adagc shard reben --root /data/reben --out /data/reben-shards --workers 32

The 480,038 recommended patches of reBEN become 79 GB of shards. OUT/report.json counts patches without a map and with
labels other than their map's, and lists skipped ones."""

_INTERRUPTED = "what was finished is kept, the same command goes on"


def synth(argv: list[str]) -> int:
    """``adagc synth``: write a synthetic reBEN tree. Returns the exit code."""
    parser = make_parser("adagc synth", _SYNTH, _SYNTH_EXAMPLE)
    option = parser.add_argument
    option("--out", type=target, required=True, metavar="TREE", help="folder to write: new, empty or unfinished")
    option("--patches", type=positive, required=True, metavar="N", help="number of patches, about 0.2 MB each")
    option("--seed", type=int, default=0, metavar="S", help="another seed is another tree (default: %(default)s)")
    shares = "shares of the train, validation and test splits (default: 0.6,0.2,0.2)"
    option("--shares", type=_shares, default=(0.6, 0.2, 0.2), metavar="T,V,E", help=shares)
    add_workers(parser)
    asked = parser.parse_args(argv)
    return guarded("adagc synth", lambda: _synth(asked), interrupted=_INTERRUPTED)


def shard(argv: list[str]) -> int:
    """``adagc shard FORMAT``: convert a dataset to shards. Returns the exit code."""
    parser = make_parser("adagc shard", _SHARD, _REBEN_EXAMPLE)
    formats = parser.add_subparsers(dest="format", required=True, metavar="FORMAT")

    def add(name: str, title: str, description: str, example: str) -> argparse.ArgumentParser:
        return formats.add_parser(
            name,
            help=f"{title}; `adagc shard {name} --help` tells more",
            description=description,
            epilog=example,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )

    _add_reben(add("reben", "reBEN (BigEarthNet v2.0), Sentinel-2", _REBEN, _REBEN_EXAMPLE))
    for other in FORMATS:
        more = add(other.name, other.title, other.description, other.example)
        other.add_options(more)
        _add_packing(more, "patches in a tar (default: %(default)s)")
        more.set_defaults(source=other.source)
    asked = parser.parse_args(argv)
    return guarded("adagc shard", lambda: _shard(asked), interrupted=_INTERRUPTED)


def _add_reben(parser: argparse.ArgumentParser) -> None:
    option = parser.add_argument
    where = parser.add_mutually_exclusive_group(required=True)
    tree = "folder with BigEarthNet-S2 and metadata.parquet"
    where.add_argument("--root", type=Path, metavar="TREE", help=tree)
    archives = "folder with BigEarthNet-S2.tar.zst and metadata.parquet"
    where.add_argument("--archives", type=Path, metavar="DIR", help=archives)
    snow = "also the 69,450 patches with seasonal snow, clouds or shadows (default: without them)"
    option("--include-snow-cloud", action="store_true", help=snow)
    _add_packing(parser, "patches in a tar, 0.16 MB each (default: %(default)s)")


def _add_packing(parser: argparse.ArgumentParser, size: str) -> None:
    """What every format asks."""
    option = parser.add_argument
    option("--out", type=target, required=True, metavar="DIR", help="folder to write: new, empty or unfinished")
    option("--samples-per-shard", type=positive, default=1000, metavar="N", help=size)
    option("--seed", type=int, default=0, metavar="S", help="of the packing order (default: %(default)s)")
    unusable = "a patch that cannot be used: stop, or skip it and list it at the end (default: %(default)s)"
    option("--on-error", choices=("stop", "skip"), default="stop", help=unusable)
    some = "write part I of N, from 0 on, beside runs of other parts on any host; the last writes the manifest"
    option("--part", type=part, default=(0, 1), metavar="I/N", help=f"{some} (default: all)")
    add_workers(parser)


def _shares(text: str) -> tuple[float, float, float]:
    message = f"{text!r} is not three shares that add up to 1, e.g. 0.6,0.2,0.2"
    try:
        train, validation, test = (float(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(message) from None
    if min(train, validation, test) < 0 or abs(train + validation + test - 1) > 1e-6:
        raise argparse.ArgumentTypeError(message)
    return train, validation, test


def _synth(asked: argparse.Namespace) -> int:
    from sharding.synthetic.tree import write_tree

    new = write_tree(asked.out, asked.patches, seed=asked.seed, shares=asked.shares, workers=asked.workers)
    state = f"{new} of {asked.patches} written now" if new else "was finished before, nothing to do"
    print(f"synthetic reBEN tree {asked.out}: {asked.patches} patches, seed {asked.seed} ({state})")
    return 0


def _shard(asked: argparse.Namespace) -> int:
    from sharding.partial import Part
    from sharding.sources.protocol import PatchError
    from sharding.writer import PartDone, write_part

    source, staging = _reben_source(asked) if asked.format == "reben" else (asked.source(asked), None)
    try:
        outcome = write_part(
            source,
            asked.out,
            Part(*asked.part),
            seed=asked.seed,
            samples_per_shard=asked.samples_per_shard,
            workers=asked.workers,
            skip=asked.on_error == "skip",
            staging=staging,
        )
    except PatchError as error:
        raise ValueError(f"{error}\nUse --on-error skip to leave such patches out and have them listed.") from error
    if isinstance(outcome, PartDone):
        print(_part_summary(Part(*asked.part), outcome))
        return 0
    print(_summary(asked.out, outcome))
    if asked.format == "reben":
        print("\n".join(_beside_published(outcome.manifest)))
    return 0


def _reben_source(asked: argparse.Namespace) -> "tuple[PatchSource, Staging | None]":
    from sharding.partial import Part, Partial
    from sharding.sources.archives import RebenArchives
    from sharding.sources.geotiff import RebenTree

    if asked.archives is None:
        return RebenTree(asked.root, include_snow_cloud=asked.include_snow_cloud), None
    scratch = Partial(asked.out, Part(*asked.part)).own / "staged"
    source = RebenArchives(asked.archives, scratch, include_snow_cloud=asked.include_snow_cloud)
    return source, source


def _part_summary(part: "Part", done: "PartDone") -> str:
    rate = f"{done.written} patches now, {done.written / max(done.seconds, 1e-9):.0f} patches/s"
    missing = done.total - done.shards - done.others
    return (
        f"part {part}: its {done.shards} of {done.total} shards are written ({rate}); {done.others} by other parts\n"
        f"{missing} shards of other parts are to come: the last part to finish writes the manifest"
    )


def _summary(out: Path, outcome: "Outcome") -> str:
    """What was done, in a few lines; the first few of each finding by name, all skipped patches in report.json."""
    report, shards = outcome.report, outcome.manifest.shards
    rows = ", ".join(f"{split} {count}" for split, count in report["rows"].items())
    size = sum(shard.bytes for shard in shards) / 1e6
    rate = f"{outcome.written / max(outcome.seconds, 1e-9):.0f} patches/s"
    skipped = report["skipped"]
    lines = [
        f"shards {out}: {sum(report['rows'].values())} patches ({rows}) in {len(shards)} shards, {size:.1f} MB",
        f"written now: {outcome.written}, {rate}" if outcome.written else "it was finished before: nothing to do",
        _finding("patches without area shares, for lack of a map (no dominant label)", report["maps_missing"]),
        _finding("patches with labels other than their map's (the metadata win)", report["label_disagreements"]),
        f"patches skipped: {len(skipped)}",
        *(f"  {item['patch']}, file {item['file']}: {item['reason']}" for item in skipped[:20]),
    ]
    if len(skipped) > 20:
        lines.append(f"  ... and {len(skipped) - 20} more, see {out / 'report.json'}")
    return "\n".join(lines)


def _beside_published(manifest: "Manifest") -> list[str]:
    """How far the train split's statistics are from those published for the whole of reBEN's."""
    from sharding import reben

    lines = []
    for side, published in ((0, reben.PUBLISHED_NATIVE), (reben.MAP_SIZE, reben.PUBLISHED_BILINEAR)):
        ours = manifest.band_statistics(side)
        off = [[(ours[band][i] / values[i] - 1, band) for band, values in published.items()] for i in range(2)]
        (mean, mean_band), (std, std_band) = (max(part, key=lambda pair: abs(pair[0])) for part in off)
        name = f"bilinear at {side}" if side else "native"
        lines.append(
            f"band statistics ({name}) beside those published for reBEN's whole train split: means differ by at most "
            f"{mean:+.2%} ({mean_band}), deviations by {std:+.2%} ({std_band})"
        )
    return lines


def _finding(what: str, counted: dict[str, object]) -> str:
    first = counted["first"]
    assert isinstance(first, list)
    return f"{what}: {counted['count']}" + (f", e.g. {', '.join(first[:3])}" if first else "")
