"""Reports and findings as people read them: what is well, a line each, and then what is not."""

import re
from collections.abc import Iterator, Sequence

from launch.doctor.compare import Finding, describe_gpus, join_hosts, size_of
from launch.doctor.report import NodeReport

__all__ = ["describe"]


def describe(reports: Sequence[NodeReport], findings: Sequence[Finding]) -> str:
    """Lines for what is well, equal ones of several nodes as one; then those of the findings, errors last."""
    wrong = {(finding.host, finding.check) for finding in findings}
    well: dict[tuple[str, str], list[str]] = {}
    for report in sorted(reports, key=lambda report: report.host):
        for check, text in _facts(report, alone=len(reports) == 1):
            if (report.host, check) not in wrong:
                well.setdefault((check, text), []).append(report.host)
    several = len(reports) > 1
    lines = [_line("ok", text, hosts if several else []) for (_, text), hosts in well.items()]
    return "\n".join([*lines, *_told(findings)])


def _told(findings: Sequence[Finding]) -> Iterator[str]:
    """The same finding on several nodes once."""
    same: dict[tuple[str, str, str], list[str]] = {}
    for finding in sorted(findings, key=lambda finding: finding.severity, reverse=True):
        remedy = re.sub(rf"\b{re.escape(finding.host)}\b", "HOST", finding.remedy)
        same.setdefault((finding.severity, finding.what, remedy), []).append(finding.host)
    for (severity, what, remedy), hosts in same.items():
        label = "ERROR" if severity == "error" else severity
        yield f"{label:<8}{join_hosts(hosts)}: {what.rstrip('.')}. Remedy: {remedy.replace('HOST', ','.join(hosts))}"


def _line(label: str, text: str, hosts: Sequence[str]) -> str:
    return f"{label:<8}{text}" + (f"    ({len(hosts)} node(s): {join_hosts(hosts)})" if hosts else "")


def _facts(report: NodeReport, *, alone: bool) -> Iterator[tuple[str, str]]:
    """(check, text); of several nodes only what those of one kind have in common."""
    if report.software is not None:
        yield "versions", ", ".join(f"{name} {version}" for name, version in report.software.versions.items())
        driver = f", driver {report.gpus[0].driver}" if report.gpus else ""
        yield "gpus", f"GPUs: {describe_gpus(report.gpus)}, {report.software.gpus} for torch{driver}"
    machine = report.machine
    if machine is not None:
        used = machine.interface
        speed = f", {used.megabits} Mbit/s" if used is not None and used.megabits > 0 else ""
        address = f" {used.address}" if used is not None and alone else ""
        yield "network", "network: " + (f"{used.name}{address}{speed}" if used is not None else "this machine alone")
        yield (
            "cores",
            f"{machine.cores} cores for {report.ranks} rank(s) with {report.workers} reading process(es) each",
        )
    for room in report.rooms:
        free = f"{size_of(room.free)} free" if alone else "enough"
        yield room.name, f"{room.name}: {free} in {room.where}, {size_of(room.needed)} needed"
    if report.shards is not None:
        yield "shards", f"shards {report.shards.digest}: {report.shards.what if alone else 'a row or shard on each'}"
