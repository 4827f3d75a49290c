"""A page in headless Chromium that has no network: its document after the page's scripts, and ours, have run."""

import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Shown", "find_browser", "show"]

_INSTALL = ("apt-get", "install", "--yes", "--quiet=2", "--no-install-recommends", "chromium")


@dataclass(frozen=True)
class Shown:
    """What became of a page.

    Attributes:
        html: the document at the end.
        complaints: what its scripts threw, and what it was refused.
    """

    html: str
    complaints: list[str]


def find_browser() -> str | None:
    """Installed by Debian's apt where that can be done."""
    for command in (_INSTALL, ("apt-get", "update", "--quiet=2"), _INSTALL):
        if shutil.which("chromium") is None and os.geteuid() == 0 and shutil.which("apt-get"):
            subprocess.run(command, capture_output=True)
    return shutil.which("chromium")


def show(browser: str, page: Path, script: str, folder: Path) -> Shown:
    """Open a copy of ``page`` that ends with ``script``; ``folder`` takes the copy and the browser's profile."""
    text = page.read_text()
    end = text.rindex("</body>")
    copy = folder / "shown.html"
    copy.write_text(f"{text[:end]}<script>{script}</script>{text[end:]}")
    command = [
        *("unshare", "--map-root-user", "--net", browser, "--headless", "--no-sandbox", "--disable-gpu"),
        *("--disable-3d-apis", "--enable-logging=stderr", f"--user-data-dir={folder / 'profile'}"),
        *("--window-size=1240,1000", "--dump-dom", copy.as_uri()),
    ]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    return Shown(result.stdout, [line for line in result.stderr.splitlines() if "CONSOLE" in line])
