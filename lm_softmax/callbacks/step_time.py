"""Step time and tokens per second, measured without waiting for the device at each step."""

from dataclasses import dataclass, field
from time import perf_counter
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch

from lm_softmax.log_steps import LogSteps, ever_logs, on_host
from lm_softmax.parallel import Replica

MAX_UNREAD_STEPS = 1000  # of a trainer that never logs: each holds events on CUDA


@dataclass
class Timing:
    """What was measured over some steps.

    Attributes:
        step_ms: Duration of each optimizer step, in milliseconds.
        tokens: Number of target positions of these steps, ignored ones included.
        wall_s: Seconds the steps took together, with all that happened between them.
    """

    step_ms: list[float] = field(default_factory=list)
    tokens: int = 0
    wall_s: float = 0.0

    def add(self, other: "Timing") -> None:
        """Appends another measurement."""
        self.step_ms.extend(other.step_ms)
        self.tokens += other.tokens
        self.wall_s += other.wall_s

    def metrics(self) -> dict[str, float]:
        """Returns `perf/step_time_ms` (median), `perf/step_time_p90_ms` and `perf/tokens_per_s`.

        A figure for which nothing was measured is left out.
        """
        metrics: dict[str, float] = {}
        if self.step_ms:
            median, p90 = np.percentile(self.step_ms, [50, 90])
            metrics |= {"perf/step_time_ms": float(median), "perf/step_time_p90_ms": float(p90)}
        if self.wall_s > 0 and self.tokens:
            metrics["perf/tokens_per_s"] = self.tokens / self.wall_s
        return metrics


class StepClock:
    """Times optimizer steps and the training around them; knows nothing of trainers.

    Wall time runs between `resume` and `pause`. A step's time is the sum over its batches of what
    passed between `start_batch` and `end_batch`. On CUDA that is read from events, which are only
    waited for in `pause` and `read`; elsewhere it is read from the host's clock.

    Args:
        use_cuda_events: Whether the steps run on a CUDA device.
        wall_s: Wall time to go on from, in seconds.
        tokens: Number of tokens to go on from.
    """

    def __init__(
        self, use_cuda_events: bool = False, *, wall_s: float = 0.0, tokens: int = 0
    ) -> None:
        self.tokens = tokens
        self._use_cuda_events = use_cuda_events
        self._wall_s = wall_s
        self._running_since: float | None = None
        self._window_start = (wall_s, tokens)
        self._batches: list[tuple[Any, Any]] = []
        self._steps: list[list[tuple[Any, Any]]] = []
        self._batch_start: Any = None

    @property
    def wall_s(self) -> float:
        """Seconds that the clock has run."""
        if self._running_since is None:
            return self._wall_s
        return self._wall_s + perf_counter() - self._running_since

    def resume(self) -> None:
        """Lets wall time run, if it does not already."""
        if self._running_since is None:
            self._running_since = perf_counter()

    def pause(self, *, wait: bool = True) -> None:
        """Stops wall time, once the work queued so far is done or at once."""
        if wait:
            self._wait()
        self._wall_s = self.wall_s
        self._running_since = None

    def start_batch(self) -> None:
        """Marks the start of a batch."""
        self._batch_start = self._mark()

    def end_batch(self, tokens: int, *, ends_step: bool) -> None:
        """Marks the end of a batch of `tokens` positions, the last of its step or not."""
        self._batches.append((self._batch_start, self._mark()))
        self.tokens += tokens
        if ends_step:
            self._steps.append(self._batches)
            self._batches = []

    def read(self) -> Timing:
        """Returns what was measured since the last `read`, waiting for the work queued so far."""
        self._wait()
        wall_s, tokens = self._window_start
        self._window_start = (self.wall_s, self.tokens)
        steps, self._steps = self._steps, []
        return Timing(
            step_ms=[sum(map(self._milliseconds, step)) for step in steps],
            tokens=self.tokens - tokens,
            wall_s=self._window_start[0] - wall_s,
        )

    def _mark(self) -> Any:
        if not self._use_cuda_events:
            return perf_counter()
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event

    def _milliseconds(self, batch: tuple[Any, Any]) -> float:
        start, end = batch
        return start.elapsed_time(end) if self._use_cuda_events else (end - start) * 1000

    def _wait(self) -> None:
        if self._use_cuda_events and (self._steps or self._batches):
            last = self._batches[-1] if self._batches else self._steps[-1][-1]
            last[1].synchronize()


