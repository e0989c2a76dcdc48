"""Work in processes that do nothing else, and end with the process that waits for them."""

import os
import pickle
import signal
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from multiprocessing import get_context, parent_process
from multiprocessing.connection import Connection
from typing import Any, TypeVar

import torch

from lm_softmax.allocator import OPT_OUT, keep_pages

KILLED = "the process was killed, perhaps for its memory"
PAGES_NOT_KEPT = f"the allocator did not take it (no glibc, a MALLOC_ variable, {OPT_OUT})"
Result = TypeVar("Result")


def in_new_process(function: Callable[..., Result], *arguments: Any) -> Result:
    """What a function returns in a process that does nothing else.

    Raises:
        RuntimeError: If the process does not live to return it.
    """
    process = _Process()
    try:
        result: Result = process.call(function, *arguments)
        return result
    finally:
        process.close()


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
        self._process = _Process()
        self._how = make, arguments, num_threads, keeps_pages

    @property
    def pid(self) -> int | None:
        """Of the process, from the first call on."""
        return self._process.pid

    def call(self, method: str) -> Any:
        """What a method returns.

        Raises:
            RuntimeError: If the process does not live to return it.
            ValueError: If pages are to be kept and cannot be.
        """
        return self._process.call(_call_there, self._how, method)

    def close(self) -> None:
        """Ends the process, whatever it is at."""
        self._process.close()


_made: list[Any] = []  # in the other process


def _call_there(how: tuple[Any, ...], method: str) -> Any:
    """What the other process does."""
    if not _made:
        make, arguments, num_threads, keeps_pages = how
        torch.set_num_threads(num_threads)
        if keeps_pages and not keep_pages():
            raise ValueError(f"pages cannot be kept: {PAGES_NOT_KEPT}")
        _made.append(make(*arguments))
    return getattr(_made[0], method)()


class _Process:
    """Calls functions one after the other; it starts with the first."""

    def __init__(self) -> None:
        context = get_context("spawn")
        self._ours, self._theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(self._theirs,))

    @property
    def pid(self) -> int | None:
        return self._process.pid

    def call(self, function: Callable[..., Any], *arguments: Any) -> Any:
        if self._process.pid is None:
            self._process.start()
            self._theirs.close()  # else its end would not be seen
        try:
            self._ours.send((function, arguments))
            is_result, found = self._ours.recv()
        except (EOFError, ConnectionError):
            raise RuntimeError(KILLED) from None
        if is_result:
            return found
        raise found

    def close(self) -> None:
        self._ours.close()
        if self._process.pid is None:
            return
        if hasattr(os, "killpg"):  # with what it has started itself
            with suppress(ProcessLookupError, PermissionError):  # or it has ended: a zombie
                os.killpg(self._process.pid, signal.SIGKILL)
        self._process.kill()
        self._process.join()


def _serve(connection: Connection) -> None:
    """What the other process does all the time."""
    if hasattr(os, "setsid"):
        os.setsid()  # Ctrl-C is for the process that waits, which ends this one
    threading.Thread(target=_end_with_parent, daemon=True).start()
    while True:
        try:
            function, arguments = connection.recv()
        except EOFError:
            sys.exit()
        try:
            answer = True, function(*arguments)
        except Exception as error:
            answer = False, _portable(error)
        connection.send(answer)


def _end_with_parent() -> None:
    """However it ends: it may be killed."""
    parent = parent_process()
    assert parent is not None
    parent.join()
    if hasattr(os, "killpg"):
        os.killpg(0, signal.SIGKILL)
    os._exit(1)


def _portable(error: Exception) -> Exception:
    """As it is, if it can be sent."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error
