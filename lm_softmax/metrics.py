"""Exact perplexity: float64 sums of nats over an int64 number of tokens."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torchmetrics import Metric


class Perplexity(Metric):
    """Perplexity of everything it has seen, over all batches and all ranks.

    Equals `torch.cat(log_probs).double().neg().mean().exp()` over the log-probabilities (nats) of
    all counted tokens of all ranks. Ranks and batches may hold different numbers of tokens.

    The sum is kept in float64 and the number of tokens in int64 whatever dtype the surrounding
    module is moved to, on its device; on Apple's MPS, which has no float64, they stay on the CPU.
    Without a counted token both `compute()` and `nll()` are nan. An `update` does not make the host
    wait for the device.

    Args:
        **kwargs: Options of `torchmetrics.Metric`.

    Example:
        >>> metric = Perplexity()
        >>> metric.update(torch.tensor([0.5, 0.125]).log())
        >>> metric.compute()
        tensor(4.0000, dtype=torch.float64)
    """

    is_differentiable = False
    higher_is_better = False
    full_state_update = False

    nats: Tensor
    count: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("nats", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(
        self,
        log_prob: Float[Tensor, "*batch"],
        target: Int[Tensor, "*batch"] | None = None,
        ignore_index: int = -100,
    ) -> None:
        """Adds the tokens of a batch.

        Args:
            log_prob: Log-probability of each target, in nats.
            target: The targets; positions that hold `ignore_index` are left out, whatever their
                `log_prob`. Without it every position counts.
            ignore_index: Id of the positions to leave out.

        Raises:
            ValueError: If `log_prob` and `target` differ in shape.
        """
        log_prob = log_prob.detach()
        if target is None:
            self.count = self.count + log_prob.numel()
        else:
            if target.shape != log_prob.shape:
                raise ValueError(
                    f"log_prob has shape {tuple(log_prob.shape)}, target {tuple(target.shape)}:"
                    " give one log-probability for each target"
                )
            counted = target != ignore_index
            # Not a product, where 0 * inf is nan, and not an index, which waits for the device.
            log_prob = torch.where(counted, log_prob, torch.zeros_like(log_prob))
            self.count = self.count + counted.sum().to(self.count.device)
        self.nats = self.nats - log_prob.to(self.nats.device).sum(dtype=torch.float64)

    def compute(self) -> Float[Tensor, ""]:
        """Returns exp(nats per token) over all ranks, float64."""
        return torch.exp(self.nats / self.count)

    def nll(self) -> Float[Tensor, ""]:
        """Returns nats per token over all ranks, float64.

        Like `compute()` it is a collective: every rank has to call it.
        """
        with self.sync_context(
            dist_sync_fn=self.dist_sync_fn,
            should_sync=self._to_sync,
            should_unsync=self._should_unsync,
        ):
            return self.nats / self.count

    def _apply(self, fn: Callable[[Tensor], Tensor], exclude_state: Sequence[str] = ()) -> Metric:
        # Follow the device alone: `module.to(bfloat16)` would round the sums, MPS cannot hold them.
        self._computed = None
        super()._apply(fn, exclude_state=("nats", "count", *exclude_state))
        device = torch.device("cpu") if self.device.type == "mps" else self.device
        self.nats, self.count = self.nats.to(device), self.count.to(device)
        return self
