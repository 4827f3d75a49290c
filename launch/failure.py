"""Errors as a user sees them: one sentence for what a user can mend, a traceback for what only we can."""

import os
import sys
from collections.abc import Callable

from adagc_dist.comm import PeerError

__all__ = ["exit_code"]


def exit_code(command: str, work: Callable[[], None]) -> int:
    """Run ``work``; 0, or 1 after printing why it failed.

    Under torchrun a ValueError or a missing file is the same on all ranks, so rank 0 alone prints it; anything else is
    printed by the rank it happened on.
    """
    rank = os.environ.get("RANK", "0")
    try:
        work()
    except (ValueError, FileNotFoundError) as error:
        if rank == "0":
            print(f"{command}: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        print(f"{command}: rank {rank}: {error}", file=sys.stderr)
        return 1
    except PeerError:  # told by the rank it happened on
        return 1
    except KeyboardInterrupt:
        return 130
    return 0
