"""HierarchicalSoftmax against its equations, its search, and its own options."""

import copy
from functools import partial

import pytest
import torch
from cases import counts_of, hierarchical, random_tree, randomise
from hypothesis import given, settings
from hypothesis import strategies as st
from naive import naive_classes, naive_tree
from torch import nn
from torch.testing import assert_close

from lm_softmax import factory
from lm_softmax.cli.messages import user_error
from lm_softmax.heads import FullSoftmax, HierarchicalSoftmax
from lm_softmax.heads.cutoffs import zipf_counts
from lm_softmax.kernels import Clusters, Tail, path_operations, paths, tree_search
from lm_softmax.kernels.tree_search import tree_topk

EXACT = {"rtol": 1e-10, "atol": 1e-10}
BINARY = ["huffman", "balanced", "random"]


def gradients(loss, head, hidden):
    found = torch.autograd.grad(loss, [hidden, *head.parameters()], retain_graph=True)
    return [grad.to_dense() for grad in found]


def read_nothing(monkeypatch):
    """As on a device that should not wait for the host."""
    for module in (paths, path_operations):
        monkeypatch.setattr(module, "reads_are_cheap", lambda like: False)


@pytest.fixture(params=["reads are cheap", "fixed shapes"])
def shapes(request, monkeypatch):
    """Steps as on a CPU, and as elsewhere."""
    if request.param == "fixed shapes":
        read_nothing(monkeypatch)


