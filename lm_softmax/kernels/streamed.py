"""The loss of a softmax whose output rows are a product code, rebuilt chunk by chunk.

Neither the `(N, V)` logits nor the `(V, width)` rows exist as a whole. The logits of a chunk of
tokens are written into a work buffer, a chunk of words at a time; they become probabilities and
then derivatives in place, and the rows are rebuilt once more to multiply them.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lm_softmax.kernels import dense, products
from lm_softmax.kernels.codes import ProductCode, RowChunks
from lm_softmax.kernels.dense import (
    Matrix,
    Objective,
    accumulation_dtype,
    autocast_off,
    product_dtype,
)
from lm_softmax.kernels.operations import register_derivatives, summed
from lm_softmax.kernels.workspace import reads_are_cheap, workspace


class Streamed(NamedTuple):
    """The output rows of a softmax as a product code.

    `latent` takes no part in the loss: where it is given, the gradient of the rows is its gradient.
    """

    code: ProductCode
    bias: Tensor | None  # (V,)
    latent: Tensor | None = None  # (V, width)

    def flatten(self) -> list[Tensor]:
        """All tensors in a fixed order, as a registered operation wants them."""
        tensors = [self.code.centroids, self.bias, self.latent, self.code.codes]
        return [tensor for tensor in tensors if tensor is not None]

    @classmethod
    def unflatten(cls, tensors: Sequence[Tensor], has_bias: bool) -> "Streamed":
        """The inverse of `flatten`."""
        centroids, *rest, codes = tensors
        bias = rest.pop(0) if has_bias else None
        return cls(ProductCode(centroids, codes), bias, rest[0] if rest else None)


class _Buffers(NamedTuple):
    """Gradients to fill; None where none is wanted."""

    hidden: Tensor | None
    centroids: Tensor | None
    bias: Tensor | None
    latent: Tensor | None

    @classmethod
    def unflatten(cls, tensors: Sequence[Tensor | None], has_bias: bool) -> "_Buffers":
        """From those of hidden and of `Streamed.flatten`."""
        hidden, centroids, *rest = tensors[:-1]  # codes have none
        bias = rest.pop(0) if has_bias else None
        return cls(hidden, centroids, bias, rest[0] if rest else None)


class _RowMatrix(Matrix):
    """Whose blocks are rebuilt when they are asked for."""

    @property
    def num_rows(self) -> int:
        """Number of words, without rebuilding any."""
        assert isinstance(self.blocks, RowChunks)
        return self.blocks.code.num_rows


def streamed_nll(
    hidden: Tensor,
    target: Tensor,
    streamed: Streamed,
    objective: Objective | None = None,
    ignore_index: int = -100,
) -> Tensor:
    """Loss of each token, `(N,)`, at least float32, 0 where ignored; backward computes logits anew.

    Equals `F.cross_entropy(F.linear(hidden, rows, bias), target, reduction="none")` with the rows
    of the code and the options of `objective`.

    Args:
        hidden: `(N, width)`.
        target: `(N,)` int64, in `[0, V)` or `ignore_index`.
        streamed: The parameters.
        objective: The loss of a row; the negative log-likelihood by default.
        ignore_index: Target of positions that count for nothing.
    """
    options = _options(hidden, streamed, objective, ignore_index)
    return _streamed_token_losses(hidden, target, streamed.flatten(), *options)


def streamed_loss(
    hidden: Tensor,
    target: Tensor,
    streamed: Streamed,
    objective: Objective | None = None,
    ignore_index: int = -100,
) -> Tensor:
    """The sum of `streamed_nll`; its gradients are made in the forward pass, scaled in backward.

    A second backward through the same graph makes them anew. Double backward is refused.
    """
    options = _options(hidden, streamed, objective, ignore_index)
    operations = _streamed_token_losses, _streamed_loss_and_gradients
    return summed(operations, hidden, target, streamed.flatten(), options)


def _options(
    hidden: Tensor, streamed: Streamed, objective: Objective | None, ignore_index: int
) -> tuple[bool, torch.dtype, int, float | None, float, float]:
    dtype = product_dtype(hidden, streamed.code.centroids)
    return streamed.bias is not None, dtype, ignore_index, *(objective or Objective())


@torch.library.custom_op("lm_softmax::streamed_token_losses", mutates_args=())
def _streamed_token_losses(
    hidden: Tensor,
    target: Tensor,
    parameters: Sequence[Tensor],
    has_bias: bool,
    dtype: torch.dtype,
    ignore_index: int,
    softcap: float | None,
    label_smoothing: float,
    z_loss: float,
) -> Tensor:
    """Loss of each token; its backward is `_streamed_loss_and_gradients` scaled by token."""
    streamed = Streamed.unflatten(parameters, has_bias)
    objective = Objective(softcap, label_smoothing, z_loss)
    with autocast_off(hidden):
        return _losses(hidden, target, None, streamed, dtype, ignore_index, objective, None)


@torch.library.custom_op("lm_softmax::streamed_loss_and_gradients", mutates_args=())
def _streamed_loss_and_gradients(
    hidden: Tensor,
    target: Tensor,
    scale: Tensor | None,
    parameters: Sequence[Tensor],
    needs: Sequence[bool],
    has_bias: bool,
    dtype: torch.dtype,
    ignore_index: int,
    softcap: float | None,
    label_smoothing: float,
    z_loss: float,
) -> list[Tensor]:
    """The summed loss, then the gradients of `sum(scale * loss)` by hidden and each parameter."""
    streamed = Streamed.unflatten(parameters, has_bias)
    objective = Objective(softcap, label_smoothing, z_loss)
    total_dtype = accumulation_dtype(dtype)
    made = [
        torch.zeros(tensor.shape if need else 0, dtype=total_dtype, device=hidden.device)
        for tensor, need in zip((hidden, *parameters), needs, strict=True)
    ]
    wanted = [tensor if need else None for tensor, need in zip(made, needs, strict=True)]
    buffers = _Buffers.unflatten(wanted, has_bias)
    with autocast_off(hidden):
        losses = _losses(hidden, target, scale, streamed, dtype, ignore_index, objective, buffers)
    return [losses.sum(), *made]


register_derivatives(_streamed_token_losses, _streamed_loss_and_gradients)


def _losses(
    hidden: Tensor,
    target: Tensor,
    scale: Tensor | None,
    streamed: Streamed,
    dtype: torch.dtype,
    ignore_index: int,
    objective: Objective,
    buffers: _Buffers | None,
) -> Tensor:
    """Loss of each token; `buffers` of zeros get the gradients."""
    ignored = target == ignore_index
    if not reads_are_cheap(target):  # rows to ignore weigh nothing
        one = hidden.new_ones((), dtype=accumulation_dtype(dtype)) if scale is None else scale
        losses = _pass(
            hidden.masked_fill(ignored.unsqueeze(1), 0),
            target.masked_fill(ignored, 0),
            torch.where(ignored, 0, one),
            streamed,
            dtype,
            objective,
            buffers,
        )
        return losses.masked_fill(ignored, 0)
    if not ignored.any():
        return _pass(hidden, target, scale, streamed, dtype, objective, buffers)
    tokens = (~ignored).nonzero().squeeze(1)
    own = buffers
    if buffers is not None and buffers.hidden is not None:
        own = buffers._replace(hidden=buffers.hidden.new_zeros(len(tokens), hidden.shape[1]))
    kept_scale = None if scale is None else scale[tokens]
    arguments = hidden[tokens], target[tokens], kept_scale, streamed, dtype, objective, own
    losses = _pass(*arguments)
    if buffers is not None and buffers.hidden is not None and own is not None:
        assert own.hidden is not None
        buffers.hidden.index_copy_(0, tokens, own.hidden)
    return losses.new_zeros(target.shape).index_copy_(0, tokens, losses)


def _pass(
    hidden: Tensor,
    target: Tensor,
    scale: Tensor | None,
    streamed: Streamed,
    dtype: torch.dtype,
    objective: Objective,
    buffers: _Buffers | None,
) -> Tensor:
    """The loss of each row and the gradients of `sum(scale * loss)`, in chunks of tokens."""
    total_dtype = accumulation_dtype(dtype)
    if buffers is not None and all(buffer is None for buffer in buffers):
        buffers = None
    chunks = RowChunks(streamed.code, dtype)
    matrix = _RowMatrix(chunks, streamed.bias)
    if not products.products_widen(hidden) and buffers is not None and dtype != total_dtype:
        chunks = RowChunks(streamed.code, total_dtype)  # as gradients are summed over chunks
    losses = torch.empty(hidden.shape[0], dtype=total_dtype, device=hidden.device)
    largest = None
    if scale is not None:
        scale = scale.to(total_dtype)
        if dtype == torch.float16 and scale.numel():  # a GradScaler's factor would overflow
            largest = scale.abs().amax().clamp(min=torch.finfo(total_dtype).tiny)
            scale = scale / largest
    size = dense.chunk_rows(hidden.shape[0], matrix.num_rows, total_dtype, hidden)
    for start in range(0, hidden.shape[0], size):
        part = slice(start, start + size)
        inputs = hidden[part].to(dtype)
        losses[part], derivative = dense.row_losses(
            inputs,
            matrix,
            target[part],
            objective,
            with_derivative=buffers is not None,
            scale=None if scale is None else scale[part],
            dtype=chunks.table.dtype,
        )
        if buffers is not None and derivative is not None:
            of_hidden = None if buffers.hidden is None else buffers.hidden[part]
            _add_gradients(derivative, inputs, chunks, buffers._replace(hidden=of_hidden))
    if buffers is not None:
        if buffers.latent is not None and buffers.centroids is not None:
            for rows in chunks.slices:
                streamed.code.add_rows(rows, buffers.latent[rows], buffers.centroids)
        for buffer in buffers:
            if buffer is not None and largest is not None:
                buffer.mul_(largest)
    return losses


def _add_gradients(
    derivative: Tensor, inputs: Tensor, chunks: RowChunks, buffers: _Buffers
) -> None:
    """Add what the derivatives of some tokens by all logits give, a chunk of words at a time.

    The derivative is of the dtype of the chunks, and holds its gain.
    With a latent matrix the centroids' gradient is left out: it is summed from the latent's.
    """
    tokens, gain = inputs.to(derivative.dtype), products.gain_of(derivative.dtype)
    if buffers.bias is not None:
        buffers.bias.add_(derivative.sum(0, dtype=buffers.bias.dtype), alpha=1 / gain)
    for index, part in enumerate(chunks.slices):
        columns = derivative[:, part]
        if buffers.hidden is not None:
            products.accumulate(buffers.hidden, columns, chunks[index], keep=True, alpha=1 / gain)
        if buffers.latent is not None:
            of_rows = buffers.latent[part]
            products.accumulate(of_rows, columns.t(), tokens, keep=True, alpha=1 / gain)
        elif buffers.centroids is not None:
            shape = columns.shape[1], inputs.shape[1]
            of_rows = workspace("of_rows", shape, inputs, buffers.centroids.dtype)
            products.accumulate(of_rows, columns.t(), tokens, keep=False, alpha=1 / gain)
            chunks.code.add_rows(part, of_rows, buffers.centroids)
