"""The first process of a node: starts its slurmd, adopts and reaps what daemonises there, and dies with its starter.
All that runs on the node descends from it, and it lives until the last of them has ended.

Run as a script: keeper.py COMMAND...
"""

import contextlib
import ctypes
import os
import signal
import subprocess
import sys

_SET_DEATH_SIGNAL, _SET_CHILD_SUBREAPER = 1, 36  # linux/prctl.h


def main() -> None:
    prctl = ctypes.CDLL(None).prctl
    prctl(_SET_CHILD_SUBREAPER, 1)  # slurmstepd daemonises and would leave the node's tree
    subprocess.Popen(sys.argv[1:], preexec_fn=lambda: prctl(_SET_DEATH_SIGNAL, signal.SIGKILL))
    with contextlib.suppress(ChildProcessError):
        while True:
            os.wait()


if __name__ == "__main__":
    main()
