"""What a full table takes on a cluster: its runs, their operations, and GPU hours, with the arithmetic.

    python -m tests.benchmarks.cluster_hours
    python -m tests.benchmarks.cluster_hours --grid reben --peak 312 --mfu 0.15 optim.epochs=30
    python -m tests.benchmarks.cluster_hours --grid reben --samples-per-second 9000
    python -m tests.benchmarks.cluster_hours --grid my.yaml --rows 4000,1000,2000 --image 3,64,10

Nothing is run. A run is `epochs` times over the training rows, forward and backward, and once an epoch over the
validation rows, forward; then `adagc evaluate`: validation and test once. The student's operations are counted
(multiplication and addition are two); in forward passes a step is about 3, a calibrated step of AdaGC one more for the
teacher, and with Mixup one more for the clean images. AdaGC is taken to calibrate from the earliest epoch its detector
allows: the dearest case. What other methods keep of each row (role, elr, sat, em_apl, ll_cp) is bytes, no pass.

hours = operations / (peak x MFU). 989 TFLOP/s is NVIDIA's figure for H100 and H200 (SXM, dense bf16), 312 that for the
A100. The MFU, the share of it that is reached, is ASSUMED: NVIDIA's own ResNet-50 on an A100 (DeepLearningExamples,
2,470 images/s of 224 px in mixed precision) reaches 0.19, and an H100 has 3.2 times the operations, but not 3.2 times
the memory bandwidth. A rate that was measured takes the place of both: --samples-per-second, of AN's training on one
GPU. Not in it: reading, where the disks are slower than the rate that is printed; augmentation; start and checkpoints.
"""

import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from adagc_dist.config import Config, MethodConfig
from adagc_dist.methods.table import BASELINES, VARIANTS
from tests.benchmarks.machine import make_parser, numbers, write_json
from tests.benchmarks.step_flops import Flops, count_flops
from tuning.fingerprint import digest_of, settings_of
from tuning.grid import load_grid

__all__ = ["DATA", "Data", "Kind", "Table", "extra_forwards", "full_table", "main"]

PEAK, MFU = 989.0, 0.10  # TFLOP/s, and the share of it


@dataclass(frozen=True)
class Data:
    """Rows of the splits, and the image that the student sees."""

    train: int
    validation: int
    test: int
    bands: int
    size: int
    classes: int


DATA: Mapping[str, Data] = {
    "reben": Data(237_871, 122_342, 119_825, bands=12, size=120, classes=19),
    "aid": Data(1_917, 483, 600, bands=3, size=600, classes=17),
    "core": Data(1_200, 400, 400, bands=12, size=120, classes=19),  # what launch/demo.sh makes
}


@dataclass(frozen=True)
class Kind:
    """Runs that cost the same.

    Attributes:
        flops: of the student, for one image.
        extra: forward passes of a calibrated step, beside forward and backward.
        calibrated: epochs of them, of all ``epochs``.
        scorings: passes over validation, the last one by `adagc evaluate`.
    """

    flops: Flops
    extra: int
    calibrated: int
    epochs: int
    scorings: int

    def training(self, data: Data) -> float:
        """FLOP of a run, as those below."""
        passes = self.epochs * self.flops.training + self.calibrated * self.extra * self.flops.forward
        return data.train * passes

    def validation(self, data: Data) -> float:
        return data.validation * self.scorings * self.flops.forward

    def test(self, data: Data) -> float:
        return data.test * self.flops.forward

    def run(self, data: Data) -> float:
        return self.training(data) + self.validation(data) + self.test(data)


