"""The samples of one tar: members grouped by key as webdataset does it, and what is wrong with them.

Letters: N samples of the tar, S of a run of it, M members of each.
"""

import io
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import xxhash
from numpy.typing import NDArray

from sharding.cache import is_url
from sharding.images import IMAGE_NAMES, image_size
from sharding.sources.protocol import DTYPES
from sharding.tars.read import BytesReader, HopReader, LocalBlocks, RemoteBlocks, StreamReader
from sharding.tars.runs import Run, walk_runs
from sharding.tars.structure import TarFault, key_and_extension, walk_tar

__all__ = ["Column", "Kind", "TarSamples", "TarTask", "read_tar"]

_HEAD = 4096  # longer than the .npy header of any array of numbers


@dataclass(frozen=True)
class TarTask:
    """One tar to be read.

    Attributes:
        where: a path or a URL.
        name: below the origin.
        whole: read all bytes, for digests; a remote tar is in any case.
        keep: extensions whose contents are kept (only where all is read).
    """

    where: str
    name: str
    whole: bool = False
    keep: tuple[str, ...] = ()


@dataclass(frozen=True)
class Kind:
    """What a payload member is, from its .npy or image header; ``header`` is bytes before the first pixel."""

    shape: tuple[int, ...]
    dtype: str
    header: int

    def __str__(self) -> str:
        return f"{self.dtype} {list(self.shape)}" + (f" with a header of {self.header} bytes" if self.header else "")


@dataclass(frozen=True)
class Column:
    """One payload member of all samples, int64 and uint64 [N]; offset -1 where a sample lacks it."""

    offsets_N: NDArray[np.int64]
    sizes_N: NDArray[np.int64]
    digests_N: NDArray[np.uint64] | None


@dataclass
class TarSamples:
    """What was found.

    Attributes:
        task: what was asked.
        size, digest: bytes and digest of the tar; no digest where it was not read whole.
        keys: string [N], in file order.
        columns: by extension, in the order they came in.
        kinds: of the first member of each extension.
        ignored: how many members of each other extension.
        wrong: key -> why the sample cannot be used.
        kept: key -> extension -> content.
        broken: why the walk ended early; the samples before that are there.
    """

    task: TarTask
    size: int = 0
    digest: str = ""
    keys: pa.StringArray = field(default_factory=lambda: pa.array([], pa.string()))
    columns: dict[str, Column] = field(default_factory=dict)
    kinds: dict[str, Kind] = field(default_factory=dict)
    ignored: Counter[str] = field(default_factory=Counter)
    wrong: dict[str, str] = field(default_factory=dict)
    kept: dict[str, dict[str, bytes]] = field(default_factory=dict)
    broken: TarFault | None = None


def _is_payload(extension: str) -> bool:
    last = extension.rpartition(".")[2]
    return last == "npy" or last.lower() in IMAGE_NAMES


def read_tar(task: TarTask) -> TarSamples:
    """The samples of one tar; runs in a worker.

    Raises:
        OSError: it cannot be read at all.
    """
    found = TarSamples(task)
    if not task.whole and not is_url(task.where):
        with HopReader(task.where) as reader:
            _collect(reader, found, whole=False)
        return found
    with RemoteBlocks(task.where) if is_url(task.where) else LocalBlocks(task.where) as blocks:
        stream = StreamReader(blocks)
        _collect(stream, found, whole=task.whole)
        if task.whole:
            found.digest = stream.digest()
    return found


def _collect(reader: BytesReader, found: TarSamples, *, whole: bool) -> None:
    found.size = reader.size
    members = _Members(reader, found, whole=whole)
    try:
        members.walk()
    except TarFault as fault:
        found.broken = fault
    members.group()


