"""What reports of nodes mean for a run: each node by itself, then all against each other. Pure functions.

Where nodes differ, those are named that differ from most others; of two, the one that differs from the first.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Literal

from launch.doctor.report import Gpu, NodeReport

__all__ = ["Finding", "Severity", "compare", "describe_gpus", "join_hosts", "size_of"]

Severity = Literal["error", "warning"]

_OPEN_FILES = 4096  # a socket per rank and group, two descriptors a reading process, 256 open shards a reader
_BUSY = 0.1  # of a GPU's memory: a driver alone takes 0.5 GB
_SKEW_SECONDS = 2.0
_SLOW_IMPORT = 30.0  # seconds
_WEAK = ("driver",)  # versions that may differ, if they must


@dataclass(frozen=True)
class Finding:
    """Something wrong: an error is in the way of the run, a warning makes it slower or harder to understand.

    Attributes:
        check: what was looked at, as in ``NodeReport.failed``.
    """

    severity: Severity
    host: str
    what: str
    remedy: str
    check: str


def compare(reports: Sequence[NodeReport], expected_hosts: Sequence[str]) -> list[Finding]:
    """What is wrong with nodes, and between them, in the order of ``expected_hosts``.

    Args:
        reports: from the nodes that answered, in any order.
        expected_hosts: all that should have, by the names that they report.
    """
    by_host = {report.host: report for report in reports}
    order = [*expected_hosts, *(host for host in by_host if host not in expected_hosts)]
    answered = [by_host[host] for host in order if host in by_host]
    findings = [_absent(host) for host in expected_hosts if host not in by_host]
    for report in answered:
        findings += _alone(report)
    if len(answered) > 1:
        findings += _together(answered)
    return sorted(findings, key=lambda finding: (finding.severity, order.index(finding.host)))


def _absent(host: str) -> Finding:
    remedy = f"`scontrol show node {host}` tells its state; go on without it by `sbatch --exclude={host}`"
    return Finding("error", host, "gave no report: it is down, hangs, or could not start python", remedy, "report")


# one node


def _alone(report: NodeReport) -> Iterator[Finding]:
    def found(severity: Severity, check: str, what: str, remedy: str) -> Finding:
        return Finding(severity, report.host, what, remedy, check)

    yield from _failures(report)
    yield from _gpu_findings(report)
    machine = report.machine
    if machine is not None:
        processes = report.ranks * (1 + report.workers)
        if machine.cores < processes:
            yield found(
                "warning", "cores",
                f"{machine.cores} core(s) for {report.ranks} rank(s) with {report.workers} reading process(es) each",
                f"--cpus-per-task={processes} (srun needs it, too), or a smaller data.workers",
            )  # fmt: skip
        if machine.open_files < _OPEN_FILES:
            remedy = "`ulimit -n` in the job, or the site's limits (PropagateResourceLimits of Slurm)"
            yield found("warning", "limits", f"a process may open {machine.open_files} files only", remedy)
        if machine.infiniband and machine.locked_memory is not None:
            yield found(
                "warning", "limits",
                f"a process may lock {machine.locked_memory} bytes: InfiniBand needs more",
                "`ulimit -l unlimited` in the job, or the site's limits (PropagateResourceLimitsExcept=MEMLOCK)",
            )  # fmt: skip
    for room in report.rooms:
        if room.free < room.needed:
            what = f"{size_of(room.free)} free in {room.where}, {size_of(room.needed)} needed: {room.reason}"
            yield found("error" if room.must else "warning", room.name, f"{room.name}: {what}", _ROOM_REMEDY[room.name])
    if report.software is not None and report.software.import_seconds > _SLOW_IMPORT:
        what = f"torch took {report.software.import_seconds:.0f} s to import"
        yield found("warning", "software", what, "an environment in a container image, or on the nodes' own disks")
    if report.run is not None and report.run.token is False:
        yield found(
            "error", "run",
            f"{report.run.path} is not the same folder as on the first node: a file that was written there is absent",
            "give a run.dir on a file system that all nodes share",
        )  # fmt: skip


_ROOM_REMEDY = {
    "run.dir": "free space, give another run.dir, or a smaller run.keep_checkpoints",
    "data.cache": "free space, give data.cache on another disk, or a smaller data.window_shards",
    "memory": "ask for more (--mem), or a smaller data.workers or data.prefetch",
    "shared memory": "a container is to be started with more (--shm-size=1g, or --ipc=host)",
}


def _failures(report: NodeReport) -> Iterator[Finding]:
    for check, error in report.failed.items():
        if error.startswith("not tried"):
            continue  # the cause is told
        hangs = error.startswith("no answer")
        remedy = f"something hangs there: go on without it by `sbatch --exclude={report.host}`" if hangs else ""
        yield Finding("error", report.host, f"{check}: {error}", remedy or _FAILURE_REMEDY[check], check)


_FAILURE_REMEDY = {
    "settings": "give a recipe that every node sees",
    "machine": "look at the node",
    "gpus": "the driver is out of order: leave the node out (`sbatch --exclude=HOST`) and tell the site",
    "software": "give all nodes the same environment: a container, or one on a shared file system",
    "model": "give a model.name that timm knows, and weights that every node sees",
    "cache": "give a data.cache that can be written to, on a disk of the node",
    "shards": "give shards that every node can read (`adagc verify` looks at all of them)",
    "run": "give a run.dir that every node can write to",
}


def _gpu_findings(report: NodeReport) -> Iterator[Finding]:
    """As ``World.device`` will decide."""
    if report.device == "cpu" or report.software is None:
        return
    usable, there = report.software.gpus, len(report.gpus)

    def found(severity: Severity, what: str, remedy: str) -> Finding:
        return Finding(severity, report.host, what, remedy, "gpus")

    if there > usable:
        remedy = "a torch for this driver's CUDA (`nvidia-smi` tells), the GPUs in the container, or engine.device=cpu"
        yield found("error", f"{there} GPU(s), of which torch can use {usable}", remedy)
    elif usable < report.ranks and (usable or report.device == "cuda"):
        remedy = f"--gpus-per-node={report.ranks}, or as many ranks as GPUs (--nproc-per-node)"
        yield found("error", f"{usable} usable GPU(s) for {report.ranks} rank(s)", remedy)
    for number, gpu in enumerate(report.gpus):
        what = f"GPU {number} is in use: {gpu.used} of {gpu.memory} MiB, {gpu.processes} process(es)"
        if gpu.used > _BUSY * gpu.memory:
            yield found("error", what, f"end what computes there, or `sbatch --exclude={report.host}`")
        elif gpu.processes:
            yield found("warning", what, "it will be slow while others compute there")


# all nodes


def _together(reports: Sequence[NodeReport]) -> Iterator[Finding]:
    yield from _versions(reports)
    for check, name, severity, value, remedy in _EQUAL:
        values = {report.host: value(report) for report in reports}
        yield from _odd({h: v for h, v in values.items() if v is not None}, check, name, severity, remedy)
    for report in reports:
        if report.machine is not None and report.machine.interface is None:
            what = "no network interface towards the other nodes is up"
            remedy = f"GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME name one, or `sbatch --exclude={report.host}`"
            yield Finding("error", report.host, what, remedy, "network")
    yield from _clocks(reports)


def _versions(reports: Sequence[NodeReport]) -> Iterator[Finding]:
    known = {report.host: _versions_of(report) for report in reports if report.software is not None}
    for name in dict.fromkeys(name for versions in known.values() for name in versions):
        values = {host: versions.get(name, "none") for host, versions in known.items()}
        severity: Severity = "warning" if name in _WEAK else "error"
        yield from _odd(values, "versions", name, severity, _VERSION_REMEDY.get(name, _FAILURE_REMEDY["software"]))


_VERSION_REMEDY = {
    "code": "all nodes must run the same checkout: install it on a shared file system, or update that copy",
    "settings": "all nodes must read the same recipe: give its path on a shared file system",
    "driver": "nodes of one kind only (`--constraint=`); other versions mostly do, too",
}


def _versions_of(report: NodeReport) -> dict[str, str]:
    own = {} if report.software is None else report.software.versions
    return own | ({"driver": report.gpus[0].driver} if report.gpus else {})


def _gpu_names(report: NodeReport) -> str | None:
    return None if "gpus" in report.failed else describe_gpus(report.gpus)


def describe_gpus(gpus: Sequence[Gpu]) -> str:
    counts = Counter(f"{gpu.name} of {gpu.memory} MiB" for gpu in gpus)
    return ", ".join(f"{count} x {name}" for name, count in counts.items()) or "none"


def _usable_gpus(report: NodeReport) -> str | None:
    return None if report.software is None else str(report.software.gpus)


def _interface(report: NodeReport) -> str | None:
    chosen = None if report.machine is None else report.machine.interface
    return None if chosen is None else chosen.name


def _speed(report: NodeReport) -> str | None:
    chosen = None if report.machine is None else report.machine.interface
    return f"{chosen.megabits} Mbit/s" if chosen is not None and chosen.megabits > 0 else None


def _digest(report: NodeReport) -> str | None:
    return None if report.shards is None else report.shards.digest


_KIND = "nodes of one kind only: `--constraint=`, or `sbatch --exclude=HOST`"
_EQUAL: tuple[tuple[str, str, Severity, Callable[[NodeReport], str | None], str], ...] = (
    ("gpus", "GPUs", "error", _gpu_names, _KIND),
    ("gpus", "GPUs that torch can use:", "error", _usable_gpus, _KIND),
    ("shards", "manifest digest", "error", _digest, "give all nodes the same shards: copy them there again"),
    ("network", "interface", "warning", _interface, "GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME name the right one"),
    ("network", "interface of", "warning", _speed, "a cable or a port has fallen back: tell the site"),
)


def _odd(values: Mapping[str, str], check: str, name: str, severity: Severity, remedy: str) -> Iterator[Finding]:
    """A finding for each host that does not have the usual value."""
    if len(set(values.values())) < 2:
        return
    usual = Counter(values.values()).most_common(1)[0][0]  # of equals the first, which is the first host's
    others = [host for host, value in values.items() if value == usual]
    for host, value in values.items():
        if value != usual:
            what = f"{name} {value}, but {usual} on {join_hosts(others)}"
            yield Finding(severity, host, what, remedy.replace("HOST", host), check)


def _clocks(reports: Sequence[NodeReport]) -> Iterator[Finding]:
    """Each node's clock as its line was sent, against the collector's as it came; the median of them is right."""
    offsets = {report.host: report.clock - report.arrived for report in reports if report.arrived}
    usual = median([0.0, *offsets.values()])  # the collector's own clock counts as one: else none of two is right
    for host, offset in offsets.items():
        if abs(offset - usual) > _SKEW_SECONDS:
            what = f"its clock is {abs(offset - usual):.1f} s {'ahead of' if offset > usual else 'behind'} the others'"
            remedy = "`chronyc tracking` there, and tell the site: logs and the ages of files and of STOP are wrong"
            yield Finding("warning", host, what, remedy, "clock")


def join_hosts(hosts: Sequence[str]) -> str:
    shown = ", ".join(hosts[:4])
    return f"{shown} and {len(hosts) - 4} more" if len(hosts) > 4 else shown


def size_of(count: int) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"
