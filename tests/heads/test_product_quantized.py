"""ProductQuantizedSoftmax against its equation, and how it learns codes."""

import copy
import socket
import sys

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from cases import counts_of, randomise
from hypothesis import given, settings
from hypothesis import strategies as st
from naive import naive_product_quantized
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.testing import assert_close

from lm_softmax.heads import (
    AdaptiveSoftmax,
    FullSoftmax,
    LowRankSoftmax,
    ProductQuantizedSoftmax,
    product_quantized,
    quantized_matrix,
)
from lm_softmax.kernels import warm_up

EXACT = {"rtol": 1e-10, "atol": 1e-10}


def gradients(loss, head, hidden):
    return torch.autograd.grad(loss, [hidden, *head.parameters()], retain_graph=True)


def indexed(factor):
    """A factor's rows, its latent ones straight through, as the definition reads."""
    books = enumerate(factor.centroids)
    rows = torch.cat([book[factor.codes[:, m].long()] for m, book in books], 1)
    return rows if factor.latent is None else rows + (factor.latent - factor.latent.detach())


def whole_rows(head):
    """The matrix from hidden to logits."""
    product = torch.eye(head.hidden_size, dtype=head.output.centroids.dtype)
    for factor in head.factors:
        product = indexed(factor) @ product
    return product.detach()


@settings(max_examples=50, deadline=None)
@given(
    num=st.integers(1, 40),
    widths=st.lists(st.integers(1, 5), min_size=1, max_size=3),
    num_codebooks=st.integers(1, 4),
    codebook_size=st.integers(1, 12),
    vocab_size=st.integers(1, 60),
    learn_codes=st.booleans(),
    bias=st.booleans(),
    softcap=st.none() | st.floats(0.5, 20),
    smoothing=st.sampled_from([0.0, 0.1, 0.9]),
    z_loss=st.sampled_from([0.0, 1e-4, 0.3]),
    seed=st.integers(0, 2**20),
)
def test_every_option_equals_its_equation(
    num,
    widths,
    num_codebooks,
    codebook_size,
    vocab_size,
    learn_codes,
    bias,
    softcap,
    smoothing,
    z_loss,
    seed,
):
    torch.manual_seed(seed)
    hidden_size, *rank = sorted((width * num_codebooks for width in widths), reverse=True)
    head = ProductQuantizedSoftmax(
        hidden_size,
        vocab_size,
        num_codebooks=num_codebooks,
        codebook_size=codebook_size,
        rank=rank or None,
        learn_codes=learn_codes,
        bias=bias,
        softcap=softcap,
        label_smoothing=smoothing,
        z_loss=z_loss,
    )
    head = randomise(head).double()
    hidden = torch.randn(num, hidden_size, dtype=torch.float64, requires_grad=True)
    target = torch.randint(vocab_size, (num,))
    target[torch.rand(num) < 0.2] = -100
    nll = -naive_product_quantized(head, hidden)
    wanted = nll.gather(-1, target.clamp(min=0).unsqueeze(-1)).squeeze(-1) * (target != -100)
    assert_close(-head.log_prob(hidden), nll, **EXACT)
    assert_close(-head.log_prob(hidden, target), wanted, **EXACT)
    inputs = hidden
    for factor in head.factors:  # again as logits, for the log-sum-exp of the z-loss
        inputs = F.linear(inputs, indexed(factor))
    logits = inputs if head.bias is None else inputs + head.bias
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    expected = (1 - smoothing) * wanted
    expected = expected + smoothing * nll.mean(-1) * (target != -100)
    expected = expected + z_loss * logits.logsumexp(-1) ** 2 * (target != -100)
    assert_close(
        expected - z_loss * logits.logsumexp(-1) ** 2 * (target != -100),
        F.cross_entropy(logits, target, label_smoothing=smoothing, reduction="none"),
        **EXACT,
    )
    losses = head.loss(hidden, target, reduction="none")
    assert_close(losses, expected, **EXACT)
    weights = torch.randn(num, dtype=torch.float64)
    assert_close(
        gradients((losses * weights).sum(), head, hidden),
        gradients((expected * weights).sum(), head, hidden),
        **EXACT,
    )
    total = head.loss(hidden, target, reduction="sum")
    assert_close(gradients(total, head, hidden), gradients(expected.sum(), head, hidden), **EXACT)
    assert head.loss_is_nll == (smoothing == 0 and z_loss == 0)


