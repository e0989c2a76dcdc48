"""SampledSoftmax: full softmax where all words are drawn, and close to it where few are."""

import copy
import itertools

import pytest
import torch
import torch.nn.functional as F
from cases import counts_of, randomise
from hypothesis import given, settings
from hypothesis import strategies as st
from naive import naive_sampled
from torch import nn
from torch.testing import assert_close

from lm_softmax.heads import FullSoftmax, SampledSoftmax
from lm_softmax.kernels import dense

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
    noise=st.sampled_from(["log_uniform", "unigram", "uniform", "given"]),
    power=st.sampled_from([0.75, 1.0]),
    unique=st.booleans(),
    bias=st.booleans(),
    softcap=st.none() | st.floats(0.5, 20),
    seed=st.integers(0, 2**20),
)
def test_every_option_equals_its_equation(
    data, num, hidden_size, vocab_size, noise, power, unique, bias, softcap, seed
):
    torch.manual_seed(seed)
    most = vocab_size if unique else 2 * vocab_size
    if noise == "given":  # in no order of ids
        noise = (torch.rand(vocab_size) + 0.01).tolist()
    head = SampledSoftmax(
        hidden_size,
        vocab_size,
        counts_of(vocab_size),
        num_samples=data.draw(st.integers(1, most)),
        noise=noise,
        noise_power=power,
        unique=unique,
        bias=bias,
        softcap=softcap,
    )
    head = randomise(head).double()
    hidden = torch.randn(num, hidden_size, dtype=torch.float64, requires_grad=True)
    target = torch.randint(vocab_size, (num,))
    kept = torch.rand(num) < 0.8
    expected = seeded(naive_sampled, head, hidden, target) * kept
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


@pytest.mark.parametrize("noise", ["log_uniform", "unigram", "uniform"])
@pytest.mark.parametrize("softcap", [None, 3.0])
def test_all_words_as_negatives_are_the_full_softmax(noise, softcap):
    options = {"num_samples": 203, "noise": noise, "softcap": softcap}
    head = randomise(SampledSoftmax(8, 203, counts_of(203), **options)).double()
    full = FullSoftmax(8, 203, softcap=softcap).double()
    full.load_state_dict({"weight": head.weight, "bias": head.bias})
    hidden = torch.randn(50, 8, dtype=torch.float64, requires_grad=True)
    target = torch.randint(203, (50,))
    loss, expected = head.loss(hidden, target), full.loss(hidden, target)
    assert_close(loss, expected, **EXACT)
    assert_close(gradients(loss, head, hidden), gradients(expected, full, hidden), **EXACT)
    assert not head.loss_is_nll


def error_of_the_average(head, hidden, target, repeats):
    """How far the gradient, averaged over draws, is from that of the full softmax; relative."""
    exact = gradients(-head.log_prob(hidden, target).mean(), head, hidden)
    found = [gradients(head.loss(hidden, target), head, hidden) for _ in range(repeats)]
    averages = [torch.stack(each).mean(0) for each in zip(*found, strict=True)]
    pairs = zip(averages, exact, strict=True)
    return [((ours - right).norm() / right.norm()).item() for ours, right in pairs]


@pytest.mark.parametrize("unique", [True, False], ids=["unique", "with replacement"])
@pytest.mark.parametrize("noise", ["log_uniform", "unigram"])
def test_the_average_gradient_approaches_the_exact_one(noise, unique):
    """More samples make less than 0.4 of the error, of hidden, weight and bias."""
    vocab_size = 300
    hidden = torch.randn(38, 8, dtype=torch.float64, requires_grad=True)
    errors = []
    for num_samples in (30, 240) if unique else (60, 960):
        torch.manual_seed(2)
        options = {"num_samples": num_samples, "noise": noise, "unique": unique}
        head = SampledSoftmax(8, vocab_size, counts_of(vocab_size), **options).double()
        target = torch.arange(0, vocab_size, 8)
        errors.append(error_of_the_average(head, hidden, target, 40))
    for few, more in zip(*errors, strict=True):
        assert more < 0.4 * few
        assert more < 0.1


