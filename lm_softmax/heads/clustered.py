"""What heads share whose distribution is that of clusters: an exact loss by their kernel."""

from abc import abstractmethod

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lm_softmax.heads.base import OutputHead
from lm_softmax.heads.exact import ExactHead
from lm_softmax.kernels import (
    Clusters,
    Objective,
    accumulation_dtype,
    autocast_off,
    cluster_loss,
    cluster_nll,
    product_dtype,
)


class ClusteredHead(ExactHead):
    """A head whose parameters are `Clusters`; see `ExactHead`."""

    @abstractmethod
    def clusters(self) -> Clusters:
        """The parameters as the kernel takes them."""

    def _inputs(self, rows: Tensor, target: Tensor | None = None) -> Tensor:
        """What the clusters' rows are multiplied with: `hidden` itself, unless a subclass differs.

        With `target`, rows that are ignored may hold anything, nan as well.
        """
        return rows

    def _token_losses(self, rows: Tensor, target: Tensor, objective: Objective) -> Tensor:
        inputs = self._inputs(rows, target)
        return cluster_nll(inputs, target, self.clusters(), objective, self.ignore_index)

    def _summed_loss(self, rows: Tensor, target: Tensor, objective: Objective) -> Tensor:
        inputs = self._inputs(rows, target)
        return cluster_loss(inputs, target, self.clusters(), objective, self.ignore_index)


def tied_weight(embedding: nn.Module, shape: tuple[int, int], name: str, axes: str) -> nn.Parameter:
    """The weight of an embedding to tie to; ValueError if it is not of this shape."""
    weight = getattr(embedding, "weight", None)
    if not isinstance(weight, nn.Parameter) or weight.shape != shape:
        got = tuple(weight.shape) if isinstance(weight, Tensor) else type(embedding).__name__
        raise ValueError(f"{name} ties to an embedding of {axes} {shape}, got {got}")
    return weight


def output_rows(head: object) -> tuple[Tensor, Tensor | None]:
    """Output rows and bias of a head with one row a word over `hidden` itself.

    Raises:
        ValueError: If it is another head, or its rows are not finite.
    """
    name = type(head).__name__
    if not isinstance(head, OutputHead):
        raise ValueError(f"expected an output head, got {name}")
    if not isinstance(head, ClusteredHead):
        kind = name
    elif tails := head.clusters().tails:
        kind = f"{name} with {len(tails)} tail clusters"
    elif type(head)._inputs is not ClusteredHead._inputs:
        kind = f"{name} with inputs of its own"
    else:
        weight, _, bias, _ = head.clusters()
        if not weight.isfinite().all():
            raise ValueError(f"the output rows of {name} must be finite")
        return weight, bias
    raise ValueError(
        f"expected a full softmax, one output row of hidden_size={head.hidden_size} a word,"
        f" got {kind}"
    )


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
