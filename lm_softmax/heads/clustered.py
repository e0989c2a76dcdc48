"""What heads share whose distribution is that of clusters: an exact loss by their kernel."""

import math
from abc import abstractmethod

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from lm_softmax.heads.base import OutputHead, Reduction
from lm_softmax.kernels import (
    Clusters,
    Objective,
    accumulation_dtype,
    autocast_off,
    cluster_loss,
    cluster_nll,
    product_dtype,
)


class ClusteredHead(OutputHead):
    """A head whose parameters are `Clusters`; a subclass also gives the log-probabilities.

    Args:
        hidden_size: Width of `hidden`.
        vocab_size: Number of words.
        counts: Training-set frequencies.
        objective: Options of the loss; its softcap is part of the distribution.
        ignore_index: Target of positions that count for nothing.

    Raises:
        ValueError: If an option is out of range.
    """

    def __init__(
        self,
        hidden_size: int,
        vocab_size: int,
        counts: Tensor | None,
        *,
        objective: Objective,
        ignore_index: int,
    ) -> None:
        super().__init__(hidden_size, vocab_size, counts, ignore_index=ignore_index)
        self.objective = check_objective(objective)

    @abstractmethod
    def clusters(self) -> Clusters:
        """The parameters as the kernel takes them."""

    @abstractmethod
    def _all_log_probs(self, rows: Tensor) -> Tensor:
        """Log-probabilities of all words, `(N, vocab_size)`."""

    def _inputs(self, rows: Tensor, target: Tensor | None = None) -> Tensor:
        """What the clusters' rows are multiplied with: `hidden` itself, unless a subclass differs.

        With `target`, rows that are ignored may hold anything, nan as well.
        """
        return rows

    @property
    def loss_is_nll(self) -> bool:
        """False under label smoothing or z-loss."""
        return not self.objective.label_smoothing and not self.objective.z_loss

    def log_prob(
        self, hidden: Float[Tensor, "*batch hidden"], target: Int[Tensor, "*batch"] | None = None
    ) -> Tensor:
        """See `OutputHead.log_prob`; with `target` no `(N, vocab_size)` is ever held."""
        if target is None:
            log_probs = self._all_log_probs(self._inputs(self._flatten(hidden)))
            return log_probs.view(*hidden.shape[:-1], self.vocab_size)
        rows, flat, poison = self._flatten_with_target(hidden, target)
        objective = Objective(self.objective.softcap)
        inputs = self._inputs(rows, flat)
        nll = cluster_nll(inputs, flat, self.clusters(), objective, self.ignore_index)
        return -(nll + poison).view(target.shape)

    def loss(
        self,
        hidden: Float[Tensor, "*batch hidden"],
        target: Int[Tensor, "*batch"],
        *,
        reduction: Reduction = "mean",
    ) -> Tensor:
        """See `OutputHead.loss`; gradients of a mean or a sum are made in the forward pass."""
        self._check_reduction(reduction)
        rows, flat, poison = self._flatten_with_target(hidden, target)
        inputs = self._inputs(rows, flat)
        arguments = (inputs, flat, self.clusters(), self.objective, self.ignore_index)
        if reduction == "none":
            return (cluster_nll(*arguments) + poison).view(target.shape)
        total = cluster_loss(*arguments) + poison
        return total if reduction == "sum" else total / self._num_targets(target)


def check_objective(objective: Objective) -> Objective:
    """The objective itself; ValueError if one of its options is out of range."""
    softcap, label_smoothing, z_loss = objective
    if softcap is not None and not (softcap > 0 and math.isfinite(softcap)):
        raise ValueError(f"softcap must be above 0 and finite, got {softcap}")
    if not 0 <= label_smoothing < 1:
        raise ValueError(f"label_smoothing must be in [0, 1), got {label_smoothing}")
    if not (z_loss >= 0 and math.isfinite(z_loss)):
        raise ValueError(f"z_loss must be at least 0 and finite, got {z_loss}")
    return objective


def tied_weight(embedding: nn.Module, shape: tuple[int, int], name: str, axes: str) -> nn.Parameter:
    """The weight of an embedding to tie to; ValueError if it is not of this shape."""
    weight = getattr(embedding, "weight", None)
    if not isinstance(weight, nn.Parameter) or weight.shape != shape:
        got = tuple(weight.shape) if isinstance(weight, Tensor) else type(embedding).__name__
        raise ValueError(f"{name} ties to an embedding of {axes} {shape}, got {got}")
    return weight


def dense_log_probs(
    rows: Tensor, weight: Tensor, bias: Tensor | None, softcap: float | None
) -> Tensor:
    """`F.log_softmax(F.linear(rows, weight, bias), -1)` in at least float32, under autocast too."""
    dtype = product_dtype(rows, weight)
    with autocast_off(rows):
        logits = F.linear(rows.to(dtype), weight.to(dtype))
        logits = logits.to(accumulation_dtype(dtype))
        if bias is not None:
            logits = logits + bias
        if softcap is not None:
            logits = softcap * torch.tanh(logits / softcap)
        return torch.log_softmax(logits, -1)


def project(rows: Tensor, projection: Tensor) -> Tensor:
    """`F.linear(rows, projection)` in the dtype of the kernel's products."""
    dtype = product_dtype(rows, projection)
    with autocast_off(rows):
        return F.linear(rows.to(dtype), projection.to(dtype))


def log_frequencies(counts: Tensor) -> Tensor:
    """Log of the share of each word, a count of 0 counting as 1; float32."""
    effective = counts.double().clamp(min=1)
    return (effective / effective.sum()).log().float()
