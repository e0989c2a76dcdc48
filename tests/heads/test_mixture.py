"""MixtureOfSoftmaxes against its equation, the full softmax, and what it was published for."""

import pytest
import torch
import torch.nn.functional as F
from cases import counts_of, randomise
from hypothesis import given, settings
from hypothesis import strategies as st
from naive import naive_full, naive_mixture
from torch import nn
from torch.testing import assert_close

from lm_softmax.heads import FullSoftmax, MixtureOfSoftmaxes

EXACT = {"rtol": 1e-10, "atol": 1e-10}


def gradients(loss, head, hidden):
    return torch.autograd.grad(loss, [hidden, *head.parameters()], retain_graph=True)


@settings(max_examples=50, deadline=None)
@given(
    num=st.integers(0, 30),
    hidden_size=st.integers(1, 12),
    vocab_size=st.integers(1, 50),
    num_experts=st.integers(1, 6),
    expert_size=st.none() | st.integers(1, 9),
    bias=st.booleans(),
    softcap=st.none() | st.floats(0.5, 20),
    smoothing=st.sampled_from([0.0, 0.1, 0.9]),
    seed=st.integers(0, 2**20),
)
def test_every_option_equals_its_equation(
    num, hidden_size, vocab_size, num_experts, expert_size, bias, softcap, smoothing, seed
):
    torch.manual_seed(seed)
    options = {"num_experts": num_experts, "expert_size": expert_size, "bias": bias}
    options |= {"softcap": softcap, "label_smoothing": smoothing}
    head = randomise(MixtureOfSoftmaxes(hidden_size, vocab_size, **options)).double()
    hidden = torch.randn(num, hidden_size, dtype=torch.float64, requires_grad=True)
    target = torch.randint(vocab_size, (num,))
    target[torch.rand(num) < 0.2] = -100
    log_probs = naive_mixture(head, hidden)
    assert_close(head.log_prob(hidden), log_probs, **EXACT)
    assert_close(head.log_prob(hidden).exp().sum(-1), torch.ones(num).double(), **EXACT)
    # the cross-entropy of log-probabilities, which log_softmax leaves as they are
    expected = F.cross_entropy(log_probs, target, label_smoothing=smoothing, reduction="none")
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
    assert head.loss_is_nll == (smoothing == 0)
    kept = target != -100
    assert_close(
        head.log_prob(hidden, target)[kept],
        log_probs[kept].gather(-1, target[kept].unsqueeze(-1)).squeeze(-1),
        **EXACT,
    )


def test_one_expert_is_a_full_softmax_of_a_tanh_layer():
    head = randomise(MixtureOfSoftmaxes(6, 40, num_experts=1, expert_size=9)).double()
    full = FullSoftmax(9, 40).double()
    full.load_state_dict({"weight": head.weight, "bias": head.bias})
    hidden = torch.randn(20, 6, dtype=torch.float64)
    layer = torch.tanh(F.linear(hidden, head.projection, head.projection_bias))
    assert_close(head.log_prob(hidden), naive_full(full, layer), **EXACT)


def test_equal_experts_are_one():
    head = randomise(MixtureOfSoftmaxes(6, 40, num_experts=3)).double()
    with torch.no_grad():
        head.projection.copy_(head.projection[:6].repeat(3, 1))
        head.projection_bias.copy_(head.projection_bias[:6].repeat(3))
    hidden = torch.randn(20, 6, dtype=torch.float64)
    layer = torch.tanh(F.linear(hidden, head.projection[:6], head.projection_bias[:6]))
    assert_close(head.log_prob(hidden), naive_full(head, layer), **EXACT)


def numerical_rank(matrix):
    values = torch.linalg.svdvals(matrix)
    return int((values > 1e-10 * values[0]).sum())


