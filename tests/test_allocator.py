"""Freed memory stays in the process: told by glibc's own counts, not by time."""

import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="glibc's allocator is Linux's")

COUNTS = """
import ctypes, sys
import torch

fields = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost".split()
mallinfo = ctypes.CDLL(None).mallinfo
mallinfo.restype = type("", (ctypes.Structure,), {"_fields_": [(f, ctypes.c_int) for f in fields]})
"""
KEPT_PAGES = """
from lm_softmax.allocator import keep_pages

applied, before = keep_pages(), mallinfo().hblks
large = torch.empty(2**24)  # 64 MiB
mapped = mallinfo().hblks - before
del large
print(applied, mapped, mallinfo().fordblks >= 2**26)
"""
LARGE_BLOCK = """
from lm_softmax.kernels import workspace

like = torch.zeros(1)
if sys.argv[1] == "with a work buffer":
    workspace.workspace("logits", (1, 1), like, like.dtype)
before = mallinfo().hblks
gradient = torch.empty(6 * 2**20)  # 24 MiB
print(mallinfo().hblks - before)
"""


def printed(program, *arguments, **variables):
    environment = {name: value for name, value in os.environ.items() if "MALLOC" not in name}
    return subprocess.run(
        [sys.executable, "-c", COUNTS + program, *arguments],
        env=environment | variables,
        check=True,
        capture_output=True,
        text=True,
    ).stdout.split()


def test_pages_are_kept_unless_refused():
    """A block that is mapped goes back to the system when it is freed."""
    assert printed(KEPT_PAGES) == ["True", "0", "True"]
    assert printed(KEPT_PAGES, LM_SOFTMAX_KEEP_PAGES="0") == ["False", "1", "False"]
    assert printed(KEPT_PAGES, MALLOC_TRIM_THRESHOLD_="100000") == ["False", "1", "False"]


def test_work_buffers_have_the_heap_serve_large_blocks_unless_refused():
    """A block that is mapped costs its page faults at each use."""
    assert printed(LARGE_BLOCK, "with a work buffer") == ["0"]
    assert printed(LARGE_BLOCK, "without") == ["1"]
    assert printed(LARGE_BLOCK, "with a work buffer", LM_SOFTMAX_KEEP_PAGES="0") == ["1"]
