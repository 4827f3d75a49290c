"""Real patches from the folder beside the checkout, through the commands a user types; skipped where it is absent."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from sharding.sources.geotiff import RebenTree
from sharding.writer import write_shards

SHARED = Path(__file__).parents[2] / "shared" / "data"
pytestmark = pytest.mark.skipif(not SHARED.is_dir(), reason="no real data beside the checkout")


def adagc(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "launch.cli", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Tree name -> its shards."""
    root = tmp_path_factory.mktemp("real")
    for tree in ("reben_mini", "reben_composites"):
        write_shards(RebenTree(SHARED / tree), root / tree, workers=0)
    return {folder.name: folder for folder in root.iterdir()}


@pytest.mark.parametrize(
    ("tree", "policy", "global_batch"),
    [
        ("reben_mini", "random", 5),
        pytest.param("reben_composites", "random", 16, marks=pytest.mark.long),
        ("reben_composites", "dominant", 16),
    ],
)
def test_two_epochs_on_two_ranks(
    tree: str, policy: str, global_batch: int, shards: dict[str, Path], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    settings = [f"data.shards={shards[tree]}", f"run.dir={run}", "data.workers=0", "engine.device=cpu"]
    settings += [f"spml.policy={policy}", f"optim.global_batch={global_batch}"]
    trained = adagc("train", "demo", *settings, "optim.epochs=2", "--nproc-per-node", 2)
    assert trained.returncode == 0, trained.stderr
    assert json.loads((run / "status.json").read_text())["state"] == "finished"
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["phase"] for line in lines] == ["warmup", "calibration"]
    assert lines[1]["loss/gc"] < 0


def test_dominant_without_maps_is_refused(shards: dict[str, Path], tmp_path: Path) -> None:
    settings = [f"data.shards={shards['reben_mini']}", f"run.dir={tmp_path / 'run'}", "optim.global_batch=5"]
    refused = adagc("train", "demo", *settings, "spml.policy=dominant")
    assert refused.returncode == 1
    assert "5 of the 5 rows of split 'train'" in refused.stderr
    assert "Traceback" not in refused.stderr
    assert not (tmp_path / "run").exists()
