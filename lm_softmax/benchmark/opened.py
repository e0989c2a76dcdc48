"""How much of a head exact top k opens, and how much it would by the bounds of clusters alone."""

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lm_softmax.benchmark.decode import MOST, Trial
from lm_softmax.heads import HierarchicalSoftmax, OutputHead
from lm_softmax.heads.clustered import ClusteredHead

CHUNK_BYTES = 2**26  # of log-probabilities of all words that are held at once


class Opened(NamedTuple):
    """Shares of positions for a tail cluster, else mean shares of all classes or inner nodes.

    Attributes:
        vocab_size: Number of words.
        head: Name of the head.
        k: Of `topk`.
        part: What was opened, and how many words or parts it has.
        by_mass: Where the log-probability of the part alone, which bounds those of its words, does
            not exclude it, because it is above the k-th best of the words before, or of all words
            where the parts have no order. Counted from the log-probabilities of all words. None
            for nodes of a tree.
        opened: What `search` opened.
        needed: Where one of the k best words is. None for nodes of a tree.
    """

    vocab_size: int
    head: str
    k: int
    part: str
    by_mass: float | None
    opened: float
    needed: float | None

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return self._asdict()


@torch.no_grad()
def opened(trial: Trial) -> list[Opened]:
    """What `search` opens for the best word and for the ten best; nothing for other heads."""
    head, hidden = trial.head, trial.hidden
    found: list[Opened] = []
    for k in (1, MOST):
        if isinstance(head, ClusteredHead) and head.clusters().tails:
            found += _of_clusters(trial.name, head, hidden, k)
        elif isinstance(head, HierarchicalSoftmax):
            found.append(_of_tree(trial.name, head, hidden, k))
    return found


def _of_clusters(name: str, head: ClusteredHead, hidden: Tensor, k: int) -> list[Opened]:
    clusters = head.clusters()
    sizes = [len(clusters.weight), *(len(tail.weight) for tail in clusters.tails)]
    borders = list(pairwise(torch.tensor(sizes).cumsum(0).tolist()))
    by_mass, needed = [], []
    for log_probs in _all_log_probs(head, hidden):
        best = log_probs.topk(k).indices
        for start, end in borders:
            least = log_probs[:, :start].topk(min(k, start)).values[:, -1]
            by_mass.append(log_probs[:, start:end].logsumexp(1) > least)
            needed.append(((best >= start) & (best < end)).any(1))
    opens = head.search(hidden, k).opened.double().mean(0).tolist()
    return [
        Opened(
            head.vocab_size,
            name,
            k,
            f"tail {i + 1}, {sizes[i + 1]:,} words",
            _mean(by_mass[i :: len(borders)]),
            opens[i],
            _mean(needed[i :: len(borders)]),
        )
        for i in range(len(borders))
    ]


def _of_tree(name: str, head: HierarchicalSoftmax, hidden: Tensor, k: int) -> Opened:
    opens = head.search(hidden, k).opened.double().mean().item()
    if not head.has_classes:
        nodes = head.vocab_size - 1
        return Opened(head.vocab_size, name, k, f"{nodes:,} nodes", None, opens / nodes, None)
    borders = list(pairwise([0, *head.cutoffs, head.vocab_size]))
    by_mass, needed = [], []
    for log_probs in _all_log_probs(head, hidden):
        values, ids = log_probs.topk(k)
        for start, end in borders:
            by_mass.append(log_probs[:, start:end].logsumexp(1) > values[:, -1])
            needed.append(((ids >= start) & (ids < end)).any(1))
    shares = _mean(by_mass), opens / len(borders), _mean(needed)
    return Opened(head.vocab_size, name, k, f"{len(borders):,} classes", *shares)


def _all_log_probs(head: OutputHead, hidden: Tensor) -> Iterator[Tensor]:
    """`log_prob(hidden)`, some rows at a time."""
    size = max(1, CHUNK_BYTES // (hidden.element_size() * head.vocab_size))
    return (head.log_prob(rows) for rows in torch.split(hidden, size))


def _mean(parts: Sequence[Tensor]) -> float:
    return torch.cat(list(parts)).double().mean().item()
