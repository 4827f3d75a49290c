"""The archives as they are downloaded give the shards of the unpacked tree, whatever their order, damage or luck."""

import errno
import gzip
import io
import itertools
import json
import os
import random
import shutil
import signal
import struct
import sys
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
import zstandard
from numpy.typing import NDArray

from sharding import reben
from sharding.convert import shard
from sharding.pool import run_tasks
from sharding.shardfile import ShardTask
from sharding.sources import archives, staging
from sharding.sources import geotiff as sources
from sharding.sources.archives import RebenArchives
from sharding.sources.geotiff import RebenTree, decode_band, tiff_session
from sharding.sources.protocol import PatchError
from sharding.sources.tarstream import ArchiveError, find_archive
from sharding.synthetic.tree import write_tree
from sharding.writer import Outcome, write_shards
from tests.held import arrived, running, shards_in, wait_for
from tests.readback import digests

SHARED = Path(__file__).parents[2] / "shared" / "data"
BANDS, MAPS = "BigEarthNet-S2.tar.zst", "Reference_Maps.tar.zst"
PATCHES = 20
LARGE = 70
Packer = Callable[[bytes], bytes]


def zst(content: bytes) -> bytes:
    return zstandard.ZstdCompressor(level=1, write_checksum=True).compress(content)


def tar_of(
    tree: Path, top: str, *, seed: int = 1, form: int = tarfile.PAX_FORMAT, prefix: str = "", more: Any = ()
) -> bytes:
    """The files below ``top`` as a tar, in a random order; ``more`` are (name, content) to come after them."""
    files = [(f"{prefix}{path.relative_to(tree)}", path.read_bytes()) for path in sorted((tree / top).rglob("*.tif"))]
    random.Random(seed).shuffle(files)
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=form) as tar:
        folder = tarfile.TarInfo(f"{prefix}{top}")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
        for name, content in [*files, *more]:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def pack(tree: Path, folder: Path, **how: Any) -> Path:
    """Both archives and the metadata of a tree, as they are downloaded."""
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copy(tree / reben.METADATA, folder)
    for top, name in ((reben.BAND_FOLDER, BANDS), (reben.MAP_FOLDER, MAPS)):
        if (tree / top).is_dir():
            (folder / name).write_bytes(zst(tar_of(tree, top, **how)))
    return folder


def source_of(folder: Path, out: Path) -> RebenArchives:
    return RebenArchives(folder, out / ".partial" / "staged", save_seconds=0.0)


def from_archives(folder: Path, out: Path, *, workers: int = 0, skip: bool = False) -> Outcome:
    source = source_of(folder, out)
    return write_shards(source, out, samples_per_shard=5, workers=workers, skip=skip, staging=source)


