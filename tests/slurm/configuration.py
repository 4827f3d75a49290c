"""What slurmctld, slurmd and the nodes' resolvers read."""

import socket
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.slurm.network import free_port

__all__ = ["SLURMD_PORT", "Node", "write_configuration"]

SLURMD_PORT = 6818  # on nodes with a network of their own

_CONF = """\
ClusterName=adagc
SlurmctldHost={host}({address})
SlurmctldPort={port}
AuthType=auth/munge
# A requeued job waits until the credentials of its last run have expired: by default 120 s.
AuthInfo=socket={folder}/munge.socket,cred_expire=5
CredType=cred/munge
SlurmUser=root
SlurmdUser=root
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/log/slurmctld.log
SlurmdLogFile={folder}/log/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/affinity
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=batch_sched_delay=0,bf_interval=1,sched_interval=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmdTimeout=10
KillWait=20
MinJobAge=3600
ReturnToService=2
MpiDefault=none
# The nodes' CPUs are as said here, whatever the machine has.
SlurmdParameters=config_overrides
{nodes}
PartitionName=main Nodes=ALL Default=YES PriorityTier=1 GraceTime=30 MaxTime=INFINITE
PartitionName=urgent Nodes=ALL PriorityTier=10 PreemptMode=OFF MaxTime=INFINITE
"""
_NODE_CONF = (
    "NodeName={name} NodeAddr={address} {where} "
    "CPUs=2 Boards=1 SocketsPerBoard=1 CoresPerSocket=2 ThreadsPerCore=1 RealMemory=8000\n"
)


@dataclass(frozen=True, kw_only=True)
class Node:
    name: str
    address: str
    netns: str | None
    """For `ip netns exec`; None where the nodes share the machine's network."""
    local_disk: Path
    """Where this machine sees what the node's jobs see as `Cluster.local_disk`."""


def write_configuration(folder: Path, nodes: Sequence[Node], address: str) -> None:
    """slurm.conf and the nodes' /etc/hosts; `address`: slurmctld's."""
    host = socket.gethostname().partition(".")[0]
    lines = "".join(_NODE_CONF.format(name=node.name, address=node.address, where=_where(node)) for node in nodes)
    conf = _CONF.format(host=host, address=address, port=free_port(), folder=folder, nodes=lines)
    (folder / "slurm.conf").write_text(conf)
    names = [("127.0.0.1", "localhost"), (address, host), *((node.address, node.name) for node in nodes)]
    (folder / "hosts").write_text("".join(f"{number} {name}\n" for number, name in names))


def _where(node: Node) -> str:
    return f"NodeHostname=localhost Port={free_port()}" if node.netns is None else f"Port={SLURMD_PORT}"
