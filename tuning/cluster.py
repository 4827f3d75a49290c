"""`python -m tuning.cluster --dir SWEEP -- COMMAND ...`: a Ray cluster over the nodes of a job, and COMMAND on it.

What slurm/tune_reben.sh execs. It starts Ray on each node, runs COMMAND on the first with RAY_ADDRESS set, turns
Slurm's signal into SIGTERM for COMMAND, and puts the job back into the queue if COMMAND has saved, or if Ray or COMMAND
was killed. Without Slurm the cluster is this machine.
"""

import argparse
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from launch.cluster.requeue import End, Limits, Start, StartLog, Verdict, add_limits, confirmed, decide
from launch.cluster.slurm import Allocation, JobControl, SlurmError
from launch.supervise import supervise
from sharding.arguments import make_parser, positive, target
from tuning.head import INTERRUPTED, UNREADY
from tuning.ray_process import die_with_parent, ray_environment
from tuning.record import TrialsFolder
from tuning.rendezvous import Rendezvous

__all__ = ["SweepJob", "main", "reached"]

_END_SECONDS = 90  # for the nodes, when they are told to end

_EPILOG = """\
COMMAND finds Ray by ray.init(); it is asked to stop by SIGTERM, saves, and ends with 75 to be run again. It is
asked, and run again in any case, where Ray was killed on a node; and run again where COMMAND itself was killed.

Exit codes: COMMAND's; 0 finished, 75 stopped and to be continued by submitting it again, 2 wrong usage; 1 Ray was lost.
SWEEP/logs holds what Ray said on every node. `touch SWEEP/STOP` stops it, and it is not requeued.
"""


def main(argv: Sequence[str], env: Mapping[str, str]) -> int:
    """Run the sweep that the arguments describe where the environment says; returns its exit code."""
    arguments = _parser().parse_args(argv)
    command: list[str] = arguments.command[1:] if arguments.command[:1] == ["--"] else arguments.command
    if not command or shutil.which(command[0]) is None:
        told = f"{command[0]} is not a command here" if command else "no command"
        print(f"tuning.cluster: {told}; write it after --dir SWEEP --", file=sys.stderr)
        return 2
    arguments.command, arguments.dir = command, arguments.dir.absolute()
    try:
        (arguments.dir / "logs").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        print(f"tuning.cluster: --dir {arguments.dir} cannot be made ({error.strerror})", file=sys.stderr)
        return 2
    allocation = None
    if "SLURM_JOB_ID" in env:
        try:
            allocation = Allocation.from_env(env, JobControl.hosts(env["SLURM_JOB_NODELIST"]))
        except (ValueError, SlurmError) as error:
            print(f"tuning.cluster: {error}", file=sys.stderr)
            return 2
    return SweepJob(arguments, allocation, env).run()


