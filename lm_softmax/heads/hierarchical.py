"""Hierarchical softmax: a word is reached by decisions, down a binary tree or class first."""

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from lm_softmax.heads import tree as trees
from lm_softmax.heads.base import Search, TopK
from lm_softmax.heads.clustered import dense_log_probs, tied_weight
from lm_softmax.heads.cutoffs import resolve_cutoffs, zipf_counts
from lm_softmax.heads.exact import ExactHead
from lm_softmax.heads.word_classes import WordClasses, initial_biases, resolve_classes
from lm_softmax.kernels import (
    Draws,
    Objective,
    accumulation_dtype,
    autocast_off,
    cluster_loss,
    cluster_nll,
    draw_from_clusters,
    product_dtype,
)
from lm_softmax.kernels.class_search import Classes, class_topk
from lm_softmax.kernels.path_operations import path_nll
from lm_softmax.kernels.paths import Tree
from lm_softmax.kernels.ranking import LARGEST_K
from lm_softmax.kernels.tree_draws import TreeNodes, draw_from_tree
from lm_softmax.kernels.tree_search import tree_topk

WALK_COST = 16  # of a node on the way of one draw, beside that of one in a product with all


class HierarchicalSoftmax(ExactHead):
    """Exact softmax factored along a tree: a token touches its path, not the vocabulary.

    On a binary tree each of the V - 1 inner nodes has a row and a bias, and
    `log p(w) = sum(F.logsigmoid(sign * (weight[node] @ hidden + bias[node])))` over the inner
    nodes from the root to w, sign 1 to the left, -1 to the right: normalised without a sum over
    words. With `tree="classes"` there are two levels, `p(w) = p(class) * p(w | class)`, both a
    softmax over `hidden`; a class is a range of ids, so it holds words of like frequency.

    Source: Morin and Bengio 2005, "Hierarchical probabilistic neural network language model",
    section 3; Huffman codes over counts: Mikolov et al. 2013, "Distributed representations of
    words and phrases", section 2.1; classes: Goodman 2001, "Classes for fast maximum entropy
    training", and by frequency Mikolov et al. 2011, "Extensions of recurrent neural network
    language model", section 4. A tree by frequency costs perplexity against the full softmax: words
    that share a path have little in common.

    Args:
        hidden_size: Width of `hidden`.
        vocab_size: Number of words, V.
        counts: Training-set frequencies: they decide the Huffman tree and the classes, and the
            biases start at the log-odds or log-probabilities they give.
        tree: "huffman" has the least expected path length, "balanced" halves the ranked ids,
            "classes" has two levels. Or a binary tree of your own: nested pairs of words such as
            `[[0, 1], [2, 3]]`, or a tensor `(V - 1, 2)` of children, where an entry below V is a
            word and V + i is inner node i; deep trees as a tensor, since configuration files
            cannot nest as far. Inner nodes are renumbered level by level from the root.
        num_classes: How many classes at most, with `tree="classes"`; None is about `sqrt(V)`.
        cutoffs: Ids at which classes but the first begin, strictly increasing in
            `(0, vocab_size)`. "auto" gives each an equal share of the sum of `sqrt(count)`.
        bias: Whether each node, or word and class, has a bias.
        sparse: Whether gradients of the parameters are sparse tensors over the nodes that the batch
            passes, on a binary tree. Where shapes may not depend on the data, on an accelerator and
            in compiled code, these have a row for each token and level of the tree: too many for
            a deep one.
        label_smoothing: Must be 0: over all words it would need every node for every token.
        ignore_index: Target of positions that count for nothing.

    Raises:
        ValueError: If a tree does not cover each word once, or an option is impossible.
    """

    tree: Tensor
    up: Tensor
    depth: Tensor
    order: Tensor
    num_leaves: Tensor
    slots: Tensor
    class_starts: Tensor

    def __init__(
        self,
        hidden_size: int,
        vocab_size: int,
        counts: Tensor | None = None,
        *,
        tree: str | Sequence[Any] | Tensor = "huffman",
        num_classes: int | None = None,
        cutoffs: Literal["auto"] | Sequence[int] = "auto",
        bias: bool = True,
        sparse: bool = False,
        label_smoothing: float = 0.0,
        ignore_index: int = -100,
    ) -> None:
        if label_smoothing:
            raise ValueError(
                f"HierarchicalSoftmax cannot smooth over all words without passing every node:"
                f" label_smoothing must be 0, got {label_smoothing}"
            )
        super().__init__(
            hidden_size, vocab_size, counts, objective=Objective(), ignore_index=ignore_index
        )
        self.has_classes = isinstance(tree, str) and tree == "classes"
        self.sparse = sparse
        self.class_weight: nn.Parameter | None = None
        self.class_bias: nn.Parameter | None = None
        self.level_sizes: list[int] = []
        self.register_load_state_dict_post_hook(_derive_again)  # type: ignore[no-untyped-call]
        self.cutoffs: list[int] = []
        if self.has_classes:
            if sparse:
                raise ValueError(
                    'sparse=True is for binary trees: with tree="classes" each class that a token'
                    " is in has gradients in all its rows"
                )
            self._make_classes(counts, num_classes, cutoffs, bias)
            return
        if num_classes is not None or cutoffs != "auto":
            raise ValueError(
                f'num_classes and cutoffs are for tree="classes", got {num_classes} and {cutoffs}'
            )
        children = _resolve_tree(tree, vocab_size, counts)
        device = torch.empty(0).device
        self.register_buffer("tree", children.to(device))
        self._derive(children)
        # From 0, as word2vec does: noise in each of a path's decisions only has to be unlearned.
        self.weight = nn.Parameter(torch.zeros(vocab_size - 1, hidden_size))
        self.bias = nn.Parameter(torch.zeros(vocab_size - 1)) if bias else None
        if self.bias is not None and counts is not None:
            self.bias.data.copy_(trees.node_log_odds(children, counts.clamp(min=1)))

    def _make_classes(
        self,
        counts: Tensor | None,
        num_classes: int | None,
        cutoffs: Literal["auto"] | Sequence[int],
        bias: bool,
    ) -> None:
        self.cutoffs = resolve_classes(self.vocab_size, counts, num_classes, cutoffs)
        size = len(self.cutoffs) + 1
        self.register_buffer("class_starts", torch.tensor([0, *self.cutoffs]))
        self.weight = nn.Parameter(torch.empty(self.vocab_size, self.hidden_size))
        self.class_weight = nn.Parameter(torch.empty(size, self.hidden_size))
        for matrix in (self.weight.data, self.class_weight.data):
            nn.init.uniform_(matrix, -(self.hidden_size**-0.5), self.hidden_size**-0.5)
        self.bias = nn.Parameter(torch.zeros(self.vocab_size)) if bias else None
        self.class_bias = nn.Parameter(torch.zeros(size)) if bias else None
        if self.bias is not None and self.class_bias is not None and counts is not None:
            of_words, of_classes = initial_biases(counts, self.cutoffs)
            self.bias.data.copy_(of_words)
            self.class_bias.data.copy_(of_classes)

    def _derive(self, children: Tensor) -> None:
        """What follows from the tree, for a new head and a loaded one."""
        shape = trees.shape_of(children)
        self.level_sizes = shape.level_sizes
        for name in ("up", "depth", "order", "num_leaves", "slots"):
            derived = getattr(shape, name).to(self.tree.device)
            self.register_buffer(name, derived, persistent=False)

    def _classes(self) -> WordClasses:
        assert self.class_weight is not None
        return WordClasses(self.weight, self.bias, self.class_weight, self.class_bias, self.cutoffs)

    def _token_losses(self, rows: Tensor, target: Tensor, objective: Objective) -> Tensor:
        if self.has_classes:
            clusters = self._classes().clusters()
            return cluster_nll(rows, target, clusters, objective, self.ignore_index)
        tree = Tree(self.up, self.depth, len(self.level_sizes))
        nodes = self.weight, self.bias
        return path_nll(rows, target, *nodes, tree, self.ignore_index, sparse=self.sparse)

    def _summed_loss(self, rows: Tensor, target: Tensor, objective: Objective) -> Tensor:
        if self.has_classes:
            clusters = self._classes().clusters()
            return cluster_loss(rows, target, clusters, objective, self.ignore_index)
        return self._token_losses(rows, target, objective).sum()

    def _all_log_probs(self, rows: Tensor) -> Tensor:
        return self._classes().log_probs(rows) if self.has_classes else self._leaves(rows)

    def _leaves(self, rows: Tensor) -> Tensor:
        """Log-probabilities of all words, level by level from the root.

        Nodes are rows, for rows are cheap to pick. Products are those of `path_nll`, in at least
        float32: a decision near the root is rounded for all words below it.
        """
        dtype = accumulation_dtype(torch.promote_types(rows.dtype, self.weight.dtype))
        with autocast_off(rows):
            logits = self.weight.to(dtype) @ rows.to(dtype).t()
            if self.bias is not None:
                logits = logits + self.bias.to(dtype).unsqueeze(1)
            above, words = logits[:0].sum(0, keepdim=True), []  # of the root, 0
            start = 0
            for size, below in pairwise([*self.level_sizes, 0]):
                level = logits[start : start + size]
                sides = (above + F.logsigmoid(level), above + F.logsigmoid(-level))
                both = torch.stack(sides, 1).flatten(0, 1)
                slots = self.slots[2 * start : 2 * (start + size)]
                words.append(both.index_select(0, slots[: 2 * size - below]))
                above = both.index_select(0, slots[2 * size - below :])
                start += size
            del logits
            found = torch.cat(words).index_select(0, self.order) if words else above
            return found.t().contiguous()

    def topk(self, hidden: Float[Tensor, "*batch hidden"], k: int) -> TopK:
        """See `OutputHead.topk`; the tree is searched, most probable branches first."""
        return type(self).search(self, hidden, k).top  # for the reason of `_best`

    @torch.no_grad()
    def search(self, hidden: Float[Tensor, "*batch hidden"], k: int) -> Search:
        """`topk(hidden, k)`, and how many classes or inner nodes each position opened for it.

        The log-probability of a class or of a node bounds those of all words below it: binary trees
        are searched by branch and bound. Rows whose search would open a large part of the tree, or
        meets nan, are ranked as a whole; nan in a row of the weights that no search opens is not
        seen.

        Returns:
            `opened` is `(*batch,)`, int64; all of them where a row is ranked as a whole.

        Raises:
            ValueError: If `k` is not in `[1, vocab_size]`.
        """
        self._check_k(k)
        rows = self._flatten(hidden)
        found = [self._searched(part, k) for part in self._row_chunks(rows)]
        values, indices, failed, opened = map(torch.cat, zip(*found, strict=True))
        if failed.any():
            values[failed], indices[failed] = super().topk(rows[failed], k)
            opened[failed] = len(self.cutoffs) + 1 if self.has_classes else self.vocab_size - 1
        shape = (*hidden.shape[:-1], k)
        top = TopK(values.view(shape), indices.view(shape))
        return Search(top, opened.view(shape[:-1]))

    def _searched(self, rows: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Values, ids, which rows failed, and how much was opened."""
        if not self.has_classes:
            return tree_topk(rows, self.weight, self.bias, self.tree, k)
        words = self._classes()
        dtype = product_dtype(rows, self.weight)
        if k > LARGEST_K or dtype not in (torch.float32, torch.float64):
            values = rows.new_zeros(len(rows), k, dtype=accumulation_dtype(dtype))
            ids = torch.zeros(len(rows), k, dtype=torch.int64, device=rows.device)
            return values, ids, torch.ones_like(ids[:, 0], dtype=torch.bool), ids[:, 0]
        masses = dense_log_probs(rows, words.class_weight, words.class_bias, None)
        ends = self.class_starts.new_tensor([self.vocab_size])
        classes = Classes(self.weight, self.bias, torch.cat([self.class_starts, ends]))
        with autocast_off(rows):
            return class_topk(rows, classes, masses, k)

    def _draw(self, rows: Tensor, draws: Draws) -> Tensor:
        """Classes in two stages; down a binary tree where that passes few of its nodes.

        Away from temperature 1 walks down a tree may be rejected; words that are given up are drawn
        from all. Many draws of a row read all words as well.
        """
        if draws.top_p is not None:
            return super()._draw(rows, draws)
        if self.has_classes:
            return draw_from_clusters(rows, self._classes().clusters(), None, draws)
        if draws.num_samples * (1 + math.log2(self.vocab_size)) * WALK_COST > self.vocab_size:
            return super()._draw(rows, draws)
        best = self._best(rows, 1).log_probs.squeeze(1) if draws.temperature < 1 else None
        nodes = TreeNodes(self.weight, self.bias, self.tree, self.num_leaves)
        with autocast_off(rows):
            drawn = draw_from_tree(rows, nodes, draws, best)
        given_up = (drawn < 0).any(1)
        if given_up.any():
            again = super()._draw(rows[given_up], draws)
            drawn[given_up] = torch.where(drawn[given_up] < 0, again, drawn[given_up])
        return drawn

    def structure(self) -> dict[str, Any]:
        """The tree as a tensor of children, or where the classes begin."""
        if self.has_classes:
            return {"tree": "classes", "cutoffs": list(self.cutoffs)}
        return {"tree": self.tree.detach().cpu().clone()}

    def tie_weight(self, embedding: nn.Module) -> None:
        """Share the words' rows with an `nn.Embedding` of the same shape, with `tree="classes"`.

        Raises:
            ValueError: If the tree is binary, so that no row belongs to a word, or `embedding` has
                no weight of `(vocab_size, hidden_size)`.
        """
        if not self.has_classes:
            raise ValueError(
                "HierarchicalSoftmax on a binary tree has rows of inner nodes, none of a word, so"
                ' it cannot be tied: use tree="classes"'
            )
        shape = (self.vocab_size, self.hidden_size)
        self.weight = tied_weight(
            embedding, shape, "HierarchicalSoftmax", "(vocab_size, hidden_size)"
        )

    def extra_repr(self) -> str:
        """Sizes, for `print(head)`."""
        if self.has_classes:
            return f"{super().extra_repr()}, num_classes={len(self.cutoffs) + 1}"
        return f"{super().extra_repr()}, max_depth={len(self.level_sizes)}"


def _resolve_tree(
    tree: str | Tensor | Sequence[Any], vocab_size: int, counts: Tensor | None
) -> Tensor:
    if not isinstance(tree, str):
        return trees.given_tree(tree, vocab_size)
    if tree == "balanced":
        return trees.balanced_tree(vocab_size)
    if tree != "huffman":
        raise ValueError(
            f'tree must be "huffman", "balanced", "classes" or a binary tree, got {tree!r}'
        )
    ranked = zipf_counts(vocab_size) if counts is None else counts.cpu().clamp(min=1)
    return trees.huffman_tree(ranked)


def _derive_again(head: nn.Module, _: object) -> None:
    """After loading: the tree or the classes may be others than this head was built with."""
    assert isinstance(head, HierarchicalSoftmax)
    if head.has_classes and not head.class_starts.is_meta:
        head.cutoffs = resolve_cutoffs(head.class_starts[1:].tolist(), head.vocab_size)
    elif not head.has_classes and not head.tree.is_meta:
        trees.check_saved(head.tree, head.vocab_size)
        head._derive(head.tree)
