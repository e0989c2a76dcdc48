"""What sampled softmax and NCE share: a full softmax trained on the target and a few negatives."""

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from lm_softmax.heads.base import Reduction
from lm_softmax.heads.clustered import (
    ClusteredHead,
    dense_log_probs,
    log_frequencies,
    tied_weight,
)
from lm_softmax.heads.noise import Noise, NoiseKind
from lm_softmax.kernels import Clusters, Objective, accumulation_dtype, autocast_off, product_dtype
from lm_softmax.kernels.look_up import look_up
from lm_softmax.kernels.negatives import IGNORED, Negatives, negatives_loss, negatives_nll

NUM_SAMPLES = 1024  # by default, or half of a small vocabulary


class Comparison(NamedTuple):
    """What a loss compares each target with."""

    ids: Tensor  # (num_samples,): the negatives
    offset: Tensor  # (num_samples,), added to their logits
    of_target: Tensor  # (N,), added to the logit of each target
    slot: Tensor  # (N,): the negative that takes no part with the target, or NO_HIT
    logistic: bool  # whether each word is a decision of its own, instead of one softmax


class NegativesHead(ClusteredHead):
    """One row and one bias a word, as in a full softmax; negatives are shared by the batch.

    `log_prob` is that of the full softmax, so `topk` and `sample` are too. A subclass gives the
    loss of the targets given the logits of target and negatives.

    Args:
        hidden_size: Width of `hidden`.
        vocab_size: Number of words.
        counts: Training-set frequencies.
        num_samples: Number of negatives; None is 1024, or half of a vocabulary below 2048.
        noise: What they are drawn from.
        noise_power: The noise is raised to it.
        unique: Whether all negatives of a step differ.
        bias: Whether each word has a bias.
        softcap: Logits become `softcap * tanh(logits / softcap)`.
        sparse: Whether gradients of `loss` by weight and bias are sparse tensors.
        label_smoothing: Must be 0.
        ignore_index: Target of positions that count for nothing.

    Raises:
        ValueError: If an option is out of range.
    """

    def __init__(
        self,
        hidden_size: int,
        vocab_size: int,
        counts: Tensor | None,
        *,
        num_samples: int | None,
        noise: NoiseKind | Tensor | Sequence[float],
        noise_power: float,
        unique: bool,
        bias: bool,
        softcap: float | None,
        sparse: bool,
        label_smoothing: float,
        ignore_index: int,
    ) -> None:
        name = type(self).__name__
        if label_smoothing:
            raise ValueError(
                f"{name} scores few words, and cannot smooth over all of them:"
                f" label_smoothing must be 0, got {label_smoothing}"
            )
        objective = Objective(softcap)
        super().__init__(
            hidden_size, vocab_size, counts, objective=objective, ignore_index=ignore_index
        )
        if num_samples is None:
            num_samples = min(NUM_SAMPLES, -(-vocab_size // 2))
        self.noise = Noise(
            vocab_size, num_samples, counts, noise=noise, power=noise_power, unique=unique
        )
        self.sparse = sparse
        self.weight = nn.Parameter(torch.empty(vocab_size, hidden_size))
        nn.init.uniform_(self.weight, -(hidden_size**-0.5), hidden_size**-0.5)
        self.bias = nn.Parameter(torch.zeros(vocab_size)) if bias else None
        if self.bias is not None and counts is not None:
            self.bias.data.copy_(log_frequencies(counts))

    @property
    def loss_is_nll(self) -> bool:
        """False: the loss compares the target with a few words."""
        return False

    @property
    def num_samples(self) -> int:
        """Number of negatives."""
        return self.noise.num_samples

    @abstractmethod
    def _compare(self, target: Tensor) -> Comparison:
        """Draw negatives, and say how the loss weighs them and the targets."""

    def loss(
        self,
        hidden: Float[Tensor, "*batch hidden"],
        target: Int[Tensor, "*batch"],
        *,
        reduction: Reduction = "mean",
    ) -> Tensor:
        """See `OutputHead.loss`; negatives come from the global generator of hidden's device."""
        self._check_reduction(reduction)
        rows, flat, poison = self._flatten_with_target(hidden, target)
        dtype = product_dtype(rows, self.weight)
        with autocast_off(rows):
            ignored = flat == self.ignore_index
            rows = rows.masked_fill(ignored.unsqueeze(1), 0).to(accumulation_dtype(dtype))
            wanted = flat.masked_fill(ignored, 0)
            comparison = self._compare(wanted)
            negatives = self._score(rows, wanted, comparison, dtype)
            slot = comparison.slot.masked_fill(ignored, IGNORED)
            arguments = rows, slot, negatives, dtype, self.objective.softcap, comparison.logistic
            if reduction == "none":
                return (negatives_nll(*arguments) + poison).view(target.shape)
            total = negatives_loss(*arguments) + poison
        return total if reduction == "sum" else total / self._num_targets(target)

    def _score(
        self, rows: Tensor, target: Tensor, comparison: Comparison, dtype: torch.dtype
    ) -> Negatives:
        """Logits of the targets, and the rows and biases that make those of the negatives."""
        exact = accumulation_dtype(dtype)
        of_target, of_negatives = self._look_up(self.weight, target, comparison.ids)
        logits, bias = torch.linalg.vecdot(rows, of_target.to(exact)), None
        if self.bias is not None:
            of_target, bias = self._look_up(self.bias, target, comparison.ids)
            logits, bias = logits + of_target.to(exact), bias.to(exact)
        if (cap := self.objective.softcap) is not None:
            logits = cap * torch.tanh(logits / cap)
        logits = logits + comparison.of_target.to(exact)
        return Negatives(logits, of_negatives, comparison.offset.to(exact), bias)

    def _look_up(
        self, parameter: Tensor, target: Tensor, negatives: Tensor
    ) -> tuple[Tensor, Tensor]:
        """`parameter[target]` and `parameter[negatives]`, with the gradient that the head gives."""
        if self.sparse or parameter.dtype.itemsize < torch.float32.itemsize:
            found = look_up(parameter, target, negatives, self.sparse)
            return cast(tuple[Tensor, Tensor], found)
        ids = torch.cat([target, negatives])  # two look-ups had two gradients to add
        rows = parameter.gather(0, ids) if parameter.dim() == 1 else F.embedding(ids, parameter)
        of_target, of_negatives = rows.tensor_split([len(target)])
        return of_target, of_negatives

    def clusters(self) -> Clusters:
        """One cluster, that of the full softmax."""
        return Clusters(self.weight, None, self.bias)

    def _all_log_probs(self, rows: Tensor) -> Tensor:
        return dense_log_probs(rows, self.weight, self.bias, self.objective.softcap)

    def tie_weight(self, embedding: nn.Module) -> None:
        """Share the output matrix with an `nn.Embedding` of the same shape (Press and Wolf 2017).

        Raises:
            ValueError: If `embedding` has no weight of `(vocab_size, hidden_size)`, or the head is
                sparse and it is not.
        """
        name, shape = type(self).__name__, (self.vocab_size, self.hidden_size)
        weight = tied_weight(embedding, shape, name, "(vocab_size, hidden_size)")
        if self.sparse and not getattr(embedding, "sparse", False):
            raise ValueError(
                f"{name}(sparse=True) ties to an embedding with sparse=True:"
                f" a dense gradient of {type(embedding).__name__} would make the sum dense"
            )
        self.weight = weight

    def sparse_parameters(self) -> list[nn.Parameter]:
        """Weight and bias, of a head with `sparse`; what else a subclass learns is dense."""
        return [p for p in (self.weight, self.bias) if p is not None] if self.sparse else []

    def structure(self) -> dict[str, Any]:
        """The number of negatives, and given noise."""
        given = self.noise.given
        return {"num_samples": self.num_samples} | ({} if given is None else {"noise": given})

    def extra_repr(self) -> str:
        """Sizes, for `print(head)`."""
        return f"{super().extra_repr()}, sparse={self.sparse}"