def from_tree(tree: Path, out: Path, *, skip: bool = False) -> Outcome:
    return write_shards(RebenTree(tree), out, samples_per_shard=5, workers=0, skip=skip)


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The files that are decoded from now on, in this process."""
    names: list[str] = []

    def counting(content: bytes, file: str, *args: Any, **options: Any) -> Any:
        names.append(file)
        return decode_band(content, file, *args, **options)

    monkeypatch.setattr(staging, "decode_band", counting)
    monkeypatch.setattr(sources, "decode_band", counting)
    return names


@pytest.fixture(scope="module")
def whole_tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("archives") / "tree"
    write_tree(root, PATCHES, seed=5, workers=0)
    return root


@pytest.fixture(scope="module")
def expected(whole_tree: Path) -> dict[str, str]:
    """Of all files that the tree becomes."""
    from_tree(whole_tree, whole_tree.parent / "expected")
    return digests(whole_tree.parent / "expected")


@pytest.fixture(scope="module")
def packed(whole_tree: Path) -> Path:
    return pack(whole_tree, whole_tree.parent / "packed")


@pytest.fixture
def download(packed: Path, tmp_path: Path) -> Path:
    """Archives that a test may break."""
    return Path(shutil.copytree(packed, tmp_path / "download"))


@pytest.fixture
def tree(whole_tree: Path, tmp_path: Path) -> Path:
    """A tree that a test may break before it is packed."""
    return Path(shutil.copytree(whole_tree, tmp_path / "tree"))


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_the_bytes_of_the_tree(packed: Path, expected: dict[str, str], tmp_path: Path, workers: int) -> None:
    outcome = from_archives(packed, tmp_path / "out", workers=workers)
    assert digests(tmp_path / "out") == expected
    assert outcome.written == PATCHES


@pytest.mark.skipif(not SHARED.is_dir(), reason="the shared real data are not here")
def test_the_bytes_of_real_files(tmp_path: Path) -> None:
    tree = SHARED / "reben_composites"
    from_tree(tree, tmp_path / "expected")
    from_archives(pack(tree, tmp_path / "packed"), tmp_path / "out", workers=2)
    assert digests(tmp_path / "out") == digests(tmp_path / "expected")


def two_frames(content: bytes) -> bytes:
    """Cut within a file, with the frames that pzstd and others put between."""
    skippable = struct.pack("<II", 0x184D2A50, 7) + b"nothing"
    return skippable + zst(content[:100_001]) + skippable + zst(content[100_001:])


def gzipped(content: bytes) -> bytes:
    return gzip.compress(content, 1)


@pytest.mark.parametrize(
    ("packer", "suffixes", "how"),
    [
        (two_frames, [".tar.zst"], {"seed": 2}),
        (zst, [".tar.zst"], {"seed": 3, "form": tarfile.GNU_FORMAT, "prefix": "./"}),
        (zst, [".tar.zst"], {"seed": 4, "form": tarfile.USTAR_FORMAT}),
        (bytes, [".tar"], {"seed": 5}),
        (gzipped, [".tar.gz"], {"seed": 6}),
        (gzipped, [".tar.gzaa", ".tar.gzab", ".tar.gzac"], {"seed": 7}),
    ],
)
def test_forms_of_archives(
    whole_tree: Path, expected: dict[str, str], tmp_path: Path, packer: Packer, suffixes: list[str], how: dict[str, Any]
) -> None:
    folder = tmp_path / "download"
    folder.mkdir()
    shutil.copy(whole_tree / reben.METADATA, folder)
    for top in (reben.BAND_FOLDER, reben.MAP_FOLDER):
        content = packer(tar_of(whole_tree, top, **how))
        piece = -(-len(content) // len(suffixes))
        for number, suffix in enumerate(suffixes):
            (folder / f"{top}{suffix}").write_bytes(content[number * piece : (number + 1) * piece])
    from_archives(folder, tmp_path / "out")
    assert digests(tmp_path / "out") == expected


def test_a_window_wider_than_the_default(whole_tree: Path, expected: dict[str, str], download: Path) -> None:
    parameters = zstandard.ZstdCompressionParameters.from_level(1, window_log=29)
    compressor = zstandard.ZstdCompressor(compression_params=parameters).compressobj()  # of unknown size: keeps it
    (download / BANDS).write_bytes(compressor.compress(tar_of(whole_tree, reben.BAND_FOLDER)) + compressor.flush())
    with pytest.raises(zstandard.ZstdError):
        zstandard.ZstdDecompressor().decompressobj().decompress((download / BANDS).read_bytes())
    from_archives(download, download / "out")
    assert digests(download / "out") == expected


def test_either_way_accepts_the_other_ones_shards(
    whole_tree: Path, packed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from_archives(packed, tmp_path / "out")
    assert from_tree(whole_tree, tmp_path / "out").written == 0
    assert from_archives(packed, tmp_path / "out").written == 0
    more = ["--out", str(tmp_path / "out"), "--samples-per-shard", "5", "--workers", "0"]
    assert shard(["reben", "--archives", str(packed), *more]) == 0
    assert "it was finished before: nothing to do" in capsys.readouterr().out


def test_other_members_are_left_alone(
    whole_tree: Path, expected: dict[str, str], tmp_path: Path, decoded: list[str]
) -> None:
    """Patches of no metadata, files of no patch, names that would leave the folder: none becomes a file."""
    key = RebenTree(whole_tree).index().keys[0]
    names = [
        f"BigEarthNet-S2/x/{key[:-2]}99_B02.tif",
        "../../evil.tif",
        "/tmp/evil_B02.tif",
        f"{key}_B10.tif",
        "B02.tif",
    ]
    names += [
        f"{key}_B02.tif.aux.xml",
        f"._{key}_B02.tif",
        "reference_map.tif",
        "_.tif",
        ".tif",
        "x" * 300 + "_B02.tif",
    ]
    pack(whole_tree, tmp_path / "download", more=[(name, b"no TIFF") for name in names])
    from_archives(tmp_path / "download", tmp_path / "in" / "out")
    assert digests(tmp_path / "in" / "out") == expected
    assert len(decoded) == PATCHES * 13
    assert {path.name for path in tmp_path.rglob("*evil*")} == set()


def test_a_file_listed_twice(whole_tree: Path, expected: dict[str, str], download: Path) -> None:
    path = min((whole_tree / reben.BAND_FOLDER).rglob("*_B05.tif"))
    name, content = str(path.relative_to(whole_tree)), path.read_bytes()
    (download / BANDS).write_bytes(zst(tar_of(whole_tree, reben.BAND_FOLDER, more=[(name, content[:-1] + b"x")])))
    with pytest.raises(ArchiveError, match=rf"lists .*{path.name} twice, with two contents"):
        from_archives(download, download / "out")
    (download / BANDS).write_bytes(zst(tar_of(whole_tree, reben.BAND_FOLDER, more=[(name, content)])))
    from_archives(download, download / "out")
    assert digests(download / "out") == expected


# Faults of single files: the same report, or the same message, as from the tree.


def a_file(tree: Path, band: str) -> Path:
    return sorted(tree.glob(f"*/*/*/*_{band}.tif"))[3]


def cut(tree: Path) -> None:
    path = a_file(tree, "B11")
    path.write_bytes(path.read_bytes()[:3000])


def empty(tree: Path) -> None:
    a_file(tree, "B02").write_bytes(b"")


def remove(tree: Path) -> None:
    a_file(tree, "B09").unlink()


def swap(tree: Path) -> None:
    shutil.copy(a_file(tree, "B01"), a_file(tree, "B8A"))


def make_float(tree: Path) -> None:
    write_tiff(a_file(tree, "B03"), np.ones((120, 120), dtype=np.float32))


def break_map(tree: Path) -> None:
    path = a_file(tree, "reference_map")
    path.write_bytes(path.read_bytes()[:500])


def invent_code(tree: Path) -> None:
    write_tiff(a_file(tree, "reference_map"), np.full((120, 120), 700, dtype=np.uint16))


def break_much(tree: Path) -> None:
    for damage in (cut, empty, remove, swap, make_float, break_map, invent_code):
        damage(tree)
    for path in sorted(tree.glob("*/*/*/*_B04.tif"))[7:12]:
        path.unlink()


def write_tiff(path: Path, array: NDArray[Any], **profile: object) -> bytes:
    path.unlink(missing_ok=True)
    height, width = array.shape
    base = {"driver": "GTiff", "width": width, "height": height, "count": 1, "dtype": array.dtype.name, "nodata": 0}
    place = {"crs": "EPSG:32633", "transform": rasterio.Affine(10, 0, 300_000, 0, -10, 5_000_040)}
    with rasterio.open(path, "w", **{**base, **place, **profile}) as tiff:
        tiff.write(array, 1)
    return path.read_bytes()


DAMAGES = [cut, empty, remove, swap, make_float, break_map, invent_code]


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_fault_stops_with_the_trees_message(
    tree: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], damage: Callable[[Path], None]
) -> None:
    damage(tree)
    folder, more = pack(tree, tmp_path / "download"), ["--workers", "0", "--samples-per-shard", "5"]
    assert shard(["reben", "--archives", str(folder), "--out", str(tmp_path / "out"), *more]) == 1
    printed = capsys.readouterr().err.splitlines()[-2:]
    assert shard(["reben", "--root", str(tree), "--out", str(tmp_path / "expected"), *more]) == 1
    assert printed == capsys.readouterr().err.splitlines()[-2:]
    assert printed[0].startswith("adagc shard: patch S2")
    assert not (tmp_path / "out" / "manifest.json").exists()
    # the same folder goes on when told to skip
    from_archives(folder, tmp_path / "out", skip=True)
    from_tree(tree, tmp_path / "expected", skip=True)
    assert digests(tmp_path / "out") == digests(tmp_path / "expected")


def test_many_faults_are_the_trees_report(tree: Path, tmp_path: Path) -> None:
    break_much(tree)
    from_tree(tree, tmp_path / "expected", skip=True)
    outcome = from_archives(pack(tree, tmp_path / "download"), tmp_path / "out", skip=True, workers=2)
    assert digests(tmp_path / "out") == digests(tmp_path / "expected")
    assert len(outcome.report["skipped"]) == 6  # one patch of many faults: both tell the same one


def test_faults_of_a_run_that_skipped_stop_one_that_does_not(tree: Path, tmp_path: Path) -> None:
    cut(tree)
    folder, out = pack(tree, tmp_path / "download"), tmp_path / "out"
    source = source_of(folder, out)
    with pytest.raises(ZeroDivisionError):
        write_shards(source, out, samples_per_shard=5, workers=0, skip=True, staging=Interrupting(source, at=0))
    with pytest.raises(PatchError, match=r"_B11.tif: cannot be read"):
        from_archives(folder, out)


@pytest.mark.parametrize("remove_all", [True, False])
def test_without_maps(tree: Path, tmp_path: Path, remove_all: bool) -> None:
    for path in sorted((tree / reben.MAP_FOLDER).glob("*/*"))[: None if remove_all else 4]:
        shutil.rmtree(path)
    if remove_all:
        shutil.rmtree(tree / reben.MAP_FOLDER)
    from_tree(tree, tmp_path / "expected")
    outcome = from_archives(pack(tree, tmp_path / "download"), tmp_path / "out")
    assert digests(tmp_path / "out") == digests(tmp_path / "expected")
    assert outcome.report["maps_missing"]["count"] == (PATCHES if remove_all else 4)


# Faults of an archive as a whole.


def shorten(share: float) -> Callable[[Path, Path], None]:
    def damage(path: Path, tree: Path) -> None:
        content = path.read_bytes()
        path.write_bytes(content[: int(len(content) * share)])

    return damage


def cut_checksum(path: Path, tree: Path) -> None:
    path.write_bytes(path.read_bytes()[:-2])


def flip_byte(path: Path, tree: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0x10
    path.write_bytes(bytes(content))


def cut_tar(path: Path, tree: Path) -> None:
    """Between two members, in a sound zstd frame: tarfile would take it for the end."""
    content = tar_of(tree, reben.BAND_FOLDER)
    path.write_bytes(zst(content[: content.rstrip(b"\0").rfind(b"BigEarthNet-S2/") // 512 * 512]))


def break_header(path: Path, tree: Path) -> None:
    """One letter of one name: tarfile would take it for the end."""
    content = tar_of(tree, reben.BAND_FOLDER, form=tarfile.USTAR_FORMAT)
    half = content.index(b"_B03.tif", len(content) // 2)
    path.write_bytes(zst(content[:half] + b"_B04.tif" + content[half + 8 :]))


def no_zstd(path: Path, tree: Path) -> None:
    path.write_bytes(b"<html>404 not found</html>" * 100)


SHORTER = [shorten(0), shorten(0.01), shorten(0.6), shorten(0.999)]


@pytest.mark.parametrize(
    ("damage", "workers"),
    [(damage, 0) for damage in (*SHORTER, cut_checksum, flip_byte, cut_tar, break_header, no_zstd)] + [(flip_byte, 1)],
)
def test_a_damaged_archive_is_one_message_and_a_good_one_goes_on(
    whole_tree: Path,
    expected: dict[str, str],
    download: Path,
    capsys: pytest.CaptureFixture[str],
    damage: Callable[[Path, Path], None],
    workers: int,
) -> None:
    sound = (download / BANDS).read_bytes()
    damage(download / BANDS, whole_tree)
    out, more = download / "out", ["--workers", str(workers), "--samples-per-shard", "5"]
    assert shard(["reben", "--archives", str(download), "--out", str(out), *more]) == 1
    printed = capsys.readouterr().err
    assert f"adagc shard: {download / BANDS} is damaged or incomplete: " in printed
    assert f" of {(download / BANDS).stat().st_size:,} bytes. Compare `md5sum " in printed
    assert "2245ed2d1a93f6ce637d839bc856396e" in printed
    assert "Traceback" not in printed
    (download / BANDS).write_bytes(sound)
    from_archives(download, out)
    assert digests(out) == expected


def test_what_a_cut_archive_held_is_not_decoded_again(
    expected: dict[str, str], download: Path, decoded: list[str]
) -> None:
    sound = (download / BANDS).read_bytes()
    (download / BANDS).write_bytes(sound[: len(sound) // 2])
    with pytest.raises(ArchiveError):
        from_archives(download, download / "out")
    before = len(decoded)
    assert 100 < before == arrived(download / "out")
    (download / BANDS).write_bytes(sound)
    from_archives(download, download / "out")
    assert len(set(decoded)) == len(decoded) == PATCHES * 13
    assert digests(download / "out") == expected


def test_no_archive(download: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (download / BANDS).unlink()
    command = ["reben", "--archives", str(download), "--out", str(download / "out"), "--workers", "0"]
    assert shard(command) == 1
    assert "holds no BigEarthNet-S2.tar.zst (nor .tar.gz, .tar): download it from Zenodo" in capsys.readouterr().err
    (download / reben.METADATA).unlink()
    assert shard(command) == 1
    assert "holds no metadata.parquet" in capsys.readouterr().err
    shutil.rmtree(download)
    assert shard(command) == 1
    assert "is no folder: give the folder that holds BigEarthNet-S2.tar.zst" in capsys.readouterr().err


def test_a_full_disk(
    packed: Path, expected: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, decoded: list[str],
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    real, calls = staging.store, itertools.count()

    def full(bundle: Any) -> Any:
        if next(calls) == 1:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "x.raw")
        return real(bundle)

    with monkeypatch.context() as patch:
        patch.setattr(archives, "store", full)
        command = ["reben", "--archives", str(packed), "--out", str(tmp_path / "out"), "--workers", "0"]
        assert shard([*command, "--samples-per-shard", "5"]) == 1
    printed = capsys.readouterr().err
    assert "No space left on device; what has arrived is kept: put that right, then run the same command" in printed
    kept = len(decoded)
    assert kept == arrived(tmp_path / "out") > 0
    from_archives(packed, tmp_path / "out")
    assert len(decoded) == PATCHES * 13
    assert digests(tmp_path / "out") == expected


@pytest.mark.parametrize("argv", [["--root", "x", "--archives", "y"], []])
def test_root_or_archives(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        shard(["reben", "--out", "z", *argv])
    assert caught.value.code == 2
    assert "--archives" in capsys.readouterr().err


# Scratch space and restarts.


class Interrupting:
    """Staging that fails when ``at`` shards are written; keeps the sizes of the scratch files then."""

    def __init__(self, source: RebenArchives, *, at: int) -> None:
        self.source, self.at, self.scratch = source, at, [0]

    def prepare(self, tasks: Any, todo: Any, workers: int) -> None:
        self.source.prepare(tasks, todo, workers)
        self.scratch = [len(list(self.source.staged.glob("*.raw")))]
        if self.at == 0:
            raise ZeroDivisionError

    def release(self, task: ShardTask) -> None:
        self.source.release(task)
        self.scratch.append(len(list(self.source.staged.glob("*.raw"))))
        if len(self.scratch) > self.at:
            raise ZeroDivisionError


def interrupt_after_two_shards(folder: Path, out: Path) -> None:
    source = source_of(folder, out)
    with pytest.raises(ZeroDivisionError):
        write_shards(source, out, samples_per_shard=5, workers=0, staging=Interrupting(source, at=2))


def test_scratch_space_is_given_back(packed: Path, expected: dict[str, str], tmp_path: Path) -> None:
    out = tmp_path / "out"
    source = source_of(packed, out)
    spy = Interrupting(source, at=100)
    write_shards(source, out, samples_per_shard=5, workers=0, staging=spy)
    shards = sum(name.endswith(".tar") for name in expected)
    assert spy.scratch == list(range(shards, -1, -1))


def test_all_there_the_archives_may_go(
    expected: dict[str, str], download: Path, tmp_path: Path, decoded: list[str]
) -> None:
    out = tmp_path / "out"
    interrupt_after_two_shards(download, out)
    decoded.clear()
    (download / BANDS).unlink()
    (download / MAPS).unlink()
    from_archives(download, out)
    assert digests(out) == expected
    assert decoded == []


def test_lost_scratch_and_lost_shards_are_staged_again(
    expected: dict[str, str], packed: Path, tmp_path: Path, decoded: list[str]
) -> None:
    out = tmp_path / "out"
    interrupt_after_two_shards(packed, out)
    decoded.clear()
    min(out.glob("*.tar")).unlink()
    min((out / ".partial" / "staged").glob("*.raw")).unlink()
    from_archives(packed, out)
    assert digests(out) == expected
    assert 0 < len(decoded) <= 10 * 13


SCRIPT = """
import sys, time
from pathlib import Path
from sharding.sources import archives
from sharding.sources.tarstream import Archive
from sharding.writer import write_shards
from tests.held import HeldArchives, arrived
folder, out, files, shards = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
read = Archive.files
def until(*arguments):
    for file in read(*arguments):
        while arrived(out) >= files: time.sleep(0.01)
        yield file
