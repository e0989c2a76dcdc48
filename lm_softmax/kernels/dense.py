"""Terms of a softmax over output rows, and a chunk of tokens: logits, losses, gradients."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from importlib.util import find_spec
from typing import NamedTuple

import torch
from torch import Tensor

from lm_softmax.kernels import products
from lm_softmax.kernels.workspace import aligned_rows, reads_are_cheap, workspace

CHUNK_BYTES = 64 * 2**20  # of logits: smaller chunks make the matrix products slower
MIN_CHUNK_ROWS = 64  # below this the matrix products are bound by reading the weights
TILE_ROWS = 128  # of a matrix product on a GPU: a chunk that ends inside of one wastes the rest
FEW_LOGITS = 2**16  # that as few calls as can be are the fastest way to
UNDERFLOW = 1e-30  # a float32 probability below this no longer tells its logarithm


class Objective(NamedTuple):
    """What a row costs, given its logits `a` or, with softcap, `softcap * tanh(a / softcap)`.

    `(1 - label_smoothing) * nll + label_smoothing * mean over words of -log p + z_loss * lse**2`.
    """

    softcap: float | None = None
    label_smoothing: float = 0.0
    z_loss: float = 0.0


class Matrix(NamedTuple):
    """The output rows of one softmax: blocks of `(rows, width)` in the order of their ids."""

    blocks: Sequence[Tensor]
    bias: Tensor | None

    @property
    def num_rows(self) -> int:
        """Number of words (and clusters) that the softmax is over."""
        return sum(block.shape[0] for block in self.blocks)


class Gradients(NamedTuple):
    """Buffers that `dense_pass` fills; None where no gradient is wanted."""

    hidden: Tensor | None
    blocks: Sequence[Tensor | None]
    bias: Tensor | None

    @property
    def none_wanted(self) -> bool:
        """No buffer at all: frozen parameters under a frozen encoder."""
        return all(buffer is None for buffer in (self.hidden, *self.blocks, self.bias))


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """At least float32: losses, log-probabilities and gradients are summed in it."""
    return dtype if dtype == torch.float32 else torch.promote_types(dtype, torch.float32)


def product_dtype(hidden: Tensor, weight: Tensor) -> torch.dtype:
    """Of the operands of the matrix products: autocast's if it is on, else the wider of the two.

    float64 stays what it is. fp16 becomes float32 on a CPU, which multiplies it 2 to 10 times
    slower (operands 512 and 32 wide).
    """
    dtype, device = hidden.dtype, hidden.device.type
    if dtype != weight.dtype:
        dtype = torch.promote_types(dtype, weight.dtype)
    if _autocasts(device) and dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device)
    return torch.float32 if dtype == torch.float16 and device == "cpu" else dtype


def autocast_off(like: Tensor) -> AbstractContextManager[object]:
    """Inside, operations keep the dtypes they are given, on devices that have no autocast too."""
    device = like.device.type
    return torch.autocast(device, enabled=False) if _autocasts(device) else nullcontext()


def _autocasts(device: str) -> bool:
    return torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)


@cache
def _has_triton() -> bool:
    return find_spec("triton") is not None


def fuses(like: Tensor) -> bool:
    """Whether one Triton kernel makes losses and derivatives of float32 logits on this device."""
    return like.is_cuda and _has_triton()


def chunk_rows(
    num_rows: int, vocab_size: int, dtype: torch.dtype, like: Tensor | None = None
) -> int:
    """Rows per chunk: about `CHUNK_BYTES` of logits; on a CPU in chunks of equal size.

    Products of half as many rows take a CPU much more than half the time. So a few rows too many do
    not make two chunks there: one holds half as much again at most.

    An accelerator reads and writes the weights' gradient once a chunk, 8 bytes a weight, and moves
    about 16 bytes a logit. From as many rows as the matrix is wide the logits outweigh the weights,
    and the chunk takes no more memory than that gradient. So a chunk there has at least so many.

    Args:
        num_rows: Of all chunks.
        vocab_size: Columns.
        dtype: Of the logits.
        like: `(*, width)`, what the matrix multiplies; None is on a CPU.
    """
    most = max(CHUNK_BYTES // (vocab_size * dtype.itemsize), MIN_CHUNK_ROWS)
    if like is not None and not reads_are_cheap(like):
        most = max(most, like.shape[-1])
        most = most // TILE_ROWS * TILE_ROWS or most
        return max(min(num_rows, most), 1)
    spare = most // 2 if most > MIN_CHUNK_ROWS else most - 1
    num_chunks = max((num_rows + spare) // most, 1)
    return max(-(-num_rows // num_chunks), 1)


def dense_logits(rows: Tensor, matrix: Matrix, softcap: float | None) -> Tensor:
    """Logits that may be overwritten; products are of the dtype of `rows`."""
    dtype, num_words = accumulation_dtype(rows.dtype), matrix.num_rows
    blocks = [block.to(rows.dtype) for block in matrix.blocks]
    few = rows.dtype == dtype and rows.shape[0] * num_words <= FEW_LOGITS
    if few and all(products.way_of(rows, block) == "mm" for block in blocks):
        return _capped(products.linears(rows, blocks, matrix.bias), softcap)
    out = workspace("logits", (rows.shape[0], num_words), rows, dtype)
    return chunk_logits(rows, Matrix(blocks, matrix.bias), softcap, out)


def chunk_logits(inputs: Tensor, matrix: Matrix, softcap: float | None, out: Tensor) -> Tensor:
    """Logits of a chunk written into `out`."""
    start = 0
    for block in matrix.blocks:  # one by one: those of a product code share their memory
        part, bias, num_words = out, matrix.bias, block.shape[0]
        if num_words != out.shape[1]:  # narrow takes half as long as an index
            part = out.narrow(1, start, num_words)
            bias = None if bias is None else bias.narrow(0, start, num_words)
        if bias is not None and block.dtype == out.dtype:
            products.linear_into(part, inputs, block, bias.to(out.dtype))
        else:
            products.linear_into(part, inputs, block, None)
            if bias is not None:
                part.add_(bias)
        start += num_words
    return _capped(out, softcap)


def _capped(logits: Tensor, softcap: float | None) -> Tensor:
    """Overwrites them."""
    return logits if softcap is None else logits.div_(softcap).tanh_().mul_(softcap)


def row_losses(
    inputs: Tensor,
    matrix: Matrix,
    target: Tensor,
    objective: Objective,
    *,
    with_derivative: bool,
    scale: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Loss of each row, and the derivative of `scale * loss` by its logits in the work buffer.

    Args:
        inputs: `(N, width)`, of the dtype of the matrix.
        matrix: Output rows, V in all.
        target: `(N,)`, each in `[0, V)`.
        objective: The loss of a row.
        with_derivative: Whether it is wanted.
        scale: `(N,)`; None is one.
        dtype: Of the derivative, which in fp16 is multiplied by its gain; None is that of the loss.
    """
    total_dtype, shape = accumulation_dtype(inputs.dtype), (inputs.shape[0], matrix.num_rows)
    dtype = total_dtype if dtype is None else dtype
    if total_dtype == torch.float32 and fuses(inputs):
        return _fused_losses(inputs, matrix, target, objective, with_derivative, scale, dtype)
    logits = workspace("logits", shape, inputs, total_dtype)
    softcap, smoothing, z_loss = objective
    chunk_logits(inputs, matrix, softcap, logits)
    slope = None
    if softcap is not None and with_derivative:  # of tanh, 1 - tanh(a / softcap)**2
        slope = torch.div(logits, softcap, out=workspace("slope", shape, inputs, total_dtype))
        slope.square_().neg_().add_(1)
    column = target.unsqueeze(1)
    target_logit = logits.gather(1, column).squeeze(1)
    mean_logit = logits.mean(1) if smoothing else None
    nll = _softmax_in_place(logits, column, target_logit, inputs, matrix, softcap)
    lse, loss = target_logit + nll, nll
    if mean_logit is not None:
        loss = (1 - smoothing) * nll + smoothing * (lse - mean_logit)
    if z_loss:
        loss = loss + z_loss * lse.square()
    if not with_derivative:
        return loss, None
    if z_loss:
        logits.mul_((1 + 2 * z_loss * lse).unsqueeze(1))
    if smoothing:
        logits.sub_(smoothing / shape[1])
    logits.scatter_add_(1, column, logits.new_full(column.shape, smoothing - 1))
    if slope is not None:
        logits.mul_(slope)
    if scale is not None:
        logits.mul_(scale.unsqueeze(1))
    return loss, products.operand(logits, dtype)


