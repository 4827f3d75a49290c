"""Reading rows by byte range: the bytes that were written, for any bands; damage is found, and told with its place."""

import dataclasses
import io
import os
import pickle
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from adagc_dist.comm import Comm
from sharding.files import LocalFiles
from sharding.images import RGB
from sharding.loader import Batch
from sharding.manifest import LabelTable, Member, load_manifest
from sharding.reader import PatchReader, ReadError, Target, select_bands
from sharding.reben import BANDS
from sharding.sample import Sample
from tests.damages import (
    BAD,
    Damage,
    copy_with,
    flip_a_pixel,
    flip_in_the_last_member,
    remove,
    shard_of,
    swap,
    truncate,
    zero_the_header,
)
from tests.ranks import run_ranks
from tests.tiny import TinySource, make_reader, read_batch, slot_of, write_tiny


def written(table: LabelTable, row: int) -> dict[str, np.ndarray]:
    """Band name -> the pixels as the source made them."""
    source = TinySource()
    sample = source.read(table.keys[row].as_py(), table.labels_NC[row])
    return {band: plane for member in source.members for band, plane in zip(member.bands, sample.payload[member.name])}


def read_bands(batch: Batch, reader: PatchReader) -> dict[str, np.ndarray]:
    """Band name -> uint16 [B, H, W]."""
    pairs = zip(reader.groups, batch.groups)
    return {band: tensor[:, i].numpy() for group, tensor in pairs for i, band in enumerate(group.bands)}


@pytest.mark.parametrize("split", ["train", "validation", "test"])
def test_all_bands_are_read_as_they_were_written(tiny_shards: Path, split: str) -> None:
    reader = make_reader(tiny_shards, split=split)
    rows = np.random.default_rng(0).permutation(len(reader.table))[:12]
    batch = read_batch(reader, slot_of(rows))
    found = read_bands(batch, reader)
    assert set(found) == set(BANDS)
    assert [group.dtype for group in batch.groups] == [torch.uint16] * 3
    for place, row in enumerate(rows.tolist()):
        for band, plane in written(reader.table, row).items():
            np.testing.assert_array_equal(found[band][place], plane)


@pytest.mark.parametrize(
    "bands",
    [["B04"], ["B09", "B02"], ["B8A", "B03", "B11", "B08", "B02"], list(reversed(BANDS)), ["B05", "B06", "B07"]],
)
def test_chosen_bands_in_any_order(tiny_shards: Path, bands: list[str]) -> None:
    reader = make_reader(tiny_shards, bands)
    found = read_bands(read_batch(reader, slot_of([3, 80, 41])), reader)
    assert sorted(found) == sorted(bands)  # the groups follow the shards' order; Pixels puts them into the asked one
    for place, row in enumerate([3, 80, 41]):
        truth = written(reader.table, row)
        for band in bands:
            np.testing.assert_array_equal(found[band][place], truth[band])


