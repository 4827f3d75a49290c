"""Whole runs: the command a user types, on two ranks, from an empty folder to a trained teacher, and again after a
crash.
"""

import io
import json
import math
import os
import re
import shutil
import subprocess
import sys
import time
import warnings
from collections.abc import Mapping, Sequence
from contextlib import redirect_stderr, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

import launch.world
from adagc_dist import checkpoint
from adagc_dist.checkpoint import Checkpoint, CheckpointStore, Position
from adagc_dist.comm import Comm, SoloComm
from adagc_dist.detector import Verdict
from adagc_dist.trainer import Moment, Trainer
from launch import train as command
from launch.build import build_trainer
from launch.failure import EXIT_LOST_PEER
from launch.recipe import dump_config, load_config
from launch.rundir import RunFolder
from tests.ranks import RankError, Ranks, run_ranks
from tests.tiny import tiny_settings

EPOCHS = 5
# The trigger comes after the second epoch, so that a run has both phases.
TRIGGERED = [
    f"optim.epochs={EPOCHS}",
    "detector.rule=fixed",
    "detector.min_epochs=2",
]
NOT_NEEDED = ("rasterio", "h5py", "ray", "deepspeed", "webdataset")


def lines_of(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def without_speed(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{key: value for key, value in line.items() if not key.startswith("speed/")} for line in lines]


def status_of(run: Path) -> dict[str, Any]:
    status: dict[str, Any] = json.loads((run / "status.json").read_text())
    return status


def after_epoch(run: Path, epoch: int) -> Path:
    """The checkpoint at the end of ``epoch``, counted from 0."""
    return run / "checkpoints" / str(Position(epoch + 1))


def teacher_of(run: Path) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = load_file(run / "teacher.safetensors")
    return tensors


def checkpoints_of(run: Path) -> CheckpointStore:
    return CheckpointStore(run / "checkpoints", comm=SoloComm(), keep=1)


def newest(run: Path) -> Checkpoint:
    found = checkpoints_of(run).latest()
    assert found is not None, f"{run} has no checkpoint"
    return found


def same_bits(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return set(first) == set(second) and all(torch.equal(tensor, second[name]) for name, tensor in first.items())


def assert_as(whole: Path, run: Path) -> None:
    """The same status, teacher and lines."""
    assert status_of(run) == status_of(whole)
    assert same_bits(teacher_of(run), teacher_of(whole))
    assert without_speed(lines_of(run)) == without_speed(lines_of(whole))


def prepare_rank() -> None:
    """A process that is to run commands."""
    launch.world.usable_cores = lambda: 1  # threads of ranks on few cores would only wait for one another
    # a run holds it until its process ends
    warnings.filterwarnings("ignore", r"unclosed file.*\.lock", ResourceWarning)


def command_line(arguments: Sequence[str]) -> tuple[int, str]:
    """`adagc train` in a rank that torchrun started: the exit code, and what it said to the user."""
    with redirect_stderr(io.StringIO()) as told:
        code = command.main(arguments)
    return code, told.getvalue()


def train(recipe: str | Path, settings: Sequence[str], *, ranks: int = 2) -> list[tuple[int, str]]:
    return Ranks(ranks, command_line, [str(recipe), *settings], timeout=120.0).join()


def assert_trained(recipe: str | Path, settings: Sequence[str], *, ranks: int = 2) -> None:
    for code, told in train(recipe, settings, ranks=ranks):
        assert code == 0, told


def refused(settings: Sequence[str], *, recipe: str | Path = "demo") -> str:
    """The one message of a run that may not start; rank 0 gives it, and both ranks end."""
    (code, told), (other_code, other_told) = train(recipe, settings)
    assert (code, other_code, other_told) == (1, EXIT_LOST_PEER, "")
    assert told.startswith("adagc train: ")
    assert told.count("\n") == 1
    return told


@pytest.fixture(scope="module")
def absent(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that hides packages which a machine that only trains need not have."""
    folder = tmp_path_factory.mktemp("absent")
    for name in NOT_NEEDED:
        (folder / f"{name}.py").write_text(f"raise ImportError('{name} is not installed here')\n")
    return folder


@pytest.fixture(scope="module")
def finished(tiny_shards: Path, tmp_path_factory: pytest.TempPathFactory, absent: Path) -> Path:
    """A run made by the command itself, through torchrun, from another folder, without the packages it does not
    need.
    """
    root = tmp_path_factory.mktemp("runs")
    arguments = ["demo", *tiny_settings(tiny_shards, root / "first", *TRIGGERED), "--nproc-per-node", "2"]
    result = subprocess.run(
        [sys.executable, "-m", "launch.cli", "train", *arguments],
        cwd=root,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(absent), str(Path(command.__file__).parents[1])])},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return root / "first"


def test_a_run_explains_itself(finished: Path, tiny_shards: Path) -> None:
    names = {path.name for path in finished.iterdir()}
    assert names == {
        ".lock", "config.yaml", "status.json", "log.txt", "metrics.jsonl", "teacher.safetensors", "checkpoints",
        "tensorboard",
    }  # fmt: skip
    status = status_of(finished)
    assert (status["state"], status["epochs"], status["trigger_epoch"]) == ("finished", EPOCHS, 1)
    assert status["step"] == EPOCHS * 8
    config = load_config(finished / "config.yaml")
    assert config == load_config("demo", tiny_settings(tiny_shards, finished, *TRIGGERED))
    log = (finished / "log.txt").read_text()
    assert "epoch 2/5 warmup: 90 rows once | bce " in log
    assert "fixed: 2 of 2 epochs done" in log
    assert "epoch 3/5 calibration: 90 rows once | bce " in log


def test_every_epoch_has_its_line(finished: Path) -> None:
    lines = lines_of(finished)
    assert [line["epoch"] for line in lines] == list(range(EPOCHS))
    assert [line["step"] for line in lines] == [8 * (epoch + 1) for epoch in range(EPOCHS)]
    assert [line["phase"] for line in lines] == ["warmup"] * 2 + ["calibration"] * 3
    assert [line["trigger"] for line in lines] == [False, True, False, False, False]
    for line in lines:
        assert all(math.isfinite(value) for value in line.values() if isinstance(value, float))
        assert 0 <= line["map/noisy_teacher"] <= 1
        assert 0 <= line["speed/data_wait_share"] <= 1
    assert [line["loss/gc"] < 0 for line in lines] == [False, False, True, True, True]
    assert lines[1]["loss/bce"] < lines[0]["loss/bce"]
    assert all(0 <= line["pseudo/recall"] <= 1 for line in lines[2:])


def test_the_teacher_carries_what_it_is_bound_to(finished: Path, tiny_shards: Path) -> None:
    with safe_open(finished / "teacher.safetensors", framework="pt") as reader:
        metadata = {name: json.loads(value) for name, value in reader.metadata().items()}
    manifest = json.loads((tiny_shards / "manifest.json").read_text())
    assert metadata["classes"] == manifest["classes"]
    assert len(metadata["bands"]) == 12
    assert metadata["statistics"]["B02"] == [manifest["statistics"][0]["mean"][0], manifest["statistics"][0]["std"][0]]


def test_old_checkpoints_were_deleted_and_the_last_one_is_whole(finished: Path) -> None:
    store = RunFolder(load_config(finished / "config.yaml"), _Alone()).checkpoints
    assert sorted(path.name for path in (finished / "checkpoints").iterdir()) == [
        "epoch-0004-step-00000",
        "epoch-0005-step-00000",
    ]
    latest = store.latest()
    assert latest is not None
    latest.verify()
    assert same_bits(latest.tensors("teacher"), teacher_of(finished))
    parts = [latest.rows(rank, 2) for rank in range(2)]
    rows = np.concatenate([part["rows"].numpy() for part in parts if part is not None])
    np.testing.assert_array_equal(np.sort(rows), np.arange(90))


def may_mount(folder: Path) -> bool:
    """Whether this process may mount a file system that only it sees."""
    if shutil.which("unshare") is None:
        return False
    script = f'mount -t tmpfs -o size=1m tmpfs "{folder}"'
    return subprocess.run(["unshare", "-rm", "sh", "-c", script], capture_output=True).returncode == 0


class _Alone:
    rank, world_size = 0, 1


def curves_of(run: Path) -> dict[str, list[tuple[int, float]]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    return {tag: [(point.step, point.value) for point in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def timeless(curves: dict[str, Any]) -> dict[str, Any]:
    return {name: points for name, points in curves.items() if "speed/" not in name}


def test_tensorboard_has_the_curves(finished: Path) -> None:
    curves = curves_of(finished)
    assert {
        "loss/bce", "loss/gc", "learning_rate", "gradient_norm", "map/noisy_teacher", "map/true_teacher",
        "trigger_epoch", "pseudo/recall", "speed/samples_per_second", "speed/data_wait_share",
    } <= set(curves)  # fmt: skip
    assert curves["trigger_epoch"] == [(16, 1.0)]
    assert [step for step, _ in curves["map/noisy_teacher"]] == [8, 16, 24, 32, 40]
    rates = dict(curves["learning_rate"])
    assert list(rates) == [*range(3, 40, 3)]
    assert [rates[step] for step in (6, 9, 12, 15)] == pytest.approx([0.003] * 4)  # level after 4 steps of warm-up
    later = [rates[step] for step in (18, 24, 30, 36, 39)]
    assert later == sorted(later, reverse=True)
    assert later[-1] < 0.003 * 0.02


def test_config_yaml_repeats_the_run_to_the_bit(finished: Path, tmp_path: Path) -> None:
    assert_trained(finished / "config.yaml", [f"run.dir={tmp_path / 'again'}"])
    assert same_bits(teacher_of(tmp_path / "again"), teacher_of(finished))
    assert without_speed(lines_of(tmp_path / "again")) == without_speed(lines_of(finished))


def test_another_seed_is_another_run(finished: Path, tmp_path: Path) -> None:
    assert_trained(finished / "config.yaml", [f"run.dir={tmp_path / 'other'}", "run.seed=1", "optim.epochs=3"])
    assert lines_of(tmp_path / "other")[0]["loss/bce"] != lines_of(finished)[0]["loss/bce"]


CHANGES = {
    3: {"optim.lr": 0.001, "method.gc_weight": 4.0, "method.prediction_momentum": 0.5, "method.mixup_alpha": 0.3}
}


def test_settings_change_in_mid_run_as_the_schedule_has_them(tiny_shards: Path, finished: Path, tmp_path: Path) -> None:
    """Whether it was there from the start, or came to a run that had stopped before: the same bits from there on, which
    are other ones.
    """
    whole, later = tmp_path / "whole", tmp_path / "later"
    changes = f"schedule.changes={json.dumps(CHANGES)}"
    assert_trained("demo", tiny_settings(tiny_shards, whole, *TRIGGERED, changes))
    for code, told in train("demo", tiny_settings(tiny_shards, later, *TRIGGERED, "run.max_epochs=3")):
        assert code == 0, told  # in a rank of torchrun
    assert status_of(later)["reason"] == "run.max_epochs are done"
    assert_trained("demo", tiny_settings(tiny_shards, later, *TRIGGERED, changes))
    assert_as(whole, later)
    assert not same_bits(teacher_of(whole), teacher_of(finished))
    assert without_speed(lines_of(whole))[:3] == without_speed(lines_of(finished))[:3]
    rates = dict(curves_of(whole)["learning_rate"])
    assert rates[27] / dict(curves_of(finished)["learning_rate"])[27] == pytest.approx(1 / 3)
    # Mixup and rate have changed, too
    assert lines_of(whole)[3]["loss/gc"] / lines_of(finished)[3]["loss/gc"] == pytest.approx(4 / 3, rel=0.15)
    assert "holds another run (schedule.changes: {3: " in refused(
        tiny_settings(tiny_shards, whole, *TRIGGERED, "optim.epochs=6")
    )


def test_the_levels_of_classes_are_there_again_when_a_run_goes_on(tiny_shards: Path, tmp_path: Path) -> None:
    whole, later = tmp_path / "whole", tmp_path / "later"
    settings = [*TRIGGERED, "optim.epochs=3", "method.name=adagc_levels"]
    assert_trained("demo", tiny_settings(tiny_shards, whole, *settings))
    assert_trained("demo", tiny_settings(tiny_shards, later, *settings, "run.max_epochs=2"))
    assert_trained("demo", tiny_settings(tiny_shards, later, *settings))
    assert_as(whole, later)
    assert lines_of(whole)[2]["phase"] == "calibration"


def train_up_to(settings: Sequence[str], position: str) -> tuple[int, str]:
    """The command, which does not get past this checkpoint: complete as it is, its save does not end, and whatever
    comes next waits for that.
    """
    write_json = checkpoint.write_json

    def written(path: Path, record: Mapping[str, Any]) -> None:
        write_json(path, record)
        if (path.parent.name, path.name) == (position, "COMPLETE.json"):
            time.sleep(600)

    checkpoint.write_json = written
    return command_line(["demo", *settings])


def kill_after_epoch(settings: Sequence[str], run: Path, epoch: int) -> None:
    """Two ranks that lose their power once the checkpoint of ``epoch`` is complete."""
    kill_after(settings, run, Position(epoch + 1))


def kill_after(settings: Sequence[str], run: Path, position: Position) -> None:
    """Two ranks that lose their power once this checkpoint is complete, before there is a later one."""
    ranks = Ranks(2, train_up_to, settings, str(position), timeout=120.0)
    marker, deadline = run / "checkpoints" / str(position) / "COMPLETE.json", time.monotonic() + 100
    while not marker.is_file() and time.monotonic() < deadline and ranks.processes[0].is_alive():
        time.sleep(0.002)
    ranks.kill()
    assert marker.is_file()
    assert status_of(run)["state"] == "running"
    assert not (run / "teacher.safetensors").exists()


@pytest.mark.parametrize("epoch", [0, 2])
def test_a_killed_run_goes_on_as_if_nothing_had_been(
    tiny_shards: Path, finished: Path, tmp_path: Path, epoch: int
) -> None:
    """In warm-up and after the trigger: the same teacher to the bit, and each epoch's line once."""
    run = tmp_path / "killed"
    settings = tiny_settings(tiny_shards, run, *TRIGGERED)
    kill_after_epoch(settings, run, epoch)
    with (run / "metrics.jsonl").open("a") as stream:
        stream.write('{"epoch": 4, "st')  # a line cut short
    assert_trained("demo", settings)
    assert_as(finished, run)
    assert [step for step, _ in curves_of(run)["map/noisy_teacher"]] == [8, 16, 24, 32, 40]


def test_a_killed_run_goes_on_with_another_number_of_ranks(tiny_shards: Path, finished: Path, tmp_path: Path) -> None:
    run = tmp_path / "killed"
    settings = tiny_settings(tiny_shards, run, *TRIGGERED)
    kill_after_epoch(settings, run, 1)
    assert_trained("demo", settings, ranks=3)
    assert status_of(run) == status_of(finished)
    whole, resumed = lines_of(finished), lines_of(run)
    assert without_speed(resumed[:2]) == without_speed(whole[:2])
    assert resumed[2]["loss/bce"] == pytest.approx(whole[2]["loss/bce"], rel=0.05)  # local BatchNorm: close, not equal


IN_MID_EPOCH = [*TRIGGERED, "run.checkpoint_every=2 steps", "run.keep_checkpoints=99"]


@pytest.mark.parametrize("position", [Position(1, 2), Position(3, 6)], ids=str)
def test_a_run_killed_in_mid_epoch_goes_on_as_if_nothing_had_been(
    tiny_shards: Path, finished: Path, tmp_path: Path, position: Position
) -> None:
    """In the epoch of the trigger and after it: the same bits, lines and curves, the epoch's sums included;
    and checkpoints in mid-epoch change nothing.
    """
    run = tmp_path / "killed"
    settings = tiny_settings(tiny_shards, run, *IN_MID_EPOCH)
    kill_after(settings, run, position)
    assert_trained("demo", settings)
    assert_as(finished, run)
    assert timeless(curves_of(run)) == timeless(curves_of(finished))
    ends = {str(Position(epoch)) for epoch in range(1, EPOCHS + 1)}
    between = {str(Position(epoch, step)) for epoch in range(EPOCHS) for step in (2, 4, 6)}
    assert {path.name for path in (run / "checkpoints").iterdir()} == ends | between


@pytest.mark.parametrize("ranks", [pytest.param(1, marks=pytest.mark.long), 3])
def test_a_run_killed_in_mid_epoch_goes_on_with_another_number_of_ranks(
    tiny_shards: Path, finished: Path, tmp_path: Path, ranks: int
) -> None:
    """Every row is still read once in the epoch (the store's audit says so), and the epoch's means are of all steps."""
    run = tmp_path / "killed"
    settings = tiny_settings(tiny_shards, run, *IN_MID_EPOCH)
    kill_after(settings, run, Position(2, 4))
    assert_trained("demo", settings, ranks=ranks)
    assert status_of(run) == status_of(finished)
    whole, resumed = lines_of(finished), lines_of(run)
    assert without_speed(resumed[:2]) == without_speed(whole[:2])
    for name in ("loss/bce", "loss/gc", "pseudo/count", "pseudo/recall"):
        assert resumed[2][name] == pytest.approx(whole[2][name], rel=0.1)  # local BatchNorm: close, not equal


def test_without_batchnorm_a_run_killed_in_mid_epoch_is_the_same_on_other_ranks(
    tiny_shards: Path, tmp_path: Path
) -> None:
    """But for rounding, with other micro-batches as well."""
    smooth = [
        "model.kwargs.act_layer=silu",
        "model.kwargs.replace_stem_pool=true",
        "model.kwargs.norm_layer=groupnorm1",
    ]
    once = ["optim.epochs=2", "detector.rule=fixed", "detector.min_epochs=1", *smooth]
    whole, run = tmp_path / "whole", tmp_path / "killed"
    assert_trained("demo", tiny_settings(tiny_shards, whole, *once))
    settings = tiny_settings(tiny_shards, run, *once, "run.checkpoint_every=2 steps", "run.keep_checkpoints=99")
    kill_after(settings, run, Position(1, 4))
    assert_trained("demo", [*settings, "optim.accumulation=2"], ranks=1)
    for found, expected in zip(without_speed(lines_of(run)), without_speed(lines_of(whole))):
        assert found.pop("phase") == expected.pop("phase")
        assert found == pytest.approx(expected, rel=1e-4, abs=1e-6)
    for name, tensor in teacher_of(run).items():
        torch.testing.assert_close(tensor, teacher_of(whole)[name], rtol=1e-3, atol=1e-5)


def test_assume_negative_keeps_no_rows_and_goes_on_in_mid_epoch_too(tiny_shards: Path, tmp_path: Path) -> None:
    whole, run = tmp_path / "whole", tmp_path / "killed"
    settings = ["method.name=an", "optim.epochs=2", "run.checkpoint_every=3 steps", "run.keep_checkpoints=99"]
    assert_trained("demo", tiny_settings(tiny_shards, whole, *settings))
    assert {path.name for path in (whole / "checkpoints").iterdir()} == {
        str(Position(*place)) for place in [(0, 3), (0, 6), (1, 0), (1, 1), (1, 4), (1, 7), (2, 0)]
    }  # every third step of the run, and each epoch's end
    assert not list((whole / "checkpoints").glob("*/rows-*"))
    kill_after(tiny_settings(tiny_shards, run, *settings), run, Position(1, 1))
    assert_trained("demo", tiny_settings(tiny_shards, run, *settings))
    assert same_bits(teacher_of(run), teacher_of(whole))
    assert without_speed(lines_of(run)) == without_speed(lines_of(whole))


@pytest.fixture(scope="module")
def halfway(tiny_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was killed in mid-epoch, after its trigger."""
    run = tmp_path_factory.mktemp("halfway") / "run"
    kill_after(tiny_settings(tiny_shards, run, *IN_MID_EPOCH), run, Position(2, 4))
    return run


@pytest.fixture
def half(halfway: Path, tmp_path: Path) -> Path:
    shutil.copytree(halfway, tmp_path / "half")
    return tmp_path / "half"


def command_lines(commands: Sequence[Sequence[str]]) -> list[tuple[int, str]]:
    return [command_line(arguments) for arguments in commands]


def test_a_changed_byte_in_any_file_of_a_checkpoint_is_told_with_the_remedy_which_works(
    halfway: Path, tiny_shards: Path, tmp_path: Path
) -> None:
    folder = Path("checkpoints") / str(Position(2, 4))
    files = sorted(file.name for file in (halfway / folder).iterdir())
    assert len(files) == 7
    for name in files:
        shutil.copytree(halfway, tmp_path / name)
        content = bytearray((tmp_path / name / folder / name).read_bytes())
        content[0 if name.endswith("json") else len(content) // 2] ^= 2
        (tmp_path / name / folder / name).write_bytes(content)
    commands = [["demo", *tiny_settings(tiny_shards, tmp_path / name, *IN_MID_EPOCH)] for name in files]
    told = Ranks(1, command_lines, commands, timeout=60.0).join()[0]
    for name, (code, line) in zip(files, told):
        damaged = tmp_path / name / folder
        assert (code, line) == (
            1,
            f"adagc train: {damaged / name} is missing or damaged (its digest differs): delete {damaged}, and the run "
            "goes on from the checkpoint before\n",
        )
    damaged = tmp_path / files[-1] / folder
    shutil.rmtree(damaged)
    assert_trained("demo", [*commands[-1][1:], "optim.epochs=3"])


def test_what_the_order_of_an_epoch_depends_on_changes_at_its_end_only(half: Path, tiny_shards: Path) -> None:
    settings = tiny_settings(tiny_shards, half, *IN_MID_EPOCH, "optim.epochs=3", "data.window_shards=1")
    folder = half / "checkpoints" / str(Position(2, 4))
    assert refused(settings) == (
        f"adagc train: {folder} lies within an epoch that began with data.window_shards=0, and here it is 1: add "
        "data.window_shards=0 to go on\n"
    )
    for later in (folder, folder.with_name(str(Position(2, 2)))):
        shutil.rmtree(later)
    assert_trained("demo", settings)


def test_a_run_that_may_not_go_on_says_how_it_could(half: Path, tiny_shards: Path) -> None:
    before = sorted(path.name for path in half.iterdir()), (half / "status.json").read_bytes()
    told = refused(tiny_settings(tiny_shards, half, *IN_MID_EPOCH, "run.resume=never"))
    assert told == (
        f"adagc train: run.dir={half} holds an unfinished run, and run.resume=never: name another folder with "
        "run.dir=..., or continue it with run.resume=auto\n"
    )
    assert (sorted(path.name for path in half.iterdir()), (half / "status.json").read_bytes()) == before


def test_checkpoints_of_an_older_version_are_refused_and_left_alone(half: Path, tiny_shards: Path) -> None:
    """They had other names; the run must not begin anew over them."""
    for folder in (half / "checkpoints").iterdir():
        if folder.name != str(Position(2)):
            shutil.rmtree(folder)
    old = (half / "checkpoints" / str(Position(2))).rename(half / "checkpoints" / "epoch-0001")
    (old / "COMPLETE.json").write_text(json.dumps({"schema": 1, "files": {}}))
    lines = lines_of(half)
    told = refused(tiny_settings(tiny_shards, half, *IN_MID_EPOCH))
    assert told == (
        f"adagc train: {old} has checkpoint schema 1, this version reads 2: go on with the version that wrote it, or "
        "start anew in another folder\n"
    )
    assert lines_of(half) == lines


# A disk that fills up


def fill_the_disk(settings: Sequence[str], position: str) -> tuple[int, str]:
    """The command, on a rank whose part of this one checkpoint finds no room."""
    leave_no_room(position)
    return command_line(["demo", *settings])


def leave_no_room(position: str) -> None:
    save_file = checkpoint.save_file

    def limited(tensors: dict[str, Tensor], file: Path) -> None:
        if position in str(file) and "rows-00001" in file.name:
            raise OSError(28, "No space left on device", str(file))
        save_file(tensors, file)

    checkpoint.save_file = limited


def test_a_checkpoint_that_cannot_be_written_ends_the_run_which_goes_on_once_there_is_room(
    tiny_shards: Path, finished: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    settings = tiny_settings(tiny_shards, run, *TRIGGERED, "run.checkpoint_every=epoch", "run.keep_checkpoints=1")
    ended = Ranks(2, fill_the_disk, settings, str(Position(2)), timeout=60.0).join()
    file = run / "checkpoints" / str(Position(2)) / "rows-00001-of-00002.safetensors"
    reason = f"[Errno 28] No space left on device: '{file}'"
    assert [code for code, _ in ended] == [EXIT_LOST_PEER, 1]
    assert "adagc train" not in ended[0][1]  # told once
    assert ended[1][1] == f"adagc train: rank 1: {reason}\n"
    assert (status_of(run)["state"], status_of(run)["reason"]) == ("failed", f"OSError: {reason}")
    assert [path.name for path in (run / "checkpoints").iterdir()] == [str(Position(1))]
    assert_trained("demo", settings)
    assert same_bits(teacher_of(run), teacher_of(finished))
    assert without_speed(lines_of(run)) == without_speed(lines_of(finished))


def test_a_run_may_go_on_without_a_checkpoint_that_cannot_be_written(
    tiny_shards: Path, finished: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    settings = tiny_settings(
        tiny_shards, run, *TRIGGERED, "run.checkpoint_every=epoch", "run.keep_checkpoints=99",
        "run.on_save_error=continue",
    )  # fmt: skip
    ended = Ranks(2, fill_the_disk, settings, str(Position(3)), timeout=60.0).join()
    assert [code for code, _ in ended] == [0, 0], ended
    names = [str(Position(epoch)) for epoch in (1, 2, 4, 5)]
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == names
    log = (run / "log.txt").read_text()
    assert log.count("no checkpoint was written: ") == 1
    assert "No space left on device" in log
    assert same_bits(teacher_of(run), teacher_of(finished))


def test_a_file_system_that_is_really_full_is_told_in_a_sentence(tiny_shards: Path, tmp_path: Path) -> None:
    """The run's own folder lies on another; the first checkpoint fits, the second does not."""
    run, whole = tmp_path / "run", tmp_path / "whole"
    settings = ["optim.epochs=4", "run.keep_checkpoints=9", "run.checkpoint_every=epoch", "detector.rule=never"]
    assert_trained("demo", tiny_settings(tiny_shards, whole, *settings), ranks=1)
    size = sum(file.stat().st_size for file in after_epoch(whole, 0).iterdir())
    (run / "checkpoints").mkdir(parents=True)
    (run / "config.yaml").write_text(dump_config(load_config("demo", tiny_settings(tiny_shards, run, *settings))))
    script = f'mount -t tmpfs -o size={size * 3 // 2} tmpfs "{run}/checkpoints" && "$@"; code=$?; ' + (
        f'ls -d "{run}"/checkpoints/*; exit $code'
    )
    if not may_mount(tmp_path):
        pytest.skip("this process may not mount a file system; test_adagc_dist_checkpoint has it with another limit")
    ended = subprocess.run(
        ["unshare", "-rm", "sh", "-c", script, "sh", sys.executable, "-m", "launch.cli", "train", "demo",
         *tiny_settings(tiny_shards, run, *settings)],
        cwd=Path(command.__file__).parents[1], capture_output=True, text=True, timeout=100,
    )  # fmt: skip
    assert ended.returncode == 1, ended
    (told,) = [line for line in ended.stderr.splitlines() if line.startswith("adagc train")]
    assert re.fullmatch(rf"adagc train: .*{Position(2)}/.*No space left on device.*", told)
    assert "Traceback" not in ended.stderr
    assert status_of(run)["state"] == "failed"
    assert ended.stdout.endswith(f"\n{after_epoch(run, 0)}\n")  # it alone is left


def train_on_a_full_disk(settings: Sequence[str], run: str) -> tuple[int, str]:
    """The command, on a rank whose run's whole file system is full from the second epoch to the fourth."""
    ballast, run_epoch = Path(run) / "ballast", Trainer._run_epoch

    def run_epoch_on_a_full_disk(trainer: Trainer, epoch: int) -> None:
        if trainer.comm.rank == 0 and epoch == 1:
            trainer.checkpoints.linger()
            with ballast.open("wb", buffering=0) as stream, suppress(OSError):
                while True:
                    stream.write(bytes(4096))
        if trainer.comm.rank == 0 and epoch == 4:
            trainer.checkpoints.linger()
            ballast.unlink()
        trainer.comm.barrier()
        run_epoch(trainer, epoch)

    Trainer._run_epoch = run_epoch_on_a_full_disk  # type: ignore[method-assign]
    return command_line(["demo", *settings])


ON_A_SMALL_DISK = """
import json, sys
from pathlib import Path
from tests.ranks import Ranks
from tests.test_training import train_on_a_full_disk

run, kept, *settings = sys.argv[1:]
ended = Ranks(2, train_on_a_full_disk, settings, run, timeout=80.0).join()
files = {name: (Path(run) / name).read_text() for name in ("status.json", "log.txt", "metrics.jsonl")}
names = sorted(path.parent.name for path in Path(run).glob("checkpoints/*/COMPLETE.json"))
Path(kept).write_text(json.dumps([ended, files, names]))
"""


@pytest.mark.long
@pytest.mark.parametrize("on_error", ["continue", "stop"])
def test_a_full_disk_under_the_whole_run_ends_it_in_a_sentence_or_not_at_all(
    tiny_shards: Path, tmp_path: Path, on_error: str
) -> None:
    """Not only checkpoints find no room: status, metrics, curves and log do not, either."""
    if not may_mount(tmp_path):
        pytest.skip("this process may not mount a file system; test_adagc_dist_checkpoint has it with another limit")
    run, kept = tmp_path / "run", tmp_path / "kept.json"
    run.mkdir()
    settings = tiny_settings(
        tiny_shards, run, "optim.epochs=6", "run.keep_checkpoints=9", "run.checkpoint_every=epoch",
        "detector.rule=never", f"run.on_save_error={on_error}", "run.log_every=1",
    )  # fmt: skip
    script = f'mount -t tmpfs -o size=64m tmpfs "{run}" && exec "$@"'
    python = [sys.executable, "-c", ON_A_SMALL_DISK, str(run), str(kept), *settings]
    result = subprocess.run(
        ["unshare", "-rm", "sh", "-c", script, "sh", *python],
        cwd=Path(command.__file__).parents[1], capture_output=True, text=True, timeout=100,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    ended, files, names = json.loads(kept.read_text())
    told = "".join(line for _, lines in ended for line in lines.splitlines(True) if "patch" not in line)  # progress
    if on_error == "stop":
        assert [code for code, _ in ended] == [1, EXIT_LOST_PEER]
        assert re.fullmatch(rf"adagc train: .*No space left on device: '{run}/status\.json'\n", told), told
        assert names == [str(Position(1))]
        return
    assert [code for code, _ in ended] == [0, 0]
    assert "adagc train" not in told
    assert "Logging error" not in told
    assert names == [str(Position(epoch)) for epoch in (1, 5, 6)]
    assert json.loads(files["status.json"])["state"] == "finished"
    assert files["log.txt"].count("no checkpoint was written: ") == 3
    assert "what was to be reported is lost: " in files["log.txt"]
    epochs = [json.loads(line)["epoch"] for line in files["metrics.jsonl"].splitlines()]
    assert [epoch for epoch in epochs if epoch not in (1, 2, 3)] == [0, 4, 5]


def test_an_incomplete_checkpoint_is_passed_over(tiny_shards: Path, finished: Path, tmp_path: Path) -> None:
    run = tmp_path / "killed"
    settings = tiny_settings(tiny_shards, run, *TRIGGERED)
    kill_after_epoch(settings, run, 1)
    newest = max((run / "checkpoints").iterdir())
    (newest / "COMPLETE.json").unlink(missing_ok=True)
    assert_trained("demo", settings)
    assert same_bits(teacher_of(run), teacher_of(finished))


def test_a_finished_run_is_not_overwritten(finished: Path, tiny_shards: Path) -> None:
    before = (finished / "teacher.safetensors").read_bytes()
    told = refused(tiny_settings(tiny_shards, finished, *TRIGGERED))
    assert f"run.dir={finished} holds a finished run of {EPOCHS} epochs. Name another folder with run.dir=" in told
    assert f"raise optim.epochs to continue this one, or see its results with `adagc evaluate {finished}`" in told
    assert (finished / "teacher.safetensors").read_bytes() == before
    assert status_of(finished)["state"] == "finished"


def test_another_run_in_the_same_folder_is_refused(finished: Path, tiny_shards: Path) -> None:
    settings = tiny_settings(tiny_shards, finished, *TRIGGERED, "optim.lr=0.01", "run.seed=3", "data.workers=1")
    told = refused(settings)
    assert "holds another run (optim.lr: 0.003 there, 0.01 here; run.seed: 0 there, 3 here)" in told
    assert "Name another folder with run.dir=..., or repeat that run's settings to continue it" in told


def test_a_folder_that_is_no_run_is_left_alone(tiny_shards: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("important")
    assert f"run.dir={tmp_path} exists and is no run: name another folder" in refused(
        tiny_settings(tiny_shards, tmp_path)
    )
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


@pytest.fixture
def copy(finished: Path, tmp_path: Path) -> Path:
    """The finished run, free to be continued."""
    shutil.copytree(finished, tmp_path / "copy")
    return tmp_path / "copy"


def test_more_epochs_continue_a_finished_run(copy: Path, finished: Path) -> None:
    settings = [f"run.dir={copy}", f"optim.epochs={EPOCHS + 1}"]
    assert_trained(copy / "config.yaml", settings)
    assert (status_of(copy)["state"], status_of(copy)["epochs"]) == ("finished", EPOCHS + 1)
    assert without_speed(lines_of(copy))[:EPOCHS] == without_speed(lines_of(finished))
    assert not same_bits(teacher_of(copy), teacher_of(finished))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda classes: ["Towns", *classes[1:]], r"'Urban fabric' against 'Towns'\)"),
        (lambda classes: [classes[1], classes[0], *classes[2:]], r"'Urban fabric' against 'Industrial"),
    ],
)  # fmt: skip
def test_other_classes_than_the_checkpoints_are_refused(
    copy: Path, tiny_shards: Path, tmp_path: Path, change: Any, message: str
) -> None:
    shards = tmp_path / "shards"
    shutil.copytree(tiny_shards, shards)
    manifest = json.loads((shards / "manifest.json").read_text())
    (shards / "manifest.json").write_text(json.dumps(manifest | {"classes": change(manifest["classes"])}))
    settings = [f"run.dir={copy}", f"optim.epochs={EPOCHS + 1}", f"data.shards={shards}"]
    told = refused(settings, recipe=copy / "config.yaml")
    assert re.search(r"the classes of \S+ are not those of this configuration \(" + message, told)
    assert "keep data.shards and data.bands as in its training" in told


def test_a_damaged_checkpoint_is_told(copy: Path) -> None:
    file = after_epoch(copy, EPOCHS - 1) / "student.safetensors"
    content = bytearray(file.read_bytes())
    content[-7] ^= 8
    file.write_bytes(content)
    told = refused([f"run.dir={copy}", f"optim.epochs={EPOCHS + 1}"], recipe=copy / "config.yaml")
    assert f"{file} is missing or damaged" in told


@pytest.mark.parametrize(
    "overrides",
    [
        ["spml.policy=dominant"],
        ["spml.policy=full", "method.name=an"],
        ["method.name=an"],
        ["optim.precision=bf16"],
        ["engine.batchnorm=sync"],
        ["optim.accumulation=2", "run.eval_student=true"],
        ["data.bands=B04,B03,B02,B8A", "data.window_shards=1", "data.workers=1"],
        [
            "method.mixup_alpha=0",
            "method.combine=product",
            "detector.rewind=false",
            "model.kwargs.norm_layer=groupnorm1",
        ],
    ],
    ids=" ".join,
)
def test_what_else_a_run_can_be(tiny_shards: Path, tmp_path: Path, overrides: list[str]) -> None:
    settings = ["optim.epochs=2", "detector.rule=fixed", "detector.min_epochs=1", *overrides]
    assert_trained("demo", tiny_settings(tiny_shards, tmp_path / "run", *settings))
    assert status_of(tmp_path / "run")["state"] == "finished"
    lines = lines_of(tmp_path / "run")
    calibrates = "method.name=an" not in overrides
    assert [line["phase"] for line in lines] == ["warmup", "calibration" if calibrates else "warmup"]
    assert (lines[1]["loss/gc"] < 0) == calibrates
    assert lines[1]["loss/bce"] < lines[0]["loss/bce"]
    assert ("map/true_student" in lines[0]) == ("run.eval_student=true" in overrides)
    rows = list(after_epoch(tmp_path / "run", 1).glob("rows-*"))
    assert len(rows) == (2 if calibrates else 0)


def test_full_labels_are_more_than_single_ones(tiny_shards: Path, tmp_path: Path) -> None:
    losses = {}
    for policy in ("full", "random"):
        run = tmp_path / policy
        settings = tiny_settings(tiny_shards, run, "optim.epochs=1", f"spml.policy={policy}")
        assert_trained("demo", settings)
        losses[policy] = lines_of(run)[0]
    assert losses["full"]["map/noisy_teacher"] == losses["full"]["map/true_teacher"]
    assert losses["random"]["map/noisy_teacher"] != losses["random"]["map/true_teacher"]


def test_a_run_that_diverges_says_so(tiny_shards: Path, tmp_path: Path) -> None:
    settings = tiny_settings(
        tiny_shards, tmp_path / "run", "optim.lr=1e30", "optim.warmup_steps=0", "optim.clip_norm=0"
    )
    told = train("demo", settings)
    assert [code for code, _ in told] == [1, 1]
    assert "\nadagc train: the model's scores are not finite: training has diverged. Lower optim.lr" in told[0][1]
    status = status_of(tmp_path / "run")
    assert status["state"] == "failed"
    assert status["reason"].startswith("ValueError: the model's scores are not finite")


def test_a_truncated_shard_ends_the_run_and_hangs_nobody(tiny_shards: Path, tmp_path: Path) -> None:
    shards = tmp_path / "shards"
    shutil.copytree(tiny_shards, shards)
    with (shards / "train-000002.tar").open("r+b") as stream:
        stream.truncate(2_000_000)
    start = time.monotonic()
    with pytest.raises(RankError, match="train-000002"):
        Ranks(2, must_succeed, ["demo", *tiny_settings(shards, tmp_path / "run")]).join()
    assert time.monotonic() - start < 50


def must_succeed(arguments: Sequence[str]) -> None:
    code, told = command_line(arguments)
    assert code == 0, told


@pytest.mark.parametrize(
    ("settings", "ranks", "message"),
    [
        (["optim.global_batch=12"], 8, r"optim\.global_batch=12 is too small: .*8 rank\(s\) x optim\.accumulation=1"),
        (["data.bands=B02,B10"], 2, r"data\.bands=B02,B10: B10 not in the shards"),
        (["data.shards=nowhere"], 2, r"nowhere holds no manifest\.json: it is no shard folder"),
    ],
)
def test_what_cannot_work_is_told_before_ranks_are_started(
    tiny_shards: Path, tmp_path: Path, settings: list[str], ranks: int, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["demo", *tiny_settings(tiny_shards, tmp_path / "run", *settings), "--nproc-per-node", str(ranks)]
    assert command.main(arguments) == 1
    assert re.fullmatch(rf"adagc train: .*{message}.*\n", capsys.readouterr().err)
    assert not (tmp_path / "run").exists()


class Scripted:
    """A detector that fires after the third epoch and calls the first one the best."""

    best_epoch, fired_map = 0, None

    def observe(self, noisy_map: float, replicates: Sequence[float]) -> Verdict:
        self.epochs = getattr(self, "epochs", 0) + 1
        return Verdict(fired=self.epochs == 3, reason="scripted", best_epoch=0)

    def state(self) -> dict[str, Any]:
        return {}


def train_with_a_rewind(comm: Comm, settings: Sequence[str]) -> dict[str, Any]:
    config = load_config(None, settings)
    folder = RunFolder(config, comm)
    trainer = build_trainer(config, comm=comm, device=torch.device("cpu"), checkpoints=folder.checkpoints)
    folder.claim()
    trainer.tracker = folder.tracker(trainer.moment)
    trainer.detector = Scripted()  # type: ignore[assignment]
    trainer.start()
    trainer.run()
    return vars(trainer.moment)


def table_of(run: Path, epoch: int) -> dict[int, list[float]]:
    parts = [load_file(file) for file in after_epoch(run, epoch).glob("rows-*")]
    return {row: value for part in parts for row, value in zip(part["rows"].tolist(), part["values"].tolist())}


def test_a_rewind_takes_all_that_was_learnt_back_and_time_goes_on(tiny_shards: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    settings = tiny_settings(tiny_shards, run, "optim.epochs=4", "run.keep_checkpoints=2")
    moments = run_ranks(2, train_with_a_rewind, settings)
    expected = Moment(epoch=4, step=32, trigger_epoch=2, best_epoch=0, decay_from=24, calibrating=True)
    assert moments == [vars(expected)] * 2
    assert "rewound" in (run / "log.txt").read_text()
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == [
        "epoch-0003-step-00000",
        "epoch-0004-step-00000",
    ]
    assert [line["phase"] for line in lines_of(run)] == ["warmup"] * 3 + ["calibration"]


def test_the_checkpoint_a_rewind_needs_is_kept_among_any_number_of_others(tiny_shards: Path, tmp_path: Path) -> None:
    """Two epochs of checkpoints in mid-epoch lie between, and one is kept."""
    run = tmp_path / "run"
    settings = tiny_settings(
        tiny_shards, run, "optim.epochs=4", "run.keep_checkpoints=1", "run.checkpoint_every=1 step"
    )
    moments = run_ranks(2, train_with_a_rewind, settings)
    assert [moment["best_epoch"] for moment in moments] == [0, 0]
    assert "rewound" in (run / "log.txt").read_text()
    assert [path.name for path in (run / "checkpoints").iterdir()] == [str(Position(4))]


def test_a_rewound_checkpoint_is_that_of_the_best_epoch(tiny_shards: Path, tmp_path: Path) -> None:
    """What is saved after the trigger is what the first epoch had learnt, at the place of the third."""
    run = tmp_path / "run"
    settings = ["optim.epochs=3", "run.keep_checkpoints=9", "method.name=adagc_levels"]
    run_ranks(2, train_with_a_rewind, tiny_settings(tiny_shards, run, *settings))
    first, second, third = (after_epoch(run, epoch) for epoch in range(3))
    levels = [json.loads((folder / "state.json").read_text())["moment"]["levels"] for folder in (first, second, third)]
    assert levels[0] == levels[2] != levels[1]
    for name in ("student", "teacher", "optimizer"):
        assert same_bits(load_file(third / f"{name}.safetensors"), load_file(first / f"{name}.safetensors"))
        assert not same_bits(load_file(second / f"{name}.safetensors"), load_file(first / f"{name}.safetensors"))
    assert table_of(run, 2) == table_of(run, 0)
    assert table_of(run, 1) != table_of(run, 0)
    orders = [load_file(sorted(folder.glob("rows-*"))[0])["rows"].tolist() for folder in (first, third)]
    assert orders[0] != orders[1]  # the rows went home to the next epoch's plan, not to the one they were saved for


def train_without_the_best(comm: Comm, settings: Sequence[str], run: Path, why: str) -> dict[str, Any]:
    """Of what a rewind needs, there is nothing once it is wanted."""
    observe = Scripted.observe

    def observe_and_delete(self: Scripted, noisy_map: float, replicates: Sequence[float]) -> Verdict:
        verdict = observe(self, noisy_map, replicates)
        if verdict.fired and comm.rank == 0:
            shutil.rmtree(after_epoch(run, 0))
        return verdict

    if why == "it could not be written":
        leave_no_room(str(Position(1)))
    else:
        Scripted.observe = observe_and_delete  # type: ignore[method-assign]
    return train_with_a_rewind(comm, settings)


@pytest.mark.parametrize("why", ["it could not be written", "it was deleted"])
def test_without_the_checkpoint_of_the_best_epoch_a_run_calibrates_from_where_it_is(
    tiny_shards: Path, tmp_path: Path, why: str
) -> None:
    run = tmp_path / "run"
    settings = tiny_settings(
        tiny_shards, run, "optim.epochs=4", "run.keep_checkpoints=9", "run.checkpoint_every=epoch",
        "run.on_save_error=continue",
    )  # fmt: skip
    moments = run_ranks(2, train_without_the_best, settings, run, why)
    expected = Moment(epoch=4, step=32, trigger_epoch=2, best_epoch=None, decay_from=24, calibrating=True)
    assert moments == [vars(expected)] * 2
    log = (run / "log.txt").read_text()
    assert log.count("there is no checkpoint of epoch 1, the best, to rewind to") == 1
    assert "Calibration goes on from epoch 3" in log
    assert "rewound" not in log
    assert [line["phase"] for line in lines_of(run)] == ["warmup"] * 3 + ["calibration"]