class _Members:
    """All members of a tar as parallel lists, while it is being walked through; runs of samples as they come."""

    def __init__(self, reader: BytesReader, found: TarSamples, *, whole: bool) -> None:
        self._reader, self._found, self._whole = reader, found, whole
        self._keys: list[str] = []
        self._offsets: list[int] = []
        self._sizes: list[int] = []
        self._digests: list[int] = []
        self._codes: list[int] = []
        self._known: dict[str, int] = {}  # extension -> code
        self._heads: dict[str, bytes] = {}
        self._counts: Counter[str] = Counter()
        self._parts: list[tuple[NDArray[Any], ...]] = []  # of keys, offsets, sizes, codes, digests

    def walk(self) -> None:
        reader, keep, known, whole = self._reader, self._found.task.keep, self._known, self._whole
        keys, offsets, sizes, codes, digests = self._keys, self._offsets, self._sizes, self._codes, self._digests
        heads, ignored, payload = self._heads, self._found.ignored, set[str]()
        for entry in self._entries():
            if isinstance(entry, Run):
                self._add(entry)
                continue
            name, offset, size = entry
            key, extension = key_and_extension(name)
            if not key:
                ignored[""] += 1
                continue
            if extension not in known:
                known[extension] = len(known)
                if _is_payload(extension):
                    payload.add(extension)
            keys.append(key)
            offsets.append(offset)
            sizes.append(size)
            codes.append(known[extension])
            digest = 0
            if extension in payload:
                if whole:
                    digest = xxhash.xxh3_64_intdigest(reader.read(offset, size))
                head = heads.get(extension)
                if head is None or not head or reader.read(offset, len(head)) != head:
                    self._inspect(key, extension, offset, size)
            else:
                ignored[extension] += 1
                if whole and extension in keep:
                    self._found.kept.setdefault(key, {})[extension] = bytes(reader.read(offset, size))
            digests.append(digest)

    def _entries(self) -> Iterator[Run | tuple[str, int, int]]:
        reader, where = self._reader, self._found.task.where
        return walk_runs(reader, where, self._head) if isinstance(reader, HopReader) else walk_tar(reader, where)

    def _head(self, extension: str) -> bytes | None:
        """What a member of a run is to begin with; nothing where all are inspected anyway."""
        if _is_payload(extension) and extension.endswith("npy"):
            return self._heads.get(extension) or None
        return b""

    def _add(self, run: Run) -> None:
        self._close_part()
        count, width = run.offsets_SM.shape
        keys, no_digests = np.repeat(np.array(run.keys, object), width), np.zeros(count * width, np.uint64)
        codes = np.tile([self._known[extension] for extension in run.extensions], count)
        self._parts.append((keys, run.offsets_SM.ravel(), run.sizes_SM.ravel(), codes, no_digests))
        images = []
        for m, extension in enumerate(run.extensions):
            if not _is_payload(extension):
                self._found.ignored[extension] += count
            elif not extension.endswith("npy"):
                seen = self._counts[extension]
                images += [((1 << bit) - seen - 1, m, seen) for bit in range(64) if seen < 1 << bit <= seen + count]
                self._counts[extension] += count
        for s, m, seen in sorted(images):  # those that the careful walk would have looked into, in its order
            extension = run.extensions[m]
            self._counts[extension] = seen + s
            self._inspect(run.keys[s], extension, int(run.offsets_SM[s, m]), int(run.sizes_SM[s, m]))
            self._counts[extension] = seen + count

    def _close_part(self) -> None:
        if self._keys:
            lists = self._keys, self._offsets, self._sizes, self._codes, self._digests
            dtypes = object, np.int64, np.int64, np.int64, np.uint64
            self._parts.append(tuple(np.array(values, dtype) for values, dtype in zip(lists, dtypes)))
            for values in lists:
                values.clear()

    def _inspect(self, key: str, extension: str, offset: int, size: int) -> None:
        """A .npy header that is not the same bytes as the first one; images number 1, 2, 4, 8, ..."""
        image = not extension.endswith("npy")
        self._counts[extension] += 1
        if image and self._counts[extension] & (self._counts[extension] - 1):
            return
        try:
            data = self._reader.read(offset, size if image else min(size, _HEAD))
            kind = _image_kind(data) if image else _array_kind(data)
        except ValueError as error:
            self._found.wrong[key] = f"{extension}: {error}"
            self._heads.setdefault(extension, b"")
            return
        first = self._found.kinds.setdefault(extension, kind)
        if first != kind:
            self._found.wrong[key] = f"{extension} is {kind}, the first in the tar is {first}"
        elif not self._heads.get(extension):
            self._heads[extension] = b"" if image else bytes(data[: kind.header])

    def group(self) -> None:
        """Adjoining members of one key are a sample."""
        self._close_part()
        if not self._parts:
            return
        found = self._found
        keys, offsets, sizes, codes, digests = (np.concatenate(part) for part in zip(*self._parts))
        first = np.concatenate([[True], keys[1:] != keys[:-1]])
        sample_M = np.cumsum(first) - 1
        names: list[str] = keys[first].tolist()
        found.keys = pa.array(names, pa.string())
        for extension, code in self._known.items():
            chosen = np.flatnonzero(codes == code)[::-1]  # of two, the first stays
            samples = sample_M[chosen]
            for sample in np.flatnonzero(np.bincount(samples, minlength=len(names)) > 1).tolist():
                found.wrong[names[sample]] = f"has two members {extension}"
            if _is_payload(extension):
                column = Column(
                    np.full(len(names), -1, np.int64),
                    np.zeros(len(names), np.int64),
                    np.zeros(len(names), np.uint64) if self._whole else None,
                )
                column.offsets_N[samples], column.sizes_N[samples] = offsets[chosen], sizes[chosen]
                if column.digests_N is not None:
                    column.digests_N[samples] = digests[chosen]
                found.columns[extension] = column
        if len(set(names)) < len(names):
            self._name_repeated(names, sample_M, codes)

    def _name_repeated(self, names: list[str], sample_M: NDArray[Any], codes: NDArray[Any]) -> None:
        counts = Counter(names)
        seen: dict[str, set[int]] = {}
        for sample, name in enumerate(names):
            if counts[name] > 1:
                here = set(codes[np.searchsorted(sample_M, sample) : np.searchsorted(sample_M, sample + 1)].tolist())
                before = seen.setdefault(name, set())
                self._found.wrong[name] = (
                    "occurs twice in the tar"
                    if here & before
                    else "is split: members of other keys lie between its own"
                )
                before |= here


def _array_kind(data: bytes | memoryview) -> Kind:
    stream = io.BytesIO(data)
    try:
        version = np.lib.format.read_magic(stream)
        reader = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, fortran, dtype = reader(stream)
    except Exception as error:  # whatever Python's tokenizer and parser make of damaged bytes
        raise ValueError(f"no .npy array ({error})") from None
    if dtype.name not in DTYPES or dtype.byteorder == ">":
        order = "big-endian " if dtype.byteorder == ">" else ""
        raise ValueError(f"{order}{dtype.name}: training reads {', '.join(DTYPES)}, little-endian: convert it")
    if fortran:
        raise ValueError("in Fortran order: store it in C order (np.ascontiguousarray)")
    if len(shape) != 3 or shape[1] != shape[2] or not all(shape):
        hint = "; bands come first" if len(shape) == 3 and shape[0] == shape[1] else ""
        raise ValueError(f"of shape {list(shape)}: expected [bands, side, side]{hint}")
    return Kind(tuple(shape), dtype.name, stream.tell())


def _image_kind(data: bytes | memoryview) -> Kind:
    return Kind((3, *image_size(data)), "uint8", 0)
