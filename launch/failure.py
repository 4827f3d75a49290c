"""Errors as a user sees them: one sentence for what a user can mend, a traceback for what only we can."""

import os
import sys
from collections.abc import Callable

from adagc_dist.comm import PeerError

__all__ = ["exit_code"]


def exit_code(command: str, work: Callable[[], None]) -> int:
    """Run ``work``; 0, or 1 after printing why it failed.

    What several ranks find is told once: ``first_error_everywhere`` lets the lowest of them raise it, and the others
    follow in silence.
    """
    rank = os.environ.get("RANK", "0")
    try:
        work()
    except (ValueError, OSError) as error:
        where = "" if rank == "0" else f"rank {rank}: "
        print(f"{command}: {where}{error}", file=sys.stderr)
        return 1
    except PeerError:  # told by the rank it happened on
        return 1
    except KeyboardInterrupt:
        return 130
    return 0
