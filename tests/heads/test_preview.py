"""SVD-softmax against its equations written out, and where it is exact against the exact top k."""

import math

import pytest
import torch
import torch.nn.functional as F
from cases import randomise
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from lm_softmax.heads import (
    NCE,
    AdaptiveSoftmax,
    Agreement,
    FullSoftmax,
    LowRankSoftmax,
    MixtureOfSoftmaxes,
    SampledSoftmax,
    SVDPreview,
    TopK,
    agreement,
    preview,
    singular,
)

EXACT = {"rtol": 1e-10, "atol": 1e-10}


def naive(head, hidden, window, num_rescored, k):
    """The paper's steps with torch's own decomposition of the whole matrix, row after row."""
    u, s, vt = torch.linalg.svd(head.weight.detach(), full_matrices=False)
    b, cap = u * s, head.objective.softcap
    bias = torch.zeros(len(b)).to(b) if head.bias is None else head.bias.detach()
    found = []
    for row in hidden:
        h = vt @ row
        logits = (b[:, :window] @ h[:window] + bias).tolist()
        best = sorted(range(len(b)), key=lambda word: -logits[word])[:num_rescored]
        for word in best:
            logits[word] = float(b[word] @ h + bias[word])
        if cap is not None:
            logits = [cap * math.tanh(logit / cap) for logit in logits]
        log_probs = torch.log_softmax(torch.tensor(logits, dtype=torch.float64), 0).tolist()
        top = sorted(best, key=lambda word: (-log_probs[word], word))[:k]
        found.append(([log_probs[word] for word in top], top))
    values, ids = zip(*found, strict=True)
    return TopK(torch.tensor(values, dtype=torch.float64), torch.tensor(ids))


def full_head(hidden_size=6, vocab_size=40, **options):
    return randomise(FullSoftmax(hidden_size, vocab_size, **options)).double()


@pytest.fixture(autouse=True)
def _small_parts(monkeypatch):
    monkeypatch.setattr(preview, "ROWS", 13)
    monkeypatch.setattr(singular, "ROWS", 11)
    monkeypatch.setattr(preview, "CHUNK_BYTES", 3 * 40 * 8)


@settings(max_examples=40, deadline=None)
@given(
    sizes=st.tuples(st.integers(2, 7), st.integers(8, 50)),
    data=st.data(),
    options=st.sampled_from([{}, {"bias": False}, {"softcap": 2.0}]),
)
def test_equals_the_steps_of_the_paper(sizes, data, options):
    hidden_size, vocab_size = sizes
    window = data.draw(st.integers(1, hidden_size))
    num_rescored = data.draw(st.integers(1, vocab_size))
    k = data.draw(st.integers(1, num_rescored))
    head = full_head(hidden_size, vocab_size, **options)
    hidden = torch.randn(7, hidden_size, dtype=torch.float64)
    found = SVDPreview(head, window=window, num_rescored=num_rescored).topk(hidden, k)
    expected = naive(head, hidden, window, num_rescored, k)
    assert_close(found.log_probs, expected.log_probs, **EXACT)
    assert_close(found.indices, expected.indices)


@pytest.mark.parametrize("options", [{}, {"bias": False}, {"softcap": 1.5}], ids=str)
@pytest.mark.parametrize(("window", "num_rescored"), [(6, 5), (2, 40)], ids=["window", "rescored"])
def test_is_exact_with_a_full_window_or_all_words_rescored(window, num_rescored, options):
    head = full_head(**options)
    hidden = torch.randn(2, 5, 6, dtype=torch.float64)
    found = SVDPreview(head, window=window, num_rescored=num_rescored).topk(hidden, 5)
    expected = head.topk(hidden, 5)
    assert_close(found.log_probs, expected.log_probs, **EXACT)
    assert_close(found.indices, expected.indices)
    assert agreement(expected, found) == Agreement(1.0, 1.0)


@pytest.mark.parametrize(
    "head",
    [
        SampledSoftmax(6, 40),
        NCE(6, 40, log_partition="learned"),
        AdaptiveSoftmax(6, 40, cutoffs=[]),
    ],
    ids=lambda head: type(head).__name__,
)
def test_any_full_matrix_will_do(head):
    head = randomise(head).double()
    hidden = torch.randn(9, 6, dtype=torch.float64)
    found, expected = (
        SVDPreview(head, window=6, num_rescored=8).topk(hidden, 3),
        head.topk(hidden, 3),
    )
    assert_close(found.log_probs, expected.log_probs, **EXACT)
    assert_close(found.indices, expected.indices)


def test_a_rank_that_fits_the_window_is_exact():
    head = full_head()
    head.weight.data.copy_(torch.randn(40, 2).double() @ torch.randn(2, 6).double())
    hidden = torch.randn(9, 6, dtype=torch.float64)
    found, expected = (
        SVDPreview(head, window=2, num_rescored=3).topk(hidden, 3),
        head.topk(hidden, 3),
    )
    assert_close(found.log_probs, expected.log_probs, **EXACT)
    assert_close(found.indices, expected.indices)


