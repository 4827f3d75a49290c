"""A command for slurm/tune_reben.sh: says what Ray's cluster is, and waits. python sweep.py SAID SECONDS"""

import json
import os
import signal
import sys
import time
from pathlib import Path

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

told: list[int] = []


@ray.remote(num_cpus=1)
def place() -> str:
    return ray.get_runtime_context().get_node_id()


def main(said: Path, seconds: float) -> int:
    ray.init(log_to_driver=False)
    signal.signal(signal.SIGTERM, lambda number, frame: told.append(number))
    nodes = {node["NodeID"]: node for node in ray.nodes()}
    tasks = [place.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False)) for node in nodes]
    found = {
        "cpus": {node["NodeName"]: node["Resources"]["CPU"] for node in nodes.values()},
        "addresses": {node["NodeName"]: node["NodeManagerAddress"] for node in nodes.values()},
        "ran_on": [nodes[node]["NodeName"] for node in ray.get([task.remote() for task in tasks])],
        "pid": os.getpid(),
    }
    with said.open("a") as stream:
        stream.write(json.dumps(found) + "\n")
    ends = time.monotonic() + seconds
    while not told and time.monotonic() < ends:
        time.sleep(0.1)
    if told:
        assert ray.get(place.remote()) in nodes  # Ray is still there, to save by
    return 75 if told else 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), float(sys.argv[2])))
