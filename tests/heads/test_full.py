"""FullSoftmax against its equation, `F.cross_entropy`, and its own options."""

import pytest
import torch
import torch.nn.functional as F
from cases import counts_of, randomise
from hypothesis import given, settings
from hypothesis import strategies as st
from naive import naive_full
from torch import nn
from torch.testing import assert_close

from lm_softmax.heads import FullSoftmax

EXACT = {"rtol": 1e-10, "atol": 1e-10}


def gradients(loss, head, hidden):
    return torch.autograd.grad(loss, [hidden, *head.parameters()], retain_graph=True)


@settings(max_examples=40, deadline=None)
@given(
    num=st.integers(1, 40),
    hidden_size=st.integers(1, 20),
    vocab_size=st.integers(1, 60),
    bias=st.booleans(),
    softcap=st.none() | st.floats(0.5, 20),
    smoothing=st.sampled_from([0.0, 0.1, 0.9]),
    z_loss=st.sampled_from([0.0, 1e-4, 0.3]),
    seed=st.integers(0, 2**20),
)
def test_every_option_equals_its_equation(
    num, hidden_size, vocab_size, bias, softcap, smoothing, z_loss, seed
):
    torch.manual_seed(seed)
    options = {"softcap": softcap, "label_smoothing": smoothing, "z_loss": z_loss}
    head = randomise(FullSoftmax(hidden_size, vocab_size, bias=bias, **options)).double()
    hidden = torch.randn(num, hidden_size, dtype=torch.float64, requires_grad=True)
    target = torch.randint(vocab_size, (num,))
    target[torch.rand(num) < 0.2] = -100
    logits = F.linear(hidden, head.weight, head.bias)
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    cross = F.cross_entropy(logits, target, label_smoothing=smoothing, reduction="none")
    penalty = z_loss * logits.logsumexp(-1) ** 2 * (target != -100)
    expected = cross + penalty
    weights = torch.randn(num, dtype=torch.float64)
    losses = head.loss(hidden, target, reduction="none")
    assert_close(losses, expected, **EXACT)
    assert_close(
        gradients((losses * weights).sum(), head, hidden),
        gradients((expected * weights).sum(), head, hidden),
        **EXACT,
    )
    total = head.loss(hidden, target, reduction="sum")
    assert_close(gradients(total, head, hidden), gradients(expected.sum(), head, hidden), **EXACT)
    assert head.loss_is_nll == (smoothing == 0 and z_loss == 0)
    nll = -naive_full(head, hidden)
    assert_close(-head.log_prob(hidden), nll, **EXACT)
    kept = target != -100
    assert_close(
        -head.log_prob(hidden, target)[kept],
        nll[kept].gather(-1, target[kept].unsqueeze(-1)).squeeze(-1),
        **EXACT,
    )


def test_bias_starts_at_the_unigram_distribution():
    counts = counts_of(50)
    head = FullSoftmax(8, 50, counts)
    effective = counts.clamp(min=1)
    expected = (effective / effective.sum()).log()
    assert_close(head.log_prob(torch.zeros(8)), expected)
    assert (FullSoftmax(8, 50).bias == 0).all()


def test_tied_weight_is_shared():
    embedding = nn.Embedding(31, 7)
    head = FullSoftmax(7, 31)
    head.tie_weight(embedding)
    assert head.weight is embedding.weight
    hidden, target = torch.randn(4, 7), torch.randint(31, (4,))
    head.loss(hidden + embedding(target), target).backward()
    summed = embedding.weight.grad.clone()
    embedding.weight.grad = None
    copy = embedding.weight.detach().clone().requires_grad_()
    logits = F.linear(hidden + F.embedding(target, copy), copy, head.bias)
    F.cross_entropy(logits, target).backward()
    assert_close(summed, copy.grad)


@pytest.mark.parametrize("embedding", [nn.Embedding(31, 8), nn.Embedding(30, 7), nn.Identity()])
def test_tying_to_another_shape_is_refused(embedding):
    with pytest.raises(ValueError, match=r"FullSoftmax ties .*\(31, 7\), got"):
        FullSoftmax(7, 31).tie_weight(embedding)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"softcap": 0.0}, "softcap must be above 0 and finite, got 0.0"),
        ({"softcap": -1.0}, "got -1.0"),
        ({"label_smoothing": 1.0}, r"\[0, 1\), got 1.0"),
        ({"label_smoothing": -0.1}, "got -0.1"),
        ({"softcap": float("inf")}, "got inf"),
        ({"z_loss": float("inf")}, "got inf"),
        ({"z_loss": -1e-4}, "z_loss must be at least 0 and finite, got -0.0001"),
        ({"z_loss": float("nan")}, "got nan"),
    ],
)
def test_impossible_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        FullSoftmax(4, 9, **options)


@pytest.mark.parametrize("index", [0, 8, 2**63, -(2**63) - 1])
def test_the_index_to_ignore_is_no_word_and_fits_into_targets(index):
    with pytest.raises(ValueError, match=f"ignore_index must .* got {index}"):
        FullSoftmax(4, 9, ignore_index=index)
    for allowed in (-1, 9, 2**63 - 1):
        FullSoftmax(4, 9, ignore_index=allowed)
