"""Work in processes that do nothing else."""

import signal
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from typing import Any, TypeVar

import torch

from lm_softmax.allocator import keep_pages

KILLED = "the process was killed, perhaps for its memory"
Result = TypeVar("Result")


def in_new_process(function: Callable[..., Result], *arguments: Any) -> Result:
    """What a function returns in a process that does nothing else.

    Raises:
        RuntimeError: If the process does not live to return it.
    """
    with _pool() as pool:
        return _result(pool, function, *arguments)


class OwnProcess:
    """Something that is made, and called, in a process of its own, with an allocator of its own.

    Args:
        make: Makes it, at the first call; a class or function of a module.
        arguments: What `make` takes; plain values.
        num_threads: Of torch.
        keeps_pages: Whether the allocator keeps freed memory (`allocator.keep_pages`).
    """

    def __init__(
        self,
        make: Callable[..., Any],
        arguments: tuple[Any, ...],
        *,
        num_threads: int,
        keeps_pages: bool,
    ) -> None:
        self._pool = _pool()
        self._how = make, arguments, num_threads, keeps_pages

    def call(self, method: str) -> Any:
        """What a method returns.

        Raises:
            RuntimeError: If the process does not live to return it.
        """
        return _result(self._pool, _call_there, self._how, method)

    def close(self) -> None:
        """Ends the process."""
        self._pool.shutdown()


_made: list[Any] = []  # in the other process


def _call_there(how: tuple[Any, ...], method: str) -> Any:
    """What the other process does."""
    if not _made:
        make, arguments, num_threads, keeps_pages = how
        torch.set_num_threads(num_threads)
        if keeps_pages:
            keep_pages()
        _made.append(make(*arguments))
    return getattr(_made[0], method)()


def _pool() -> ProcessPoolExecutor:
    return ProcessPoolExecutor(1, get_context("spawn"), _leave_interrupts)


def _leave_interrupts() -> None:
    """The process that waits for this one takes them."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _result(pool: ProcessPoolExecutor, function: Callable[..., Result], *arguments: Any) -> Result:
    try:
        return pool.submit(function, *arguments).result()
    except BrokenProcessPool:
        raise RuntimeError(KILLED) from None
