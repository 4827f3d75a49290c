"""What grows with the number of samples: the plan of an epoch, and `adagc index` over tars of others.

    python -m tests.benchmarks.scale [--json FILE] [--rows 600000,100000000] [--samples 240000]

The plan: seconds to the first slot of an epoch, to one in its middle, and for a rank's rows of the whole epoch, with
the memory it takes at most, each in a process of its own. The index: the whole command over tars of reBEN's layout
whose pixels are holes (headers and places are real), in /dev/shm: 16 kB a sample, and no disk behind the page cache.
"""

import io
import json
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path
from typing import BinaryIO

import numpy as np

from sharding import reben
from tests.benchmarks.machine import cores, machine_line, make_parser, numbers, write_json

_SAMPLES_PER_TAR = 2000
_PLAN = """
import json, sys, time
import numpy as np
from sharding.plan import plan_epoch
rows, window = map(int, sys.argv[1:])
def peak_mb():
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1]) // 1024
before = peak_mb()
size = max(1000, rows // 10000)
def make():
    batch = max(512, rows // 6000)
    return plan_epoch(np.full(rows // size, size), 0, seed=0, global_batch=batch, world_size=64, window_shards=window)
def timed(work):
    start = time.perf_counter(); work(); return round(time.perf_counter() - start, 4)
first = timed(lambda: make().slot(0, 0, 0))
plan = make()
middle = timed(lambda: plan.slot(plan.num_steps // 2, 0, 0))
rank = timed(lambda: plan.rank_rows(63))
print(json.dumps({"first_slot": first, "middle_slot": middle, "rank_rows": rank, "peak_mb": peak_mb() - before}))
"""


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--rows", type=numbers, default=[600_000, 100_000_000], help="of the plan (600000,100000000)")
    parser.add_argument("--samples", type=int, default=240_000, help="of the index (default: %(default)s)")
    asked = parser.parse_args()
    print(machine_line())
    figures = {
        f"plan, {rows:,} rows, window of {window or 'all'} shards": _plan(rows, window)
        for rows in asked.rows
        for window in (64, 0)
    }
    figures[f"index, {asked.samples:,} samples, {cores()} workers"] = _index(asked.samples)
    for name, found in figures.items():
        print(f"{name:<52}" + "  ".join(f"{key} {value:,}" for key, value in found.items()))
    write_json(asked.json, {"scale": figures})


def _plan(rows: int, window: int) -> dict[str, float]:
    done = subprocess.run(
        [sys.executable, "-c", _PLAN, str(rows), str(window)], capture_output=True, text=True, check=True
    )
    found: dict[str, float] = json.loads(done.stdout)
    return found


def _index(samples: int) -> dict[str, float]:
    """`adagc index` as a user runs it, its start included."""
    with tempfile.TemporaryDirectory(dir="/dev/shm") as name:
        folder = Path(name)
        with (folder / "labels.csv").open("w") as labels:
            labels.write("key,a\n")
            for number in range(0, samples, _SAMPLES_PER_TAR):
                keys = [f"S2A_MSIL2A_20170613T101031_N9999_{i:09d}" for i in range(number, number + _SAMPLES_PER_TAR)]
                labels.writelines(f"{key},1\n" for key in keys)
                _write_tar(folder / f"train-{number:09d}.tar", keys)
        command = [sys.executable, "-m", "launch.cli", "index", name, "--labels", str(folder / "labels.csv")]
        start = time.perf_counter()
        done = subprocess.run([*command, "--statistics-samples", "200"], capture_output=True, text=True, check=True)
        seconds = time.perf_counter() - start
    reading = next(line for line in done.stdout.splitlines() if line.startswith("read at"))
    read_rate = float(reading.split()[2].replace(",", ""))
    return {"seconds": round(seconds, 2), "samples_per_second_reading": read_rate}


def _write_tar(path: Path, keys: list[str]) -> None:
    """Samples of reBEN's four members; of the pixels only the .npy headers are written."""
    heads = [(member.name, _npy_head(member.shape), member.pixel_bytes) for member in reben.MEMBERS]
    sizes = np.random.default_rng(len(path.name)).integers(200, 1500, len(keys))
    with path.open("wb") as stream:
        for key, size in zip(keys, sizes.tolist()):
            for name, head, pixels in heads:
                _add(stream, f"{key}.{name}", head, len(head) + pixels)
            _add(stream, f"{key}.json", b"{}".ljust(size), size)
        stream.truncate(stream.tell() + 10240)


def _add(stream: BinaryIO, name: str, content: bytes, size: int) -> None:
    info = tarfile.TarInfo(name)
    info.size = size
    stream.write(info.tobuf(tarfile.USTAR_FORMAT) + content)
    stream.seek(-(-size // 512) * 512 - len(content), 1)


def _npy_head(shape: tuple[int, ...]) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, np.zeros(shape, np.uint16))
    return buffer.getvalue()[:128]


if __name__ == "__main__":
    main()
