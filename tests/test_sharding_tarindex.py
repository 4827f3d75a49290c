"""Tars of every dialect are read as tarfile reads them, and what tarfile passes over in silence is an error."""

import gzip
import io
import re
import shutil
import subprocess
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import webdataset
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from sharding.manifest import file_digest
from sharding.tars import runs
from sharding.tars.read import HopReader, LocalBlocks, StreamReader
from sharding.tars.runs import Run, walk_runs
from sharding.tars.samples import TarSamples, TarTask, read_tar
from sharding.tars.structure import TarFault, key_and_extension, walk_tar
from tests.readback import members_of_tar

Members = list[tuple[str, bytes]]
SAMPLES: Members = [(f"dir/s{i:02d}.{ext}", bytes([i]) * (300 * i + 7)) for i in range(20) for ext in ("npy", "json")]
FORMATS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}


def write_tar(path: Path, members: Members, format: int = tarfile.USTAR_FORMAT) -> Path:
    with tarfile.open(path, "w", format=format) as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            info.mtime = 1_600_000_000.25 if format == tarfile.PAX_FORMAT else 0  # type: ignore[assignment]
            tar.addfile(info, io.BytesIO(content))
    return path


def expected(path: Path) -> list[tuple[str, int, int]]:
    with tarfile.open(path) as tar:
        return [(m.name.removeprefix("./"), m.offset_data, m.size) for m in tar if m.isreg()]


@pytest.mark.parametrize("format", FORMATS.values(), ids=FORMATS)
def test_agrees_with_tarfile(tmp_path: Path, format: int) -> None:
    path = write_tar(tmp_path / "a.tar", SAMPLES, format)
    found = members_of_tar(path)
    assert found == expected(path)
    assert [key_and_extension(name) for name, _, _ in found[:2]] == [("dir/s00", "npy"), ("dir/s00", "json")]
    content = path.read_bytes()
    for (_, data), (_, offset, size) in zip(SAMPLES, found, strict=True):
        assert content[offset : offset + size] == data


NAMES = st.text(st.characters(codec="utf-8", exclude_characters="\0/"), min_size=1, max_size=90).filter(
    lambda name: name not in (".", "..")
)
PATHS = st.lists(NAMES, min_size=1, max_size=3).map("/".join)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    members=st.lists(st.tuples(PATHS, st.binary(max_size=1600)), max_size=8),
    format=st.sampled_from([tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]),
)
def test_any_members(tmp_path: Path, members: Members, format: int) -> None:
    path = write_tar(tmp_path / "any.tar", members, format)
    assert members_of_tar(path) == expected(path)
    with LocalBlocks(path) as blocks:
        assert list(walk_tar(StreamReader(blocks), "")) == expected(path)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(position=st.integers(0, 20 * 2 * 2), byte=st.integers(0, 511), value=st.integers(0, 255))
def test_a_changed_header_never_passes(tmp_path: Path, position: int, byte: int, value: int) -> None:
    path = write_tar(tmp_path / "changed.tar", SAMPLES)
    found = members_of_tar(path)
    place = found[position % len(found)][1] - 512 + byte
    content = bytearray(path.read_bytes())
    if content[place] == value or 148 <= place % 512 < 156:  # blanks and zeros around the sum mean the same
        return
    content[place] = value
    path.write_bytes(content)
    with pytest.raises(TarFault):
        members_of_tar(path)


def test_webdataset(tmp_path: Path) -> None:
    path = tmp_path / "w.tar"
    with path.open("wb") as stream, webdataset.TarWriter(stream) as tar:
        for i in range(5):
            tar.write({"__key__": f"key{i}", "npy": np.full(3, i), "json": {"i": i}})
    assert members_of_tar(path) == expected(path)


@pytest.mark.skipif(shutil.which("tar") is None, reason="there is no tar command")
@pytest.mark.parametrize("format", ["v7", "oldgnu", "gnu", "ustar", "posix"])
def test_system_tar(tmp_path: Path, format: str) -> None:
    folder = tmp_path / "in" / "deep"
    folder.mkdir(parents=True)
    for name, content in SAMPLES:
        (folder / Path(name).name).write_bytes(content)
    (folder / "link.json").symlink_to("s00.json")
    (folder / "same.npy").hardlink_to(folder / "s00.npy")
    if format not in ("v7", "ustar"):
        (folder / ("x" * 150 + ".npy")).write_bytes(b"long")
    path = tmp_path / "s.tar"
    subprocess.run(["tar", f"--format={format}", "-C", tmp_path / "in", "-cf", path, "."], check=True)
    found = members_of_tar(path)
    assert found == expected(path)
    assert not any(name.startswith("./") for name, _, _ in found)


