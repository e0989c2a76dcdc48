"""The plain softmax over all words."""

import torch
from torch import Tensor, nn

from lm_softmax.heads.clustered import (
    ClusteredHead,
    dense_log_probs,
    log_frequencies,
    tied_weight,
)
from lm_softmax.kernels import Clusters, Objective


class FullSoftmax(ClusteredHead):
    """Exact softmax over one output row a word.

    `loss` equals `F.cross_entropy(F.linear(hidden, weight, bias), target)` in float32 or better,
    without ever holding the `(N, vocab_size)` logits: chunks of them become gradients in the
    forward pass.

    Args:
        hidden_size: Width of `hidden`.
        vocab_size: Number of words.
        counts: Training-set frequencies; the bias starts at their log-probabilities.
        bias: Whether each word has a bias.
        softcap: Logits become `softcap * tanh(logits / softcap)`, in `log_prob` as well.
        label_smoothing: Share of the target's probability spread over all words, as in
            `F.cross_entropy` (Szegedy et al. 2016, section 7); in the loss only.
        z_loss: Weight of `logsumexp(logits) ** 2` added to the loss (Chowdhery et al. 2022,
            section 5, use 1e-4); in the loss only.
        ignore_index: Target of positions that count for nothing.

    Raises:
        ValueError: If an option is out of range.
    """

    def __init__(
        self,
        hidden_size: int,
        vocab_size: int,
        counts: Tensor | None = None,
        *,
        bias: bool = True,
        softcap: float | None = None,
        label_smoothing: float = 0.0,
        z_loss: float = 0.0,
        ignore_index: int = -100,
    ) -> None:
        objective = Objective(softcap, label_smoothing, z_loss)
        super().__init__(
            hidden_size, vocab_size, counts, objective=objective, ignore_index=ignore_index
        )
        self.weight = nn.Parameter(torch.empty(vocab_size, hidden_size))
        nn.init.uniform_(self.weight, -(hidden_size**-0.5), hidden_size**-0.5)
        self.bias = nn.Parameter(torch.zeros(vocab_size)) if bias else None
        if counts is not None:
            self._start_biases_at(log_frequencies(counts))

    def _start_biases_at(self, log_probs: Tensor) -> None:
        """Without hidden, the head then gives these log-probabilities."""
        if self.bias is not None:
            self.bias.data.copy_(log_probs)

    def clusters(self) -> Clusters:
        """One cluster: the short-list is the vocabulary."""
        return Clusters(self.weight, None, self.bias)

    def _all_log_probs(self, rows: Tensor) -> Tensor:
        return dense_log_probs(rows, self.weight, self.bias, self.objective.softcap)

    def tie_weight(self, embedding: nn.Module) -> None:
        """Share the output matrix with an `nn.Embedding` of the same shape (Press and Wolf 2017).

        Raises:
            ValueError: If `embedding` has no weight of `(vocab_size, hidden_size)`.
        """
        shape = (self.vocab_size, self.hidden_size)
        self.weight = tied_weight(embedding, shape, "FullSoftmax", "(vocab_size, hidden_size)")
