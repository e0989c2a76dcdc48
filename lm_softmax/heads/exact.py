"""What heads share whose loss is exact and made by a kernel."""

import math
from abc import abstractmethod

from jaxtyping import Float, Int
from torch import Tensor

from lm_softmax.heads.base import OutputHead, Reduction
from lm_softmax.kernels import Objective


class ExactHead(OutputHead):
    """A head that trains on its own negative log-likelihood, with the options of `Objective`.

    A subclass gives log-probabilities of all words, and losses of given ones by its kernel.

    Args:
        hidden_size: Width of `hidden`.
        vocab_size: Number of words.
        counts: Training-set frequencies.
        objective: Options of the loss; its softcap is part of the distribution.
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
        objective: Objective,
        ignore_index: int,
    ) -> None:
        super().__init__(hidden_size, vocab_size, counts, ignore_index=ignore_index)
        softcap, label_smoothing, z_loss = objective
        if softcap is not None and not (softcap > 0 and math.isfinite(softcap)):
            raise ValueError(f"softcap must be above 0 and finite, got {softcap}")
        if not 0 <= label_smoothing < 1:
            raise ValueError(f"label_smoothing must be in [0, 1), got {label_smoothing}")
        if not (z_loss >= 0 and math.isfinite(z_loss)):
            raise ValueError(f"z_loss must be at least 0 and finite, got {z_loss}")
        self.objective = objective

    @abstractmethod
    def _all_log_probs(self, rows: Tensor) -> Tensor:
        """Log-probabilities of all words, `(N, vocab_size)`."""

    @abstractmethod
    def _token_losses(self, rows: Tensor, target: Tensor, objective: Objective) -> Tensor:
        """Loss of each token, 0 where ignored; ignored rows may hold anything, nan as well."""

    @abstractmethod
    def _summed_loss(self, rows: Tensor, target: Tensor, objective: Objective) -> Tensor:
        """The sum of `_token_losses`, its gradients made the cheapest way."""

    @property
    def loss_is_nll(self) -> bool:
        """False under label smoothing or z-loss."""
        return not self.objective.label_smoothing and not self.objective.z_loss

    def log_prob(
        self, hidden: Float[Tensor, "*batch hidden"], target: Int[Tensor, "*batch"] | None = None
    ) -> Tensor:
        """See `OutputHead.log_prob`; with `target` no `(N, vocab_size)` is ever held."""
        if target is None:
            log_probs = self._all_log_probs(self._flatten(hidden))
            return log_probs.view(*hidden.shape[:-1], self.vocab_size)
        rows, flat, poison = self._flatten_with_target(hidden, target)
        nll = self._token_losses(rows, flat, Objective(self.objective.softcap))
        return -(nll + poison).view(target.shape)

    def loss(
        self,
        hidden: Float[Tensor, "*batch hidden"],
        target: Int[Tensor, "*batch"],
        *,
        reduction: Reduction = "mean",
    ) -> Tensor:
        """See `OutputHead.loss`; gradients of a mean or a sum are made once, not token by token."""
        self._check_reduction(reduction)
        rows, flat, poison = self._flatten_with_target(hidden, target)
        if reduction == "none":
            return (self._token_losses(rows, flat, self.objective) + poison).view(target.shape)
        total = self._summed_loss(rows, flat, self.objective) + poison
        return total if reduction == "sum" else total / self._num_targets(target)
