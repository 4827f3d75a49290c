"""The GPUs of a node and who is on them, as nvidia-smi tells: it needs neither torch nor memory on them."""

import csv
import shutil
import subprocess

from launch.doctor.report import Gpu

__all__ = ["visible_gpus"]

_NO_DEVICES = 6  # nvidia-smi's exit code


def visible_gpus(visible: str | None) -> tuple[Gpu, ...]:
    """Those of ``visible``, a list of numbers or UUIDs (None: all), or none where there is no driver.

    Raises:
        OSError: there is a driver, and it does not answer.
    """
    if shutil.which("nvidia-smi") is None:
        return ()
    fields = "index,uuid,name,memory.total,memory.used,driver_version"
    busy = [uuid for uuid, _ in _nvidia_smi("--query-compute-apps=gpu_uuid,pid")]
    wanted = None if visible is None else visible.split(",")
    return tuple(
        Gpu(uuid=uuid, name=name, memory=_number(total), used=_number(used), processes=busy.count(uuid), driver=driver)
        for index, uuid, name, total, used, driver in _nvidia_smi(f"--query-gpu={fields}")
        if wanted is None or index in wanted or any(name and uuid.startswith(name) for name in wanted)
    )


def _nvidia_smi(query: str) -> list[list[str]]:
    done = subprocess.run(["nvidia-smi", query, "--format=csv,noheader,nounits"], capture_output=True, text=True)
    if done.returncode == _NO_DEVICES:  # allowed to this process
        return []
    if done.returncode:
        raise OSError(f"nvidia-smi ends with {done.returncode}: {(done.stdout + done.stderr).strip()[:200]}")
    return [row for row in csv.reader(done.stdout.splitlines(), skipinitialspace=True) if row]


def _number(text: str) -> int:
    return int(text) if text.isdigit() else 0  # [N/A]: of a GPU in MIG's slices
