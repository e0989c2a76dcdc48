"""AdaptiveSoftmax against its equation, torch's own, and its own options."""

import pytest
import torch
from cases import counts_of, randomise
from hypothesis import given, settings
from hypothesis import strategies as st
from naive import naive_adaptive
from torch import nn
from torch.nn.utils import parametrize
from torch.testing import assert_close

from lm_softmax.heads import AdaptiveSoftmax, FullSoftmax
from lm_softmax.heads.cutoffs import resolve_tail_sizes

EXACT = {"rtol": 1e-10, "atol": 1e-10}


def gradients(loss, head, hidden):
    return torch.autograd.grad(loss, [hidden, *head.parameters()], retain_graph=True)


@st.composite
def structures(draw):
    vocab_size = draw(st.integers(1, 80))
    ids = draw(st.lists(st.integers(1, max(vocab_size - 1, 1)), unique=True, max_size=5))
    return vocab_size, sorted(cutoff for cutoff in ids if cutoff < vocab_size)


@settings(max_examples=60, deadline=None)
@given(
    structure=structures(),
    num=st.integers(0, 40),
    hidden_size=st.integers(1, 20),
    div_value=st.floats(1, 6),
    bias=st.booleans(),
    softcap=st.none() | st.floats(0.5, 20),
    seed=st.integers(0, 2**20),
)
def test_equals_its_equation(structure, num, hidden_size, div_value, bias, softcap, seed):
    torch.manual_seed(seed)
    vocab_size, cutoffs = structure
    options = {"div_value": div_value, "min_tail_size": 2, "bias": bias, "softcap": softcap}
    head = AdaptiveSoftmax(hidden_size, vocab_size, cutoffs=cutoffs, **options)
    head = randomise(head).double()
    hidden = torch.randn(num, hidden_size, dtype=torch.float64, requires_grad=True)
    target = torch.randint(vocab_size, (num,))
    target[torch.rand(num) < 0.2] = -100
    all_words = naive_adaptive(head, hidden)
    assert_close(head.log_prob(hidden), all_words, **EXACT)
    wanted = target.clamp(min=0).unsqueeze(-1)
    expected = -all_words.gather(-1, wanted).squeeze(-1) * (target != -100)
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


@pytest.mark.parametrize("head_bias", [True, False])
def test_import_from_torch_is_exact(head_bias):
    torch_head = nn.AdaptiveLogSoftmaxWithLoss(
        20, 203, [31, 100, 150], div_value=2.0, head_bias=head_bias
    ).double()
    head = AdaptiveSoftmax.from_torch(torch_head)
    assert head.cutoffs == [31, 100, 150]
    assert head.tail_sizes == [10, 5, 2]
    assert (head.bias is not None) == head_bias
    hidden = torch.randn(300, 20, dtype=torch.float64)
    target = torch.randint(203, (300,))
    assert_close(head.log_prob(hidden), torch_head.log_prob(hidden), **EXACT)
    output = torch_head(hidden, target)
    assert_close(head.log_prob(hidden, target), output.output, **EXACT)
    assert_close(head.loss(hidden, target), output.loss, **EXACT)
    output.loss.backward()
    head.loss(hidden, target).backward()
    assert_close(
        torch.cat([head.weight.grad, head.cluster_weight.grad]), torch_head.head.weight.grad
    )
    for i, tail in enumerate(torch_head.tail):
        assert_close(head.projections[i].grad, tail[0].weight.grad, **EXACT)
        assert_close(head.tail_weights[i].grad, tail[1].weight.grad, **EXACT)


def test_import_of_a_tail_without_width_is_refused():
    with pytest.warns(UserWarning, match="zero-element"):
        torch_head = nn.AdaptiveLogSoftmaxWithLoss(4, 100, [10, 20, 50])
    with pytest.raises(ValueError, match=r"at least 1, got \[1, 0, 0\]"):
        AdaptiveSoftmax.from_torch(torch_head)


def test_without_clusters_it_is_the_full_softmax():
    head = randomise(AdaptiveSoftmax(6, 40, cutoffs=[]))
    full = FullSoftmax(6, 40)
    full.load_state_dict(head.state_dict())
    hidden, target = torch.randn(9, 6), torch.randint(40, (9,))
    assert_close(head.loss(hidden, target), full.loss(hidden, target), rtol=0, atol=0)


