"""This package's training loop, under Lightning."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import LearningRateMonitor
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from torch.utils.data import DataLoader

from lm_softmax.benchmark.loops import LOG_EVERY, Loop, Outcome, Text
from lm_softmax.benchmark.quiet import quiet_lightning
from lm_softmax.callbacks import MemoryMonitor, PerplexityMonitor, StepTimeMonitor
from lm_softmax.corpus import TokenFile, TokenWriter
from lm_softmax.data.batching import StreamBatches
from lm_softmax.module import LanguageModel


class LightningLoop(Loop):
    """`LanguageModel` under Lightning, with loggers and callbacks as `train.py` has them.

    `StepTimeMonitor`, `MemoryMonitor`, `PerplexityMonitor`, `LearningRateMonitor`, TensorBoard and
    CSV; no validation, checkpoint, generated text or progress bar within the steps that are timed.

    Args:
        text: See `Loop`.
        device: See `Loop`.
        clip: See `Loop`.
        model: Keyword arguments of `LanguageModel`.
        folder: Where text and logs are kept; made.
    """

    def __init__(
        self,
        text: Text,
        device: str,
        clip: float | None,
        model: Mapping[str, Any],
        folder: Path,
    ) -> None:
        super().__init__(text, device, clip)
        torch.manual_seed(text.seed)
        self.model = LanguageModel(counts=text.counts(), **model)
        self._folder = folder
        folder.mkdir()
        path = folder / "text"
        with TokenWriter(path, text.vocab_size) as writer:
            writer.append(text.ids().numpy())
        self._batches = StreamBatches(
            TokenFile(path), 0, batch_size=text.batch_size, block_size=text.block_size
        )

    def run(self) -> Outcome:
        """See `Loop.run`."""
        watch = _Stopwatch(self)
        with quiet_lightning():
            trainer = self._trainer(watch)
            trainer.fit(self.model, DataLoader(self._batches, batch_size=None, shuffle=False))
        what = f"LanguageModel under Lightning, {_structure(self.model)}"
        return Outcome(watch.seconds, watch.loss, what)

    def _trainer(self, watch: pl.Callback) -> pl.Trainer:
        kind, _, number = self.device.partition(":")
        place: dict[str, Any] = {"save_dir": self._folder, "name": "", "version": ""}
        return pl.Trainer(
            accelerator="gpu" if kind == "cuda" else "cpu",
            devices=[int(number or 0)] if kind == "cuda" else 1,
            callbacks=[
                StepTimeMonitor(),
                MemoryMonitor(),
                PerplexityMonitor(),
                LearningRateMonitor(),
                watch,
            ],
            logger=[TensorBoardLogger(**place), CSVLogger(**place, flush_logs_every_n_steps=1)],
            default_root_dir=self._folder,
            max_steps=self.text.total_steps,
            gradient_clip_val=self.clip,
            log_every_n_steps=LOG_EVERY,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )


class _Stopwatch(pl.Callback):
    """Seconds from the end of the last warm-up step to the end of the last step."""

    def __init__(self, loop: Loop) -> None:
        self.loop, self.seconds, self.loss = loop, 0.0, float("nan")
        self._start = 0.0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.loop.text.num_warmups == 0:
            self._start = self.loop.now()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step == self.loop.text.num_warmups:
            self._start = self.loop.now()
        if trainer.global_step == self.loop.text.total_steps:
            self.seconds = self.loop.now() - self._start
            self.loss = float(outputs["nats"] / outputs["targets"])


def _structure(model: LanguageModel) -> str:
    """Encoder, head and optimizer, as far as one line can say."""
    encoder, optimizer = _as_call(model.hparams["encoder"]), _as_call(model.hparams["optimizer"])
    head = f"{type(model.head).__name__}({model.head.extra_repr()})"
    tied = ", tied weights" if model.hparams["tie_weights"] else ""
    return f"{encoder}, {head}{tied}, {optimizer}"


def _as_call(spec: Any) -> str:
    """A class and its options, as they would be written; values as they are."""
    if not isinstance(spec, Mapping) or "class_path" not in spec:
        return str(spec)
    options = (f"{name}={_as_call(value)}" for name, value in spec.get("init_args", {}).items())
    return f"{spec['class_path'].rpartition('.')[2]}({', '.join(options)})"
