"""NCE against its equation; its optimum is the distribution of the data."""

import math

import pytest
import torch
from cases import counts_of, randomise
from hypothesis import given, settings
from hypothesis import strategies as st
from naive import naive_nce
from torch import nn
from torch.testing import assert_close

from lm_softmax.heads import NCE

EXACT = {"rtol": 1e-10, "atol": 1e-10}


def gradients(loss, head, hidden):
    return torch.autograd.grad(loss, [hidden, *head.parameters()], retain_graph=True)


def seeded(function, *args, **kwargs):
    torch.manual_seed(5)
    return function(*args, **kwargs)


@settings(max_examples=15, deadline=None)
@given(
    data=st.data(),
    num=st.integers(0, 40),
    hidden_size=st.integers(1, 20),
    vocab_size=st.integers(1, 60),
    noise=st.sampled_from(["log_uniform", "unigram", "uniform"]),
    unique=st.booleans(),
    objective=st.sampled_from(["nce", "negative_sampling"]),
    log_partition=st.sampled_from([None, "learned", 0.0, 3.5]),
    bias=st.booleans(),
    softcap=st.none() | st.floats(0.5, 20),
    seed=st.integers(0, 2**20),
)
def test_every_option_equals_its_equation(
    data,
    num,
    hidden_size,
    vocab_size,
    noise,
    unique,
    objective,
    log_partition,
    bias,
    softcap,
    seed,
):
    torch.manual_seed(seed)
    head = NCE(
        hidden_size,
        vocab_size,
        counts_of(vocab_size),
        num_samples=data.draw(st.integers(1, vocab_size if unique else 2 * vocab_size)),
        noise=noise,
        unique=unique,
        objective=objective,
        log_partition=log_partition if objective == "nce" else None,
        bias=bias,
        softcap=softcap,
    )
    head = randomise(head).double()
    hidden = torch.randn(num, hidden_size, dtype=torch.float64, requires_grad=True)
    target = torch.randint(vocab_size, (num,))
    kept = torch.rand(num) < 0.8
    expected = seeded(naive_nce, head, hidden, target) * kept
    target = target.masked_fill(~kept, -100)
    weights = torch.randn(num, dtype=torch.float64)
    losses = seeded(head.loss, hidden, target, reduction="none")
    assert_close(losses, expected, **EXACT)
    assert_close(
        gradients((losses * weights).sum(), head, hidden),
        gradients((expected * weights).sum(), head, hidden),
        **EXACT,
    )
    total = seeded(head.loss, hidden, target, reduction="sum")
    assert_close(gradients(total, head, hidden), gradients(expected.sum(), head, hidden), **EXACT)


CONTEXTS, WORDS = 4, 7


def tabular(noise, num_samples, **options):
    """A head with one logit for each word after each context, and data for it."""
    torch.manual_seed(11)
    data = torch.softmax(1.5 * torch.randn(CONTEXTS, WORDS, dtype=torch.float64), -1)
    counts = torch.tensor([40, 20, 10, 8, 4, 2, 1])
    given = {"num_samples": num_samples, "noise": noise, "bias": False, **options}
    head = NCE(CONTEXTS, WORDS, counts, **given).double()
    with torch.no_grad():
        head.weight.zero_()
    return head, data


def expected_loss(head, data, monkeypatch):
    """The loss averaged over targets and draws.

    Negatives enter it one by one: their sum is replaced by its expectation, the losses of all words
    as negatives weighted by how often each is drawn.
    """
    contexts = torch.eye(CONTEXTS, dtype=torch.float64).repeat_interleave(WORDS, 0)
    words = torch.arange(WORDS).repeat(CONTEXTS)
    expected = head.noise.log_expected_counts(torch.arange(WORDS)).exp()

    def losses_with(*negatives):
        with monkeypatch.context() as patch:
            patch.setattr(head.noise, "draw", lambda: torch.tensor(negatives))
            return head.loss(contexts, words, reduction="none")

    with_one = torch.stack([losses_with(word) for word in range(WORDS)], -1)
    of_target = 2 * with_one[:, :1] - losses_with(0, 0).unsqueeze(-1)
    losses = of_target + (with_one - of_target) @ expected.unsqueeze(-1)
    return (losses.squeeze(-1) * data.flatten()).sum() / CONTEXTS


def optimise(head, data, monkeypatch):
    """Parameters at which the expected loss is least; it is convex in the logits."""
    optimizer = torch.optim.LBFGS(
        head.parameters(),
        max_iter=120,
        history_size=30,
        tolerance_grad=1e-8,
        tolerance_change=1e-15,
        line_search_fn="strong_wolfe",
    )

    def closure():
        optimizer.zero_grad()
        loss = expected_loss(head, data, monkeypatch)
        loss.backward()
        return loss

    optimizer.step(closure)
    return torch.eye(CONTEXTS, dtype=torch.float64)


SKEWED = torch.tensor([0.01, 0.3, 0.02, 0.3, 0.05, 0.02, 0.3])


def slope_at(logits, head, data, monkeypatch):
    """Largest derivative of the expected loss, which is convex: 0 at its optimum and only there."""
    with torch.no_grad():
        head.weight.copy_(logits.t())
    loss = expected_loss(head, data, monkeypatch)
    return max(found.abs().max() for found in torch.autograd.grad(loss, list(head.parameters())))


