"""Top-k of every head against a stable sort of its log-probabilities, and what it opens for it."""

import copy
import pickle
import weakref

import pytest
import torch
from cases import CASES, adaptive, counts_of, randomise
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.testing import assert_close

from lm_softmax.heads import (
    AdaptiveSoftmax,
    FullSoftmax,
    HierarchicalSoftmax,
    MixtureOfSoftmaxes,
    ProductQuantizedSoftmax,
)
from lm_softmax.kernels import (
    class_search,
    cluster_search,
    dense_search,
    kept,
    mixture_search,
    ranking,
    tail_bounds,
)

heads = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


@pytest.fixture
def narrow(monkeypatch):
    """Small heads go the way of large ones: many chunks and blocks, and bounds."""
    monkeypatch.setattr(ranking, "SORTED", 0)
    monkeypatch.setattr(ranking, "WIDE", 0)
    monkeypatch.setattr(dense_search, "SEARCH_BYTES", 0)  # chunks are of 16 blocks then
    monkeypatch.setattr(dense_search, "SEARCH_ROWS", 7)
    monkeypatch.setattr(cluster_search, "OPEN_BYTES", 2**10)
    monkeypatch.setattr(cluster_search, "WORTH", 1)
    monkeypatch.setattr(mixture_search, "MIXED_ROWS", 7)
    monkeypatch.setattr(mixture_search, "FEW", 1)
    monkeypatch.setattr(tail_bounds, "PREVIEW", 2)
    for module in (ranking, dense_search, cluster_search, mixture_search, tail_bounds):
        monkeypatch.setattr(module, "BLOCK", 4)


def check(head, hidden, k, **tolerance):
    """Values in the order of a stable sort; each id has its value, and none comes twice."""
    log_probs = head.log_prob(hidden)
    expected = log_probs.sort(stable=True, dim=-1, descending=True).values[..., :k]
    found = head.topk(hidden, k)
    assert found.log_probs.shape == found.indices.shape == (*hidden.shape[:-1], k)
    assert found.log_probs.dtype == log_probs.dtype
    assert_close(found.log_probs, expected, **tolerance)
    assert_close(log_probs.gather(-1, found.indices), found.log_probs, **tolerance)
    ids = found.indices.sort(-1).values
    assert (ids.diff(dim=-1) > 0).all()
    falls = found.log_probs.diff(dim=-1)
    assert (falls <= 0).all()
    assert (found.indices.diff(dim=-1)[falls == 0] > 0).all()  # equal ones by lower id
    return found


