"""The commands that produce the full tables, as the shipped grids write them down: Slurm takes the job, and `adagc
compare` the words.
"""

import shlex
from pathlib import Path

import pytest

from tests.slurm.cluster import Cluster
from tuning.compare import main
from tuning.grid import load_grid

CHECKOUT = Path(__file__).parents[2]
EPOCHS, SEEDS, TRAIN_ROWS = 60, 3, 90
ALIKE = {"reben": 1, "aid": 0}  # cells whose run another one is: the bound of the second setting


@pytest.mark.parametrize("grid", ALIKE)
def test_slurm_and_the_comparison_take_the_command_of_a_full_table(
    slurm: Cluster, tiny_shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], grid: str
) -> None:
    sbatch, script, words = _command(grid)
    options = [word for word in sbatch if not word.startswith("--gpus")]  # the test cluster has none
    tried = slurm.run("sbatch", "--test-only", *options, CHECKOUT / script, *words, cwd=CHECKOUT)
    assert "to start at" in tried.stderr
    assert f"using {2 * int(options[0].removeprefix('--nodes='))} processors on nodes" in tried.stderr
    assert not slurm.run("squeue", "--noheader").stdout

    assert words[:3] == ["adagc", "compare", grid]
    named = {"data.shards": f"data.shards={tiny_shards}", "compare/": str(tmp_path / "out")}
    asked = [next((new for old, new in named.items() if word.startswith(old)), word) for word in words[2:]]
    assert main([*asked, "--dry-run"], {}) == 0
    cells = len(load_grid(grid).cells)
    trained = SEEDS * (cells - ALIKE[grid])
    assert capsys.readouterr().out.splitlines()[-1] == (
        f"{SEEDS * cells} runs, {trained} to be trained, {trained * EPOCHS * TRAIN_ROWS} rows in all; measured on test"
    )
    assert not (tmp_path / "out").exists()


def _command(grid: str) -> tuple[list[str], str, list[str]]:
    """Options of sbatch, its script and the script's words, from the grid's first lines."""
    lines = (CHECKOUT / "tuning" / "grids" / f"{grid}.yaml").read_text().splitlines()
    first = next(number for number, line in enumerate(lines) if "sbatch" in line)
    command = " ".join(line.removeprefix("#").removesuffix("\\") for line in lines[first : first + 2])
    before, _, after = command.partition("sbatch ")
    assert before.strip() == f"ADAGC_SWEEP=compare/{grid}"
    words = shlex.split(after)
    script = next(number for number, word in enumerate(words) if word.endswith(".sh"))
    return words[:script], words[script], words[script + 1 :]
