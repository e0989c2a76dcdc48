"""What heads share whose distribution is that of clusters: an exact loss by their kernel."""

from abc import abstractmethod

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from lm_softmax.heads.base import OutputHead, Search, TopK
from lm_softmax.heads.exact import ExactHead
from lm_softmax.kernels import (
    Clusters,
    Draws,
    Objective,
    accumulation_dtype,
    autocast_off,
    cluster_loss,
    cluster_nll,
    draw_from_clusters,
    product_dtype,
)
from lm_softmax.kernels.cluster_search import cluster_topk
from lm_softmax.kernels.ranking import LARGEST_K


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

    def _draw(self, rows: Tensor, draws: Draws) -> Tensor:
        if draws.top_p is not None:
            return super()._draw(rows, draws)
        softcap = self.objective.softcap
        return draw_from_clusters(self._inputs(rows), self.clusters(), softcap, draws)

    @torch.no_grad()
    def topk(self, hidden: Float[Tensor, "*batch hidden"], k: int) -> TopK:
        """See `OutputHead.topk`; words are ranked cluster by cluster, never all at once."""
        return self._ranked(hidden, k, None)

    @torch.no_grad()
    def search(self, hidden: Float[Tensor, "*batch hidden"], k: int) -> Search:
        """`topk(hidden, k)`, and which of the K tail clusters each position opened for it.

        A cluster is opened, which is to compute its normaliser, only where it may hold one of the
        `k` best words: its log-probability bounds that of its words. Of a large one, bounds by the
        norm of words leave few words to look at before; those are kept with the weights they were
        derived from, from the second call with the same weights on (`kernels.tail_bounds`). nan in
        the weights of a cluster is not seen where it is not opened.

        Returns:
            `opened` is `(*batch, K)`, bool.

        Raises:
            ValueError: If `k` is not in `[1, vocab_size]`.
        """
        batch, num_tails = hidden.shape[:-1], len(self.clusters().tails)
        marks = torch.zeros(batch.numel(), num_tails, dtype=torch.bool, device=hidden.device)
        top = self._ranked(hidden, k, marks)
        return Search(top, marks.view(*batch, num_tails))

    def _ranked(self, hidden: Tensor, k: int, opened: Tensor | None) -> TopK:
        """`topk`; `opened` becomes true where a position, of all in a row, opened a cluster."""
        self._check_k(k)
        clusters, batch = self.clusters(), hidden.shape[:-1]
        if k > min(LARGEST_K, clusters.weight.shape[0]):
            if opened is not None:
                opened.fill_(True)
            return super().topk(hidden, k)
        rows, softcap = self._inputs(self._flatten(hidden)), self.objective.softcap
        values, indices = cluster_topk(rows, clusters, k, softcap, opened)
        if len(batch) == 1:
            return TopK(values, indices)
        return TopK(values.view(*batch, k), indices.view(*batch, k))


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
