"""What a benchmark is asked, what its figures were measured on, and where they go."""

import argparse
import json
import os
import platform
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

__all__ = ["cores", "cpu_seconds", "family", "machine", "machine_line", "make_parser", "numbers", "write_json"]

PACKAGES = ("torch", "numpy", "pyarrow", "webdataset", "rasterio", "lmdb", "safetensors", "mosaicml-streaming")


def make_parser(doc: str | None) -> argparse.ArgumentParser:
    """With the module's docstring as help, and the ``--json`` that every benchmark has."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="also write the figures here")
    return parser


def numbers(text: str) -> list[int]:
    """Of an argument such as "0,2"."""
    return [int(part) for part in text.split(",")]


def cores() -> int:
    """Those this process may use, not those of the machine: a Slurm step or a container often has fewer."""
    return len(os.sched_getaffinity(0))


def family(pid: int) -> list[int]:
    """A process and all its descendants."""
    found = [pid]
    for task in Path(f"/proc/{pid}/task").iterdir():
        for child in (task / "children").read_text().split():
            found += family(int(child))
    return found


def cpu_seconds(pids: Iterable[int]) -> float:
    """CPU time, user and system, that these processes have taken so far, to 10 ms each."""
    ticks = 0
    for pid in pids:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


def machine() -> dict[str, Any]:
    return {
        "cores": cores(),
        "cpu": _cpu_model(),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "versions": {name: found for name in PACKAGES if (found := _version(name))},
    }


def machine_line() -> str:
    facts = machine()
    versions = ", ".join(f"{name} {number}" for name, number in facts["versions"].items())
    return (
        f"{facts['cores']} cores, {facts['cpu']}, {facts['memory_gb']} GB, Linux {facts['kernel']}, "
        f"Python {facts['python']}, {versions}"
    )


def write_json(path: Path | None, figures: dict[str, Any]) -> None:
    """The figures with the machine; nothing where no file was asked for."""
    if path:
        path.write_text(json.dumps({"machine": machine()} | figures, indent=1) + "\n")


def _cpu_model() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return ""
