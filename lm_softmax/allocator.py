"""Keep freed memory in the process, where its pages are used again, or give it back."""

import ctypes
import os
import sys
from functools import cache

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of glibc's malloc.h
OPT_OUT = "LM_SOFTMAX_KEEP_PAGES"
MOST_LEARNT_BYTES = 2**25 - 2**16  # glibc's heap serves no blocks of 32 MiB and more unasked


def keep_pages() -> bool:
    """Tell glibc to serve large blocks from its heap and never to give them back.

    By default it maps each large block anew and unmaps it when it is freed, so that on a CPU each
    step pays for the page faults of logits and gradients. The same as
    `MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=2147483647`, for this process. The process keeps its
    largest size. Nothing is done on other systems, where one of those variables is set, or with
    `LM_SOFTMAX_KEEP_PAGES=0`.

    Returns:
        Whether the allocator took the settings.
    """
    chosen = {"MALLOC_MMAP_MAX_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_"}
    if sys.platform != "linux" or os.environ.get(OPT_OUT) == "0" or chosen & set(os.environ):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:  # musl has none
        return False
    return bool(mallopt(M_MMAP_MAX, 0)) and bool(mallopt(M_TRIM_THRESHOLD, 2**31 - 1))


@cache
def serve_from_heap() -> None:
    """Have glibc's heap serve blocks of a few MB: mapped, each costs its page faults at each use.

    It maps blocks that are larger than the largest one that it has unmapped so far
    (`M_MMAP_THRESHOLD` in mallopt(3)), so this depends on what the process happens to have freed
    before. The block that is freed here is not touched. Nothing is done with
    `LM_SOFTMAX_KEEP_PAGES=0`.
    """
    if os.environ.get(OPT_OUT) != "0":
        bytes(MOST_LEARNT_BYTES)


def give_back_pages() -> None:
    """Return freed memory to the system, of which glibc keeps some hundred MB after much work.

    Nothing is done where there is no glibc.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)
