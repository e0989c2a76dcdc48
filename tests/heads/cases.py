"""The heads that the contract suite runs over: a new head is one line here."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from naive import (
    naive_adaptive,
    naive_classes,
    naive_full,
    naive_low_rank,
    naive_mixture,
    naive_nce,
    naive_product_quantized,
    naive_sampled,
    naive_tree,
)

from lm_softmax.heads import (
    NCE,
    AdaptiveSoftmax,
    FullSoftmax,
    HierarchicalSoftmax,
    LowRankSoftmax,
    MixtureOfSoftmaxes,
    OutputHead,
    ProductQuantizedSoftmax,
    SampledSoftmax,
)


class Case(NamedTuple):
    name: str
    make: Callable[..., OutputHead]  # (hidden_size, vocab_size, counts, **options)
    naive: Callable[..., torch.Tensor]  # (head, hidden) -> log-probabilities, from the equation
    # (head, hidden, target) -> loss of each token, of a head whose loss is not -log p
    surrogate: Callable[..., torch.Tensor] | None = None
    twice: bool = False  # whether the loss has second derivatives; else they are refused
    straight_through: bool = False  # whether gradients are not those of the loss, on purpose

    def losses(self, head, hidden, target):
        """Loss of each token by the naive code; draws what the head draws from the same seed."""
        if self.surrogate is not None:
            return self.surrogate(head, hidden, target)
        return -self.naive(head, hidden).gather(-1, target.unsqueeze(-1)).squeeze(-1)


def adaptive(*shares, **options):
    """An adaptive head whose cutoffs lie at these shares of the vocabulary."""

    def make(hidden_size, vocab_size, counts=None, **more):
        ids = sorted({int(share * vocab_size) for share in shares} - {0, vocab_size})
        given = {"cutoffs": ids, **options, **more}
        return AdaptiveSoftmax(hidden_size, vocab_size, counts, **given)

    return make


def hierarchical(tree="huffman", **options):
    """A hierarchical head; "random" is a tree of the user's that knows nothing of counts."""

    def make(hidden_size, vocab_size, counts=None, **more):
        given = {"tree": tree, **options, **more}
        if given["tree"] == "random":
            given["tree"] = random_tree(vocab_size) if isinstance(vocab_size, int) else []
        return HierarchicalSoftmax(hidden_size, vocab_size, counts, **given)

    return make


def random_tree(vocab_size, seed=0):
    """Children of inner nodes in any order, by joining two parts at random until one is left."""
    generator = torch.Generator().manual_seed(seed)
    parts, children = list(range(vocab_size)), []
    while len(parts) > 1:
        pair = []
        for _ in range(2):
            place = int(torch.randint(len(parts), (), generator=generator, device="cpu"))
            parts[place], parts[-1] = parts[-1], parts[place]
            pair.append(parts.pop())
        parts.append(vocab_size + len(children))
        children.append(pair)
    return torch.tensor(children, dtype=torch.int64, device="cpu").view(-1, 2)


def full(**options):
    return lambda *args, **more: FullSoftmax(*args, **{**options, **more})


CASES = [
    Case("full", FullSoftmax, naive_full),
    Case("full-capped", full(bias=False, softcap=3.0), naive_full),
    Case("adaptive", adaptive(0.2, 0.5, div_value=2.0, min_tail_size=3), naive_adaptive),
    Case(
        "adaptive-capped", adaptive(0.3, bias=False, softcap=3.0, min_tail_size=2), naive_adaptive
    ),
    Case("adaptive-no-clusters", AdaptiveSoftmax, naive_adaptive),
    Case("hierarchical", HierarchicalSoftmax, naive_tree),
    Case("hierarchical-balanced", hierarchical("balanced"), naive_tree),
    Case("hierarchical-given", hierarchical("random", bias=False), naive_tree),
    Case("hierarchical-classes", hierarchical("classes"), naive_classes),
    Case("low-rank", partial(LowRankSoftmax, rank=3), naive_low_rank),
    Case("low-rank-capped", partial(LowRankSoftmax, bias=False, softcap=9.0), naive_low_rank),
    Case("mixture", partial(MixtureOfSoftmaxes, num_experts=3), naive_mixture),
    Case(
        "mixture-capped",
        partial(MixtureOfSoftmaxes, num_experts=2, expert_size=5, bias=False, softcap=3.0),
        naive_mixture,
    ),
    Case("mixture-of-one", partial(MixtureOfSoftmaxes, num_experts=1), naive_mixture),
    Case("sampled", SampledSoftmax, naive_full, naive_sampled),
    Case(
        "sampled-with-replacement",
        partial(
            SampledSoftmax,
            num_samples=9,
            noise="log_uniform",
            unique=False,
            bias=False,
            softcap=3.0,
        ),
        naive_full,
        naive_sampled,
    ),
    Case("nce", NCE, naive_full, naive_nce),
    Case("nce-with-replacement", partial(NCE, unique=False), naive_full, naive_nce),
    Case(
        "negative-sampling",
        partial(
            NCE,
            objective="negative_sampling",
            noise="uniform",
            unique=False,
            num_samples=5,
            bias=False,
            softcap=3.0,
        ),
        naive_full,
        naive_nce,
    ),
    Case(
        "product-quantized",
        partial(ProductQuantizedSoftmax, codebook_size=5, learn_codes=False),
        naive_product_quantized,
    ),
    Case(
        "product-quantized-learned",
        partial(ProductQuantizedSoftmax, codebook_size=4, bias=False, softcap=3.0),
        naive_product_quantized,
        straight_through=True,
    ),
    Case(
        "product-quantized-chain",
        partial(ProductQuantizedSoftmax, codebook_size=3, rank=3, learn_codes=False),
        naive_product_quantized,
    ),
]


def counts_of(vocab_size):
    """Ranked counts with a tail of zeros."""
    return (vocab_size * 3 // torch.arange(1, vocab_size + 1) - 3).clamp(min=0)


def randomise(head):
    """Parameters away from their start: biases are not 0 and matrices not tiny."""
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.normal_()
    return head
