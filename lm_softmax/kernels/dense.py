"""One softmax over stacked blocks of output rows, in chunks of tokens, gradients on the way.

The `(N, V)` matrix of logits never exists as a whole. A chunk of it is written into a work buffer,
turned into probabilities in place, then into the derivative of the loss by the logits in place,
and multiplied into the gradients of hidden and weight before the next chunk overwrites it.
"""

import threading
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
from torch import Tensor

CHUNK_BYTES = 64 * 2**20  # of logits: smaller chunks make the matrix products slower
MIN_CHUNK_ROWS = 64  # below this the matrix products are bound by reading the weights
WORD_BLOCK = 2048  # a product into 100,000 columns at once takes a CPU 1.5 times as long
FP16_GAIN = 256.0  # lifts small probabilities out of fp16's subnormals; undone in float32
UNDERFLOW = 1e-30  # a float32 probability below this no longer tells its logarithm


class _Buffers(threading.local):
    """Work buffers of one thread, by name and dtype."""

    def __init__(self) -> None:
        self.held: dict[tuple[str, torch.dtype], Tensor] = {}


_buffers = _Buffers()


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
    return torch.promote_types(dtype, torch.float32)


def product_dtype(hidden: Tensor, weight: Tensor) -> torch.dtype:
    """Of the operands of the matrix products: autocast's if it is on, else the wider of the two.

    float64 stays what it is. fp16 becomes float32 on a CPU, which multiplies it 2 to 10 times
    slower (operands 512 and 32 wide).
    """
    dtype = torch.promote_types(hidden.dtype, weight.dtype)
    device = hidden.device.type
    has_autocast = torch.amp.is_autocast_available(device)
    if has_autocast and torch.is_autocast_enabled(device) and dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device)
    return torch.float32 if dtype == torch.float16 and device == "cpu" else dtype


def autocast_off(like: Tensor) -> AbstractContextManager[object]:
    """Inside, operations keep the dtypes they are given, on devices that have no autocast too."""
    device = like.device.type
    if not torch.amp.is_autocast_available(device):
        return nullcontext()
    return torch.autocast(device, enabled=False)


def reads_are_cheap(like: Tensor) -> bool:
    """Whether the host may look at values, and keep memory, without a device that waits for it."""
    return like.is_cpu


