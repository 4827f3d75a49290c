"""The commands as a user meets them: messages, exit codes, and what becomes of them when something kills them."""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sharding import reben
from sharding.convert import shard, synth
from sharding.sources.geotiff import RebenTree
from sharding.synthetic.tree import write_tree
from sharding.writer import write_shards
from tests.held import held_command, running, shards_in, wait_for
from tests.readback import digests


@pytest.fixture(scope="module")
def whole_tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("convert") / "tree"
    write_tree(root, 150, seed=8, workers=0)
    return root


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A small tree that a test may break."""
    write_tree(tmp_path / "tree", 9, seed=8, workers=0)
    return tmp_path / "tree"


def reben_command(tree: Path, out: Path, *more: str) -> list[str]:
    return ["reben", "--root", str(tree), "--out", str(out), "--workers", "0", *more]


def break_band(tree: Path) -> Path:
    path = min(tree.glob(f"{reben.BAND_FOLDER}/*/*/*_B11.tif"))
    path.write_bytes(path.read_bytes()[:3000])
    return path


def test_two_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tree, out = tmp_path / "tree", tmp_path / "shards"
    assert synth(["--out", str(tree), "--patches", "9", "--seed", "3", "--workers", "0"]) == 0
    printed = capsys.readouterr().out
    assert "synthetic reBEN tree" in printed
    assert "9 patches, seed 3 (9 of 9 written now)" in printed
    assert shard(reben_command(tree, out)) == 0
    printed = capsys.readouterr().out
    assert "9 patches (train 6, validation 1, test 2) in 3 shards" in printed
    assert "written now: 9, " in printed
    assert "patches without area shares, for lack of a map (no dominant label): 0" in printed
    assert "patches with labels other than their map's (the metadata win): 0" in printed
    assert "patches skipped: 0" in printed


def test_twice_is_nothing_new(tree: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert shard(reben_command(tree, tmp_path / "shards")) == 0
    before = digests(tmp_path / "shards")
    capsys.readouterr()
    assert shard(reben_command(tree, tmp_path / "shards")) == 0
    assert "it was finished before: nothing to do" in capsys.readouterr().out
    assert digests(tmp_path / "shards") == before
    assert synth(["--out", str(tree), "--patches", "9", "--seed", "8"]) == 0
    assert "was finished before, nothing to do" in capsys.readouterr().out


def test_other_settings_on_a_finished_folder(tree: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert shard(reben_command(tree, tmp_path / "shards")) == 0
    assert shard(reben_command(tree, tmp_path / "shards", "--seed", "1")) == 1
    assert "seed was 0 and is now 1" in capsys.readouterr().err
    assert synth(["--out", str(tree), "--patches", "9", "--seed", "9"]) == 1
    assert "seed was 8 and is now 9" in capsys.readouterr().err


def test_skip_lists_at_the_end(tree: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = break_band(tree)
    assert shard(reben_command(tree, tmp_path / "shards", "--on-error", "skip")) == 0
    printed = capsys.readouterr().out
    assert "8 patches (" in printed
    assert "patches skipped: 1" in printed
    assert f"file {path.relative_to(tree)}: cannot be read" in printed


def remove_tree(tree: Path) -> None:
    shutil.rmtree(tree)


def remove_metadata(tree: Path) -> None:
    (tree / reben.METADATA).unlink()


def cut_band(tree: Path) -> None:
    break_band(tree)


def remove_band(tree: Path) -> None:
    break_band(tree).unlink()


def swap_bands(tree: Path) -> None:
    path = min(tree.glob(f"{reben.BAND_FOLDER}/*/*/*_B11.tif"))
    shutil.copy(path.with_name(path.name.replace("B11", "B01")), path)


def invent_class(tree: Path) -> None:
    table = pq.read_table(tree / reben.METADATA)
    rows = table.to_pylist()
    rows[4]["labels"] = ["Vineyards"]
    pq.write_table(pa.Table.from_pylist(rows, schema=table.schema), tree / reben.METADATA)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (remove_tree, "is no folder: give the folder that holds BigEarthNet-S2"),
        (remove_metadata, "holds no metadata.parquet"),
        (cut_band, "_B11.tif: cannot be read, it is truncated or damaged"),
        (remove_band, "_B11.tif: no such file"),
        (swap_bands, "_B11.tif: has 1 band of 20x20 uint16; expected 1 band of 60x60 uint16"),
        (invent_class, "has the label 'Vineyards', which is none of reBEN's 19 classes"),
    ],
)
def test_bad_input_is_one_message(
    tree: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    damage: Callable[[Path], None],
    message: str,
) -> None:
    damage(tree)
    assert shard(reben_command(tree, tmp_path / "shards")) == 1
    printed = capsys.readouterr().err
    assert printed.startswith("adagc shard: ")
    assert message in printed
    assert "Traceback" not in printed
    assert not (tmp_path / "shards" / "manifest.json").exists()


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "the following arguments are required: --out, --patches"),
        (["--out", "x", "--patches", "0"], "'0' is no whole number of at least 1"),
        (["--out", "x", "--patches", "many"], "'many' is no whole number of at least 1"),
        (["--out", "x", "--patches", "2", "--workers", "-1"], "'-1' is no whole number of at least 0"),
        (["--out", "x", "--patches", "2", "--shares", "1,1,1"], "is not three shares that add up to 1"),
        (["--out", "x", "--patches", "2", "--shares", "a,b"], "is not three shares that add up to 1"),
        (["--out", __file__, "--patches", "2"], "test_sharding_convert.py is no folder: give a new or another one"),
        (["--out", f"{__file__}/x", "--patches", "2"], "test_sharding_convert.py is no folder"),
    ],
)
def test_wrong_usage(argv: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        synth(argv)
    assert caught.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("argv", [[], ["tiff"], ["reben", "--root", "x"], ["reben", "--on-error", "ignore"]])
def test_wrong_usage_of_shard(argv: list[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        shard(argv)
    assert caught.value.code == 2


@pytest.mark.parametrize(("command", "argv"), [(synth, []), (shard, []), (shard, ["reben"])])
def test_help_teaches(command: Callable[[list[str]], int], argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        command([*argv, "--help"])
    assert caught.value.code == 0
    printed = capsys.readouterr().out
    assert "example:\n  adagc s" in printed
    assert max(len(line) for line in printed.splitlines()) <= 120


def test_commands_import_little() -> None:
    code = "import sys, sharding.convert; print(*{'rasterio', 'torch', 'pyarrow', 'numpy'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "\n"


# What follows kills real processes.


def start(tree: Path, out: Path, *, shards: int) -> AbstractContextManager[subprocess.Popen[str]]:
    """It stands still when so many shards are there."""
    arguments = ["reben", "--root", str(tree), "--out", str(out), "--workers", "2", "--samples-per-shard", "5"]
    return running(held_command(out, shards, arguments))


def members_of_group(leader: int) -> dict[int, int]:
    """Process id -> that of its parent, of the group ``leader`` without itself; ended ones do not count."""
    found = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, parent, group = path.read_text().rpartition(")")[2].split()[:3]
        except (FileNotFoundError, ProcessLookupError):
            continue
        if int(group) == leader and state != "Z" and int(path.parent.name) != leader:
            found[int(path.parent.name)] = int(parent)
    return found


def test_sigkill_at_any_moment_then_the_same_bytes(whole_tree: Path, tmp_path: Path) -> None:
    expected, out = tmp_path / "expected", tmp_path / "shards"
    write_shards(RebenTree(whole_tree), expected, samples_per_shard=5, workers=0)
    with start(whole_tree, out, shards=0) as process:
        wait_for(process, lambda: any((out / ".partial").glob("*.tar.*")))  # within the first shard
        os.killpg(process.pid, signal.SIGKILL)
    check_unfinished(out, expected)
    with start(whole_tree, out, shards=3) as process:
        wait_for(process, lambda: shards_in(out) >= 3)
        process.kill()  # the parent alone: its workers have to notice
        end = time.monotonic() + 30
        while members_of_group(process.pid) and time.monotonic() < end:
            time.sleep(0.02)
        assert not members_of_group(process.pid)
    check_unfinished(out, expected)
    with start(whole_tree, out, shards=12) as process:
        wait_for(process, lambda: shards_in(out) >= 12)
        os.killpg(process.pid, signal.SIGKILL)
    check_unfinished(out, expected)
    write_shards(RebenTree(whole_tree), out, samples_per_shard=5, workers=0)
    assert digests(out) == digests(expected)


def check_unfinished(out: Path, expected: Path) -> None:
    """No manifest, and whatever has its final name is whole."""
    assert not (out / "manifest.json").exists()
    for path in out.glob("*.tar"):
        assert path.read_bytes() == (expected / path.name).read_bytes()


def test_a_worker_that_dies_is_an_error(whole_tree: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with start(whole_tree, out, shards=1) as process:
        wait_for(process, lambda: shards_in(out) >= 1)
        # the workers are children of the fork server, which is a child of the process itself
        workers = [pid for pid, parent in members_of_group(process.pid).items() if parent != process.pid]
        os.kill(workers[0], signal.SIGKILL)
        _, errors = process.communicate(timeout=30)
    assert process.returncode == 1
    assert "worker processes died without a word" in errors
    assert "Traceback" not in errors
    assert not (out / "manifest.json").exists()


def test_interrupt_ends_soon(whole_tree: Path, tmp_path: Path) -> None:
    with start(whole_tree, tmp_path / "out", shards=1) as process:
        wait_for(process, lambda: shards_in(tmp_path / "out") >= 1)
        os.killpg(process.pid, signal.SIGINT)
        _, errors = process.communicate(timeout=30)
        assert not members_of_group(process.pid)
    assert process.returncode == 130
    assert "interrupted; what was finished is kept" in errors
    assert "Traceback" not in errors
