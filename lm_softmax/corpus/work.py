"""Batches of text on all cores, in order and in bounded memory."""

import os
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import TypeVar

import pyarrow as pa
from tqdm import tqdm  # type: ignore[import-untyped]

from lm_softmax.corpus.rows import Rows

_Made = TypeVar("_Made")
_BYTES_AT_WORK = 32 * 2**20  # of text on all cores together; some ten times as much while it is cut
_LEAST_BYTES = 2**18  # of a batch


def num_cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def each_batch(
    rows: Rows,
    work: Callable[[pa.Array], tuple[_Made, int]],
    batch_bytes: int,
    label: str,
    num_proc: int | None = None,
) -> Iterator[tuple[pa.Array, _Made]]:
    """Each batch with what `work` makes of it, in order; some batches ahead, on a core each.

    Threads, not processes: the kernels of Arrow and numpy that do the work run side by side, and
    many cores take no more memory than few, since batches get smaller.

    The progress bar is on terminals alone. There is one on a machine, however many processes
    train: only the process that holds the lock of the cache gets here.

    Args:
        rows: The text.
        work: Gives what it made, and the number of tokens.
        batch_bytes: Bytes of a batch, about and at most.
        label: Of the progress bar.
        num_proc: Cores; all if None.
    """
    num_proc = num_proc or num_cores()
    size = min(batch_bytes, max(_LEAST_BYTES, _BYTES_AT_WORK // num_proc))
    begin, num_tokens = time.perf_counter(), 0
    batches = rows.batches(size)
    ahead: deque[tuple[pa.Array, Future[tuple[_Made, int]]]] = deque()
    pool = ThreadPoolExecutor(num_proc)
    bar = tqdm(total=rows.num_rows, desc=label, unit=" rows", unit_scale=True, disable=None)
    try:
        while True:
            for batch in islice(batches, num_proc + 1 - len(ahead)):
                ahead.append((batch, pool.submit(work, batch)))
            if not ahead:
                return
            batch, future = ahead.popleft()
            made, added = future.result()
            num_tokens += added
            rate = num_tokens / (time.perf_counter() - begin)
            bar.set_postfix_str(f"{rate / 1e6:.1f} M tokens/s", refresh=False)
            bar.update(len(batch))
            yield batch, made
    finally:
        bar.close()
        pool.shutdown(cancel_futures=True)  # Ctrl-C and errors wait for what has begun alone
