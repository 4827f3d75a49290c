"""A sharding in parts: real processes that share nothing but the folder, and the bytes of a single run."""

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping
from contextlib import AbstractContextManager, ExitStack
from functools import partial
from pathlib import Path

import pytest

from sharding.convert import shard
from sharding.partial import Part, Partial
from sharding.sources.archives import RebenArchives
from sharding.sources.geotiff import RebenTree
from sharding.sources.protocol import PatchError
from sharding.synthetic.tree import write_tree
from sharding.writer import Outcome, PartDone, write_part, write_shards
from tests.held import held_command, let_go, running, wait_for
from tests.readback import digests
from tests.test_sharding_partial import break_band

PATCHES = 60
ROWS = 5  # patches in a shard: 14 shards
COMMAND = "import sys; from sharding.convert import shard; sys.exit(shard(sys.argv[1:]))"
SCRIPT = Path(__file__).parents[1] / "slurm" / "shard_reben.sh"


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("parts") / "tree"
    write_tree(root, PATCHES, seed=8, workers=0)
    return root


@pytest.fixture(scope="module")
def expected(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Digest of every file that one run writes."""
    out = tmp_path_factory.mktemp("parts") / "shards"
    total = len(write_shards(RebenTree(tree), out, samples_per_shard=ROWS, workers=0).manifest.shards)
    found = digests(out)
    assert len(found) == total + 3
    return found


def arguments(tree: Path, out: Path, *more: str, workers: int = 0) -> list[str]:
    asked = ["reben", "--root", str(tree), "--out", str(out), "--samples-per-shard", str(ROWS)]
    return [*asked, "--workers", str(workers), *more]


def ended(process: subprocess.Popen[str]) -> tuple[int, str]:
    """Exit code and all that it printed."""
    output, errors = process.communicate(timeout=60)
    return process.returncode, output + errors


def write(tree: Path, out: Path, number: int, count: int, *, seed: int = 0) -> Outcome | PartDone:
    return write_part(RebenTree(tree), out, Part(number, count), seed=seed, samples_per_shard=ROWS, workers=0)


def test_three_at_once(tree: Path, expected: dict[str, str], tmp_path: Path) -> None:
    command = [sys.executable, "-c", COMMAND, *arguments(tree, tmp_path / "out")]
    with ExitStack() as stack:
        parts = [stack.enter_context(running([*command, "--part", f"{number}/3"])) for number in range(3)]
        told = [ended(process) for process in parts]
    assert [code for code, _ in told] == [0, 0, 0]
    assert digests(tmp_path / "out") == expected
    assert any("60 patches (train " in text for _, text in told)


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1)])
def test_one_after_the_other(tree: Path, expected: dict[str, str], tmp_path: Path, order: tuple[int, ...]) -> None:
    out = tmp_path / "out"
    total = len(expected) - 3
    there = 0
    for number in order[:2]:
        done = write(tree, out, number, 3)
        assert isinstance(done, PartDone)
        assert (done.shards, done.others, done.total) == (len(range(number, total, 3)), there, total)
        there += done.shards
        assert not (out / "manifest.json").exists()
    last = write(tree, out, order[2], 3)
    assert isinstance(last, Outcome)
    assert 0 < last.written < PATCHES
    assert digests(out) == expected
    again = write(tree, out, order[0], 3)
    assert isinstance(again, Outcome)
    assert again.written == 0
    assert digests(out) == expected


def test_a_killed_part_goes_on_beside_others(tree: Path, expected: dict[str, str], tmp_path: Path) -> None:
    """Killed within a shard; another part stands still meanwhile, within a shard as well."""
    out = tmp_path / "out"

    def under_way(number: int) -> list[Path]:
        return list((out / ".partial" / f"part-{number}-of-3").glob("*.tar.*"))

    commands = [held_command(out, 0, arguments(tree, out, "--part", f"{n}/3", workers=1)) for n in (0, 1)]
    with running(commands[0]) as killed, running(commands[1]) as stopped:
        for number, process in enumerate((killed, stopped)):
            wait_for(process, partial(under_way, number))
            os.killpg(process.pid, signal.SIGKILL if process is killed else signal.SIGSTOP)
        killed.communicate()
        stale, others = under_way(0), under_way(1)
        done = write(tree, out, 0, 3)
        assert isinstance(done, PartDone)
        assert done.written > 0
        assert not any(path.exists() for path in stale)
        assert under_way(1) == others  # those of a part at work are left to it
        let_go(out)
        os.killpg(stopped.pid, signal.SIGCONT)
        code, told = ended(stopped)
    assert code == 0, told
    assert "shards of other parts are to come" in told
    assert isinstance(write(tree, out, 2, 3), Outcome)
    assert digests(out) == expected


def test_the_last_two_end_at_the_same_moment(tree: Path, expected: dict[str, str], tmp_path: Path) -> None:
    """Both write their last shard, then finish: held up at that moment, and let go together."""
    ready, go = tmp_path / "ready", tmp_path / "go"
    code = (
        "import sys, time, pathlib, os\n"
        "from sharding import convert, writer\n"
        "ready, go = map(pathlib.Path, sys.argv[1:3])\n"
        "run = writer._run\n"
        "def held_up(*asked):\n"
        "    written = run(*asked)\n"
        "    ready.with_suffix(f'.{os.getpid()}').touch()\n"
        "    while not go.exists(): time.sleep(0.001)\n"
        "    return written\n"
        "writer._run = held_up\n"
        "for number in range(5):\n"
        "    ready, go = ready.with_name(f'ready{number}'), go.with_name(f'go{number}')\n"
        "    argv = [text.replace('OUT', str(number)) for text in sys.argv[3:]]\n"
        "    if convert.shard(argv): sys.exit(f'round {number} failed')\n"
    )
    outs = tmp_path / "out-OUT"
    argv = [sys.executable, "-c", code, str(ready), str(go), *arguments(tree, outs)]
    with running([*argv, "--part", "0/2"]) as first, running([*argv, "--part", "1/2"]) as second:
        for number in range(5):
            wait_for(first, lambda number=number: len(list(tmp_path.glob(f"ready{number}.*"))) == 2)
            (tmp_path / f"go{number}").touch()
        for process in (first, second):
            code, told = ended(process)
            assert code == 0, told
    for number in range(5):
        assert digests(tmp_path / f"out-{number}") == expected
        assert not (tmp_path / f"out-{number}" / ".partial").exists()


def test_one_that_comes_when_all_is_finished_writes_nothing(
    tree: Path, expected: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Requeued after its last shard: it sees an unfinished sharding, and next the last part clears that away."""
    out, begun = tmp_path / "out", Partial.begun
    write(tree, out, 0, 2)

    def late(self: Partial, settings: Mapping[str, object]) -> AbstractContextManager[None]:
        monkeypatch.setattr(Partial, "begun", begun)
        assert isinstance(write(tree, out, 1, 2), Outcome)
        return self.begun(settings)

    monkeypatch.setattr(Partial, "begun", late)
    again = write(tree, out, 0, 2)
    assert isinstance(again, Outcome)
    assert again.written == 0
    assert digests(out) == expected
    assert not (out / ".partial").exists()


def test_a_part_that_failed_may_skip_beside_others_that_stop(tree: Path, tmp_path: Path) -> None:
    root, out = tmp_path / "tree", tmp_path / "out"
    shutil.copytree(tree, root)
    broken, _ = break_band(root, 0)

    def write(number: int, *, skip: bool) -> Outcome | PartDone:
        return write_part(RebenTree(root), out, Part(number, 2), samples_per_shard=ROWS, workers=0, skip=skip)

    with pytest.raises(PatchError):
        write(0, skip=False)
    assert isinstance(write(0, skip=True), PartDone)
    last = write(1, skip=False)
    assert isinstance(last, Outcome)
    assert [item["patch"] for item in last.report["skipped"]] == [broken]


def test_more_parts_than_shards(tree: Path, expected: dict[str, str], tmp_path: Path) -> None:
    out = tmp_path / "out"
    found = [write(tree, out, number, 20) for number in (19, *range(19))]
    assert isinstance(found[0], PartDone)
    assert (found[0].shards, found[0].written) == (0, 0)
    assert sum(isinstance(one, Outcome) for one in found) >= 20 - (len(expected) - 3)
    assert digests(out) == expected


def test_the_same_part_twice_is_refused(tree: Path, tmp_path: Path) -> None:
    with Partial(tmp_path / "out", Part(1, 3)).begun({}):
        with pytest.raises(ValueError, match=r"another run is writing part 1/3 to .*: wait for it, or end it"):
            write(tree, tmp_path / "out", 1, 3)
        with Partial(tmp_path / "out", Part(2, 3)).begun({}):
            pass


def test_a_whole_run_and_parts_exclude_each_other(
    tree: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with Partial(tmp_path / "out", Part(1, 3)).begun({}):
        assert shard(arguments(tree, tmp_path / "out")) == 1
        assert "another run is writing to" in capsys.readouterr().err
    with Partial(tmp_path / "other").begun({}):
        assert shard(arguments(tree, tmp_path / "other", "--part", "0/3")) == 1
        assert "a run without --part is writing to" in capsys.readouterr().err


def test_other_settings_or_parts_are_refused(tree: Path, expected: dict[str, str], tmp_path: Path) -> None:
    out = tmp_path / "out"
    write(tree, out, 0, 3)
    with pytest.raises(ValueError, match="seed was 0 and is now 1"):
        write(tree, out, 1, 3, seed=1)
    with pytest.raises(ValueError, match=r"was begun in 3 parts, this is part 0/2. Use the same number, or remove"):
        write(tree, out, 0, 2)
    write_shards(RebenTree(tree), out, samples_per_shard=ROWS, workers=0)  # one machine may take over what parts began
    assert digests(out) == expected
    with pytest.raises(ValueError, match="seed was 0 and is now 1"):
        write(tree, out, 1, 3, seed=1)


def test_without_locks_and_links(
    tree: Path, expected: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On such a file system parts still work, and what finishes first may clear the folder away under the others."""

    def refuse(*asked: object) -> None:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr("fcntl.flock", refuse)
    monkeypatch.setattr(Path, "hardlink_to", refuse)
    out = tmp_path / "out"
    write(tree, out, 0, 2)

    class Late(RebenTree):
        def read(self, key, labels_C):  # type: ignore[no-untyped-def]  # as in the parent
            monkeypatch.setattr(RebenTree, "read", read)
            assert isinstance(write(tree, out, 1, 2), Outcome)  # the same part, on another host, was faster
            return read(self, key, labels_C)

    read = RebenTree.read
    late = write_part(Late(tree), out, Part(1, 2), samples_per_shard=ROWS, workers=0)
    assert isinstance(late, Outcome)
    assert digests(out) == expected


def test_archives_in_parts(tree: Path, expected: dict[str, str], tmp_path: Path) -> None:
    for name in ("BigEarthNet-S2", "Reference_Maps"):
        subprocess.run(["tar", "-C", str(tree), "-cf", str(tmp_path / f"{name}.tar"), name], check=True)
    (tmp_path / "metadata.parquet").symlink_to(tree / "metadata.parquet")
    out = tmp_path / "out"
    for number in (1, 0):
        part = Part(number, 2)
        source = RebenArchives(tmp_path, Partial(out, part).own / "staged")
        write_part(source, out, part, samples_per_shard=ROWS, workers=0, staging=source)
    assert digests(out) == expected


@pytest.mark.parametrize("text", ["3", "3/3", "-1/3", "1/0", "a/b", "1/2/3"])
def test_wrong_parts(tree: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str) -> None:
    with pytest.raises(SystemExit):
        shard(arguments(tree, tmp_path / "out", f"--part={text}"))
    assert f"{text!r} is no part: I/N, with I from 0 to N-1" in capsys.readouterr().err


def run_script(out: Path, *more: str, **variables: str) -> subprocess.CompletedProcess[str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
    given = {"ADAGC_PYTHON": sys.executable, "ADAGC_SHARDS": str(out)}
    command = ["bash", str(SCRIPT), "--samples-per-shard", str(ROWS), *more]
    return subprocess.run(command, env=kept | given | variables, capture_output=True, text=True, timeout=60)


def test_the_script(tree: Path, expected: dict[str, str], tmp_path: Path) -> None:
    """As Slurm runs a task of an array; and without Slurm."""
    out = tmp_path / "out"
    array = {"SLURM_ARRAY_TASK_ID": "1", "SLURM_ARRAY_TASK_MAX": "1", "SLURM_CPUS_PER_TASK": "1"}
    done = run_script(out, REBEN_ROOT=str(tree), ADAGC_PARTS="2", **array)
    assert done.returncode == 0, done.stderr
    assert "part 1/2: its 7 of 14 shards are written" in done.stdout
    assert isinstance(write(tree, out, 0, 2), Outcome)
    assert digests(out) == expected
    alone = run_script(tmp_path / "alone", "--workers", "0", REBEN_ROOT=str(tree))
    assert alone.returncode == 0, alone.stderr
    assert digests(tmp_path / "alone") == expected


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({}, "set REBEN_ROOT (a tree) or REBEN_ARCHIVES (as downloaded), and ADAGC_SHARDS"),
        ({"REBEN_ROOT": "/a", "REBEN_ARCHIVES": "/b"}, "--archives: not allowed with argument --root"),
        ({"REBEN_ROOT": "/a", "ADAGC_PYTHON": "no-such-thing"}, "no-such-thing does not have adagc-dist: submit from"),
        (
            {"REBEN_ROOT": "/a", "SLURM_ARRAY_TASK_ID": "1", "SLURM_ARRAY_TASK_MAX": "16"},
            "the array goes to 16, for 16 parts: ADAGC_PARTS=N sbatch --array=0-$((N-1))",
        ),
    ],
)
def test_the_script_refuses(tmp_path: Path, variables: dict[str, str], message: str) -> None:
    done = run_script(tmp_path / "out", **variables)
    assert done.returncode == 2
    assert message in done.stderr
    assert not (tmp_path / "out").exists()
