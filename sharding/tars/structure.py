"""The structure of tars that others wrote: which member lies where, and every way in which a tar can lie about it.

The usual readers take a damaged header in the middle, or a zeroed one, for the end of the archive, and lose the rest
without a word (tarfile in stream mode, and so webdataset). Here a tar is whole or an error that names file and offset.
"""

import zlib
from collections.abc import Iterator

from sharding.tars.read import BytesReader

__all__ = ["TarFault", "key_and_extension", "walk_tar"]

_BLOCK = 512
_ZEROS = bytes(_BLOCK)
_ADLER = 65521  # zlib's adler32 keeps the sum of the bytes modulo this: the fastest sum of bytes that Python has
_REGULAR = b"0\0" + b"7"
_WITHOUT_DATA = b"123456"  # links, devices, folders, pipes: their size field counts nothing that follows
_COMPRESSED = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"PK\3\4": "zip"}


class TarFault(ValueError):
    """A tar that cannot be used as it is."""

    def __init__(self, where: str, offset: int, reason: str) -> None:
        super().__init__(where, offset, reason)  # all three, so that a copy can be built from ``args``
        self.where, self.offset, self.reason = where, offset, reason

    def __str__(self) -> str:
        return f"{self.where}, offset {self.offset}: {self.reason}"


def key_and_extension(name: str) -> tuple[str, str]:
    """Key and extension: cut at the first dot of the base name. ("", "") of names that webdataset skips: those without
    a dot or with nothing before it, and those that begin with ``__...__``.
    """
    dot = name.find(".", base := name.rfind("/") + 1)
    if dot <= base or (name.startswith("__") and "__" in name[2:].partition("/")[0]):
        return "", ""
    return name[:dot], name[dot + 1 :]


def walk_tar(reader: BytesReader, where: str, position: int = 0) -> Iterator[tuple[str, int, int]]:
    """(name, offset, size) of each regular file, header after header, each checked before it is used.

    Args:
        position: where to begin; behind a regular file, or 0.

    Raises:
        TarFault: it is damaged, cut, compressed or no tar.
    """
    total, extended = reader.size, _Extended()
    while True:
        header = bytes(reader.read(position, _BLOCK))
        if len(header) < _BLOCK:
            raise _cut_or_no_tar(where, position, header)
        if header == _ZEROS:
            _check_end(reader, where, position)
            return
        stated = header[148:156]
        try:
            # the header's bytes, those of the sum itself taken as 8 spaces
            known = (zlib.adler32(header, 0) - zlib.adler32(stated, 0) + 256 - int(stated.rstrip(b"\0 "), 8)) & 0xFFFF
            if known and not _sum_is_right(header):
                raise ValueError
            size = _size(header)
        except ValueError:
            raise _bad_header(where, position, header) from None
        data, kind = position + _BLOCK, header[156]
        if kind in _WITHOUT_DATA:
            extended.pending.clear()
            position = data
            continue
        name = _name(header)
        if extended.pending and kind in _REGULAR:
            name, size = extended.apply(name, size, where, position)
        if not 0 <= size <= total - data:
            raise TarFault(where, position, f"truncated: {name} has {size} bytes, {total - data} are there")
        if kind not in _REGULAR:
            extended.read(kind, reader, data, size, where)
        elif not name.endswith("/"):  # before ustar, a folder
            if not name.isascii():
                _check_utf8(name, where, position)
            yield name[2:] if name.startswith("./") else name, data, size
        position = data + (size + _BLOCK - 1) // _BLOCK * _BLOCK


