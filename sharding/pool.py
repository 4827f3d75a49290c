"""Independent tasks over worker processes that never outlive their parent and never leave it waiting."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from itertools import islice
from multiprocessing.connection import wait as wait_for_handles
from typing import TypeVar

__all__ = ["run_tasks"]

Task = TypeVar("Task")
Result = TypeVar("Result")


def run_tasks(
    work: Callable[[Task], Result],
    tasks: Iterable[Task],
    *,
    workers: int,
    ahead: int | None = None,
    preload: Sequence[str] = (),
    poll: Callable[[], None] = lambda: None,
) -> Iterator[Result]:
    """``work(task)`` of every task, in order of completion.

    Args:
        work: a function of a module (it is found by name in the workers).
        workers: number of processes; 0 works in this one (for tests and debuggers).
        ahead: take no more than so many tasks before their results are there: bounds the memory of large tasks.
        preload: modules to import once, before the workers are forked from the process that did.
        poll: called about twice a second while waiting.

    Raises:
        RuntimeError: a worker died without an exception, e.g. killed for memory.
        Exception: whatever ``work`` raised; the tasks under way are ended.
    """
    if workers == 0:
        yield from map(work, tasks)
        return
    # Not fork: GDAL and arrow hold threads and locks that do not survive it. The fork server has imported, but not
    # used them.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__, *preload])
    before = set(multiprocessing.active_children())
    count = min(workers, max(len(tasks), 1)) if isinstance(tasks, Sized) else workers
    pool = ProcessPoolExecutor(count, mp_context=context, initializer=_prepare_worker)
    try:
        yield from _results((pool.submit(work, task) for task in tasks), ahead, poll)
    except BrokenProcessPool as error:
        raise RuntimeError(
            f"one of {workers} worker processes died without a word: killed from outside, or for using too much memory "
            "(then try fewer workers). What was finished is kept: run the same command again"
        ) from error
    except BaseException:  # also GeneratorExit and KeyboardInterrupt: the caller is not to wait for minutes of work
        for child in set(multiprocessing.active_children()) - before:
            child.terminate()
        raise
    finally:
        pool.shutdown(cancel_futures=True)


def _results(futures: Iterator[Future[Result]], ahead: int | None, poll: Callable[[], None]) -> Iterator[Result]:
    pending = set(islice(futures, ahead))
    while pending:
        done, pending = wait(pending, timeout=0.5, return_when=FIRST_COMPLETED)
        poll()
        for future in done:
            yield future.result()
        pending |= set(islice(futures, len(done)))


def _prepare_worker() -> None:
    """Die with the parent, which ends its workers on Ctrl-C: were they to go by themselves, it might hear of that first
    and take them for lost.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        wait_for_handles([parent.sentinel])
        os._exit(1)  # idle workers would otherwise wait for their next task for ever

    threading.Thread(target=watch, daemon=True).start()
