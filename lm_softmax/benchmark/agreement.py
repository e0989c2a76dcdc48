"""Whether contestants compute the same loss, before any is timed."""

from collections.abc import Iterator
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from lm_softmax.heads import AdaptiveSoftmax, FullSoftmax, OutputHead
from lm_softmax.kernels import Objective

# Largest relative error of a loss. A mean summed in bfloat16 over thousands of tokens is off by
# more; one that rounds only logits and its result is not.
TOLERANCES = {
    torch.float64: 1e-9,
    torch.float32: 1e-4,
    torch.float16: 5e-3,
    torch.bfloat16: 2e-2,
}
CHUNK_LOGITS = 2**25  # float64 logits that the naive code holds at once


def true_loss(head: OutputHead, hidden: Tensor, target: Tensor) -> float | None:
    """Mean negative log-likelihood under a full or an adaptive head, naive code in float64.

    Args:
        head: Whose weights.
        hidden: `(N, d)`.
        target: `(N,)`.

    Returns:
        Nats a token; None for any other head or objective.
    """
    with torch.no_grad():
        if getattr(head, "objective", None) != Objective():
            return None
        if type(head) is FullSoftmax:
            return float(_cross_entropy(hidden, head.weight, head.bias, target).mean())
        if type(head) is AdaptiveSoftmax and head.cutoffs:
            return float(_adaptive_nll(head, hidden, target).mean())
    return None


def is_wrong(loss: float, truth: float | None, dtype: torch.dtype) -> bool:
    """Whether a loss differs from the truth by more than its dtype explains; nan always does.

    Without a truth only a loss that is not finite is wrong.
    """
    if truth is None:
        return not abs(loss) < float("inf")
    return not abs(loss - truth) <= TOLERANCES[dtype] * max(1.0, abs(truth))


def _adaptive_nll(head: AdaptiveSoftmax, hidden: Tensor, target: Tensor) -> Tensor:
    """Grave et al. 2017, section 4: the word in its cluster, and the cluster among the words."""
    assert head.cluster_weight is not None
    first = head.cutoffs[0]
    in_head = target.clone()
    nll = hidden.new_zeros(target.shape, dtype=torch.float64)
    biases = head.tail_biases or [None] * len(head.projections)
    for i, (start, end) in enumerate(pairwise([*head.cutoffs, head.vocab_size])):
        members = (target >= start) & (target < end)
        in_head[members] = first + i
        if members.any():
            projected = hidden[members].double() @ head.projections[i].double().t()
            rows, bias = head.tail_weights[i], biases[i]
            nll[members] = _cross_entropy(projected, rows, bias, target[members] - start)
    weight = torch.cat([head.weight, head.cluster_weight])
    return nll + _cross_entropy(hidden, weight, head.bias, in_head)


def _cross_entropy(hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor) -> Tensor:
    """Of each row, `(N,)`, in chunks of rows."""
    wide = weight.double(), None if bias is None else bias.double()
    parts = [
        F.cross_entropy(F.linear(hidden[part].double(), *wide), target[part], reduction="none")
        for part in _chunks(hidden.shape[0], weight.shape[0])
    ]
    return torch.cat(parts)


def _chunks(num_rows: int, num_words: int) -> Iterator[slice]:
    size = max(1, CHUNK_LOGITS // num_words)
    return (slice(start, start + size) for start in range(0, num_rows, size))
