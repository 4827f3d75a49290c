"""What one node finds out about itself; nothing is left behind, and whatever hangs becomes a line of the report.

torch is imported by the children that ask (``launch.doctor.deadline``), never by the process that forks them.
"""

import importlib.metadata
import os
import platform
import resource
import shutil
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import xxhash

from adagc_dist.config import Config
from launch.cluster.nic import choose, interfaces
from launch.doctor.deadline import Line, ask
from launch.doctor.gpus import visible_gpus
from launch.doctor.report import Folder, Machine, Model, NodeReport, ShardsRead, Software
from launch.doctor.rooms import rooms_of
from launch.recipe import dump_config

__all__ = ["Request", "examine", "host_name"]

_IMPORTS_TAKE = 4  # times as long as other checks: thousands of files, which all nodes ask a server for at once
_TEST_BYTES = 1 << 20
_CGROUP = Path("/sys/fs/cgroup")


@dataclass(frozen=True, kw_only=True)
class Request:
    """What a node is asked for.

    Attributes:
        config: of the run to come; None: only the machine is looked at.
        ranks: on this node.
        peer: another node, to be reached by the interface that is looked for.
        token: name of a file beside the run's folder that the collector has written; empty if there is none.
        seconds: after which a check is given up; torch may take longer to import.
    """

    config: Config | None
    ranks: int = 1
    peer: str = "192.0.2.1"  # TEST-NET-1: the way to anywhere
    token: str = ""
    seconds: float = 30.0


def host_name(env: Mapping[str, str]) -> str:
    """Slurm's name of this node, by which it can be excluded; or the machine's, without its domain."""
    return env.get("SLURMD_NODENAME") or platform.node().split(".")[0]


def examine(request: Request, env: Mapping[str, str]) -> NodeReport:
    """All checks at once."""
    began, config, host = time.monotonic(), request.config, host_name(env)
    lines: list[dict[str, Any]] = [{"machine": partial(_machine, request.peer, dict(env))}]
    imports: dict[str, Any] = {"software": partial(_software, config)}
    if config is None or config.engine.device != "cpu":
        lines.append({"gpus": partial(visible_gpus, env.get("CUDA_VISIBLE_DEVICES"))})
    if config is not None:
        imports["model"] = partial(_model, config)
        if config.data.stage or "://" in config.data.shards:
            imports["cache"] = partial(_cache, config)
        lines += [{"shards": partial(_shards, config, host)}, {"run": partial(_run, config, request.token)}]
    slow = Line(imports, _IMPORTS_TAKE * request.seconds)
    answers = ask([slow, *(Line(line, request.seconds) for line in lines)])
    report = NodeReport(
        host=host,
        ranks=request.ranks,
        failed={name: answer.error for name, answer in answers.items() if answer.error},
        **{name: answer.value for name, answer in answers.items() if not answer.error},
    )
    if config is not None:
        report = replace(report, workers=config.data.workers, device=config.engine.device)
        report = replace(report, rooms=rooms_of(config, report))
    return replace(report, seconds=round(time.monotonic() - began, 3), clock=time.time())


def _machine(peer: str, env: Mapping[str, str]) -> Machine:
    found = interfaces()
    _, open_files = resource.getrlimit(resource.RLIMIT_NOFILE)  # the ranks raise theirs to the hard limit
    locked, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    shared = Path("/dev/shm")
    infiniband = Path("/sys/class/infiniband")
    return Machine(
        interfaces=tuple(found),
        interface=choose(found, peer, env),
        cores=len(os.sched_getaffinity(0)),
        memory=_memory(),
        shared_memory=shutil.disk_usage(shared).free if shared.is_dir() else None,
        open_files=open_files,
        locked_memory=None if locked == resource.RLIM_INFINITY else locked,
        infiniband=infiniband.is_dir() and any(infiniband.iterdir()),
    )


