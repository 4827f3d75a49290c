"""A sweep's folder: what a search is, and how far it has come. Read without Ray, for Ray remembers nothing of it.

sweep.json        recipe, space and options, by which a folder is known again
trials/0007/      trial 7, a run's folder, and beside what every run has:
    trial.json      {number, values, pruned}, by the sweep; with repeats, the trial that it is with another seed; with
                    taken_over, of --scheduler pbt: [{epoch, source}]; with split, where it is to be measured, too
    attempts.jsonl  a line per end of its ranks: {seconds, host, error}, by the process that started them
    output.log      what the ranks said
generations.jsonl of --scheduler pbt: a line per generation, {epoch, objectives, moves}
STOPPING          the sweep is saving its trials, to end

Every trial is a function of its number (of earlier results too, with a searcher that learns from them), and how far it
is stands in its own folder. So a sweep goes on from its folder, whatever has ended it.
"""

import json
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from itertools import count, islice
from pathlib import Path
from typing import Any, Literal

from adagc_dist.config import Config
from adagc_dist.tracking import add_line, read_lines, read_status, write_json, write_text
from launch.lock import LOCK_FILE, RunLock
from launch.recipe import dump_config, flatten, load_config
from tuning.objective import OBJECTIVES, Objective

__all__ = [
    "ATTEMPTS",
    "MARGIN",
    "Generation",
    "Move",
    "Plan",
    "State",
    "SweepFolder",
    "TrialFolder",
    "TrialsFolder",
    "common",
    "samples",
    "tail",
    "why_hopeless",
]

MARGIN = 0.1  # of the epochs: what calibration, or another setting, needs to show in the objective
ATTEMPTS = 2  # a failed trial is retried once
_SEED = "run.seed"  # among the values of a trial that repeats another
State = Literal["finished", "pruned", "failed", "unfinished"]