NOISE = torch.tensor([0.01, 0.3, 0.02, 0.2, 0.3, 0.07, 0.1], dtype=torch.float64)
DATA = torch.tensor([0.3, 0.02, 0.2, 0.03, 0.05, 0.3, 0.1], dtype=torch.float64)


def slope_of_the_expected_loss(head, logits, monkeypatch):
    """Gradient by the logits of the loss averaged over all draws, and targets from `DATA`."""
    with torch.no_grad():
        head.bias.copy_(logits)
    noise, words, total = head.noise, torch.arange(7), 0
    strata = [words[noise.stratum(words) == k].tolist() for k in range(head.num_samples)]
    assert max(map(len, strata)) > 1 or head.num_samples == 7
    hidden = torch.zeros(7, 1, dtype=torch.float64)
    for drawn in itertools.product(*strata):
        ids = torch.tensor(drawn)
        pairs = zip(drawn, strata, strict=True)
        shares = [NOISE[word] / NOISE[stratum].sum() for word, stratum in pairs]
        monkeypatch.setattr(noise, "draw", lambda ids=ids: ids)
        losses = head.loss(hidden, words, reduction="none")
        total = total + torch.stack(shares).prod() * (losses * DATA).sum()
    return torch.autograd.grad(total, head.bias)[0].abs().max()


@pytest.mark.parametrize("num_samples", [1, 2, 3, 4, 6, 7])
def test_the_optimum_of_unique_negatives_is_the_distribution_of_the_data(num_samples, monkeypatch):
    """The expected loss is convex: its slope is 0 at its optimum, and only there."""
    head = SampledSoftmax(1, 7, num_samples=num_samples, noise=NOISE).double()
    assert slope_of_the_expected_loss(head, DATA.log() + 3, monkeypatch) < 1e-12
    assert slope_of_the_expected_loss(head, NOISE.log(), monkeypatch) > 0.02


def test_trained_sampled_is_deployed_as_a_full_softmax():
    head = randomise(SampledSoftmax(6, 50, counts_of(50), num_samples=9))
    full = FullSoftmax(6, 50)
    full.load_state_dict(head.state_dict())
    hidden = torch.randn(4, 6)
    assert_close(full.log_prob(hidden), head.log_prob(hidden), rtol=0, atol=0)
    other = SampledSoftmax(6, 50, num_samples=30, noise="uniform", unique=False)
    other.load_state_dict(full.state_dict())
    assert_close(other.log_prob(hidden), head.log_prob(hidden), rtol=0, atol=0)


@pytest.mark.parametrize("make", [torch.tensor, list], ids=["tensor", "list"])
def test_structure_pins_given_noise(make):
    masses = [4.0, 1.0, 9.0, 2.0, 3.0]
    options = {"noise_power": 0.5, "num_samples": 3}
    head = SampledSoftmax(2, 5, torch.tensor([5, 4, 3, 2, 1]), noise=make(masses), **options)
    again = SampledSoftmax(2, 5, **{**options, **head.structure()})
    assert set(head.structure()) == {"num_samples", "noise"}
    ids = torch.arange(5)
    assert_close(again.noise.log_expected_counts(ids), head.noise.log_expected_counts(ids))


@pytest.mark.parametrize("unique", [True, False])
def test_a_batch_in_which_every_negative_is_the_target(unique):
    masses = torch.tensor([1.0, 1e-12, 1e-12])
    head = randomise(SampledSoftmax(4, 3, num_samples=1, noise=masses, unique=unique))
    hidden = torch.randn(5, 4, requires_grad=True)
    loss = head.loss(hidden, torch.zeros(5, dtype=torch.int64))
    assert loss == 0
    for gradient in gradients(loss, head, hidden):
        assert (gradient == 0).all()


