"""The preflight: what a node finds out, what hangs on it, what differs between nodes, and the links between ranks."""

import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import torch

from adagc_dist.comm import Comm
from launch.cluster.nic import Interface
from launch.doctor.command import NodeReport, collect, compare, describe
from launch.doctor.gpus import visible_gpus
from launch.doctor.links import Links, measure, verdict
from launch.doctor.report import Gpu, Machine, Room
from launch.world import World
from tests.ranks import run_ranks, run_threads
from tests.tiny import tiny_settings

HOSTS = ("n1", "n2", "n3")


def doctor(*words: str, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "launch.doctor.command", *words]
    return subprocess.run(command, env=os.environ | (env or {}), capture_output=True, text=True, timeout=120)


def node(*words: str, env: dict[str, str] | None = None) -> NodeReport:
    """What a node's process prints: its report, and nothing else."""
    done = doctor("--node", *words, env=env)
    assert done.returncode == 0, done.stderr
    (report,) = collect(done.stdout.splitlines(keepends=True))
    assert done.stdout.splitlines(keepends=True) == replace(report, arrived=0.0).lines()
    return replace(report, arrived=0.0)


# One node, in truth


@pytest.fixture(scope="module")
def real(tiny_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> NodeReport:
    """The report of this machine, which leaves nothing behind."""
    runs = tmp_path_factory.mktemp("runs")
    (runs / "token").touch()
    settings = tiny_settings(tiny_shards, runs / "first")
    began = time.time()
    report = node("demo", *settings, "--token", "token", "--check-seconds", "60", env={"SLURMD_NODENAME": "n1"})
    assert began < report.clock < time.time()
    assert [path.name for path in runs.iterdir()] == ["token"]
    return report


def test_a_node_tells_what_it_has(real: NodeReport, tiny_shards: Path) -> None:
    assert real.failed == {}
    assert (real.host, real.ranks, real.workers, real.device) == ("n1", 1, 0, "cpu")
    assert real.software is not None
    assert real.software.versions["torch"] == torch.__version__
    assert {"python", "code", "settings"} < set(real.software.versions)
    assert real.machine is not None
    assert real.machine.cores == len(os.sched_getaffinity(0))
    assert real.shards is not None
    assert (real.shards.rows, real.shards.classes, real.shards.row_bytes) == (90, 19, 160_000)
    assert real.shards.bytes == sum(path.stat().st_size for path in tiny_shards.glob("*.tar"))
    assert real.model is not None
    assert real.model.parameters == 375_827  # of the three bands that timm counts it with, and nine more
    assert real.run is not None
    assert real.run.token is True
    assert {room.name for room in real.rooms} == {"memory", "run.dir"}
    assert [replace(report, arrived=0.0) for report in collect(real.lines())] == [real]


def test_what_another_version_reports_is_read_as_far_as_it_is_known() -> None:
    report = NodeReport.read('{"host": "n1", "colour": "red", "machine": {"cores": 3, "spin": 0.5}}')
    assert report == NodeReport(host="n1", machine=Machine(cores=3))
    for line in ("5", "{}", '{"host": "n1", "machine": 7}', "slurmstepd: error", ""):
        with pytest.raises(ValueError, match=r"no report|Expecting"):
            NodeReport.read(line)


def test_a_file_system_that_hangs_is_a_finding_and_no_hang(tiny_shards: Path, tmp_path: Path) -> None:
    for name in ("shards", "runs"):
        (tmp_path / name).mkdir()
    shutil.copy(tiny_shards / "manifest.json", tmp_path / "shards")
    for shard in tiny_shards.glob("*.tar"):
        (tmp_path / "shards" / shard.name).symlink_to(shard)
    os.mkfifo(tmp_path / "shards" / "manifest.parquet")  # whoever opens it waits for a writer
    settings = tiny_settings(tmp_path / "shards", tmp_path / "runs" / "first")
    began = time.monotonic()
    report = node("demo", *settings, "--check-seconds", "4", env={"SLURMD_NODENAME": "n2"})
    assert time.monotonic() - began < 60
    assert report.machine is not None
    (hangs,) = (finding for finding in compare([report], ["n2"]) if "no answer" in finding.what)
    assert (hangs.severity, hangs.host, hangs.what) == ("error", "n2", "shards: no answer within 4 s")
    assert "`sbatch --exclude=n2`" in hangs.remedy
    assert not (tmp_path / "runs" / "first").exists()


def test_questions_are_answered_fail_die_or_hang_each_by_itself() -> None:
    code = """
import os, subprocess, sys, time
from launch.doctor.deadline import Line, ask
def fails(): raise FileNotFoundError(2, "No such file", "x")
lines = [
    {"one": lambda: 1, "fails": fails, "two": lambda: 2, "bug": lambda: {}["key"]},
    {"dies": lambda: os.kill(os.getpid(), 9), "later": lambda: 3},
    {"slept": lambda: time.sleep(0.1), "hangs": lambda: subprocess.run(["sleep", "98765.4"]), "after": lambda: 4},
]
lines = [Line(questions, 3.0) for questions in lines] + [Line({"slow": lambda: time.sleep(4)}, 60)]
for name, answer in sorted(ask(lines).items()):
    print(name, answer.value, answer.error, sep="|")
"""
    began = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert time.monotonic() - began < 20
    died = "None|its process died without a word (killed from outside?)"
    assert done.stdout.splitlines() == [
        "after|None|not tried: hangs gave no answer",
        "bug|None|KeyError: 'key'",
        f"dies|{died}",
        "fails|None|x: No such file",
        "hangs|None|no answer within 3 s",
        f"later|{died}",
        "one|1|",
        "slept|None|",
        "slow|None|",
        "two|2|",
    ]
    assert "98765.4" not in [
        word for process in psutil.process_iter(["cmdline"]) for word in process.info["cmdline"] or []
    ]


NVIDIA_SMI = """#!/bin/sh
case "$1" in
    --query-compute-apps=*) echo "GPU-bb, 4711"; echo "GPU-bb, 4712" ;;
    --query-gpu=*)
        echo "0, GPU-aa, NVIDIA H200, 143771, 0, 570.86.15"
        echo "1, GPU-bb, NVIDIA H200, 143771, 71000, 570.86.15"
        echo "2, GPU-cc, NVIDIA H200, [N/A], [N/A], 570.86.15" ;;
esac
"""


@pytest.mark.parametrize(
    ("script", "visible", "uuids", "failure"),
    [
        (NVIDIA_SMI, None, ["GPU-aa", "GPU-bb", "GPU-cc"], ""),
        (NVIDIA_SMI, "1,GPU-c", ["GPU-bb", "GPU-cc"], ""),
        ("#!/bin/sh\necho No devices were found\nexit 6\n", None, [], ""),
        ("#!/bin/sh\necho NVIDIA-SMI has failed\nexit 9\n", None, [], "nvidia-smi ends with 9: NVIDIA-SMI has failed"),
    ],
    ids=["all", "some", "none allowed", "no driver"],
)
def test_gpus_are_those_that_nvidia_smi_tells_and_the_job_may_use(
    script: str, visible: str | None, uuids: list[str], failure: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "nvidia-smi"
    program.write_text(script)
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    if failure:
        with pytest.raises(OSError, match=f"^{failure}$"):
            visible_gpus(visible)
        return
    gpus = {gpu.uuid: gpu for gpu in visible_gpus(visible)}
    assert list(gpus) == uuids
    if gpus:
        assert gpus["GPU-bb"] == Gpu(
            uuid="GPU-bb", name="NVIDIA H200", memory=143771, used=71000, processes=2, driver="570.86.15"
        )
        assert gpus["GPU-cc"].memory == 0


# Nodes against each other


@pytest.fixture(scope="module")
def fit(real: NodeReport) -> list[NodeReport]:
    """Three nodes of one kind, with two GPUs each, and nothing wrong."""
    assert real.machine is not None
    assert real.software is not None
    gpu = Gpu(uuid="GPU-a", name="NVIDIA H200", memory=143771, used=500, processes=0, driver="570.86.15")
    nic = Interface("ib0", "10.0.0.1", 200_000)
    machine = replace(real.machine, interface=nic, cores=64, memory=1 << 40, open_files=1 << 20, infiniband=True)
    machine = replace(machine, locked_memory=None)
    software = replace(real.software, gpus=2, import_seconds=3.0)
    report = replace(
        real, device="auto", ranks=2, arrived=real.clock + 0.1, machine=machine, gpus=(gpu, gpu), software=software
    )
    reports = [replace(report, host=host) for host in HOSTS]
    assert compare(reports, HOSTS) == []
    return reports


def machine_with(**values: object) -> Callable[[NodeReport], NodeReport]:
    def alter(report: NodeReport) -> NodeReport:
        assert report.machine is not None
        return replace(report, machine=replace(report.machine, **values))

    return alter


def gpu_with(**values: object) -> Callable[[NodeReport], NodeReport]:
    return lambda report: replace(report, gpus=(report.gpus[0], replace(report.gpus[1], **values)))


def other_version(name: str) -> Callable[[NodeReport], NodeReport]:
    def alter(report: NodeReport) -> NodeReport:
        assert report.software is not None
        versions = report.software.versions | {name: "other"}
        return replace(report, software=replace(report.software, versions=versions))

    return alter


def other_digest(report: NodeReport) -> NodeReport:
    assert report.shards is not None
    return replace(report, shards=replace(report.shards, digest="other"))


def token_absent(report: NodeReport) -> NodeReport:
    assert report.run is not None
    return replace(report, run=replace(report.run, token=False))


def fewer_gpus(report: NodeReport) -> NodeReport:
    assert report.software is not None
    return replace(report, gpus=report.gpus[:1], software=replace(report.software, gpus=1))


def torch_sees_none(report: NodeReport) -> NodeReport:
    assert report.software is not None
    return replace(report, software=replace(report.software, gpus=0))


def slow_import(report: NodeReport) -> NodeReport:
    assert report.software is not None
    return replace(report, software=replace(report.software, import_seconds=61.0))


def room(name: str, *, must: bool = False) -> Callable[[NodeReport], NodeReport]:
    small = Room(name=name, where="/disk", free=10, needed=11, reason="it", must=must)
    return lambda report: replace(report, rooms=(small,))


def fails(check: str) -> Callable[[NodeReport], NodeReport]:
    return lambda report: replace(report, failed={check: "it broke"})


def clock_off(seconds: float) -> Callable[[NodeReport], NodeReport]:
    return lambda report: replace(report, clock=report.clock + seconds)


ALTERATIONS: dict[str, tuple[Callable[[NodeReport], NodeReport], str, str]] = {
    **{
        name: (other_version(name), "error", f"^{name} other, but .* on n[123], n[123]$")
        for name in ("python", "torch", "code", "settings", "CUDA", "NCCL", "deepspeed")
    },
    **{name: (fails(name), "error", f"^{name}: it broke$") for name in ("settings", "machine", "gpus", "software")},
    **{name: (fails(name), "error", f"^{name}: it broke$") for name in ("model", "cache", "shards", "run")},
    "driver": (
        lambda report: replace(report, gpus=tuple(replace(gpu, driver="other") for gpu in report.gpus)),
        "warning",
        "^driver other, but 570",
    ),
    "digest": (other_digest, "error", "^manifest digest other, but "),
    "token": (token_absent, "error", "not the same folder as on the first node"),
    "gpu gone": (fewer_gpus, "error", r"^1 usable GPU\(s\) for 2 rank|1 x NVIDIA H200 .*, but 2 x |use: 1, but 2"),
    "gpu model": (gpu_with(name="NVIDIA A100"), "error", "^GPUs 1 x NVIDIA H200 .*, 1 x NVIDIA A100 .*, but 2 x"),
    "gpu unusable": (torch_sees_none, "error", r"of which torch can use 0|use: 0, but 2"),
    "gpu full": (gpu_with(used=20_000, processes=1), "error", "^GPU 1 is in use: 20000 of 143771 MiB, 1 process"),
    "gpu shared": (gpu_with(processes=1), "warning", "^GPU 1 is in use: 500 of"),
    "no interface": (machine_with(interface=None), "error", "no network interface"),
    "interface": (machine_with(interface=Interface("eth0", "1.2.3.4", 0)), "warning", "^interface eth0, but ib0 on"),
    "speed": (machine_with(interface=Interface("ib0", "1.2.3.4", 1000)), "warning", "1000 Mbit/s, but 200000 Mbit/s"),
    "cores": (machine_with(cores=1), "warning", r"^1 core\(s\) for 2 rank"),
    "files": (machine_with(open_files=1024), "warning", "open 1024 files only"),
    "memlock": (machine_with(locked_memory=65536), "warning", "lock 65536 bytes"),
    "import": (slow_import, "warning", "^torch took 61 s to import"),
    "clock ahead": (clock_off(5.0), "warning", "clock is 5.0 s ahead"),
    "clock behind": (clock_off(-3.0), "warning", "clock is 3.0 s behind"),
    "run.dir": (room("run.dir", must=True), "error", r"^run.dir: 0.0 MB free in /disk"),
    "data.cache": (room("data.cache"), "warning", "^data.cache: "),
    "memory": (room("memory"), "warning", "^memory: "),
    "shared memory": (room("shared memory"), "warning", "^shared memory: "),
}


@pytest.mark.parametrize("place", [0, 1, 2])
@pytest.mark.parametrize("name", ALTERATIONS)
def test_the_node_that_differs_is_named_and_no_other(name: str, place: int, fit: list[NodeReport]) -> None:
    alter, severity, pattern = ALTERATIONS[name]
    reports = [alter(report) if number == place else report for number, report in enumerate(fit)]
    findings = compare(reports, HOSTS)
    assert findings
    assert {finding.host for finding in findings} == {HOSTS[place]}
    for finding in findings:
        assert finding.severity == severity
        assert re.search(pattern, finding.what), finding.what
        assert finding.remedy
    told = describe(reports, findings)
    label = "ERROR" if severity == "error" else "warning"
    assert re.search(rf"^{label} +{HOSTS[place]}: .* Remedy: ", told, re.MULTILINE)


def test_of_two_nodes_the_second_is_held_against_the_first(fit: list[NodeReport]) -> None:
    for pair in (fit[:2], [other_version("torch")(fit[0]), fit[1]]):
        findings = compare([other_digest(pair[1]), pair[0]], HOSTS[:2])
        assert {finding.host for finding in findings} == {"n2"}
    findings = compare([fit[0], clock_off(9.0)(fit[1])], HOSTS[:2])
    assert [finding.host for finding in findings] == ["n2"]


def test_a_node_without_a_report_is_named_with_what_to_do(fit: list[NodeReport]) -> None:
    (finding,) = compare([fit[2], fit[0]], HOSTS)
    assert (finding.severity, finding.host) == ("error", "n2")
    assert "`scontrol show node n2`" in finding.remedy
    assert "`sbatch --exclude=n2`" in finding.remedy
    assert [finding.host for finding in compare([], HOSTS)] == list(HOSTS)


def test_errors_come_first_and_what_several_nodes_share_is_told_once(fit: list[NodeReport]) -> None:
    reports = [machine_with(cores=1)(report) for report in fit[:2]] + [token_absent(fit[2])]
    findings = compare(reports, HOSTS)
    assert [finding.severity for finding in findings] == ["error", "warning", "warning"]
    lines = describe(reports, findings).splitlines()
    assert [line.split(":")[0] for line in lines[-2:]] == ["warning n1, n2", "ERROR   n3"]
    assert any(line.startswith("ok      network: ib0, 200000 Mbit/s    (3 node(s): n1, n2, n3)") for line in lines)
    assert any(line.startswith("ok      64 cores") and line.endswith("(1 node(s): n3)") for line in lines)


def test_reports_of_many_nodes_are_told_apart_and_one_cut_off_is_none(real: NodeReport) -> None:
    """Their lines come in any order, but for those of one node."""
    reports = [replace(real, host=host) for host in HOSTS]
    mixed = [line for lines in zip(*(report.lines() for report in reports), strict=True) for line in lines]
    assert len(mixed) > len(HOSTS)
    assert max(map(len, mixed)) < 1024  # srun passes shorter lines on unbroken
    assert [report.host for report in collect(mixed)] == list(HOSTS)
    assert [report.host for report in collect(mixed[:-1])] == list(HOSTS[:-1])


def test_a_node_that_answers_late_has_no_wrong_clock(fit: list[NodeReport]) -> None:
    """Time goes on while srun starts the last node; a clock that is ahead shows all the same."""

    def lines() -> Iterator[str]:
        yield "Welcome to the cluster\n"
        for number, report in enumerate(fit):
            time.sleep(0.05 * number)
            ahead = 4.0 if report.host == "n3" else 0.0
            yield from replace(report, clock=time.time() + ahead).lines()

    reports = list(collect(lines()))
    assert [report.host for report in reports] == list(HOSTS)
    assert reports[2].arrived - reports[0].arrived > 0.1
    assert [finding.host for finding in compare(reports, HOSTS)] == ["n3"]


# The command


def test_the_command_tells_a_machine_that_is_fit_and_sums_up(tiny_shards: Path, tmp_path: Path) -> None:
    words = tiny_settings(tiny_shards, tmp_path / "run")
    done = doctor("demo", *words, "--nproc-per-node", "2", "--check-seconds", "60")
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"torch {torch.__version__}" in done.stdout
    assert re.search(r"^ok      shards \w+: row \d+ of 90 read in", done.stdout, re.MULTILINE)
    assert re.search(r"^ok      all-reduce of 1 MB over 2 ranks on 1 node\(s\): right, ", done.stdout, re.MULTILINE)
    assert list(tmp_path.iterdir()) == []


def test_the_command_tells_what_is_wrong(tmp_path: Path) -> None:
    words = [f"data.shards={tmp_path}", f"run.dir={tmp_path / 'run'}", "engine.device=cpu", "model.name=resnet81"]
    done = doctor("demo", *words, "--check-seconds", "60")
    assert done.returncode == 1
    no_shards = rf"^ERROR   \S+: shards: {tmp_path} holds no manifest.json: .* Remedy: "
    assert re.search(no_shards, done.stdout, re.MULTILINE)
    assert re.search(
        r"^ERROR   \S+: model: model.name='resnet81' is no timm model .* Remedy: ", done.stdout, re.MULTILINE
    )
    report = node("demo", "data.shard=x", env={"SLURMD_NODENAME": "n2"})  # for whoever collects reports
    (finding,) = compare([report], ["n2"])
    assert finding.what == "settings: unknown key data.shard: did you mean data.shards?"
    done = doctor("demo", "data.shard=x")
    assert done.returncode == 2
    assert done.stderr == "adagc doctor: unknown key data.shard: did you mean data.shards?\n"


# Links


def measured(comm: Comm) -> Links:
    """As on a node of its own."""
    place = World(comm.rank, comm.world_size, 0, 1, launched=True)
    return measure(comm, torch.device("cpu"), f"n{comm.rank}", place)


def test_ranks_sum_up_and_neighbours_exchange() -> None:
    one, *others = run_ranks(3, measured)
    assert all(links == one for links in others)
    assert one.hosts == ("n0", "n1", "n2")
    assert one.wrong == ()
    assert 0 < one.seconds < 5
    assert one.neighbours.keys() == {("n0", "n1"), ("n1", "n2"), ("n2", "n0")}
    assert verdict(one)[0].startswith("ok      all-reduce of 1 MB over 3 ranks on 3 node(s): right, ")


def test_a_rank_with_a_wrong_sum_is_named() -> None:
    def work(comm: Comm) -> Links:
        class Faulty:
            rank, world_size, all_gather_object = comm.rank, comm.world_size, comm.all_gather_object

            @staticmethod
            def all_reduce_sum(tensor: torch.Tensor) -> torch.Tensor:
                comm.all_reduce_sum(tensor)
                tensor[777] += comm.rank
                return tensor

        return measured(Faulty())  # type: ignore[arg-type]

    for links in run_threads(2, work):
        assert links.wrong == (1,)
        with pytest.raises(ValueError, match=r"^n1: the sum of 1 MB over 2 ranks is wrong .*--exclude=n1"):
            verdict(links)


def test_bandwidth_is_that_of_the_usual_formulas() -> None:
    (line,) = verdict(Links(("a", "a", "b", "b"), (), 0.001, {}))
    assert line.endswith("over 4 ranks on 2 node(s): right, 1.00 ms, 1 GB/s (bus 1.5 GB/s)")
    assert verdict(Links(("a",), (), 1e-6, {})) == ["ok      one rank: nothing to exchange"]


@pytest.mark.parametrize("slow", ["n2", "n1 n2", ""])
def test_a_slow_node_is_told_from_a_slow_link(slow: str) -> None:
    ring = [(f"n{i}", f"n{(i + 1) % 5}") for i in range(5)]
    ends = set(slow.split())
    hit = {pair for pair in ring if ends and (ends <= set(pair) if len(ends) == 2 else ends & set(pair))}
    links = Links(tuple(f"n{i}" for i in range(5)), (), 0.001, {pair: 0.01 if pair in hit else 0.001 for pair in ring})
    _, *warnings = verdict(links)
    assert [line.split(":")[0] for line in warnings] == ([f"warning {slow.replace(' ', ', ')}"] if slow else [])


def test_a_rank_that_waits_in_vain_says_so_and_ends() -> None:
    env = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "SLURMD_NODENAME": "n5"}
    env |= {"MASTER_ADDR": "localhost", "MASTER_PORT": "0"}
    command = [sys.executable, "-m", "launch.doctor.links", "--device", "cpu", "--seconds", "4"]
    done = subprocess.run(command, env=os.environ | env, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert "ERROR   n5: rank 0 of 2 is waiting for the other ranks to join, after 4 s. Remedy: " in done.stderr
