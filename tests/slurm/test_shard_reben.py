"""`sbatch slurm/shard_reben.sh`: an array on two nodes, disturbed, writes what one machine writes."""

from pathlib import Path

import pytest

from sharding.sources.geotiff import RebenTree
from sharding.synthetic.tree import write_tree
from sharding.writer import write_shards
from tests.processes import wait_until
from tests.readback import digests
from tests.slurm.cluster import Cluster

CHECKOUT = Path(__file__).parents[2]
ROWS = 5


def test_the_array_writes_what_one_machine_writes(slurm: Cluster, tmp_path: Path) -> None:
    """One task is requeued, one cancelled and submitted again by its number, each among its shards."""
    tree, shards = tmp_path / "tree", tmp_path / "shards"
    write_tree(tree, 300, seed=8, workers=0)
    write_shards(RebenTree(tree), tmp_path / "expected", samples_per_shard=ROWS, workers=0)
    options = ["--cpus-per-task=1", f"--output={tmp_path}/%a.out"]
    env = {"REBEN_ROOT": str(tree), "ADAGC_SHARDS": str(shards), "ADAGC_PARTS": "4"}
    script = (CHECKOUT / "slurm" / "shard_reben.sh", "--samples-per-shard", str(ROWS))

    def submit(array: str) -> int:
        return slurm.sbatch(*script, options=[*options, f"--array={array}"], env=env, cwd=CHECKOUT)

    def writes(part: int) -> bool:
        return any((shards / ".partial" / f"part-{part}-of-4").glob("*.tar.*"))

    job = submit("0-3")
    wait_until(lambda: writes(1) and writes(2), "tasks 1 and 2 to be among their shards", 60)
    slurm.run("scontrol", "requeue", f"{job}_1")
    slurm.run("scancel", f"{job}_2")
    for task in (0, 1, 3):
        slurm.wait(f"{job}_{task}", "COMPLETED")
    assert slurm.job(f"{job}_1")["Restarts"] == "1"
    assert not (shards / "manifest.json").exists()

    slurm.wait(submit("2"), "COMPLETED")
    assert "300 patches (train " in (tmp_path / "2.out").read_text()
    assert digests(shards) == digests(tmp_path / "expected")


@pytest.mark.parametrize("options", [[], ["--array=0-15%4"], ["--array=3"]])
def test_the_script_can_be_submitted(slurm: Cluster, options: list[str]) -> None:
    told = slurm.run("sbatch", "--test-only", "--cpus-per-task=1", *options, CHECKOUT / "slurm" / "shard_reben.sh")
    assert "to start at" in told.stderr