def test_chunks_change_nothing(monkeypatch):
    head = randomise(SampledSoftmax(6, 300, num_samples=50, softcap=4.0)).double()
    hidden = torch.randn(400, 6, dtype=torch.float64, requires_grad=True)
    target = torch.randint(300, (400,))
    losses = seeded(head.loss, hidden, target, reduction="none")
    expected = gradients(seeded(head.loss, hidden, target), head, hidden)
    monkeypatch.setattr(dense, "CHUNK_BYTES", 0)
    assert dense.chunk_rows(400, 50, torch.float64) < 100
    assert_close(seeded(head.loss, hidden, target, reduction="none"), losses, **EXACT)
    found = gradients(seeded(head.loss, hidden, target), head, hidden)
    assert_close(found, expected, **EXACT)


class TestSparse:
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
    def test_gradients_of_repeated_targets_are_summed_in_float32(self, dtype):
        head = SampledSoftmax(8, 60, num_samples=5, sparse=True).to(dtype)
        exact = copy.deepcopy(head).double()
        exact.sparse = False
        hidden = (torch.randn(4096, 8) + 1).to(dtype)
        target = torch.arange(4096) % 2
        seeded(head.loss, hidden, target, reduction="sum").backward()
        seeded(exact.loss, hidden.double(), target, reduction="sum").backward()
        for parameter, right in zip(head.parameters(), exact.parameters(), strict=True):
            assert parameter.grad.is_sparse
            assert parameter.grad.dtype == dtype
            for found in (parameter.grad, parameter.grad.coalesce()):
                error = (found.to_dense().double() - right.grad).norm()
                assert error < 0.005 * right.grad.norm()

    @pytest.mark.parametrize("unique", [True, False])
    def test_gradients_are_the_dense_ones(self, unique):
        options = {"num_samples": 20, "unique": unique}
        head = randomise(SampledSoftmax(6, 500, sparse=True, **options)).double()
        dense_head = SampledSoftmax(6, 500, **options).double()
        dense_head.load_state_dict(head.state_dict())
        hidden = torch.randn(30, 6, dtype=torch.float64, requires_grad=True)
        target = torch.randint(500, (30,))
        for reduction in ("mean", "sum", "none"):
            head.zero_grad()
            loss = seeded(head.loss, hidden, target, reduction=reduction).sum()
            dense_loss = seeded(dense_head.loss, hidden, target, reduction=reduction).sum()
            loss.backward()
            expected = gradients(dense_loss, dense_head, hidden)[1:]
            for parameter, right in zip(head.parameters(), expected, strict=True):
                assert parameter.grad.is_sparse
                touched = parameter.grad.coalesce().indices().unique()
                assert len(touched) <= 50
                assert_close(parameter.grad.to_dense(), right, **EXACT)

    @pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's of its own, on import
    def test_gradients_of_compiled_code_are_those_of_eager_code(self):
        head = SampledSoftmax(6, 30, num_samples=30, sparse=True)  # draws are all words
        hidden, target = torch.randn(20, 6), torch.randint(9, (20,))
        found = []
        for loss in (head.loss, torch.compile(head.loss, fullgraph=True, backend="inductor")):
            head.zero_grad()
            loss(hidden, target).backward()
            assert all(parameter.grad.is_sparse for parameter in head.parameters())
            found.append([parameter.grad.to_dense() for parameter in head.parameters()])
        assert_close(found[0], found[1])

    def test_evaluation_is_dense(self):
        head = SampledSoftmax(6, 50, sparse=True)
        head.log_prob(torch.randn(3, 6), torch.tensor([1, 2, 3])).sum().backward()
        assert not head.weight.grad.is_sparse

    @torch.sparse.check_sparse_tensor_invariants(True)  # torch warns of a choice not made
    def test_adagrad_steps_are_those_of_dense_gradients(self):
        hidden, target = torch.randn(3, 30, 6), torch.randint(200, (3, 30))
        heads = [SampledSoftmax(6, 200, num_samples=20, sparse=sparse) for sparse in (True, False)]
        heads[1].load_state_dict(heads[0].state_dict())
        for head in heads:
            torch.manual_seed(3)
            optimizer = torch.optim.Adagrad(head.parameters(), lr=0.1)
            for step in range(3):
                optimizer.zero_grad()
                head.loss(hidden[step], target[step]).backward()
                optimizer.step()
        assert_close(heads[0].state_dict(), heads[1].state_dict())

    @pytest.mark.parametrize("target", [[], [-100, -100]], ids=["empty", "all ignored"])
    def test_nothing_to_predict_costs_nothing(self, target):
        head = SampledSoftmax(6, 50, sparse=True)
        loss = head.loss(torch.randn(len(target), 6), torch.tensor(target, dtype=torch.int64))
        loss.backward()
        assert loss == 0
        for parameter in head.parameters():
            assert (parameter.grad.to_dense() == 0).all()

    def test_a_tied_embedding_is_sparse_too(self):
        head = SampledSoftmax(7, 31, sparse=True)
        with pytest.raises(ValueError, match="ties to an embedding with sparse=True"):
            head.tie_weight(nn.Embedding(31, 7))
        embedding = nn.Embedding(31, 7, sparse=True)
        head.tie_weight(embedding)
        assert head.weight is embedding.weight
        target = torch.tensor([1, 2, 3, 3])
        head.loss(embedding(target), target).backward()
        assert embedding.weight.grad.is_sparse


