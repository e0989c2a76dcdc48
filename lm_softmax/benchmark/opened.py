"""How much of a head exact top k opens, and how much it would by the bounds of clusters alone."""

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lm_softmax.benchmark.decode import MOST, Trial
from lm_softmax.heads import HierarchicalSoftmax, OutputHead
from lm_softmax.heads.clustered import ClusteredHead

KS = (1, MOST)
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
    head = trial.head
    if isinstance(head, ClusteredHead) and head.clusters().tails:
        return _of_clusters(trial.name, head, trial.hidden)
    if isinstance(head, HierarchicalSoftmax):
        return (_of_classes if head.has_classes else _of_nodes)(trial.name, head, trial.hidden)
    return []


def _of_clusters(name: str, head: ClusteredHead, hidden: Tensor) -> list[Opened]:
    clusters = head.clusters()
    sizes = [len(clusters.weight), *(len(tail.weight) for tail in clusters.tails)]
    starts = torch.tensor(sizes).cumsum(0).tolist()
    by_mass, needed = _shares(head, hidden, starts, ordered=True)
    found = []
    for k in KS:
        shares = head.search(hidden, k).opened.double().mean(0).tolist()
        for i, share in enumerate(shares):
            part = f"tail {i + 1}, {sizes[i + 1]:,} words"
            mass, need = float(by_mass[k][i]), float(needed[k][i])
            found.append(Opened(head.vocab_size, name, k, part, mass, share, need))
    return found


def _of_classes(name: str, head: HierarchicalSoftmax, hidden: Tensor) -> list[Opened]:
    borders = [0, *head.cutoffs, head.vocab_size]
    number = len(borders) - 1
    by_mass, needed = _shares(head, hidden, borders, ordered=False)
    found = []
    for k in KS:
        share = head.search(hidden, k).opened.double().mean().item() / number
        mass, need = float(by_mass[k].mean()), float(needed[k].mean())
        found.append(Opened(head.vocab_size, name, k, f"{number:,} classes", mass, share, need))
    return found


def _of_nodes(name: str, head: HierarchicalSoftmax, hidden: Tensor) -> list[Opened]:
    nodes = head.vocab_size - 1
    shares = {k: head.search(hidden, k).opened.double().mean().item() / nodes for k in KS}
    return [
        Opened(head.vocab_size, name, k, f"{nodes:,} nodes", None, share, None)
        for k, share in shares.items()
    ]


def _shares(
    head: OutputHead, hidden: Tensor, borders: Sequence[int], *, ordered: bool
) -> tuple[dict[int, Tensor], dict[int, Tensor]]:
    """By k, of each part the share of rows that its mass does not exclude, and that need it."""
    by_mass, needed = (
        {k: torch.zeros(len(borders) - 1, dtype=torch.float64) for k in KS} for _ in range(2)
    )
    for log_probs in _all_log_probs(head, hidden):
        values, ids = log_probs.topk(MOST)
        for i, (start, end) in enumerate(pairwise(borders)):
            mass = log_probs[:, start:end].logsumexp(1)
            if ordered:
                values = log_probs[:, :start].topk(min(MOST, start)).values
            within = (ids >= start) & (ids < end)
            for k in KS:
                above = mass > values[:, min(k, values.shape[1]) - 1]
                by_mass[k][i] += above.sum().item() / len(hidden)
                needed[k][i] += within[:, :k].any(1).sum().item() / len(hidden)
    return by_mass, needed


def _all_log_probs(head: OutputHead, hidden: Tensor) -> Iterator[Tensor]:
    """`log_prob(hidden)`, some rows at a time."""
    size = max(1, CHUNK_BYTES // (hidden.element_size() * head.vocab_size))
    return (head.log_prob(rows) for rows in torch.split(hidden, size))
