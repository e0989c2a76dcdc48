"""The heads that the contract suite runs over: a new head is one line here."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from naive import naive_adaptive, naive_full

from lm_softmax.heads import AdaptiveSoftmax, FullSoftmax, OutputHead


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
