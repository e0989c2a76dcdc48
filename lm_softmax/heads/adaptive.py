"""Adaptive softmax: frequent words in a short-list, rare ones in narrower clusters."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lm_softmax.heads.clustered import ClusteredHead, dense_log_probs, log_frequencies, project
from lm_softmax.heads.cutoffs import resolve_clusters
from lm_softmax.kernels import Clusters, Objective, Tail


class AdaptiveSoftmax(ClusteredHead):
    """Exact softmax factored by frequency: `p(w) = p(cluster) * p(w | cluster)`.

    The words below the first cutoff and one word for each tail cluster share a softmax over
    `hidden`; the words of tail i share one over `projections[i] @ hidden`, which is narrower the
    rarer they are. Only tokens of a cluster pay for it. Computes what
    `nn.AdaptiveLogSoftmaxWithLoss` does, and adds biases in the tails, any leading shape,
    `ignore_index`, reductions, autocast, and gradients for clusters that a batch does not hit.

    Source: Grave et al. 2017, "Efficient softmax approximation for GPUs", section 4.

    Args:
        hidden_size: Width of `hidden`.
        vocab_size: Number of words.
        counts: Training-set frequencies: they decide `cutoffs="auto"`, and the biases start at the
            log-probabilities they give.
        cutoffs: Ids at which tail clusters begin, strictly increasing in `(0, vocab_size)`; an
            empty list is the full softmax. "auto" minimises the predicted time of a training step
            (`heads.cost_model`), with as many tails as `tail_sizes` has, else 0 to 4.
        div_value: Tail i, from 1, is `hidden_size // div_value**i` wide; unless it is said, 2 with
            "auto", and 4, as in torch, with cutoffs that are given.
        min_tail_size: No tail is narrower.
        tail_sizes: The widths themselves, instead of the two options before.
        cost_model: The device that "auto" predicts the time for, "cpu" or "cuda". Heads are built
            before they move, and a model that moves keeps its clusters.
        bias: Whether each word and cluster has a bias.
        softcap: Logits of every softmax become `softcap * tanh(logits / softcap)`.
        label_smoothing: Must be 0: over all words it would need every cluster for every token.
        z_loss: Weight of the squared log-sum-exp of every softmax that a token goes through.
        ignore_index: Target of positions that count for nothing.

    Raises:
        ValueError: If cutoffs or widths are impossible or an option is out of range.
    """

    def __init__(
        self,
        hidden_size: int,
        vocab_size: int,
        counts: Tensor | None = None,
        *,
        cutoffs: Literal["auto"] | Sequence[int] = "auto",
        div_value: float | None = None,
        min_tail_size: int = 16,
        tail_sizes: Sequence[int] | None = None,
        cost_model: Literal["cpu", "cuda"] = "cpu",
        bias: bool = True,
        softcap: float | None = None,
        label_smoothing: float = 0.0,
        z_loss: float = 0.0,
        ignore_index: int = -100,
    ) -> None:
        if label_smoothing:
            raise ValueError(
                f"AdaptiveSoftmax cannot smooth over all words without opening every cluster:"
                f" label_smoothing must be 0, got {label_smoothing}"
            )
        objective = Objective(softcap, 0.0, z_loss)
        super().__init__(
            hidden_size, vocab_size, counts, objective=objective, ignore_index=ignore_index
        )
        self.cutoffs, self.tail_sizes = resolve_clusters(
            cutoffs,
            hidden_size,
            vocab_size,
            counts,
            div_value=div_value,
            min_tail_size=min_tail_size,
            tail_sizes=tail_sizes,
            cost_model=cost_model,
        )
        borders = [*self.cutoffs, vocab_size]
        num_words = [right - left for left, right in pairwise(borders)]
        self.weight = nn.Parameter(torch.empty(borders[0], hidden_size))
        self.cluster_weight = None
        if self.cutoffs:
            self.cluster_weight = nn.Parameter(torch.empty(len(num_words), hidden_size))
        self.projections = nn.ParameterList(
            torch.empty(size, hidden_size) for size in self.tail_sizes
        )
        self.tail_weights = nn.ParameterList(
            torch.empty(words, size) for words, size in zip(num_words, self.tail_sizes, strict=True)
        )
        own = (self.weight, self.cluster_weight, *self.projections, *self.tail_weights)
        for matrix in (matrix for matrix in own if matrix is not None):
            nn.init.uniform_(matrix, -(matrix.shape[1] ** -0.5), matrix.shape[1] ** -0.5)
        self.bias, self.tail_biases = None, None
        if bias:
            self.bias = nn.Parameter(torch.zeros(borders[0] + len(num_words)))
            self.tail_biases = nn.ParameterList(torch.zeros(words) for words in num_words)
        if counts is not None:
            self._start_biases_at(log_frequencies(counts))

    def _start_biases_at(self, log_probs: Tensor) -> None:
        """Without hidden, the head then gives these log-probabilities."""
        if self.bias is None or self.tail_biases is None:
            return
        short_list, *tails = log_probs.tensor_split(self.cutoffs)
        masses = [tail.logsumexp(0, keepdim=True) for tail in tails]
        self.bias.data.copy_(torch.cat([short_list, *masses]))
        for bias, tail, mass in zip(self.tail_biases, tails, masses, strict=True):
            bias.data.copy_(tail - mass)

    def clusters(self) -> Clusters:
        """The short-list and the tails."""
        num = len(self.cutoffs)
        biases = [None] * num if self.tail_biases is None else _listed(self.tail_biases, num)
        of_tails = _listed(self.projections, num), _listed(self.tail_weights, num), biases
        tails = list(map(Tail, *of_tails))
        return Clusters(self.weight, self.cluster_weight, self.bias, tails)

    def _all_log_probs(self, rows: Tensor) -> Tensor:
        weight, cluster_weight, bias, tails = self.clusters()
        softcap = self.objective.softcap
        if cluster_weight is not None:
            weight = torch.cat([weight, cluster_weight])
        head = dense_log_probs(rows, weight, bias, softcap)
        short_list, *masses = head.tensor_split(
            [self.weight.shape[0] + i for i in range(len(tails))], -1
        )
        parts = [short_list]
        for tail, projection, mass in zip(tails, self.projections, masses, strict=True):
            projected = project(rows, projection)
            parts.append(mass + dense_log_probs(projected, tail.weight, tail.bias, softcap))
        return torch.cat(parts, -1)

    def structure(self) -> dict[str, Any]:
        """Resolved cutoffs and widths."""
        return {"cutoffs": list(self.cutoffs), "tail_sizes": list(self.tail_sizes)}

    def tie_weight(self, embedding: nn.Module) -> None:
        """Share all matrices with an adaptive input embedding (Baevski and Auli 2019, section 3.2).

        Short-list rows, tail rows and projections are shared; cluster words stay this head's own.

        Raises:
            ValueError: If `embedding` is not adaptive, or differs in cutoffs or widths.
        """
        own = (self.hidden_size, self.cutoffs, self.tail_sizes)
        names = ("embedding_size", "cutoffs", "tail_sizes")
        missing = [name for name in names if not hasattr(embedding, name)]
        if missing:
            raise ValueError(
                f"AdaptiveSoftmax ties to an AdaptiveEmbedding, got {type(embedding).__name__}"
            )
        theirs = tuple(getattr(embedding, name) for name in names)
        if theirs != own:
            raise ValueError(
                f"AdaptiveSoftmax with hidden_size, cutoffs, tail_sizes {own} cannot be tied to an"
                f" embedding with {theirs}"
            )
        for name in ("weight", "projections", "tail_weights"):
            setattr(self, name, getattr(embedding, name))

    @classmethod
    def from_torch(cls, module: nn.AdaptiveLogSoftmaxWithLoss) -> "AdaptiveSoftmax":
        """The same distribution as torch's adaptive head, weights copied.

        Torch has no bias in the tails: with `head_bias=True` those of the new head start at 0.

        Raises:
            ValueError: If a tail of `module` has no width.
        """
        cutoffs = [int(cutoff) for cutoff in module.cutoffs[:-1]]
        tails: list[list[Any]] = [
            [layer.weight for layer in tail.children()] for tail in module.tail
        ]
        head = cls(
            module.in_features,
            module.n_classes,
            cutoffs=cutoffs,
            tail_sizes=[projection.shape[0] for projection, _ in tails],
            bias=module.head.bias is not None,
        ).to(module.head.weight)
        assert head.cluster_weight is not None  # torch wants at least one cutoff
        short_list, cluster_words = module.head.weight.tensor_split(cutoffs[:1])
        with torch.no_grad():
            head.weight.copy_(short_list)
            head.cluster_weight.copy_(cluster_words)
            if head.bias is not None:
                head.bias.copy_(module.head.bias)
            for own, (projection, _) in zip(head.projections, tails, strict=True):
                own.copy_(projection)
            for own, (_, weight) in zip(head.tail_weights, tails, strict=True):
                own.copy_(weight)
        return head

    def extra_repr(self) -> str:
        """Sizes, for `print(head)`."""
        return f"{super().extra_repr()}, cutoffs={self.cutoffs}, tail_sizes={self.tail_sizes}"


def _listed(parameters: nn.ParameterList, num: int) -> list[Tensor]:
    """`list(parameters)`, whose checks at each place take a tenth of the time of a token."""
    own: dict[str, Any] = parameters._parameters
    return [  # one with a parametrization is an attribute
        own[name] if name in own else getattr(parameters, name) for name in map(str, range(num))
    ]