class SweepJob:
    """One start of a sweep: on all nodes of an allocation, or without one on this machine."""

    def __init__(self, arguments: argparse.Namespace, allocation: Allocation | None, env: Mapping[str, str]) -> None:
        self._arguments, self._allocation = arguments, allocation
        self._name = allocation.start if allocation else f"local.{os.getpid()}"
        self._sweep: Path = arguments.dir
        self._rendezvous = Rendezvous(self._sweep / "logs" / self._name)
        others = {name: value for name, value in env.items() if name != "RAY_ADDRESS"}  # another cluster's
        self._env = others | ray_environment(self._rendezvous.token)
        self._hosts = allocation.hosts if allocation else (socket.gethostname(),)
        self._control = JobControl(allocation.name) if allocation else None

    def run(self) -> int:
        """From the cluster's start to the verdict; returns the exit code."""
        start = Start(self._name.partition(".")[0], self._restarts, reached(self._sweep), self._hosts, time.time())
        log = StartLog(self._sweep)
        log.begin(start)
        self._tell(f"start {self._name} on {', '.join(self._hosts)}: {shlex.join(self._arguments.command)}")
        self._rendezvous.open()
        try:
            code = supervise(self._rendezvous.folder, self._step)
        finally:
            self._rendezvous.close()
        now = reached(self._sweep)
        idle = 0 if now is None or now != start.found else log.idle(start.job, now)
        verdict = self._decide(code, idle)
        log.end(start, verdict, now)
        self._tell(verdict.why)
        if verdict.requeue and self._control:
            self._requeue(self._control)
        return verdict.code

    @property
    def _restarts(self) -> int:
        return self._allocation.restarts if self._allocation else 0

    def _step(self) -> int:
        """All nodes' parts; returns an exit code as supervise wants it."""
        allocation, arguments = self._allocation, self._arguments
        others = self._hosts[1:]
        command = [
            *(sys.executable, "-m", "tuning.step", "--sweep", str(self._sweep)),
            *("--folder", str(self._rendezvous.folder), "--hosts", ",".join(self._hosts)),
            *(("--peer", JobControl.address(others[0])) if others else ()),
            *("--join-seconds", str(arguments.join_seconds)),
            *(("--object-store", str(arguments.object_store)) if arguments.object_store else ()),
            *arguments.command,
        ]
        words = allocation.step(command) if allocation else command
        # a session of its own: a terminal's Ctrl-C is this process's
        with subprocess.Popen(words, env=self._env, start_new_session=True, preexec_fn=die_with_parent) as step:
            try:
                step.wait()
            except BaseException:
                step.terminate()
                with suppress(subprocess.TimeoutExpired):
                    step.wait(_END_SECONDS)
                step.kill()
                raise
        # what the head has said counts, however srun has ended the others
        return 0 if self._rendezvous.status().get("state") in ("finished", "stopped") else 1

    def _decide(self, code: int, idle: int) -> Verdict:
        status = self._rendezvous.status()
        state, reason = status.get("state"), str(status.get("reason", "lost a node, or it did not start its part"))
        if state == INTERRUPTED:
            code = int(str(status["code"]))
        ready = state != UNREADY and (state != "running" or "address" in status)
        if code == 1 and (state == "failed" or not (ready or self._restarts)):
            return Verdict(False, int(str(status.get("code", 1))), f"failed: {reason}")
        if code == 1:
            self._say(f"{reason}; what Ray has said is in {self._rendezvous.folder}")
        limits = Limits(self._arguments.max_restarts, self._arguments.max_idle)
        end = End(code, status, loss=reason.partition("\n")[0])
        verdict = decide(end, restarts=self._restarts, idle=idle, limits=limits)
        if self._control is not None:
            return confirmed(verdict, self._control)
        if verdict.requeue:
            return replace(verdict, requeue=False, why=f"{verdict.why.partition('; ')[0]}; start it again to go on")
        return verdict

    def _requeue(self, control: JobControl) -> None:
        """Slurm ends this process for it."""
        try:
            control.requeue()
        except SlurmError as error:
            self._tell(f"it could not be requeued ({error}): submit it again to go on")

    def _say(self, text: str) -> None:
        print(f"{time.strftime('%H:%M:%S')} tuning.cluster: {text}", flush=True)

    def _tell(self, text: str) -> None:
        self._say(text)
        if self._control:
            self._control.comment(f"adagc: {text.splitlines()[0]}"[:200])


def reached(sweep: Path) -> list[int] | None:
    """How far COMMAND is: of a sweep [epochs, steps] of its trials' newest checkpoints, summed; of another command when
    it last wrote in ``sweep``. None where it has written nothing there, or elsewhere.
    """
    if any((sweep / name).is_file() for name in ("sweep.json", "compare.json")):
        newest = [_newest(trial.path / "checkpoints") for trial in TrialsFolder(sweep).trials()]
        return [sum(epoch for epoch, _ in newest), sum(step for _, step in newest)]
    written = []
    for folder, folders, files in os.walk(sweep):
        if Path(folder) == sweep and "logs" in folders:
            folders.remove("logs")
        for file in files:
            with suppress(OSError):  # deleted meanwhile
                written.append(os.stat(os.path.join(folder, file)).st_mtime_ns)
    return [max(written)] if written else None


def _newest(checkpoints: Path) -> tuple[int, int]:
    """(epoch, step) of the newest that is complete, as its name tells."""
    markers = checkpoints.glob("epoch-[0-9]*-step-[0-9]*/COMPLETE.json")
    numbers = (re.findall(r"\d+", marker.parent.name) for marker in markers)
    return max(((int(epoch), int(step)) for epoch, step, *_ in numbers), default=(0, 0))


def _parser() -> argparse.ArgumentParser:
    description = "Run a command on a Ray cluster: under Slurm over all nodes of the allocation, else this machine."
    parser = make_parser("python -m tuning.cluster", description, _EPILOG)
    parser.add_argument("--dir", type=target, required=True, metavar="SWEEP", help="the sweep's folder, for all nodes")
    add_limits(parser, idle="with nothing newer than before in SWEEP")
    text = "how long the nodes wait for each other at the start (300)"
    parser.add_argument("--join-seconds", type=positive, default=300, metavar="S", help=text)
    text = "Ray's object store on each node (default: a tenth of the memory, at most 1 GB)"
    parser.add_argument("--object-store", type=positive, metavar="BYTES", help=text)
    parser.add_argument("command", nargs=argparse.REMAINDER, metavar="COMMAND", help="with its arguments, after --")
    return parser


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], os.environ))  # noqa: TID251  # passed on as a value
