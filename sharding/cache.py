"""Shards anywhere that fsspec speaks (http(s)://, s3://, ...), through a folder that all processes of a node share.

The folder is a mirror: once every shard has been fetched it is an ordinary shard folder. Beside the tars it holds::

    .fetch/NAME.lock                held while NAME is fetched; says "digest HEX" once NAME was checked, or "failed WHY"
    .fetch/NAME.PID.RANDOM.partial  a shard on its way, at its full size from the start, so that space is reserved
    .fetch/space.lock               held while space is counted, freed and reserved
    .fetch/RANK.wanted              what a rank reads now and next; held by its processes while they live
    .fetch/copier.lock              held by the one process that copies, where shards are copied and not fetched

Locks are flocks: the kernel drops those of a dead process, so a partial file whose lock is free is nobody's.
"""

import errno
import fcntl
import json
import logging
import os
import re
import secrets
import shutil
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import BinaryIO, Protocol
from urllib.parse import quote

import xxhash

from sharding.manifest import MANIFEST_JSON, MANIFEST_PARQUET, Shard, file_digest
from sharding.partial import replace_durably
from sharding.remote import FetchError, Remote, is_url

__all__ = ["FetchError", "ShardCache", "Source", "cache_folder", "is_url", "mirror_manifest"]

log = logging.getLogger(__name__)

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_LET_GO_SECONDS = 2.0  # in which readers close what was evicted; until then its bytes are not free
_HEADROOM_SHARE, _HEADROOM_BYTES = 0.05, 10 * 10**9  # the smaller one of the disk is left to others when staging
_TOUCH_SECONDS = 60.0  # eviction goes by age in minutes; a system call per open more often than this tells it nothing


class Source(Protocol):
    """Where whole shards come from, other than by fsspec."""

    def copy(self, name: str, size: int, stream: BinaryIO) -> str:
        """All ``size`` bytes of the file ``name`` into ``stream``; returns their digest (xxh3-128, hex).

        Raises:
            FetchError: they cannot be read, or there are not so many.
            OSError: they cannot be written.
        """


class _NoRoomError(OSError):
    """What is being staged fits only in the place of shards that are needed no later."""


def cache_folder(origin: str, cache: Path) -> Path:
    """The folder below ``cache`` for this origin alone: a readable part, without user and password, and a hash."""
    origin = origin.rstrip("/")
    readable = re.sub(r"[^A-Za-z0-9.]+", "-", origin.split("://", 1)[-1].rsplit("@", 1)[-1])[-48:].strip("-.")
    return cache / f"{readable}-{xxhash.xxh3_64_hexdigest(origin.encode())}"