def test_optimising_reaches_the_distribution_of_the_data(monkeypatch):
    head, data = tabular("uniform", 2, log_partition=0.0)
    hidden = optimise(head, data, monkeypatch)
    assert_close(head.log_prob(hidden), data.log(), rtol=0, atol=1e-4)
    assert (hidden @ head.weight.t()).logsumexp(-1).abs().max() < 1e-4  # normalised by itself


@pytest.mark.parametrize("unique", [True, False], ids=["unique", "with replacement"])
@pytest.mark.parametrize("log_partition", [0.0, 2.0, "learned"])
@pytest.mark.parametrize(
    ("noise", "num_samples"), [("uniform", 2), ("unigram", 5), (SKEWED, 3)], ids=str
)
def test_the_optimum_is_the_distribution_of_the_data(
    noise, num_samples, log_partition, unique, monkeypatch
):
    options = {"unique": unique, "log_partition": log_partition}
    head, data = tabular(noise, num_samples, **options)
    normalised = data.log() + torch.as_tensor(head.log_partition).detach()
    assert slope_at(normalised, head, data, monkeypatch) < 1e-12
    assert slope_at(normalised + 0.1, head, data, monkeypatch) > 1e-3


@pytest.mark.parametrize("noise", ["unigram", SKEWED], ids=str)
def test_the_optimum_of_negative_sampling_is_the_ratio_to_the_noise(noise, monkeypatch):
    head, data = tabular(noise, 3, objective="negative_sampling", unique=False)
    masses = head.noise.cumulative.diff().double()
    ratio = data / (3 * masses / masses.sum())
    assert slope_at(ratio.log(), head, data, monkeypatch) < 1e-12
    assert slope_at(data.log(), head, data, monkeypatch) > 0.01
    assert (torch.log_softmax(ratio.log(), -1) - data.log()).abs().max() > 0.5


@pytest.mark.parametrize("log_partition", [None, 0.0, 2.5, "learned"])
def test_it_starts_at_the_unigram_distribution_normalised_by_itself(log_partition):
    counts = counts_of(50)
    effective = counts.clamp(min=1)
    head = NCE(8, 50, counts, log_partition=log_partition)
    start = (effective / effective.sum()).log()
    assert_close(head.log_prob(torch.zeros(8)), start)
    assert_close(head.bias - head.log_partition, start)
    assert_close(NCE(8, 50).bias, torch.full((50,), -math.log(50)))


def test_without_a_bias_the_log_partition_is_that_of_equal_words():
    head = NCE(8, 50, bias=False)
    assert head.log_partition == pytest.approx(math.log(50))
    learned = NCE(8, 50, bias=False, log_partition="learned")
    assert learned.log_partition.item() == pytest.approx(math.log(50))


def test_negative_sampling_starts_at_its_optimum_for_equal_contexts():
    counts = counts_of(50)
    effective = counts.clamp(min=1).double()
    head = NCE(
        8, 50, counts, objective="negative_sampling", noise="uniform", unique=False, num_samples=5
    )
    ratio = effective / effective.sum() / (5 / 50)
    assert_close(head.bias.double(), ratio.log(), rtol=1e-5, atol=1e-5)


def test_the_learned_log_partition_is_a_parameter():
    head = randomise(NCE(6, 40, num_samples=9, log_partition="learned")).double()
    hidden, target = torch.randn(12, 6).double(), torch.randint(40, (12,))
    target[3] = -100

    def loss(constant):
        values = {"log_partition": constant}
        return seeded(torch.func.functional_call, head, values, (hidden, target))

    assert torch.autograd.gradcheck(loss, (head.log_partition,))
    head.loss(hidden, target.fill_(-100)).backward()
    assert head.log_partition.grad == 0
    assert isinstance(head.log_partition, nn.Parameter)
    assert "log_partition" in head.state_dict()


def test_sparse_gradients_are_the_dense_ones():
    head = randomise(NCE(6, 500, num_samples=20, sparse=True)).double()
    dense_head = NCE(6, 500, num_samples=20).double()
    dense_head.load_state_dict(head.state_dict())
    hidden = torch.randn(30, 6, dtype=torch.float64, requires_grad=True)
    target = torch.randint(500, (30,))
    seeded(head.loss, hidden, target).backward()
    expected = gradients(seeded(dense_head.loss, hidden, target), dense_head, hidden)[1:]
    for parameter, right in zip(head.parameters(), expected, strict=True):
        assert parameter.grad.is_sparse
        assert_close(parameter.grad.to_dense(), right, **EXACT)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_samples": True}, "num_samples must be .*, got True"),
        ({"num_samples": 10}, "num_samples=10 unique words of 9"),
        ({"noise": -torch.ones(9)}, "word 0 has -1.0, 9 such"),
        ({"objective": "ranking"}, "got 'ranking'"),
        ({"log_partition": "fixed"}, "log_partition must be a number .* got 'fixed'"),
        ({"log_partition": float("nan")}, "got nan"),
        ({"log_partition": [1]}, r"log_partition must be a number .* got \[1\]"),
        ({"log_partition": True}, "log_partition must be a number .* got True"),
        ({"objective": "negative_sampling", "log_partition": 0.0}, "no log_partition, got 0.0"),
        ({"label_smoothing": 0.1}, "NCE .* label_smoothing must be 0, got 0.1"),
        ({"softcap": -1.0}, "softcap must be above 0 and finite, got -1.0"),
    ],
    ids=str,
)
def test_impossible_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        NCE(4, 9, **options)
