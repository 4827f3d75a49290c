"""The command ``python -m tests.kills``: what a killed run must not lose is tried, not believed."""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from random import Random

from adagc_dist.checkpoint import Position
from sharding.progress import Progress
from tests.kills.moments import draw_kills
from tests.kills.runs import SHAPE, Death, KilledRuns, differences, outcome_of
from tests.tiny import write_tiny

_KILLS_A_RUN = 6
_ROW = "{:<32} {:>8} {:>2} {:>4} {:>8} {:>10} {:>8}"
_EPILOG = """\
examples:
  python -m tests.kills                          20 kills on 2 ranks, about 5 minutes on 2 cores
  python -m tests.kills --kills 4 --seed 7       others, and fewer
  python -m tests.kills --ranks 3 --json kills.json
  python -m tests.kills engine.name=deepspeed engine.zero_stage=2

A run of 5 epochs with a rewind after the third is made once undisturbed. Then it is made again, some 6 kills a run:
SIGKILL to one rank or to all, at a named moment of a drawn position or by the clock, and the same command again, until
the run ends. Student, teacher, optimiser, prediction averages and their marks, detector, metrics.jsonl and all curves
must be those of the undisturbed run, bit for bit (but for speeds), and ranks whose peer was killed must end by
themselves within 30 s. The same seed draws the same kills. Moments that the run had passed by the time are drawn into
a further run.

columns: what happened when the signal came; the position (epochs done, steps done of the next one) and the n-th call
there; which rank; the checkpoints with which the killed processes had begun and the next ones began; seconds until the
ranks that were left had ended.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0 all the same, 1 a difference or ranks that hung, 2 wrong usage."""
    arguments = _parser().parse_args(argv)
    start = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="kills-") as folder:
        shards = Path(folder) / "shards"
        write_tiny(shards)
        found = _kill(KilledRuns(shards, Path(folder), arguments.ranks, arguments.overrides), arguments)
    print(_table(found.deaths))
    print(
        f"{len(found.deaths)} kills, {arguments.ranks} ranks, seed {arguments.seed}, {time.monotonic() - start:.0f} s"
    )
    print(f"curve points written again after a kill: {found.rewritten}, of them with another value: {found.changed}")
    print("\n".join(found.faults) or "no bit differs from the undisturbed run")
    if arguments.json:
        record = vars(arguments) | {"json": None} | vars(found) | {"deaths": [death.record() for death in found.deaths]}
        arguments.json.write_text(json.dumps(record, indent=1) + "\n")
    return 1 if found.faults else 0


@dataclass
class _Found:
    """What came of all kills.

    Attributes:
        rewritten: points in event files that a later process wrote again; TensorBoard shows the last one.
        changed: those of them with another value.
        faults: in words; none is as it must be.
    """

    deaths: list[Death] = field(default_factory=list)
    rewritten: int = 0
    changed: int = 0
    faults: list[str] = field(default_factory=list)


def _kill(runs: KilledRuns, arguments: argparse.Namespace) -> _Found:
    """An undisturbed run, and as many others as the kills need."""
    found = _Found()
    expected = outcome_of(runs.undisturbed())
    left = draw_kills(arguments.kills, replace(SHAPE, ranks=arguments.ranks), Random(arguments.seed))
    with Progress("kills", len(left), unit="kill", seconds=30.0) as progress:

        def told(death: Death) -> None:
            left.remove(death.kill)
            found.deaths.append(death)
            progress.at(len(found.deaths))

        for number in range(2 + arguments.kills):
            if not left:
                break
            name = f"killed-{number}"
            outcome = outcome_of(runs.killed(name, left[:_KILLS_A_RUN], told))
            found.rewritten += outcome.rewritten
            found.changed += outcome.changed
            found.faults += [f"{name}: {difference}" for difference in differences(outcome, expected)]
    found.faults += [f"never reached: {kill}" for kill in left]
    hung = sum(death.hung for death in found.deaths)
    if hung:
        found.faults.append(f"after {hung} kills the ranks that were left did not end by themselves")
    if found.changed:
        found.faults.append(f"{found.changed} curve points were written again with another value")
    return found


def _table(deaths: Sequence[Death]) -> str:
    lines = [_ROW.format("moment", "position", "n", "rank", "began at", "goes on at", "left end")]
    for death in deaths:
        kill = death.kill
        seconds = "-" if death.survivors is None else f"{death.survivors:.1f} s" + (" HUNG" if death.hung else "")
        rank = "all" if kill.everyone else kill.rank
        places = [_short(place) for place in (kill.position, death.started_from, death.resumed_from)]
        lines.append(_ROW.format(str(kill), places[0], kill.call, rank, *places[1:], seconds))
    return "\n".join(lines)


def _short(position: Position | None) -> str:
    return "start" if position is None else f"{position.epoch}:{position.step}"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tests.kills",
        description="Kill a run at drawn moments, continue it, and compare it with one that was left alone.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    text = "keys of the recipe: another engine, another BatchNorm"
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help=text)
    parser.add_argument("--kills", type=int, default=20, metavar="N", help="SIGKILLs in all (default 20)")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="of the moments (default 0)")
    parser.add_argument("--ranks", type=int, default=2, metavar="N", help="processes of a run, 1 to 6 (default 2)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write kills and faults there, too")
    return parser


if __name__ == "__main__":
    sys.exit(main())
