"""One record of a run: `summary.json`, TensorBoard's HParams tab and custom scalars."""

import math
import os
import platform
from json import dumps
from pathlib import Path
from time import perf_counter
from typing import Any, TypeVar

import lightning
import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch import nn

from lm_softmax import __version__
from lm_softmax.callbacks.closing import closing_lines
from lm_softmax.callbacks.memory import MemoryMonitor
from lm_softmax.callbacks.sample_text import SampleText
from lm_softmax.callbacks.step_time import StepTimeMonitor

FILE_NAME = "summary.json"

# Category, chart, regular expressions of the tags drawn together.
LAYOUT = {
    "Perplexity": {
        "perplexity": ["Multiline", ["^train/ppl$", "^val/ppl$", "^val/ppl_unigram$"]],
        "bits per byte": ["Multiline", ["^val/bits_per_byte$"]],
    },
    "Loss": {"nats per token": ["Multiline", ["^train/loss$", "^val/nll$"]]},
    "Speed": {
        "tokens per second": ["Multiline", ["^perf/tokens_per_s$"]],
        "step time (ms)": ["Multiline", ["^perf/step_time_ms$", "^perf/step_time_p90_ms$"]],
    },
    "Memory": {"memory (GiB)": ["Multiline", ["^mem/.*_gib$"]]},
}

CallbackT = TypeVar("CallbackT", bound=pl.Callback)