if not shards:  # killed before the first: no need to wait for what writes them (torch: seconds)
    Archive.files = until
    archives._PRELOAD = ("sharding.sources.staging",)
    archives._BUNDLE_BYTES = 1 << 17  # more of them than are read ahead
source = HeldArchives(folder, out / ".partial" / "staged", save_seconds=0.0, out=out, shards=shards)
write_shards(source, out, samples_per_shard=5, workers=2, staging=source)
"""


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str]]:
    """Archives that take a while, and the digests of what they become."""
    root = tmp_path_factory.mktemp("large")
    write_tree(root / "tree", LARGE, seed=2, workers=0)
    from_tree(root / "tree", root / "expected")
    return pack(root / "tree", root / "packed"), digests(root / "expected")


def killed_when(
    folder: Path, out: Path, condition: Callable[[], bool], *, files: int = 0, shards: int = 0, whole_group: bool = True
) -> None:
    """Start a run that stands still where so many shards are written, or, with none, files saved; and kill it."""
    argv = [sys.executable, "-c", SCRIPT, str(folder), str(out), str(files), str(shards)]
    with running(argv) as process:
        wait_for(process, condition)
        if whole_group:
            os.killpg(process.pid, signal.SIGKILL)
        else:
            process.kill()  # its workers have to notice


def test_sigkill_at_any_moment_then_the_same_bytes(
    large: tuple[Path, dict[str, str]], tmp_path: Path, decoded: list[str]
) -> None:
    folder, expected = large
    out = tmp_path / "out"
    killed_when(folder, out, (out / ".partial").exists)
    killed_when(folder, out, lambda: arrived(out) > 0, files=1)
    first = arrived(out)
    killed_when(folder, out, lambda: arrived(out) > first, files=first + 1, whole_group=False)
    second = arrived(out)
    assert 0 < first < second < LARGE * 13
    from_archives(folder, out)
    assert len(decoded) == LARGE * 13 - second
    assert digests(out) == expected


def test_sigkill_among_the_shards(large: tuple[Path, dict[str, str]], tmp_path: Path, decoded: list[str]) -> None:
    folder, expected = large
    out = tmp_path / "out"
    killed_when(folder, out, lambda: shards_in(out) >= 3, shards=3)
    from_archives(folder, out)
    assert decoded == []
    assert digests(out) == expected


# The short way to the pixels, and what it leaves to GDAL.


@pytest.fixture
def by_gdal(monkeypatch: pytest.MonkeyPatch) -> Callable[[bytes], tuple[object, bytes]]:
    """What decode_band tells without its short way."""

    def decode(content: bytes) -> tuple[object, bytes]:
        with monkeypatch.context() as patch:
            patch.setattr(sources, "_read_plain", lambda *_: None)
            return decode_any(content)

    return decode


def decode_any(content: bytes) -> tuple[object, bytes]:
    pixels = np.zeros((120, 120), dtype=np.uint16)
    try:
        with tiff_session():
            return decode_band(content, "x_B02.tif", pixels, locate=True), pixels.tobytes()
    except ValueError as error:
        return str(error), b""


def short(content: bytes, size: int) -> bool:
    return sources._read_plain(content, (size, size)) is not None


def test_the_short_way_is_taken_and_is_gdals(
    whole_tree: Path, by_gdal: Callable[[bytes], tuple[object, bytes]]
) -> None:
    trees = [whole_tree, *([SHARED / "reben_composites", SHARED / "reben_mini"] if SHARED.is_dir() else [])]
    for tree in trees:
        paths = sorted(tree.glob(f"{reben.BAND_FOLDER}/*/*/*.tif"))[:120]
        for path in paths:
            content = path.read_bytes()
            assert decode_any(content) == by_gdal(content)
        assert any(short(path.read_bytes(), 20) for path in paths)


def variants(folder: Path) -> Iterator[tuple[str, bytes]]:
    pixels = np.random.default_rng(0).integers(0, 65_536, (120, 120), dtype=np.uint16)
    path = folder / "x_B02.tif"
    yield "plain", write_tiff(path, pixels)
    yield "big-endian", write_tiff(path, pixels, ENDIANNESS="BIG")
    yield "BigTIFF", write_tiff(path, pixels, BIGTIFF="YES")
    yield "tiled", write_tiff(path, pixels, tiled=True, blockxsize=16, blockysize=16)
    yield "deflate", write_tiff(path, pixels, compress="deflate")
    yield "signed", write_tiff(path, pixels.astype(np.int16))
    yield "rows", write_tiff(path, pixels, blockysize=7)
    yield "south", write_tiff(path, pixels, crs="EPSG:32733")
    yield "other crs", write_tiff(path, pixels, crs="EPSG:3035")
    yield "degrees", write_tiff(path, pixels, crs="EPSG:4326")
    yield "flipped", write_tiff(path, pixels, transform=rasterio.Affine(10, 0, 9, 0, 10, 9))
    yield "no nodata", write_tiff(path, pixels, nodata=None)
    yield "other size", write_tiff(path, pixels[:60, :60])


def test_any_tiff_is_read_as_gdal_reads_it(tmp_path: Path, by_gdal: Callable[[bytes], tuple[object, bytes]]) -> None:
    for name, content in variants(tmp_path):
        assert decode_any(content) == by_gdal(content), name
        assert short(content, 120) == (name in ("plain", "rows", "south")), name


def test_any_damage_is_told_as_gdal_tells_it(
    whole_tree: Path, by_gdal: Callable[[bytes], tuple[object, bytes]]
) -> None:
    """Cut anywhere, or any one bit of its header changed."""
    content = min((whole_tree / reben.BAND_FOLDER).rglob("*_B02.tif")).read_bytes()
    for size in (0, 1, 8, 9, 100, 201, 395, 396, 10_000, len(content) - 1):
        assert decode_any(content[:size]) == by_gdal(content[:size]), size
    short_ways = 0
    for at, bit in itertools.product(range(396), range(8)):
        broken = content[:at] + bytes([content[at] ^ (1 << bit)]) + content[at + 1 :]
        if short(broken, 120):
            short_ways += 1
            assert decode_any(broken) == by_gdal(broken), (at, bit)
    assert 100 < short_ways < 1000  # another place, text that nobody reads: no damage


def test_no_more_tasks_ahead_than_asked() -> None:
    taken: list[int] = []

    def numbers() -> Iterator[int]:
        for number in range(20):
            taken.append(number)
            yield number

    for done, _ in enumerate(run_tasks(abs, numbers(), workers=1, ahead=3)):
        assert len(taken) <= done + 3
    assert len(taken) == 20


def test_archives_are_found_in_order(tmp_path: Path) -> None:
    assert find_archive(tmp_path, "x") is None
    for suffix in (".tar", ".tar.gzab", ".tar.gzaa", ".tar.zst"):
        (tmp_path / f"x{suffix}").write_bytes(suffix.encode())
        archive = find_archive(tmp_path, "x")
        assert archive is not None
        found = archive.path.name
        assert found == {".tar.gzab": "x.tar.gzab", ".tar.gzaa": "x.tar.gzaa"}.get(suffix, f"x{suffix}")
        assert json.loads(json.dumps(archive.identity())) == archive.identity()
