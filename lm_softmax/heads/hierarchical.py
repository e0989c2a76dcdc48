"""Hierarchical softmax: a word is reached by decisions, down a binary tree or class first."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from lm_softmax.heads import tree as trees
from lm_softmax.heads.base import OutputHead, Reduction, TopK
from lm_softmax.heads.clustered import dense_log_probs, log_frequencies, project, tied_weight
from lm_softmax.heads.cutoffs import resolve_cutoffs, zipf_counts
from lm_softmax.kernels import Clusters, Tail, accumulation_dtype, cluster_loss, cluster_nll
from lm_softmax.kernels.path_operations import path_nll
from lm_softmax.kernels.paths import Tree
from lm_softmax.kernels.tree_search import tree_topk


class HierarchicalSoftmax(OutputHead):
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
            `[[0, 1], [2, 3]]`, or `(V - 1, 2)` children, where an entry below V is a word and
            V + i is inner node i. Inner nodes are renumbered level by level from the root.
        num_classes: How many classes at most, with `tree="classes"`; None is about `sqrt(V)`.
        cutoffs: Ids at which classes but the first begin, strictly increasing in
            `(0, vocab_size)`. "auto" gives each an equal share of the sum of `sqrt(count)`.
        bias: Whether each node, or word and class, has a bias.
        sparse: Whether gradients of the parameters are sparse tensors over the nodes that the batch
            passes, on a binary tree.
        label_smoothing: Must be 0: over all words it would need every node for every token.
        ignore_index: Target of positions that count for nothing.

    Raises:
        ValueError: If a tree does not cover each word once, or an option is impossible.
    """

    tree: Tensor
    up: Tensor
    depth: Tensor
    order: Tensor
    slots: Tensor
    class_starts: Tensor

    def __init__(
        self,
        hidden_size: int,
        vocab_size: int,
        counts: Tensor | None = None,
        *,
        tree: Literal["huffman", "balanced", "classes"] | Tensor | Sequence[Any] = "huffman",
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
        super().__init__(hidden_size, vocab_size, counts, ignore_index=ignore_index)
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
        self.cutoffs = _resolve_classes(self.vocab_size, counts, num_classes, cutoffs)
        size = len(self.cutoffs) + 1
        self.register_buffer("class_starts", torch.tensor([0, *self.cutoffs]))
        self.weight = nn.Parameter(torch.empty(self.vocab_size, self.hidden_size))
        self.class_weight = nn.Parameter(torch.empty(size, self.hidden_size))
        for matrix in (self.weight.data, self.class_weight.data):
            nn.init.uniform_(matrix, -(self.hidden_size**-0.5), self.hidden_size**-0.5)
        self.bias = nn.Parameter(torch.zeros(self.vocab_size)) if bias else None
        self.class_bias = nn.Parameter(torch.zeros(size)) if bias else None
        if self.bias is not None and self.class_bias is not None and counts is not None:
            parts = torch.split(log_frequencies(counts), self._class_sizes())
            masses = [part.logsumexp(0, keepdim=True) for part in parts]
            self.class_bias.data.copy_(torch.cat(masses))
            shares = [part - mass for part, mass in zip(parts, masses, strict=True)]
            self.bias.data.copy_(torch.cat(shares))

    def _derive(self, children: Tensor) -> None:
        """What follows from the tree, for a new head and a loaded one."""
        shape = trees.shape_of(children)
        self.level_sizes = shape.level_sizes
        for name in ("up", "depth", "order", "slots"):
            derived = getattr(shape, name).to(self.tree.device)
            self.register_buffer(name, derived, persistent=False)

    def _class_sizes(self) -> list[int]:
        borders = [0, *self.cutoffs, self.vocab_size]
        return [right - left for left, right in pairwise(borders)]

    def clusters(self) -> Clusters:
        """The classes as the cluster kernel takes them: no short-list, tails of full width.

        Raises:
            ValueError: If the tree is binary.
        """
        if not self.has_classes:
            raise ValueError("a binary tree has no clusters of words")
        sizes = self._class_sizes()
        biases = [None] * len(sizes) if self.bias is None else torch.split(self.bias, sizes)
        tails = [
            Tail(None, *tail) for tail in zip(torch.split(self.weight, sizes), biases, strict=True)
        ]
        return Clusters(self.weight[:0], self.class_weight, self.class_bias, tails)

    def log_prob(
        self, hidden: Float[Tensor, "*batch hidden"], target: Int[Tensor, "*batch"] | None = None
    ) -> Tensor:
        """See `OutputHead.log_prob`; with `target` only its path, or class, is computed."""
        if target is None:
            rows = self._flatten(hidden)
            found = self._classes_log_probs(rows) if self.has_classes else self._leaves(rows)
            return found.view(*hidden.shape[:-1], self.vocab_size)
        rows, flat, poison = self._flatten_with_target(hidden, target)
        if self.has_classes:
            nll = cluster_nll(rows, flat, self.clusters(), None, self.ignore_index)
        else:
            nll = path_nll(
                rows,
                flat,
                self.weight,
                self.bias,
                Tree(self.up, self.depth, len(self.level_sizes)),
                self.ignore_index,
                sparse=self.sparse,
            )
        return -(nll + poison).view(target.shape)

    def loss(
        self,
        hidden: Float[Tensor, "*batch hidden"],
        target: Int[Tensor, "*batch"],
        *,
        reduction: Reduction = "mean",
    ) -> Tensor:
        """See `OutputHead.loss`."""
        if not self.has_classes or reduction not in ("mean", "sum"):
            return super().loss(hidden, target, reduction=reduction)
        rows, flat, poison = self._flatten_with_target(hidden, target)
        total = cluster_loss(rows, flat, self.clusters(), None, self.ignore_index) + poison
        return total if reduction == "sum" else total / self._num_targets(target)

    def _leaves(self, rows: Tensor) -> Tensor:
        """Log-probabilities of all words, level by level from the root."""
        logits = project(rows, self.weight).to(accumulation_dtype(rows.dtype))
        if self.bias is not None:
            logits = logits + self.bias
        above, words = logits[:, :0].sum(1, keepdim=True), []  # of the root, 0
        start = 0
        for size, below in pairwise([*self.level_sizes, 0]):
            level = logits[:, start : start + size]
            sides = (above + F.logsigmoid(level), above + F.logsigmoid(-level))
            both = torch.stack(sides, 2).flatten(1)
            slots = self.slots[2 * start : 2 * (start + size)]
            words.append(both.index_select(1, slots[: 2 * size - below]))
            above = both.index_select(1, slots[2 * size - below :])
            start += size
        return torch.cat(words, 1).index_select(1, self.order) if words else above

    def _classes_log_probs(self, rows: Tensor) -> Tensor:
        assert self.class_weight is not None
        masses = dense_log_probs(rows, self.class_weight, self.class_bias, None)
        logits = project(rows, self.weight).to(masses.dtype)
        if self.bias is not None:
            logits = logits + self.bias
        parts = torch.split(logits, self._class_sizes(), 1)
        each = zip(torch.split(masses, 1, 1), parts, strict=True)
        return torch.cat([mass + torch.log_softmax(part, 1) for mass, part in each], 1)

    @torch.no_grad()
    def topk(self, hidden: Float[Tensor, "*batch hidden"], k: int) -> TopK:
        """See `OutputHead.topk`; a binary tree is searched by branch and bound.

        The log-probability of a node bounds those of all words below it. Rows whose search would
        open a large part of the tree are ranked as a whole.
        """
        if self.has_classes or not (isinstance(k, int) and 1 <= k <= self.vocab_size):
            return super().topk(hidden, k)
        rows = self._flatten(hidden)
        values, indices, failed, _ = tree_topk(rows, self.weight, self.bias, self.tree, k)
        if failed.any():
            values[failed], indices[failed] = super().topk(rows[failed], k)
        shape = (*hidden.shape[:-1], k)
        return TopK(values.view(shape), indices.view(shape))

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


def _resolve_classes(
    vocab_size: int,
    counts: Tensor | None,
    num_classes: int | None,
    cutoffs: Literal["auto"] | Sequence[int],
) -> list[int]:
    if num_classes is not None and not (
        isinstance(num_classes, int) and 1 <= num_classes <= vocab_size
    ):
        raise ValueError(f"num_classes must be in [1, vocab_size={vocab_size}], got {num_classes}")
    if cutoffs != "auto":
        ids = resolve_cutoffs(cutoffs, vocab_size)
        if num_classes is not None and len(ids) >= num_classes:
            raise ValueError(
                f"cutoffs make {len(ids) + 1} classes, but num_classes={num_classes} is the most"
            )
        return ids
    if num_classes is None:
        num_classes = max(1, round(vocab_size**0.5))
    ranked = zipf_counts(vocab_size) if counts is None else counts
    return trees.class_starts(vocab_size, ranked, num_classes)


def _derive_again(head: nn.Module, _: object) -> None:
    """After loading: the tree or the classes may be others than this head was built with."""
    assert isinstance(head, HierarchicalSoftmax)
    if head.weight.is_meta:
        return
    if head.has_classes:
        head.cutoffs = head.class_starts[1:].tolist()
    else:
        head._derive(head.tree)
