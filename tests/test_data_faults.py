"""What a user of `adagc train` and `adagc evaluate` gets when data are bad: one sentence that names the place, or a run
that leaves the bad rows out and shifts nothing else; and the same run wherever the shards are.

The commands run whole, in processes of their own as torchrun's ranks are, over copies of the tiny data set with
something wrong.
"""

import io
import json
import os
import re
import shutil
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, redirect_stderr
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import launch.world
import sharding.remote
from adagc_dist.comm import SoloComm
from adagc_dist.evaluate import measure_split
from adagc_dist.feed import TrainingBatch
from adagc_dist.methods import Losses, Phase
from adagc_dist.methods.adagc import AdaGC
from adagc_dist.metrics import fit_thresholds_C, macro_map
from adagc_dist.predict import Scores
from adagc_dist.store import PredictionStore
from adagc_dist.trainer import Trainer
from adagc_dist.validate import Validator
from launch.build import make_scorer
from launch.cli import main
from launch.data import Shards, make_plan
from launch.engines import DdpEngine
from launch.evaluate import _load_teacher
from launch.recipe import load_config
from sharding.loader import ShardLoader
from sharding.plan import EpochPlan, Slot
from sharding.reader import PatchReader
from tests.http_server import Faults, ShardServer
from tests.ranks import Ranks, run_ranks
from tests.test_invariance import BOUNDS, GRADIENT_BOUND, METHODS, STUDENTS, compare, settings, take_steps
from tests.test_sharding_reader import flip_a_pixel, flip_in_the_last_member, remove, swap, truncate, zero_the_header
from tests.test_training import lines_of, same_bits, status_of, teacher_of, without_speed
from tests.tiny import TinySource, make_reader, tiny_config, tiny_settings, write_tiny

CPU = torch.device("cpu")
TWO_EPOCHS = ["optim.epochs=2", "detector.rule=fixed", "detector.min_epochs=1"]  # one of warm-up, one calibrated
SKIP = ["data.on_error=skip", "data.max_bad_fraction=0.5"]
WRITTEN = 1 << 14
BAD = 40  # the row that most damages hit: it lies in train-000001.tar (rows 32 to 63)
Damage = Callable[[Path, PatchReader], None]


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
    launch.world.usable_cores = lambda: 1  # threads of ranks on few cores would only wait for one another
    warnings.filterwarnings(
        "ignore", r"unclosed file.*\.lock", ResourceWarning
    )  # a run holds it until its process ends
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
    """Row -> its prediction average and its mark, as a checkpoint has them."""
    parts = [load_file(file) for file in (run / "checkpoints" / f"epoch-{epoch:04d}").glob("rows-*")]
    return {
        row: (value, mark)
        for part in parts
        for row, value, mark in zip(part["rows"].tolist(), part["values"].tolist(), part["marks"].tolist())
    }


# Damages


def flip(folder: Path, rows: Sequence[int], split: str = "train") -> None:
    """A bit in the pixels of each of these rows."""
    reader = make_reader(folder, split=split)
    for row in rows:
        path = folder / reader.manifest.shards[int(reader.table.shard_N[row])].name
        with path.open("r+b") as stream:
            stream.seek(int(reader.table.offsets_NM[row, 0]) + 128 + 1000)
            byte = stream.read(1)[0]
            stream.seek(-1, os.SEEK_CUR)
            stream.write(bytes([byte ^ 4]))


def spoil_the_checksum(folder: Path, reader: PatchReader) -> None:
    """Of the tar header of the first member."""
    with (folder / "train-000001.tar").open("r+b") as stream:
        stream.seek(int(reader.table.offsets_NM[BAD, 0]) - 512 + 148)
        stream.write(b"0000000\0")


def remake(folder: Path, reader: PatchReader) -> None:
    """A shard of the same names and layout with other pixels, as another version of the data makes it."""
    flip(folder, np.flatnonzero(reader.table.shard_N == reader.table.shard_N[BAD]).tolist())


