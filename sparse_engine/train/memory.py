"""What the C library does with the memory of activations between training steps."""

from __future__ import annotations

import ctypes
import sys

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4
_DEFAULTS = {_M_TRIM_THRESHOLD: 128 * 1024, _M_MMAP_MAX: 65536}


def keep_freed_memory(keep: bool = True) -> bool:
    """Let this process keep the memory that a training step frees, for the next one.

    By default glibc gives large tensors back to the system at once, and the next step's activations are new pages that
    the system clears at first touch. That is a tenth of a dense training step on the CPU and a third of a very sparse
    one. It is a setting of the whole process, for processes that train.

    Example:
        >>> keep_freed_memory()
        True
        >>> keep_freed_memory(False)
        True

    Args:
        keep: False brings back glibc's initial settings; what is free then goes back to the system with time.

    Returns:
        Whether the C library could be told; False without glibc, where nothing changes.
    """
    if sys.platform != "linux":
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    # No block of its own for a large tensor, and no shrinking of the heap that they then all come from.
    wanted = {_M_MMAP_MAX: 0, _M_TRIM_THRESHOLD: -1} if keep else _DEFAULTS
    return all(mallopt(option, value) == 1 for option, value in wanted.items())
