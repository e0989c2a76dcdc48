"""Trees: optimal code lengths against a heap, shapes, and every way a tree can be wrong."""

import heapq
import math

import pytest
import torch
from cases import counts_of, random_tree
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from lm_softmax.heads import tree
from lm_softmax.heads.tree import (
    balanced_tree,
    given_tree,
    huffman_tree,
    node_log_odds,
    shape_of,
)
from lm_softmax.heads.word_classes import class_starts

ranked_counts = st.lists(st.integers(1, 40), min_size=1, max_size=60).map(
    lambda counts: sorted(counts, reverse=True)
)


def depths(children):
    """Depth of each word, by walking down."""
    vocab_size, found = len(children) + 1, {}
    waiting = [(vocab_size, 0)] if len(children) else [(0, 0)]
    while waiting:
        entry, depth = waiting.pop()
        assert depth < vocab_size, "a cycle"
        if entry < vocab_size:
            assert entry not in found
            found[entry] = depth
        else:
            waiting += [(int(child), depth + 1) for child in children[entry - vocab_size]]
    return [found[word] for word in range(vocab_size)]


def heap_cost(counts):
    """Total code length by Huffman's algorithm as in the books, with a heap."""
    heap, cost = list(counts), 0
    heapq.heapify(heap)
    while len(heap) > 1:
        merged = heapq.heappop(heap) + heapq.heappop(heap)
        cost += merged
        heapq.heappush(heap, merged)
    return cost


def heap_depths(counts):
    """Code lengths, ties by lower depth: the least maximal depth among the optimal trees."""
    heap = [(count, 0, number) for number, count in enumerate(counts)]
    below = {number: [number] for number in range(len(counts))}
    lengths = [0] * len(counts)
    heapq.heapify(heap)
    while len(heap) > 1:
        (one, deep, left), (two, deeper, right) = heapq.heappop(heap), heapq.heappop(heap)
        below[len(below)] = below[left] + below[right]
        for word in below[len(below) - 1]:
            lengths[word] += 1
        heapq.heappush(heap, (one + two, max(deep, deeper) + 1, len(below) - 1))
    return lengths


class TestHuffman:
    @given(ranked_counts)
    @settings(max_examples=60, deadline=None)
    def test_is_optimal_and_as_flat_as_it_can_be(self, counts):
        found = depths(huffman_tree(torch.tensor(counts)))
        assert sum(map(int.__mul__, found, counts)) == heap_cost(counts)
        assert max(found) == max(heap_depths(counts))

    def test_of_a_vocabulary_is_optimal(self):
        counts = counts_of(5000).clamp(min=1)
        depth = shape_of(huffman_tree(counts)).depth
        assert (depth * counts).sum() == heap_cost(counts.tolist())
        share = counts / counts.sum()
        entropy = -(share * share.log2()).sum()
        assert entropy <= (share * depth).sum() <= entropy + 1

    def test_of_powers_of_two_is_known(self):
        counts = torch.tensor([8, 4, 2, 1, 1])
        assert depths(huffman_tree(counts)) == [1, 2, 3, 4, 4]
        assert huffman_tree(counts).tolist() == [[6, 0], [7, 1], [8, 2], [3, 4]]

    def test_of_ties_is_flat(self):
        assert depths(huffman_tree(torch.tensor([2, 2, 1, 1]))) == [2, 2, 2, 2]

    def test_of_fibonacci_numbers_is_a_chain(self):
        counts = [1, 1]
        while len(counts) < 85:
            counts.append(counts[-1] + counts[-2])
        found = depths(huffman_tree(torch.tensor(counts[::-1])))
        assert found == [*range(1, 85), 84]

    def test_takes_fractions(self):
        counts = torch.tensor([5.5, 2.25, 1.5, 1.0], dtype=torch.float64)
        assert depths(huffman_tree(counts)) == [1, 2, 3, 3]


@pytest.mark.parametrize("vocab_size", [1, 2, 3, 5, 8, 1000])
def test_balanced_depths_differ_by_one(vocab_size):
    children = balanced_tree(vocab_size)
    found = depths(children)
    assert {*found} <= {math.floor(math.log2(vocab_size)), math.ceil(math.log2(vocab_size))}
    below = [entry for entry in children.flatten().tolist() if entry < vocab_size]
    assert len(below) == vocab_size - (vocab_size == 1)
    assert given_tree(children, vocab_size).equal(children)


def test_balanced_halves_the_ranks():
    assert balanced_tree(5).tolist() == [[6, 7], [8, 2], [3, 4], [0, 1]]


class TestShape:
    @given(st.integers(1, 60), st.integers(0, 1000))
    @settings(max_examples=50, deadline=None)
    def test_leads_from_each_word_to_the_root(self, vocab_size, seed):
        children = given_tree(random_tree(vocab_size, seed), vocab_size)
        shape = shape_of(children)
        assert shape.depth.tolist() == depths(children)
        assert sum(shape.level_sizes) == vocab_size - 1
        assert sorted(shape.order.tolist()) == list(range(vocab_size))
        for word in range(vocab_size):
            at = word
            for _ in range(shape.depth[word]):
                node, side = divmod(int(shape.up[at]), 2)
                assert children[node, side] == at
                at = vocab_size + node
            assert vocab_size == 1 or at == vocab_size

    @given(st.integers(2, 60), st.integers(0, 1000))
    @settings(max_examples=50, deadline=None)
    def test_numbers_nodes_by_level_and_keeps_them(self, vocab_size, seed):
        given = random_tree(vocab_size, seed)
        children = given_tree(given, vocab_size)
        assert depths(children) == _depths_from(given, vocab_size + len(given) - 1)
        inner = children[children >= vocab_size] - vocab_size
        assert inner.tolist() == list(range(1, vocab_size - 1))
        assert given_tree(children, vocab_size).equal(children)
        assert given_tree(children.int(), vocab_size).equal(children)

    def test_of_nested_pairs(self):
        assert given_tree([[0, 1], [2, 3]], 4).tolist() == [[5, 6], [0, 1], [2, 3]]
        assert given_tree(((2, 0), 1), 3).tolist() == [[4, 1], [2, 0]]
        assert given_tree(0, 1).shape == (0, 2)
        deep = 0
        for word in range(1, 3000):  # past Python's limit of recursion
            deep = [word, deep]
        assert shape_of(given_tree(deep, 3000)).depth.tolist() == [2999, *range(2999, 0, -1)]


