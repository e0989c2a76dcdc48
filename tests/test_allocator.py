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