@dataclass(frozen=True)
class Table:
    """A grid's runs: of each kind, how many are to be trained and which methods they are of.

    Attributes:
        runs: all of them; those with equal settings and seed are trained once.
        rate: FLOP/s that a GPU reaches.
        speed: how that comes about.
    """

    grid: str
    data: Data
    student: str
    runs: int
    kinds: Mapping[Kind, int]
    methods: Mapping[Kind, Sequence[str]]
    rate: float
    speed: str

    @property
    def trained(self) -> int:
        return sum(self.kinds.values())

    @property
    def rows(self) -> int:
        """Trained, of all runs."""
        return self.data.train * sum(kind.epochs * runs for kind, runs in self.kinds.items())

    @property
    def flop(self) -> float:
        return sum(kind.run(self.data) * runs for kind, runs in self.kinds.items())

    @property
    def hours(self) -> float:
        return self.flop / self.rate / 3600

    def figures(self) -> dict[str, Any]:
        return {
            "runs": self.runs, "trained": self.trained, "rows": self.rows, "flop": self.flop, "flop_per_s": self.rate,
            "gpu_hours": self.hours,
        }  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    parser = make_parser(__doc__)
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings of all runs")
    parser.add_argument("--grid", action="append", help="a shipped grid or a file (reben and aid)")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rows", type=numbers, help="TRAIN,VALIDATION,TEST, where they are not known")
    parser.add_argument("--image", type=numbers, help="BANDS,SIZE,CLASSES, likewise")
    parser.add_argument("--peak", type=float, default=PEAK, help=f"TFLOP/s of a GPU ({PEAK:g})")
    parser.add_argument("--mfu", type=float, default=MFU, help=f"share of it that is reached ({MFU:g}: assumed)")
    parser.add_argument("--samples-per-second", type=float, help="measured: AN's training on one GPU, instead of both")
    arguments = parser.parse_intermixed_args(argv)
    tables = []
    for name in arguments.grid or ["reben", "aid"]:
        data = _data(name, arguments.rows, arguments.image)
        if data is None:
            parser.error(f"--grid {name}: its data are not known here: name them with --rows and --image")
        table = full_table(
            name, data, arguments.overrides, seeds=arguments.seeds, speed=(arguments.peak * 1e12, arguments.mfu),
            samples_per_second=arguments.samples_per_second,
        )  # fmt: skip
        print("\n".join(_told(table)), end="\n\n")
        tables.append(table)
    print("\n".join(_summary(tables)))
    write_json(arguments.json, {table.grid: table.figures() for table in tables})
    return 0


def full_table(
    grid_name: str,
    data: Data,
    overrides: Sequence[str] = (),
    *,
    seeds: int,
    speed: tuple[float, float],
    samples_per_second: float | None = None,
) -> Table:
    """What `adagc compare` would train.

    Args:
        speed: peak, FLOP/s, and MFU.
        samples_per_second: of AN's training, measured; then ``speed`` does not count.

    Raises:
        ValueError: there is no such grid, or a cell of it is refused.
    """
    grid = load_grid(grid_name, ["data.shards=none", *overrides])
    configs = {cell: grid.config(*cell) for cell in grid.cells}
    distinct = {digest_of(settings_of(config)): config for config in configs.values()}
    kind_of = _Kinds(data)
    kinds = [kind_of(config) for config in distinct.values()]
    methods: dict[Kind, list[str]] = {}
    for (_, method), config in configs.items():
        named = methods.setdefault(kind_of(config), [])
        named += [method] if method not in named else []
    first = next(iter(configs.values()))
    rate, told = _speed(kind_of(first).flops, speed, samples_per_second)
    return Table(
        grid=grid_name,
        data=data,
        student=f"{first.model.name}, {first.optim.precision}",
        runs=seeds * len(configs),
        kinds={kind: seeds * kinds.count(kind) for kind in methods},
        methods=methods,
        rate=rate,
        speed=told,
    )


def extra_forwards(method: MethodConfig) -> int:
    """Of a step after the trigger: the teacher's pass, and with Mixup the student's of the clean images."""
    if method.name in BASELINES:
        return 0
    mixes = method.mixup_alpha > 0 and method.name not in VARIANTS
    return 1 + mixes