@pytest.fixture(scope="session")
def other_shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another sharding: of fewer patches, in shards of the same names."""
    folder = tmp_path_factory.mktemp("other") / "shards"
    write_tiny(folder, TinySource(counts=(70, 8, 8)))
    return folder


def damaged(shards: Path, folder: Path, damage: Damage) -> Path:
    """A copy of the shards with something wrong."""
    shutil.copytree(shards, folder)
    damage(folder, make_reader(folder))
    return folder


@dataclass(frozen=True)
class Case:
    damage: Damage
    message: str
    key: str = r"tiny_\d{4}"
    place: str = r"at offset \d+"


def another_sharding(other: Path) -> Damage:
    def replace_it(folder: Path, reader: PatchReader) -> None:
        shutil.copy(other / "train-000001.tar", folder / "train-000001.tar")

    return replace_it


INSTEAD = r"there is '{}' instead\. The shard was replaced, exchanged with another, or is damaged: `adagc verify`"
AGAIN = "copy or make it again"
CASES = {
    "truncated": Case(truncate, rf"the shard ends early, \d+ of \d+ bytes are there\. It is truncated .*{AGAIN}"),
    "pixel": Case(flip_a_pixel, rf"b10\.npy is not what was written there: .*{AGAIN}", key="{bad}"),
    "last member": Case(flip_in_the_last_member, rf"b60\.npy is not what was written there: .*{AGAIN}", key="{bad}"),
    "zeroed header": Case(zero_the_header, INSTEAD.format(""), key="{bad}"),
    "swapped": Case(swap, INSTEAD.format(r"tiny_\d+\.b10\.npy")),
    "remade": Case(remake, rf"b10\.npy is not what was written there: .*{AGAIN}"),
}


@pytest.fixture(scope="module")
def stopped(
    tiny_shards: Path, other_shards: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, Told]]:
    """A run over each damaged folder, until it stops: the folder of the runs, and what each said."""
    root = tmp_path_factory.mktemp("stopped")
    damages = {name: case.damage for name, case in CASES.items()}
    damages |= {"missing": remove, "another sharding": another_sharding(other_shards)}
    folders = {name: damaged(tiny_shards, root / "shards" / name, damage) for name, damage in damages.items()}
    told = alone(*(command(folder, root / name) for name, folder in folders.items()))
    return root, dict(zip(folders, told))


def assert_failed_in(run: Path, told: Told, *, checkpoints: Sequence[str] = ()) -> None:
    """Exit code 1 and one sentence, which status.json has too; no checkpoint after the fault is complete."""
    assert told.code == 1, told
    assert told.sentence.startswith("adagc train: ")
    assert status_of(run)["state"] == "failed"
    assert told.sentence.removeprefix("adagc train: ") in status_of(run)["reason"]
    assert complete_checkpoints(run) == list(checkpoints)
    assert not (run / "teacher.safetensors").exists()


@pytest.mark.parametrize("name", CASES)
def test_damage_stops_the_run_with_one_sentence_of_shard_key_and_offset(
    stopped: tuple[Path, dict[str, Told]], tiny_shards: Path, name: str
) -> None:
    root, told = stopped
    assert_failed_in(root / name, told[name])
    shard = re.escape(str(root / "shards" / name)) + (
        r"/train-00000[01]\.tar" if name == "swapped" else r"/train-000001\.tar"
    )
    key = CASES[name].key.replace("{bad}", make_reader(tiny_shards).table.keys[BAD].as_py())
    assert re.fullmatch(
        rf"adagc train: {key} in {shard} {CASES[name].place}: .*{CASES[name].message}.*", told[name].sentence
    ), told[name]


def test_a_missing_shard_stops_the_run_with_its_name(stopped: tuple[Path, dict[str, Told]]) -> None:
    root, told = stopped
    assert_failed_in(root / "missing", told["missing"])
    path = root / "shards" / "missing" / "train-000001.tar"
    assert told["missing"].sentence == (
        f"adagc train: shard {path} cannot be opened: No such file or directory. The manifest lists it: {AGAIN}"
    )


def test_a_shard_of_another_sharding_under_the_same_name_stops_the_run(stopped: tuple[Path, dict[str, Told]]) -> None:
    """Its rows are patches of the same data set, so only their keys or digests tell."""
    root, told = stopped
    assert_failed_in(root / "another sharding", told["another sharding"])
    path = re.escape(str(root / "shards" / "another sharding" / "train-000001.tar"))
    assert re.match(rf"adagc train: tiny_\d+ in {path} at offset \d+: ", told["another sharding"].sentence)


def edit_manifest(folder: Path, **fields: object) -> None:
    path = folder / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def test_a_manifest_that_cannot_be_used_stops_the_run_before_it_leaves_a_folder(
    tiny_shards: Path, other_shards: Path, tmp_path: Path
) -> None:
    """Of another schema, cut short, without its table, or beside the table of another."""
    expected = {
        "schema": r"manifest\.json has manifest schema 1, this version reads 2: shard again with this version",
        "cut": r"manifest\.json is damaged \(.*\): shard again",
        "parquet": r"manifest\.parquet is not the table that manifest\.json was written with: one of them was changed",
        "no parquet": r"manifest\.parquet",
    }
    folders = {name: tmp_path / name for name in expected}
    for folder in folders.values():
        shutil.copytree(tiny_shards, folder, ignore=shutil.ignore_patterns("*.tar"))
    edit_manifest(folders["schema"], schema=1)
    os.truncate(folders["cut"] / "manifest.json", 3000)
    shutil.copy(other_shards / "manifest.parquet", folders["parquet"])
    (folders["no parquet"] / "manifest.parquet").unlink()
    told = alone(*(command(folder, tmp_path / "run") for folder in folders.values()))
    for (name, message), said in zip(expected.items(), told):
        assert said.code == 1, said
        assert re.fullmatch(rf"adagc train: .*{re.escape(str(folders[name]))}/{message}.*", said.sentence), said
    assert not (tmp_path / "run").exists()


def test_manifest_files_that_belong_together_but_not_to_the_tars_stop_the_run(
    tiny_shards: Path, other_shards: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(tiny_shards, folder)
    for name in ("manifest.json", "manifest.parquet"):
        shutil.copy(other_shards / name, folder)
    (told,) = alone(command(folder, tmp_path / "run"))
    assert_failed_in(tmp_path / "run", told)
    assert re.match(
        rf"adagc train: tiny_\d+ in {re.escape(str(folder))}/train-00000\d\.tar at offset \d+: ", told.sentence
    )


# Damage while a run goes on


def after_the_first_epoch(change: Callable[[], object]) -> None:
    """A hook: do it once, between two epochs."""
    report = Trainer._report

    def watched(self: Trainer, epoch: int, *args: Any) -> None:
        if epoch == 0:
            change()
        report(self, epoch, *args)

    Trainer._report = watched  # type: ignore[method-assign, assignment]


def overwrite(source: Path, target: Path) -> None:
    """In place: whoever has it open sees the new bytes."""
    with target.open("r+b") as stream:
        stream.write(source.read_bytes())


def rename_over(source: Path, target: Path) -> None:
    """As rsync and our own writer do: whoever has it open keeps the old bytes."""
    shutil.copy(source, target.with_suffix(".new"))
    target.with_suffix(".new").replace(target)


@pytest.fixture(scope="module")
def whole(tiny_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Undamaged runs, for comparison: "whole", and "windows" with windows of two shards, on one rank."""
    root = tmp_path_factory.mktemp("whole")
    told = alone(command(tiny_shards, root / "whole"), command(tiny_shards, root / "windows", "data.window_shards=2"))
    assert_trained(*told)
    assert result_of(root / "whole") != result_of(root / "windows")
    assert [line["data/skipped_rows"] for line in result_of(root / "whole")] == [0, 0]
    return root


def test_a_shard_overwritten_between_epochs_stops_the_run_which_goes_on_once_it_is_mended(
    tiny_shards: Path, whole: Path, tmp_path: Path
) -> None:
    """The first epoch's checkpoint stands, the second's was never made; mended, the run ends as if nothing had been."""
    folder, run = tmp_path / "copy", tmp_path / "run"
    shutil.copytree(tiny_shards, folder)
    hook = partial(after_the_first_epoch, partial(flip, folder, [BAD]))
    (told,) = alone(command(folder, run), hook=hook)
    assert_failed_in(run, told, checkpoints=["epoch-0000"])
    assert re.search(
        r"tiny_\d+ in \S+/train-000001\.tar at offset \d+: b10\.npy is not what was written", told.sentence
    )
    assert [line["epoch"] for line in lines_of(run)] == [0]
    overwrite(tiny_shards / "train-000001.tar", folder / "train-000001.tar")
    assert_trained(*alone(command(folder, run)))
    assert result_of(run) == result_of(whole / "whole")
    assert same_bits(teacher_of(run), teacher_of(whole / "whole"))