def chunk_rows(num_rows: int, vocab_size: int, dtype: torch.dtype) -> int:
    """Rows per chunk, all of about equal size: at most `CHUNK_BYTES` of logits."""
    most = max(CHUNK_BYTES // (vocab_size * dtype.itemsize), MIN_CHUNK_ROWS)
    return max(-(-num_rows // max(-(-num_rows // most), 1)), 1)


def workspace(name: str, shape: Sequence[int], like: Tensor, dtype: torch.dtype) -> Tensor:
    """An uninitialised buffer; on a CPU the same memory at each call of a thread.

    There the allocator returns a block of this size when it is freed, and the next one pays for
    fresh pages; the allocators of other devices keep their memory.
    """
    if not reads_are_cheap(like):
        return torch.empty(shape, dtype=dtype, device=like.device)
    size = shape[0] * shape[1]
    held = _buffers.held.get((name, dtype))
    if held is None or held.numel() < size:
        with torch.inference_mode(False):  # else it could be written inside of that mode only
            held = _buffers.held[name, dtype] = torch.empty(size, dtype=dtype)
    return held[:size].view(*shape)


def dense_pass(
    hidden: Tensor,
    matrix: Matrix,
    target: Tensor,
    objective: Objective,
    dtype: torch.dtype,
    *,
    scale: Tensor | None = None,
    gradients: Gradients | None = None,
) -> Tensor:
    """Loss of each row; with `gradients`, also those of `sum(scale * loss)`, written into them.

    Equals `F.cross_entropy(F.linear(hidden, torch.cat(blocks), bias), target, reduction="none")`
    with the options of `objective`.

    Args:
        hidden: `(N, width)`.
        matrix: Output rows, V in all.
        target: `(N,)`, each in `[0, V)`.
        objective: The loss of a row.
        dtype: Of the operands of the matrix products; sums are kept in at least float32.
        scale: `(N,)`, weight of each row in the gradients; None is one.
        gradients: Buffers of at least float32, shaped like what they belong to.
    """
    total_dtype = accumulation_dtype(dtype)
    if gradients is not None and gradients.none_wanted:
        gradients = None
    rounded = Matrix([block.to(dtype) for block in matrix.blocks], matrix.bias)
    gradient_dtype = dtype if products_widen(hidden) else total_dtype
    blocks = [block.to(gradient_dtype) for block in matrix.blocks] if gradients else []
    loss = torch.empty(hidden.shape[0], dtype=total_dtype, device=hidden.device)
    largest = None
    if scale is not None:
        scale = scale.to(total_dtype)
        if dtype == torch.float16 and scale.numel():  # a GradScaler's factor would overflow
            largest = scale.abs().amax().clamp(min=torch.finfo(total_dtype).tiny)
            scale = scale / largest
    rows = chunk_rows(hidden.shape[0], matrix.num_rows, total_dtype)
    for start in range(0, hidden.shape[0], rows):
        part = slice(start, start + rows)
        inputs = hidden[part].to(dtype)
        loss[part], derivative = row_losses(
            inputs, rounded, target[part], objective, with_derivative=gradients is not None
        )
        if gradients is not None and derivative is not None:
            own_scale = None if scale is None else scale[part].unsqueeze(1)
            of_chunk = gradients._replace(
                hidden=None if gradients.hidden is None else gradients.hidden[part]
            )
            add_gradients(derivative, inputs, blocks, own_scale, of_chunk, keep=start > 0)
    if gradients is not None:
        for buffer in (gradients.hidden, *gradients.blocks, gradients.bias):
            if buffer is not None and hidden.shape[0] == 0:
                buffer.zero_()
            elif buffer is not None and largest is not None:
                buffer.mul_(largest)
    return loss


def chunk_logits(inputs: Tensor, matrix: Matrix, softcap: float | None, out: Tensor) -> Tensor:
    """Logits of a chunk written into `out`."""
    start = 0
    for block in matrix.blocks:
        for rows in block.split(WORD_BLOCK) if reads_are_cheap(inputs) else [block]:
            words = slice(start, start + rows.shape[0])
            bias = None if matrix.bias is None else matrix.bias[words]
            if rows.dtype != out.dtype:
                out[:, words] = _product(inputs, rows.t(), out.dtype)
                if bias is not None:
                    out[:, words].add_(bias)
            elif bias is None:
                torch.mm(inputs, rows.t(), out=out[:, words])
            else:
                torch.addmm(bias.to(out.dtype), inputs, rows.t(), out=out[:, words])
            start = words.stop
    return out if softcap is None else out.div_(softcap).tanh_().mul_(softcap)


def products_widen(like: Tensor) -> bool:
    """Whether products of low-precision operands are returned in float32, as they are summed.

    A CPU rounds them. That does for logits, but gradients are summed over chunks and scaled
    afterwards, so there their operands are float32.
    """
    return like.is_cuda


def _product(left: Tensor, right: Tensor, dtype: torch.dtype) -> Tensor:
    """Matrix product of low-precision operands as `dtype`."""
    if left.is_cuda:
        return torch.mm(left, right, out_dtype=dtype)
    if left.dtype == torch.float16:  # slow on a CPU, and soon beyond 65504
        return torch.mm(left.to(dtype), right.to(dtype))
    shape = (left.shape[0], right.shape[1])
    return torch.mm(left, right, out=workspace("product", shape, left, left.dtype))


def row_losses(
    inputs: Tensor, matrix: Matrix, target: Tensor, objective: Objective, *, with_derivative: bool
) -> tuple[Tensor, Tensor | None]:
    """Loss of each row, and its derivative by the logits in the work buffer."""
    softcap, smoothing, z_loss = objective
    dtype, shape = accumulation_dtype(inputs.dtype), (inputs.shape[0], matrix.num_rows)
    logits = chunk_logits(inputs, matrix, softcap, workspace("logits", shape, inputs, dtype))
    slope = None
    if softcap is not None and with_derivative:  # of tanh, 1 - tanh(a / softcap)**2
        slope = torch.div(logits, softcap, out=workspace("slope", shape, inputs, dtype))
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
    return loss, logits if slope is None else logits.mul_(slope)


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
    scale: Tensor | None,
    gradients: Gradients,
    *,
    keep: bool,
) -> None:
    """Add a chunk's share to the gradients of the matrix (or overwrite them), write hidden's.

    The products are of the dtype of `blocks`.
    """
    if scale is not None:
        derivative.mul_(scale)
    if gradients.bias is not None:
        of_bias = derivative.sum(0)
        gradients.bias.add_(of_bias) if keep else gradients.bias.copy_(of_bias)
    dtype = blocks[0].dtype
    gain = FP16_GAIN if dtype == torch.float16 else 1.0
    left = derivative if dtype == derivative.dtype else (derivative * gain).to(dtype)
    rows = inputs.to(dtype)
    start = 0
    for index, (block, buffer) in enumerate(zip(blocks, gradients.blocks, strict=True)):
        columns = left[:, start : start + block.shape[0]]
        if gradients.hidden is not None:
            accumulate(gradients.hidden, columns, block, keep=index > 0, alpha=1 / gain)
        if buffer is not None:
            accumulate(buffer, columns.t(), rows, keep=keep, alpha=1 / gain)
        start += block.shape[0]


def accumulate(out: Tensor, left: Tensor, right: Tensor, *, keep: bool, alpha: float) -> None:
    """`out = alpha * left @ right`, plus what it held with `keep`."""
    if left.dtype == out.dtype:
        torch.addmm(out, left, right, beta=int(keep), alpha=alpha, out=out)
    elif keep:
        out.add_(_product(left, right, out.dtype), alpha=alpha)
    else:
        torch.mul(_product(left, right, out.dtype), alpha, out=out)
