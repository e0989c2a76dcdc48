"""What all ways of decoding share: stepping through a text, and refusing what cannot be."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from lm_softmax.decoding.without_words import WithoutWords
from lm_softmax.encoders import Cache, Encoder
from lm_softmax.heads import OutputHead


class Stepper:
    """The hidden vector after the tokens so far, a few more tokens at a time.

    Args:
        encoder: Turns tokens into hidden vectors.
        use_cache: Whether to go on from the encoder's cache. Without it the encoder is fed the
            last `max_positions` tokens again at each step, or all of them.
    """

    def __init__(self, encoder: Encoder, *, use_cache: bool) -> None:
        self.encoder, self.use_cache = encoder, use_cache
        self._cache: Cache = None

    def feed(self, tokens: Int[Tensor, "batch time"]) -> Float[Tensor, "batch hidden"]:
        """The hidden vector after these tokens, which come after those of the calls before."""
        if self.use_cache:
            hidden, self._cache = self.encoder.continue_from(tokens, self._cache)
            return hidden
        tokens = tokens if self._cache is None else torch.cat([self._cache, tokens], 1)
        if self.encoder.max_positions is not None and not self.encoder.carries_state:
            tokens = tokens[:, -self.encoder.max_positions :]
        self._cache = tokens
        hidden, _ = self.encoder(tokens)
        return hidden[:, -1]

    def select_rows(self, rows: Int[Tensor, "new"]) -> None:
        """Goes on with these rows, in this order."""
        if self.use_cache:
            self._cache = self.encoder.select_rows(self._cache, rows)
        else:
            self._cache = self._cache.index_select(0, rows)


@contextmanager
def evaluating(*modules: nn.Module) -> Iterator[None]:
    """Evaluation mode for a while; then each submodule has its own mode again."""
    modes = [(part, part.training) for module in modules for part in module.modules()]
    try:
        for module in modules:
            module.eval()
        yield
    finally:
        for part, mode in modes:
            part.training = mode


def check_prompt(prompt: Tensor, vocab_size: int, eos_id: int | None) -> None:
    """Refuse a prompt that is empty or no table of ids."""
    if prompt.ndim != 2 or prompt.numel() == 0:
        raise ValueError(
            "prompt must be (batch, time) with at least one token a row,"
            f" got shape {tuple(prompt.shape)}"
        )
    if prompt.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"prompt must be int64, got {prompt.dtype}")
    lowest, highest = int(prompt.min()), int(prompt.max())
    if lowest < 0 or highest >= vocab_size:
        raise ValueError(
            f"prompt holds ids from {lowest} to {highest}, outside [0, vocab_size={vocab_size})"
        )
    if eos_id is not None and not 0 <= eos_id < vocab_size:
        raise ValueError(f"eos_id must be in [0, vocab_size={vocab_size}), got {eos_id}")


def check_num_tokens(num_tokens: int) -> None:
    """Refuse to add no token, or more than can be counted."""
    if num_tokens < 1:
        raise ValueError(f"num_tokens must be at least 1, got {num_tokens}")
    if num_tokens >= 2**63:
        raise ValueError(f"num_tokens must be below 2**63, got {num_tokens}")


def without(head: OutputHead, suppress: Sequence[int]) -> OutputHead:
    """The head, without the words to suppress if there are any."""
    return WithoutWords(head, suppress) if len(suppress) else head
