"""What the table of predictions costs at any N and W: the formulas, which ``tests.benchmarks.state`` compares with its
measurements and carries on to sizes that no machine here has.
"""

from dataclasses import dataclass

from adagc_dist.exchange import _ROUND_BYTES

__all__ = [
    "EXCHANGES",
    "Assumed",
    "pays_from",
    "plan_bytes",
    "received_bytes",
    "rounds",
    "seconds_of_epoch",
    "table_bytes",
]

EXCHANGES = ("all_gather", "all_to_all")


@dataclass(frozen=True)
class Assumed:
    """What is not measured here.

    Attributes:
        rate: samples/s that a rank trains.
        bandwidths: bytes/s that a rank receives.
    """

    rate: float
    bandwidths: tuple[float, ...]


def table_bytes(num_rows: int, num_classes: int, world_size: int) -> int:
    """A rank's values and marks, on its device."""
    return -(-num_rows // world_size) * (4 * num_classes + 2)


def plan_bytes(num_rows: int, world_size: int, exchange: str) -> int:
    """A rank's int32 row numbers on the host, during a sync: the order and the place of all rows, the rank's rows now
    and next; and who owns each row, which all_gather knows as a bool, all_to_all as an int16.
    """
    own = -(-num_rows // world_size)
    return 4 * (num_rows + num_rows + own + own) + (num_rows if exchange == "all_gather" else 2 * num_rows)


def received_bytes(num_rows: int, num_classes: int, world_size: int, exchange: str) -> float:
    """That a rank receives from others in a sync: value, mark and number of each row."""
    everything = num_rows * (4 * num_classes + 6) * (world_size - 1) / world_size
    return everything if exchange == "all_gather" else everything / world_size


def rounds(num_rows: int, num_classes: int, world_size: int, exchange: str) -> int:
    """Collectives that a sync takes, of some MB each."""
    most = _ROUND_BYTES // (4 * num_classes + 6) // (world_size if exchange == "all_gather" else 1)
    return -(-num_rows // world_size // max(1, most))


def seconds_of_epoch(num_rows: int, world_size: int, rate: float) -> float:
    return num_rows / (world_size * rate)


def pays_from(num_classes: int, rate: float, bandwidth: float, share: float = 0.01) -> int:
    """The number of ranks from which on all_gather takes more than ``share`` of an epoch, whatever N: a sync of it
    receives the same bytes on any number of ranks, while the epoch gets shorter.
    """
    return int(share * bandwidth / ((4 * num_classes + 6) * rate)) + 2
