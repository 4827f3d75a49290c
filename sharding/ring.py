"""Buffers that processes share and use again and again.

A fresh buffer for every batch costs more than filling it: each new page is faulted in and zeroed, about as long as
copying a patch from the page cache takes. A ring is made once. Its memory is anonymous (memfd): it has no name that a
killed run could leave behind, and does not count against the size of /dev/shm, which containers keep at 64 MB.
"""

import mmap
import os
from collections.abc import Sequence
from multiprocessing.reduction import DupFd
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["Ring"]


class Ring:
    """``count`` buffers, each with room for one array of every given shape and dtype.

    Forked processes inherit it; pickled into spawned ones it shares the same memory.
    """

    def __init__(self, arrays: Sequence[tuple[tuple[int, ...], str]], count: int) -> None:
        self._arrays, self.count = list(arrays), count
        sizes = [int(np.prod(shape)) * np.dtype(dtype).itemsize for shape, dtype in arrays]
        # every array at a page: pages can be locked for a GPU's transfers, and no two workers write to one cache line
        padded = [-(-size // mmap.PAGESIZE) * mmap.PAGESIZE for size in sizes]
        self._starts = [0, *np.cumsum(padded).tolist()]
        self._file = os.memfd_create("adagc-ring", os.MFD_CLOEXEC)
        os.ftruncate(self._file, max(self.nbytes, mmap.PAGESIZE))
        self._memory = mmap.mmap(self._file, 0)

    @property
    def nbytes(self) -> int:
        """Of all buffers."""
        return int(self._starts[-1]) * self.count

    @property
    def memory(self) -> NDArray[np.uint8]:
        """All of it, as bytes."""
        return np.frombuffer(self._memory, dtype=np.uint8)

    def arrays(self, number: int) -> list[NDArray[Any]]:
        """The arrays of buffer ``number``, as views."""
        first = number * self._starts[-1]
        return [
            np.frombuffer(self._memory, dtype, int(np.prod(shape)), first + start).reshape(shape)
            for (shape, dtype), start in zip(self._arrays, self._starts)
        ]

    def __getstate__(self) -> dict[str, Any]:
        # only multiprocessing can pickle it: the file goes along as a descriptor
        return self.__dict__ | {"_memory": None, "_file": DupFd(self._file)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._file = state["_file"].detach()
        self._memory = mmap.mmap(self._file, 0)

    def __del__(self) -> None:
        if isinstance(getattr(self, "_file", None), int):
            os.close(self._file)  # the mapping goes with the last array that views it
