"""How fast `adagc shard` is, in patches a second and core, beside the bare reading of the same files.

    python -m tests.benchmarks.sharding [--json FILE] [--patches 600] [--rounds 3] [--hdf5 FILE] [--images ZIP]

One process and its CPU time; files in the page cache. reBEN is a synthetic tree in the official layout, and archives
made of it; HDF5 and images are measured where a file is given.
"""

import io
import shutil
import statistics
import tarfile
import tempfile
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import rasterio
import zstandard

from sharding.sources.archives import RebenArchives
from sharding.sources.geotiff import RebenTree
from sharding.sources.hdf5 import Names, find_groups, open_hdf5
from sharding.sources.imagefolder import open_images
from sharding.synthetic.tree import write_tree
from sharding.writer import write_shards
from tests.benchmarks.machine import machine_line, make_parser, write_json


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--patches", type=int, default=600, help="of the synthetic tree (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="medians over so many (default: %(default)s)")
    parser.add_argument("--hdf5", type=Path, help="a file with groups train and validation")
    parser.add_argument("--images", type=Path, help="a folder or zip with multilabel.csv and split.csv")
    asked = parser.parse_args()
    print(machine_line())
    with tempfile.TemporaryDirectory() as name:
        cases = _reben_cases(Path(name), asked.patches)
        cases |= _hdf5_cases(Path(name), asked.hdf5) if asked.hdf5 else {}
        cases |= _image_cases(Path(name), asked.images) if asked.images else {}
        figures = _measure(cases, asked.rounds)
    for name, rate in figures.items():
        print(f"{name:<58}{rate:>9.0f} samples per CPU second")
    write_json(asked.json, {"samples_per_cpu_second": figures})


Cases = dict[str, tuple[int, Callable[[], object]]]  # name -> samples, work


def _measure(cases: Cases, rounds: int) -> dict[str, float]:
    """In turns, so that a busy neighbour slows all alike."""
    rates: dict[str, list[float]] = {name: [] for name in cases}
    for _ in range(rounds):
        for name, (samples, work) in cases.items():
            start = time.process_time()
            work()
            rates[name].append(samples / (time.process_time() - start))
    return {name: statistics.median(values) for name, values in rates.items()}


def _reben_cases(folder: Path, patches: int) -> Cases:
    tree, archives = folder / "tree", folder / "archives"
    write_tree(tree, patches, workers=2)
    files = sorted((tree / "BigEarthNet-S2").rglob("*.tif")) + sorted((tree / "Reference_Maps").rglob("*.tif"))
    archives.mkdir()
    shutil.copy(tree / "metadata.parquet", archives)
    for name in ("BigEarthNet-S2", "Reference_Maps"):
        _pack(tree, name, archives / f"{name}.tar.zst")

    def shard_archives() -> None:
        source = RebenArchives(archives, folder / "out" / ".partial" / "staged")
        _shard(source, folder / "out", staging=source)

    return {
        "reBEN: bare rasterio, 12 bands and map": (patches, lambda: [_bare(path) for path in files]),
        "reBEN: bare read() of the files": (patches, lambda: [path.read_bytes() for path in files]),
        "reBEN: adagc shard reben --root": (patches, lambda: _shard(RebenTree(tree), folder / "out")),
        "reBEN: bare decompression and untar": (patches, lambda: [_untar(path) for path in archives.glob("*.zst")]),
        "reBEN: adagc shard reben --archives": (patches, shard_archives),
    }


def _hdf5_cases(folder: Path, path: Path) -> Cases:
    import h5py

    source = open_hdf5(path, Names(), find_groups(path, Names()))
    count = len(source.index().keys)

    def rows() -> None:
        with h5py.File(path) as file:
            for group in file.values():
                images = group["images"]
                for row in np.random.default_rng(0).permutation(len(images)):
                    images[int(row)]

    return {
        "HDF5: bare h5py, random rows": (count, rows),
        "HDF5: adagc shard hdf5": (count, lambda: _shard(source, folder / "out")),
    }


def _image_cases(folder: Path, path: Path) -> Cases:
    source = open_images(path, "multilabel.csv", split_file="split.csv")
    count = len(source.index().keys)

    def members() -> None:
        with zipfile.ZipFile(path) as archive:
            for info in archive.infolist():
                archive.read(info)

    return {
        "images: bare zipfile": (count, members),
        "images: adagc shard images": (count, lambda: _shard(source, folder / "out")),
    }


def _shard(source: object, out: Path, **more: object) -> None:
    shutil.rmtree(out, ignore_errors=True)
    write_shards(source, out, workers=0, **more)  # type: ignore[arg-type]


def _bare(path: Path) -> None:
    with rasterio.Env(GDAL_DISABLE_READDIR_ON_OPEN="EMPTY_DIR"), rasterio.open(path) as tiff:
        tiff.read(1)


def _pack(tree: Path, name: str, path: Path) -> None:
    with zstandard.open(path, "wb") as stream, tarfile.open(fileobj=stream, mode="w|") as tar:
        tar.add(tree / name, name)


def _untar(path: Path) -> None:
    with zstandard.open(path, "rb") as stream, tarfile.open(fileobj=io.BufferedReader(stream), mode="r|") as tar:
        for info in tar:
            if (content := tar.extractfile(info)) is not None:
                content.read()


if __name__ == "__main__":
    main()
