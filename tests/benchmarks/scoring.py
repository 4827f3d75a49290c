"""How fast a teacher scores a split, by the size of its batches (run.eval_block) and the memory order of its weights.

    python -m tests.benchmarks.scoring [--json FILE]        ResNet-18 at 64 pixels on a CPU: a minute
    python -m tests.benchmarks.scoring --device cuda --model resnet50 --size 120 --blocks 64,256,1024,2048 --rows 16384

What is timed is ``SplitScorer.score`` as `adagc train` and `adagc evaluate` call it, from native bands that lie in
memory to probabilities on the host; on a CPU it computes on one thread. All cases take turns, figures are medians over
the rounds. ``none`` stands where the device's memory does not suffice.
"""

import statistics
import tempfile
import time
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import torch
from torch import nn

from adagc_dist.comm import SoloComm
from adagc_dist.config import ModelConfig
from adagc_dist.model import create_student
from adagc_dist.pixels import Pixels
from adagc_dist.predict import SplitScorer
from sharding import reben
from sharding.manifest import load_manifest, load_table
from sharding.plan import Slot
from sharding.reader import select_bands
from tests.benchmarks.contest import rotated
from tests.benchmarks.machine import machine_line, make_parser, numbers, write_json
from tests.benchmarks.ours import open_ours
from tests.benchmarks.step_cases import MemoryReader
from tests.benchmarks.step_shards import scenes, write_repeated

_SCENES = 32
_LAYOUTS = {"channels last": torch.channels_last, "contiguous": torch.contiguous_format}

Case = tuple[int, str]
"""A block's rows, and the order of weights in memory."""


def main(argv: Sequence[str] | None = None) -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="(cuda, if there is)")
    parser.add_argument("--model", default="resnet18", metavar="NAME", help="of timm (resnet18)")
    parser.add_argument("--size", type=int, default=64, metavar="PX", help="(64)")
    parser.add_argument("--rows", type=int, default=512, help="of the split (512)")
    parser.add_argument("--blocks", type=numbers, default=[16, 64, 256], metavar="N,...", help="(16,64,256)")
    parser.add_argument("--rounds", type=int, default=3, metavar="N", help="(3)")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32", help="(fp32)")
    asked = parser.parse_args(argv)
    print(machine_line())
    print(f"{asked.model} at {asked.size} px, {asked.precision}, on {asked.device}: patches/s")
    with tempfile.TemporaryDirectory(prefix="scoring-") as name:
        shards = Path(name) / "shards"
        write_repeated(shards, scenes(min(_SCENES, asked.rows)), rows={"validation": asked.rows})
        bench = _Bench(shards, asked.model, asked.size, torch.device(asked.device), asked.precision == "bf16")
        cases = [(block, layout) for layout in _LAYOUTS for block in asked.blocks]
        rates: dict[Case, list[float | None]] = {case: [] for case in cases}
        for number in range(asked.rounds):
            for case in rotated(cases, number):
                rates[case].append(bench.rate(*case))
    found = {case: _median(of) for case, of in rates.items()}
    print(f"{'':<16}" + "".join(f"{f'blocks of {block}':>16}" for block in asked.blocks))
    for layout in _LAYOUTS:
        cells = (found[block, layout] for block in asked.blocks)
        print(f"{layout:<16}" + "".join(f"{'none' if cell is None else f'{cell:,.1f}':>16}" for cell in cells))
    lines = [{"block": block, "layout": layout, "patches_per_second": found[block, layout]} for block, layout in cases]
    write_json(asked.json, {"model": asked.model, "size": asked.size, "rows": asked.rows, "rates": lines})


def _median(rates: Sequence[float | None]) -> float | None:
    fitted = [rate for rate in rates if rate is not None]
    return statistics.median(fitted) if fitted else None


class _Bench:
    """One split, and one network in each memory order."""

    def __init__(self, shards: Path, model: str, size: int, device: torch.device, bf16: bool) -> None:
        self._manifest, self._device, self._bf16 = load_manifest(shards), device, bf16
        self._table = load_table(self._manifest, "validation")
        groups, deviations = select_bands(self._manifest, reben.BANDS), self._manifest.band_statistics(size)
        self._pixels = Pixels(groups, reben.BANDS, statistics=deviations, size=size).to(device)
        self._models = {name: self._network(model, layout) for name, layout in _LAYOUTS.items()}
        self._pools: dict[int, MemoryReader] = {}

    def rate(self, block: int, layout: str) -> float | None:
        """Patches per second; None where the device's memory does not suffice."""
        scorer = SplitScorer(
            self._pool(block),
            self._pixels,
            num_rows=len(self._table),
            block=block,
            max_bad_fraction=0.0,
            comm=SoloComm(),
            device=self._device,
            autocast=lambda: torch.autocast(self._device.type, torch.bfloat16) if self._bf16 else nullcontext(),
            probabilities=torch.sigmoid,
        )
        start = time.perf_counter()
        try:
            scorer.score(self._models[layout])  # ends on the host
        except torch.cuda.OutOfMemoryError:
            return None
        return len(self._table) / (time.perf_counter() - start)

    def _network(self, name: str, layout: torch.memory_format) -> nn.Module:
        model = create_student(ModelConfig(name=name), num_bands=12, num_classes=len(reben.CLASSES), seed=0)
        return model.to(self._device).to(memory_format=layout)

    def _pool(self, block: int) -> MemoryReader:
        """A batch of so many rows, in memory."""
        if block not in self._pools:
            rows = np.arange(min(block, len(self._table)), dtype=np.int32)
            loader = open_ours(self._manifest, self._table, max_rows=len(rows), workers=0)
            slots = [Slot(0, rows, 0, len(rows))]
            self._pools[block] = MemoryReader.of(loader, slots, 1, pin=self._device.type == "cuda")
        return self._pools[block]


if __name__ == "__main__":
    main()
