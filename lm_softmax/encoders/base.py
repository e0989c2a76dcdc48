"""What every encoder promises: ids in, one hidden vector a position out, no look at the future."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

State: TypeAlias = "Tensor | tuple[State, ...] | None"
EmbeddingFactory: TypeAlias = Callable[[int, int, Tensor | None], nn.Module]


class Encoder(nn.Module, ABC):
    """Turns `(batch, time)` token ids into hidden vectors; position t sees tokens 0 to t alone.

    A subclass sets the attributes below and writes `forward`.

    Attributes:
        vocab_size: Number of token ids.
        hidden_size: Width of the vectors that `forward` returns.
        embedding: The token embedding, which an output head may share its weights with.
        carries_state: Whether `forward` continues from a state. Where it does not, the state is
            always `None`.
        max_positions: Longest sequence in tokens, `None` for no limit.

    Args:
        vocab_size: Number of token ids.
        counts: Training-set frequency of each id, `(vocab_size,)`; only frequency-based embeddings
            use it.

    Raises:
        ValueError: If `vocab_size` is below 1 or `counts` has another shape.
    """

    embedding: nn.Module
    hidden_size: int
    carries_state: bool = False
    max_positions: int | None = None

    def __init__(self, vocab_size: int, counts: Tensor | None = None) -> None:
        super().__init__()
        if vocab_size < 1:
            raise ValueError(f"vocab_size must be at least 1, got {vocab_size}")
        if counts is not None and counts.shape != (vocab_size,):
            raise ValueError(
                f"counts must have shape ({vocab_size},), one for each of vocab_size={vocab_size}"
                f" ids, got {tuple(counts.shape)}"
            )
        self.vocab_size = vocab_size

    @abstractmethod
    def forward(
        self, tokens: Int[Tensor, "batch time"], state: State = None
    ) -> tuple[Float[Tensor, "batch time hidden"], State]:
        """Hidden vectors, and the state from which the same rows continue.

        Args:
            tokens: Ids in `[0, vocab_size)`, `(batch, time)`.
            state: What the call on the tokens before returned, or `None` at the start of a text.
                Gradients flow into it; detach it to truncate them.
        """

    def permute_embedding(self, original_ids: Int[Tensor, "vocab"]) -> None:
        """Reorder a pretrained embedding to this vocabulary's ids; nothing to do without one.

        Called once, by the model, where the vocabulary ranks the ids of a pretrained tokenizer.

        Args:
            original_ids: The tokenizer's own id of each id of the vocabulary.
        """

    def structure(self) -> dict[str, Any]:
        """Plain keyword arguments that pin what the constructor derived from data or files.

        A saved model is built again with them, so that nothing is derived anew. What the
        embedding derived it pins itself, see `AdaptiveEmbedding.structure`.
        """
        return {}

    def check_input(self, tokens: Tensor, state: State) -> None:
        """Refuse what `forward` cannot mean.

        Raises:
            ValueError: If `tokens` is no two-dimensional integer tensor with at least one row and
                one position, is longer than `max_positions`, or an encoder without state gets one.
        """
        if tokens.ndim != 2 or 0 in tokens.shape or tokens.dtype not in (torch.int64, torch.int32):
            raise ValueError(
                "tokens must be int64 of shape (batch, time), neither of them 0,"
                f" got {tokens.dtype} of shape {tuple(tokens.shape)}"
            )
        if self.max_positions is not None and tokens.shape[1] > self.max_positions:
            raise ValueError(
                f"{tokens.shape[1]} tokens in a row exceed max_positions={self.max_positions}:"
                " cut them into shorter blocks or raise max_positions"
            )
        if state is not None and not self.carries_state:
            raise ValueError(f"{type(self).__name__} carries no state, so state must be None")


def check_probability(**probabilities: float) -> None:
    """Refuse dropout probabilities outside `[0, 1)` by their names.

    Raises:
        ValueError: If one of them is outside.
    """
    for name, value in probabilities.items():
        if not 0.0 <= value < 1.0:
            raise ValueError(f"{name} is a probability in [0, 1), got {value}")


def check_size(**sizes: int) -> None:
    """Refuse sizes below 1 by their names.

    Raises:
        ValueError: If one of them is below 1.
    """
    for name, value in sizes.items():
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
