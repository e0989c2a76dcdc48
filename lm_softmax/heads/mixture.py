"""Mixture of softmaxes: several experts over the same output rows."""

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from lm_softmax.heads.base import TopK, is_size
from lm_softmax.heads.clustered import (
    dense_log_probs,
    log_frequencies,
    tied_weight,
)
from lm_softmax.heads.exact import ExactHead
from lm_softmax.kernels import (
    Draws,
    Mixture,
    Objective,
    accumulation_dtype,
    autocast_off,
    draw_from_mixture,
    mixture_loss,
    mixture_nll,
    product_dtype,
)
from lm_softmax.kernels.mixture_search import mixture_topk
from lm_softmax.kernels.ranking import LARGEST_K


class MixtureOfSoftmaxes(ExactHead):
    """Weighted mean of the softmaxes of several experts, whose log is not of low rank.

    With `inputs = torch.tanh(F.linear(hidden, projection, projection_bias))`, cut into
    `num_experts` vectors of `expert_size`, and `log_prior = F.log_softmax(F.linear(hidden, prior))`
    it equals, in shapes that broadcast,

        of_experts = F.log_softmax(F.linear(inputs, weight, bias), -1)
        torch.logsumexp(log_prior + of_experts, dim)  # over the experts

    The log-probabilities of a single softmax, word by context, are a matrix of rank
    `hidden_size + 2` at most; those of a mixture are not. A training step costs `num_experts` times
    that of a full softmax. It holds the logits of one chunk, as that does (of two with smoothing),
    and beside them the experts' inputs and their gradients, `(N, num_experts, expert_size)`.

    Source: Yang et al. 2018, "Breaking the softmax bottleneck: a high-rank RNN language model",
    equation (5) and section 3; they mix probabilities, here they are mixed in log space.

    Args:
        hidden_size: Width of `hidden`.
        vocab_size: Number of words.
        counts: Training-set frequencies; the bias starts at their log-probabilities.
        num_experts: Number of softmaxes; Yang et al. use 15.
        expert_size: Width of an expert's vector and of a word's row; None is `hidden_size`.
        bias: Whether each word has a bias.
        softcap: Logits of each expert become `softcap * tanh(logits / softcap)`, in `log_prob` as
            well.
        label_smoothing: Share of the target's probability spread over all words of the mixture, as
            in `F.cross_entropy` (Szegedy et al. 2016, section 7); in the loss only.
        ignore_index: Target of positions that count for nothing.

    Raises:
        ValueError: If a number is below 1 or an option is out of range.
    """

    def __init__(
        self,
        hidden_size: int,
        vocab_size: int,
        counts: Tensor | None = None,
        *,
        num_experts: int = 4,
        expert_size: int | None = None,
        bias: bool = True,
        softcap: float | None = None,
        label_smoothing: float = 0.0,
        ignore_index: int = -100,
    ) -> None:
        objective = Objective(softcap, label_smoothing)
        super().__init__(
            hidden_size, vocab_size, counts, objective=objective, ignore_index=ignore_index
        )
        if expert_size is None:
            expert_size = hidden_size
        if not (is_size(num_experts) and is_size(expert_size)):
            raise ValueError(
                f"num_experts and expert_size must be whole numbers of at least 1,"
                f" got {num_experts} and {expert_size}"
            )
        self.num_experts = num_experts
        self.expert_size = expert_size
        self.projection = nn.Parameter(torch.empty(num_experts * expert_size, hidden_size))
        self.projection_bias = nn.Parameter(torch.zeros(num_experts * expert_size))
        self.prior = nn.Parameter(torch.empty(num_experts, hidden_size))
        self.weight = nn.Parameter(torch.empty(vocab_size, expert_size))
        for matrix in (self.projection, self.prior, self.weight):
            nn.init.uniform_(matrix, -(matrix.shape[1] ** -0.5), matrix.shape[1] ** -0.5)
        self.bias = nn.Parameter(torch.zeros(vocab_size)) if bias else None
        if self.bias is not None and counts is not None:
            self.bias.data.copy_(log_frequencies(counts))

    def _token_losses(self, rows: Tensor, target: Tensor, objective: Objective) -> Tensor:
        inputs, mixture = self._experts(rows, target)
        return mixture_nll(inputs, target, mixture, objective, self.ignore_index)

    def _summed_loss(self, rows: Tensor, target: Tensor, objective: Objective) -> Tensor:
        inputs, mixture = self._experts(rows, target)
        return mixture_loss(inputs, target, mixture, objective, self.ignore_index)

    def _experts(self, rows: Tensor, target: Tensor | None = None) -> tuple[Tensor, Mixture]:
        """What each expert multiplies the output rows with, `(N, K, expert_size)`, and the rest."""
        if target is not None:  # 0 * nan is nan, in the gradients of the matrices here
            rows = rows.masked_fill((target == self.ignore_index).unsqueeze(1), 0)
        dtype = product_dtype(rows, self.projection)
        with autocast_off(rows):
            exact = accumulation_dtype(dtype)  # a small product, and log-probabilities add it up
            rows = rows.to(exact)  # once, so that their two gradients are added before they round
            log_prior = torch.log_softmax(F.linear(rows, self.prior.to(exact)), -1)
            bias = self.projection_bias.to(dtype)
            inputs = torch.tanh(F.linear(rows.to(dtype), self.projection.to(dtype), bias))
        shape = (rows.shape[0], self.num_experts, self.expert_size)
        return inputs.view(shape), Mixture(log_prior, self.weight, self.bias)

    def _all_log_probs(self, rows: Tensor) -> Tensor:
        """One expert is added at a time; only for a backward pass are all of them kept."""
        inputs, (log_prior, weight, bias) = self._experts(rows)
        mixed = None
        for part, prior in zip(inputs.unbind(1), torch.split(log_prior, 1, 1), strict=True):
            of_expert = prior + dense_log_probs(part, weight, bias, self.objective.softcap)
            mixed = of_expert if mixed is None else torch.logaddexp(mixed, of_expert)
        assert mixed is not None
        return mixed

    def _draw(self, rows: Tensor, draws: Draws) -> Tensor:
        if draws.top_p is not None or draws.temperature != 1:  # a power of a sum
            return super()._draw(rows, draws)
        return draw_from_mixture(*self._experts(rows), self.objective.softcap, draws)

    @torch.no_grad()
    def topk(self, hidden: Float[Tensor, "*batch hidden"], k: int) -> TopK:
        """See `OutputHead.topk`; only words that bounds by the experts leave are mixed.

        Rows that this leaves too many words, or that meet nan, are ranked as a whole.
        """
        self._check_k(k)
        rows = self._flatten(hidden)
        if k > LARGEST_K:
            return super().topk(hidden, k)
        inputs, mixture = self._experts(rows)
        inputs = inputs.to(product_dtype(inputs, self.weight))
        values, indices, failed = mixture_topk(inputs, mixture, k, self.objective.softcap)
        if failed.any():
            values[failed], indices[failed] = super().topk(rows[failed], k)
        shape = (*hidden.shape[:-1], k)
        return TopK(values.view(shape), indices.view(shape))

    def tie_weight(self, embedding: nn.Module) -> None:
        """Share the output rows with an embedding that is `expert_size` wide.

        Raises:
            ValueError: If `embedding` has no weight of `(vocab_size, expert_size)`.
        """
        shape = (self.vocab_size, self.expert_size)
        self.weight = tied_weight(
            embedding, shape, "MixtureOfSoftmaxes", "(vocab_size, expert_size)"
        )

    def structure(self) -> dict[str, Any]:
        """The width of the experts."""
        return {"expert_size": self.expert_size}

    def extra_repr(self) -> str:
        """Sizes, for `print(head)`."""
        sizes = f"num_experts={self.num_experts}, expert_size={self.expert_size}"
        return f"{super().extra_repr()}, {sizes}"