_SCHEMA = 1
_SWEEP = "sweep.json"
_OWNERS = {"config.yaml": "a run's", _SWEEP: "a sweep's", "compare.json": "a comparison's"}  # by what tells of them
_TOO_MANY = 3  # failed trials, where no other is any better
_TAIL_BYTES, _TAIL_LINES = 16_000, 40


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a sweep is; two with the same plan are the same sweep.

    Attributes:
        recipe: ``section.key`` -> value of what its trials have in common.
        space: as in its file.
        epochs: of a whole trial.
        rows: of an epoch; budgets are counted in them.
        first_rung: epochs before which no trial is stopped for its objective.
    """

    recipe: Mapping[str, Any]
    space: Mapping[str, Any]
    objective: str
    scheduler: str
    searcher: str
    seed: int
    epochs: int
    rows: int
    first_rung: int

    @property
    def generations(self) -> Sequence[int]:
        """The epochs up to which all trials are trained before any goes on; the last ends them."""
        between = max(1, round(MARGIN * self.epochs))
        first = range(self.first_rung, self.epochs, between) if self.scheduler == "pbt" else ()
        return [*first, self.epochs]

    def differences(self, other: "Plan") -> list[str]:
        """What is not the same in ``other``, as a user names it."""
        mine, others = _flat(self), _flat(other)
        return [
            f"{name}: {_told(others, name)} there, {_told(mine, name)} here"
            for name in sorted(mine.keys() | others.keys())
            if mine.get(name, _told) != others.get(name, _told)  # _told: no value of a plan
        ]


@dataclass(frozen=True)
class Move:
    """One trial gives up, and goes on from where another is.

    Attributes:
        number: the one that gives up.
        source: the one it takes over from.
        values: what differs from the source's values from here on.
    """

    number: int
    source: int
    values: Mapping[str, float]


@dataclass(frozen=True)
class Generation:
    """What was decided after so many epochs.

    Attributes:
        objectives: by the trials' numbers.
    """

    epoch: int
    objectives: Mapping[str, float]
    moves: Sequence[Move]


class TrialFolder:
    """One trial, as its folder tells; of what may change nothing is remembered between two looks."""

    def __init__(self, path: Path) -> None:
        self.path, self.number = path, int(path.name)

    @property
    def values(self) -> dict[str, Any]:
        """What was drawn for it."""
        found: dict[str, Any] = self._made["values"]
        return found

    @property
    def taken_over(self) -> list[dict[str, int]]:
        """{epoch, source} of each time that what it is now has come from another trial."""
        found: list[dict[str, int]] = self._record().get("taken_over", [])
        return found

    @property
    def repeats(self) -> int | None:
        """The trial that it is once more, with another seed; None where its values were drawn."""
        return self._made.get("repeats")

    @property
    def split(self) -> str | None:
        """On which it is measured once it is trained; None where training is all."""
        return self._made.get("split")

    @property
    def measured(self) -> dict[str, Any]:
        """What `adagc evaluate` has found on its split; empty before."""
        with suppress(OSError, ValueError):
            found: dict[str, Any] = json.loads((self.path / "metrics.json").read_text()).get(self.split, {})
            return found
        return {}

    def has_come_to(self, epoch: int) -> bool:
        """Whether it is over, or has trained so many epochs, not to its end, and is saved."""
        is_saved = self._status().get("state") == "stopped"
        return self.state != "unfinished" or (is_saved and epoch <= len(self.epochs) < self.config.optim.epochs)

    @cached_property
    def config(self) -> Config:
        """Its configuration, which is a recipe as well."""
        return load_config(self.path / "config.yaml", [f"run.dir={self.path}"])

    @property
    def state(self) -> State:
        """finished: trained to its end, and measured if it is to be; pruned: stopped for its objective; failed: so
        often in a row as it may.
        """
        if self._status().get("state") == "finished" and (self.split is None or self.measured):
            return "finished"
        if self._record().get("pruned"):
            return "pruned"
        last = [attempt.get("error") for attempt in self._attempts()][-ATTEMPTS:]
        return "failed" if len(last) == ATTEMPTS and all(last) else "unfinished"

    @property
    def is_training(self) -> bool:
        """Whether its status says so, and somebody is there."""
        return self._status().get("state") == "running" and self.is_in_use

    @property
    def is_in_use(self) -> bool:
        """Whether a process has the run's lock: ranks that lost their parent are for a while still saving."""
        if not (self.path / LOCK_FILE).exists():
            return False
        try:
            with RunLock(self.path / LOCK_FILE, str(self.path)):
                return False
        except ValueError:
            return True

    @property
    def epochs(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl, as far as they are whole."""
        return read_lines(self.path / "metrics.jsonl")

    @property
    def errors(self) -> list[str]:
        """Why it failed, each time it did."""
        return [attempt["error"] for attempt in self._attempts() if attempt.get("error")]

    @property
    def seconds(self) -> float:
        """How long its ranks ran; without those that were killed together with their node."""
        return sum(float(attempt["seconds"]) for attempt in self._attempts())

    @staticmethod
    def write(
        path: Path,
        config: Config,
        *,
        number: int,
        values: Mapping[str, Any],
        **more: Any,
    ) -> None:
        """What makes a folder a trial; ``more`` goes into trial.json, too."""
        write_text(path / "config.yaml", dump_config(config))
        write_json(path / "trial.json", {"number": number, "values": dict(values), "pruned": False} | more)

    def prune(self) -> None:
        """It is stopped for its objective, for good."""
        write_json(self.path / "trial.json", self._record() | {"pruned": True})

    def add_attempt(self, *, seconds: float, host: str, error: str | None) -> None:
        add_line(self.path / "attempts.jsonl", {"seconds": round(seconds, 1), "host": host, "error": error})

    @cached_property
    def _made(self) -> dict[str, Any]:
        """The record as it was made: of what does not change as long as the trial is this one."""
        return self._record()

    def _attempts(self) -> list[dict[str, Any]]:
        return read_lines(self.path / "attempts.jsonl")

    def _record(self) -> dict[str, Any]:
        record: dict[str, Any] = json.loads((self.path / "trial.json").read_text())
        return record

    def _status(self) -> dict[str, Any]:
        with suppress(OSError, ValueError):  # NFS: a file replaced while it is read is a stale handle
            return read_status(self.path)
        return {}


class TrialsFolder:
    """A folder of trials, whatever it is that they have in common."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.stopping = path / "STOPPING"

    def trials(self) -> list[TrialFolder]:
        """By number; those that were being made when the sweep was killed are none."""
        return [TrialFolder(path.parent) for path in sorted(self.path.glob("trials/*/trial.json"))]

    def trial_path(self, number: int) -> Path:
        return self.path / "trials" / f"{number:04d}"

    def _write(self, file: str, plan: Any) -> None:
        """Begin: what it is a folder of, a dataclass."""
        (self.path / "trials").mkdir(parents=True, exist_ok=True)
        self.stopping.unlink(missing_ok=True)
        write_json(self.path / file, {"schema": _SCHEMA} | asdict(plan))

    def _read(self, file: str, *, kind: str, option: str) -> dict[str, Any]:
        """What ``_write`` has written; ``kind`` and ``option`` are for the message.

        Raises:
            FileNotFoundError: it is no such folder.
            ValueError: another version has written it.
        """
        if not (self.path / file).is_file():
            raise FileNotFoundError(f"{self.path} is no {kind}: it holds no {file}. Give the {option}")
        record: dict[str, Any] = json.loads((self.path / file).read_text())
        if record.pop("schema") != _SCHEMA:
            raise ValueError(f"{self.path / file} is of another version: go on with the one that wrote it")
        return record

    def _check_free(self, own: str, option: str) -> None:
        """
        Args:
            own: the file of such a folder.
            option: of the command, for the message.

        Raises:
            ValueError: it holds something else.
        """
        for file, what in _OWNERS.items():
            if file != own and (self.path / file).exists():
                raise ValueError(f"{self.path} is {what} folder: name another with {option}")

    def free_numbers(self, many: int) -> list[int]:
        """The first that no trial has."""
        taken = {trial.number for trial in self.trials()}
        return list(islice((number for number in count() if number not in taken), many))


class SweepFolder(TrialsFolder):
    """The folder of ``adagc tune --dir``."""

    def check(self, plan: Plan, *, resume: bool) -> None:
        """May a sweep of ``plan`` use the folder? Writes nothing.

        Raises:
            ValueError: it holds something else, another sweep, or this one, which is not to be resumed.
        """
        self._check_free(_SWEEP, "--dir")
        if not (self.path / _SWEEP).is_file():
            return
        differences = plan.differences(self.plan)
        if differences:
            raise ValueError(
                f"{self.path} holds another sweep ({'; '.join(differences)}). Name another folder with --dir, or "
                "repeat that sweep's recipe, space and options to continue it"
            )
        if not resume:
            raise ValueError(f"{self.path} holds this sweep already: continue it with --resume, or name another folder")

    def begin(self, plan: Plan) -> None:
        self._write(_SWEEP, plan)
        self.__dict__.pop("plan", None)

    @cached_property
    def plan(self) -> Plan:
        """
        Raises:
            FileNotFoundError: it is no sweep's folder.
            ValueError: another version has written it.
        """
        return Plan(**self._read(_SWEEP, kind="sweep", option="--dir of `adagc tune`"))

    @property
    def objective(self) -> Objective:
        return OBJECTIVES[self.plan.objective]

    def drawn(self) -> list[TrialFolder]:
        """Those that do not repeat another."""
        return [trial for trial in self.trials() if trial.repeats is None]

    def add(self, number: int, values: Mapping[str, Any], config: Config) -> TrialFolder:
        """Make the folder of trial ``number``."""
        path = self.trial_path(number)
        path.mkdir(exist_ok=True)
        TrialFolder.write(path, config, number=number, values=values)
        return TrialFolder(path)

    def repeat(self, number: int, times: int) -> None:
        """Make the folders of trials that are ``number`` with the next seeds, so that there are so many."""
        source = TrialFolder(self.trial_path(number))
        first = source.config.run.seed + 1
        used = {trial.config.run.seed for trial in self.trials() if trial.repeats == number}
        seeds = islice((seed for seed in count(first) if seed not in used), max(0, times - len(used)))
        for seed, fresh in zip(seeds, self.free_numbers(times)):
            path = self.trial_path(fresh)
            path.mkdir(exist_ok=True)
            config = replace(source.config, run=replace(source.config.run, dir=str(path), seed=seed))
            TrialFolder.write(path, config, number=fresh, values={**source.values, _SEED: seed}, repeats=number)

    def generations(self) -> list[Generation]:
        """In their order."""
        lines = read_lines(self.path / "generations.jsonl")
        return [
            Generation(line["epoch"], line["objectives"], [Move(**move) for move in line["moves"]]) for line in lines
        ]

    def add_generation(self, generation: Generation) -> None:
        add_line(self.path / "generations.jsonl", asdict(generation))


def samples(record: Mapping[str, Any]) -> int:
    """Rows that an epoch has taken from the budget, those that could not be read included."""
    return int(record["data/rows"] + record["data/skipped_rows"])


def why_hopeless(trials: Sequence[TrialFolder]) -> str:
    """Why none can succeed; empty as long as that is not known."""
    failed = sum(trial.state == "failed" for trial in trials)
    if failed >= _TOO_MANY and not any(trial.epochs for trial in trials):
        return f"{failed} trials have failed, and none has come to the end of an epoch: see above"
    return ""


def tail(log: Path) -> str:
    """The last lines of a log, of which no more than that is read; empty where there is none."""
    with suppress(OSError), log.open("rb") as stream:
        stream.seek(max(0, stream.seek(0, os.SEEK_END) - _TAIL_BYTES))
        return "\n".join(stream.read().decode(errors="replace").splitlines()[-_TAIL_LINES:])
    return ""


def common(config: Config) -> dict[str, Any]:
    """What trials have in common, as JSON keeps it: all but the folder."""
    plain = {key: value for key, value in flatten(config).items() if key != "run.dir"}
    found: dict[str, Any] = json.loads(json.dumps(plain))
    return found


def _flat(plan: Plan) -> dict[str, Any]:
    tree = asdict(plan)
    recipe, space = tree.pop("recipe"), tree.pop("space")
    return {**tree, **recipe, **{f"space {key}": value for key, value in space.items()}}


def _told(values: Mapping[str, Any], name: str) -> str:
    return repr(values[name]) if name in values else "nothing"
