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
    resources = {kind: [ray.available_resources().get(kind, 0), ray.cluster_resources()[kind]] for kind in ("CPU",)}
    out.write_text(json.dumps({"groups": groups, "resources": resources}))
    return code


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), sys.argv[2:]))
