"""A comparison's folder: what its runs are, and how far they have come.

compare.json      the grid, its cells with their settings, seeds and split, by which a folder is known again
trials/0007/      a run's folder, as a sweep's (tuning.record); trial.json has setting, method and seed among its
                  values, and the split on which it is measured once it is trained
known.jsonl       a line per run that was taken over from an earlier comparison: {row, curve}
STOPPING          the comparison is saving its runs, to end
results.csv  curves.csv  report.md  report.html  curves-SETTING.svg
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from adagc_dist.config import Config
from adagc_dist.tracking import add_line, read_lines
from tuning.fingerprint import digest_of, distinctive
from tuning.grid import Grid, seeded
from tuning.record import TrialFolder, TrialsFolder

__all__ = ["Cell", "Comparison", "ComparisonFolder", "Key", "Run", "key_of", "plan"]

_FILE, _KNOWN = "compare.json", "known.jsonl"
_TOLD = 4  # differences
_DEFAULT = "the default"
Key = tuple[str, str, int]  # digest of settings and of shards, seed


@dataclass(frozen=True, kw_only=True)
class Cell:
    """A method under a setting; its runs differ in their seed.

    Attributes:
        shards: digest of the shards.
        epochs: of a run.
        rows: of an epoch.
        settings: what a run depends on (tuning.fingerprint).
    """

    setting: str
    method: str
    shards: str
    epochs: int
    rows: int
    settings: Mapping[str, Any]

    @cached_property
    def digest(self) -> str:
        """Of the settings."""
        return digest_of(self.settings)

    def differences(self, other: "Cell") -> list[str]:
        """What is not the same in ``other``, as a user names it."""
        mine, others = ({**distinctive(one.settings), "data.shards": one.shards} for one in (self, other))
        return [
            f"{key} of {self.method} under {self.setting}: {others.get(key, _DEFAULT)} there, "
            f"{mine.get(key, _DEFAULT)} here"
            for key in sorted(mine.keys() | others.keys())
            if mine.get(key, _DEFAULT) != others.get(key, _DEFAULT)
        ]


@dataclass(frozen=True)
class Run:
    """One cell with one seed."""

    cell: Cell
    seed: int

    @property
    def key(self) -> Key:
        """Two runs with the same one are the same."""
        return self.cell.digest, self.cell.shards, self.seed


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """What is compared.

    Attributes:
        methods: in the grid's order.
        sets: what the grid sets, for the report: of all runs, a setting, a method, a method under a setting.
        base, bound, ours: methods, or None.
        command: as it was typed, for the report.
        labels: by digest of shards, how many patches of train have 0, 1, 2, ... true labels.
    """

    cells: Sequence[Cell]
    seeds: Sequence[int]
    split: str
    base: str | None
    bound: str | None
    ours: str | None
    note: str
    methods: Sequence[str]
    sets: Mapping[str, Mapping[str, Any]]
    command: Sequence[str]
    labels: Mapping[str, Sequence[int]] = field(default_factory=dict)

    @property
    def runs(self) -> list[Run]:
        """Seed by seed, so that one whole table is there first; the same run may be in it more than once."""
        return [Run(cell, seed) for seed in self.seeds for cell in self.cells]

    @property
    def distinct(self) -> list[Run]:
        """Each run once."""
        return list({run.key: run for run in reversed(self.runs)}.values())[::-1]

    def check_continues(self, other: "Comparison") -> None:
        """Cells and seeds may be added to ``other``, and no cell changed.

        Raises:
            ValueError: it is another comparison; the message names what differs.
        """
        mine = {(cell.setting, cell.method): cell for cell in self.cells}
        found = [f"split: {other.split} there, {self.split} here"] if self.split != other.split else []
        for cell in other.cells:
            here = mine.get((cell.setting, cell.method))
            found += [f"no {cell.method} under {cell.setting} here"] if here is None else here.differences(cell)
        if found:
            more = f"; and {len(found) - _TOLD} more" if len(found) > _TOLD else ""
            raise ValueError(f"another comparison ({'; '.join(found[:_TOLD])}{more})")


class ComparisonFolder(TrialsFolder):
    """The folder of ``adagc compare --out``."""

    def check(self, comparison: Comparison, *, resume: bool) -> None:
        """May ``comparison`` use the folder? Writes nothing.

        Raises:
            ValueError: it holds something else, another comparison, or this one, which is not to be resumed.
        """
        self._check_free(_FILE, "--out")
        if not (self.path / _FILE).is_file():
            return
        try:
            comparison.check_continues(self.comparison)
        except ValueError as error:
            raise ValueError(
                f"{self.path} holds {error}. Name another folder with --out, or repeat that grid and its settings; "
                "methods, settings and seeds may be added"
            ) from error
        if not resume:
            raise ValueError(
                f"{self.path} holds this comparison already: continue it with --resume, or name another folder"
            )

    def begin(self, comparison: Comparison) -> None:
        self._write(_FILE, comparison)
        self.__dict__.pop("comparison", None)

    @cached_property
    def comparison(self) -> Comparison:
        """
        Raises:
            FileNotFoundError: it is no comparison's folder.
            ValueError: another version has written it.
        """
        record = self._read(_FILE, kind="comparison", option="--out of `adagc compare`")
        cells = [Cell(**cell) for cell in record.pop("cells")]
        return Comparison(cells=cells, **record)

    def by_key(self) -> dict[Key, TrialFolder]:
        """The runs that were begun."""
        return {key_of(trial.values): trial for trial in self.trials()}

    def make(self, run: Run, config: Config) -> TrialFolder:
        """Make the folder of a run; ``config``: of its cell."""
        [number] = self.free_numbers(1)
        path = self.trial_path(number)
        path.mkdir(exist_ok=True)
        cell = run.cell
        values = {"setting": cell.setting, "method": cell.method, "seed": run.seed}
        values |= {"shards": cell.shards, "settings": cell.settings}
        config = seeded(config, run.seed, path)
        TrialFolder.write(path, config, number=number, values=values, split=self.comparison.split)
        return TrialFolder(path)

    @cached_property
    def known(self) -> dict[Key, dict[str, Any]]:
        """{row, curve} of runs that were taken over, before the runs began."""
        return {key_of(one["row"]): one for one in read_lines(self.path / _KNOWN)}

    def take_over(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Those of ``{row, curve}`` that are not known yet."""
        for one in rows:
            if (key := key_of(one["row"])) not in self.known:
                add_line(self.path / _KNOWN, dict(one))
                self.known[key] = dict(one)


def key_of(values: Mapping[str, Any]) -> Key:
    """Of a row of results.csv, or of what trial.json has."""
    return digest_of(values["settings"]), values["shards"], values["seed"]


def plan(grid: Grid, **more: Any) -> Comparison:
    """A grid's comparison; ``more``: cells, seeds, split, command and labels."""
    common = {"all runs": dict(one.split("=", 1) for one in grid.common)}
    settings = {f"setting {name}": {"recipe": grid.recipes[name], **one} for name, one in grid.settings.items()}
    methods = {f"method {name}": values for name, values in grid.methods.items()}
    special = {f"method {method} under {setting}": values for (setting, method), values in grid.special.items()}
    return Comparison(
        base=grid.base,
        bound=grid.bound,
        ours=grid.ours,
        note=grid.note,
        methods=[*grid.methods],
        sets={**common, **settings, **methods, **special},
        **more,
    )