class RunSummary(pl.Callback):
    """Keeps `summary.json` in the run's folder, `trainer.default_root_dir`, and TensorBoard's tabs.

    The file is written when the training starts, after each validation, and when the fit ends, by
    an interruption or an error of the training too; `status` says which: "running", "finished",
    "interrupted" or "failed". A fit that is refused before leaves the file as it was. It holds what
    tells runs apart and compares them: head and encoder with their options, vocabulary, parameters,
    the metrics of the best (by `val/nll`) and the last validation, speed, memory, time, checkpoints
    (relative to the folder), versions. Speed and memory come from `StepTimeMonitor` and
    `MemoryMonitor`, the text from `SampleText`, where the trainer has them.

    Each `TensorBoardLogger` gets a layout of custom scalars at the start, and at the end the
    hyperparameters with the final metrics (`final/...`), which fill the HParams tab.

    Attributes:
        summary: What the file holds; empty before the fit and on ranks other than zero.
    """

    def __init__(self) -> None:
        self.summary: dict[str, Any] = {}
        self._model: dict[str, Any] = {}
        self._best: dict[str, float] = {}
        self._last: dict[str, float] = {}
        self._measured: dict[str, Any] = {}  # speed and memory, until they are measured anew
        self._earlier_s = 0.0
        self._start = 0.0
        self._training = False

    def lines(self) -> list[str]:
        """Returns the closing lines of the run, for people; none on ranks other than zero."""
        return closing_lines(self.summary)

    def state_dict(self) -> dict[str, Any]:
        """Returns what a resumed fit goes on from."""
        measured = {name: self.summary[name] for name in ("perf", "mem") if name in self.summary}
        return {
            "best": self._best,
            "last": self._last,
            "wall_time_s": self._wall_time_s,
            "measured": measured,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes on from the fit that wrote a checkpoint."""
        self._best, self._last = state_dict["best"], state_dict["last"]
        self._earlier_s = state_dict["wall_time_s"]
        self._measured = state_dict.get("measured", {})

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Describes the model, while its parameters are whole on each rank."""
        if stage == "fit":
            self._model = _describe_model(pl_module)

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Starts the clock."""
        self._start = perf_counter()

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Writes the layout of the charts and the first summary."""
        self._training = True
        for logger in _tensorboards(trainer):
            logger.experiment.add_custom_scalars(LAYOUT)
        self._write(trainer, "running")

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Notes the metrics of the validation."""
        if not self._training or trainer.sanity_checking:
            return
        metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
        self._last = {
            name: value
            for name, value in metrics.items()
            if name.startswith("val/") or name == "perf/train_time_s"
        }
        self._last["step"] = trainer.global_step
        nll, best = (metrics.get("val/nll", math.inf) for metrics in (self._last, self._best))
        if not self._best or nll < best or math.isnan(best):
            self._best = self._last
        self._write(trainer, "running")

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Closes the summary of a fit that came to its end: last, as it vouches for the rest."""
        self._describe(trainer, "finished")
        self._log_result(trainer)
        self._save(trainer)
        self._stop_clock()

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        """Closes the summary of a fit that did not."""
        if self._training:
            interrupted = isinstance(exception, KeyboardInterrupt | SIGTERMException)
            self._write(trainer, "interrupted" if interrupted else "failed")
            self._log_result(trainer)
            self._stop_clock()

    @property
    def _wall_time_s(self) -> float:
        return self._earlier_s + (perf_counter() - self._start if self._training else 0.0)

    def _log_result(self, trainer: pl.Trainer) -> None:
        hparams, metrics = _for_hparams_tab(self.summary)
        for board in _tensorboards(trainer):
            board.log_hyperparams(hparams, metrics, trainer.global_step)
        for logger in trainer.loggers:
            logger.save()

    def _stop_clock(self) -> None:
        self._earlier_s, self._training = self._wall_time_s, False

    def _write(self, trainer: pl.Trainer, status: str) -> None:
        self._describe(trainer, status)
        self._save(trainer)

    def _describe(self, trainer: pl.Trainer, status: str) -> None:
        if not trainer.is_global_zero:
            return
        folder = Path(trainer.default_root_dir)
        self.summary = {
            "status": status,
            "run_dir": str(folder),
            **self._model,
            "best": self._best,
            "last": self._last,
            **{n: value or self._measured.get(n, value) for n, value in _measured(trainer).items()},
            "steps": trainer.global_step,
            "wall_time_s": self._wall_time_s,
            "checkpoints": _checkpoints(trainer, folder),
            "device": _device_name(trainer.strategy.root_device),
            "world_size": trainer.world_size,
            "precision": str(trainer.precision),
            "versions": {
                "lm_softmax": __version__,
                "lightning": lightning.__version__,
                "torch": torch.__version__,
                "python": platform.python_version(),
            },
        }

    def _save(self, trainer: pl.Trainer) -> None:
        if trainer.is_global_zero:
            text = dumps(_plain(self.summary), indent=2, ensure_ascii=False) + "\n"
            write_atomically(Path(trainer.default_root_dir, FILE_NAME), text)


def write_atomically(path: Path, text: str) -> None:
    """Writes a file so that a reader finds all of it or the one before."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _describe_model(pl_module: Any) -> dict[str, Any]:
    vocab, options = pl_module.vocab, {}
    for part in ("head", "encoder"):
        options[part] = pl_module.hparams.get(part, {}).get("init_args", {})
    return {
        "head": type(pl_module.head).__name__,
        "head_options": {**options["head"], **pl_module.head.structure()},
        "encoder": type(pl_module.encoder).__name__,
        "encoder_options": options["encoder"],
        "vocab_size": pl_module.head.vocab_size,
        "vocab_fingerprint": None if vocab is None else vocab.fingerprint,
        "num_parameters": {
            "total": _num_parameters(pl_module),
            "head": _num_parameters(pl_module.head),
            "encoder": _num_parameters(pl_module.encoder),
        },
    }


def _num_parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _measured(trainer: pl.Trainer) -> dict[str, Any]:
    measured: dict[str, Any] = {}
    if (speed := _find(trainer, StepTimeMonitor)) is not None:
        measured |= {
            "perf": speed.timing.metrics(),
            "tokens_seen": speed.tokens_seen,
            "train_time_s": speed.train_time_s,
        }
    if (memory := _find(trainer, MemoryMonitor)) is not None:
        measured["mem"] = memory.peaks
    if (sample := _find(trainer, SampleText)) is not None:
        measured["sample_text"] = sample.last_text
    return measured


def _checkpoints(trainer: pl.Trainer, folder: Path) -> dict[str, str]:
    paths: dict[str, str] = {}
    for callback in trainer.checkpoint_callbacks:
        if isinstance(callback, ModelCheckpoint):
            kind = "best" if callback.monitor else "last"
            for name, path in (
                (kind, callback.best_model_path),
                ("last", callback.last_model_path),
            ):
                if path:
                    paths.setdefault(name, os.path.relpath(path, folder))
    return paths


def _for_hparams_tab(summary: dict[str, Any]) -> tuple[dict[str, Any], dict[str, float]]:
    """Few columns: the tab shows the first ones by the alphabet, and each nested option as one."""
    names = ["head", "encoder", "vocab_size", "vocab_fingerprint"]
    names += ["device", "world_size", "precision"]
    hparams = {name: _plain(summary.get(name)) for name in names}
    hparams["head_options"] = dumps(_plain(summary.get("head_options")))
    hparams["num_parameters"] = summary.get("num_parameters", {}).get("total")
    measured = {**summary.get("last", {}), **summary.get("perf", {}), **summary.get("mem", {})}
    measured.pop("step", None)
    return hparams, {f"final/{name.partition('/')[2]}": value for name, value in measured.items()}


def _tensorboards(trainer: pl.Trainer) -> list[TensorBoardLogger]:
    loggers = [logger for logger in trainer.loggers if isinstance(logger, TensorBoardLogger)]
    return loggers if trainer.is_global_zero else []


def _find(trainer: pl.Trainer, kind: type[CallbackT]) -> CallbackT | None:
    callbacks: list[pl.Callback] = trainer.callbacks  # type: ignore[attr-defined]
    return next((callback for callback in callbacks if isinstance(callback, kind)), None)


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def _plain(value: Any) -> Any:
    """A value as strict JSON may hold it; nan and infinities as the strings `float` reads."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if value is None or isinstance(value, bool | int | float | str):
        return value
    return f"{type(value).__name__} {tuple(value.shape)}" if hasattr(value, "shape") else str(value)
