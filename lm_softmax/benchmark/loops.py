"""Whole training loops: this package's under Lightning, and the plain one of a PyTorch user."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any, Literal

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import LearningRateMonitor
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lm_softmax.benchmark.problem import draw_text
from lm_softmax.callbacks import MemoryMonitor, PerplexityMonitor, StepTimeMonitor
from lm_softmax.corpus import TokenFile, TokenWriter
from lm_softmax.data.batching import StreamBatches
from lm_softmax.module import LanguageModel

LOG_EVERY = 50  # steps, of both loops


@dataclass(frozen=True)
class Text:
    """A text and how it is cut into batches; the first `num_warmups` steps are not timed.

    Attributes:
        vocab_size: Number of words.
        targets: See `Problem.targets`.
        batch_size: Rows.
        block_size: Tokens of a row.
        num_warmups: Steps before.
        num_steps: Steps that are timed.
        seed: Of a Zipf text, and of all weights.
    """

    vocab_size: int
    targets: str
    batch_size: int
    block_size: int
    num_warmups: int
    num_steps: int
    seed: int

    @property
    def total_steps(self) -> int:
        """Steps of a pass over the text."""
        return self.num_warmups + self.num_steps

    @property
    def timed_tokens(self) -> int:
        """Tokens of the steps that are timed."""
        return self.num_steps * self.batch_size * self.block_size

    def ids(self) -> Tensor:
        """The text, `(tokens,)` int64.

        Raises:
            ValueError: If the corpus is shorter.
        """
        generator = torch.Generator().manual_seed(self.seed)
        length = self.total_steps * self.batch_size * self.block_size
        return draw_text(self.targets, self.vocab_size, length, generator)


@dataclass(frozen=True)
class EncoderSizes:
    """Of the LSTM that all loops share.

    Attributes:
        embedding_size: Width of the embedding.
        hidden_size: Width of a layer.
        num_layers: Number of layers.
    """

    embedding_size: int = 256
    hidden_size: int = 256
    num_layers: int = 1


class Loop(ABC):
    """A training that goes on with each call.

    Args:
        text: What it trains on.
        device: Where.
        clip: Largest norm of the gradients, None for any.
    """

    what: str

    def __init__(self, text: Text, device: str, clip: float | None) -> None:
        self.text, self.device, self.clip = text, device, clip
        self.last_loss = float("nan")

    @abstractmethod
    def run(self) -> float:
        """Passes once over the text; returns the seconds that the timed steps took."""

    def _now(self) -> float:
        if self.device.startswith("cuda"):
            torch.cuda.synchronize(self.device)
        return perf_counter()


class LightningLoop(Loop):
    """`LanguageModel` under Lightning, with loggers and callbacks as `train.py` has them.

    `StepTimeMonitor`, `MemoryMonitor`, `PerplexityMonitor`, `LearningRateMonitor`, TensorBoard and
    CSV; no validation, checkpoint, generated text or progress bar within the steps that are timed.

    Args:
        text: See `Loop`.
        device: See `Loop`.
        clip: See `Loop`.
        counts: Of the words.
        model: Keyword arguments of `LanguageModel`.
        folder: Where text and logs are kept; made.
    """

    def __init__(
        self,
        text: Text,
        device: str,
        clip: float | None,
        counts: Tensor,
        model: Mapping[str, Any],
        folder: Path,
    ) -> None:
        super().__init__(text, device, clip)
        torch.manual_seed(text.seed)
        self.model = LanguageModel(counts=counts, **model)
        self.what = f"LanguageModel under Lightning, {_structure(self.model)}"
        self._folder = folder
        folder.mkdir()
        path = folder / "text"
        with TokenWriter(path, text.vocab_size) as writer:
            writer.append(text.ids().numpy())
        self._batches = StreamBatches(
            TokenFile(path), 0, batch_size=text.batch_size, block_size=text.block_size
        )

    def run(self) -> float:
        """See `Loop.run`."""
        watch = _Stopwatch(self)
        kind, _, number = self.device.partition(":")
        place: dict[str, Any] = {"save_dir": self._folder, "name": "", "version": ""}
        trainer = pl.Trainer(
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
        trainer.fit(self.model, DataLoader(self._batches, batch_size=None, shuffle=False))
        self.last_loss = watch.loss
        return watch.seconds


class _Stopwatch(pl.Callback):
    """Seconds from the end of the last warm-up step to the end of the last step."""

    def __init__(self, loop: Loop) -> None:
        self.loop, self.seconds, self.loss = loop, 0.0, float("nan")
        self._start = 0.0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.loop.text.num_warmups == 0:
            self._start = self.loop._now()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step == self.loop.text.num_warmups:
            self._start = self.loop._now()
        if trainer.global_step == self.loop.text.total_steps:
            self.seconds = self.loop._now() - self._start
            self.loss = float(outputs["nats"] / outputs["targets"])


def _structure(model: LanguageModel) -> str:
    """Encoder, head and optimizer, as far as one line can say."""
    optimizer = model.hparams["optimizer"]
    options = ", ".join(f"{name}={value}" for name, value in optimizer["init_args"].items())
    name = optimizer["class_path"].rpartition(".")[2]
    head = f"{type(model.head).__name__}({model.head.extra_repr()})"
    return f"{type(model.encoder).__name__}, {head}, {name}({options})"


class PlainModel(nn.Module):
    """Embedding, `nn.LSTM`, and one of torch's heads.

    Args:
        vocab_size: Number of words.
        sizes: Of embedding and LSTM.
        cutoffs: Of torch's adaptive softmax; None for a full one.
    """

    def __init__(self, vocab_size: int, sizes: EncoderSizes, cutoffs: Sequence[int] | None) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, sizes.embedding_size)
        self.lstm = nn.LSTM(
            sizes.embedding_size, sizes.hidden_size, sizes.num_layers, batch_first=True
        )
        self.head: nn.Module
        if cutoffs is None:
            self.head = nn.Linear(sizes.hidden_size, vocab_size)
        else:
            width = sizes.hidden_size
            self.head = nn.AdaptiveLogSoftmaxWithLoss(width, vocab_size, list(cutoffs))

    def forward(self, tokens: Tensor, target: Tensor, state: Any) -> tuple[Tensor, Any]:
        """Mean loss, and the state after the block."""
        hidden, state = self.lstm(self.embedding(tokens), state)
        rows, flat = hidden.flatten(0, 1), target.flatten()
        if isinstance(self.head, nn.AdaptiveLogSoftmaxWithLoss):
            loss: Tensor = self.head(rows, flat).loss
        else:
            loss = F.cross_entropy(self.head(rows), flat)
        return loss, tuple(part.detach() for part in state)


class PlainLoop(Loop):
    """The loop that a PyTorch user writes: torch's head, `torch.optim.AdamW` as by default.

    Args:
        text: See `Loop`.
        device: See `Loop`.
        clip: See `Loop`.
        kind: Head: "adaptive" or "full".
        sizes: Of embedding and LSTM.
        cutoffs: Of the adaptive head.
        lr: Learning rate.
    """

    def __init__(
        self,
        text: Text,
        device: str,
        clip: float | None,
        kind: Literal["adaptive", "full"],
        sizes: EncoderSizes,
        cutoffs: Sequence[int],
        lr: float,
    ) -> None:
        super().__init__(text, device, clip)
        torch.manual_seed(text.seed)
        is_adaptive = kind == "adaptive"
        self.what = f"nn.AdaptiveLogSoftmaxWithLoss, cutoffs {list(cutoffs)}"
        if not is_adaptive:
            self.what = "nn.Linear and F.cross_entropy"
        model = PlainModel(text.vocab_size, sizes, cutoffs if is_adaptive else None)
        self.model = model.to(device)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=lr)
        ids = text.ids().view(text.batch_size, -1)
        first = torch.zeros_like(ids[:, :1])  # <eos>
        self._inputs = torch.cat([first, ids[:, :-1]], 1)
        self._targets = ids

    def run(self) -> float:
        """See `Loop.run`."""
        text, state = self.text, None
        start = self._now()
        self.model.train()
        for step in range(text.total_steps):
            if step == text.num_warmups:
                start = self._now()
            part = slice(step * text.block_size, (step + 1) * text.block_size)
            tokens = self._inputs[:, part].to(self.device)
            loss, state = self.model(tokens, self._targets[:, part].to(self.device), state)
            self.optimizer.zero_grad()
            loss.backward()
            if self.clip is not None:
                nn.utils.clip_grad_norm_(self.model.parameters(), self.clip)
            self.optimizer.step()
            if step % LOG_EVERY == 0 or step + 1 == text.total_steps:
                self.last_loss = loss.item()
        return self._now() - start