class _Extended:
    """What entries of their own say of the entry that follows them: names of GNU's tar, records of pax."""

    def __init__(self) -> None:
        self.pending: dict[str, str] = {}

    def apply(self, name: str, size: int, where: str, position: int) -> tuple[str, int]:
        pending, self.pending = self.pending, {}
        if any(key.startswith("GNU.sparse.") for key in pending):
            raise TarFault(where, position, _SPARSE)
        return pending.get("path", name), int(pending.get("size", size))

    def read(self, kind: int, reader: BytesReader, offset: int, size: int, where: str) -> None:
        """The first of two that say the same holds, as in tarfile. Entries of unknown kinds are passed over."""
        if kind == ord("S"):
            raise TarFault(where, offset - _BLOCK, _SPARSE)
        if kind not in b"LxX":
            if kind not in b"Kg":
                self.pending.clear()
            return
        content = bytes(reader.read(offset, size))
        if kind == ord("L"):
            self.pending.setdefault("path", content.partition(b"\0")[0].decode("utf-8", "surrogateescape"))
            return
        try:
            found = _pax_records(content)
            int(found.get("size", "0"))
        except ValueError:
            raise TarFault(where, offset, "an extended header that cannot be read: damaged") from None
        self.pending = found | self.pending


_SPARSE = "a sparse file, whose bytes are not stored as they are: pack without --sparse"


def _pax_records(content: bytes) -> dict[str, str]:
    """Records of the form ``<length of the record> <key>=<value>\\n``."""
    found = {}
    while content.strip(b"\0"):
        length = int(content.partition(b" ")[0])
        record, content = content[:length], content[length:]
        key, equals, value = record.partition(b" ")[2].partition(b"=")
        if len(record) < length or not equals or value[-1:] != b"\n":
            raise ValueError("a record of a wrong length")
        found[key.decode("utf-8", "surrogateescape")] = value[:-1].decode("utf-8", "surrogateescape")
    return found


def _size(header: bytes) -> int:
    if header[124] < 0x80 and header[135] in b"\0 ":
        try:
            return int(header[124:135], 8)
        except ValueError:
            pass
    if header[124] == 0x80:  # GNU's base 256, from 8 GiB on
        return int.from_bytes(header[125:136], "big")
    return int(header[124:136].partition(b"\0")[0].strip() or b"0", 8)


def _name(header: bytes) -> str:
    end = header.find(b"\0", 0, 100)
    name = header[: end if end >= 0 else 100]
    if header[345] and header[257:265] != b"ustar  \0":  # GNU's has other things there
        name = header[345:500].partition(b"\0")[0] + b"/" + name
    return name.decode("utf-8", "surrogateescape")


def _sum_is_right(header: bytes) -> bool:
    """Exactly; some old tars have the sum of signed bytes."""
    counted = header[:148] + b" " * 8 + header[156:]
    unsigned = sum(counted)
    signed = unsigned - 256 * sum(byte > 127 for byte in counted)
    return int(header[148:156].partition(b"\0")[0].strip() or b"-1", 8) in (unsigned, signed)


def _check_utf8(name: str, where: str, position: int) -> None:
    try:
        name.encode()
    except UnicodeEncodeError:
        raise TarFault(where, position, f"the name {name!r} is not UTF-8") from None


def _check_end(reader: BytesReader, where: str, mark: int) -> None:
    """After the end mark nothing but zeros."""
    chunk = 1 << 16
    for offset in range(mark + _BLOCK, reader.size, chunk):
        data = bytes(reader.read(offset, min(chunk, reader.size - offset)))
        if rest := data.lstrip(b"\0"):
            raise TarFault(
                where,
                mark,
                f"a zeroed header, which means the end of the archive, but data follow at offset "
                f"{offset + len(data) - len(rest)}: damaged, or tars joined end to end. Usual readers stop there",
            )


def _cut_or_no_tar(where: str, position: int, header: bytes) -> TarFault:
    if position == 0:
        return _bad_header(where, 0, header) if header else TarFault(where, 0, "the file is empty")
    place = "in the middle of a header" if header else "before its end-of-archive mark"
    return TarFault(where, position, f"truncated: the file ends {place}")


def _bad_header(where: str, position: int, header: bytes) -> TarFault:
    if position:
        reason = "bad header checksum: damaged. Usual readers take it for the end and lose what follows without a word"
        return TarFault(where, position, reason)
    for magic, name in _COMPRESSED.items():
        if header.startswith(magic):
            remedy = "gunzip first" if name == "gzip" else "unpack it first"
            return TarFault(where, 0, f"compressed by {name}: {remedy}, it cannot be read by byte range")
    return TarFault(where, 0, "is no tar (no valid header at its start)")