def test_base_256_size(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "b.tar", SAMPLES)
    content = bytearray(path.read_bytes())
    size = int(content[124:135], 8)
    content[124:136] = b"\x80" + size.to_bytes(11, "big")
    content[148:156] = b" " * 8
    content[148:156] = b"%06o\0 " % sum(content[:512])
    path.write_bytes(content)
    assert members_of_tar(path) == expected(path)


@pytest.mark.parametrize(
    "size", [b"-0000001000\0", b"\x80" + b"\xff" * 11, b"\xff" * 12, b"77777777777\0", b"12 34567890\0"]
)
@pytest.mark.parametrize("kind", [b"0", b"x", b"L", b"?"])
def test_impossible_sizes(tmp_path: Path, size: bytes, kind: bytes) -> None:
    """With a right checksum: neither an endless loop nor a request for all memory."""
    path = write_tar(tmp_path / "b.tar", SAMPLES)
    content = bytearray(path.read_bytes())
    place = header_before(path, 2)
    content[place + 124 : place + 136], content[place + 156 : place + 157] = size, kind
    content[place + 148 : place + 156] = b" " * 8
    content[place + 148 : place + 156] = b"%06o\0 " % sum(content[place : place + 512])
    path.write_bytes(content)
    with pytest.raises(TarFault) as caught:
        members_of_tar(path)
    assert caught.value.offset == place


def test_sum_of_signed_bytes(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "b.tar", [("größe.npy", b"123")], tarfile.GNU_FORMAT)
    content = bytearray(path.read_bytes())
    content[148:156] = b" " * 8
    content[148:156] = b"%06o\0 " % sum(byte - 256 * (byte > 127) for byte in content[:512])
    path.write_bytes(content)
    assert members_of_tar(path) == expected(path) == [("größe.npy", 512, 3)]


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("a/b.c/d.e.f", ("a/b.c/d", "e.f")),
        ("d.JPG", ("d", "JPG")),
        ("none", ("", "")),
        ("a.b/none", ("", "")),
        ("._d.npy", ("", "")),
        ("__index__/x.json", ("", "")),
        ("__key__.json", ("", "")),
        ("__a.json", ("__a", "json")),
    ],
)
def test_keys_as_webdataset_has_them(name: str, parts: tuple[str, str]) -> None:
    assert key_and_extension(name) == parts


def header_before(path: Path, number: int) -> int:
    return members_of_tar(path)[number][1] - 512


def spoil_sum(path: Path) -> None:
    patch(path, header_before(path, 20) + 3, b"X")


def zero_header(path: Path) -> None:
    patch(path, header_before(path, 20), bytes(512))


def cut_payload(path: Path) -> None:
    truncate(path, members_of_tar(path)[20][1] + 100)


def cut_between(path: Path) -> None:
    truncate(path, header_before(path, 20))


def cut_header(path: Path) -> None:
    truncate(path, header_before(path, 20) + 100)


def pack(path: Path) -> None:
    path.write_bytes(gzip.compress(path.read_bytes()))


def overwrite(path: Path) -> None:
    path.write_bytes(b"key,split\n" * 400)


def empty(path: Path) -> None:
    path.write_bytes(b"")


def joined(path: Path) -> None:
    path.write_bytes(path.read_bytes() * 2)


def patch(path: Path, offset: int, data: bytes) -> None:
    content = bytearray(path.read_bytes())
    content[offset : offset + len(data)] = data
    path.write_bytes(content)


def truncate(path: Path, size: int) -> None:
    path.write_bytes(path.read_bytes()[:size])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (spoil_sum, "bad header checksum"),
        (zero_header, "a zeroed header, which means the end of the archive, but data follow at offset"),
        (joined, "or tars joined end to end"),
        (cut_payload, "truncated: dir/s10.npy has 3007 bytes, 100 are there"),
        (cut_between, "truncated: the file ends before its end-of-archive mark"),
        (cut_header, "truncated: the file ends in the middle of a header"),
        (pack, "offset 0: compressed by gzip: gunzip first"),
        (overwrite, "offset 0: is no tar"),
        (empty, "offset 0: the file is empty"),
    ],
)
def test_faults(tmp_path: Path, damage: Callable[[Path], None], message: str) -> None:
    path = write_tar(tmp_path / "f.tar", SAMPLES)
    offset = header_before(path, 20)
    damage(path)
    with pytest.raises(TarFault, match=r"f\.tar, offset ") as caught:
        members_of_tar(path)
    assert message in str(caught.value)
    if damage in (spoil_sum, zero_header, cut_payload, cut_between, cut_header):
        assert caught.value.offset == offset


