"""Binary trees whose leaves are words, as tensors: built from counts, read from the user, checked.

A tree over V words has V - 1 inner nodes, numbered level by level from the root, 0, and left to
right. It is a tensor `(V - 1, 2)`: row i holds the two children of inner node i; an entry below V
is a word, an entry V + j is inner node j.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

MOST_INT32 = 2**30  # words up to which 2 * parent + side fits int32


class TreeShape(NamedTuple):
    """What is derived from the children: int32 where it fits, else int64."""

    up: Tensor  # (2V - 1,): 2 * parent + side of each word and inner node; -1 for the root
    depth: Tensor  # (V,): inner nodes on the way to each word
    order: Tensor  # (V,): place of each word among the words, level by level and left to right
    num_leaves: Tensor  # (V - 1,): words below each inner node
    slots: Tensor  # (2V - 2,): of each level's children the places of the words, then of the nodes
    level_sizes: list[int]  # inner nodes of each level


def huffman_tree(counts: Tensor) -> Tensor:
    """The tree of least expected depth (Huffman 1952), left child the heavier one.

    Counts are ranked, so two queues that are both sorted, of words and of merged nodes, take the
    place of a heap: O(V). Of equal weights words are merged first, which gives the tree of least
    maximal depth among the optimal ones.

    Args:
        counts: `(V,)`, falling, at least 1.
    """
    vocab_size = counts.shape[0]
    leaves = counts.flip(0).tolist()
    num_nodes = vocab_size - 1
    merged: list[Any] = [0] * num_nodes
    light, heavy = [0] * num_nodes, [0] * num_nodes
    leaf = inner = 0  # heads of the two queues
    for node in range(num_nodes):
        pair = []
        weight = 0
        for _ in range(2):
            if leaf < vocab_size and (inner >= node or leaves[leaf] <= merged[inner]):
                pair.append(vocab_size - 1 - leaf)
                weight += leaves[leaf]
                leaf += 1
            else:
                pair.append(vocab_size + inner)
                weight += merged[inner]
                inner += 1
        light[node], heavy[node] = pair
        merged[node] = weight
    children = torch.tensor([heavy, light], dtype=torch.int64, device="cpu").t()
    return by_level(children, vocab_size, root=num_nodes - 1)


def balanced_tree(vocab_size: int) -> Tensor:
    """The tree that halves `[0, V)` until one word is left; depths differ by at most 1."""
    borders = torch.tensor([[0, vocab_size]], device="cpu")
    levels, count = [], 0
    while vocab_size > 1 and borders.numel():
        middle = (borders.sum(1) + 1) // 2
        halves = torch.stack([borders[:, 0], middle, middle, borders[:, 1]], 1).view(-1, 2)
        inner = halves[:, 1] - halves[:, 0] > 1
        count += borders.shape[0]
        node = vocab_size + count - 1 + inner.cumsum(0)
        levels.append(torch.where(inner, node, halves[:, 0]).view(-1, 2))
        borders = halves[inner]
    return torch.cat([torch.empty(0, 2, dtype=torch.int64, device="cpu"), *levels])


def given_tree(tree: Tensor | Sequence[Any] | int, vocab_size: int) -> Tensor:
    """A tree of the user's, checked and numbered level by level.

    Args:
        tree: `(V - 1, 2)` as above, inner nodes numbered in any order; or nested pairs of word ids
            such as `[[0, 1], [2, 3]]`.
        vocab_size: Number of words, V.

    Raises:
        ValueError: If a node has other than two children, a word is not covered exactly once, or
            an inner node is its own ancestor or out of reach.
    """
    children = tree if isinstance(tree, Tensor) else _children_of_pairs(tree, vocab_size)
    children = children.detach().to("cpu")
    if children.shape != (vocab_size - 1, 2) or children.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"a tree over {vocab_size} words has {vocab_size - 1} inner nodes of two children:"
            f" it must be ({vocab_size - 1}, 2) of int64, got {tuple(children.shape)} of"
            f" {children.dtype}"
        )
    children = children.long()
    wrong = children[(children < 0) | (children >= 2 * vocab_size - 1)]
    if wrong.numel():
        raise ValueError(
            f"a tree's entries must be in [0, {2 * vocab_size - 1}): words below {vocab_size},"
            f" inner nodes from there; got {int(wrong[0])}"
        )
    if vocab_size == 1:
        return children
    times = children.flatten().bincount(minlength=2 * vocab_size - 1)
    _check_words(times[:vocab_size])
    twice = (times[vocab_size:] > 1).nonzero()
    if twice.numel():
        node = int(twice[0])
        raise ValueError(f"inner node {node} has {int(times[vocab_size + node])} parents, not one")
    root = int((times[vocab_size:] == 0).nonzero()[0])  # V - 2 entries: exactly one is left
    return by_level(children, vocab_size, root)


def _check_words(times: Tensor) -> None:
    wrong = (times != 1).nonzero()
    if wrong.numel():
        word = int(wrong[0])
        raise ValueError(
            f"a tree must hold each of the {times.shape[0]} words once, but word {word} is there"
            f" {int(times[word])} times ({wrong.numel()} words are not there once)"
        )


def _children_of_pairs(tree: Sequence[Any] | int, vocab_size: int) -> Tensor:
    """Nested pairs as a tensor, without recursion: a tree may be deep."""
    rows: list[list[int]] = []
    waiting: list[tuple[Any, list[int] | None, int]] = [(tree, None, 0)]
    words: list[int] = []
    for pair, row, side in waiting:  # grows while it is read: level by level
        if isinstance(pair, int) and not isinstance(pair, bool):
            if not 0 <= pair < vocab_size:
                raise ValueError(f"a tree's words must be in [0, {vocab_size}), got {pair}")
            words.append(pair)
            value = pair
        elif isinstance(pair, Sequence) and not isinstance(pair, str) and len(pair) == 2:
            if len(rows) == vocab_size - 1:  # one more: a pair may hold itself, without end
                raise ValueError(
                    f"a tree over {vocab_size} words has {vocab_size - 1} pairs, but this one has"
                    " more, or a pair is in it twice"
                )
            value = vocab_size + len(rows)
            rows.append([0, 0])
            waiting += [(pair[0], rows[-1], 0), (pair[1], rows[-1], 1)]
        else:
            size = f"{len(pair)} children" if isinstance(pair, (list, tuple)) else repr(pair)
            raise ValueError(f"a node of a tree must be a word's id or a pair of nodes, got {size}")
        if row is not None:
            row[side] = value
    _check_words(torch.tensor(words, device="cpu").bincount(minlength=vocab_size))
    return torch.tensor(rows, dtype=torch.int64, device="cpu").view(-1, 2)


def check_saved(children: Tensor, vocab_size: int) -> None:
    """ValueError if a loaded tree is not one, or its inner nodes are in another order."""
    children = children.cpu()
    if not given_tree(children, vocab_size).equal(children):
        raise ValueError("the inner nodes of a loaded tree must be numbered level by level")


def by_level(children: Tensor, vocab_size: int, root: int) -> Tensor:
    """The same tree with its inner nodes numbered level by level, left to right.

    Raises:
        ValueError: If the root does not lead to every inner node.
    """
    if vocab_size == 1:
        return children
    levels = []
    frontier = torch.tensor([root], device="cpu")
    while frontier.numel():
        levels.append(frontier)
        below = children[frontier].flatten()
        frontier = below[below >= vocab_size] - vocab_size
    order = torch.cat(levels)
    if order.numel() != vocab_size - 1:
        missing = torch.ones(vocab_size - 1, dtype=torch.bool, device="cpu")
        missing[order] = False
        raise ValueError(
            f"the root, inner node {root}, leads to {order.numel()} of {vocab_size - 1} inner"
            f" nodes: {int(missing.nonzero()[0])} is its own ancestor or below one that is"
        )
    place = torch.empty_like(order)
    place[order] = torch.arange(order.numel(), device="cpu")
    ordered = children[order]
    inner = ordered >= vocab_size
    ordered[inner] = vocab_size + place[ordered[inner] - vocab_size]
    return ordered


def shape_of(children: Tensor) -> TreeShape:
    """Parents, depths and levels of a tree numbered level by level; on the CPU."""
    children = children.to("cpu")
    num_nodes = children.shape[0]
    vocab_size = num_nodes + 1
    up = torch.full((2 * vocab_size - 1,), -1, device="cpu")
    up[children.flatten()] = torch.arange(2 * num_nodes, device="cpu")
    depth = torch.zeros(vocab_size, dtype=torch.int64, device="cpu")
    words = [torch.zeros(int(num_nodes == 0), dtype=torch.int64, device="cpu")]
    slots = [torch.zeros(0, dtype=torch.int64, device="cpu")]
    level_sizes: list[int] = []
    start, size = 0, min(num_nodes, 1)
    while size:
        level_sizes.append(size)
        below = children[start : start + size].flatten()
        start, words_here = start + size, below[below < vocab_size]
        depth[words_here] = len(level_sizes)
        words.append(words_here)
        slots.append((below >= vocab_size).sort(stable=True).indices)
        size = below.numel() - words_here.numel()
    order = torch.empty(vocab_size, dtype=torch.int64, device="cpu")
    order[torch.cat(words)] = torch.arange(vocab_size, device="cpu")
    whole = torch.int32 if vocab_size <= MOST_INT32 else torch.int64
    slot = torch.cat(slots).to(whole)
    leaves = sums_below(children, torch.ones(vocab_size, dtype=whole, device="cpu"), level_sizes)
    return TreeShape(up.to(whole), depth.to(whole), order.to(whole), leaves, slot, level_sizes)


def node_log_odds(children: Tensor, counts: Tensor) -> Tensor:
    """Log of left over right mass of each inner node, `(V - 1,)` float64.

    As biases they give the unigram distribution where `hidden` is 0.
    """
    of_words = counts.to("cpu", torch.float64)
    inner = sums_below(children, of_words, shape_of(children).level_sizes)
    mass = torch.cat([of_words, inner])
    left, right = mass[children].log().unbind(1)
    return left - right


def sums_below(children: Tensor, of_words: Tensor, level_sizes: list[int]) -> Tensor:
    """Sum over the words below each inner node of what each word has, `(V - 1,)`."""
    num_nodes = children.shape[0]
    sums = torch.cat([of_words, of_words.new_zeros(num_nodes)])
    stop = num_nodes
    for size in reversed(level_sizes):
        start = stop - size
        sums[num_nodes + 1 + start : num_nodes + 1 + stop] = sums[children[start:stop]].sum(1)
        stop = start
    return sums[num_nodes + 1 :]
