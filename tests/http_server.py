"""A real HTTP server of a folder on loopback, with faults that can be switched while it runs."""

import argparse
import os
import re
import socket
import threading
import time
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from urllib.parse import unquote, urlsplit

__all__ = ["Faults", "ShardServer"]


@dataclass
class Faults:
    """What the server does wrong. Those from ``status`` on hit the first ``times`` GET requests only (None: all).

    HEAD requests are always answered well.

    Attributes:
        rate: bytes per second of each connection; 0: no limit.
        latency: seconds before each answer.
        ignore_ranges: answer 200 with the whole file.
        only: hits paths that contain it.
        status: answered instead of the file, e.g. 503.
        drop_after: body bytes after which the connection is cut.
        stall_after: body bytes after which nothing comes any more, on an open connection.
        length_error: added to Content-Length (the body stays as it is).
        corrupt: the first byte of the body is another.
    """

    rate: float = 0.0
    latency: float = 0.0
    ignore_ranges: bool = False
    only: str = ""
    times: int | None = None
    status: int = 0
    drop_after: int | None = None
    stall_after: int | None = None
    length_error: int = 0
    corrupt: bool = False


class ShardServer:
    """``with ShardServer(folder) as server: ... server.url``: threads of this process on a free port of 127.0.0.1.

    Attributes:
        faults: may be replaced at any time.
        requests: GET requests per path.
        sent: body bytes per path.
    """

    def __init__(self, folder: Path, *, faults: Faults | None = None, port: int = 0) -> None:
        self.folder = folder
        self.faults = faults or Faults()
        self.requests: Counter[str] = Counter()
        self.sent: Counter[str] = Counter()
        self.stopped = threading.Event()
        self._lock = threading.Lock()
        self._server = _Server(("127.0.0.1", port), _Handler)
        self._server.owner = self
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), name="shard-server")

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> "ShardServer":
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stopped.set()
        self._server.shutdown()
        self._thread.join()
        self._server.hang_up()
        self._server.server_close()  # joins the threads of the connections

    def begin(self, path: str) -> Faults:
        """Count a GET; the faults that it gets."""
        with self._lock:
            self.requests[path] += 1
            faults = self.faults
            if faults.only not in path:
                return Faults()
            if faults.times == 0:
                return Faults(faults.rate, faults.latency, faults.ignore_ranges)
            if faults.times is not None:
                faults.times -= 1
            return faults

    def count(self, path: str, num_bytes: int) -> None:
        with self._lock:
            self.sent[path] += num_bytes


class _Server(ThreadingHTTPServer):
    daemon_threads = False
    owner: ShardServer

    def __init__(self, address: tuple[str, int], handler: type[BaseHTTPRequestHandler]) -> None:
        self._open: set[socket.socket] = set()
        super().__init__(address, handler)

    def process_request(self, request: socket.socket, client_address: tuple[str, int]) -> None:  # type: ignore[override]
        self._open.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: socket.socket) -> None:  # type: ignore[override]
        self._open.discard(request)
        super().shutdown_request(request)

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that went away in mid-body is no news."""

    def hang_up(self) -> None:
        for connection in list(self._open):  # idle ones of clients that keep them alive
            _cut(connection)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_HEAD(self) -> None:
        path = self._path()
        if not path.is_file():
            self._refuse(404)
            return
        self.send_response(200)
        self.send_header("Content-Length", str(path.stat().st_size))
        self.end_headers()

    def do_GET(self) -> None:
        path = self._path()
        faults = self.server.owner.begin(self._name())
        if faults.latency:
            self.server.owner.stopped.wait(faults.latency)
        if faults.status or not path.is_file():
            self._refuse(faults.status or 404)
            return
        start, end, size = self._range(path, faults)
        if start >= size > 0:
            self._refuse(416)
            return
        self.send_response(206 if end - start != size else 200)
        if end - start != size:
            self.send_header("Content-Range", f"bytes {start}-{end - 1}/{size}")
        self.send_header("Content-Length", str(end - start + faults.length_error))
        self.end_headers()
        with path.open("rb") as stream:
            self._send(stream.fileno(), start, end, faults)
        if faults.length_error:
            self.close_connection = True

    def _name(self) -> str:
        return unquote(urlsplit(self.path).path).lstrip("/")

    def _path(self) -> Path:
        return self.server.owner.folder / self._name()

    def _refuse(self, status: int) -> None:
        self.send_response(status)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def _range(self, path: Path, faults: Faults) -> tuple[int, int, int]:
        size = path.stat().st_size
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if wanted is None or faults.ignore_ranges:
            return 0, size, size
        return int(wanted[1]), min(int(wanted[2]) + 1 if wanted[2] else size, size), size

    def _send(self, file: int, start: int, end: int, faults: Faults) -> None:
        owner, at, began = self.server.owner, start, time.monotonic()
        while at < end and not owner.stopped.is_set():
            count = min(end - at, int(faults.rate / 20) + 1 if faults.rate else 1 << 22)
            for limit in (faults.drop_after, faults.stall_after):
                if limit is not None:
                    count = min(count, start + limit - at)
            if count <= 0:
                if faults.drop_after is None:
                    owner.stopped.wait()
                _cut(self.connection)
                self.close_connection = True
                return
            if faults.corrupt and at == start:
                self.connection.sendall(bytes([os.pread(file, 1, at)[0] ^ 1]))
                count = 1
            else:
                count = os.sendfile(self.connection.fileno(), file, at, count)
            at += count
            owner.count(self._name(), count)
            if faults.rate:
                owner.stopped.wait(max(0.0, (at - start) / faults.rate - (time.monotonic() - began)))


def _cut(connection: socket.socket) -> None:
    with suppress(OSError):  # the client was quicker
        connection.shutdown(socket.SHUT_RDWR)


def main() -> None:
    """A server by itself, for measurements: ``python -m tests.http_server FOLDER --port 8000 --rate 1e8``."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--rate", type=float, default=0.0)
    parser.add_argument("--latency", type=float, default=0.0)
    args = parser.parse_args()
    with ShardServer(args.folder, faults=Faults(args.rate, args.latency), port=args.port) as server:
        print(server.url, flush=True)
        threading.Event().wait()


if __name__ == "__main__":
    main()