@dataclass
class ShardCache:
    """The shards below a URL as local files. Picklable; usable after fork and after spawn.

    Attributes:
        origin: URL of the folder of the tars, e.g. "http://host/reben"; or a path, where there is a ``source``.
        folder: node-local folder for this origin alone; mirrors the names below it.
        limit_bytes: of all tars in the folder, those on their way included; 0: no limit.
        attempts: per block and per error that may pass.
        first_wait: seconds before the second attempt; doubled from attempt to attempt, with jitter.
        timeout: seconds for one block (for all of a shard, where the server ignores ranges).
        block_bytes: what a dropped connection costs.
        source: copies the shards of a folder that can be read directly as well (``sharding.staged``): then one process
            at a time stages, and the first failure of staging is logged, as there is no ``path`` to raise it.
    """

    origin: str
    folder: Path
    limit_bytes: int = 0
    attempts: int = 5
    first_wait: float = 0.5
    timeout: float = 60.0
    block_bytes: int = 8 << 20
    source: Source | None = None
    _rank: str = field(default_factory=lambda: secrets.token_hex(8), repr=False, compare=False)
    _stager: "_Stager | None" = field(default=None, repr=False, compare=False)

    def __getstate__(self) -> dict[str, object]:
        return self.__dict__ | {"_stager": None}

    def path(self, shard: Shard) -> Path:
        """The shard's local file, whole and checked; fetches it, or waits for the process that is fetching it.

        Raises:
            FetchError: it cannot be had.
            ValueError: its name leads out of the folder.
        """
        if not self._trusted(shard):
            try:
                self._obtain(shard)
            except FetchError:
                raise
            except OSError as error:
                raise FetchError(
                    f"{self.name(shard.name)}: the cache folder {self.folder} cannot be used ({error}): give a "
                    "writable folder on a node-local disk"
                ) from error
        self._touch(shard)
        return self._local(shard.name)

    def open(self, shard: Shard) -> int:
        """A read-only descriptor of the shard: what is open outlives its eviction, which a path does not.

        Raises:
            FetchError, ValueError: as ``path``.
        """
        while True:
            with suppress(FileNotFoundError):  # evicted since: the cache is smaller than what is in use
                return os.open(self.path(shard), os.O_RDONLY | os.O_CLOEXEC)

    def find(self, shard: Shard) -> int | None:
        """A descriptor as ``open`` gives it, or None where the shard is not here, whole and checked; never waits."""
        if not self._trusted(shard):
            return None
        self._touch(shard)
        try:
            return os.open(self._local(shard.name), os.O_RDONLY | os.O_CLOEXEC)
        except OSError:  # evicted since, or another user's
            return None

    def outdated(self, shard: Shard, file: int) -> bool:
        """Evicted: the bytes are freed, and the limit is kept, once the last descriptor is closed."""
        return os.fstat(file).st_nlink == 0

    def distrust(self, shard: Shard, file: int) -> bool:
        """It was checked when it came, so it is the disk here that fails, or the index: not to be hidden."""
        return False

    def discard(self, shard: Shard, file: int) -> None:
        """Remove the copy behind this descriptor, if it is still that one."""
        with suppress(OSError), _locked(self._state(shard.name, ".lock"), wait=False) as lock:
            if lock is not None and self._local(shard.name).stat().st_ino == os.fstat(file).st_ino:
                _overwrite(lock, "")
                self._local(shard.name).unlink()

    def stage(self, shards: Sequence[Shard]) -> None:
        """These are needed now and next, in this order: fetch what is absent, in the background, and keep what is here.

        A daemon thread of this process does it, passing over what another process is fetching; the newest call replaces
        the list, also that of other processes with a copy of this cache. Staging evicts nothing that was used or staged
        since, nor what is on a live process's list; errors are left to ``path``.
        """
        now_ns = time.time_ns()
        for shard in shards:
            self._touch(shard, now_ns)
        if self._stager is None or self._stager.owner != os.getpid():  # after a fork the thread is the parent's
            self._stager = _Stager(self)
        self._stager.replace(shards, now_ns)

    def name(self, shard: str) -> str:
        """The URL of a shard, by its name."""
        return f"{self.origin.rstrip('/')}/{quote(shard) if self.origin.startswith('http') else shard}"

    @property
    def _remote(self) -> Remote:
        return Remote(self.attempts, self.first_wait, self.timeout, self.block_bytes)

    # names

    def _local(self, name: str) -> Path:
        parts = PurePosixPath(name).parts
        if (
            not name.endswith(".tar")
            or "\0" in name
            or "\\" in name
            or any(part.startswith((".", "/")) for part in parts)
        ):
            raise ValueError(
                f"shard name {name!r} of {self.origin}: a relative path to a .tar, without '..', is needed"
            )
        return self.folder.joinpath(*parts)

    def _partial(self, name: str) -> Path:
        return self._state(name, f".{os.getpid()}.{secrets.token_hex(4)}.partial")

    def _state(self, name: str, suffix: str) -> Path:
        return self.folder / ".fetch" / (quote(name, safe="") + suffix)

    # what is here

    def _trusted(self, shard: Shard) -> bool:
        """Whether the file is here and was checked against this digest: another job may know another version of it."""
        try:
            size = self._local(shard.name).stat().st_size
            record = self._state(shard.name, ".lock").read_text()
        except OSError:
            return False
        known = record == f"digest {shard.digest}" if shard.digest else record.startswith("digest ")
        return size == shard.bytes and known

    def _touch(self, shard: Shard, now_ns: int = 0) -> None:
        """Note the use, always where ``now_ns`` is given; not by the kernel's clock, which lags behind by a tick."""
        path = self._local(shard.name)
        with suppress(OSError):  # gone, or another user's: then its age is theirs to keep
            if now_ns or path.stat().st_mtime < time.time() - _TOUCH_SECONDS:
                os.utime(path, ns=(now_ns or time.time_ns(),) * 2)

    def _tars(self) -> list[tuple[int, int, Path]]:
        """(mtime in ns, bytes, path) of all tars, the least recently used first."""
        found = []
        for path in self.folder.rglob("*.tar"):
            with suppress(FileNotFoundError):
                status = path.stat()
                found.append((status.st_mtime_ns, status.st_size, path))
        return sorted(found)

    # one shard

    def _obtain(self, shard: Shard, staged_ns: int = 0) -> None:
        """Fetch under the shard's lock. ``staged_ns`` is set where it is only staged: then nothing is waited for."""
        began = staged_ns or time.time_ns()
        self._local(shard.name).parent.mkdir(parents=True, exist_ok=True)
        (self.folder / ".fetch").mkdir(exist_ok=True)
        with _locked(self._state(shard.name, ".lock"), wait=not staged_ns) as lock:
            if lock is None or self._trusted(shard):
                return
            record = os.pread(lock, 1 << 16, 0).decode(errors="replace")
            if record.startswith("failed ") and os.fstat(lock).st_mtime_ns > began:
                # whoever we waited for has just tried it all; ten waiters trying in turn would take ten times as long
                raise FetchError(record.removeprefix("failed "))
            _overwrite(lock, "")
            try:
                if not self._is_whole(shard):
                    self._download(shard, staged_ns)
            except FetchError as error:
                _overwrite(lock, f"failed {error}")
                raise
            self._touch(shard, time.time_ns())
            _overwrite(lock, f"digest {shard.digest}")

    def _is_whole(self, shard: Shard) -> bool:
        """A file without a record: copied by hand, or its fetcher was killed just before it wrote one."""
        path = self._local(shard.name)
        if not path.is_file() or path.stat().st_size != shard.bytes:
            return False
        return not shard.digest or file_digest(path) == shard.digest

    def _download(self, shard: Shard, staged_ns: int) -> None:
        if 0 < self.limit_bytes < shard.bytes:
            raise FetchError(
                f"{self.name(shard.name)} has {shard.bytes} bytes, the cache {self.folder} is limited to "
                f"{self.limit_bytes}: raise the limit to several shards"
            )
        # another version: it takes the room, and cannot be evicted by us
        self._local(shard.name).unlink(missing_ok=True)
        spare = 0
        while True:
            temporary = self._partial(shard.name)
            try:
                self._reserve(shard, temporary, spare, staged_ns)
                self._fill(shard, temporary)
                temporary.replace(self._local(shard.name))
                return
            except OSError as error:
                if error.errno not in _FULL:
                    raise
                if staged_ns and spare:  # what was evicted may still be open
                    time.sleep(_LET_GO_SECONDS)
                    spare = 0
                else:  # the limit did not say so, the disk did; ends when there is nothing left to evict
                    spare = shard.bytes
            finally:
                temporary.unlink(missing_ok=True)

    def _fill(self, shard: Shard, temporary: Path) -> None:
        """Fetch into ``temporary`` and check; once more on a mismatch: TCP's sums overlook some damage."""
        url = self.name(shard.name)
        source = self.source or self._remote
        digests: list[str] = []
        with temporary.open("r+b") as stream:
            while len(digests) < 2:
                stream.seek(0)
                digests.append(source.copy(url, shard.bytes, stream))
                if shard.digest in ("", digests[-1]):
                    stream.flush()
                    os.fsync(stream.fileno())
                    return
        raise FetchError(
            f"{url} has digest {digests[-1]} (at first {digests[0]}), its manifest says {shard.digest}; fetched twice: "
            "the shard was changed or damaged at its origin. Copy it there again, or start anew, with its new manifest"
        )

    # space

    def _reserve(self, shard: Shard, temporary: Path, spare: int, staged_ns: int) -> None:
        """Make ``temporary`` with all the shard's bytes, once the limit is kept and ``spare`` bytes, or what there was,
        are evicted.

        Raises:
            FetchError, or _NoRoomError when staging: there is nothing left to evict.
            OSError: the disk is full, or nearly so when staging (errno in _FULL).
        """
        while True:
            with _locked(self.folder / ".fetch" / "space.lock"):
                under_way = self._bytes_under_way(shard)
                tars = self._tars()
                excess = under_way + sum(size for _, size, _ in tars) + shard.bytes - self.limit_bytes
                excess = excess if self.limit_bytes else 0
                freed = self._evict(tars, max(spare, excess), staged_ns)
                if freed >= excess and (freed or not spare):
                    if staged_ns and self._free_bytes(staged_ns) < shard.bytes:
                        raise OSError(errno.ENOSPC, "the rest of the disk is left to others")
                    with temporary.open("xb") as stream:
                        os.posix_fallocate(stream.fileno(), 0, max(shard.bytes, 1))
                    return
            if staged_ns or not under_way:
                break
            time.sleep(0.1)  # others hold what is lacking; they end in bounded time, and then it can be evicted
        reserve = " beside the 5 % (10 GB at most) left to others" if staged_ns else ""
        problem = (
            f"{self.name(shard.name)}: no room in the cache {self.folder}: {shard.bytes} bytes needed, "
            f"{self._free_bytes(staged_ns)} free on the disk{reserve}, limit {self.limit_bytes or 'none'}, and nothing "
            "left to evict: free space, raise the limit, or give a folder on another disk"
        )
        raise _NoRoomError(problem) if staged_ns else FetchError(problem)

    def _free_bytes(self, staged_ns: int) -> int:
        """What may be taken of the disk."""
        disk = shutil.disk_usage(self.folder)
        headroom = min(int(_HEADROOM_SHARE * disk.total), _HEADROOM_BYTES) if staged_ns else 0
        return max(0, disk.free - headroom)

    def _bytes_under_way(self, shard: Shard) -> int:
        """Of the partial files of live processes; those of dead ones are removed, and so are this shard's own."""
        total = 0
        for path in (self.folder / ".fetch").glob("*.partial"):
            lock = path.with_name(path.name.rsplit(".", 3)[0] + ".lock")
            with _locked(lock, wait=False) as free, suppress(FileNotFoundError):
                if free is None and lock != self._state(shard.name, ".lock"):
                    total += path.stat().st_size
                else:
                    path.unlink()
        return total

    def _evict(self, tars: list[tuple[int, int, Path]], missing: int, staged_ns: int) -> int:
        """Unlink tars until ``missing`` bytes are freed, what somebody wants last, or not at all for what is only
        staged; returns how many were. Readers that have one open keep it.
        """
        freed = 0
        wanted = self._wanted() if missing > 0 else set()
        named = [(path.relative_to(self.folder).as_posix(), used_ns, size) for used_ns, size, path in tars]
        for name, used_ns, size in sorted(named, key=lambda tar: tar[0] in wanted):
            if freed >= missing or (staged_ns and (used_ns >= staged_ns or name in wanted)):
                break
            with _locked(self._state(name, ".lock"), wait=False) as free:
                if free is not None:
                    self._local(name).unlink(missing_ok=True)
                    freed += size
        return freed

    # staging

    def _stage(self, shard: Shard, staged_ns: int) -> None:
        """Fetch it if nobody else does, in the room of what is no longer needed.

        Raises:
            FetchError, OSError: it cannot be had, or not be kept.
        """
        (self.folder / ".fetch").mkdir(parents=True, exist_ok=True)
        # several streams from one shared file system would only be in each other's way, whereas latency hides by them
        turn: AbstractContextManager[object] = nullcontext()
        if self.source is not None:
            turn = _locked(self.folder / ".fetch" / "copier.lock")
        with turn:
            if not self._trusted(shard):
                self._obtain(shard, staged_ns)

    def _want(self, shards: Sequence[Shard]) -> int:
        """Note what this rank needs now and next; returns a descriptor, and the note holds as long as that is open."""
        (self.folder / ".fetch").mkdir(parents=True, exist_ok=True)
        with _locked(self.folder / ".fetch" / "space.lock"):
            note = os.open(
                self.folder / ".fetch" / f"{self._rank}.wanted", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666
            )
            fcntl.flock(note, fcntl.LOCK_SH)
            _overwrite(note, "\n".join(shard.name for shard in shards))
        return note

    def _wanted(self) -> set[str]:
        """The names that live processes have noted; notes of dead ones are removed. Needs the lock on space."""
        names: set[str] = set()
        for path in (self.folder / ".fetch").glob("*.wanted"):
            with _locked(path, wait=False) as free:
                if free is None:
                    names.update(path.read_text().splitlines())
                else:
                    path.unlink()
        return names


