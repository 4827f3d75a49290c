"""A job's first step: `adagc doctor` on all nodes at once, and what their ranks' links can do."""

from collections.abc import Sequence
from pathlib import Path

from adagc_dist.config import Config
from launch.cluster.postmortem import explain
from launch.cluster.slurm import JobControl
from launch.cluster.steps import Steps
from launch.doctor.command import collect, compare, describe

__all__ = ["preflight"]

_REPORT_SECONDS = 150  # each check has a deadline of its own


def preflight(steps: Steps, config: Config, words: Sequence[str], logs: Path, attempt: int = 1) -> str:
    """Look the nodes over and show what was found; says what forbids to start, or nothing.

    Args:
        words: recipe and overrides, as the ranks will get them.
        logs: this start's folder, on the nodes' shared file system.
        attempt: of this start; has a folder of its own.
    """
    hosts = steps.allocation.hosts
    token = logs / "seen-by-all-nodes"
    token.touch()
    options = ["--nproc-per-node", str(steps.ranks), "--peer", JobControl.address(hosts[0])]
    options += ["--token", str(token.relative_to(config.run_path.parent))]
    with steps.lines("launch.doctor.command", ["--node", *words, *options], seconds=_REPORT_SECONDS) as lines:
        reports = list(collect(lines))
    token.unlink()
    findings = compare(reports, hosts)
    print(describe(reports, findings), flush=True)
    if any(finding.severity == "error" for finding in findings):
        return "the preflight has found errors, told above"
    if len(hosts) * steps.ranks == 1:
        return ""
    links = logs / f"links{attempt}"
    links.mkdir()
    device = ["--device", config.engine.device]
    if steps.run_ranks("launch.doctor.links", device, name=f"{logs.name}.{links.name}", logs=links):
        return f"the ranks cannot work together: {explain(links, hosts)}"
    return ""
