"""`adagc` commands as a user runs them over damaged or distant shards, and what they leave behind.

The commands run whole, in processes of their own as torchrun's ranks are.
"""

import io
import re
import traceback
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from adagc_dist.trainer import Trainer
from launch.cli import main
from launch.data import Shards, make_plan
from sharding.plan import EpochPlan
from tests.ranks import Ranks
from tests.test_training import after_epoch, lines_of, prepare_rank, status_of, without_speed
from tests.tiny import tiny_config, tiny_settings

TWO_EPOCHS = ["optim.epochs=2", "detector.rule=fixed", "detector.min_epochs=1"]  # one of warm-up, one calibrated
SKIP = ["data.on_error=skip", "data.max_bad_fraction=0.5"]
WRITTEN = 1 << 14


@dataclass(frozen=True)
class Told:
    """A command's exit code, or the traceback it ended with, and what it said on stderr, without progress bars and
    lines of the log.
    """

    code: int | str
    lines: tuple[str, ...]

    @property
    def sentence(self) -> str:
        """The only line."""
        assert len(self.lines) == 1, self
        return self.lines[0]


def in_a_rank(commands: Sequence[Sequence[str]], hook: Callable[[], object] = lambda: None) -> list[Told]:
    """`adagc ...`, several times."""
    prepare_rank()
    hook()
    return [adagc(command) for command in commands]


def adagc(arguments: Sequence[str]) -> Told:
    with redirect_stderr(io.StringIO()) as told:
        try:
            code: int | str = main(arguments)
        except Exception:
            code = traceback.format_exc()
    lines = told.getvalue().splitlines()
    return Told(code, tuple(line for line in lines if not re.match(r"epoch \d|skipped: tiny_", line)))


def alone(*commands: Sequence[str], hook: Callable[[], object] | None = None, timeout: float = 120.0) -> list[Told]:
    told: list[Told] = Ranks(1, in_a_rank, commands, *([hook] if hook else []), timeout=timeout).join()[0]
    return told


def on_two_ranks(command: Sequence[str], timeout: float = 60.0) -> list[Told]:
    """Fails where they hang."""
    return [told for (told,) in Ranks(2, in_a_rank, [command], timeout=timeout).join()]


def command(shards: Path | str, run: Path, *overrides: str) -> list[str]:
    return ["train", "demo", *tiny_settings(shards, run, *TWO_EPOCHS, *overrides)]  # type: ignore[arg-type]


def assert_trained(*told: Told) -> None:
    assert [one.code for one in told] == [0] * len(told), told


def result_of(run: Path) -> list[dict[str, Any]]:
    return without_speed(lines_of(run))


def complete_checkpoints(run: Path) -> list[str]:
    return sorted(marker.parent.name for marker in run.glob("checkpoints/*/COMPLETE.json"))


def rows_of(run: Path, epoch: int) -> dict[int, tuple[list[float], int]]:
    """Row -> its prediction average and its mark, as the checkpoint after ``epoch`` (from 0) has them."""
    parts = [load_file(file) for file in after_epoch(run, epoch).glob("rows-*")]
    return {
        row: (value, mark)
        for part in parts
        for row, value, mark in zip(part["rows"].tolist(), part["values"].tolist(), part["marks"].tolist())
    }


def assert_failed_in(run: Path, told: Told, *, checkpoints: Sequence[str] = ()) -> None:
    """Exit code 1 and one sentence, which status.json has too; no checkpoint after the fault is complete."""
    assert told.code == 1, told
    assert told.sentence.startswith("adagc train: ")
    assert status_of(run)["state"] == "failed"
    assert told.sentence.removeprefix("adagc train: ") in status_of(run)["reason"]
    assert complete_checkpoints(run) == list(checkpoints)
    assert not (run / "teacher.safetensors").exists()


def after_the_first_epoch(change: Callable[[], object]) -> None:
    """A hook: do it once, between two epochs."""
    report = Trainer._report

    def watched(self: Trainer, epoch: int, *args: Any) -> None:
        if epoch == 0:
            change()
        report(self, epoch, *args)

    Trainer._report = watched  # type: ignore[method-assign, assignment]


def plan_of(shards: Path, epoch: int, world_size: int = 1) -> EpochPlan:
    return make_plan(Shards.open(tiny_config(shards, Path("run"), *TWO_EPOCHS)), world_size, epoch)
