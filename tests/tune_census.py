"""`python -m tests.tune_census OUT COMMAND ...` on a Ray cluster: run COMMAND, then write what it has left there."""

import json
import subprocess
import sys
from pathlib import Path

import ray
from ray.util import placement_group_table


def main(out: Path, command: list[str]) -> int:
    code = subprocess.run(command).returncode
    ray.init(log_to_driver=False)
    groups = [group["state"] for group in placement_group_table().values()]
    cores = [ray.available_resources().get("CPU", 0), ray.cluster_resources()["CPU"]]
    out.write_text(json.dumps({"groups": groups, "cores": cores}))
    return code


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), sys.argv[2:]))
