"""Errors as a user sees them: one sentence for what a user can mend, a traceback for what only we can."""

import logging
import multiprocessing
import os
import sys
from collections.abc import Callable
from typing import NoReturn

from adagc_dist.comm import PeerError

__all__ = ["EXIT_LOST_PEER", "exit_code", "is_lost_peer", "leave"]

EXIT_LOST_PEER = 69  # EX_UNAVAILABLE of sysexits.h: the cause is another rank's
_LOST_CONNECTION = ("Connection closed by peer", "Connection reset by peer", "Broken pipe")  # gloo's, as plain errors
_IN_VAIN = ("Timed out waiting", "Timed out after")  # gloo's and its store's


def exit_code(command: str, work: Callable[[], None]) -> int:
    """Run ``work``; 0, 1 after printing why it failed, or 69 if another rank did.

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
        return EXIT_LOST_PEER
    except RuntimeError as error:
        if not is_lost_peer(error):
            raise
        if any(sign in str(error) for sign in _IN_VAIN):
            print(f"{command}: rank {rank} waited in vain for another rank ({error})", file=sys.stderr)
        return EXIT_LOST_PEER
    except KeyboardInterrupt:
        return 130
    return 0


def leave(code: int) -> NoReturn:
    """End this process at once. To take an interpreter with torch in it apart costs a second or two, which a preempted
    job may not have; what is to be kept has been closed.
    """
    for child in multiprocessing.active_children():
        child.kill()
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def is_lost_peer(error: BaseException) -> bool:
    """Whether a collective failed because another rank has gone: the cause is that rank's to tell."""
    from torch.distributed import DistError

    return isinstance(error, DistError) or (
        isinstance(error, RuntimeError) and any(sign in str(error) for sign in (*_LOST_CONNECTION, *_IN_VAIN))
    )