def _fused_losses(
    inputs: Tensor,
    matrix: Matrix,
    target: Tensor,
    objective: Objective,
    with_derivative: bool,
    scale: Tensor | None,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor | None]:
    """`row_losses` in float32, all but the product in one kernel.

    A derivative of lower precision has a buffer of its own: written over the logits, it would meet
    some that other threads have yet to read.
    """
    from lm_softmax.kernels.softmax_triton import softmax_losses

    shape = (inputs.shape[0], matrix.num_rows)
    logits = aligned_rows(shape, inputs, torch.float32)
    chunk_logits(inputs, matrix._replace(bias=None), None, logits)
    derivative = None
    if with_derivative:
        derivative = logits if dtype == logits.dtype else aligned_rows(shape, inputs, dtype)
    losses = softmax_losses(
        logits,
        matrix.bias,
        target,
        objective,
        scale=scale,
        derivative=derivative,
        gain=products.gain_of(dtype),
    )
    return losses, derivative


def _softmax_in_place(
    logits: Tensor,
    column: Tensor,
    target_logit: Tensor,
    inputs: Tensor,
    matrix: Matrix,
    softcap: float | None,
) -> Tensor:
    """Turn logits into probabilities; returns the negative log-probability of each target.

    The fused softmax reads a row while it is in the cache, 2.5 times faster than subtract, exp and
    sum one by one. Where the probability underflows, its logarithm comes from the log-sum-exp: of
    the logits made anew on a CPU, elsewhere of the logit and the probability of the most probable
    word, which needs no look at the values.
    """
    if reads_are_cheap(logits):
        torch.softmax(logits, -1, out=logits)
        probability = logits.gather(1, column).squeeze(1)
        nll, lost = -probability.log(), probability < UNDERFLOW
        if lost.any():
            again = chunk_logits(inputs[lost], matrix, softcap, torch.empty_like(logits[lost]))
            nll[lost] = torch.logsumexp(again, 1) - target_logit[lost]
        return nll
    largest = logits.amax(1)
    torch.softmax(logits, -1, out=logits)
    probability = logits.gather(1, column).squeeze(1)
    lse = largest - logits.amax(1).log()
    return torch.where(probability < UNDERFLOW, lse - target_logit, -probability.log())


