"""What a step takes: AdaGC beside assume negative, both beside a bare loop, what arithmetic allows, and where the rest
goes.

    python -m tests.benchmarks.step [--json FILE]             on a CPU two ranks, ResNet-18 at 64 pixels: minutes
    python -m tests.benchmarks.step --device cuda --model resnet50 --size 120 --batch 256 --precision bf16
    python -m tests.benchmarks.step --cases an,adagc_mixup --rounds 3 --deepspeed
    python -m tests.benchmarks.step --device cuda --cases an,adagc_mixup --also compile,contiguous,foreach,fp32

All cases run in the same rank processes and take turns, round by round, so that ratios come from neighbours; figures
are medians over the rounds. On a CPU the ranks meet through gloo and divide the cores; on GPUs each has one.

    bare           the student in a plain loop over random images on the device; no ranks meet
    ddp            the same through plain DistributedDataParallel (several ranks)
    an             assume negative: our engine, method and trainer, from native uint16 bands that lie in memory
    adagc_warmup   AdaGC before its trigger: and the prediction averages
    adagc_plain    after it, without Mixup: and the teacher's forward pass
    adagc_mixup    with Mixup: and the student's, for the clean images
    an_shards, adagc_shards    an and adagc_mixup from shards on this disk, through the loader
    zero0..zero2   an through DeepSpeed, in rank processes of their own beside an an of theirs (--deepspeed)

Only where --cases names them: bare_compiled and bare_graphs, bare through torch.compile and through CUDA graphs;
ddp_static and ddp_one_bucket, ddp with a static graph and with all gradients in one bucket.

--also takes what differs from the default in one thing; an and adagc_mixup are then measured with it as well, in turns
with themselves as they are:

    compile        engine.compile=true
    contiguous     engine.channels_last=false
    channels_last  engine.channels_last=true
    fp32, bf16     optim.precision
    foreach        AdamW as a series of operations over all weights, not fused

"arithmetic" beside each ratio counts passes: forward 1, backward 2, so BCE 3, AdaGC 4 without Mixup and 5 with it. It
is no bound: a pass without gradient may take less than a third of forward and backward. Losses are logged at least once
in the steps that count, and every tenth step. Data wait is time of the host. "of peak" is the operations of all passes
against the fastest matrix product of the same precision on the same cores or device in the same run (--peak-tflops:
against a data sheet's figure). Of the parts, those that sum over ranks (backward, BatchNorm averaging, logging) also
wait for the rank that is last. Peak memory is that of a step: on a GPU of the allocator, on a CPU resident pages,
roughly; other cases' students are left out.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from adagc_dist.config import ModelConfig
from sharding import reben
from tests.benchmarks.machine import cores, machine_line, make_parser, write_json
from tests.benchmarks.step_figures import case_lines, goals, part_columns, scaling, shares
from tests.benchmarks.step_flops import Flops, count_flops
from tests.benchmarks.step_ranks import BY_NAME_ONLY, CASES, VARIANTS, VARIED, ZERO_CASES, Asked, Measured, measure
from tests.benchmarks.step_shards import scenes, write_repeated
from tests.benchmarks.step_tables import (
    print_cases,
    print_flops,
    print_goals,
    print_parts,
    print_scaling,
    print_shares,
    print_variants,
)
from tests.benchmarks.step_told import followed
from tests.ranks import Ranks

_DEFAULTS = {
    "cpu": {"model": "resnet18", "size": 64, "batch": 16, "ranks": 2, "precision": "fp32", "rounds": 5, "steps": 5},
    "cuda": {
        "model": "resnet50", "size": 120, "batch": 256, "ranks": 1, "precision": "bf16", "rounds": 10, "steps": 20,
    },
}  # fmt: skip
_SCENES = 32  # patches that differ
_VALIDATION_ROWS = 16  # a run cannot be built without
_TIMEOUT = 3600.0


def main(argv: Sequence[str] | None = None) -> None:
    parser = _parser()
    given = parser.parse_args(argv)
    asked = _asked(given)
    if asked.batch < 2 or asked.batch % 2 or min(asked.steps, asked.rounds, asked.ranks) < 1:
        parser.error("--batch must be even, and --steps, --rounds and --ranks at least 1")
    names = _names(parser, given, asked)
    flops = count_flops(
        ModelConfig(name=asked.model, kwargs=asked.model_kwargs),
        bands=asked.bands,
        classes=len(reben.CLASSES),
        size=asked.size,
    )
    print(machine_line())
    print(
        f"{asked.model}, {asked.bands} bands at {asked.size} px, {asked.precision}, {asked.ranks} rank(s) x "
        f"{asked.batch} rows, {asked.rounds} rounds of {asked.steps} steps, {asked.workers} reading process(es) a rank"
    )
    with tempfile.TemporaryDirectory(prefix="step-") as name:
        folder = Path(name)
        rows = {"train": asked.train_rows, "validation": _VALIDATION_ROWS}
        print(f"writing {asked.train_rows:,} rows", file=sys.stderr)
        write_repeated(folder / "shards", scenes(min(_SCENES, asked.train_rows)), rows=rows)
        measured = _measure(asked, names, folder)
        zero = _measure(replace(asked, parts_rounds=0), ["an", *ZERO_CASES], folder) if given.deepspeed else []
    figures = _conclude(asked, given, flops, measured)
    if zero:
        peak = _peak(zero, given.peak_tflops)
        figures["deepspeed"] = case_lines(zero, asked, flops, peak)
        print_cases("DeepSpeed, in processes of their own", figures["deepspeed"])
    write_json(given.json, figures)


def _conclude(asked: Asked, given: argparse.Namespace, flops: Flops, ranks: list[Measured]) -> dict[str, Any]:
    """Print what was found, and return it for JSON."""
    peak, exchanged = _peak(ranks, given.peak_tflops), ranks[0].exchanged
    lines, parts = case_lines(ranks, asked, flops, peak), part_columns(ranks)
    reached = goals(lines, asked.device)
    model = scaling(lines, parts, exchanged, fabrics=given.fabric_gbps, latency=given.latency_us / 1e6)
    told = shares(lines, parts)
    source = "a data sheet's" if given.peak_tflops else f"the fastest {asked.precision} matrix product here"
    print_cases(f"a step on {ranks[0].device}", lines)
    print_variants(lines)
    print_parts(parts, lines, on_gpu=asked.device == "cuda")
    print_flops(flops, peak, asked.ranks, source, lines)
    print_shares(told)
    print_goals(reached)
    print_scaling(model, exchanged, given.latency_us / 1e6)
    return {
        "asked": asdict(asked),
        "device": ranks[0].device,
        "cases": lines,
        "parts": parts,
        "flops": asdict(flops) | {"peak": peak, "peak_source": source},
        "shares": told,
        "goals": reached,
        "exchanged_bytes": exchanged,
        "scaling_model": model,
    }


def _measure(asked: Asked, names: Sequence[str], folder: Path) -> list[Measured]:
    """Of each rank."""
    runs, told = folder / "runs" / names[-1], folder / f"told-{names[-1]}"
    with followed(told):
        ranks = Ranks(asked.ranks, measure, asked, list(names), folder / "shards", runs, told, timeout=_TIMEOUT)
        return ranks.join()


def _peak(ranks: Sequence[Measured], sheet: float | None) -> float:
    """FLOP/s of all ranks together."""
    return sheet * 1e12 * len(ranks) if sheet else sum(rank.matmul for rank in ranks)


def _asked(given: argparse.Namespace) -> Asked:
    """With the defaults of the device where nothing was said."""
    values: dict[str, Any] = {name: getattr(given, name) for name in _DEFAULTS[given.device]}
    values = {name: _DEFAULTS[given.device][name] if value is None else value for name, value in values.items()}
    workers = given.workers
    if workers is None:
        workers = 1 if given.device == "cpu" else max(1, min(8, cores() // values["ranks"] - 1))
    return Asked(
        device=given.device,
        model_kwargs=given.model_kwargs,
        bands=given.bands,
        parts_rounds=given.parts_rounds,
        workers=workers,
        **values,
    )


def _names(parser: argparse.ArgumentParser, given: argparse.Namespace, asked: Asked) -> list[str]:
    """The cases to be measured, in their order."""
    chosen = given.cases.split(",") if given.cases else [name for name in CASES if name not in BY_NAME_ONLY]
    also = given.also.split(",") if given.also else []
    for option, names, known in (("--cases", chosen, CASES), ("--also", also, tuple(VARIANTS))):
        for name in names:
            if name not in known:
                parser.error(f"{option}: {name} is none of {', '.join(known)}")
    found = [name for name in CASES if name in chosen and (asked.ranks > 1 or not name.startswith("ddp"))]
    return found + [f"{name}+{variant}" for variant in also for name in VARIED if name in found]


def _parser() -> argparse.ArgumentParser:
    parser = make_parser(__doc__)
    parser.add_argument(
        "--device",
        choices=("cpu", "cuda"),
        default="cuda" if torch.cuda.is_available() else "cpu",
        help="(cuda where there is one)",
    )
    parser.add_argument("--model", metavar="NAME", help="of timm (resnet18; on GPUs resnet50)")
    parser.add_argument("--model-kwargs", type=json.loads, default={}, metavar="JSON", help='{"img_size": 112} ({})')
    parser.add_argument("--size", type=int, metavar="PX", help="side of the student's input (64; 120)")
    parser.add_argument("--batch", type=int, metavar="ROWS", help="of a rank in a step, even (16; 256)")
    parser.add_argument("--bands", type=int, default=12, choices=range(1, 13), metavar="1..12", help="(12)")
    parser.add_argument("--ranks", type=int, help="processes on this machine (2; 1)")
    parser.add_argument("--precision", choices=("fp32", "bf16"), help="(fp32; bf16)")
    parser.add_argument("--rounds", type=int, metavar="N", help="of which the medians are taken (5; 10)")
    parser.add_argument("--steps", type=int, metavar="N", help="that count in a round of a case (5; 20)")
    parser.add_argument("--parts-rounds", type=int, default=2, metavar="N", help="for where the time goes (2)")
    parser.add_argument("--workers", type=int, metavar="N", help="reading processes of a rank (1; up to 8)")
    parser.add_argument("--cases", metavar="NAME,...", help="only these")
    parser.add_argument("--also", metavar="NAME,...", help="what differs in one thing, beside an and adagc_mixup")
    parser.add_argument("--deepspeed", action="store_true", help="also ZeRO 0 to 2")
    parser.add_argument("--peak-tflops", type=float, metavar="X", help="of a data sheet, per rank")
    parser.add_argument(
        "--fabric-gbps", type=float, nargs="+", default=[100.0, 200.0, 400.0], metavar="X",
        help="for the model of many ranks: Gbit/s of each (100 200 400)",
    )  # fmt: skip
    parser.add_argument("--latency-us", type=float, default=5.0, metavar="X", help="for it: of a message (5)")
    return parser


if __name__ == "__main__":
    main()