def test_tied_weight_is_shared():
    embedding = nn.Embedding(31, 7)
    head = SampledSoftmax(7, 31, num_samples=31)
    head.tie_weight(embedding)
    assert head.weight is embedding.weight
    hidden, target = torch.randn(4, 7), torch.randint(31, (4,))
    head.loss(hidden + embedding(target), target).backward()
    copy = embedding.weight.detach().clone().requires_grad_()
    logits = F.linear(hidden + F.embedding(target, copy), copy, head.bias)
    F.cross_entropy(logits, target).backward()
    assert_close(embedding.weight.grad, copy.grad)


@pytest.mark.parametrize("embedding", [nn.Embedding(31, 8), nn.Embedding(30, 7), nn.Identity()])
def test_tying_to_another_shape_is_refused(embedding):
    with pytest.raises(ValueError, match=r"SampledSoftmax ties .*\(31, 7\), got"):
        SampledSoftmax(7, 31).tie_weight(embedding)


def test_bias_starts_at_the_unigram_distribution():
    counts = counts_of(50)
    effective = counts.clamp(min=1)
    head = SampledSoftmax(8, 50, counts)
    assert_close(head.log_prob(torch.zeros(8)), (effective / effective.sum()).log())


def test_number_of_negatives_fits_the_vocabulary():
    assert [SampledSoftmax(2, size).num_samples for size in (1, 7, 101, 5000)] == [1, 4, 51, 1024]
    assert SampledSoftmax(2, 101).structure() == {"num_samples": 51}


def test_each_step_draws_anew():
    head = randomise(SampledSoftmax(6, 500, num_samples=10))
    hidden, target = torch.randn(30, 6), torch.randint(500, (30,))
    assert head.loss(hidden, target) != head.loss(hidden, target)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_samples": 10}, "num_samples=10 unique words of 9"),
        ({"num_samples": 0}, "num_samples must be a whole number of at least 1, got 0"),
        ({"noise": torch.zeros(9)}, "word 0 has 0.0, 9 such"),
        ({"noise": "bigram"}, "got 'bigram'"),
        ({"noise_power": -1.0}, "noise_power must be at least 0 and finite, got -1.0"),
        ({"label_smoothing": 0.1}, "SampledSoftmax .* label_smoothing must be 0, got 0.1"),
        ({"softcap": 0.0}, "softcap must be above 0 and finite, got 0.0"),
    ],
    ids=str,
)
def test_impossible_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        SampledSoftmax(4, 9, **options)