def _depths_from(children, root):
    """As `depths`, the root being another inner node."""
    vocab_size, found, waiting = len(children) + 1, {}, [(root, 0)]
    while waiting:
        entry, depth = waiting.pop()
        assert depth < vocab_size, "a cycle"
        if entry < vocab_size:
            found[entry] = depth
        else:
            waiting += [(int(child), depth + 1) for child in children[entry - vocab_size]]
    return [found[word] for word in range(vocab_size)]


def test_node_log_odds_are_those_of_the_masses():
    counts = torch.tensor([9, 4, 2, 1, 1])
    expected = torch.tensor([9 / 8, 4 / 4, 2 / 2, 1 / 1]).double().log()
    assert_close(node_log_odds(huffman_tree(counts), counts), expected)
    expected = torch.tensor([13 / 4, 9 / 4, 2 / 2, 1 / 1]).double().log()
    assert_close(node_log_odds(given_tree([[0, 1], [2, [3, 4]]], 5), counts), expected)


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ([[0, 1], [2, 2]], "each of the 4 words once, but word 2 is there 2 times"),
        ([[0, 1], 2], "word 3 is there 0 times"),
        ([[0, 1], [2, [3, 0]]], "over 4 words has 3 pairs, but this one has more"),
        ([[0, 1], [2, 4]], r"words must be in \[0, 4\), got 4"),
        ([[0, 1], [2, -1]], "got -1"),
        ([[0, 1], [2, 3, 1]], "got 3 children"),
        ([[0, 1], [[2], 3]], "got 1 children"),
        ([[0, 1], [2, "3"]], "got '3'"),
        ([[0, 1], [2, True]], "got True"),
        ([[0, 1], [2, None]], "got None"),
        (3, "word 0 is there 0 times"),
        (torch.tensor([[5, 6], [0, 1]]), r"\(3, 2\) of int64, got \(2, 2\)"),
        (torch.tensor([[5, 6], [0, 1], [2, 3]]).float(), "torch.float32"),
        (torch.tensor([[5, 7], [0, 1], [2, 3]]), r"in \[0, 7\).*got 7"),
        (torch.tensor([[5, 6], [0, 1], [2, -3]]), "got -3"),
        (torch.tensor([[5, 6], [0, 1], [2, 2]]), r"word 2 is there 2 times \(2 words"),
        (torch.tensor([[5, 5], [0, 1], [2, 3]]), "inner node 1 has 2 parents"),
        (torch.tensor([[0, 1], [2, 6], [3, 5]]), "root, inner node 0, leads to 1 of 3.*node"),
        (torch.tensor([[4, 1], [2, 0], [3, 5]]), "leads to 2 of 3 inner nodes: 0 is its own"),
    ],
    ids=str,
)
def test_trees_that_are_none_are_refused(tree, message):
    with pytest.raises(ValueError, match=message):
        given_tree(tree, 4)


def test_pairs_that_hold_each_other_are_refused():
    shared = [0, 1]
    for _ in range(40):
        shared = [shared, shared]
    cyclic = [0]
    cyclic.append(cyclic)
    for pairs in (shared, cyclic):
        with pytest.raises(ValueError, match="over 6 words has 5 pairs, but this one has more"):
            given_tree(pairs, 6)


@pytest.mark.parametrize(("most", "dtype"), [(60, torch.int32), (59, torch.int64)])
def test_shapes_are_int32_where_it_fits(most, dtype, monkeypatch):
    children = balanced_tree(60)
    expected = shape_of(children)
    monkeypatch.setattr(tree, "MOST_INT32", most)
    *tensors, sizes = shape_of(children)
    assert {each.dtype for each in tensors} == {dtype}
    for found, right in zip(tensors, expected, strict=False):
        assert found.equal(right.to(dtype))
    assert sizes == expected.level_sizes


class TestClassStarts:
    def test_shares_of_root_counts_are_equal(self):
        counts = torch.full((100,), 7)
        assert class_starts(100, counts, 4) == [25, 50, 75]
        counts = torch.tensor([100, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1])
        assert class_starts(11, counts, 2) == [1]
        assert class_starts(11, counts, 4) == [1, 6]

    @given(ranked_counts, st.integers(1, 60))
    @settings(max_examples=50, deadline=None)
    def test_are_always_valid(self, counts, num_classes):
        starts = class_starts(len(counts), torch.tensor(counts), min(num_classes, len(counts)))
        borders = [0, *starts, len(counts)]
        assert borders == sorted(set(borders))
        assert len(starts) < max(num_classes, 1)
        if len(set(counts)) == 1:
            assert len(starts) == min(num_classes, len(counts)) - 1
