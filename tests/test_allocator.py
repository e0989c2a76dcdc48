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


COUNT_FAULTS_OF_BLOCKS = """
import resource, sys
import torch
from lm_softmax.kernels import workspace

like = torch.zeros(1)
if sys.argv[1] == "with a work buffer":
    workspace.workspace("logits", (1, 1), like, like.dtype)

def gradients():
    return [torch.ones(2**20) for _ in range(8)]  # 4 MiB each

for _ in range(3):
    gradients()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    gradients()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's allocator is Linux's")
def test_work_buffers_have_the_heap_keep_blocks_of_a_few_megabytes():
    def faults(how):
        environment = {name: value for name, value in os.environ.items() if "MALLOC" not in name}
        command = [sys.executable, "-c", COUNT_FAULTS_OF_BLOCKS, how]
        done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
        return int(done.stdout)

    once = 8 * 2**22 // 4096
    assert faults("with a work buffer") < once
    assert faults("without") > 2 * once
