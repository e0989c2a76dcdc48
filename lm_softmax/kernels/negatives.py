"""The loss of targets against negatives that a batch shares, gradients on the way.

Logits `(N, S)` of N rows and S negatives are turned into the derivative of the loss in place, as in
`dense_pass`. The target's own logit comes from outside: it is a row-wise product, not a matrix one.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lm_softmax.kernels import dense, products
from lm_softmax.kernels.dense import (
    Gradients,
    Matrix,
    accumulation_dtype,
    autocast_off,
)
from lm_softmax.kernels.operations import register_derivatives, summed
from lm_softmax.kernels.workspace import workspace

NO_HIT, IGNORED = -1, -2
MASKED = -1e30  # a logit of probability 0; -inf would be nan where every negative is masked
LINEAR = 80.0  # where softplus is its argument, in float64 too


class _Gradients(NamedTuple):
    """Buffers to fill; None where no gradient is wanted."""

    of_matrix: Gradients  # hidden, rows and bias
    of_target: Tensor | None
    of_offset: Tensor | None

    def present(self) -> list[Tensor]:
        """Those that are wanted."""
        matrix = self.of_matrix
        slots = (matrix.hidden, *matrix.blocks, matrix.bias, self.of_target, self.of_offset)
        return [buffer for buffer in slots if buffer is not None]


class Negatives(NamedTuple):
    """A target's logit, and what the negatives' logits are made of."""

    of_target: Tensor  # (N,), in at least float32
    rows: Tensor  # (S, width)
    offset: Tensor  # (S,), added to the logits after the softcap
    bias: Tensor | None = None  # (S,), added before it

    def flatten(self) -> list[Tensor]:
        """All tensors, as a registered operation wants them."""
        return [tensor for tensor in self if tensor is not None]

    @classmethod
    def unflatten(cls, tensors: Sequence[Tensor], has_bias: bool) -> "Negatives":
        """The inverse of `flatten`."""
        of_target, rows, offset, *bias = tensors
        return cls(of_target, rows, offset, bias[0] if has_bias else None)


def negatives_nll(
    hidden: Tensor,
    slot: Tensor,
    negatives: Negatives,
    dtype: torch.dtype,
    softcap: float | None,
    logistic: bool,
) -> Tensor:
    """Loss of each row, `(N,)`, at least float32, 0 where ignored; backward makes logits anew.

    With `t` the target's logit and `z` the negatives', `logsumexp([t, *z]) - t`; `logistic` is
    `softplus(-t) + sum(softplus(z))` instead.

    Args:
        hidden: `(N, width)`.
        slot: `(N,)` int64: which negative takes no part, or `NO_HIT`; or `IGNORED`, of a row that
            costs nothing.
        negatives: The words to compare with.
        dtype: Of the operands of the matrix products.
        softcap: Logits become `softcap * tanh(logits / softcap)` before the offset is added.
        logistic: Whether each word is a decision of its own.
    """
    options = negatives.bias is not None, dtype, softcap, logistic
    return _token_losses(hidden, slot, negatives.flatten(), *options)


def negatives_loss(
    hidden: Tensor,
    slot: Tensor,
    negatives: Negatives,
    dtype: torch.dtype,
    softcap: float | None,
    logistic: bool,
) -> Tensor:
    """The sum of `negatives_nll`; its gradients are made in the forward pass, scaled in backward.

    A second backward through the same graph makes them anew. Double backward is refused.
    """
    options = negatives.bias is not None, dtype, softcap, logistic
    operations = _token_losses, _loss_and_gradients
    return summed(operations, hidden, slot, negatives.flatten(), options)


@torch.library.custom_op("lm_softmax::negatives_token_losses", mutates_args=())
def _token_losses(
    hidden: Tensor,
    slot: Tensor,
    parameters: Sequence[Tensor],
    has_bias: bool,
    dtype: torch.dtype,
    softcap: float | None,
    logistic: bool,
) -> Tensor:
    """Loss of each row; its backward is `_loss_and_gradients` scaled row by row."""
    negatives = Negatives.unflatten(parameters, has_bias)
    with autocast_off(hidden):
        return _losses(hidden, slot, None, negatives, dtype, softcap, logistic, None)


@torch.library.custom_op("lm_softmax::negatives_loss_and_gradients", mutates_args=())
def _loss_and_gradients(
    hidden: Tensor,
    slot: Tensor,
    scale: Tensor | None,
    parameters: Sequence[Tensor],
    needs: Sequence[bool],
    has_bias: bool,
    dtype: torch.dtype,
    softcap: float | None,
    logistic: bool,
) -> list[Tensor]:
    """The summed loss, then the gradients of `sum(scale * loss)` by hidden and each parameter.

    They are in at least float32; one that `needs` does not ask for is an empty tensor.
    """
    total_dtype = accumulation_dtype(dtype)
    buffers = [
        torch.empty(tensor.shape, dtype=total_dtype, device=tensor.device) if need else None
        for tensor, need in zip((hidden, *parameters), needs, strict=True)
    ]
    of_hidden, of_target, of_rows, of_offset, *of_bias = buffers
    of_matrix = Gradients(of_hidden, [of_rows], of_bias[0] if has_bias else None)
    gradients = _Gradients(of_matrix, of_target, of_offset)
    negatives = Negatives.unflatten(parameters, has_bias)
    with autocast_off(hidden):
        losses = _losses(hidden, slot, scale, negatives, dtype, softcap, logistic, gradients)
    return [losses.sum(), *(losses.new_empty(0) if b is None else b for b in buffers)]


register_derivatives(_token_losses, _loss_and_gradients)


def _losses(
    hidden: Tensor,
    slot: Tensor,
    scale: Tensor | None,
    negatives: Negatives,
    dtype: torch.dtype,
    softcap: float | None,
    logistic: bool,
    gradients: _Gradients | None,
) -> Tensor:
    """Loss of each row; with `gradients`, also those of `sum(scale * loss)`, written into them."""
    total_dtype, ignored = accumulation_dtype(dtype), slot == IGNORED
    if gradients is not None:
        for buffer in gradients.present():
            buffer.zero_()
    gradient_dtype = dtype if products.products_widen(hidden) else total_dtype
    blocks = [negatives.rows.to(gradient_dtype)]
    largest, one = None, hidden.new_ones((), dtype=total_dtype)
    scale = torch.where(ignored, 0, one if scale is None else scale.to(total_dtype))
    if dtype == torch.float16 and scale.numel():  # a GradScaler's factor would overflow
        largest = scale.abs().amax().clamp(min=torch.finfo(total_dtype).tiny)
        scale = scale / largest
    negatives = negatives._replace(rows=negatives.rows.to(dtype))
    derive = _derive_logistic if logistic else _derive_softmax
    losses = torch.empty(hidden.shape[0], dtype=total_dtype, device=hidden.device)
    rows = dense.chunk_rows(hidden.shape[0], negatives.rows.shape[0], total_dtype, hidden)
    for start in range(0, hidden.shape[0], rows):
        part = slice(start, start + rows)
        inputs, target = hidden[part].to(dtype), negatives.of_target[part].to(total_dtype)
        logits, slope = _logits(inputs, slot[part], negatives, softcap, gradients is not None)
        losses[part], of_target = derive(logits, target, gradients is not None)
        if gradients is not None:
            derivatives = logits, of_target, slope
            _add_gradients(derivatives, inputs, blocks, scale[part], gradients, part)
    if gradients is not None and largest is not None:
        for buffer in gradients.present():
            buffer.mul_(largest)
    return losses.masked_fill(ignored, 0)


def _add_gradients(
    derivatives: tuple[Tensor, Tensor, Tensor | None],
    inputs: Tensor,
    blocks: Sequence[Tensor],
    scale: Tensor,
    gradients: _Gradients,
    part: slice,
) -> None:
    """Add a chunk's share, given the derivatives by the logits and by the target's."""
    derivative, of_target, slope = derivatives
    derivative.mul_(scale.unsqueeze(1))
    if gradients.of_target is not None:
        torch.mul(of_target, scale, out=gradients.of_target[part])
    if gradients.of_offset is not None:
        gradients.of_offset.add_(derivative.sum(0))
    if slope is not None:
        derivative.mul_(slope)
    matrix = gradients.of_matrix
    matrix = matrix._replace(hidden=None if matrix.hidden is None else matrix.hidden[part])
    dense.add_gradients(derivative, inputs, blocks, matrix, keep=True)


def _logits(
    inputs: Tensor, slot: Tensor, negatives: Negatives, softcap: float | None, with_slope: bool
) -> tuple[Tensor, Tensor | None]:
    """Logits of a chunk in the work buffer, offset and masked; the derivative of the softcap."""
    dtype, shape = accumulation_dtype(inputs.dtype), (inputs.shape[0], negatives.rows.shape[0])
    out, slope, bias = workspace("logits", shape, inputs, dtype), None, negatives.bias
    if softcap is None:  # then the two are one
        bias = negatives.offset if bias is None else bias + negatives.offset
    dense.chunk_logits(inputs, Matrix([negatives.rows], bias), softcap, out)
    if softcap is not None:
        if with_slope:  # of tanh, 1 - tanh(a / softcap)**2
            slope = torch.div(out, softcap, out=workspace("slope", shape, inputs, dtype))
            slope.square_().neg_().add_(1)
        out.add_(negatives.offset)
    column = slot.clamp(min=0).unsqueeze(1)
    kept = out.gather(1, column)
    out.scatter_(1, column, kept.masked_fill_(slot.unsqueeze(1) >= 0, MASKED))
    return out, slope


def _derive_softmax(logits: Tensor, target: Tensor, derive: bool) -> tuple[Tensor, Tensor]:
    """Losses and their derivative by the target's logit; turns logits into theirs."""
    if not derive:
        lse = logits.logsumexp(1)
        return -F.logsigmoid(target - lse), lse
    largest = logits.amax(1)
    torch.softmax(logits, -1, out=logits)
    lse = largest - logits.amax(1).log()
    share = torch.sigmoid(lse - target)  # of the negatives in the whole
    logits.mul_(share.unsqueeze(1))
    return -F.logsigmoid(target - lse), -share


def _derive_logistic(logits: Tensor, target: Tensor, derive: bool) -> tuple[Tensor, Tensor]:
    """Losses and their derivative by the target's logit; turns logits into theirs."""
    losses = F.softplus(logits, threshold=LINEAR).sum(1) - F.logsigmoid(target)
    if derive:
        torch.sigmoid(logits, out=logits)
    return losses, -torch.sigmoid(-target)
