"""Memory of the GPU and of the host process."""

import os
import sys
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch

from lm_softmax.log_steps import LogSteps, on_host

GIB = 2**30


def host_rss_bytes() -> int | None:
    """Returns the bytes of physical memory that this process holds.

    Read from `/proc` on Linux. macOS only tells the largest value so far, Windows none.
    """
    statm = Path("/proc/self/statm")
    if statm.exists():
        return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    try:
        import resource
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


class MemoryMonitor(pl.Callback):
    """Logs memory in GiB (2**30 bytes), every `log_every_n_steps` steps of the trainer.

    - `mem/peak_allocated_gib`: most memory that tensors held on this rank's GPU since the last log;
    - `mem/peak_reserved_gib`: most that torch's allocator held, which is what others cannot use;
    - `mem/host_rss_gib`: physical memory of this process now (on macOS, the most so far; not on
      Windows), without the workers that load data.

    The first two exist on CUDA only. Their peaks start anew after each log. When the allocator had
    to free its cache and try again, or ran out of memory, there is a warning.

    Attributes:
        peaks: The largest value of each metric that was logged in this fit.
    """

    def __init__(self) -> None:
        self.peaks: dict[str, float] = {}
        self._log_steps = LogSteps()
        self._failures = {"num_alloc_retries": 0, "num_ooms": 0}

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Starts new peaks."""
        self.peaks = {}
        self._log_steps.start(trainer)
        if pl_module.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(pl_module.device)
            self._failures = self._allocator_failures(pl_module.device)

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Logs when the trainer does."""
        if self._log_steps.ended_step(trainer) and self._log_steps.is_due(trainer):
            pl_module.log_dict(on_host(self._measure(pl_module.device)))

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Adds what happened since the last log to `peaks`."""
        self._measure(pl_module.device)

    def _measure(self, device: torch.device) -> dict[str, float]:
        metrics = {}
        if (host_rss := host_rss_bytes()) is not None:
            metrics["mem/host_rss_gib"] = host_rss / GIB
        if device.type == "cuda":
            metrics["mem/peak_allocated_gib"] = torch.cuda.max_memory_allocated(device) / GIB
            metrics["mem/peak_reserved_gib"] = torch.cuda.max_memory_reserved(device) / GIB
            torch.cuda.reset_peak_memory_stats(device)
            self._warn_of_failures(device)
        for name, value in metrics.items():
            self.peaks[name] = max(value, self.peaks.get(name, 0.0))
        return metrics

    @staticmethod
    def _allocator_failures(device: torch.device) -> dict[str, int]:
        stats = torch.cuda.memory_stats(device)
        return {name: stats.get(name, 0) for name in ("num_alloc_retries", "num_ooms")}

    def _warn_of_failures(self, device: torch.device) -> None:
        failures = self._allocator_failures(device)
        new = {name: failures[name] - count for name, count in self._failures.items()}
        self._failures = failures
        if any(new.values()):
            warnings.warn(
                f"GPU memory is short: since the last log the allocator freed its cache and tried"
                f" again {new['num_alloc_retries']} times and failed {new['num_ooms']} times;"
                " a smaller batch is faster",
                stacklevel=2,
            )
