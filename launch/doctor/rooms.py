"""What has to fit on a node: bounds that are generous, and what there is. A pure function of a report."""

from collections.abc import Iterator

from adagc_dist.config import Config
from launch.doctor.report import NodeReport, Room, ShardsRead

__all__ = ["rooms_of"]

# What NCCL exchanges through between the GPUs of a node: a segment of 10 MB a pair and direction, 33 MB in older
# releases. A container's usual 64 MB do not hold those of 8 GPUs. Our loaders use none of it (sharding.ring).
_SHARED_PER_RANK = 128 << 20
_MEMORY_PER_RANK = 3 << 30  # an interpreter with torch, CUDA and timm in it, and a state on the host
_AT_HAND = 32  # shards in a cache: launch.data's window for them, and the next


def rooms_of(config: Config, report: NodeReport) -> tuple[Room, ...]:
    """Memory, /dev/shm and disks; what could not be looked at is left out."""
    return (*_memory(config, report), *_disks(config, report))


def _memory(config: Config, report: NodeReport) -> Iterator[Room]:
    machine, ranks, data = report.machine, report.ranks, config.data
    if machine is None:
        return
    if machine.shared_memory is not None and ranks > 1 and report.gpus:
        needed, reason = ranks * _SHARED_PER_RANK, "NCCL between the GPUs of a node"
        yield Room(name="shared memory", where="/dev/shm", free=machine.shared_memory, needed=needed, reason=reason)
    if report.shards is not None:
        rows = -(-min(config.optim.global_batch, report.shards.rows) // (ranks * config.optim.accumulation)) + 2
        buffers = (data.workers * data.prefetch + 2) * rows * report.shards.row_bytes
        needed, reason = ranks * (_MEMORY_PER_RANK + buffers), f"{ranks} rank(s) and their loaders' buffers"
        yield Room(name="memory", where="this node", free=machine.memory, needed=needed, reason=reason)


def _disks(config: Config, report: NodeReport) -> Iterator[Room]:
    shards, model, run, cache = report.shards, report.model, report.run, report.cache
    if run is not None and shards is not None and model is not None:
        # float32: student, teacher and AdamW's two moments; per row and class an average, and what was seen of it
        state = 16 * model.parameters + 8 * shards.rows * shards.classes
        copies = config.run.keep_checkpoints + 2  # the best one, for a rewind, and the one that is being written
        reason = f"{copies} checkpoints of {state / 1e6:.0f} MB"
        yield Room(name="run.dir", where=run.path, free=run.free, needed=copies * state, reason=reason, must=True)
    if cache is not None and shards is not None:
        needed, reason = _cached_bytes(config, shards), "the shards that are read now and next"
        must = not config.data.stage  # what finds no room there is read from where it lies
        yield Room(name="data.cache", where=cache.path, free=cache.free, needed=needed, reason=reason, must=must)


def _cached_bytes(config: Config, shards: ShardsRead) -> int:
    window = config.data.window_shards
    if window == 0:  # all at once
        return shards.bytes
    return min(shards.bytes, (2 * window if window else _AT_HAND) * shards.largest)