def test_a_shard_replaced_by_a_rename_is_read_on_as_it_was_opened(
    tiny_shards: Path, other_shards: Path, whole: Path, tmp_path: Path
) -> None:
    """What is open is the old file, to its last byte; a run that starts later is stopped."""
    folder, run = tmp_path / "copy", tmp_path / "run"
    shutil.copytree(tiny_shards, folder)
    change = partial(rename_over, other_shards / "train-000001.tar", folder / "train-000001.tar")
    (told,) = alone(command(folder, run), hook=partial(after_the_first_epoch, change))
    assert_trained(told)
    assert result_of(run) == result_of(whole / "whole")
    (told,) = alone(command(folder, tmp_path / "later"))
    assert_failed_in(tmp_path / "later", told)


def test_a_bad_header_checksum_does_no_harm_where_the_index_says_what_lies_there(
    tiny_shards: Path, whole: Path, tmp_path: Path
) -> None:
    """The bytes of the patch are whole, and its digest says so: nothing is to be stopped or skipped. (A stream ends
    there, see below.)
    """
    folder = damaged(tiny_shards, tmp_path / "copy", spoil_the_checksum)
    assert_trained(*alone(command(folder, tmp_path / "run")))
    assert result_of(tmp_path / "run") == result_of(whole / "whole")


# Two ranks


def row_read_by(shards: Path, run: Path, rank: int) -> int:
    """A row that this rank of two reads early in the first epoch, but not in its first step."""
    plan = make_plan(Shards.open(tiny_config(shards, run)), 2, 0)
    return int(plan.slot(2, rank, 0).rows[1])


