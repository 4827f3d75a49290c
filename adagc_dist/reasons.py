"""Why a run stops; by itself, for those who wait for ranks need no torch."""

from enum import Enum

__all__ = ["StopReason", "TakenOver"]


class StopReason(Enum):
    """Why a run is to stop; the value is for the log and status.json."""

    SIGTERM = "SIGTERM"
    SIGUSR1 = "SIGUSR1"
    SIGINT = "SIGINT"
    FILE = "the file STOP in the run's folder"
    BUDGET = "run.max_minutes is spent"
    EPOCHS = "run.max_epochs are done"
    ORPHANED = "the launcher has gone"


class TakenOver(ValueError):
    """Another process writes to the run's folder now: this one is to write no more."""
