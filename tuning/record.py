"""A sweep's folder: what a search is, and how far it has come. Read without Ray, for Ray remembers nothing of it.

sweep.json        recipe, space and options, by which a folder is known again
trials/0007/      trial 7, a run's folder, and beside what every run has:
    trial.json      {number, values, pruned}, by the sweep
    attempts.jsonl  a line per end of its ranks: {seconds, host, error}, by the process that started them
    output.log      what the ranks said
STOPPING          the sweep is saving its trials, to end

Every trial is a function of its number (of earlier results too, with a searcher that learns from them), and how far it
is stands in its own folder. So a sweep goes on from its folder, whatever has ended it.
"""

import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from adagc_dist.config import Config
from adagc_dist.tracking import read_status, write_json, write_text
from launch.lock import LOCK_FILE, RunLock
from launch.recipe import dump_config, flatten, load_config
from tuning.objective import OBJECTIVES, Objective

__all__ = ["ATTEMPTS", "Plan", "State", "SweepFolder", "TrialFolder", "common", "samples"]

ATTEMPTS = 2  # a failed trial is retried once
State = Literal["finished", "pruned", "failed", "unfinished"]

_SCHEMA = 1


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

    def differences(self, other: "Plan") -> list[str]:
        """What is not the same in ``other``, as a user names it."""
        mine, others = _flat(self), _flat(other)
        return [
            f"{name}: {_told(others, name)} there, {_told(mine, name)} here"
            for name in sorted(mine.keys() | others.keys())
            if mine.get(name, _told) != others.get(name, _told)  # _told: no value of a plan
        ]


class TrialFolder:
    """One trial, as its folder tells; nothing is remembered between two looks."""

    def __init__(self, path: Path) -> None:
        self.path, self.number = path, int(path.name)

    @cached_property
    def values(self) -> dict[str, Any]:
        """What was drawn for it."""
        found: dict[str, Any] = self._record()["values"]
        return found

    @cached_property
    def config(self) -> Config:
        """Its configuration, which is a recipe as well."""
        return load_config(self.path / "config.yaml", [f"run.dir={self.path}"])

    @property
    def state(self) -> State:
        """finished: trained to its end; pruned: stopped for its objective; failed: as often as it may."""
        if self._status().get("state") == "finished":
            return "finished"
        if self._record().get("pruned"):
            return "pruned"
        return "failed" if len(self.errors) >= ATTEMPTS else "unfinished"

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
        records: list[dict[str, Any]] = []
        with suppress(OSError, ValueError):
            for line in (self.path / "metrics.jsonl").read_text().splitlines():
                records.append(json.loads(line))
        return records

    @property
    def errors(self) -> list[str]:
        """Why it failed, each time it did."""
        return [attempt["error"] for attempt in self._attempts() if attempt.get("error")]

    @property
    def seconds(self) -> float:
        """How long its ranks ran; without those that were killed together with their node."""
        return sum(float(attempt["seconds"]) for attempt in self._attempts())

    def prune(self) -> None:
        """It is stopped for its objective, for good."""
        write_json(self.path / "trial.json", self._record() | {"pruned": True})

    def add_attempt(self, *, seconds: float, host: str, error: str | None) -> None:
        with (self.path / "attempts.jsonl").open("a") as stream:
            stream.write(json.dumps({"seconds": round(seconds, 1), "host": host, "error": error}) + "\n")

    def _attempts(self) -> list[dict[str, Any]]:
        records: list[dict[str, Any]] = []
        with suppress(OSError, ValueError):
            for line in (self.path / "attempts.jsonl").read_text().splitlines():
                records.append(json.loads(line))
        return records

    def _record(self) -> dict[str, Any]:
        record: dict[str, Any] = json.loads((self.path / "trial.json").read_text())
        return record

    def _status(self) -> dict[str, Any]:
        with suppress(OSError, ValueError):  # NFS: a file replaced while it is read is a stale handle
            return read_status(self.path)
        return {}


class SweepFolder:
    """The folder of ``adagc tune --dir``."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.stopping = path / "STOPPING"

    def check(self, plan: Plan, *, resume: bool) -> None:
        """May a sweep of ``plan`` use the folder? Writes nothing.

        Raises:
            ValueError: it holds something else, another sweep, or this one, which is not to be resumed.
        """
        known = self.path / "sweep.json"
        if self.path.exists() and not self.path.is_dir():
            raise ValueError(f"--dir {self.path} is a file: name a folder")
        if not known.is_file():
            if (self.path / "config.yaml").exists():
                raise ValueError(f"{self.path} is a run's folder: name another with --dir")
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
        (self.path / "trials").mkdir(parents=True, exist_ok=True)
        self.stopping.unlink(missing_ok=True)
        write_json(self.path / "sweep.json", {"schema": _SCHEMA} | asdict(plan))

    @property
    def plan(self) -> Plan:
        """
        Raises:
            FileNotFoundError: it is no sweep's folder.
            ValueError: another version has written it.
        """
        file = self.path / "sweep.json"
        if not file.is_file():
            raise FileNotFoundError(f"{self.path} is no sweep: it holds no sweep.json. Give the --dir of `adagc tune`")
        record: dict[str, Any] = json.loads(file.read_text())
        if record.pop("schema") != _SCHEMA:
            raise ValueError(f"{file} is of another version: go on with the one that wrote it")
        return Plan(**record)

    @property
    def objective(self) -> Objective:
        return OBJECTIVES[self.plan.objective]

    def trials(self) -> list[TrialFolder]:
        """By number; those that were being made when the sweep was killed are none."""
        return [TrialFolder(path.parent) for path in sorted(self.path.glob("trials/*/trial.json"))]

    def trial_path(self, number: int) -> Path:
        return self.path / "trials" / f"{number:04d}"

    def add(self, number: int, values: Mapping[str, Any], config: Config) -> TrialFolder:
        """Make the folder of trial ``number``."""
        path = self.trial_path(number)
        path.mkdir(exist_ok=True)
        write_text(path / "config.yaml", dump_config(config))
        write_json(path / "trial.json", {"number": number, "values": dict(values), "pruned": False})
        return TrialFolder(path)


def samples(record: Mapping[str, Any]) -> int:
    """Rows that an epoch has taken from the budget, those that could not be read included."""
    return int(record["data/rows"] + record["data/skipped_rows"])


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