@pytest.fixture(scope="module", params=[0, 1])
def met_by(request: pytest.FixtureRequest, tiny_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """(rank, run, told): a run on two ranks of which this one alone meets the damage."""
    root = tmp_path_factory.mktemp("met")
    shutil.copytree(tiny_shards, root / "shards")
    flip(root / "shards", [row_read_by(tiny_shards, root, request.param)])
    return request.param, root / "run", on_two_ranks(command(root / "shards", root / "run"))


def test_on_two_ranks_damage_that_one_meets_ends_both(met_by: tuple[int, Path, list[Told]]) -> None:
    rank, run, told = met_by
    where = "" if rank == 0 else "rank 1: "
    assert told[rank].code == 1
    assert re.fullmatch(
        rf"adagc train: {where}tiny_\d+ in \S+\.tar at offset \d+: b10\.npy is not what.*", told[rank].sentence
    )
    assert told[1 - rank].code != 0
    assert status_of(run)["state"] == "failed"
    assert complete_checkpoints(run) == []


def test_on_two_ranks_the_one_that_met_no_damage_ends_in_silence(met_by: tuple[int, Path, list[Told]]) -> None:
    """And status.json has the cause, whichever rank met it."""
    rank, run, told = met_by
    assert told[1 - rank] == Told(1, ())
    assert "is not what was written there" in status_of(run)["reason"]


@pytest.fixture(scope="module")
def missing_on_two(tiny_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    root = tmp_path_factory.mktemp("missing")
    damaged(tiny_shards, root / "shards", remove)
    return root / "run", on_two_ranks(command(root / "shards", root / "run"))


def test_on_two_ranks_a_missing_shard_ends_both_and_hangs_none(missing_on_two: tuple[Path, list[Told]]) -> None:
    run, told = missing_on_two
    assert 0 not in [one.code for one in told]
    assert any("train-000001.tar cannot be opened" in line for one in told for line in one.lines)
    assert status_of(run)["state"] == "failed"
    assert complete_checkpoints(run) == []


# Skipping. Nine bad rows of the first epoch's plan: all rows of the last pairs of a step, which are a whole slot on two
# ranks; a row whose mate is well; an odd last row, and a pair.


def bad_rows(plan: EpochPlan) -> list[int]:
    third, fourth, odd = plan.step_rows(2), plan.step_rows(3), plan.step_rows(5)
    assert len(odd) % 2 == 1
    return [*third[2 * (((len(third) + 1) // 2) // 2) :].tolist(), int(fourth[4]), int(odd[-1]), *odd[:2].tolist()]


def plan_of(shards: Path, epoch: int, world_size: int = 1) -> EpochPlan:
    return make_plan(Shards.open(tiny_config(shards, Path("run"), *TWO_EPOCHS)), world_size, epoch)


@dataclass(frozen=True)
class Seen:
    """One micro-batch of a run, as its method saw it, and what it made of it."""

    phase: Phase
    batch: TrainingBatch
    logits_BC: Tensor
    pseudo_BC: Tensor | None
    losses: Losses


def watch(arguments: Sequence[str]) -> tuple[Told, list[Seen], list[dict[int, int]]]:
    """A run, its micro-batches, and for each epoch how often each row of the store was written."""
    seen: list[Seen] = []
    visits: list[dict[int, int]] = []
    last: dict[str, Tensor] = {}
    losses, forward, pseudo = AdaGC.losses, DdpEngine.forward, AdaGC._pseudo_labels
    audit = PredictionStore.check_visited_once

    def watched_losses(self: AdaGC, batch: TrainingBatch, phase: Phase) -> Losses:
        last.clear()
        found = losses(self, batch, phase)
        values = {name: getattr(found, name).detach() for name in ("total", "bce", "gc")}
        light = replace(batch, images=torch.empty(0))
        seen.append(Seen(phase, light, last["logits"], last.get("pseudo"), Losses(**values)))
        return found

    def watched_audit(self: PredictionStore, skipped: int = 0) -> None:
        visits.append(dict(zip(self.rows.tolist(), self.visits.tolist())))
        audit(self, skipped)

    def keeping(name: str, function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def kept(*args: Any) -> Tensor:
            found = function(*args)
            last[name] = found.detach().clone()
            return found

        return kept

    AdaGC.losses = watched_losses  # type: ignore[method-assign]
    AdaGC._pseudo_labels = keeping("pseudo", pseudo)  # type: ignore[method-assign]
    DdpEngine.forward = keeping("logits", forward)  # type: ignore[method-assign]
    PredictionStore.check_visited_once = watched_audit  # type: ignore[method-assign, assignment]
    (told,) = in_a_rank([arguments])
    return told, seen, visits


@dataclass(frozen=True)
class Skipped:
    """The same skipping run on one rank and on two, and the undamaged one on one."""

    root: Path
    shards: Path
    bad: list[int]
    ranks: dict[str, list[tuple[Told, list[Seen], list[dict[int, int]]]]]


@pytest.fixture(scope="module")
def skipped(tiny_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Skipped:
    """With GroupNorm and smooth activations, so that ranks can be compared (tests.test_invariance says why)."""
    root = tmp_path_factory.mktemp("skipped")
    bad = bad_rows(plan_of(tiny_shards, 0))
    shutil.copytree(tiny_shards, root / "shards")
    flip(root / "shards", bad)
    found = {}
    for name, shards, ranks in (("whole", tiny_shards, 1), ("one", root / "shards", 1), ("two", root / "shards", 2)):
        arguments = command(shards, root / name, *STUDENTS["groupnorm"], *(SKIP if name != "whole" else []))
        found[name] = Ranks(ranks, watch, arguments, timeout=120.0).join()
    return Skipped(root, root / "shards", bad, found)


@pytest.mark.parametrize("name", ["one", "two"])
def test_a_skipping_run_ends_well_and_counts_and_names_what_it_skipped(skipped: Skipped, name: str) -> None:
    assert_trained(*(told for told, _, _ in skipped.ranks[name]))
    assert status_of(skipped.root / name)["state"] == "finished"
    assert [line["data/skipped_rows"] for line in lines_of(skipped.root / name)] == [9, 9]
    log = (skipped.root / name / "log.txt").read_text()
    assert [f"epoch {epoch}: 9 of 90 rows could not be read" in log for epoch in (1, 2)] == [True, True]
    table = make_reader(skipped.shards).table
    named = re.findall(r"skipped: (tiny_\d+) in \S+/train-00000\d\.tar at offset \d+: b10\.npy is not what", log)
    if name == "one":  # the log is rank 0's; each other rank tells its own on the terminal
        assert sorted(named) == sorted(2 * [table.keys[row].as_py() for row in skipped.bad])


@pytest.mark.parametrize("name", ["one", "two"])
def test_skipped_rows_are_not_touched_and_all_others_written_once(skipped: Skipped, name: str) -> None:
    for epoch in (0, 1):
        visits = {row: count for _, _, epochs in skipped.ranks[name] for row, count in epochs[epoch].items()}
        assert visits == {row: int(row not in skipped.bad) for row in range(90)}
    for epoch in (0, 1):
        rows = rows_of(skipped.root / name, epoch)
        assert sorted(rows) == list(range(90))
        for row, (value, mark) in rows.items():
            assert mark == (0 if row in skipped.bad else WRITTEN)
            assert (value == [0.0] * 19) == (row in skipped.bad)


def by_hand(seen: Seen, divisor: int) -> tuple[float, float]:
    """Both terms of the loss in float64, from the logits that were made, the labels, and who could be read."""
    batch = seen.batch
    read_B = np.ones(len(batch.rows), dtype=bool) if batch.read_B is None else batch.read_B.numpy()
    y = batch.observed_BC.double().numpy()
    lam, mate = np.ones((len(y), 1)), np.arange(len(y))
    if seen.phase is Phase.CALIBRATION:
        mate = np.minimum(mate ^ 1, len(y) - 1)
        lam = batch.lambda_B.double().numpy()[:, None]
        lam = np.where((read_B & read_B[mate])[:, None], lam, 1.0)
    y = lam * y + (1 - lam) * y[mate]
    p = 1 / (1 + np.exp(-seen.logits_BC.double().numpy()))
    bce_B = -(y * np.log(p) + (1 - y) * np.log(1 - p)).mean(axis=1)
    gc_B = np.zeros(len(y))
    if seen.pseudo_BC is not None:
        t = seen.pseudo_BC.double().numpy()
        t = np.minimum(lam * t + (1 - lam) * t[mate], 1 - 1e-4)
        gc_B = 3.0 * ((1 - y) * np.log(1 - p * t)).mean(axis=1)
    return float(bce_B[read_B].sum() / divisor), float(gc_B[read_B].sum() / divisor)


@pytest.mark.parametrize("name", ["one", "two"])
def test_losses_are_those_of_the_rows_that_were_read_over_the_planned_divisor(skipped: Skipped, name: str) -> None:
    for epoch in (0, 1):
        plan, total = plan_of(skipped.shards, epoch), np.zeros(2)
        for _, seen, _ in skipped.ranks[name]:
            for step, micro in enumerate(seen[8 * epoch : 8 * epoch + 8]):
                expected = by_hand(micro, len(plan.step_rows(step)))
                found = micro.losses
                assert (found.bce.item(), found.gc.item()) == pytest.approx(expected, rel=2e-5, abs=1e-9)
                assert found.total.item() == pytest.approx(sum(expected), rel=2e-5, abs=1e-9)
                total += expected
        line = lines_of(skipped.root / name)[epoch]
        assert [line["loss/bce"], line["loss/gc"]] == pytest.approx((total / plan.num_steps).tolist(), rel=2e-5)
        assert (line["loss/gc"] < -1e-3) == (epoch == 1)


def test_a_slot_of_which_nothing_could_be_read_adds_nothing(skipped: Skipped) -> None:
    lost = skipped.ranks["two"][1][1][2]
    assert lost.batch.read_B is not None
    assert not lost.batch.read_B.any()
    assert lost.losses.total.item() == 0.0


@pytest.mark.parametrize("name", ["one", "two"])
def test_nothing_shifts_where_rows_are_skipped(skipped: Skipped, name: str) -> None:
    """The rows of every step, their labels, mates and Mixup weights are those of the undamaged run, but that a row
    whose mate could not be read is mixed with nothing.
    """
    ranks = [seen for _, seen, _ in skipped.ranks[name]]
    (whole,) = [seen for _, seen, _ in skipped.ranks["whole"]]
    assert {len(seen) for seen in [*ranks, whole]} == {16}
    for step, expected in enumerate(whole):
        parts = [seen[step].batch for seen in ranks]
        rows = np.concatenate([part.rows for part in parts])
        assert rows.tolist() == expected.batch.rows.tolist()
        read = np.concatenate([np.ones(len(p.rows), bool) if p.read_B is None else p.read_B.numpy() for p in parts])
        assert read.tolist() == [row not in skipped.bad for row in rows.tolist()]
        assert torch.equal(torch.cat([part.observed_BC for part in parts]), expected.batch.observed_BC)
        assert {part.num_global for part in parts} == {len(rows)}
        mates = np.minimum(np.arange(len(rows)) ^ 1, len(rows) - 1)
        weights = np.where(read & read[mates], expected.batch.lambda_B.numpy(), np.float32(1))
        np.testing.assert_array_equal(torch.cat([part.lambda_B for part in parts]).numpy(), weights)
    assert any(weight < 1 for weight in whole[9].batch.lambda_B.tolist())


def test_a_skipping_run_is_the_same_on_two_ranks(skipped: Skipped) -> None:
    """Measured after the sixteen steps: 5e-8 of the losses, 2e-7 in the averages."""
    for one, two in zip(result_of(skipped.root / "one"), result_of(skipped.root / "two")):
        assert one.pop("phase") == two.pop("phase")
        assert one == pytest.approx(two, rel=1e-5, abs=1e-7)
    tables = [rows_of(skipped.root / name, 1) for name in ("one", "two")]
    values = [np.array([table[row][0] for row in range(90)]) for table in tables]
    np.testing.assert_allclose(values[0], values[1], atol=1e-5)
    undamaged = rows_of(skipped.root / "whole", 1)
    assert np.abs(values[0] - np.array([undamaged[row][0] for row in range(90)])).max() > 0.01


MICRO = [(method, micro) for method in ("warmup", "calibration with mixup") for micro in (1, 2)]


@pytest.fixture(scope="module")
def steps(tiny_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[Any]]:
    """Ranks -> each rank's outcomes of the step of test_invariance, three of whose thirteen rows are bad: a pair's
    first row, and the pair after it.
    """
    folder = tmp_path_factory.mktemp("step") / "shards"
    shutil.copytree(tiny_shards, folder)
    plan = make_plan(Shards.open(settings(folder)), 1, 1)
    flip(folder, plan.step_rows(6)[[2, 4, 5]].tolist())
    overrides = [[*STUDENTS["groupnorm"], *METHODS[method], f"optim.accumulation={micro}"] for method, micro in MICRO]
    configs = [(settings(folder, *SKIP, *chosen), "calib" in name) for chosen, (name, _) in zip(overrides, MICRO)]
    return {world: run_ranks(world, take_steps, configs, timeout=120.0) for world in (1, 2, 3)}


@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("case", range(len(MICRO)), ids=[str(case) for case in MICRO])
def test_a_step_with_bad_rows_does_not_depend_on_the_ranks(steps: dict[int, list[Any]], world: int, case: int) -> None:
    """Gradient, student, teacher and averages, with test_invariance's bounds."""
    found = compare([rank[case] for rank in steps[world]], [rank[case] for rank in steps[1]])
    bounds = BOUNDS | {"gradient": GRADIENT_BOUND["groupnorm"]}
    assert {name: value for name, value in found.items() if value > bounds[name]} == {}


LOST_BY = {
    "truncated": range(BAD, 64),
    "missing": range(32, 64),
    "pixel": [BAD],
    "last member": [BAD],
    "zeroed header": [BAD],
    "swapped": range(64),
    "remade": range(32, 64),
}


@pytest.fixture(scope="module")
def passed_over(stopped: tuple[Path, dict[str, Told]], tmp_path_factory: pytest.TempPathFactory) -> Any:
    """An epoch over each of the damaged folders that skips: the folder of the runs, and what each said."""
    root = tmp_path_factory.mktemp("passed")
    once = ["optim.epochs=1", "detector.rule=never", "data.on_error=skip", "data.max_bad_fraction=0.8"]
    told = alone(*(command(stopped[0] / "shards" / name, root / name, *once) for name in LOST_BY))
    return root, dict(zip(LOST_BY, told))


@pytest.mark.parametrize("name", LOST_BY)
def test_of_each_damage_exactly_the_rows_it_hit_are_skipped(
    passed_over: tuple[Path, dict[str, Told]], name: str
) -> None:
    """A header that is gone costs its own row alone, a truncated shard those behind the cut."""
    root, told = passed_over
    assert_trained(told[name])
    rows = rows_of(root / name, 0)
    assert [row for row in range(90) if rows[row][1] == 0] == list(LOST_BY[name])
    assert [line["data/skipped_rows"] for line in lines_of(root / name)] == [len(LOST_BY[name])]


def test_damage_that_a_worker_process_meets_is_told_and_skipped_alike(tiny_shards: Path, tmp_path: Path) -> None:
    """One sentence, and no traceback of DataLoader's; the same run as without workers."""
    folder = damaged(tiny_shards, tmp_path / "copy", flip_a_pixel)
    told = alone(
        command(folder, tmp_path / "stop", "data.workers=2"),
        command(folder, tmp_path / "two", "data.workers=2", *SKIP),
        command(folder, tmp_path / "none", *SKIP),
    )
    assert_failed_in(tmp_path / "stop", told[0])
    assert re.search(r"tiny_\d+ in \S+/train-000001\.tar at offset \d+: b10\.npy", told[0].sentence)
    assert_trained(*told[1:])
    assert result_of(tmp_path / "two") == result_of(tmp_path / "none")
    assert [line["data/skipped_rows"] for line in lines_of(tmp_path / "two")] == [1, 1]


def test_a_loader_ends_at_once_though_another_is_at_work(tiny_shards: Path) -> None:
    """A run has one for training and one for validation, and should not wait for their workers when it is over, or has
    failed.
    """
    loaders = [
        ShardLoader(make_reader(tiny_shards, split=split), max_rows=2, workers=1) for split in ("train", "validation")
    ]
    for loader in loaders:
        list(loader.read([Slot(0, np.arange(2, dtype=np.int32), 0, 2)]))
    start = time.monotonic()
    del loader, loaders[0]
    assert time.monotonic() - start < 3


def test_a_row_that_fails_later_keeps_the_average_it_had(tiny_shards: Path, tmp_path: Path) -> None:
    folder, run = tmp_path / "copy", tmp_path / "run"
    shutil.copytree(tiny_shards, folder)
    hook = partial(after_the_first_epoch, partial(flip, folder, [BAD, 7]))
    (told,) = alone(command(folder, run, *SKIP), hook=hook)
    assert_trained(told)
    assert [line["data/skipped_rows"] for line in lines_of(run)] == [0, 2]
    before, after = rows_of(run, 0), rows_of(run, 1)
    assert {row for row in range(90) if before[row] == after[row]} == {BAD, 7}
    assert {mark for _, mark in after.values()} == {WRITTEN}


# Too many


def test_more_bad_rows_than_allowed_stop_the_run_with_count_and_limit(tiny_shards: Path, tmp_path: Path) -> None:
    """Also where the default allows none of so few rows."""
    folder = damaged(tiny_shards, tmp_path / "copy", remove)
    one = damaged(tiny_shards, tmp_path / "one", flip_a_pixel)
    told = alone(
        command(folder, tmp_path / "many", "data.on_error=skip", "data.max_bad_fraction=0.1"),
        command(one, tmp_path / "few", "data.on_error=skip"),
        command(one, tmp_path / "allowed", "data.on_error=skip", "data.max_bad_fraction=0.0112"),  # 1 of 90 is 0.0111
    )
    found = re.fullmatch(
        r"adagc train: (\d+) of 90 rows could not be read, more than data\.max_bad_fraction=0\.1: run `adagc verify`, "
        "and copy or make the damaged shards again",
        told[0].sentence,
    )
    assert found, told[0]
    assert 9 < int(found[1]) <= 9 + 12  # it stops in the step in which the limit is passed, not at the end
    assert_failed_in(tmp_path / "many", told[0])
    assert told[1].sentence.startswith(
        "adagc train: 1 of 90 rows could not be read, more than data.max_bad_fraction=0.001"
    )
    assert_failed_in(tmp_path / "few", told[1])
    assert_trained(told[2])


@pytest.fixture(scope="module")
def too_many(tiny_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, list[Told]]]:
    """On two ranks: where rank 1 alone has passed the limit before the epoch ends, and where only both together do."""
    root, found = tmp_path_factory.mktemp("many"), {}
    plan = plan_of(tiny_shards, 0, 2)
    rows = {rank: plan.rank_rows(rank)[:6].tolist() for rank in (0, 1)}
    for name, bad in (("one", rows[1]), ("together", [*rows[0][:4], *rows[1][:4]])):
        shutil.copytree(tiny_shards, root / "shards" / name)
        flip(root / "shards" / name, bad)
        arguments = command(root / "shards" / name, root / name, "data.on_error=skip", "data.max_bad_fraction=0.05")
        found[name] = (root / name, on_two_ranks(arguments))
    return found


@pytest.mark.parametrize(("name", "count"), [("one", 5), ("together", 8)])
def test_on_two_ranks_too_many_bad_rows_end_both_and_hang_none(
    too_many: dict[str, tuple[Path, list[Told]]], name: str, count: int
) -> None:
    """4.5 rows are allowed; the rank's own count does not wait for the end of the epoch."""
    run, told = too_many[name]
    assert 0 not in [one.code for one in told]
    message = (
        rf"adagc train: (rank 1: )?{count if name == 'together' else '[56]'} of 90 rows could not be read, more than"
    )
    assert any(re.match(message, line) for one in told for line in one.lines), told
    assert status_of(run)["state"] == "failed"
    assert complete_checkpoints(run) == []


@pytest.mark.parametrize("name", ["one", "together"])
def test_on_two_ranks_too_many_bad_rows_are_told_once(too_many: dict[str, tuple[Path, list[Told]]], name: str) -> None:
    _, told = too_many[name]
    assert [one.code for one in told] == [1, 1]
    assert len([line for one in told for line in one.lines]) == 1


# Validation and evaluation

LOST = {"validation": [3, 17, 18, 39], "test": [0, 21], "train": [5, BAD]}


@pytest.fixture(scope="module")
def lost(tiny_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards with bad rows in each split."""
    folder = tmp_path_factory.mktemp("lost") / "shards"
    shutil.copytree(tiny_shards, folder)
    for split, rows in LOST.items():
        flip(folder, rows, split)
    return folder


def scores_by_hand(run: Path, shards: Path, split: str) -> tuple[Scores, Shards]:
    """What the run's teacher says of an undamaged split; rows that are lost elsewhere are marked."""
    opened = Shards.open(load_config(run / "config.yaml", [f"data.shards={shards}"]))
    model, _ = _load_teacher(run, opened, CPU)
    table = opened.table(split)
    scores = make_scorer(opened, table, opened.pixels(CPU), comm=SoloComm(), device=CPU).score(model)
    read = np.ones(len(table), dtype=np.bool_)
    read[LOST[split]] = False
    return Scores(scores.values_NC, read), opened


def test_a_skipping_run_is_validated_on_the_rows_that_were_read(lost: Path, tiny_shards: Path, tmp_path: Path) -> None:
    """The last epoch's mAP is that of the finished teacher."""
    run = tmp_path / "run"
    assert_trained(*alone(command(lost, run, *SKIP)))
    scores, shards = scores_by_hand(run, tiny_shards, "validation")
    table = shards.table("validation")
    line = lines_of(run)[-1]
    for name, labels in (("noisy", shards.observed(table)), ("true", table.labels_NC)):
        values, kept = scores.beside(labels)
        assert len(values) == 36
        assert line[f"map/{name}_teacher"] == pytest.approx(macro_map(values, kept), abs=1e-6)
        assert line[f"map/{name}_teacher"] != pytest.approx(macro_map(scores.values_NC, labels), abs=1e-4)


def test_a_skipping_evaluation_measures_the_rows_that_were_read(
    lost: Path, tiny_shards: Path, whole: Path, tmp_path: Path
) -> None:
    """Thresholds, metrics and recovery; on one rank as on two."""
    metrics = []
    for ranks in (1, 2):
        run = tmp_path / f"run{ranks}"
        shutil.copytree(whole / "whole", run)
        evaluate = ["evaluate", str(run), f"data.shards={lost}", *SKIP, "--recovered"]
        assert_trained(*(told for (told,) in Ranks(ranks, in_a_rank, [evaluate], timeout=60.0).join()))
        metrics.append(json.loads((run / "metrics.json").read_text()))
        del metrics[-1]["run"]
    assert metrics[0] == metrics[1]
    validation, shards = scores_by_hand(whole / "whole", tiny_shards, "validation")
    thresholds_C = fit_thresholds_C(*validation.beside(shards.observed(shards.table("validation"))))
    test = scores_by_hand(whole / "whole", tiny_shards, "test")[0].beside(shards.table("test").labels_NC)
    assert metrics[0]["test"] == measure_split(*test, thresholds_C, shards.manifest.classes)
    assert metrics[0]["test"]["rows"] == 38
    assert "recovered" in metrics[0]


@pytest.mark.parametrize("ranks", [1, 2])
def test_an_evaluation_stops_at_bad_rows_and_at_too_many(lost: Path, whole: Path, tmp_path: Path, ranks: int) -> None:
    """One sentence on some rank, exit code not 0 on any, no metrics.json."""
    run = tmp_path / "run"
    shutil.copytree(whole / "whole", run)
    place = rf"tiny_\d+ in {lost}/validation-00000\d\.tar at offset \d+: b10\.npy is not what"
    count = r"4 of 40 rows could not be read, more than data\.max_bad_fraction=0\.05"
    for settings_, message in (([], place), (["data.on_error=skip", "data.max_bad_fraction=0.05"], count)):
        arguments = ["evaluate", str(run), f"data.shards={lost}", *settings_]
        told = [one for (one,) in Ranks(ranks, in_a_rank, [arguments], timeout=60.0).join()]
        assert 0 not in [one.code for one in told]
        told_lines = [line for one in told for line in one.lines]
        assert re.match(rf"adagc evaluate: (rank 1: )?{message}", told_lines[0]), told_lines
        assert ranks > 1 or len(told_lines) == 1
        assert not (run / "metrics.json").exists()


def test_too_many_bad_validation_rows_stop_a_run(tiny_shards: Path, tmp_path: Path) -> None:
    """The share is that of the split they are in."""
    folder = tmp_path / "copy"
    shutil.copytree(tiny_shards, folder)
    flip(folder, LOST["validation"], "validation")
    told = alone(command(folder, tmp_path / "run", "data.on_error=skip", "data.max_bad_fraction=0.05"))
    assert_failed_in(tmp_path / "run", told[0])
    assert "4 of 40 rows could not be read, more than data.max_bad_fraction=0.05" in told[0].sentence


class _Given:
    """A scorer that has scored already."""

    def __init__(self, *scores: Scores) -> None:
        self._scores = iter(scores)

    def score(self, model: object) -> Scores:
        return next(self._scores)


def test_replicates_of_two_epochs_stay_paired_where_a_row_is_lost_in_one_of_them() -> None:
    """The detector's standard error is that of a difference: what is common to both epochs has to cancel."""
    rng = np.random.default_rng(0)
    values, labels = rng.random((200, 5)).astype(np.float32), rng.random((200, 5)) < 0.3
    read = np.arange(200) != 0
    scorer = _Given(Scores(values, np.ones(200, dtype=np.bool_)), Scores(values, read))
    validator = Validator(scorer, observed_NC=labels, labels_NC=labels, comm=SoloComm(), seed=0)  # type: ignore[arg-type]
    first, second = (np.array(validator.measure(torch.nn.Identity()).replicates) for _ in range(2))
    assert np.std(first - second) < 0.3 * np.std(first)


# Streams


def test_the_webdataset_reader_trains_to_the_same_bits(tiny_shards: Path, whole: Path, tmp_path: Path) -> None:
    """Given the same windows; in this process and in another."""
    runs = {workers: tmp_path / f"run{workers}" for workers in (0, 1)}
    streamed = ["data.reader=webdataset", "data.window_shards=2"]
    told = alone(*(command(tiny_shards, run, *streamed, f"data.workers={n}") for n, run in runs.items()))
    assert_trained(*told)
    for run in runs.values():
        assert result_of(run) == result_of(whole / "windows")
        assert same_bits(teacher_of(run), teacher_of(whole / "windows"))


@pytest.mark.parametrize("damage", [zero_the_header, spoil_the_checksum])
def test_what_the_webdataset_library_drops_in_silence_is_found(
    tiny_shards: Path, tmp_path: Path, damage: Damage
) -> None:
    """It takes a bad header for the end of the archive: 24 of 90 rows would be gone without a word."""
    folder = damaged(tiny_shards, tmp_path / "copy", damage)
    streamed = ["data.reader=webdataset", "data.window_shards=2"]
    told = alone(command(folder, tmp_path / "stop", *streamed), command(folder, tmp_path / "skip", *streamed, *SKIP))
    assert_failed_in(tmp_path / "stop", told[0])
    assert re.match(r"adagc train: tiny_\d+ in train-000001\.tar: the stream ended before it", told[0].sentence)
    assert_trained(told[1])
    assert [line["data/skipped_rows"] for line in lines_of(tmp_path / "skip")] == [24, 24]
    rows = rows_of(tmp_path / "skip", 1)
    assert [row for row in range(90) if rows[row][1] == 0] == list(range(BAD, 64))


def test_a_missing_shard_is_told_by_the_webdataset_reader_too(tiny_shards: Path, tmp_path: Path) -> None:
    folder = damaged(tiny_shards, tmp_path / "copy", remove)
    (told,) = alone(command(folder, tmp_path / "run", "data.reader=webdataset"))
    assert_failed_in(tmp_path / "run", told)
    assert re.match(r"adagc train: tiny_\d+ in train-000001\.tar: ", told.sentence)
    assert "No such file or directory" in told.sentence


# Shards at URLs


@pytest.fixture
def server(tiny_shards: Path) -> Iterator[ShardServer]:
    with ShardServer(tiny_shards) as running:
        yield running


def at_url(url: str, tmp_path: Path, *overrides: str, run: str = "run") -> list[str]:
    return command(url, tmp_path / run, f"data.cache={tmp_path / 'cache'}", "data.window_shards=2", *overrides)


def impatient() -> None:
    """A hook: no long waits between attempts."""
    sharding.remote._LONGEST_WAIT = 0.02


def test_a_run_from_a_url_is_that_from_the_folder(server: ShardServer, whole: Path, tmp_path: Path) -> None:
    """And again from what is in the cache: then nothing but the manifest is asked for."""
    assert_trained(*alone(at_url(server.url, tmp_path)))
    assert result_of(tmp_path / "run") == result_of(whole / "windows")
    assert same_bits(teacher_of(tmp_path / "run"), teacher_of(whole / "windows"))
    server.requests.clear()
    assert_trained(*alone(at_url(server.url, tmp_path, "data.workers=1", run="again")))
    assert result_of(tmp_path / "again") == result_of(whole / "windows")
    assert set(server.requests) == {"manifest.json"}


def test_a_run_is_evaluated_from_a_url_as_from_the_folder(
    server: ShardServer, tiny_shards: Path, whole: Path, tmp_path: Path
) -> None:
    """Each shard of the two splits that are scored is fetched once, and none of the train split."""
    run, metrics = tmp_path / "run", []
    shutil.copytree(whole / "whole", run)
    for shards in (str(tiny_shards), server.url):
        assert_trained(*alone(["evaluate", str(run), f"data.shards={shards}", f"data.cache={tmp_path / 'cache'}"]))
        metrics.append(json.loads((run / "metrics.json").read_text()))
    assert metrics[0] == metrics[1]
    fetched = {name: count for name, count in server.requests.items() if name.endswith(".tar")}
    assert set(fetched.values()) == {1}
    assert {name.split("-")[0] for name in fetched} == {"validation", "test"}


def test_a_server_that_drops_its_first_connections_changes_nothing(
    server: ShardServer, whole: Path, tmp_path: Path
) -> None:
    server.faults = Faults(drop_after=1000, times=4)
    assert_trained(*alone(at_url(server.url, tmp_path), hook=impatient))
    assert server.faults.times == 0
    assert result_of(tmp_path / "run") == result_of(whole / "windows")


def test_two_ranks_of_a_node_fetch_each_shard_once(server: ShardServer, tiny_shards: Path, tmp_path: Path) -> None:
    """And those of the test split never."""
    assert_trained(*on_two_ranks(at_url(server.url, tmp_path, "data.workers=1")))
    shards = json.loads((tiny_shards / "manifest.json").read_text())["shards"]
    expected = {shard["name"]: shard["bytes"] for shard in shards if shard["split"] != "test"}
    assert {name: size for name, size in server.sent.items() if name.endswith(".tar")} == expected
    assert {name: count for name, count in server.requests.items() if name.endswith(".tar")} == dict.fromkeys(
        expected, 1
    )
    assert server.requests["manifest.parquet"] == 1


def train_until_the_server_goes(folder: Path, tmp_path: Path) -> tuple[Told, str, int]:
    """The server ends in the second step of the first epoch, while the first window is read; what was told, its URL,
    and the shards of the split that were fetched.
    """
    step = Trainer._train_step
    with ExitStack() as stack:
        server = stack.enter_context(ShardServer(folder))

        def watched(self: Trainer, *args: Any) -> None:
            if self.moment.step == 1:
                stack.close()
            step(self, *args)

        Trainer._train_step = watched  # type: ignore[method-assign, assignment]
        url = server.url
        (told,) = in_a_rank([at_url(url, tmp_path, "data.window_shards=1")], impatient)
        return told, url, sum("train" in name for name in server.sent)


def test_a_server_that_goes_in_mid_epoch_ends_the_run_with_one_sentence(tiny_shards: Path, tmp_path: Path) -> None:
    """It names the shard and what was tried; once the server is back at its URL, the run is finished."""
    told, url, fetched = Ranks(1, train_until_the_server_goes, tiny_shards, tmp_path, timeout=60.0).join()[0]
    assert 0 < fetched < 3
    assert_failed_in(tmp_path / "run", told)
    assert re.fullmatch(
        rf"adagc train: {url}/train-00000\d\.tar: \w+: .* \(5 attempts in \d+ s\): check that the server is up and can "
        "be reached from this node",
        told.sentence,
    ), told
    with ShardServer(tiny_shards, port=int(url.rsplit(":")[-1])):
        assert_trained(*alone(at_url(url, tmp_path, "data.window_shards=1")))
    assert status_of(tmp_path / "run")["state"] == "finished"


def test_wrong_bytes_at_a_url_are_told_with_both_digests(tiny_shards: Path, tmp_path: Path) -> None:
    folder = damaged(tiny_shards, tmp_path / "remote", flip_a_pixel)
    with ShardServer(folder) as server:
        (told,) = alone(at_url(server.url, tmp_path))
        assert_failed_in(tmp_path / "run", told)
        shards = json.loads((tiny_shards / "manifest.json").read_text())["shards"]
        digest = next(shard["digest"] for shard in shards if shard["name"] == "train-000001.tar")
        assert re.fullmatch(
            rf"adagc train: {server.url}/train-000001\.tar has digest ([0-9a-f]{{32}}) \(at first \1\), its manifest "
            rf"says {digest}; fetched twice: the shard was changed or damaged at its origin\..*",
            told.sentence,
        ), told
    assert [path.name for path in tmp_path.glob("cache/*/train-000001.tar")] == []


def test_a_shard_that_cannot_be_fetched_can_be_skipped(tiny_shards: Path, whole: Path, tmp_path: Path) -> None:
    """All its rows, as with one that is missing in a folder."""
    folder = damaged(tiny_shards, tmp_path / "remote", remove)
    with ShardServer(folder) as server:
        (told,) = alone(at_url(server.url, tmp_path, *SKIP), hook=impatient)
    assert_trained(told)
    assert [line["data/skipped_rows"] for line in lines_of(tmp_path / "run")] == [32, 32]
    assert_trained(*alone(command(folder, tmp_path / "local", "data.window_shards=2", *SKIP)))
    assert result_of(tmp_path / "run") == result_of(tmp_path / "local")


@pytest.mark.parametrize("where", ["url", "folder"])
def test_a_local_manifest_may_lie_apart_from_its_tars(
    server: ShardServer, tiny_shards: Path, whole: Path, tmp_path: Path, where: str
) -> None:
    """Its origin names them: a URL or another folder."""
    index = tmp_path / "index"
    shutil.copytree(tiny_shards, index, ignore=shutil.ignore_patterns("*.tar"))
    edit_manifest(index, origin=server.url if where == "url" else str(tiny_shards))
    cache = f"data.cache={tmp_path / 'cache'}"
    assert_trained(*alone(command(index, tmp_path / "run", "data.window_shards=2", cache)))
    assert result_of(tmp_path / "run") == result_of(whole / "windows")
    assert sum(server.sent.values()) == (
        0 if where == "folder" else sum(f.stat().st_size for f in tmp_path.glob("cache/*/*.tar"))
    )


def test_a_cache_that_cannot_be_used_is_told(server: ShardServer, tmp_path: Path) -> None:
    """A file in its place; a limit less than a shard."""
    (tmp_path / "file").write_text("")
    told = alone(
        at_url(server.url, tmp_path, f"data.cache={tmp_path / 'file'}", run="none"),
        at_url(server.url, tmp_path, "data.cache_gb=0.001", run="small"),
    )
    assert told[0].code == 1
    assert re.match(
        rf"adagc train: {server.url}: the cache folder {tmp_path}/file/\S+ cannot be used", told[0].sentence
    )
    assert not (tmp_path / "none").exists()
    assert_failed_in(tmp_path / "small", told[1])
    assert re.search(r"\.tar has \d+ bytes, the cache \S+ is limited to 1000000: raise the limit", told[1].sentence)


def test_no_server_is_told_before_a_run_leaves_a_folder(tmp_path: Path) -> None:
    start = time.monotonic()
    (told,) = alone(at_url("http://127.0.0.1:9", tmp_path), hook=impatient)
    assert told.code == 1
    assert re.match(r"adagc train: http://127\.0\.0\.1:9/manifest\.json: .*5 attempts in .*: check that", told.sentence)
    assert not (tmp_path / "run").exists()
    assert time.monotonic() - start < 30