def _memory() -> int:
    """Bytes that can be had: the machine's, or what the limits of this process's control groups leave."""
    lines = Path("/proc/self/cgroup").read_text().splitlines()
    name = next((line.removeprefix("0::/") for line in lines if line.startswith("0::/")), None)
    least = int(psutil.virtual_memory().available)
    folder = _CGROUP / name if name is not None else None
    while folder is not None and folder.is_relative_to(_CGROUP) and (folder / "memory.max").is_file():
        limit = (folder / "memory.max").read_text().strip()
        if limit != "max":
            least = min(least, int(limit) - _used(folder))
        folder = folder.parent
    return least


def _used(group: Path) -> int:
    """Bytes of a control group, but for pages of files that nobody used of late: they go when others are needed."""
    files = next(line for line in (group / "memory.stat").read_text().splitlines() if line.startswith("inactive_file "))
    return int((group / "memory.current").read_text()) - int(files.split()[1])


def _software(config: Config | None) -> Software:
    began = time.monotonic()
    import torch

    seconds = round(time.monotonic() - began, 1)
    versions = {"python": platform.python_version(), "code": _code_digest(), "torch": torch.__version__}
    if torch.version.cuda is not None:
        nccl = torch.cuda.nccl.version()  # type: ignore[no-untyped-call]
        versions |= {"CUDA": torch.version.cuda, "NCCL": ".".join(map(str, nccl))}
    if config is not None:
        versions["settings"] = xxhash.xxh3_64_hexdigest(dump_config(config).encode())
        if config.engine.name == "deepspeed":
            versions["deepspeed"] = importlib.metadata.version("deepspeed")
    return Software(versions=versions, gpus=torch.cuda.device_count(), import_seconds=seconds)


def _code_digest() -> str:
    """Of all our modules and recipes, wherever each node has them from."""
    root = Path(__file__).parent.parent
    digest = xxhash.xxh3_64()
    for package in ("adagc_dist", "launch", "sharding", "tuning"):
        files = (path for suffix in ("py", "yaml") for path in (root / package).rglob(f"*.{suffix}"))
        for path in sorted(files):
            digest.update(f"{path.relative_to(root)}\0".encode() + path.read_bytes())
    return digest.hexdigest()


def _model(config: Config) -> Model:
    """Built without weights, by its name; a file of weights must be there.

    Raises:
        ValueError: timm does not know it, or its weights are a file that this node does not see.
    """
    import torch

    from adagc_dist.model import create_student

    weights = config.model.pretrained
    if weights and (Path(weights).suffix or weights.count("/") > 1) and not Path(weights).is_file():
        raise ValueError(f"model.pretrained={weights}: there is no such file on this node")
    with torch.device("meta"):
        bare = replace(config.model, pretrained=None)
        student = create_student(bare, num_bands=len(config.data.bands or range(12)), num_classes=19, seed=0)
    return Model(parameters=sum(parameter.numel() for parameter in student.parameters()))


def _shards(config: Config, host: str) -> ShardsRead:
    from launch.doctor.shards import read_shards  # numpy, whose threads are not to be forked

    return read_shards(config, host)


def _cache(config: Config) -> Folder:
    from launch.data import cache_root

    root = cache_root(config)
    found = _written(root)
    return replace(found, free=found.free + sum(tar.stat().st_size for tar in root.rglob("*.tar")))


def _run(config: Config, token: str) -> Folder:
    beside = config.run_path.absolute().parent
    return replace(_written(config.run_path), token=(beside / token).is_file() if token else None)


def _written(folder: Path) -> Folder:
    """Write into ``folder``, or into the one it would be made in, by a file without a name.

    Raises:
        OSError: that cannot be done.
    """
    folder = folder.absolute()
    there = next(path for path in (folder, *folder.parents) if path.exists())
    try:
        with tempfile.TemporaryFile(dir=there) as stream:
            stream.write(bytes(_TEST_BYTES))
            stream.flush()
            os.fsync(stream.fileno())
    except OSError as error:
        raise OSError(f"{folder} cannot be written: {there} takes no file ({error.strerror})") from error
    return Folder(path=str(there), free=shutil.disk_usage(there).free)