def test_sparse_is_refused(tmp_path: Path) -> None:
    if shutil.which("tar") is None:
        pytest.skip("there is no tar command")
    with (tmp_path / "holes.npy").open("wb") as stream:
        stream.truncate(1 << 20)
        stream.seek(1 << 19)
        stream.write(b"data")
    for format in ("gnu", "posix"):
        path = tmp_path / f"{format}.tar"
        subprocess.run(["tar", "--sparse", f"--format={format}", "-C", tmp_path, "-cf", path, "holes.npy"], check=True)
        with pytest.raises(TarFault, match="sparse"):
            members_of_tar(path)


def test_a_stream_has_the_digest_of_the_file(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "big.tar", [("a.npy", b"1" * 5_000_000), ("b.npy", b"2" * 3_000_001), *SAMPLES])
    content = path.read_bytes()
    with LocalBlocks(path) as blocks:
        stream = StreamReader(blocks)
        for _, offset, size in walk_tar(stream, ""):
            assert stream.read(offset, size) == content[offset : offset + size]
        assert stream.digest() == file_digest(path)


def npy(bands: int, side: int, dtype: str = "uint16") -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, np.zeros((bands, side, side), dtype))
    return buffer.getvalue()


def jpg(side: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (side, side)).save(buffer, "JPEG")
    return buffer.getvalue()


Sample = dict[str, bytes]
ARRAYS = {"b10.npy": npy(2, 40), "b60.npy": npy(2, 4)}


def usual(shape: str, number: int) -> Sample:
    text = b"x" * (number * 397 % 1500)
    if shape == "arrays":
        return {**ARRAYS, "json": text}
    if shape == "images":
        return {"jpg": jpg(8) + bytes(number * 211 % 3000), "cls": b"1", "json": text}
    return {"json": text, "npy": ARRAYS["b60.npy"]}


def same(path: Path) -> TarSamples:
    """By runs, and by the careful walk alone, which reads everything."""
    fast, careful = read_tar(TarTask(str(path), "t")), read_tar(TarTask(str(path), "t", whole=True))
    assert fast.keys.to_pylist() == careful.keys.to_pylist()
    assert list(fast.columns) == list(careful.columns)
    for name, column in careful.columns.items():
        np.testing.assert_array_equal(fast.columns[name].offsets_N, column.offsets_N)
        np.testing.assert_array_equal(fast.columns[name].sizes_N, column.sizes_N)
    assert list(fast.kinds.items()) == list(careful.kinds.items())
    wrong = [[(key, re.sub("0x[0-9a-f]+", "", reason)) for key, reason in one.wrong.items()] for one in (fast, careful)]
    assert wrong[0] == wrong[1]  # but for the addresses of objects in Pillow's messages
    assert list(fast.ignored.items()) == list(careful.ignored.items())
    assert str(fast.broken) == str(careful.broken)
    return fast


def in_runs(path: Path) -> int:
    """How many samples came in runs, with heads of arrays as an index of them has it."""
    with HopReader(path) as reader:
        entries = list(walk_runs(reader, "", lambda extension: b"\x93NUMPY" if extension.endswith("npy") else b""))
    return sum(len(entry.keys) for entry in entries if isinstance(entry, Run))


@pytest.mark.parametrize("shape", ["arrays", "images", "other"])
@pytest.mark.parametrize("folder", ["", "./", "deep.er/größe/", "__a"])
@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT], ids=["ustar", "gnu"])
def test_runs_of_samples(tmp_path: Path, shape: str, folder: str, format: int) -> None:
    samples = [(f"{folder}s{i}", usual(shape, i)) for i in range(700)]
    path = write_tar(tmp_path / "r.tar", [(f"{k}.{e}", c) for k, s in samples for e, c in s.items()], format)
    found = same(path)
    assert found.keys.to_pylist() == [key.removeprefix("./") for key, _ in samples]
    assert found.broken is None
    assert in_runs(path) > 680