@heads
@given(data=st.data())
@settings(
    max_examples=4, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_equals_a_stable_sort(case, narrow, data):
    vocab_size = data.draw(st.integers(2, 200))
    k = data.draw(st.integers(1, vocab_size))
    seed, gain = data.draw(st.integers(0, 10**6)), data.draw(st.sampled_from([0.1, 1.0, 30.0]))
    batch = data.draw(st.sampled_from([(1,), (9,), (2, 3), (), (0,)]))
    torch.manual_seed(seed)
    head = randomise(case.make(6, vocab_size, counts_of(vocab_size))).double()
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.mul_(gain)
    hidden = torch.randn(*batch, 6, dtype=torch.float64)
    for _ in range(2):  # bounds are there from the second call on
        check(head, hidden, k, rtol=1e-10, atol=1e-10)


@heads
@pytest.mark.parametrize("mode", ["hidden", "module", "autocast"])
def test_in_low_precision(case, mode, narrow):
    head = randomise(case.make(6, 150, counts_of(150)))
    hidden = torch.randn(9, 6)
    if mode == "module":
        head = head.bfloat16()
    if mode != "autocast":
        hidden = hidden.bfloat16()
    with torch.autocast("cpu", torch.bfloat16, enabled=mode == "autocast"):
        for k in (1, 7):
            for _ in range(2):
                check(head, hidden, k, rtol=2e-2, atol=2e-2)


@heads
def test_of_extreme_logits(case, narrow):
    head = randomise(case.make(6, 150, counts_of(150)))
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.mul_(60)
    hidden = torch.randn(9, 6)
    for k in (1, 7):
        for _ in range(2):
            check(head, hidden, k, rtol=3e-6, atol=2e-2)


@heads
def test_of_nan_is_nan(case, narrow):
    head = randomise(case.make(6, 150, counts_of(150)))
    hidden = torch.randn(9, 6)
    expected = head.topk(hidden, 3)
    hidden[4] = torch.nan
    found = head.topk(hidden, 3)
    assert found.log_probs[4].isnan().all()
    assert ((found.indices[4] >= 0) & (found.indices[4] < 150)).all()
    others = torch.arange(9) != 4
    assert_close(found.log_probs[others], expected.log_probs[others])


def large_tails(dtype=torch.float32, **options):
    """A head with clusters that bounds are for, and rows that open few of them."""
    torch.manual_seed(3)
    head = AdaptiveSoftmax(
        16, 6000, counts_of(6000), cutoffs=[40, 400, 2000], tail_sizes=[8, 8, 6], **options
    )
    with torch.no_grad():
        for matrix in (head.weight, head.cluster_weight, *head.projections, *head.tail_weights):
            matrix.normal_().mul_(0.4)
        for matrix in head.tail_weights:
            matrix.add_(0.5)  # so that the mean row counts
    return head.to(dtype), torch.randn(40, 16, dtype=dtype)


class TestClusters:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
    @pytest.mark.parametrize("bias", [True, False])
    @pytest.mark.parametrize("k", [1, 5, 40, 41])
    def test_bounds_change_nothing(self, dtype, bias, k, monkeypatch):
        monkeypatch.setattr(cluster_search, "WORTH", 100)
        monkeypatch.setattr(tail_bounds, "PREVIEW", 1)  # whatever is not excluded is looked at
        head, hidden = large_tails(dtype, bias=bias)
        calls = [head.search(hidden, k) for _ in range(3)]
        expected = head.log_prob(hidden).sort(stable=True, descending=True)
        for top, _ in calls:
            assert_close(top.log_probs, expected.values[:, :k])
            assert top.indices.equal(expected.indices[:, :k])
        assert calls[1].opened.equal(calls[2].opened)
        assert (calls[1].opened <= calls[0].opened).all()

    def test_bounds_spare_clusters(self, monkeypatch):
        monkeypatch.setattr(cluster_search, "WORTH", 100)
        head, hidden = large_tails()
        without, within = (head.search(hidden, 10).opened for _ in range(2))
        assert within.sum() < 0.7 * without.sum()

    def test_opens_what_holds_a_best_word_and_little_else(self):
        head, hidden = large_tails()
        log_probs = head.log_prob(hidden)
        top, opened = head.search(hidden, 10)
        assert opened.shape == (40, 3)
        holds = torch.stack(
            [
                ((top.indices >= start) & (top.indices < end)).any(1)
                for start, end in ((40, 400), (400, 2000), (2000, 6000))
            ],
            1,
        )
        assert (holds <= opened).all()
        masses = torch.stack(
            [part.logsumexp(1) for part in log_probs.tensor_split([40, 400, 2000], 1)[1:]], 1
        )
        assert not opened[masses < log_probs[:, :40].topk(10).values[:, -1:] - 1e-4].any()

    @pytest.mark.parametrize("num_rows", [1, 3])
    def test_first_cluster_first(self, num_rows):
        """A k-th best that a cluster raised spares the next one."""
        head = randomise(AdaptiveSoftmax(4, 60, cutoffs=[10, 20], tail_sizes=[4, 4]))
        with torch.no_grad():
            head.bias.zero_()
            head.bias[10], head.bias[11] = 30.0, 5.0
            head.cluster_weight.zero_()
            head.weight.zero_()
            head.tail_weights[0].zero_()
            head.tail_biases[0].zero_()
        found = head.search(torch.randn(num_rows, 4), 2)
        assert found.opened.tolist() == [[True, False]] * num_rows
        assert found.top.indices.tolist() == [[10, 11]] * num_rows

    @pytest.mark.parametrize("k", [1, 5])
    @pytest.mark.parametrize("worth", [100, 10**6])
    @pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
    def test_a_row_alone_is_that_of_a_batch(self, dtype, worth, k, monkeypatch):
        monkeypatch.setattr(cluster_search, "WORTH", worth)
        monkeypatch.setattr(tail_bounds, "PREVIEW", 1)
        head, hidden = large_tails(dtype)
        head.topk(hidden, k)
        top, opened = head.search(hidden, k)
        hidden[7] = torch.nan
        for i, row in enumerate(hidden.split(1)):
            alone = head.search(row, k)
            assert_close(head.topk(row, k), alone.top, rtol=0, atol=0, equal_nan=True)
            if i == 7:
                assert alone.top.log_probs.isnan().all()
                assert alone.opened.all()
            elif dtype == torch.bfloat16:  # whose products of other shapes round differently
                assert_close(alone.top.log_probs[0], top.log_probs[i], rtol=2e-2, atol=2e-2)
            else:
                assert_close(alone.top.log_probs[0], top.log_probs[i])
                assert alone.top.indices[0].equal(top.indices[i])
                assert alone.opened[0].equal(opened[i])

    def test_nan_weights_are_seen_by_a_row_alone(self):
        head, hidden = large_tails()
        head.tail_weights[1].data[7, 3] = torch.nan
        seen = 0
        for row in hidden.split(1):
            top, opened = head.search(row, 1)
            assert top.log_probs.isnan().all() == opened[0, 1]
            seen += int(opened[0, 1])
        assert 0 < seen < len(hidden)

    def test_large_k_opens_all(self):
        head, hidden = large_tails()
        assert head.search(hidden[:2], 41).opened.all()

    def test_without_tails_opens_none(self):
        assert randomise(FullSoftmax(4, 30)).search(torch.randn(2, 3, 4), 5).opened.shape == (
            2,
            3,
            0,
        )

    def test_ties_across_clusters_go_to_the_lower_id(self, narrow):
        head = AdaptiveSoftmax(4, 12, cutoffs=[4, 8], tail_sizes=[2, 2])
        with torch.no_grad():
            for parameter in head.parameters():
                parameter.zero_()
            head.bias[4:] = torch.tensor(4.0).log()  # all words are alike
        for k in range(1, 5):
            for _ in range(2):
                assert head.topk(torch.randn(3, 4), k).indices.tolist() == [list(range(k))] * 3

    def test_many_rows_are_held_in_parts(self, monkeypatch):
        head, hidden = large_tails()
        expected = head.search(hidden, 6)
        monkeypatch.setattr(cluster_search, "OPEN_BYTES", 3 * 4 * 4000)
        found = head.search(hidden, 6)
        assert_close(found.top, expected.top)
        assert found.opened.equal(expected.opened)

    def test_nan_weights_are_seen_where_opened(self, monkeypatch):
        monkeypatch.setattr(cluster_search, "WORTH", 100)
        head, hidden = large_tails()
        head.topk(hidden, 10)
        head.tail_weights[0].data[7, 3] = torch.nan
        for _ in range(2):
            top, opened = head.search(hidden, 10)
            assert opened[:, 0].any()
            assert top.log_probs.isnan().any(1).equal(opened[:, 0])


def changes():
    """What makes weights others than they were; by name, from head to None."""

    def fused(head):
        optimizer = torch.optim.AdamW(head.parameters(), lr=0.5, fused=True)
        for parameter in head.parameters():
            parameter.grad = torch.ones_like(parameter).bernoulli_() - 0.5
        optimizer.step()

    def fused_of_one_word(head):
        weight = head.tail_weights[2]
        optimizer = torch.optim.AdamW([weight], lr=20.0, fused=True, weight_decay=0)
        weight.grad = torch.zeros_like(weight)
        weight.grad[1234] = -1
        optimizer.step()

    def in_place(head):
        with torch.no_grad():
            head.tail_weights[2].mul_(5)

    def one_word(head):
        with torch.no_grad():
            head.tail_weights[2][1234] = 20.0

    def through_data(head):
        head.tail_weights[2].data.mul_(5)

    def of_bias(head):
        with torch.no_grad():
            head.tail_biases[2][1234] = 20.0

    def loaded(head):
        other = copy.deepcopy(head)
        in_place(other)
        head.load_state_dict(other.state_dict())

    def assigned(head):
        other = copy.deepcopy(head)
        in_place(other)
        head.load_state_dict(other.state_dict(), assign=True)

    def replaced(head):
        head.tail_weights[2] = nn.Parameter(head.tail_weights[2].detach() * 5)

    def new_data(head):
        head.tail_weights[2].data = head.tail_weights[2].detach() * 5

    def moved(head):
        in_place(head.double())
        head.float()

    whole = (fused, in_place, through_data, new_data, loaded, assigned, replaced, moved)
    parts = (fused_of_one_word, one_word, of_bias)
    return {kind.__name__: kind for kind in (*whole, *parts)}


class TestBoundsAreNeverStale:
    @pytest.mark.parametrize("change", changes())
    def test_after(self, change, monkeypatch):
        monkeypatch.setattr(cluster_search, "WORTH", 100)
        head, hidden = large_tails()
        for _ in range(3):
            head.topk(hidden, 10)
        changes()[change](head)
        expected = head.log_prob(hidden).sort(stable=True, descending=True)
        for _ in range(3):
            found = head.topk(hidden, 10)
            assert_close(found.log_probs, expected.values[:, :10])
            assert found.indices.equal(expected.indices[:, :10])

    def test_copies_have_their_own(self, monkeypatch):
        monkeypatch.setattr(cluster_search, "WORTH", 100)
        head, hidden = large_tails()
        keys = list(head.state_dict())
        expected = [head.topk(hidden, 10) for _ in range(2)][1]
        assert list(head.state_dict()) == keys
        for clone in (copy.deepcopy(head), pickle.loads(pickle.dumps(head))):
            assert_close(clone.topk(hidden, 10), expected)

    def test_weights_in_any_layout(self, monkeypatch):
        monkeypatch.setattr(cluster_search, "WORTH", 100)
        head, hidden = large_tails()
        weight = head.tail_weights[2].detach().t().contiguous().t()
        head.tail_weights[2] = nn.Parameter(weight)
        for scale in (1, 1, 5, 5):
            head.tail_weights[2].data.mul_(scale)
            expected = head.log_prob(hidden).topk(10)
            assert_close(head.topk(hidden, 10).log_probs, expected.values)

    def test_old_weights_are_not_held(self, monkeypatch):
        monkeypatch.setattr(cluster_search, "WORTH", 100)
        head, hidden = large_tails()
        for _ in range(2):
            head.topk(hidden, 10)
        weight = head.tail_weights[2]
        old = weakref.ref(weight.untyped_storage())
        head.double()
        assert head.tail_weights[2] is weight
        assert old() is None

    def test_go_with_the_weights(self, monkeypatch):
        monkeypatch.setattr(cluster_search, "WORTH", 100)
        before = len(kept._entries)
        head, hidden = large_tails()
        for _ in range(2):
            head.topk(hidden, 10)
        assert len(kept._entries) > before
        del head
        assert len(kept._entries) == before

    def test_in_inference_mode(self, monkeypatch):
        monkeypatch.setattr(cluster_search, "WORTH", 100)
        with torch.inference_mode():
            head, hidden = large_tails()
            expected = head.log_prob(hidden).topk(10)
            for _ in range(3):
                assert head.topk(hidden, 10).indices.equal(expected.indices)
        head, hidden = large_tails()
        with torch.inference_mode():
            inside = [head.topk(hidden, 10) for _ in range(3)]
        assert_close(head.topk(hidden, 10), inside[2])

    def test_of_rows_without_length(self, monkeypatch):
        monkeypatch.setattr(cluster_search, "WORTH", 100)
        head, hidden = large_tails()
        for scale in (0.0, 0.0, 1.0, 1e4):
            log_probs = head.log_prob(hidden * scale).topk(10).values
            found = head.topk(hidden * scale, 10).log_probs
            # products of other shapes round logits of thousands to another last digit or two
            assert_close(found, log_probs, rtol=4e-6, atol=1e-5)


class TestTrees:
    @pytest.mark.parametrize("tree", ["classes", "huffman"])
    def test_open_little(self, tree, monkeypatch):
        head = HierarchicalSoftmax(16, 4000, counts_of(4000), tree=tree)
        with torch.no_grad():
            for matrix in (head.weight, head.class_weight):
                if matrix is not None:
                    matrix.normal_().mul_(2)
        hidden = torch.randn(3, 4, 16)
        expected = head.log_prob(hidden).sort(stable=True, descending=True)
        monkeypatch.setattr(HierarchicalSoftmax, "log_prob", None)  # calling it would fail
        monkeypatch.setattr(class_search, "MOST", 2)
        for k in (1, 5):
            top, opened = head.search(hidden, k)
            assert_close(top.log_probs, expected.values[..., :k])
            assert top.indices.equal(expected.indices[..., :k])
            assert opened.shape == (3, 4)
            assert (opened >= 1).all()
            assert (opened < (len(head.cutoffs) + 1 if tree == "classes" else 400)).all()

    def test_large_classes_are_summed_exactly(self):
        """Added one by one in float32, the normaliser would be 1e-4 off."""
        size = 20_000
        bias = torch.full((size * 20,), -0.4)
        bias[::size] = 0
        starts = torch.arange(21) * size
        masses = -torch.arange(20.0).mul(20).unsqueeze(0)
        classes = class_search.Classes(torch.zeros(size * 20, 2), bias, starts)
        found, _, failed, _ = class_search.class_topk(torch.zeros(1, 2), classes, masses, 3)
        assert not failed.any()
        assert_close(found[0], bias[:size].double().log_softmax(0)[:3].float())

    def test_classes_of_flat_rows_are_ranked_as_a_whole(self):
        head = HierarchicalSoftmax(16, 4000, counts_of(4000), tree="classes")
        with torch.no_grad():
            head.weight.normal_()
            head.class_weight.normal_().mul_(4)
            head.bias.zero_()
            head.class_bias.zero_()
        hidden = torch.randn(6, 16)
        hidden[2] = 0
        check(head, hidden, 30)
        opened = head.search(hidden, 30).opened
        assert opened[2] == len(head.cutoffs) + 1
        assert opened.min() < 10

    def test_classes_in_any_order_keep_ties_by_id(self):
        head = HierarchicalSoftmax(2, 64, tree="classes", cutoffs=[4, 8, 16, 32])
        with torch.no_grad():
            for parameter in head.parameters():
                parameter.zero_()
            head.class_bias.copy_(torch.tensor([4.0, 4.0, 8.0, 16.0, 32.0]).log())  # all alike
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(class_search, "MOST", 1)
            found = head.topk(torch.randn(2, 2), 6)
        assert found.indices.tolist() == [list(range(6))] * 2


class TestMixture:
    def test_mixes_few_words(self, monkeypatch):
        head = MixtureOfSoftmaxes(16, 5000, num_experts=3)
        with torch.no_grad():
            head.weight.normal_()
            head.projection.normal_()
        hidden = torch.randn(6, 16)
        expected = head.log_prob(hidden).sort(stable=True, descending=True)
        monkeypatch.setattr(MixtureOfSoftmaxes, "log_prob", None)  # calling it would fail
        for k in (1, 5):
            found = head.topk(hidden, k)
            assert_close(found.log_probs, expected.values[:, :k])
            assert found.indices.equal(expected.indices[:, :k])

    def test_flat_rows_are_ranked_as_a_whole(self):
        head = MixtureOfSoftmaxes(16, 5000, num_experts=3)
        with torch.no_grad():
            head.weight.normal_()
            head.projection.normal_()
            head.projection_bias.zero_()
        hidden = torch.randn(6, 16)
        hidden[2] = 0
        check(head, hidden, 4)
        assert head.topk(hidden, 4).indices[2].tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("num", [1, 3, 80])
def test_product_quantized_holds_no_row_of_logits(num, monkeypatch):
    head = ProductQuantizedSoftmax(8, 3000, learn_codes=False, codebook_size=16)
    hidden = torch.randn(num, 8)
    log_probs = head.log_prob(hidden)
    monkeypatch.setattr("lm_softmax.kernels.codes.ROWS_BYTES", 2**12)
    monkeypatch.setattr(ProductQuantizedSoftmax, "log_prob", None)  # calling it would fail
    found = head.topk(hidden, 9)
    assert_close(found.log_probs, log_probs.topk(9).values)
    assert_close(log_probs.gather(1, found.indices), found.log_probs)


def test_adaptive_shapes_of_the_suite_have_short_lists(narrow):
    """Else nothing here would go through the search of clusters."""
    head = randomise(adaptive(0.3, 0.6)(6, 100))
    assert len(head.weight) == 30
    assert not head.search(torch.zeros(1, 6) + 5, 1).opened.all()
