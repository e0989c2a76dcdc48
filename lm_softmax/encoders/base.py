"""What every encoder promises: ids in, one hidden vector a position out, no look at the future."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

State: TypeAlias = "Tensor | tuple[State, ...] | None"
Cache: TypeAlias = Any  # of one kind of encoder: only itself looks inside
EmbeddingFactory: TypeAlias = Callable[[int, int, Tensor | None], nn.Module]

MOST_LAYERS = 10_000


class Encoder(nn.Module, ABC):
    """Turns `(batch, time)` token ids into hidden vectors; position t sees tokens 0 to t alone.

    A subclass sets the attributes below and writes `forward`; and `_continue`, if decoding can
    spare the tokens before.

    Attributes:
        vocab_size: Number of token ids.
        hidden_size: Width of the vectors that `forward` returns.
        embedding: The token embedding, which an output head may share its weights with.
        carries_state: Whether `forward` continues from a state. Where it does not, the state is
            always `None`.
        state_batch_axis: Axis of the state's tensors that counts the rows of tokens.
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
    state_batch_axis: int = 0
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

    def continue_from(
        self, tokens: Int[Tensor, "batch time"], cache: Cache = None
    ) -> tuple[Float[Tensor, "batch hidden"], Cache]:
        """The hidden vector after the last token, and what the next call needs; for decoding.

        Equals `forward(all_tokens[:, -max_positions:])[0][:, -1]` in evaluation mode, where
        `all_tokens` are those of this call after those of all calls before. The cache is the state
        of an encoder that carries one, whatever `max_positions`. For any other it holds the last
        `max_positions` tokens, and what spares their computation while they are all tokens there
        are: from then on every token has another position, and the window is computed again.

        It has nothing to do with training, where a state goes from batch to batch only if
        `carries_state`.

        Args:
            tokens: The tokens that come next, `(batch, time)`, at least one a row.
            cache: What the call before returned, or what `select_rows` made of it; `None` at the
                start. It is spent: no other call may have it.

        Raises:
            ValueError: If `tokens` is no integer tensor of that shape.
        """
        _check_tokens(tokens)
        if self.carries_state:
            hidden, state = self(tokens, cache)
            return hidden[:, -1], state
        before, memory = (None, None) if cache is None else cache
        window = tokens if before is None else torch.cat([before, tokens], 1)
        limit, num_new = self.max_positions, tokens.shape[1]
        if limit is not None and window.shape[1] > limit:
            window, memory, num_new = window[:, -limit:], None, limit
        hidden, memory = self._continue(window, num_new, memory)
        return hidden, (window, memory)

    def _continue(
        self, window: Int[Tensor, "batch time"], num_new: int, memory: Any
    ) -> tuple[Float[Tensor, "batch hidden"], Any]:
        """The last hidden vector of a window of tokens that `forward` takes; see `continue_from`.

        An encoder that can spare the computation of the tokens before overrides it.

        Args:
            window: Tokens, at most `max_positions`.
            num_new: How many of them come after those that `memory` stands for.
            memory: What the call before returned, in its rows; `None` if all tokens are new.
        """
        return self(window)[0][:, -1], None

    def select_rows(self, cache: Cache, rows: Int[Tensor, "new"]) -> Cache:
        """The cache whose row i is row `rows[i]` of the one given, which is spent.

        Beam search so keeps, copies and drops rows.

        Args:
            cache: What `continue_from` returned.
            rows: Places in `[0, batch)`, in any order and number.
        """
        axis = self.state_batch_axis if self.carries_state else 0
        return _select(cache, rows, axis)

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
        _check_tokens(tokens)
        if self.max_positions is not None and tokens.shape[1] > self.max_positions:
            raise ValueError(
                f"{tokens.shape[1]} tokens in a row exceed max_positions={self.max_positions}:"
                " cut them into shorter blocks or raise max_positions"
            )
        if state is not None and not self.carries_state:
            raise ValueError(f"{type(self).__name__} carries no state, so state must be None")


def _check_tokens(tokens: Tensor) -> None:
    if tokens.ndim != 2 or 0 in tokens.shape or tokens.dtype not in (torch.int64, torch.int32):
        raise ValueError(
            "tokens must be int64 of shape (batch, time), neither of them 0,"
            f" got {tokens.dtype} of shape {tuple(tokens.shape)}"
        )


def _select(cache: Cache, rows: Tensor, axis: int) -> Cache:
    """Rows of every tensor of a nested tuple."""
    if isinstance(cache, tuple):
        return tuple(_select(part, rows, axis) for part in cache)
    return None if cache is None else cache.index_select(axis, rows)


def check_probability(**probabilities: float) -> None:
    """Refuse dropout probabilities outside `[0, 1)` by their names.

    Raises:
        ValueError: If one of them is outside.
    """
    for name, value in probabilities.items():
        if not 0.0 <= value < 1.0:
            raise ValueError(f"{name} is a probability in [0, 1), got {value}")


def check_size(**sizes: int) -> None:
    """Refuse sizes below 1, and beyond what torch can count, by their names.

    Raises:
        ValueError: If one of them is.
    """
    for name, value in sizes.items():
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
        if value >= 2**63:
            raise ValueError(f"{name} must be below 2**63, got {value}")


def check_num_layers(num_layers: int) -> None:
    """Refuse none, and layers without end, which are made one by one.

    Raises:
        ValueError: If there are so many.
    """
    check_size(num_layers=num_layers)
    if num_layers > MOST_LAYERS:
        raise ValueError(f"num_layers must be at most {MOST_LAYERS:,}, got {num_layers}")