def test_log_probabilities_are_not_of_low_rank():
    """The softmax bottleneck: 60 contexts over 50 words from vectors of 4 numbers."""
    hidden = torch.randn(60, 4, dtype=torch.float64)
    full = randomise(FullSoftmax(4, 50)).double()
    assert numerical_rank(full.log_prob(hidden)) == 4 + 2  # the bias, the log-sum-exp
    ranks = {
        num: numerical_rank(
            randomise(MixtureOfSoftmaxes(4, 50, num_experts=num)).double().log_prob(hidden)
        )
        for num in (1, 3)
    }
    assert ranks == {1: 4 + 2, 3: 50}


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_improbable_words_have_no_floor(smoothing):
    """A word of probability e**-200 under each expert costs 200 nats, and its gradient is right."""
    head = MixtureOfSoftmaxes(2, 3, num_experts=2, label_smoothing=smoothing)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.zero_()
        head.bias.copy_(torch.tensor([0.0, -200.0, -300.0]))
    hidden, target = torch.zeros(3, 2, requires_grad=True), torch.tensor([0, 1, 2])
    expected = torch.tensor([0.0, -200.0, -300.0])
    assert_close(head.log_prob(hidden, target), expected)
    assert_close(head.log_prob(hidden)[0], expected)
    losses = head.loss(hidden, target, reduction="none")
    assert_close(losses, (smoothing - 1) * expected + smoothing * 500 / 3)
    share = torch.full((3,), smoothing / 3)
    for word in range(3):
        wanted = (
            torch.tensor([1.0, 0.0, 0.0]) - share - (1 - smoothing) * F.one_hot(target[word], 3)
        )
        found = torch.autograd.grad(losses[word], head.bias, retain_graph=True)[0]
        assert_close(found, wanted)
    total = head.loss(hidden, target, reduction="sum")
    assert_close(
        torch.autograd.grad(total, head.bias),
        torch.autograd.grad(losses.sum(), head.bias),
    )


def test_an_expert_that_excludes_the_target_takes_no_part():
    """Its probability of the target underflows; the other expert's decides loss and gradient."""
    head = randomise(MixtureOfSoftmaxes(2, 4, num_experts=2, expert_size=1, bias=False))
    with torch.no_grad():
        head.prior.zero_()
        head.projection.zero_()
        head.projection_bias.copy_(torch.tensor([20.0, -20.0]))  # tanh: 1 and -1
        head.weight.copy_(torch.tensor([[-150.0], [150.0], [0.0], [0.0]]))
    hidden = torch.zeros(1, 2)
    loss = head.loss(hidden, torch.tensor([0]))
    assert_close(loss, torch.tensor(2.0).log())
    loss.backward()
    assert_close(head.prior.grad, torch.zeros(2, 2))
    assert_close(head.weight.grad, torch.zeros(4, 1))


def test_second_derivatives_of_all_words():
    head = randomise(MixtureOfSoftmaxes(3, 5, num_experts=2)).double()
    hidden = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda h: head.log_prob(h), (hidden,))


def test_bias_starts_at_the_unigram_distribution():
    counts = counts_of(50)
    effective = counts.clamp(min=1)
    log_probs = MixtureOfSoftmaxes(8, 50, counts).log_prob(torch.zeros(8))
    assert_close(log_probs, (effective / effective.sum()).log())
    assert (MixtureOfSoftmaxes(8, 50).bias == 0).all()


def test_experts_start_apart():
    """Equal experts would have equal gradients and never part."""
    head = MixtureOfSoftmaxes(8, 50, num_experts=3)
    first, second, third = head.projection.detach().view(3, 8, 8)
    assert all((a - b).norm() > 0.5 * a.norm() for a, b in ((first, second), (second, third)))


def test_widths_are_pinned():
    assert MixtureOfSoftmaxes(8, 50).structure() == {"expert_size": 8}
    head = MixtureOfSoftmaxes(8, 50, num_experts=3, expert_size=5)
    shapes = {name: tuple(value.shape) for name, value in head.state_dict().items()}
    assert shapes == {
        "projection": (15, 8),
        "projection_bias": (15,),
        "prior": (3, 8),
        "weight": (50, 5),
        "bias": (50,),
    }


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_experts": 0}, "at least 1, got 0 and 8"),
        ({"num_experts": 2.0}, "got 2.0 and 8"),
        ({"expert_size": -3}, "got 4 and -3"),
        ({"softcap": -1.0}, "softcap must be above 0 and finite, got -1.0"),
        ({"label_smoothing": 1.0}, r"\[0, 1\), got 1.0"),
    ],
    ids=str,
)
def test_impossible_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        MixtureOfSoftmaxes(8, 50, **options)


def test_tied_weight_is_shared():
    embedding = nn.Embedding(31, 5)
    head = MixtureOfSoftmaxes(7, 31, expert_size=5)
    head.tie_weight(embedding)
    assert head.weight is embedding.weight
    head.loss(torch.randn(4, 7), torch.randint(31, (4,))).backward()
    assert embedding.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("embedding", [nn.Embedding(31, 7), nn.Embedding(30, 5), nn.Identity()])
def test_tying_to_another_shape_is_refused(embedding):
    with pytest.raises(ValueError, match=r"MixtureOfSoftmaxes ties .* \(31, 5\), got"):
        MixtureOfSoftmaxes(7, 31, expert_size=5).tie_weight(embedding)