def test_the_latent_gradient_is_that_of_the_rows_and_the_centroids_get_its_sum():
    torch.manual_seed(0)
    head = ProductQuantizedSoftmax(6, 40, num_codebooks=2, codebook_size=4).double()
    hidden, target = torch.randn(9, 6, dtype=torch.float64), torch.randint(40, (9,))
    head.loss(hidden, target).backward()
    rows = whole_rows(head).requires_grad_()
    F.cross_entropy(F.linear(hidden, rows, head.bias), target).backward()
    assert_close(head.output.latent.grad, rows.grad, **EXACT)
    for m in range(2):
        for k in range(4):
            members = head.output.codes[:, m] == k
            summed = rows.grad[members, 3 * m : 3 * m + 3].sum(0)
            assert_close(head.output.centroids.grad[m, k], summed, **EXACT)


def test_bias_starts_at_the_unigram_distribution():
    counts = counts_of(50)
    effective = counts.clamp(min=1)
    expected = (effective / effective.sum()).log()
    for rank in (None, 4):
        head = ProductQuantizedSoftmax(8, 50, counts, codebook_size=9, rank=rank)
        assert_close(head.log_prob(torch.zeros(8)), expected)
    assert (ProductQuantizedSoftmax(8, 50, codebook_size=9).bias == 0).all()