class _Stager:
    """The thread that works off the newest list of ``ShardCache.stage``; it lives as long as there is work."""

    def __init__(self, cache: ShardCache) -> None:
        self.owner = os.getpid()
        self._cache = cache
        self._lock = threading.Lock()
        self._shards: Sequence[Shard] = ()
        self._wanted: deque[Shard] = deque()
        self._since_ns = 0
        self._thread: threading.Thread | None = None
        self._noted_ns = 0
        self._drop_note: Callable[[], object] = lambda: None
        self._told = False

    def replace(self, shards: Sequence[Shard], since_ns: int) -> None:
        with self._lock:
            self._shards, self._wanted, self._since_ns = shards, deque(shards), since_ns
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name="shard-staging", daemon=True)
                self._thread.start()

    def _work(self) -> None:
        while (item := self._next()) is not None:
            shard, since_ns = item
            try:
                self._note(since_ns)
                self._cache._stage(shard, since_ns)
            except _NoRoomError as error:
                self._stop(since_ns)
                self._tell(error)
            except OSError as error:  # whoever needs the shard will meet the same error, and can report it
                self._tell(error)

    def _note(self, since_ns: int) -> None:
        """Once for each list; here and not in ``replace``, which must not wait."""
        if since_ns != self._noted_ns:
            note = self._cache._want(self._shards)
            self._drop_note()
            self._drop_note = weakref.finalize(self, os.close, note)
            self._noted_ns = since_ns

    def _tell(self, error: OSError) -> None:
        """Once: the others are probably like it, and nothing fails by it."""
        if self._cache.source is not None and not self._told:
            self._told = True
            log.warning(
                "staging to %s: %s. Such shards are read where they lie, without a copy on this node (told once)",
                self._cache.folder,
                error,
            )

    def _next(self) -> tuple[Shard, int] | None:
        with self._lock:
            if self._wanted:
                return self._wanted.popleft(), self._since_ns
            self._thread = None
            return None

    def _stop(self, since_ns: int) -> None:
        """Give up the list of that time: room comes with the next one."""
        with self._lock:
            if self._since_ns == since_ns:
                self._wanted.clear()


