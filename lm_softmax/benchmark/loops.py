"""A training loop, what it trains on, and what a run of it gives."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from time import perf_counter
from typing import NamedTuple

import torch
from torch import Tensor

from lm_softmax.benchmark.problem import Problem, draw_text

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

    def counts(self) -> Tensor:
        """Of the words, `(vocab_size,)` int64, at least 1."""
        return Problem(self.vocab_size, 1, 1, targets=self.targets).counts().ceil_().long()


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


class Outcome(NamedTuple):
    """Of a run.

    Attributes:
        seconds: That the timed steps took.
        loss: Of the last step, in nats.
        what: What was trained, for a reader.
    """

    seconds: float
    loss: float
    what: str


class Loop(ABC):
    """A training that goes on with each run.

    Args:
        text: What it trains on.
        device: Where.
        clip: Largest norm of the gradients, None for any.
    """

    def __init__(self, text: Text, device: str, clip: float | None) -> None:
        self.text, self.device, self.clip = text, device, clip

    @abstractmethod
    def run(self) -> Outcome:
        """Passes once over the text."""

    def now(self) -> float:
        """Seconds, the device idle."""
        if self.device.startswith("cuda"):
            torch.cuda.synchronize(self.device)
        return perf_counter()