@pytest.mark.parametrize(("bands", "calls"), [(["B04"], 2), (["B09", "B02"], 2), (["B02", "B08"], 2), (list(BANDS), 1)])
def test_only_the_chosen_planes_are_read(
    tiny_shards: Path, bands: list[str], calls: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beside them only the tar and .npy headers between, and the header with the key, which is checked."""
    asked: list[int] = []
    real = os.preadv

    def counting(file: int, buffers: list[memoryview], offset: int) -> int:
        asked.append(sum(len(buffer) for buffer in buffers))
        return real(file, buffers, offset)

    reader = make_reader(tiny_shards, bands)
    monkeypatch.setattr(os, "preadv", counting)
    read_batch(reader, slot_of([0, 1]))
    side = {band: member.shape[1] for member in TinySource().members for band in member.bands}
    pixels = 2 * sum(2 * side[band] ** 2 for band in bands)
    assert 2 * 512 <= sum(asked) - pixels <= 2 * 3 * 1152
    assert len(asked) == 2 * calls  # a whole patch is one read


@pytest.mark.parametrize(
    ("bands", "message"),
    [
        (["B02", "B10"], r"data\.bands=B02,B10: B10 not in the shards\. The bands of .* are B02, B03, .*, B01, B09"),
        (["B02", "B02"], r"data\.bands=B02,B02: each band once, and at least one"),
        ([], r"data\.bands=: each band once, and at least one"),
    ],
)
def test_unusable_bands_are_refused(tiny_shards: Path, bands: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        select_bands(load_manifest(tiny_shards), bands)


def test_rows_are_asked_for_together_once_reading_has_been_slow(
    tiny_shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the page cache the kernel need not be told ahead; from a disk all rows of a batch should be on their way."""
    asked: list[int] = []
    monkeypatch.setattr(os, "posix_fadvise", lambda file, offset, length, advice: asked.append(length))
    reader = make_reader(tiny_shards)
    target = Target([np.zeros(shape, dtype) for shape, dtype in reader.buffers(8)])
    rows = np.arange(8, dtype=np.int32)

    def reads(cold: float, warm: float) -> int:
        """Announced rows of one batch where these are the limits."""
        monkeypatch.setattr("sharding.reader._COLD", cold)
        monkeypatch.setattr("sharding.reader._WARM", warm)
        before = len(asked)
        reader.read(rows, target)
        return len(asked) - before

    assert reads(cold=1e9, warm=1e9) == 8  # the first batch: nothing is known yet
    assert reads(cold=1e9, warm=0.0) == 0  # it was warm; this one is not cold
    assert reads(cold=0.0, warm=0.0) == 0  # this one was
    assert reads(cold=1e9, warm=0.0) == 8  # neither cold nor surely warm: it goes on
    assert reads(cold=1e9, warm=1e9) == 8
    assert reads(cold=1e9, warm=0.0) == 0
    assert min(asked) > 160_000


def read_elsewhere(comm: Comm, pickled: bytes, rows: list[int]) -> list[bytes]:
    return [group.numpy().tobytes() for group in read_batch(pickle.loads(pickled), slot_of(rows)).groups]


def test_a_reader_that_has_files_open_can_be_sent_to_another_process(tiny_shards: Path) -> None:
    reader = make_reader(tiny_shards)
    here = [group.numpy().tobytes() for group in read_batch(reader, slot_of([5, 70])).groups]
    assert run_ranks(1, read_elsewhere, pickle.dumps(reader), [5, 70]) == [here]


# Damage

DAMAGES: list[tuple[Damage, str]] = [
    (truncate, "ends early, .* of .* bytes are there. It is truncated .*copy or make it again"),
    (remove, "cannot be opened: No such file or directory. The manifest lists it: copy or make it again"),
    (flip_a_pixel, r"b10\.npy is not what was written there: the shard is damaged or was replaced"),
    (flip_in_the_last_member, r"b60\.npy is not what was written there"),
    (zero_the_header, "there is '' instead. The shard was replaced, exchanged with another, or is damaged"),
    (swap, r"there is 'tiny_\d+\.b10\.npy' instead. The shard was replaced, exchanged with another"),
]


@pytest.mark.parametrize(("damage", "message"), DAMAGES)
def test_damage_is_told_with_shard_key_and_offset(
    tiny_shards: Path, tmp_path: Path, damage: Damage, message: str
) -> None:
    folder = copy_with(damage, tiny_shards, tmp_path / "copy")
    reader = make_reader(folder)
    with pytest.raises(ReadError, match=message) as found:
        read_batch(reader, slot_of([BAD]))
    assert "train-000001.tar" in str(found.value)
    if damage is not remove:
        assert f"{reader.table.keys[BAD].as_py()} in {folder / 'train-000001.tar'} at offset " in str(found.value)


def test_a_swapped_shard_is_found_where_only_some_bands_are_read_and_nothing_is_digested(
    tiny_shards: Path, tmp_path: Path
) -> None:
    """The key in the tar header is checked in any case."""
    reader = make_reader(copy_with(swap, tiny_shards, tmp_path / "copy"), ["B11"], check=False)
    with pytest.raises(ReadError, match=r"there is 'tiny_\d+\.b20\.npy' instead"):
        read_batch(reader, slot_of([BAD]))


def test_unchecked_digests_let_a_flipped_bit_pass(tiny_shards: Path, tmp_path: Path) -> None:
    """The price of data.check_digests=false, stated by a test."""
    reader = make_reader(copy_with(flip_a_pixel, tiny_shards, tmp_path / "copy"), check=False)
    read_batch(reader, slot_of([BAD]))


def test_all_failures_of_a_slot_are_listed_when_asked(tiny_shards: Path, tmp_path: Path) -> None:
    reader = make_reader(copy_with(remove, tiny_shards, tmp_path / "copy"))
    target = Target([np.zeros(shape, dtype) for shape, dtype in reader.buffers(4)])
    rows = np.array([BAD, 3, 41, 80], dtype=np.int32)
    assert [place for place, _ in reader.read(rows, target, go_on=True)] == [0, 2]
    assert [place for place, _ in reader.read(rows, target)] == [0]
    np.testing.assert_array_equal(target.arrays[0][1], np.stack([written(reader.table, 3)[b] for b in BANDS[:4]]))


# Tars of other layouts


@dataclasses.dataclass(frozen=True)
class JpegSource(TinySource):
    members: tuple[Member, ...] = (Member("jpg", RGB, (3, 24, 24), "uint8", 0),)

    def read(self, key: str, labels_C: np.ndarray) -> Sample:
        stream = io.BytesIO()
        Image.fromarray(self.pixels(key)).save(stream, "JPEG", quality=95, subsampling=0)
        return Sample(key, {"jpg": stream.getvalue()}, labels_C, None, None)

    def pixels(self, key: str) -> np.ndarray:
        coarse = np.random.default_rng(int(key[-4:])).integers(0, 256, (3, 3, 3)).astype(np.uint8)
        return coarse.repeat(8, axis=0).repeat(8, axis=1)


@pytest.mark.parametrize("bands", [["R", "G", "B"], ["G"], ["B", "R"]])
def test_jpegs_are_decoded(tmp_path: Path, bands: list[str]) -> None:
    source = JpegSource(counts=(20, 4, 4))
    write_tiny(tmp_path, source)
    reader = make_reader(tmp_path, bands)
    batch = read_batch(reader, slot_of([5, 17, 2]))
    assert [group.dtype for group in batch.groups] == [torch.uint8]
    found = read_bands(batch, reader)
    for place, row in enumerate([5, 17, 2]):
        truth = source.pixels(reader.table.keys[row].as_py()).transpose(2, 0, 1)
        for band in bands:
            # 6: what JPEG of this quality changes in flat blocks; another patch or channel would be far off
            assert np.abs(found[band][place].astype(int) - truth[RGB.index(band)]).max() <= 6


def test_a_damaged_jpeg_is_told(tmp_path: Path) -> None:
    write_tiny(tmp_path, JpegSource(counts=(20, 4, 4)))
    reader = make_reader(tmp_path, RGB)
    path = shard_of(tmp_path, reader, 7)
    with path.open("r+b") as stream:
        stream.seek(int(reader.table.offsets_NM[7, 0]))
        stream.write(b"no jpeg")
    with pytest.raises(ReadError, match=rf"{reader.table.keys[7].as_py()} in .* jpg is not what was written there"):
        read_batch(reader, slot_of([7]))
    unchecked = make_reader(tmp_path, RGB, check=False)
    with pytest.raises(ReadError, match=rf"{reader.table.keys[7].as_py()} in .* no image that can be decoded"):
        read_batch(unchecked, slot_of([7]))


@dataclasses.dataclass(frozen=True)
class TwoImagesSource(JpegSource):
    members: tuple[Member, ...] = (
        *JpegSource.members,
        Member("jpeg", ("X", "Y", "Z"), (3, 24, 24), "uint8", 0),
    )

    def read(self, key: str, labels_C: np.ndarray) -> Sample:
        sample = super().read(key, labels_C)
        return dataclasses.replace(sample, payload={**sample.payload, "jpeg": sample.payload["jpg"]})


def test_a_wrong_header_is_told_with_its_own_offset(tmp_path: Path) -> None:
    """Not with that of the row's first member."""
    write_tiny(tmp_path, TwoImagesSource(counts=(20, 4, 4)))
    reader = make_reader(tmp_path, [*RGB, "X", "Y", "Z"])
    header = int(reader.table.offsets_NM[7].max()) - 512
    with shard_of(tmp_path, reader, 7).open("r+b") as stream:
        stream.seek(header)
        stream.write(bytes(512))
    with pytest.raises(ReadError, match=rf"at offset {header}: there is '' instead"):
        read_batch(reader, slot_of([7]))


@pytest.mark.parametrize("prefix", ["", "./", "some/folder/"])
def test_members_in_another_order_and_with_gaps_of_any_size(tmp_path: Path, prefix: str) -> None:
    """Tars that others wrote: members in no fixed order, other files between, names with folders."""
    write_tiny(tmp_path / "ours", TinySource(counts=(20, 4, 4)))
    ours = make_reader(tmp_path / "ours")
    names = [member.name for member in ours.manifest.members]
    path = tmp_path / "train.tar"
    offsets = np.zeros_like(ours.table.offsets_NM)
    keys = [f"{prefix.removeprefix('./')}{key}" for key in ours.table.keys.to_pylist()]
    with tarfile.open(tmp_path / "ours" / "train-000000.tar") as source, tarfile.open(path, "w") as tar:
        for row, key in enumerate(ours.table.keys.to_pylist()):
            for m in np.random.default_rng(row).permutation(3).tolist():
                add(tar, f"{prefix}{key}.note{m}.txt", bytes(row * 1000))
                offsets[row, m] = tar.offset + 512
                content = source.extractfile(f"{key}.{names[m]}")
                assert content is not None
                add(tar, f"{prefix}{key}.{names[m]}", content.read())
    import pyarrow as pa

    table = dataclasses.replace(ours.table, offsets_NM=offsets, keys=pa.array(keys))
    shards = (dataclasses.replace(ours.manifest.shards[0], name="train.tar"), *ours.manifest.shards[1:])
    manifest = dataclasses.replace(ours.manifest, shards=shards)
    for bands in (list(BANDS), ["B09", "B05"]):
        groups = select_bands(manifest, bands)
        theirs = PatchReader(manifest, table, groups, LocalFiles(tmp_path))
        expected = read_batch(make_reader(tmp_path / "ours", bands), slot_of(range(20)))
        found = read_batch(theirs, slot_of(range(20)))
        assert all(torch.equal(a.view(torch.int16), b.view(torch.int16)) for a, b in zip(expected.groups, found.groups))


def add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    tar.addfile(info, io.BytesIO(data))