class TestStructure:
    def test_default_parts_are_8_wide_where_that_divides(self):
        assert ProductQuantizedSoftmax(48, 9).num_codebooks == [6]
        assert ProductQuantizedSoftmax(12, 9).num_codebooks == [3]
        assert ProductQuantizedSoftmax(7, 9).num_codebooks == [7]
        assert ProductQuantizedSoftmax(48, 9, rank=[16, 6]).num_codebooks == [6, 2, 3]

    def test_shapes_and_integers(self):
        head = ProductQuantizedSoftmax(12, 500, num_codebooks=[4, 2], codebook_size=300, rank=6)
        inner, output = head.factors
        assert inner.centroids.shape == (4, 6, 3)  # one centroid a row: exact
        assert inner.latent is None
        assert output.centroids.shape == (2, 300, 3)
        assert output.codes.shape == (500, 2)
        assert output.codes.dtype == torch.int16
        assert output.latent.shape == (500, 6)
        assert ProductQuantizedSoftmax(12, 500).output.codes.dtype == torch.uint8
        assert head.to(torch.bfloat16).output.codes.dtype == torch.int16

    def test_more_centroids_than_words_is_the_full_softmax(self):
        head = ProductQuantizedSoftmax(8, 30, num_codebooks=2, codebook_size=256)
        assert head.output.centroids.shape == (2, 30, 4)
        assert [sorted(codes) for codes in head.output.codes.t().tolist()] == [list(range(30))] * 2

    def test_pins_what_rebuilds_it(self):
        head = ProductQuantizedSoftmax(16, 90, codebook_size=7, rank=[8, 4])
        structure = head.structure()
        assert structure == {
            "num_codebooks": [2, 1, 1],
            "codebook_size": 7,
            "rank": [8, 4],
            "learn_codes": True,
        }
        rebuilt = ProductQuantizedSoftmax(16, 90, **structure)
        rebuilt.load_state_dict(head.state_dict())
        hidden = torch.randn(5, 16)
        assert_close(rebuilt.log_prob(hidden), head.log_prob(hidden), rtol=0, atol=0)

    def test_fixed_codes_keep_frequent_words_apart_and_use_every_centroid(self):
        head = ProductQuantizedSoftmax(
            16, 500, num_codebooks=4, codebook_size=20, learn_codes=False
        )
        blocks = head.output.codes.view(25, 20, 4).long().sort(1).values
        assert (blocks == torch.arange(20).view(1, 20, 1)).all()
        assert len({tuple(row) for row in head.output.codes.tolist()}) > 480

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"num_codebooks": 5}, "num_codebooks must divide the width.* got 5 for 12"),
            ({"num_codebooks": 0}, "got 0 for 12"),
            ({"num_codebooks": 24}, "got 24 for 12"),
            ({"num_codebooks": 2.0}, r"got 2\.0 for 12"),
            ({"num_codebooks": 4, "rank": 6}, "got 4 for 6"),
            ({"num_codebooks": [4], "rank": 6}, r"2 widths \[12, 6\], got \[4\]"),
            ({"codebook_size": 0}, "codebook_size.*at least 1, got 0"),
            ({"codebook_size": 2.5}, r"got 2\.5"),
            ({"codebook_size": True}, "codebook_size.*at least 1, got True"),
            ({"num_codebooks": True}, "got True for 12"),
            ({"num_codebooks": [2, True], "rank": 6}, "got True for 6"),
            ({"reassign_every": True}, "reassign_every.*at least 1, got True"),
            ({"reassign_every": 2.0}, r"got 2\.0"),
            ({"rank": True}, "got True"),
            ({"rank": 6.0}, r"got 6\.0"),
            ({"reassign_every": 0}, "reassign_every.*at least 1, got 0"),
            ({"rank": 13}, "hidden_size=12 .*got 13"),
            ({"rank": [4, 8]}, r"none above the one before, got \[4, 8\]"),
            ({"rank": 0}, "got 0"),
            ({"softcap": 0.0}, "softcap must be above 0 and finite, got 0.0"),
            ({"label_smoothing": 1.0}, r"\[0, 1\), got 1.0"),
            ({"z_loss": -1e-4}, "got -0.0001"),
        ],
        ids=str,
    )
    def test_impossible_options_are_refused(self, options, message):
        with pytest.raises(ValueError, match=message):
            ProductQuantizedSoftmax(12, 40, **options)

    def test_tying_is_refused(self):
        with pytest.raises(ValueError, match="ProductQuantizedSoftmax has no output matrix"):
            ProductQuantizedSoftmax(12, 40).tie_weight(nn.Embedding(40, 12))


