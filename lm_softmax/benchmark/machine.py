"""What a figure was measured on: machine, versions, settings of the process."""

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from lm_softmax import __version__
from lm_softmax.allocator import OPT_OUT

PACKAGES = ("torch", "lightning", "triton", "liger-kernel", "cut-cross-entropy")


def machine(device: str) -> dict[str, Any]:
    """Processor, cores that this process may use, threads, memory, GPU, system, load."""
    found: dict[str, Any] = {
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None,
        "threads": torch.get_num_threads(),
        "memory_gib": _memory_gib(),
        "system": platform.platform(),
        "load_average": [round(load, 2) for load in os.getloadavg()],
        "malloc": {n: v for n, v in os.environ.items() if "MALLOC_" in n or n == OPT_OUT},
    }
    if device.startswith("cuda"):
        properties = torch.cuda.get_device_properties(device)
        found["gpu"] = properties.name
        found["gpu_memory_gib"] = round(properties.total_memory / 2**30, 1)
    return found


def versions(device: str) -> dict[str, str]:
    """Of Python, this package, what it is compared with, and CUDA."""
    found = {"python": platform.python_version(), "lm_softmax": __version__}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    if device.startswith("cuda") and torch.version.cuda:
        found["cuda"] = torch.version.cuda
    return found


def one_line(found: dict[str, Any]) -> str:
    """A machine as a reader wants it beside a figure."""
    words = [f"{found['processor']}, {found['cores']} cores, {found['threads']} threads"]
    if "gpu" in found:
        words.insert(0, f"{found['gpu']} ({found['gpu_memory_gib']} GiB)")
    words.append("load average {} at the start".format(found["load_average"][0]))
    return "; ".join(words)


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())


def _memory_gib() -> float | None:
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    except (ValueError, OSError):
        return None
