"""The memory of a step or a call, in a process of its own."""

import ctypes
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from lm_softmax.benchmark.contestants import Contestant, Entry, Loss, Workshop
from lm_softmax.benchmark.line_up import find_entry
from lm_softmax.benchmark.problem import Problem
from lm_softmax.benchmark.processes import in_new_process
from lm_softmax.specs import Spec

STATUS, CLEAR_REFS = Path("/proc/self/status"), Path("/proc/self/clear_refs")
RESET_HIGH_WATER = "5"  # see proc(5)
MIB = 2**20


class Memory(NamedTuple):
    """Of the first forward and backward pass, in MiB.

    Attributes:
        extra_mib: High-water mark during the pass less what was held before it, when parameters,
            hidden vectors and targets were there: logits, work buffers that stay, and gradients.
        gradients_mib: The gradients in it, of parameters and hidden vectors.
        peak_mib: The high-water mark itself: on a CPU the resident memory of the process, libraries
            and all; on a GPU what torch had allocated.
    """

    extra_mib: float
    gradients_mib: float
    peak_mib: float


class HighWater(NamedTuple):
    """Bytes."""

    before: int
    peak: int


def measure(problem: Problem, entry: Entry, *, bias: bool, num_threads: int) -> Memory:
    """Measures a contestant in a new process.

    Its allocator is as by default: kept pages would hide what a step adds.

    Args:
        problem: The problem.
        entry: The contestant.
        bias: See `line_up`.
        num_threads: Of torch.

    Raises:
        RuntimeError: If there is no figure, with the reason.
    """
    return in_new_process(_measure_here, problem, entry.name, entry.spec, bias, num_threads)


def high_water(step: Callable[[], object], device: str) -> HighWater:
    """Bytes in use before a step, and at most during it.

    On a CPU the resident memory of the process, on a GPU what torch has allocated.

    Raises:
        RuntimeError: If there is no such figure.
    """
    return (_on_cuda if device.startswith("cuda") else _on_cpu)(step, device)


def _measure_here(problem: Problem, name: str, spec: Spec, bias: bool, num_threads: int) -> Memory:
    """What the new process does."""
    torch.set_num_threads(num_threads)
    entry = find_entry(problem, name, spec, bias=bias)
    workshop = Workshop(problem)
    contestant = workshop.build(entry)
    _tiny_step(entry, workshop)
    before, peak = high_water(contestant.forward_backward, problem.device)
    return Memory((peak - before) / MIB, _gradients(contestant) / MIB, peak / MIB)


def _tiny_step(entry: Entry, workshop: Workshop) -> None:
    """Loads libraries and starts threads, by a step over two tokens, a frequent and a rare one."""
    hidden, target = workshop.inputs
    two = torch.stack([target.argmin(), target.argmax()])
    inputs = hidden.detach()[two].requires_grad_(), target[two]
    contestant = entry.make(workshop.head(entry), inputs)
    contestant.forward_backward()
    contestant.clear()


def _on_cuda(step: Callable[[], object], device: str) -> HighWater:
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    step()
    torch.cuda.synchronize(device)
    return HighWater(before, torch.cuda.max_memory_allocated(device))


def _on_cpu(step: Callable[[], object], device: str) -> HighWater:
    _give_back()
    try:
        CLEAR_REFS.write_text(RESET_HIGH_WATER)
        before = read_status("VmRSS")
    except (OSError, KeyError) as error:
        raise RuntimeError(f"/proc gives no high-water mark that can be reset: {error}") from None
    step()
    return HighWater(before, read_status("VmHWM"))


def _give_back() -> None:
    """Lets glibc return what was freed, so that it is not taken again unseen."""
    if sys.platform == "linux":
        trim: Callable[[int], int] | None = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)


def read_status(field: str) -> int:
    """A line of /proc/self/status, in bytes."""
    lines = (line.partition(":") for line in STATUS.read_text(encoding="ascii").splitlines())
    values = {name: value for name, _, value in lines}
    return int(values[field].split()[0]) * 1024


def _gradients(contestant: Contestant) -> int:
    tensors: list[Tensor] = [*contestant.parameters()]
    if isinstance(contestant, Loss):
        tensors.append(contestant.hidden)
    return sum(_num_bytes(tensor.grad) for tensor in tensors if tensor.grad is not None)


def _num_bytes(gradient: Tensor) -> int:
    if not gradient.is_sparse:
        return gradient.nbytes
    gradient = gradient.coalesce()
    return gradient.indices().nbytes + gradient.values().nbytes