class TestFromFull:
    def coded(self, num_words=300):
        """A full head whose rows are a product code."""
        torch.manual_seed(0)
        full = randomise(FullSoftmax(12, num_words, softcap=5.0, z_loss=0.1, ignore_index=-7))
        centroids, codes = torch.randn(3, 9, 4), torch.randint(9, (num_words, 3))
        with torch.no_grad():
            full.weight.copy_(torch.cat([centroids[m][codes[:, m]] for m in range(3)], 1))
        return full.double()

    def test_rows_that_are_a_code_are_recovered(self):
        full = self.coded()
        head = ProductQuantizedSoftmax.from_full(full, num_codebooks=3, codebook_size=9)
        hidden = torch.randn(20, 12, dtype=torch.float64)
        assert_close(whole_rows(head), full.weight.detach(), **EXACT)
        assert_close(head.log_prob(hidden), full.log_prob(hidden), **EXACT)
        assert head.objective == full.objective
        assert head.ignore_index == -7
        assert [name for name, _ in head.named_parameters()] == ["bias", "factors.0.centroids"]
        assert not head.learn_codes

    def test_the_seed_decides(self):
        full = FullSoftmax(12, 300)
        options = {"num_codebooks": 3, "codebook_size": 9, "iterations": 4}
        first, second, third = (
            ProductQuantizedSoftmax.from_full(full, seed=seed, **options).state_dict()
            for seed in (1, 1, 2)
        )
        assert_close(first, second, rtol=0, atol=0)
        assert not torch.equal(first["factors.0.centroids"], third["factors.0.centroids"])

    def test_more_centroids_and_codebooks_are_nearer(self):
        full = randomise(FullSoftmax(16, 400))
        errors = []
        for num_codebooks, codebook_size in ((2, 4), (2, 32), (8, 32), (8, 400)):
            options = {"num_codebooks": num_codebooks, "codebook_size": codebook_size}
            head = ProductQuantizedSoftmax.from_full(full, **options)
            errors.append((whole_rows(head) - full.weight.detach()).square().mean().item())
        assert errors == sorted(errors, reverse=True)
        assert errors[-1] == 0

    @pytest.mark.parametrize("rank", [8, [8, 4]])
    def test_with_rank_it_codes_the_truncated_decomposition(self, rank):
        full = randomise(FullSoftmax(12, 60)).double()
        head = ProductQuantizedSoftmax.from_full(full, codebook_size=60, rank=rank)
        left, values, right = torch.linalg.svd(full.weight.detach(), full_matrices=False)
        kept = rank if isinstance(rank, int) else rank[-1]
        expected = left[:, :kept] * values[:kept] @ right[:kept]
        assert_close(whole_rows(head), expected, rtol=1e-8, atol=1e-8)
        assert_close(head.bias, full.bias)

    def test_back_propagation_trains_the_centroids_and_keeps_the_codes(self):
        torch.manual_seed(0)
        full = randomise(FullSoftmax(8, 120))
        head = ProductQuantizedSoftmax.from_full(full, num_codebooks=2, codebook_size=8)
        hidden = torch.randn(400, 8)
        target = full.sample(hidden).squeeze(-1)
        codes, before = head.output.codes.clone(), head.loss(hidden, target).item()
        optimizer = torch.optim.Adam(head.parameters(), lr=0.02)
        for _ in range(60):
            optimizer.zero_grad()
            head.loss(hidden, target).backward()
            optimizer.step()
            head.after_optimizer_step()
        assert head.loss(hidden, target) < 0.9 * before
        assert (head.output.codes == codes).all()

    @pytest.mark.parametrize(
        ("head", "message"),
        [
            (AdaptiveSoftmax(8, 40, cutoffs=[10, 20]), "AdaptiveSoftmax with 2 tail clusters"),
            (LowRankSoftmax(8, 40, rank=8), "LowRankSoftmax with inputs of its own"),
            (ProductQuantizedSoftmax(8, 40), "hidden_size=8 a word, got ProductQuantizedSoftmax"),
        ],
        ids=["tails", "projected", "coded"],
    )
    def test_other_heads_are_refused(self, head, message):
        with pytest.raises(ValueError, match=message):
            ProductQuantizedSoftmax.from_full(head)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"num_codebooks": 5}, "got 5 for 8"),
            ({"codebook_size": 2.0}, r"codebook_size.*got 2\.0"),
            ({"iterations": -1}, "iterations .*at least 0, got -1"),
            ({"iterations": 2.0}, r"iterations .*got 2\.0"),
            ({"iterations": True}, "iterations .*got True"),
            ({"seed": 0.5}, r"seed .*got 0\.5"),
            ({"seed": False}, "seed .*got False"),
            ({"seed": -1}, "seed .*got -1"),
            ({"seed": 2**64}, "seed .*got 18446744073709551616"),
        ],
        ids=str,
    )
    def test_impossible_options_are_refused(self, options, message):
        with pytest.raises(ValueError, match=message):
            ProductQuantizedSoftmax.from_full(FullSoftmax(8, 40), **options)

    @pytest.mark.parametrize("value", [torch.nan, torch.inf])
    def test_rows_that_are_not_finite_are_refused(self, value):
        full = FullSoftmax(8, 40)
        with torch.no_grad():
            full.weight[3, 2] = value
        with pytest.raises(ValueError, match="rows of FullSoftmax must be finite"):
            ProductQuantizedSoftmax.from_full(full, codebook_size=5)

    def test_no_step_of_kmeans_and_a_single_centroid(self):
        full = randomise(FullSoftmax(8, 40))
        head = ProductQuantizedSoftmax.from_full(full, codebook_size=5, iterations=0)
        start = whole_rows(head)  # seeds are rows of the matrix
        assert all((full.weight == row).all(1).any() for row in start)
        single = ProductQuantizedSoftmax.from_full(full, num_codebooks=1, codebook_size=1)
        assert_close(whole_rows(single), full.weight.detach().mean(0).expand(40, 8))

    def test_the_scale_of_the_rows_changes_nothing_but_the_scale(self):
        torch.manual_seed(0)
        full = randomise(FullSoftmax(16, 200)).double()
        with torch.no_grad():
            full.weight.mul_(torch.logspace(0, -2, 16))
            full.weight.copy_(full.weight @ torch.linalg.qr(torch.randn(16, 16).double()).Q)
        options = {"num_codebooks": 4, "codebook_size": 8, "rank": 16, "iterations": 5}
        rows = whole_rows(ProductQuantizedSoftmax.from_full(full, **options))
        with torch.no_grad():
            full.weight.div_(1024)  # a power of two, which rounds nothing
        small = whole_rows(ProductQuantizedSoftmax.from_full(full, **options))
        assert_close(small * 1024, rows, rtol=1e-6, atol=1e-9)

    def test_neither_the_default_device_nor_the_random_state_matter(self):
        full = randomise(FullSoftmax(8, 40))
        options = {"num_codebooks": 2, "codebook_size": 5, "rank": 4}
        expected = ProductQuantizedSoftmax.from_full(full, **options).state_dict()
        torch.manual_seed(3)
        wanted = torch.rand(2)
        torch.manual_seed(3)
        with torch.device("meta"):
            made = ProductQuantizedSoftmax.from_full(full, **options)
        assert_close(made.state_dict(), expected, rtol=0, atol=0)
        assert torch.equal(torch.rand(2), wanted)

    def test_takes_an_adaptive_head_without_tails(self):
        full = randomise(AdaptiveSoftmax(8, 30, cutoffs=[])).bfloat16()
        head = ProductQuantizedSoftmax.from_full(full)  # a centroid for each word
        assert head.output.centroids.dtype == torch.bfloat16
        hidden = torch.randn(4, 8)
        assert_close(head.log_prob(hidden), full.log_prob(hidden))


