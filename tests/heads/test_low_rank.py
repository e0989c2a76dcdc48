"""LowRankSoftmax against its equation, the full softmax, and the theorem of Eckart and Young."""

import pytest
import torch
import torch.nn.functional as F
from cases import counts_of, randomise
from hypothesis import given, settings
from hypothesis import strategies as st
from naive import naive_low_rank
from torch import nn
from torch.testing import assert_close

from lm_softmax.heads import (
    AdaptiveSoftmax,
    FullSoftmax,
    LowRankSoftmax,
    MixtureOfSoftmaxes,
    singular,
)
from lm_softmax.heads import low_rank as module

EXACT = {"rtol": 1e-10, "atol": 1e-10}


def gradients(loss, head, hidden):
    return torch.autograd.grad(loss, [hidden, *head.parameters()], retain_graph=True)


@settings(max_examples=40, deadline=None)
@given(
    num=st.integers(0, 40),
    hidden_size=st.integers(1, 20),
    share=st.floats(0, 1),
    vocab_size=st.integers(1, 60),
    bias=st.booleans(),
    softcap=st.none() | st.floats(0.5, 20),
    smoothing=st.sampled_from([0.0, 0.1, 0.9]),
    z_loss=st.sampled_from([0.0, 0.3]),
    seed=st.integers(0, 2**20),
)
def test_every_option_equals_its_equation(
    num, hidden_size, share, vocab_size, bias, softcap, smoothing, z_loss, seed
):
    torch.manual_seed(seed)
    options = {"softcap": softcap, "label_smoothing": smoothing, "z_loss": z_loss}
    rank = 1 + int(share * (hidden_size - 1))
    head = LowRankSoftmax(hidden_size, vocab_size, rank=rank, bias=bias, **options)
    head = randomise(head).double()
    hidden = torch.randn(num, hidden_size, dtype=torch.float64, requires_grad=True)
    target = torch.randint(vocab_size, (num,))
    target[torch.rand(num) < 0.2] = -100
    logits = F.linear(hidden, head.weight @ head.projection, head.bias)
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    cross = F.cross_entropy(logits, target, label_smoothing=smoothing, reduction="none")
    expected = cross + z_loss * logits.logsumexp(-1) ** 2 * (target != -100)
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
    log_probs = naive_low_rank(head, hidden)
    assert_close(head.log_prob(hidden), log_probs, **EXACT)
    kept = target != -100
    assert_close(
        head.log_prob(hidden, target)[kept],
        log_probs[kept].gather(-1, target[kept].unsqueeze(-1)).squeeze(-1),
        **EXACT,
    )


def test_starts_at_the_scale_of_the_full_softmax():
    hidden = torch.randn(400, 96)
    full, low = (cls(96, 800, bias=False) for cls in (FullSoftmax, LowRankSoftmax))
    logits = F.linear(F.linear(hidden, low.projection), low.weight)
    assert_close(logits.std(), F.linear(hidden, full.weight).std(), rtol=0.05, atol=0)


def test_bias_starts_at_the_unigram_distribution():
    counts = counts_of(50)
    effective = counts.clamp(min=1)
    log_probs = LowRankSoftmax(8, 50, counts).log_prob(torch.zeros(8))
    assert_close(log_probs, (effective / effective.sum()).log())
    assert (LowRankSoftmax(8, 50).bias == 0).all()


def test_rank_is_a_quarter_by_default_and_pinned():
    assert LowRankSoftmax(70, 9).structure() == {"rank": 17}
    assert LowRankSoftmax(3, 9).rank == 1
    head = LowRankSoftmax(70, 9, rank=70)
    assert (head.projection.shape, head.weight.shape) == ((70, 70), (9, 70))


@pytest.mark.parametrize("rank", [0, -2, 9, 4.0])
def test_impossible_ranks_are_refused(rank):
    with pytest.raises(ValueError, match=rf"rank must be in \[1, hidden_size=8\], got {rank}"):
        LowRankSoftmax(8, 50, rank=rank)
    with pytest.raises(ValueError, match=rf"\[1, hidden_size=8\], got {rank}"):
        LowRankSoftmax.from_full(FullSoftmax(8, 50), rank)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"softcap": 0.0}, "softcap must be above 0 and finite, got 0.0"),
        ({"label_smoothing": 1.0}, r"\[0, 1\), got 1.0"),
        ({"z_loss": -1e-4}, "z_loss must be at least 0 and finite, got -0.0001"),
    ],
)
def test_impossible_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        LowRankSoftmax(8, 50, **options)


def test_tied_weight_is_shared():
    embedding = nn.Embedding(31, 3)
    head = LowRankSoftmax(7, 31, rank=3)
    head.tie_weight(embedding)
    assert head.weight is embedding.weight
    head.loss(torch.randn(4, 7), torch.randint(31, (4,))).backward()
    assert embedding.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("embedding", [nn.Embedding(31, 7), nn.Embedding(30, 3), nn.Identity()])
def test_tying_to_another_shape_is_refused(embedding):
    with pytest.raises(ValueError, match=r"LowRankSoftmax ties .* \(31, 3\), got"):
        LowRankSoftmax(7, 31, rank=3).tie_weight(embedding)


def full_head(hidden_size, vocab_size, **options):
    return randomise(FullSoftmax(hidden_size, vocab_size, **options)).double()