def test_z_loss_adds_each_softmax_of_a_token():
    head = randomise(AdaptiveSoftmax(6, 40, cutoffs=[10, 25], z_loss=0.2)).double()
    hidden = torch.randn(30, 6, dtype=torch.float64, requires_grad=True)
    target = torch.randint(40, (30,))
    short_list = hidden @ torch.cat([head.weight, head.cluster_weight]).t() + head.bias
    expected = -head.log_prob(hidden, target) + 0.2 * short_list.logsumexp(-1) ** 2
    for i, words in enumerate((range(10, 25), range(25, 40))):
        inside = torch.tensor([word in words for word in target.tolist()])
        logits = hidden @ head.projections[i].t() @ head.tail_weights[i].t() + head.tail_biases[i]
        expected = expected + 0.2 * logits.logsumexp(-1) ** 2 * inside
    assert not head.loss_is_nll
    assert_close(head.loss(hidden, target, reduction="none"), expected, **EXACT)
    assert_close(
        gradients(head.loss(hidden, target), head, hidden),
        gradients(expected.mean(), head, hidden),
        **EXACT,
    )


def test_biases_start_at_the_unigram_distribution():
    counts = counts_of(3000)
    head = AdaptiveSoftmax(8, 3000, counts, cutoffs=[100, 900])
    effective = counts.clamp(min=1)
    assert_close(head.log_prob(torch.zeros(8)), (effective / effective.sum()).log())


def test_widths_follow_the_rule():
    head = AdaptiveSoftmax(512, 9000, cutoffs=[1000, 2000, 4000, 8000], div_value=4.0)
    assert head.tail_sizes == [128, 32, 16, 16]
    assert resolve_tail_sizes(100, 3, 2.5, 1) == [40, 16, 6]
    pinned = AdaptiveSoftmax(512, 9000, cutoffs=[1000, 2000], tail_sizes=[7, 3])
    assert [p.shape for p in pinned.projections] == [(7, 512), (3, 512)]


def test_a_last_cutoff_of_all_words_is_dropped():
    assert AdaptiveSoftmax(8, 100, cutoffs=[10, 100]).cutoffs == [10]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cutoffs": [0, 10]}, r"inside \(0, 100\), got \[0, 10\]"),
        ({"cutoffs": [10, 101]}, r"got \[10, 101\]"),
        ({"cutoffs": [20, 10]}, r"got \[20, 10\]"),
        ({"cutoffs": [20, 20]}, r"got \[20, 20\]"),
        ({"cutoffs": [2.5]}, r"whole numbers, got \[2.5\]"),
        ({"cutoffs": "best"}, "'best'"),
        ({"cutoffs": 10}, "list of ids, got 10"),
        ({"cutoffs": None}, "list of ids, got None"),
        ({"cutoffs": [10], "tail_sizes": [4.0]}, r"got \[4.0\]"),
        ({"cutoffs": [10, 20], "min_tail_size": 0, "div_value": 8.0}, r"\[1, 0\] of hidden_size=8"),
        ({"cutoffs": [10], "div_value": 0.5}, "div_value must be at least 1, got 0.5"),
        ({"cutoffs": [10], "tail_sizes": [4, 4]}, r"1 widths of at least 1, got \[4, 4\]"),
        ({"cutoffs": [10], "tail_sizes": [0]}, r"got \[0\]"),
        ({"cutoffs": [10], "label_smoothing": 0.1}, "must be 0, got 0.1"),
        ({"cutoffs": [10], "softcap": 0.0}, "got 0.0"),
    ],
)
def test_impossible_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        AdaptiveSoftmax(8, 100, **options)


def test_tying_to_another_embedding_is_refused():
    with pytest.raises(ValueError, match="AdaptiveEmbedding, got Embedding"):
        AdaptiveSoftmax(8, 100, cutoffs=[10]).tie_weight(nn.Embedding(100, 8))


class Twice(nn.Module):
    def forward(self, weight):
        return 2 * weight


def test_a_tail_with_a_parametrization():
    """It is the attribute that counts, and that its place among the tails stays what it was."""
    head = randomise(AdaptiveSoftmax(6, 40, counts_of(40), cutoffs=[10, 20], tail_sizes=[4, 2]))
    hidden = torch.randn(5, 6)
    before = head.log_prob(hidden)
    parametrize.register_parametrization(head.tail_weights, "0", Twice())
    with_it = head.log_prob(hidden)
    found = head.topk(hidden, 5)
    assert not torch.allclose(with_it, before)
    assert_close(found.log_probs, with_it.topk(5).values)
    parametrize.remove_parametrizations(head.tail_weights, "0")
    assert_close(head.log_prob(hidden), with_it)