def add_gradients(
    derivative: Tensor,
    inputs: Tensor,
    blocks: Sequence[Tensor],
    gradients: Gradients,
    *,
    keep: bool,
) -> None:
    """Add a chunk's share to the gradients of the matrix (or overwrite them), write hidden's.

    Args:
        derivative: `(N, V)`, of the loss by the logits, of the dtype of the blocks or as precise as
            the gradients; as an operand it holds its gain.
        inputs: `(N, width)`.
        blocks: Output rows, of the dtype of the products.
        gradients: Buffers.
        keep: Whether to add to those of the matrix.
    """
    dtype = blocks[0].dtype
    left, rows = products.operand(derivative, dtype), inputs.to(dtype)
    gain = products.gain_of(dtype)
    if gradients.bias is not None:
        of_bias = left.sum(0, dtype=gradients.bias.dtype).div_(gain)
        gradients.bias.add_(of_bias) if keep else gradients.bias.copy_(of_bias)
    start = 0
    for index, (block, buffer) in enumerate(zip(blocks, gradients.blocks, strict=True)):
        columns = left[:, start : start + block.shape[0]]
        if gradients.hidden is not None:
            products.accumulate(gradients.hidden, columns, block, keep=index > 0, alpha=1 / gain)
        if buffer is not None:
            products.accumulate(buffer, columns.t(), rows, keep=keep, alpha=1 / gain)
        start += block.shape[0]