class _Kinds:
    """Of configurations; a student's operations are counted once."""

    def __init__(self, data: Data) -> None:
        self._data, self._counted = data, dict[str, Flops]()

    def __call__(self, config: Config) -> Kind:
        epochs, extra = config.optim.epochs, extra_forwards(config.method)
        calibrates = extra > 0 and config.detector.rule != "never"
        return Kind(
            flops=self._flops(config),
            extra=extra,
            calibrated=max(0, epochs - config.detector.min_epochs) if calibrates else 0,
            epochs=epochs,
            scorings=epochs * (1 + config.run.eval_student) + 1,
        )

    def _flops(self, config: Config) -> Flops:
        model = replace(config.model, pretrained=None)
        bands, size = len(config.data.bands or ()) or self._data.bands, config.data.size or self._data.size
        key = f"{model} {bands} {size}"
        if key not in self._counted:
            self._counted[key] = count_flops(model, bands=bands, classes=self._data.classes, size=size)
        return self._counted[key]


def _speed(flops: Flops, speed: tuple[float, float], samples_per_second: float | None) -> tuple[float, str]:
    """FLOP/s, and how they come about."""
    peak, mfu = speed
    if samples_per_second is not None:
        rate = samples_per_second * flops.training
        return rate, f"{samples_per_second:,.0f} samples/s of AN, measured, are {rate / 1e12:.4g} TFLOP/s"
    rate = peak * mfu
    return rate, (
        f"{peak / 1e12:g} TFLOP/s x {mfu:g} (assumed) = {rate / 1e12:.4g} TFLOP/s: AN would train "
        f"{rate / flops.training:,.0f} samples/s"
    )


def _told(table: Table) -> Iterable[str]:
    """The arithmetic."""
    data = table.data
    yield f"{table.grid}: {table.runs} runs, {table.trained} to be trained, {table.rows:,} rows; {table.student}"
    yield f"  a GPU: {table.speed}"
    for kind, runs in table.kinds.items():
        forward, both, hours = kind.flops.forward / 1e9, kind.flops.training / 1e9, kind.run(data) / table.rate / 3600
        calibrated = f" + {kind.calibrated} x {kind.extra} x {forward:.3f}" if kind.calibrated else ""
        lines = (
            (f"training    {data.train:,} rows x ({kind.epochs} x {both:.3f}{calibrated}) GFLOP", kind.training(data)),
            (f"validation  {data.validation:,} rows x {kind.scorings} x {forward:.3f} GFLOP", kind.validation(data)),
            (f"test        {data.test:,} rows x 1 x {forward:.3f} GFLOP", kind.test(data)),
        )
        yield f"  {', '.join(table.methods[kind])}:"
        yield from (f"    {text:<76} = {flop / 1e15:>9.3f} PFLOP" for text, flop in lines)
        run = f"{kind.run(data) / 1e15:.3f} PFLOP / {table.rate / 1e12:.4g} TFLOP/s = {hours:.3f} h a run"
        yield f"    {run}, {runs} runs: {runs * hours:.1f} GPU hours"


def _summary(tables: Iterable[Table]) -> Iterable[str]:
    yield "| grid | runs to be trained | rows | PFLOP | TFLOP/s | GPU hours |"
    yield "|---|---|---|---|---|---|"
    for table in tables:
        yield (
            f"| {table.grid} | {table.trained} | {table.rows:,} | {table.flop / 1e15:,.0f} | {table.rate / 1e12:.4g} | "
            f"{table.hours:.1f} |"
        )


def _data(grid: str, rows: list[int] | None, image: list[int] | None) -> Data | None:
    """Known, or named, or both; None where something lacks."""
    known = DATA.get(grid, Data(0, 0, 0, bands=0, size=0, classes=0) if rows and image else None)
    if known is None:
        return None
    named = dict(zip(("train", "validation", "test"), rows or (), strict=rows is not None))
    named |= dict(zip(("bands", "size", "classes"), image or (), strict=image is not None))
    return replace(known, **named)


if __name__ == "__main__":
    sys.exit(main())
