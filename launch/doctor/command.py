"""`adagc doctor [RECIPE [section.key=value ...]]`: is this machine, and is every node of a job, fit for a run?

As a job's first step, `python -m launch.doctor.command --node` runs on every node and prints lines of JSON; whoever
started it hands them to ``collect``, the reports to ``compare``, and shows what ``describe`` makes of both. Then
the ranks of ``launch.doctor.links`` sum something up.
"""

import argparse
import os
import sys
from collections.abc import Sequence

from launch.arguments import add_ranks
from launch.doctor.compare import Finding, compare
from launch.doctor.node import Request, examine, host_name
from launch.doctor.report import NodeReport, collect
from launch.doctor.table import describe
from sharding.arguments import make_parser

__all__ = ["Finding", "NodeReport", "collect", "compare", "describe", "main"]

_EPILOG = """\
examples:
  adagc doctor                                            this machine alone
  adagc doctor demo data.shards=shards/demo run.dir=runs/demo --nproc-per-node 2
                                                          and all that this command's `adagc train` will need

Exit code 0: nothing is wrong (warnings are no obstacle); 1: what is wrong is told, with the host and a remedy.
Nothing is written but a file without a name in run.dir and data.cache, to see that it can be.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Look and tell. Returns the exit code: 0 fit, 1 something is wrong, 2 wrong usage."""
    arguments = _parser().parse_intermixed_args(argv)
    if arguments.node:
        _write_report(arguments)
        return 0
    try:
        request = _request(arguments)
    except ValueError as error:
        print(f"adagc doctor: {error}", file=sys.stderr)
        return 2
    report = examine(request, os.environ)
    findings = compare([report], [report.host])
    print(describe([report], findings), flush=True)
    code = int(any(finding.severity == "error" for finding in findings))
    if code or arguments.nproc_per_node == 1:
        return code
    from launch.spawn import run_ranks

    return run_ranks("launch.doctor.links", ["--device", report.device], ranks=arguments.nproc_per_node)


def _request(arguments: argparse.Namespace) -> Request:
    from launch.recipe import load_config

    config = None if arguments.recipe is None else load_config(arguments.recipe, arguments.overrides)
    request = Request(
        config=config, ranks=arguments.nproc_per_node, token=arguments.token, seconds=arguments.check_seconds
    )
    return request if arguments.peer is None else Request(**vars(request) | {"peer": arguments.peer})


def _write_report(arguments: argparse.Namespace) -> None:
    """The report alone on stdout; whatever libraries have to say goes to stderr."""
    stdout = os.dup(1)
    os.dup2(2, 1)
    try:
        report = examine(_request(arguments), os.environ)
    except (ValueError, OSError) as error:  # of the recipe, which this node may not see
        report = NodeReport(host=host_name(os.environ), failed={"settings": str(error)})
    with os.fdopen(stdout, "w") as stream:
        stream.writelines(report.lines())


def _parser() -> argparse.ArgumentParser:
    description = "Is this machine fit for training: GPUs, network, software, disks, shards? Takes some seconds."
    parser = make_parser("adagc doctor", description, _EPILOG)
    parser.add_argument("recipe", nargs="?", help="as in `adagc train`; none: only the machine is looked at")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="as in `adagc train`")
    add_ranks(parser)
    parser.add_argument(
        "--check-seconds", type=float, default=30.0, metavar="S", help="a check that takes longer has failed (30)"
    )
    cluster = parser.add_argument_group("as the first step of a job on several nodes")
    cluster.add_argument("--node", action="store_true", help="print this node's report as JSON, in pieces")
    cluster.add_argument("--peer", metavar="HOST", help="another node, as seen from this one")
    cluster.add_argument(
        "--token", default="", metavar="NAME", help="a file beside run.dir that another node wrote: is it seen here?"
    )
    return parser


if __name__ == "__main__":
    from launch.failure import leave

    leave(main())
