"""The loss of a mixture of softmaxes over the same output rows, gradients on the way.

`p(y) = sum_k exp(log_prior_k) softmax(weight @ inputs_k + bias)_y` (Yang et al. 2018, equation
(5)). A chunk holds the logits of all experts of some tokens, so its memory does not depend on how
many experts there are.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lm_softmax.kernels import dense, products
from lm_softmax.kernels.dense import Gradients, Matrix, Objective, accumulation_dtype
from lm_softmax.kernels.workspace import reads_are_cheap, workspace


class Mixture(NamedTuple):
    """Log-prior of each expert, `(N, K)`, and the output rows that all of them share."""

    log_prior: Tensor  # (N, K)
    weight: Tensor  # (V, width)
    bias: Tensor | None  # (V,)

    def flatten(self) -> list[Tensor]:
        """All tensors, as a registered operation wants them."""
        return [tensor for tensor in self if tensor is not None]

    @classmethod
    def unflatten(cls, tensors: Sequence[Tensor]) -> "Mixture":
        """The inverse of `flatten`."""
        log_prior, weight, *bias = tensors
        return cls(log_prior, weight, bias[0] if bias else None)


class MixtureGradients(NamedTuple):
    """Buffers to fill; None where no gradient is wanted."""

    inputs: Tensor | None
    log_prior: Tensor | None
    weight: Tensor | None
    bias: Tensor | None

    def clear(self) -> None:
        """Of tokens that no chunk holds the gradients are 0."""
        for buffer in (self.inputs, self.log_prior):
            if buffer is not None:
                buffer.zero_()

    def multiply(self, factor: Tensor) -> None:
        """In place."""
        for buffer in self:
            if buffer is not None:
                buffer.mul_(factor)


class _Chunk(NamedTuple):
    """What a chunk of T tokens gives."""

    losses: Tensor  # (T,)
    shares: Tensor  # (T, K), of the experts in the probability of what the loss asks for
    derivative: Tensor | None  # (T * K, V), of the losses by the logits
    weighted: bool  # whether it is that yet, or still to be multiplied by the shares


def mixture_losses(
    inputs: Tensor,
    target: Tensor,
    scale: Tensor | None,
    mixture: Mixture,
    dtype: torch.dtype,
    ignore_index: int,
    objective: Objective,
    gradients: MixtureGradients | None,
) -> Tensor:
    """Loss of each token; with `gradients`, those of `sum(scale * loss)` are written into them."""
    num_tokens, num_experts, _ = inputs.shape
    total_dtype = accumulation_dtype(dtype)
    ignored = target == ignore_index
    scale = target.new_ones((), dtype=total_dtype) if scale is None else scale.to(total_dtype)
    scale = torch.where(ignored, 0, scale)
    if reads_are_cheap(target):
        kept = (~ignored).nonzero().squeeze(1)
    else:  # which need not wait for the values: tokens to ignore weigh nothing
        kept = torch.arange(num_tokens, device=target.device)
        target = target.masked_fill(ignored, 0)
        inputs = inputs.masked_fill(ignored[:, None, None], 0)
        mixture = mixture._replace(log_prior=mixture.log_prior.masked_fill(ignored[:, None], 0))
    largest = None
    if dtype == torch.float16 and num_tokens:  # a GradScaler's factor would overflow
        largest = scale.abs().amax().clamp(min=torch.finfo(total_dtype).tiny)
        scale = scale / largest
    rounded = Matrix([mixture.weight.to(dtype)], mixture.bias)
    factor = mixture.weight.to(dtype if products.products_widen(inputs) else total_dtype)
    losses = torch.zeros(num_tokens, dtype=total_dtype, device=target.device)
    if gradients is not None:
        gradients.clear()
    chunk_losses = _smoothed_losses if objective.label_smoothing else _plain_losses
    num_rows = mixture.weight.shape[0]
    size = _chunk_tokens(len(kept), num_experts, num_rows, total_dtype, inputs)
    for index, tokens in enumerate(torch.split(kept, size)):
        rows = inputs[tokens].flatten(0, 1).to(dtype)
        log_prior = mixture.log_prior[tokens].to(total_dtype)
        chunk = chunk_losses(
            rows, log_prior, rounded, target[tokens], objective, gradients is not None
        )
        losses[tokens] = chunk.losses
        if gradients is not None:
            _add_gradients(gradients, tokens, chunk, rows, factor, scale[tokens], keep=index > 0)
    if gradients is not None and largest is not None:
        gradients.multiply(largest)
    return losses.masked_fill_(ignored, 0)


def _chunk_tokens(
    num_tokens: int,
    num_experts: int,
    vocab_size: int,
    dtype: torch.dtype,
    like: Tensor | None = None,
) -> int:
    """Tokens per chunk: all their experts' rows together are a chunk of one softmax."""
    rows = dense.chunk_rows(num_tokens * num_experts, vocab_size, dtype, like)
    return max(1, rows // num_experts)


def _plain_losses(
    rows: Tensor,
    log_prior: Tensor,
    matrix: Matrix,
    target: Tensor,
    objective: Objective,
    with_derivative: bool,
) -> _Chunk:
    """The negative log-likelihood, by that of each expert.

    `d(-log p(y)) = sum_k r_k d(-log p_k(y) - log_prior_k)`, where the share `r_k` of expert k is
    `prior_k p_k(y) / p(y)`.
    """
    wanted = target.repeat_interleave(log_prior.shape[1])
    nll, derivative = dense.row_losses(
        rows, matrix, wanted, objective, with_derivative=with_derivative
    )
    joint = log_prior - nll.view_as(log_prior)
    return _Chunk(-joint.logsumexp(1), joint.softmax(1), derivative, weighted=False)


def _smoothed_losses(
    rows: Tensor,
    log_prior: Tensor,
    matrix: Matrix,
    target: Tensor,
    objective: Objective,
    with_derivative: bool,
) -> _Chunk:
    """The cross-entropy with `q(w) = smoothing / V + (1 - smoothing) [w = y]`.

    Each word has its own shares, so a second work buffer holds them.
    """
    softcap, smoothing, _ = objective
    shape = (*log_prior.shape, matrix.num_rows)
    flat = (rows.shape[0], matrix.num_rows)
    dtype = log_prior.dtype
    own = dense.chunk_logits(rows, matrix, softcap, workspace("logits", flat, rows, dtype))
    slope = None
    if softcap is not None and with_derivative:  # of tanh, 1 - tanh(a / softcap)**2
        slope = torch.div(own, softcap, out=workspace("slope", flat, rows, dtype))
        slope.square_().neg_().add_(1)
    torch.log_softmax(own, -1, out=own)
    joint = workspace("shares", flat, rows, dtype).view(shape)
    torch.add(own.view(shape), log_prior.unsqueeze(2), out=joint)
    mixed = joint[:, 0].clone()
    for expert in range(1, shape[1]):
        torch.logaddexp(mixed, joint[:, expert], out=mixed)
    log_prob = mixed.gather(1, target.unsqueeze(1)).squeeze(1)
    losses = (smoothing - 1) * log_prob - smoothing * mixed.mean(1)
    shares = joint.sub_(mixed.unsqueeze(1)).exp_()
    column = target.view(-1, 1, 1).expand(-1, shape[1], 1)
    of_target = shares.gather(2, column).mul_(1 - smoothing)
    shares.mul_(smoothing / shape[2]).scatter_add_(2, column, of_target)
    total = shares.sum(2)
    if not with_derivative:
        return _Chunk(losses, total, None, weighted=True)
    derivative = own.exp_().mul_(total.view(-1, 1)).sub_(shares.view(flat))
    if slope is not None:
        derivative.mul_(slope)
    return _Chunk(losses, total, derivative, weighted=True)


def _add_gradients(
    gradients: MixtureGradients,
    tokens: Tensor,
    chunk: _Chunk,
    rows: Tensor,
    weight: Tensor,
    scale: Tensor,
    *,
    keep: bool,
) -> None:
    """Add a chunk's share to the gradients of the output rows, write those of its tokens."""
    assert chunk.derivative is not None
    of_experts = chunk.shares * scale.unsqueeze(1)
    if gradients.log_prior is not None:
        gradients.log_prior.index_copy_(0, tokens, -of_experts)
    row_scale = scale.unsqueeze(1).expand_as(of_experts) if chunk.weighted else of_experts
    of_rows = None if gradients.inputs is None else torch.empty_like(rows, dtype=scale.dtype)
    dense.add_gradients(
        chunk.derivative.mul_(row_scale.reshape(-1, 1)),
        rows,
        [weight],
        Gradients(of_rows, [gradients.weight], gradients.bias),
        keep=keep,
    )
    if gradients.inputs is not None and of_rows is not None:
        of_tokens = of_rows.view(len(tokens), *gradients.inputs.shape[1:])
        gradients.inputs.index_copy_(0, tokens, of_tokens)
