"""A real TensorBoard on a folder of runs, asked as its page asks it."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlencode
from urllib.request import Request, urlopen

__all__ = ["Server", "tensorboard"]


@dataclass(frozen=True)
class Server:
    """A server that has read its folder."""

    address: str

    def get(self, path: str, **query: object) -> Any:
        """The JSON below /data/."""
        return json.loads(self.read(path, **query))

    def post(self, path: str, body: Mapping[str, object]) -> Any:
        return json.loads(self._open(path, json.dumps(body).encode()))

    def read(self, path: str, **query: object) -> bytes:
        return self._open(f"{path}?{urlencode(query)}" if query else path)

    def _open(self, path: str, body: bytes | None = None) -> bytes:
        headers = {} if body is None else {"Content-Type": "application/json"}
        with urlopen(Request(f"{self.address}/data/{path}", data=body, headers=headers), timeout=20) as answer:
            content: bytes = answer.read()
        return content


@contextmanager
def tensorboard(folder: Path, seconds: float = 60.0) -> Iterator[Server]:
    """`tensorboard --logdir FOLDER` on a free port of this machine, until it shows a run; ended with all it started."""
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", str(folder), "--port", "0", "--host", "127.0.0.1"]
    log = folder.parent / f"{folder.name}-tensorboard.log"
    with log.open("w") as stream:
        process = subprocess.Popen(command, stdout=stream, stderr=stream, start_new_session=True)
    try:
        yield _ready(process, log, time.monotonic() + seconds)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _ready(process: subprocess.Popen[bytes], log: Path, deadline: float) -> Server:
    while time.monotonic() < deadline and process.poll() is None:
        found = re.search(r"at (http://[\d.:]+)/", log.read_text())
        if found is not None and (server := Server(found[1])).get("runs"):
            return server
        time.sleep(0.1)
    raise AssertionError(f"tensorboard shows no run: {log.read_text()}")