class TestFromFull:
    @pytest.fixture(autouse=True)
    def _small_parts(self, monkeypatch):
        monkeypatch.setattr(module, "ROWS", 13)
        monkeypatch.setattr(singular, "ROWS", 13)

    @pytest.mark.parametrize("size", [(9, 70), (9, 5), (6, 13), (4, 1)], ids=str)
    def test_is_the_head_itself_at_full_rank(self, size):
        hidden_size, vocab_size = size
        full = full_head(hidden_size, vocab_size)
        hidden = torch.randn(20, hidden_size, dtype=torch.float64)
        for rank in range(min(size), hidden_size + 1):
            low = LowRankSoftmax.from_full(full, rank)
            assert low.rank == rank
            assert_close(low.log_prob(hidden), full.log_prob(hidden), **EXACT)

    @pytest.mark.parametrize("size", [(9, 70), (9, 5)], ids=str)
    def test_error_is_that_of_eckart_and_young(self, size):
        full = full_head(*size)
        values = torch.linalg.svdvals(full.weight)
        for rank in range(1, min(size)):
            low = LowRankSoftmax.from_full(full, rank)
            error = full.weight - low.weight @ low.projection
            assert_close(error.norm(), values[rank:].norm(), **EXACT)
            assert_close(torch.linalg.matrix_norm(error, 2), values[rank], **EXACT)

    def test_factors_share_the_singular_values(self):
        full = full_head(9, 70)
        low = LowRankSoftmax.from_full(full, 4)
        roots = torch.linalg.svdvals(full.weight)[:4].diag()
        assert_close(low.projection @ low.projection.t(), roots, **EXACT)
        assert_close(low.weight.t() @ low.weight, roots, **EXACT)

    def test_is_exact_where_the_condition_is_extreme(self):
        """Singular values over 12 decades: those of the squared matrix would be lost below 8."""
        values = torch.logspace(0, -12, 9, dtype=torch.float64)
        left, right = (
            torch.linalg.qr(torch.randn(size, 9, dtype=torch.float64)).Q for size in (70, 9)
        )
        full = full_head(9, 70)
        full.weight.data.copy_(left @ values.diag() @ right.t())
        for rank in range(1, 9):
            low = LowRankSoftmax.from_full(full, rank)
            error = full.weight - low.weight @ low.projection
            assert_close(error.norm(), values[rank:].norm(), rtol=1e-2, atol=1e-15)

    @pytest.mark.parametrize("true_rank", [0, 2])
    def test_rows_of_lower_rank_stay_finite(self, true_rank):
        full = full_head(6, 40)
        factors = torch.randn(40, true_rank).double(), torch.randn(true_rank, 6).double()
        full.weight.data.copy_(factors[0] @ factors[1])
        low = LowRankSoftmax.from_full(full, 5)
        assert_close(low.weight @ low.projection, full.weight.detach(), **EXACT)

    def test_directions_that_have_decayed_do_not_blow_up(self):
        """Singular values of 1e-60, whose roots divide."""
        full = full_head(6, 40)
        full.weight.data[:, 2:4] *= 1e-60
        low = LowRankSoftmax.from_full(full, 6)
        assert low.weight.abs().max() < full.weight.abs().max()
        assert_close(low.weight @ low.projection, full.weight.detach(), **EXACT)

    @pytest.mark.parametrize(
        "options",
        [
            {"softcap": 2.5, "bias": False},
            {"label_smoothing": 0.1, "z_loss": 1e-4, "ignore_index": -1},
        ],
        ids=str,
    )
    def test_options_and_bias_are_copied(self, options):
        full = full_head(6, 40, **options)
        low = LowRankSoftmax.from_full(full, 6)
        assert low.objective == full.objective
        hidden, target = torch.randn(30, 6).double(), torch.randint(40, (30,))
        target[3] = full.ignore_index
        assert_close(low.loss(hidden, target), full.loss(hidden, target), **EXACT)
        assert low.bias is not full.bias or low.bias is None

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    def test_dtype_is_kept(self, dtype):
        full = randomise(FullSoftmax(6, 40)).to(dtype)
        low = LowRankSoftmax.from_full(full, 6)
        assert {parameter.dtype for parameter in low.parameters()} == {dtype}
        assert all(parameter.requires_grad for parameter in low.parameters())
        tolerance = {} if dtype == torch.float32 else {"rtol": 0.05, "atol": 0.05}
        found = low.weight.float() @ low.projection.float()
        assert_close(found, full.weight.detach().float(), **tolerance)

    def test_of_a_low_rank_head_truncates_it_further(self):
        head = randomise(LowRankSoftmax(8, 50, rank=5)).double()
        product = head.weight @ head.projection
        low = LowRankSoftmax.from_full(head, 3)
        error = product - low.weight @ low.projection
        assert_close(error.norm(), torch.linalg.svdvals(product)[3:].norm(), **EXACT)

    def test_of_an_adaptive_head_without_clusters(self):
        head = randomise(AdaptiveSoftmax(6, 40, cutoffs=[])).double()
        hidden = torch.randn(20, 6, dtype=torch.float64)
        low = LowRankSoftmax.from_full(head, 6)
        assert_close(low.log_prob(hidden), head.log_prob(hidden), **EXACT)

    def test_of_tail_clusters_is_refused(self):
        with pytest.raises(
            ValueError, match="hidden_size=6 a word, got AdaptiveSoftmax with 2 tail"
        ):
            LowRankSoftmax.from_full(AdaptiveSoftmax(6, 40, cutoffs=[10, 20]), 3)

    def test_of_other_inputs_is_refused(self):
        class Squared(FullSoftmax):
            def _inputs(self, rows, target=None):
                return rows.square()

        with pytest.raises(ValueError, match="got Squared with inputs of its own"):
            LowRankSoftmax.from_full(Squared(6, 40), 3)
        with pytest.raises(ValueError, match="hidden_size=6 a word, got MixtureOfSoftmaxes"):
            LowRankSoftmax.from_full(MixtureOfSoftmaxes(6, 40), 3)
