"""What the nodes of one start tell each other, through a folder on a file system that all of them see.

FOLDER/status.json    the head's: {state, address}, at the end {state, code, reason}
FOLDER/NODE.failed    why this node could not join, or has left
FOLDER/STOP           the supervisor's, with the signal it has heard
FOLDER/ray.token      who knows it may use the cluster
FOLDER/ray-NODE.log   what `ray start` said
"""

import os
import secrets
from contextlib import suppress
from pathlib import Path

from adagc_dist.tracking import read_status, write_json, write_text
from launch.stop import STOP_FILE

__all__ = ["Rendezvous"]


class Rendezvous:
    """One start's folder. A file that cannot be read at the moment is one that is not there yet."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.token = folder / "ray.token"

    def open(self) -> None:
        """Before any node starts.

        Raises:
            FileExistsError: another start has this folder.
        """
        self.folder.mkdir(parents=True)
        with open(os.open(self.token, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as stream:
            stream.write(secrets.token_hex(32))
        self.publish("running")  # from here on a signal is passed on as STOP

    def close(self) -> None:
        self.token.unlink(missing_ok=True)

    def publish(self, state: str, **facts: object) -> None:
        """By the head."""
        write_json(self.folder / "status.json", {"state": state, **facts})

    def status(self) -> dict[str, object]:
        with suppress(OSError, ValueError):  # NFS: a file replaced while it is read is a stale handle
            os.scandir(self.folder).close()  # NFS: asks the server; else names are cached for a minute
            return read_status(self.folder)
        return {}

    @property
    def address(self) -> str:
        """Of the cluster's head; empty as long as it does not listen."""
        return str(self.status().get("address", ""))

    @property
    def ended(self) -> bool:
        return "code" in self.status()

    def fail(self, host: str, why: str) -> None:
        write_text(self.folder / f"{host}.failed", why)

    def failed(self) -> dict[str, str]:
        """The nodes that cannot join, or have left, and why."""
        return {path.stem: path.read_text() for path in sorted(self.folder.glob("*.failed"))}

    def asked_to_stop(self) -> str:
        """The signal that the supervisor has heard; empty if none."""
        with suppress(OSError):
            return (self.folder / STOP_FILE).read_text()
        return ""

    def log(self, host: str) -> Path:
        return self.folder / f"ray-{host}.log"
