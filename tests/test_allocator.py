"""Freed memory stays in the process: counted in page faults, not in time."""

import os
import subprocess
import sys

import pytest

COUNT_FAULTS = """
import resource, sys
import torch
import lm_softmax.cli
from lm_softmax.allocator import keep_pages

applied = keep_pages()
faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt
torch.ones(2**24)  # 64 MiB
before = faults()
for _ in range(10):
    torch.ones(2**24)
print(applied, faults() - before)
"""


def run(**variables):
    environment = {name: value for name, value in os.environ.items() if "MALLOC" not in name}
    output = subprocess.run(
        [sys.executable, "-c", COUNT_FAULTS],
        env=environment | variables,
        check=True,
        capture_output=True,
        text=True,
    ).stdout.split()
    return output[0] == "True", int(output[1])


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's allocator is Linux's")
def test_pages_are_kept_unless_refused():
    applied, kept = run()
    assert applied
    refused, returned = run(LM_SOFTMAX_KEEP_PAGES="0")
    assert not refused
    assert returned > 100
    assert kept < returned / 10
    assert run(MALLOC_TRIM_THRESHOLD_="100000")[0] is False


COUNT_MAPPED_BLOCKS = """
import ctypes, sys
import torch
from lm_softmax.kernels import workspace

fields = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost".split()
mallinfo = ctypes.CDLL(None).mallinfo
mallinfo.restype = type("", (ctypes.Structure,), {"_fields_": [(f, ctypes.c_int) for f in fields]})

like = torch.zeros(1)
if sys.argv[1] == "with a work buffer":
    workspace.workspace("logits", (1, 1), like, like.dtype)
before = mallinfo().hblks
gradient = torch.empty(6 * 2**20)  # 24 MiB
print(mallinfo().hblks - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's allocator is Linux's")
@pytest.mark.parametrize(("how", "mapped"), [("with a work buffer", 0), ("without", 1)])
def test_work_buffers_have_the_heap_serve_large_blocks(how, mapped):
    """A block that is mapped costs its page faults at each use."""
    environment = {name: value for name, value in os.environ.items() if "MALLOC" not in name}
    command = [sys.executable, "-c", COUNT_MAPPED_BLOCKS, how]
    done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    assert int(done.stdout) == mapped
