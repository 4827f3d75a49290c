"""Ranks under torchrun's launcher, where nobody supervises them (`adagc evaluate --nproc-per-node`)."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.test_launch_stop import lives, wait_until

COMMAND = """
import sys, launch.spawn
sys.exit(launch.spawn.run_ranks("tests.test_launch_spawn", sys.argv[1:], ranks=2))
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_the_launcher_ends_its_ranks(tmp_path: Path, number: signal.Signals) -> None:
    """They are in sessions of their own: nobody else would."""
    launcher = subprocess.Popen([sys.executable, "-c", COMMAND, str(tmp_path)], cwd=Path(__file__).parents[1])
    with launcher:
        wait_until(lambda: len(list(tmp_path.iterdir())) == 2, 60)
        ranks = [int(path.name) for path in tmp_path.iterdir()]
        launcher.send_signal(number)
        assert launcher.wait(60) == 128 + number
    wait_until(lambda: not any(map(lives, ranks)), 5)


if __name__ == "__main__":  # a rank
    Path(sys.argv[1], str(os.getpid())).touch()
    time.sleep(120)
