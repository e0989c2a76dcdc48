"""Processes of the benchmark: what they are like, and how they end."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from lm_softmax.benchmark.processes import KILLED, OwnProcess, in_new_process

WAITS = """
import threading
from lm_softmax.benchmark.processes import OwnProcess

process = OwnProcess(threading.Event, (), num_threads=1, keeps_pages=False)
process.call("is_set")
print(process.pid, flush=True)
process.call("wait")
"""


def resident() -> int:
    """Bytes."""
    pages = Path("/proc/self/statm").read_text(encoding="ascii").split()[1]
    return int(pages) * os.sysconf("SC_PAGE_SIZE")


class TwoPartsError(Exception):
    """Cannot be unpickled."""

    def __init__(self, one: str, other: str) -> None:
        super().__init__(f"{one} and {other}")


class Told:
    """What the other process is asked."""

    def __init__(self, number: int) -> None:
        self.number = number

    def count(self) -> tuple[int, int, int]:
        """Calls so far, process, threads."""
        self.number += 1
        return self.number, os.getpid(), torch.get_num_threads()

    def keeps(self) -> bool:
        """Whether 256 MB that are freed stay."""
        before = resident()
        torch.ones(2**26)
        return resident() - before > 2**27

    def fail(self) -> None:
        """With what cannot be sent."""
        raise TwoPartsError("one", "other")

    def refuse(self) -> None:
        """With what can."""
        raise OSError(2, "no such thing")

    def interrupt(self) -> None:
        """As Ctrl-C would, in the midst of long work."""
        os.kill(os.getppid(), signal.SIGINT)
        time.sleep(600)


@pytest.fixture(scope="module")
def process() -> Iterator[OwnProcess]:
    one = OwnProcess(Told, (5,), num_threads=1, keeps_pages=False)
    yield one
    one.close()


def is_alive(pid: int | None) -> bool:
    """A process that has ended and is waited for is not."""
    assert pid is not None
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="ascii")
    except FileNotFoundError:
        return False
    return stat.rpartition(")")[2].split()[0] != "Z"


def test_it_lives_from_call_to_call(process: OwnProcess) -> None:
    assert process.call("count") == (6, process.pid, 1)
    assert process.call("count") == (7, process.pid, 1)
    assert process.pid != os.getpid()


def test_errors_are_those_of_the_function(process: OwnProcess) -> None:
    with pytest.raises(OSError, match="no such thing"):
        process.call("refuse")
    with pytest.raises(RuntimeError, match="TwoPartsError: one and other"):
        process.call("fail")
    assert process.call("count")[1] == process.pid


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's allocator is Linux's")
def test_pages_are_kept_where_they_are_to_be(
    process: OwnProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in os.environ if "MALLOC" in name]:
        monkeypatch.delenv(name)
    keeping = OwnProcess(Told, (0,), num_threads=1, keeps_pages=True)
    try:
        assert keeping.call("keeps")
        assert not process.call("keeps")
    finally:
        keeping.close()


def test_a_process_that_cannot_keep_pages_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LM_SOFTMAX_KEEP_PAGES", "0")
    refused = OwnProcess(Told, (0,), num_threads=1, keeps_pages=True)
    try:
        with pytest.raises(ValueError, match="pages cannot be kept"):
            refused.call("count")
    finally:
        refused.close()


def test_one_that_was_killed_is_told_from_one_that_fails() -> None:
    with pytest.raises(RuntimeError, match=KILLED):
        in_new_process(signal.raise_signal, signal.SIGKILL)


@pytest.fixture
def takes_interrupts() -> Iterator[None]:
    """A shell has those that it starts in the background ignore them."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.usefixtures("takes_interrupts")
def test_an_interrupt_ends_it_in_the_midst_of_a_call() -> None:
    process = OwnProcess(Told, (0,), num_threads=1, keeps_pages=False)
    with pytest.raises(KeyboardInterrupt):
        process.call("interrupt")
    assert is_alive(process.pid)
    process.close()
    assert not is_alive(process.pid)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_it_ends_with_a_parent_that_is_killed() -> None:
    command = [sys.executable, "-c", WAITS]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        assert is_alive(pid)
        parent.kill()
    for _ in range(600):
        if not is_alive(pid):
            return
        time.sleep(0.1)
    os.kill(pid, signal.SIGKILL)
    pytest.fail("it lives on without its parent")