def mirror_manifest(
    url: str, cache: Path, *, attempts: int = 5, first_wait: float = 0.5, timeout: float = 60.0
) -> Path:
    """Fetch the manifest of a remote shard folder into its ``cache_folder`` and return that, the ``ShardCache.folder``.

    manifest.json is fetched each time, so that a changed remote is noticed: tars of another digest are then removed.

    Raises:
        FetchError: the remote cannot be reached, or is no shard folder, or its table is not that of its manifest.json.
    """
    store = ShardCache(url, cache_folder(url, cache), attempts=attempts, first_wait=first_wait, timeout=timeout)
    try:
        (store.folder / ".fetch").mkdir(parents=True, exist_ok=True)
        with _locked(store.folder / ".fetch" / "manifest.lock"):
            _mirror(store)
    except FetchError:
        raise
    except OSError as error:
        raise FetchError(f"{url}: the cache folder {store.folder} cannot be used ({error})") from error
    return store.folder


def _mirror(store: ShardCache) -> None:
    """Both files, the table first, as ``write_manifest`` does; tars of another digest go before the manifest comes."""
    url = store.name(MANIFEST_JSON)
    text = store._remote.whole(url)
    try:
        record = json.loads(text)
        digests = {shard["name"]: shard["digest"] for shard in record["shards"]}
        table_digest = record["table_digest"]
    except (ValueError, KeyError, TypeError) as error:
        raise FetchError(
            f"{url} is no manifest ({type(error).__name__}: {error}): give the URL of a folder made by `adagc shard`"
        ) from error
    table = store.folder / MANIFEST_PARQUET
    if not table.is_file() or file_digest(table) != table_digest:
        _mirror_table(store, table_digest)
    for _, _, path in store._tars():
        name = path.relative_to(store.folder).as_posix()
        with suppress(OSError):  # no record: it will be checked when it is asked for
            known = store._state(name, ".lock").read_text()
            if known.startswith("digest ") and known != f"digest {digests.get(name)}":
                path.unlink()
    temporary = store._partial("manifest")
    temporary.write_bytes(text)
    replace_durably(temporary, store.folder / MANIFEST_JSON)


def _mirror_table(store: ShardCache, table_digest: str) -> None:
    url = store.name(MANIFEST_PARQUET)
    temporary = store._partial("manifest")
    try:
        with temporary.open("xb") as stream:
            size = store._remote.size(url)
            digest = store._remote.copy(url, size, stream)
        if digest != table_digest:
            raise FetchError(
                f"{url} has digest {digest}, {MANIFEST_JSON} says {table_digest}: one of them was changed or damaged, "
                "or the folder is being written: copy both there again"
            )
        replace_durably(temporary, store.folder / MANIFEST_PARQUET)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def _locked(path: Path, *, wait: bool = True) -> Iterator[int | None]:
    """Hold ``path`` against all threads and processes; yields its descriptor, or None where it is held by another."""
    lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield None
            return
        try:
            yield lock
        finally:
            fcntl.flock(lock, fcntl.LOCK_UN)  # closing would not do: a process forked meanwhile has it open too
    finally:
        os.close(lock)


def _overwrite(lock: int, text: str) -> None:
    with suppress(OSError):  # on a full disk; without a record the file is only checked once more
        os.ftruncate(lock, 0)
        os.pwrite(lock, text.encode(), 0)
