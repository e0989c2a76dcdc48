"""Heads without some words, against masked and renormalised log-probabilities."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from lm_softmax.decoding import WithoutWords
from lm_softmax.heads import AdaptiveSoftmax, FullSoftmax

VOCAB_SIZE, HIDDEN_SIZE = 11, 5
TIGHT = {"atol": 1e-10, "rtol": 1e-10}


def build(kind=AdaptiveSoftmax, scale=1.0):
    options = {"cutoffs": [3, 7], "min_tail_size": 2} if kind is AdaptiveSoftmax else {}
    head = kind(HIDDEN_SIZE, VOCAB_SIZE, **options).double()
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.normal_(std=scale)
    return head


def masked(head, hidden, words):
    log_probs = head.log_prob(hidden).clone()
    log_probs[..., list(words)] = -torch.inf
    return log_probs.log_softmax(-1)


@settings(max_examples=20, deadline=None)
@given(
    st.sampled_from([FullSoftmax, AdaptiveSoftmax]),
    st.sets(st.integers(0, VOCAB_SIZE - 1), min_size=1, max_size=VOCAB_SIZE - 1),
    st.sampled_from([(), (3,), (2, 3), (0,)]),
    st.sampled_from([0.3, 3.0, 300.0]),
    st.integers(1, VOCAB_SIZE),
)
def test_words_are_excluded_and_the_rest_is_normalised(kind, words, shape, scale, k):
    head = build(kind, scale)
    without = WithoutWords(head, [*words, *words])
    hidden = torch.randn(*shape, HIDDEN_SIZE, dtype=torch.float64)
    expected = masked(head, hidden, words)
    assert_close(without.log_prob(hidden), expected, **TIGHT)
    for word in range(VOCAB_SIZE):
        target = torch.full(shape, word)
        assert_close(without.log_prob(hidden, target), expected[..., word], **TIGHT)
    found = without.topk(hidden, k)
    assert_close(found.log_probs, expected.sort(-1, descending=True).values[..., :k], **TIGHT)
    assert_close(expected.gather(-1, found.indices), found.log_probs, **TIGHT)
    drawn = without.sample(hidden, 7, generator=torch.Generator().manual_seed(0))
    assert drawn.shape == (*shape, 7)
    assert not torch.isin(drawn, torch.tensor([*words])).any()


def test_ignored_targets_count_for_nothing():
    without = WithoutWords(build(), [0, 4])
    hidden = torch.randn(3, HIDDEN_SIZE, dtype=torch.float64, requires_grad=True)
    found = without.log_prob(hidden, torch.tensor([2, -100, 5]))
    assert found[1] == 0
    (gradient,) = torch.autograd.grad(found.sum(), hidden)
    assert not gradient[1].any()
    expected = masked(without.head, hidden, [0, 4])
    (reference,) = torch.autograd.grad(expected[0, 2] + expected[2, 5], hidden)
    assert_close(gradient, reference, **TIGHT)


@pytest.mark.parametrize("scale", [1.0, 5.0])  # with 5 some rows have all but nothing to spare
@pytest.mark.parametrize(
    "sampling",
    [
        {},
        {"temperature": 0.5},
        {"temperature": 1.5, "top_p": 1.0},
        {"top_k": 3},
        {"temperature": 1.5, "top_k": 4, "top_p": 0.8},
        {"temperature": 0.7, "top_p": 0.6},
    ],
)
def test_samples_have_the_distribution(sampling, scale):
    torch.manual_seed(3)
    head, words, num_samples = build(scale=scale), [1, 2, 5], 10_000
    hidden = torch.randn(2, 1, HIDDEN_SIZE, dtype=torch.float64)
    drawn = WithoutWords(head, words).sample(
        hidden, num_samples, **sampling, generator=torch.Generator().manual_seed(1)
    )
    weights = (masked(head, hidden, words) / sampling.get("temperature", 1.0)).softmax(-1)
    if top_k := sampling.get("top_k"):
        kth = weights.sort(-1, descending=True).values[..., top_k - 1, None]
        weights = weights.where(weights >= kth, 0)
    weights = weights / weights.sum(-1, keepdim=True)
    if top_p := sampling.get("top_p"):
        before = (weights[..., None, :] * (weights[..., None, :] > weights[..., None])).sum(-1)
        weights = weights.where(before < top_p, 0)
    expected = weights / weights.sum(-1, keepdim=True)
    found = torch.nn.functional.one_hot(drawn, VOCAB_SIZE).double().mean(-2)
    error = (expected * (1 - expected) / num_samples).sqrt()
    assert ((found - expected).abs() <= 5 * error.clamp(min=1 / num_samples)).all()
    assert (found[expected == 0] == 0).all()


def test_greedy_and_what_is_next_to_certain():
    """Where an excluded word has all the probability that floating point can tell."""
    head = FullSoftmax(1, 4, bias=False)
    with torch.no_grad():
        head.weight.copy_(torch.tensor([[1e4], [0.0], [1.0], [-1e4]]))
    without = WithoutWords(head, [0])
    hidden = torch.ones(2, 1)
    expected = torch.tensor([0.0, 1.0, -1e4]).log_softmax(-1)
    # the head gives these words -1e4 and less, which leaves float32 three digits
    assert_close(without.log_prob(hidden)[0, 1:], expected, atol=2e-3, rtol=0)
    best = without.topk(hidden, 2)
    assert best.indices.tolist() == [[2, 1]] * 2
    assert_close(best.log_probs[0], expected[[1, 0]], atol=2e-3, rtol=0)
    assert without.sample(hidden, 3, temperature=0).tolist() == [[2] * 3] * 2
    drawn = without.sample(hidden, 4000, generator=torch.Generator().manual_seed(0))
    assert abs((drawn == 2).double().mean() - expected[1].exp()) < 0.03
    assert not (drawn == 0).any()


@pytest.mark.parametrize(
    ("call", "shown"),
    [
        (lambda head: head.topk(torch.zeros(2, HIDDEN_SIZE).double(), 0), r"k must be in \[1, "),
        (lambda head: head.topk(torch.zeros(2, HIDDEN_SIZE).double(), 12), "got 12"),
        (lambda head: head.sample(torch.zeros(2, HIDDEN_SIZE).double(), 0), "num_samples"),
        (lambda head: head.sample(torch.zeros(2, HIDDEN_SIZE).double(), top_p=2.0), "top_p"),
        (lambda head: head.sample(torch.full((2, 5), torch.nan).double(), top_k=2), "nan"),
        (lambda head: WithoutWords(head, [-1]), "got ids from -1 to -1"),
    ],
)
def test_refuses_what_cannot_be(call, shown):
    with pytest.raises(ValueError, match=shown):
        call(WithoutWords(build(), [1]))