ODDITIES = ["short", "lacks", "turned", "more", "nameless", "folder", "link", "long", "utf8", "hidden", "head", "twice"]


def odd(tar: tarfile.TarFile, oddity: str, number: int, sample: Sample) -> None:
    key, members = f"s{number}", list(sample.items())
    first = members[0][0]
    if oddity == "short":
        members[0] = (first, members[0][1][:-700])
    elif oddity == "lacks":
        del members[number % len(members)]
    elif oddity == "turned":
        members.reverse()
    elif oddity == "more":
        members.insert(number % 4, ("more", b"more"))
    elif oddity == "head":
        members = [(e, npy(3, 4, "int16") if e.endswith("npy") else c) for e, c in members]
    elif oddity == "twice":
        members.append(members[0])
    elif oddity == "long":
        key = f"{'d' * 90}/s{number:060d}"
    elif oddity == "utf8":
        key = f"größe.d/{number}ß"
    elif oddity == "hidden":
        key = f"__{number}__/x"
    for place, (extension, content) in enumerate(members):
        if place == number % len(members) and oddity in ("nameless", "folder", "link"):
            info = tarfile.TarInfo(f"between{number}")
            info.type = {"nameless": tarfile.REGTYPE, "folder": tarfile.DIRTYPE, "link": tarfile.SYMTYPE}[oddity]
            tar.addfile(info)
        info = tarfile.TarInfo(f"{key}.{extension}")
        info.size = len(content)
        tar.addfile(info, io.BytesIO(content))


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    shape=st.sampled_from(["arrays", "images", "other"]),
    format=st.sampled_from([*FORMATS.values()]),
    oddities=st.dictionaries(st.integers(0, 39), st.sampled_from(ODDITIES), max_size=4),
    many=st.sampled_from([(64, 512, 1024), (2, 5, 1)]),
    damage=st.sampled_from(["", "", "byte", "header", "zeros", "cut", "joined"]),
    at=st.tuples(st.integers(0, 119), st.integers(0, 511), st.integers(0, 255)),
)
def test_runs_change_nothing(
    tmp_path: Path,
    shape: str,
    format: int,
    oddities: dict[int, str],
    many: tuple[int, int, int],
    damage: str,
    at: tuple[int, int, int],
) -> None:
    path = tmp_path / "odd.tar"
    with tarfile.open(path, "w", format=format) as tar:
        for number in range(40):
            odd(tar, oddities.get(number, ""), number, usual(shape, number))
    with tarfile.open(path) as tar:
        headers = [member.offset_data - 512 for member in tar]
    header = headers[at[0] % len(headers)]
    if damage in ("byte", "header"):
        patch(path, header + at[1], bytes([at[2]]))
    elif damage == "zeros":
        patch(path, header, bytes(512))
    elif damage == "cut":
        truncate(path, header + 3 * at[1])
    elif damage == "joined":
        joined(path)
    if damage == "header":  # with a right sum
        block = bytearray(path.read_bytes()[header : header + 512])
        block[148:156] = b" " * 8
        patch(path, header + 148, b"%06o\0 " % sum(block))
    with pytest.MonkeyPatch.context() as patched:
        for name, value in zip(("_FIRST", "_MOST", "_PATIENCE"), many):
            patched.setattr(runs, name, value)
        same(path)


def test_runs_go_on_behind_odd_samples(tmp_path: Path) -> None:
    path = tmp_path / "odd.tar"
    with tarfile.open(path, "w") as tar:
        for number in range(400):
            odd(tar, ODDITIES[number // 100] if number % 100 == 50 else "", number, usual("arrays", number))
    same(path)
    assert in_runs(path) > 370


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(sample=st.integers(3, 18), member=st.integers(0, 2), byte=st.integers(0, 511), value=st.integers(0, 255))
def test_a_changed_header_in_a_run_never_passes(
    tmp_path: Path, sample: int, member: int, byte: int, value: int
) -> None:
    members = [(f"s{i}.{e}", c) for i in range(20) for e, c in usual("arrays", i).items()]
    path = write_tar(tmp_path / "changed.tar", members)
    assert in_runs(path) == 18
    place = header_before(path, 3 * sample + member)
    if path.read_bytes()[place + byte] == value or 148 <= byte < 156:
        return
    patch(path, place + byte, bytes([value]))
    broken = same(path).broken
    assert broken is not None
    assert broken.offset == place