def check_against(naive, head, num):
    """Values and gradients of every method, some tokens being ignored."""
    hidden = torch.randn(num, head.hidden_size, dtype=torch.float64, requires_grad=True)
    target = torch.randint(head.vocab_size, (num,))
    target[torch.rand(num) < 0.2] = -100
    inputs = [hidden, *head.parameters()]  # those of a tree of one word are not used
    all_words = naive(head, hidden)
    assert_close(head.log_prob(hidden), all_words, **EXACT)
    of_target = all_words.gather(-1, target.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    expected = -of_target * (target != -100)
    weights = torch.randn(num, dtype=torch.float64)
    losses = head.loss(hidden, target, reduction="none")
    assert_close(losses, expected, **EXACT)
    for loss, right in (
        ((losses * weights).sum(), (expected * weights).sum()),
        (head.loss(hidden, target, reduction="sum"), expected.sum()),
        (head.loss(hidden, target), expected.sum() / (target != -100).sum().clamp(min=1)),
    ):
        assert_close(loss, right, **EXACT)
        assert_close(
            gradients(loss, head, hidden),
            gradients(right + 0 * sum(p.sum() for p in inputs), head, hidden),
            **EXACT,
        )


class TestBinary:
    @given(
        vocab_size=st.integers(1, 60),
        num=st.integers(0, 30),
        hidden_size=st.integers(1, 12),
        tree=st.sampled_from(BINARY),
        bias=st.booleans(),
        sparse=st.booleans(),
        cheap=st.booleans(),
        seed=st.integers(0, 2**20),
    )
    @settings(max_examples=50, deadline=None)
    def test_equals_its_equation(
        self, vocab_size, num, hidden_size, tree, bias, sparse, cheap, seed
    ):
        torch.manual_seed(seed)
        given = random_tree(vocab_size, seed) if tree == "random" else tree
        options = {"tree": given, "bias": bias, "sparse": sparse}
        head = HierarchicalSoftmax(hidden_size, vocab_size, **options)
        head = randomise(head).double()
        with pytest.MonkeyPatch.context() as patch:
            if not cheap:
                read_nothing(patch)
            check_against(naive_tree, head, num)

    @pytest.mark.usefixtures("shapes")
    def test_of_low_precision_rows(self):
        head = randomise(HierarchicalSoftmax(8, 50)).bfloat16()
        hidden = torch.randn(20, 8, dtype=torch.bfloat16, requires_grad=True)
        target = torch.randint(50, (20,))
        exact, wide = copy.deepcopy(head).double(), hidden.detach().double().requires_grad_()
        expected = -naive_tree(exact, wide).gather(1, target[:, None]).mean()
        loss = head.loss(hidden, target)
        assert_close(loss.double(), expected, rtol=1e-5, atol=1e-5)  # only the inputs are rounded
        for ours, right in zip(
            gradients(loss, head, hidden), gradients(expected, exact, wide), strict=True
        ):
            assert ours.dtype == torch.bfloat16
            assert_close(ours.double(), right, rtol=2**-8, atol=1e-4)

    @pytest.mark.parametrize("autocast", [False, True])
    def test_is_one_distribution_in_low_precision(self, autocast):
        head = HierarchicalSoftmax(128, 4000, counts_of(4000))
        hidden, target = torch.randn(32, 128), torch.randint(4000, (32,))
        nn.init.normal_(head.weight, std=0.3)
        if not autocast:
            head, hidden = head.bfloat16(), hidden.bfloat16()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            all_words = head.log_prob(hidden)
            of_target = head.log_prob(hidden, target)
            found = head.topk(hidden, 5)
        assert all_words.dtype == torch.float32
        assert_close(of_target, all_words.gather(1, target[:, None])[:, 0], rtol=2e-6, atol=2e-5)
        order = all_words.sort(stable=True, descending=True)
        assert_close(found.log_probs, order.values[:, :5], rtol=2e-6, atol=2e-5)
        assert_close(all_words.gather(1, found.indices), found.log_probs, rtol=2e-6, atol=2e-5)

    @pytest.mark.usefixtures("shapes")
    def test_bias_of_another_dtype(self):
        head = randomise(HierarchicalSoftmax(8, 50))
        expected = copy.deepcopy(head)
        head.bias.data = head.bias.data.double()
        hidden, target = torch.randn(9, 8, requires_grad=True), torch.randint(50, (9,))
        loss = head.loss(hidden, target)
        assert_close(loss, expected.loss(hidden, target))
        assert_close(
            [each.float() for each in gradients(loss, head, hidden)],
            gradients(expected.loss(hidden, target), expected, hidden),
        )
        assert head.log_prob(hidden).dtype == head.topk(hidden, 2).log_probs.dtype == torch.float32

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    def test_without_the_derivative_of_bags_is_the_same(self, dtype, monkeypatch):
        head = randomise(HierarchicalSoftmax(8, 50)).to(dtype)
        hidden = torch.randn(9, 8, dtype=dtype, requires_grad=True)
        target = torch.randint(50, (9,))
        loss, found = head.loss(hidden, target), head.topk(hidden, 2)
        expected = gradients(loss, head, hidden)
        monkeypatch.setattr(paths, "_bag_derivative", None)
        for size in (1, 7 * 8 * 4, 2**24):  # one step, some and all in a chunk
            monkeypatch.setattr(paths, "CHUNK_BYTES", size)
            again = head.loss(hidden, target)
            assert_close(again, loss)
            assert_close(gradients(again, head, hidden), expected)
            assert_close(head.topk(hidden, 2), found)

    @pytest.mark.usefixtures("shapes")
    def test_ignored_rows_may_hold_nan(self):
        head = randomise(HierarchicalSoftmax(8, 50))
        hidden, target = torch.randn(9, 8), torch.randint(50, (9,))
        target[[0, 4]] = -100
        clean = hidden.clone().requires_grad_()
        expected = head.loss(clean, target)
        hidden[0], hidden[4] = torch.nan, torch.inf
        hidden.requires_grad_()
        loss = head.loss(hidden, target)
        assert_close(loss, expected)
        assert_close(gradients(loss, head, hidden), gradients(expected, head, clean))

    @pytest.mark.parametrize("tree", BINARY)
    def test_biases_start_at_the_unigram_distribution(self, tree):
        counts = counts_of(300)
        head = hierarchical(tree)(8, 300, counts)
        effective = counts.clamp(min=1)
        assert_close(head.log_prob(torch.zeros(8)), (effective / effective.sum()).log())
        assert (hierarchical(tree)(8, 300).bias == 0).all()

    def test_left_is_the_sigmoid(self):
        head = HierarchicalSoftmax(1, 3, tree=[[2, 0], 1])
        with torch.no_grad():
            head.weight.copy_(torch.tensor([[2.0], [-3.0]]))
            head.bias.copy_(torch.tensor([0.5, 0.25]))
        left, below = torch.tensor([2.5, -2.75]).sigmoid()
        expected = torch.stack([left * (1 - below), 1 - left, left * below]).log()
        assert_close(head.log_prob(torch.ones(1)), expected)

    def test_a_deep_tree_is_exact(self):
        tree = 0
        for word in range(1, 300):
            tree = [tree, word]
        head = randomise(HierarchicalSoftmax(4, 300, tree=tree)).double()
        check_against(naive_tree, head, 20)


class TestSparse:
    @pytest.mark.parametrize("tree", BINARY)
    @pytest.mark.parametrize("compiled", [False, True])
    def test_gradients_are_those_of_the_dense_ones(self, tree, compiled):
        head = randomise(hierarchical(tree, sparse=True)(6, 500))
        dense = hierarchical(tree)(6, 500)
        dense.load_state_dict(head.state_dict())
        hidden, target = torch.randn(9, 6, requires_grad=True), torch.randint(500, (9,))
        target[4] = -100
        for reduction in ("mean", "none"):
            expected = torch.autograd.grad(
                dense.loss(hidden, target, reduction=reduction).sum(), [hidden, *dense.parameters()]
            )
            loss = head.loss
            if compiled:
                loss = torch.compile(loss, fullgraph=True, backend="aot_eager")
            of_hidden, *found = torch.autograd.grad(
                loss(hidden, target, reduction=reduction).sum(), [hidden, *head.parameters()]
            )
            assert_close(of_hidden, expected[0])
            passed = (expected[2] != 0).nonzero().flatten()
            for sparse, right in zip(found, expected[1:], strict=True):
                assert sparse.is_sparse
                assert_close(sparse.to_dense(), right)
                if not compiled:
                    assert sparse.is_coalesced()
                    assert sparse.indices()[0].equal(passed)

    def test_of_no_targets_are_empty(self):
        head = HierarchicalSoftmax(6, 50, sparse=True)
        head.loss(torch.randn(3, 6), torch.full((3,), -100)).backward()
        assert head.weight.grad.is_sparse
        assert head.weight.grad._nnz() == 0
        assert head.weight.grad.shape == (49, 6)

    def test_trains_with_adagrad_as_the_dense_one_does(self):
        head = HierarchicalSoftmax(6, 80, sparse=True)
        dense = HierarchicalSoftmax(6, 80)
        dense.load_state_dict(head.state_dict())
        hidden, target = torch.randn(40, 6), torch.randint(80, (40,))
        for each in (head, dense):
            optimizer = torch.optim.Adagrad(each.parameters(), lr=0.1)
            for start in range(0, 40, 8):
                optimizer.zero_grad()
                each.loss(hidden[start : start + 8], target[start : start + 8]).backward()
                with torch.sparse.check_sparse_tensor_invariants():
                    optimizer.step()
        assert_close(head.state_dict(), dense.state_dict())

    def test_is_refused_with_classes(self):
        with pytest.raises(ValueError, match="each class that a token is in has gradients in all"):
            HierarchicalSoftmax(6, 50, tree="classes", sparse=True)


class TestClasses:
    @given(
        vocab_size=st.integers(1, 60),
        num=st.integers(0, 30),
        bias=st.booleans(),
        seed=st.integers(0, 2**20),
        data=st.data(),
    )
    @settings(max_examples=40, deadline=None)
    def test_equals_its_equation(self, vocab_size, num, bias, seed, data):
        torch.manual_seed(seed)
        starts = data.draw(st.sets(st.integers(1, max(vocab_size - 1, 1)), max_size=8))
        cutoffs = sorted(start for start in starts if start < vocab_size)
        head = HierarchicalSoftmax(5, vocab_size, tree="classes", cutoffs=cutoffs, bias=bias)
        assert head.cutoffs == cutoffs
        check_against(naive_classes, randomise(head).double(), num)

    def test_number_of_classes(self):
        counts = torch.full((900,), 5)
        head = HierarchicalSoftmax(4, 900, counts, tree="classes")
        assert head.cutoffs == list(range(30, 900, 30))
        assert head.class_weight.shape == (30, 4)
        head = HierarchicalSoftmax(4, 900, counts, tree="classes", num_classes=3)
        assert head.cutoffs == [300, 600]
        zipf = HierarchicalSoftmax(4, 900, tree="classes", num_classes=3).cutoffs
        given = zipf_counts(900)
        assert HierarchicalSoftmax(4, 900, given, tree="classes", num_classes=3).cutoffs == zipf
        assert zipf[0] < zipf[1] - zipf[0] < 900 - zipf[1]

    def test_biases_start_at_the_unigram_distribution(self):
        counts = counts_of(300)
        head = HierarchicalSoftmax(8, 300, counts, tree="classes")
        effective = counts.clamp(min=1)
        assert_close(head.log_prob(torch.zeros(8)), (effective / effective.sum()).log())

    def test_projections_are_in_all_tails_or_in_none(self):
        plain, projected = (Tail(p, torch.zeros(2, 3), None) for p in (None, torch.zeros(3, 3)))
        matrix = torch.zeros(2, 3)
        for tails in ([plain, projected], [projected, plain]):
            with pytest.raises(AssertionError, match="in all tails or in none"):
                Clusters(matrix, matrix, None, tails).flatten()
        assert len(Clusters(matrix, matrix, None, [projected] * 2).flatten()) == 6

    def test_one_class_is_the_full_softmax(self):
        head = randomise(HierarchicalSoftmax(6, 40, tree="classes", cutoffs=[]))
        full = FullSoftmax(6, 40)
        full.load_state_dict({"weight": head.weight, "bias": head.bias})
        hidden, target = torch.randn(9, 6), torch.randint(40, (9,))
        assert_close(head.loss(hidden, target), full.loss(hidden, target))
        assert_close(head.log_prob(hidden), full.log_prob(hidden))

    def test_tied_weight_is_shared(self):
        embedding, head = nn.Embedding(31, 7), HierarchicalSoftmax(7, 31, tree="classes")
        head.tie_weight(embedding)
        assert head.weight is embedding.weight
        with pytest.raises(ValueError, match=r"\(31, 7\), got \(30, 7\)"):
            head.tie_weight(nn.Embedding(30, 7))
        with pytest.raises(ValueError, match=r"none of a word.*tree=\"classes\""):
            HierarchicalSoftmax(7, 31).tie_weight(embedding)


def peaked(tree, vocab_size=4000, num=12, gain=6.0):
    """A head and rows whose distributions are far from uniform."""
    head = hierarchical(tree)(16, vocab_size)
    with torch.no_grad():
        head.weight.normal_().mul_(gain / 4)
        head.bias.normal_()
    return head, torch.randn(num, 16)


class TestSearch:
    @pytest.mark.parametrize("tree", BINARY)
    @pytest.mark.parametrize("k", [1, 2, 10, 100])
    def test_is_exact(self, tree, k):
        head, hidden = peaked(tree)
        expected = head.double().log_prob(hidden.double())
        order = expected.sort(stable=True, descending=True)
        found = head.topk(hidden.double(), k)
        assert_close(found.log_probs, order.values[:, :k], **EXACT)
        assert found.indices.equal(order.indices[:, :k])

    @given(st.integers(17, 120), st.integers(1, 7), st.integers(0, 10**6), st.floats(0, 4))
    @settings(max_examples=40, deadline=None)
    def test_of_any_tree_is_exact(self, vocab_size, k, seed, gain):
        torch.manual_seed(seed)
        head = HierarchicalSoftmax(3, vocab_size, tree=random_tree(vocab_size, seed)).double()
        with torch.no_grad():
            head.weight.normal_().mul_(gain)
        hidden = torch.randn(5, 3, dtype=torch.float64)
        order = head.log_prob(hidden).sort(stable=True, descending=True)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(tree_search, "MOST", 0.5)  # nothing is given up
            patch.setattr(HierarchicalSoftmax, "log_prob", None)  # calling it would fail
            found = head.topk(hidden, k)
        assert_close(found.log_probs, order.values[:, :k], **EXACT)
        assert found.indices.equal(order.indices[:, :k])

    @pytest.mark.parametrize("tree", BINARY)
    @pytest.mark.parametrize("k", [1, 2, 50, 100])
    def test_alone_is_a_stable_sort(self, tree, k, monkeypatch):
        head = randomise(hierarchical(tree)(13, 101, counts_of(101)))
        hidden = torch.randn(15, 13)
        order = head.log_prob(hidden).sort(stable=True, descending=True)
        monkeypatch.setattr(tree_search, "MOST", 0.5)  # beam and search may open every node
        values, indices, failed, _ = tree_topk(hidden, head.weight, head.bias, head.tree, k)
        assert not failed.any()
        assert_close(values, order.values[:, :k])
        assert indices.equal(order.indices[:, :k])

    @pytest.mark.parametrize("tree", ["huffman", "balanced"])
    @pytest.mark.parametrize("vocab_size", [1, 2, 3])
    def test_of_hardly_any_words(self, tree, vocab_size):
        head = randomise(HierarchicalSoftmax(4, vocab_size, tree=tree))
        hidden = torch.randn(5, 4)
        order = head.log_prob(hidden).sort(stable=True, descending=True)
        for k in range(1, vocab_size + 1):
            found = head.topk(hidden, k)
            assert_close(found.log_probs, order.values[:, :k])
            assert found.indices.equal(order.indices[:, :k])
        assert head.topk(hidden[:0], 1).indices.shape == (0, 1)

    def test_in_chunks_of_rows_is_the_same(self, monkeypatch):
        head, hidden = peaked("huffman")
        hidden[5] = 0  # ranked as a whole
        expected, calls = head.topk(hidden, 3), []

        def searched(rows, *arguments):
            calls.append(len(rows))
            return tree_topk(rows, *arguments)

        monkeypatch.setattr("lm_softmax.heads.base.ROW_CHUNK_BYTES", 5 * 4 * head.vocab_size)
        monkeypatch.setattr("lm_softmax.heads.hierarchical.tree_topk", searched)
        assert_close(head.topk(hidden, 3), expected)
        assert calls == [5, 5, 2]

    @pytest.mark.parametrize("k", [1, 60, 240])
    def test_stops_at_its_limit(self, k):
        head = HierarchicalSoftmax(4, 4000, tree="balanced")  # weights are 0: words are alike
        rows = torch.randn(3, 4)
        _, _, failed, opened = tree_topk(rows, head.weight, head.bias, head.tree, k)
        assert failed.all()
        assert opened.max() <= 3999 // 16

    def test_opens_few_nodes(self):
        for tree in BINARY:
            head, hidden = peaked(tree, gain=20.0)
            _, _, failed, opened = tree_topk(hidden, head.weight, head.bias, head.tree, 5)
            assert not failed.any()
            assert opened.float().mean() < 0.05 * head.vocab_size

    def test_ties_at_the_bound_go_to_the_lower_id(self):
        head = HierarchicalSoftmax(2, 128, tree="balanced")
        with torch.no_grad():
            head.weight.zero_()
            head.bias.zero_()
            head.bias[:3] = 30.0  # words 0 to 31 are left, of equal probability
        rows = torch.zeros(2, 2)
        expected = head.log_prob(rows).sort(stable=True, descending=True).indices
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(tree_search, "MOST", 1)
            _, indices, failed, _ = tree_topk(rows, head.weight, head.bias, head.tree, 6)
        assert not failed.any()
        assert indices.equal(expected[:, :6])

    def test_flat_rows_among_peaked_ones_are_ranked_as_a_whole(self):
        head, hidden = peaked("huffman", gain=20.0)
        head.bias.data.zero_()
        hidden[3] = 0
        _, _, failed, _ = tree_topk(hidden, head.weight, head.bias, head.tree, 5)
        assert failed.nonzero().flatten().tolist() == [3]
        order = head.log_prob(hidden).sort(stable=True, descending=True)
        found = head.topk(hidden, 5)
        assert found.indices.equal(order.indices[:, :5])
        assert_close(found.log_probs, order.values[:, :5])

    def test_of_nan_is_that_of_the_log_probabilities(self):
        head, hidden = peaked("huffman")
        hidden[1] = torch.nan
        found = head.topk(hidden, 3).log_probs
        assert found[1].isnan().all()
        assert found[[0, 2]].isfinite().all()

    @pytest.mark.parametrize("part", ["weight", "bias"])
    def test_of_nan_nodes_is_that_of_the_log_probabilities(self, part):
        head, hidden = peaked("huffman", gain=20.0)
        worst = head.log_prob(hidden).argmin(1)[0]
        node = (head.tree == worst).nonzero()[0, 0]
        getattr(head, part).data[node] = torch.nan
        expected = head.topk(hidden[:1], 3)  # far from the best words: not opened
        assert expected.log_probs.isfinite().all()
        getattr(head, part).data[1] = torch.nan  # below the root
        found = head.topk(hidden, 3).log_probs
        assert found.isnan().all()
        order = head.log_prob(hidden).sort(stable=True, descending=True)
        assert_close(found, order.values[:, :3], equal_nan=True)

    def test_nan_beside_the_beam_is_met(self, monkeypatch):
        head = HierarchicalSoftmax(2, 128, tree="balanced")
        head.bias.data[0] = 0.2  # the beam goes left, but the right side may hold better words
        head.bias.data[2] = torch.nan
        monkeypatch.setattr(tree_search, "MOST", 0.5)
        _, _, failed, _ = tree_topk(torch.zeros(3, 2), head.weight, head.bias, head.tree, 1)
        assert failed.all()
        assert head.topk(torch.zeros(3, 2), 1).log_probs.isnan().all()


class TestPinning:
    def test_structure_rebuilds_the_tree(self):
        head = randomise(HierarchicalSoftmax(6, 90, counts_of(90)))
        rebuilt = HierarchicalSoftmax(6, 90, **head.structure())
        rebuilt.load_state_dict(head.state_dict())
        hidden = torch.randn(4, 6)
        assert rebuilt.tree.equal(head.tree)
        assert_close(rebuilt.log_prob(hidden), head.log_prob(hidden), rtol=0, atol=0)
        classes = HierarchicalSoftmax(6, 90, counts_of(90), tree="classes")
        assert classes.structure() == {"tree": "classes", "cutoffs": classes.cutoffs}

    @pytest.mark.parametrize("assign", [False, True])
    def test_loaded_weights_bring_their_tree(self, assign):
        head = randomise(HierarchicalSoftmax(6, 90, tree=random_tree(90)))
        other = HierarchicalSoftmax(6, 90, counts_of(90))
        other.load_state_dict(head.state_dict(), assign=assign)
        hidden, target = torch.randn(40, 6), torch.randint(90, (40,))
        assert_close(other.log_prob(hidden), head.log_prob(hidden), rtol=0, atol=0)
        assert_close(other.loss(hidden, target), head.loss(hidden, target), rtol=0, atol=0)
        assert other.topk(hidden, 3).indices.equal(head.topk(hidden, 3).indices)

    def test_loaded_weights_bring_their_classes(self):
        head = randomise(HierarchicalSoftmax(6, 90, tree="classes", cutoffs=[5, 50]))
        other = HierarchicalSoftmax(6, 90, tree="classes", cutoffs=[30, 60])
        other.load_state_dict(head.state_dict())
        hidden = torch.randn(4, 6)
        assert other.structure()["cutoffs"] == [5, 50]
        assert_close(other.log_prob(hidden), head.log_prob(hidden), rtol=0, atol=0)

    def test_a_head_built_on_meta_takes_its_tree_from_the_weights(self):
        head = randomise(HierarchicalSoftmax(6, 90, counts_of(90)))
        with torch.device("meta"):
            empty = HierarchicalSoftmax(6, 90)
        empty.to_empty(device="cpu").load_state_dict(head.state_dict())
        hidden, target = torch.randn(4, 6), torch.randint(90, (4,))
        assert_close(empty.loss(hidden, target), head.loss(hidden, target), rtol=0, atol=0)

    def test_weights_on_meta_are_taken_as_they_are(self):
        for options in ({}, {"tree": "classes"}):
            with torch.device("meta"):
                head = HierarchicalSoftmax(6, 90, **options)
                other = HierarchicalSoftmax(6, 90, **options)
            other.load_state_dict(head.state_dict(), assign=True)
            assert all(each.is_meta for each in (*other.parameters(), *other.buffers()))
            target = torch.empty(4, dtype=torch.int64, device="meta")
            assert other.loss(torch.empty(4, 6, device="meta"), target).is_meta

    def test_loaded_ids_that_are_none_are_refused(self):
        state = HierarchicalSoftmax(6, 90).state_dict()
        for children, message in (
            (torch.full((89, 2), 500), r"in \[0, 179\).*got 500"),
            (random_tree(90), "must be numbered level by level"),
        ):
            with pytest.raises(ValueError, match=message):
                HierarchicalSoftmax(6, 90).load_state_dict({**state, "tree": children})
        head = HierarchicalSoftmax(6, 90, tree="classes", cutoffs=[30])
        with pytest.raises(ValueError, match=r"\(0, 90\), got \[95\]"):
            head.load_state_dict({**head.state_dict(), "class_starts": torch.tensor([0, 95])})

    def test_ids_stay_whole_in_low_precision(self):
        head = HierarchicalSoftmax(6, 900).bfloat16()
        types = {name: buffer.dtype for name, buffer in head.named_buffers()}
        derived = dict.fromkeys(("up", "depth", "order", "slots", "num_leaves"), torch.int32)
        assert types == {"tree": torch.int64, **derived}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tree": "best"}, "or a binary tree, got 'best'"),
        ({"tree": [[0, 1], 2]}, "each of the 100 words once, but word 3 is there 0 times"),
        ({"tree": torch.zeros(5, 2).long()}, r"\(99, 2\) of int64, got \(5, 2\)"),
        ({"num_classes": 5}, 'num_classes and cutoffs are for tree="classes", got 5 and auto'),
        ({"cutoffs": [5]}, r"got None and \[5\]"),
        ({"tree": "classes", "num_classes": 0}, r"\[1, vocab_size=100\], got 0"),
        ({"tree": "classes", "num_classes": 101}, "got 101"),
        ({"tree": "classes", "num_classes": 2.5}, "got 2.5"),
        ({"tree": "classes", "cutoffs": [20, 20]}, r"got \[20, 20\]"),
        ({"tree": "classes", "cutoffs": [0]}, r"\(0, 100\), got \[0\]"),
        ({"tree": "classes", "cutoffs": [10], "num_classes": 1}, "2 classes.*num_classes=1"),
        ({"label_smoothing": 0.1}, "must be 0, got 0.1"),
    ],
    ids=str,
)
def test_impossible_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        HierarchicalSoftmax(8, 100, **options)


def test_trees_too_deep_to_write_down_end_in_one_line():
    tree = 0
    for word in range(1, 3000):
        tree = [tree, word]
    with pytest.raises(RecursionError) as caught:
        factory.describe(partial(HierarchicalSoftmax, tree=tree), "head")
    assert user_error(caught.value).endswith(
        "nested too deep to be read: give deep trees as a tensor"
    )
    assert user_error(RecursionError("of another kind")) is None