class TestLearnedCodes:
    def trained(self, steps=150, **options):
        """A head after some steps on words drawn from a full softmax, and its loss."""
        torch.manual_seed(0)
        truth = FullSoftmax(8, 150)
        with torch.no_grad():
            truth.weight.normal_()
        torch.manual_seed(1)
        head = ProductQuantizedSoftmax(8, 150, num_codebooks=2, codebook_size=8, **options)
        optimizer = torch.optim.Adam(head.parameters(), lr=0.02)
        for _ in range(steps):
            hidden = torch.randn(256, 8)
            optimizer.zero_grad()
            head.loss(hidden, truth.sample(hidden).squeeze(-1)).backward()
            optimizer.step()
            head.after_optimizer_step()
        hidden = torch.randn(2000, 8)
        return head, head.loss(hidden, truth.sample(hidden).squeeze(-1)).item()

    def test_learned_codes_beat_random_ones_which_beat_none(self):
        _, learned = self.trained()
        _, fixed = self.trained(learn_codes=False)
        uniform = torch.tensor(150.0).log().item()
        assert fixed < uniform - 0.2
        assert learned < fixed - 0.2

    def test_codes_change_every_so_many_steps_and_never_in_between(self):
        head, _ = self.trained(steps=0, reassign_every=3)
        hidden, target = torch.randn(30, 8), torch.randint(150, (30,))
        for step in range(1, 8):
            with torch.no_grad():
                head.output.latent.normal_()
            before = head.output.codes.clone()
            assert_close(head.loss(hidden, target), head.loss(hidden, target), rtol=0, atol=0)
            head.log_prob(hidden)
            assert (head.output.codes == before).all()
            head.after_optimizer_step()
            assert torch.equal(head.output.codes, before) == bool(step % 3)
            assert head.steps == step

    @pytest.mark.parametrize("cheap", [True, False], ids=["cpu", "as-on-a-gpu"])
    def test_steps_are_counted_on_from_a_loaded_state(self, cheap, monkeypatch):
        monkeypatch.setattr(product_quantized, "reads_are_cheap", lambda _: cheap)
        head, _ = self.trained(steps=2, reassign_every=4)
        other, _ = self.trained(steps=1, reassign_every=4)
        other.load_state_dict(head.state_dict())
        with torch.no_grad():
            other.output.latent.normal_()
        before = other.output.codes.clone()
        other.after_optimizer_step()
        assert (other.output.codes == before).all()
        other.after_optimizer_step()
        assert (other.output.codes != before).any()

    def test_codes_are_those_of_the_nearest_centroids(self):
        head, _ = self.trained(steps=0)
        with torch.no_grad():
            head.output.latent.normal_()
            head.output.centroids.normal_()
        head.output.reassign()
        parts = head.output.latent.detach().view(150, 2, 4)
        for m in range(2):
            nearest = torch.cdist(parts[:, m], head.output.centroids[m].detach()).argmin(1)
            assert (head.output.codes[:, m] == nearest).all()

    def test_start_is_near_the_rows_and_needs_no_search(self, monkeypatch):
        monkeypatch.setattr(quantized_matrix, "assign", None)
        head = ProductQuantizedSoftmax(8, 150, num_codebooks=2, codebook_size=8)
        bound = 8**-0.5
        parts = head.output.latent.detach() - whole_rows(head)
        assert head.output.centroids.abs().max() <= bound
        assert 0.45 * bound < parts.abs().max() <= 0.5 * bound * (1 + 1e-6)
        blocks = head.output.codes[:144].view(18, 8, 2).long().sort(1).values
        assert (blocks == torch.arange(8).view(1, 8, 1)).all()

    def test_what_is_frozen_stays(self):
        head, _ = self.trained(steps=0)
        with torch.no_grad():
            head.output.latent.normal_()
            head.output.centroids[:, 3:] = 1e4  # dead
        head.output.latent.requires_grad_(False)
        before = {name: value.clone() for name, value in head.state_dict().items()}
        head.output.reassign()
        assert_close(head.state_dict(), before, rtol=0, atol=0)
        head.output.latent.requires_grad_()
        head.output.centroids.requires_grad_(False)
        head.output.reassign()
        assert torch.equal(head.output.centroids, before["factors.0.centroids"])
        assert (head.output.codes < 3).all()
        head.output.centroids.requires_grad_()
        head.output.reassign()
        assert head.output.centroids.abs().max() < 1e4

    def test_the_count_of_steps_is_the_buffer(self):
        head, _ = self.trained(steps=3, reassign_every=4)
        head.steps.zero_()
        before = head.output.codes.clone()
        with torch.no_grad():
            head.output.latent.normal_()
        for _ in range(3):
            head.after_optimizer_step()
        assert (head.output.codes == before).all()
        head.after_optimizer_step()
        assert (head.output.codes != before).any()

    def test_dead_centroids_are_used_again(self):
        head, _ = self.trained(steps=0, reassign_every=1)
        with torch.no_grad():
            head.output.centroids[:, 3:] = 1e4
        head.after_optimizer_step()
        parts = head.output.latent.detach().view(150, 2, 4)
        for m in range(2):
            assert head.output.codes[:, m].unique().numel() == 8
            for k in range(3, 8):  # each lies on the part that now has its code
                members = parts[head.output.codes[:, m] == k, m]
                assert_close(members, head.output.centroids[m, k : k + 1].detach())
        head.after_optimizer_step()  # and they keep members of their own
        assert all(head.output.codes[:, m].unique().numel() == 8 for m in range(2))

    def test_export_draws_nothing_and_keeps_what_is_frozen(self):
        head = ProductQuantizedSoftmax(8, 150, codebook_size=8, rank=4).double().eval()
        head.bias.requires_grad_(False)
        head.factors[0].centroids.requires_grad_(False)
        torch.manual_seed(3)
        wanted = torch.rand(2)
        torch.manual_seed(3)
        kept = head.export()
        assert torch.equal(torch.rand(2), wanted)
        assert [name for name, p in kept.named_parameters() if p.requires_grad] == [
            "factors.1.centroids"
        ]
        assert kept.output.centroids.dtype == torch.float64
        assert not kept.training

    def test_export_is_equal_without_the_latent_matrix(self):
        for rank in (None, 4):
            torch.manual_seed(0)
            learned = randomise(ProductQuantizedSoftmax(8, 150, codebook_size=8, rank=rank))
            kept = learned.export()
            assert not kept.learn_codes
            names = {name for name, _ in kept.named_parameters()}
            assert not any("latent" in name for name in names)
            latent = sum(f.latent.numel() for f in learned.factors if f.latent is not None)
            sizes = [sum(p.numel() for p in head.parameters()) for head in (learned, kept)]
            assert sizes[0] - sizes[1] == latent >= 150 * (rank or 8)
            hidden, target = torch.randn(100, 8), torch.randint(150, (100,))
            with torch.no_grad():
                for part in (hidden, hidden[:3]):
                    assert_close(kept.log_prob(part), learned.log_prob(part), rtol=0, atol=0)
            assert_close(
                kept.log_prob(hidden, target), learned.log_prob(hidden, target), rtol=0, atol=0
            )
            again = ProductQuantizedSoftmax(8, 150, **kept.structure())
            again.load_state_dict(kept.state_dict())
            with pytest.raises(RuntimeError, match="latent"):
                again.load_state_dict(learned.state_dict())
            with pytest.raises(RuntimeError, match="latent"):
                learned.load_state_dict(kept.state_dict())
            kept.after_optimizer_step()
            assert_close(kept.state_dict(), again.state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize(("tokens", "with_gradients"), [(3, False), (200, False), (3, True)])
def test_all_log_probs_compile_as_one_graph(tokens, with_gradients):
    head = randomise(ProductQuantizedSoftmax(8, 90, num_codebooks=2, codebook_size=5, rank=6))
    hidden = torch.randn(tokens, 8, requires_grad=with_gradients)
    compiled = torch.compile(head.log_prob, fullgraph=True, backend="aot_eager")
    with torch.set_grad_enabled(with_gradients):
        found, expected = compiled(hidden), head.log_prob(hidden)
    assert_close(found, expected)
    if with_gradients:
        weights = torch.randn_like(found)
        inputs = [hidden, *head.parameters()]
        ours = torch.autograd.grad((found * weights).sum(), inputs)
        assert_close(ours, torch.autograd.grad((expected * weights).sum(), inputs))


def test_memory_is_a_small_part_of_the_dense_head():
    with torch.device("meta"):
        head = ProductQuantizedSoftmax(
            512, 100_000, num_codebooks=64, codebook_size=256, learn_codes=False
        )
        learned = ProductQuantizedSoftmax(512, 100_000, num_codebooks=64)
    memory = head.memory_bytes()
    assert memory.dense == 4 * 100_000 * 513
    assert memory.head == 4 * (64 * 256 * 8 + 100_000) + 100_000 * 64
    assert memory.head < 0.08 * 4 * 100_000 * 512
    assert learned.memory_bytes().head == memory.head + 4 * 100_000 * 512 + 8


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def train_a_rank(rank, folder):
    """Steps of one of two processes on batches of its own, from weights of its own."""
    torch.manual_seed(rank)  # DistributedDataParallel makes the start equal
    head = ProductQuantizedSoftmax(8, 60, codebook_size=6, num_codebooks=4, reassign_every=2)
    parallel = nn.parallel.DistributedDataParallel(head)
    optimizer = torch.optim.Adam(head.parameters(), lr=0.05)
    changed = 0
    for _ in range(8):
        hidden, target = torch.randn(20, 8), torch.randint(60, (20,))
        optimizer.zero_grad()
        parallel(hidden, target).backward()
        optimizer.step()
        with torch.no_grad():
            head.output.centroids[:, 0] = 50.0  # a dead one
        before = head.output.codes.clone()
        head.after_optimizer_step()
        changed += (head.output.codes != before).sum().item()
    torch.save((head.state_dict(), changed), f"{folder}/trained{rank}.pt")


def choose_from_shards(rank, folder):
    """A sharded head beside a whole one, on equal latent rows and with dead centroids."""
    mesh = init_device_mesh("cpu", (2,))
    torch.manual_seed(0)
    whole = ProductQuantizedSoftmax(9, 60, codebook_size=6, num_codebooks=3, reassign_every=1)
    with torch.no_grad():
        whole.output.latent.normal_()
        whole.output.centroids[:, :2] = 50.0
    sharded = fully_shard(copy.deepcopy(whole), mesh=mesh)
    register_fsdp_forward_method(sharded, "loss")
    for head in (whole, sharded):
        head.after_optimizer_step()
    hidden, target = torch.randn(20, 9), torch.randint(60, (20,))
    centroids = sharded.output.centroids.full_tensor(), whole.output.centroids.detach()
    codes = sharded.output.codes, whole.output.codes
    losses = [head.loss(hidden, target).detach() for head in (sharded, whole)]
    found = list(zip(centroids, codes, losses, strict=True))
    torch.save(found, f"{folder}/sharded{rank}.pt")


def run_a_rank(rank, port, folder):
    warm_up()
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    train_a_rank(rank, folder)
    choose_from_shards(rank, folder)
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def of_two_ranks(tmp_path_factory):
    """What two processes found; started once, as that takes most of the time."""
    folder = tmp_path_factory.mktemp("ranks")
    torch.multiprocessing.spawn(run_a_rank, (free_port(), folder), nprocs=2)
    return folder


@pytest.mark.skipif(sys.platform == "win32", reason="gloo")
def test_codes_are_identical_on_all_ranks(of_two_ranks):
    (first, changed), (second, _) = (
        torch.load(of_two_ranks / f"trained{rank}.pt", weights_only=True) for rank in range(2)
    )
    assert changed > 0
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


@pytest.mark.skipif(sys.platform == "win32", reason="gloo")
def test_codes_are_chosen_from_shards(of_two_ranks):
    for rank in range(2):
        path = of_two_ranks / f"sharded{rank}.pt"
        sharded, whole = torch.load(path, weights_only=True)
        assert whole[0].abs().max() < 50
        assert_close(sharded, whole)
        assert torch.equal(sharded[1], whole[1])


def test_deepcopy_goes_on_alone():
    head = ProductQuantizedSoftmax(8, 60, codebook_size=6, reassign_every=1)
    clone = copy.deepcopy(head)
    with torch.no_grad():
        clone.output.latent.normal_()
    before = head.output.codes.clone()
    clone.after_optimizer_step()
    assert (clone.output.codes != before).any()
    assert (head.output.codes == before).all()
    assert head.steps == 0