def test_equal_words_are_ordered_by_lower_id():
    head = full_head(bias=False)
    head.weight.data[[3, 9, 21, 33]] = 5 * head.weight.data[9].clone()
    hidden = head.weight.data[9:10].clone()
    found = SVDPreview(head, window=2, num_rescored=10).topk(hidden, 4)
    assert found.indices.tolist() == [[3, 9, 21, 33]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_low_precision_is_summed_in_float32(dtype):
    head = randomise(FullSoftmax(6, 40)).to(dtype)
    hidden = torch.randn(9, 6, dtype=dtype)
    found = SVDPreview(head, window=3, num_rescored=10).topk(hidden, 4)
    assert found.log_probs.dtype == torch.float32
    expected = naive(head.double(), hidden.double(), 3, 10, 4)
    assert_close(found.log_probs, expected.log_probs.float())
    with torch.autocast("cpu", torch.bfloat16):
        again = SVDPreview(head.to(dtype), window=3, num_rescored=10).topk(hidden, 4)
    assert_close(again.log_probs, found.log_probs)


def test_extreme_logits_and_an_empty_batch():
    head = full_head()
    head.weight.data.mul_(1e4)
    hidden = torch.randn(9, 6, dtype=torch.float64)
    finder = SVDPreview(head, window=3, num_rescored=40)
    assert_close(finder.topk(hidden, 4).log_probs, head.topk(hidden, 4).log_probs, **EXACT)
    empty = finder.topk(torch.empty(0, 3, 6), 4)
    assert empty.log_probs.shape == empty.indices.shape == (0, 3, 4)


def test_it_is_a_copy_that_moves_with_its_module():
    head = full_head()
    hidden = torch.randn(5, 6, dtype=torch.float64)
    finder = SVDPreview(head, window=3, num_rescored=10)
    before = finder.topk(hidden, 4)
    for parameter in head.parameters():
        parameter.data.zero_()
    assert_close(finder.topk(hidden, 4).log_probs, before.log_probs)
    assert not list(finder.parameters())
    assert {name for name, _ in finder.named_buffers()} == {
        *("rotation", "preview_rows", "other_rows", "bias")
    }


@pytest.mark.parametrize(
    ("head", "options", "message"),
    [
        (FullSoftmax(6, 40), {"window": 0}, r"window must be in \[1, 6\], got 0"),
        (FullSoftmax(6, 40), {"window": 7}, r"window must be in \[1, 6\], got 7"),
        (FullSoftmax(6, 40), {"num_rescored": 41}, r"num_rescored must be in \[1, 40\], got 41"),
        (FullSoftmax(6, 40), {"num_rescored": 2.0}, r"num_rescored must be in .*, got 2\.0"),
        (LowRankSoftmax(6, 40), {}, "hidden_size=6 a word, got LowRankSoftmax with inputs of its"),
        (AdaptiveSoftmax(6, 40, cutoffs=[9]), {}, "got AdaptiveSoftmax with 1 tail clusters"),
        (MixtureOfSoftmaxes(6, 40), {}, "got MixtureOfSoftmaxes"),
        (torch.nn.Linear(6, 40), {}, "expected an output head, got Linear"),
    ],
)
def test_what_it_cannot_be_made_of_is_refused(head, options, message):
    with pytest.raises(ValueError, match=message):
        SVDPreview(head, **{"window": 3, "num_rescored": 10} | options)


@pytest.mark.parametrize(
    ("hidden", "k", "message"),
    [
        (torch.zeros(2, 6), 0, r"k must be in \[1, num_rescored=10\], got 0"),
        (torch.zeros(2, 6), 11, r"k must be in \[1, num_rescored=10\], got 11"),
        (torch.zeros(2, 5), 1, r"hidden must be \(\*batch, 6\), got \(2, 5\)"),
        (torch.zeros(2, 6, dtype=torch.int64), 1, "must be floating point, got torch.int64"),
    ],
)
def test_what_it_cannot_look_up_is_refused(hidden, k, message):
    with pytest.raises(ValueError, match=message):
        SVDPreview(FullSoftmax(6, 40), window=3, num_rescored=10).topk(hidden, k)


def test_agreement_counts_first_words_and_shared_ones():
    def of(*ids):
        indices = torch.tensor(ids)
        return TopK(F.log_softmax(torch.zeros(indices.shape), -1), indices)

    exact = of([[1, 2, 3], [4, 5, 6]], [[7, 8, 9], [1, 5, 9]])
    other = of([[1, 3, 2], [5, 4, 0]], [[7, 0, 1], [2, 3, 4]])
    assert agreement(exact, other) == Agreement(0.5, (3 + 2 + 1 + 0) / 12)
    assert agreement(other, exact).top_k == agreement(exact, other).top_k
    with pytest.raises(ValueError, match=r"same positions, got \(2, 2, 3\) and \(2, 3\)"):
        agreement(exact, of([1, 2, 3], [4, 5, 6]))