class StepTimeMonitor(pl.Callback):
    """Logs how fast training goes, every `log_every_n_steps` steps of the trainer.

    - `perf/step_time_ms`: median time of an optimizer step, in milliseconds, without data loading;
    - `perf/step_time_p90_ms`: its 90th percentile;
    - `perf/tokens_per_s`: target positions per second, ignored ones included, over all ranks (this
      rank's times the world size), by wall time and with data loading; also shown in the progress
      bar;
    - `perf/train_time_s`: seconds trained so far, warm-up included, across resumed fits; also
      logged at each validation, so that perplexity can be drawn against it.

    Validation and the writing of checkpoints are left out of all of them (with a checkpoint goes
    the loading of the batch after it; checkpoints of the weights alone announce themselves to no
    callback and are not left out). On CUDA, steps are timed by events that are read when the
    trainer logs, so that no step waits for the device. On other accelerators the host's clock sees
    only what it waits for: there, tokens per second is the figure to use.

    Batches must have a tensor `target`, like those of `TextDataModule`.

    Args:
        warmup_steps: Number of optimizer steps at the start of each fit that are left out of step
            times and tokens per second (compilation, memory allocation, worker start).

    Attributes:
        timing: Everything measured after warm-up in this fit.

    Raises:
        ValueError: If `warmup_steps` is negative.
    """

    def __init__(self, warmup_steps: int = 5) -> None:
        if warmup_steps < 0:
            raise ValueError(f"warmup_steps is {warmup_steps}: it must not be negative")
        self.warmup_steps = warmup_steps
        self.timing = Timing()
        self._clock = StepClock()
        self._log_steps = LogSteps()
        self._training = False
        self._num_steps = 0

    @property
    def train_time_s(self) -> float:
        """Seconds trained so far, without validation and checkpoints."""
        return self._clock.wall_s

    @property
    def tokens_seen(self) -> int:
        """Number of target positions so far, over all ranks; ignored ones are included."""
        return self._clock.tokens

    def state_dict(self) -> dict[str, float]:
        """Returns the time and tokens so far."""
        return {"train_time_s": self.train_time_s, "tokens_seen": self.tokens_seen}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes on from the time and tokens of a checkpoint."""
        self._clock = StepClock(
            wall_s=state_dict["train_time_s"], tokens=int(state_dict["tokens_seen"])
        )

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Starts the clock."""
        use_cuda_events = pl_module.device.type == "cuda"
        self._clock = StepClock(use_cuda_events, wall_s=self.train_time_s, tokens=self.tokens_seen)
        self._clock.resume()
        self._log_steps.start(trainer)
        self.timing = Timing()
        self._training = True
        self._num_steps = 0

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Marks the start of a batch."""
        self._clock.resume()
        self._clock.start_batch()

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Marks the end of a batch and logs when the trainer does."""
        ends_step = self._log_steps.ended_step(trainer)
        positions = batch.target.numel() * Replica.of(trainer).size
        self._clock.end_batch(positions, ends_step=ends_step)
        if not ends_step:
            return
        self._num_steps += 1
        if self._num_steps == self.warmup_steps:
            self._clock.read()
        elif self._num_steps > self.warmup_steps and self._log_steps.is_due(trainer):
            window = self._clock.read()
            self.timing.add(window)
            metrics = window.metrics() | {"perf/train_time_s": self.train_time_s}
            for name, value in on_host(metrics).items():
                pl_module.log(name, value, prog_bar=name == "perf/tokens_per_s")
        elif self._num_steps % MAX_UNREAD_STEPS == 0 and not ever_logs(trainer):
            window = self._clock.read()
            if self._num_steps > self.warmup_steps:
                self.timing.add(window)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Stops the clock."""
        if self._training:
            self._clock.pause()

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Logs the time trained so far beside the validation's results."""
        if self._training:
            pl_module.log("perf/train_time_s", self.train_time_s, sync_dist=True)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Lets the clock run again."""
        if self._training:
            self._clock.resume()

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Stops the clock until the next batch."""
        if self._training:
            self._clock.pause()

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Stops the clock and adds the steps since the last log to `timing`."""
        self._clock.pause()
        if self._num_steps > self.warmup_steps:
            self.timing.add(self._clock.read())
        self._training = False

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        """Stops the clock without a word to the device, which may be what failed."""
        if self._training:
            self._clock.pause(wait=False)
        self._training = False
