"""Loss of each row of logits and its derivative by them, in one Triton kernel.

A program has one row, which it reads twice. The first sweep keeps a running maximum and a running
sum of exponentials (Milakov and Gimelshein 2018, "Online normalizer calculation for softmax",
algorithm 3), the second writes the derivative. Bias, softcap, label smoothing, z-loss, the weight
of the row and the conversion to the dtype of the products that follow take part in these two
sweeps: the chain of torch operations reads and writes the logits once for each of them.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from lm_softmax.kernels.dense import Objective

COLUMNS_PER_WARP = 256  # 8 a thread: two 16-byte reads, and one write in bfloat16
# Of a row at once. 16 warps of 40 registers a thread (sm_90): three programs fit on a processor, so
# that one reads while another sums up its row, with 48 KB under way where about 14 are enough.
MOST_COLUMNS = 4096
FEWEST_COLUMNS = 128
LOWEST = tl.constexpr(-3e38)  # no logit is lower, and differences of two finite ones are no nan
SMALL = tl.constexpr(0.3)  # up to here tanh is its series, whose next term is below float32's


def softmax_losses(
    logits: Tensor,
    bias: Tensor | None,
    target: Tensor,
    objective: Objective,
    *,
    scale: Tensor | None = None,
    derivative: Tensor | None = None,
    gain: float = 1.0,
) -> Tensor:
    """Loss of each row, `(N,)` float32; nan where the target is out of range.

    Equals `F.cross_entropy(logits + bias, target, reduction="none")` with the options of
    `objective`, and writes `gain * scale` times its derivative by `logits` into `derivative`.

    Args:
        logits: `(N, V)` float32, before bias and softcap; elements of a row are adjacent.
        bias: `(V,)`, of any floating dtype.
        target: `(N,)` int64.
        objective: The loss of a row.
        scale: `(N,)` float32; None is one.
        derivative: `(N, V)` of any floating dtype, elements of a row adjacent; may be `logits`.
        gain: Factor of the derivative.
    """
    num_rows, vocab_size = logits.shape
    losses = torch.empty(num_rows, dtype=torch.float32, device=logits.device)
    if not num_rows:
        return losses
    columns = 1 << vocab_size.bit_length() - 1  # not above V: most of the row needs no mask
    columns = min(max(columns, FEWEST_COLUMNS), MOST_COLUMNS)
    softcap, smoothing, z_loss = objective
    with torch.cuda.device_of(logits):  # programs start on the current device
        _rows[(num_rows,)](
            logits,
            None if bias is None else bias.contiguous(),
            target.contiguous(),
            None if scale is None else scale.contiguous(),
            losses,
            derivative,
            logits.stride(0),
            0 if derivative is None else derivative.stride(0),
            vocab_size,
            SOFTCAP=softcap,
            SMOOTHING=smoothing,
            Z_LOSS=z_loss,
            GAIN=gain,
            COLUMNS=columns,
            num_warps=max(columns // COLUMNS_PER_WARP, 1),
        )
    return losses


@triton.jit
def _rows(
    logits,
    bias,
    target,
    scale,
    losses,
    derivative,
    stride,
    derivative_stride,
    vocab_size,
    SOFTCAP: tl.constexpr,
    SMOOTHING: tl.constexpr,
    Z_LOSS: tl.constexpr,
    GAIN: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)  # N * V exceeds 2**31
    logits += row * stride
    word = tl.load(target + row)
    known = (word >= 0) & (word < vocab_size)
    own = tl.load(logits + word, mask=known, other=float("nan"))
    if bias is not None:
        own += tl.load(bias + word, mask=known).to(tl.float32)
    if SOFTCAP is not None:
        own = _cap(own, SOFTCAP)[0]
    column = tl.arange(0, COLUMNS)
    whole = vocab_size // COLUMNS * COLUMNS  # columns that need no mask, which splits wide reads
    # each lane has a maximum and a sum of its own: lanes meet once, after the sweep
    largest = tl.full([COLUMNS], LOWEST, tl.float32)
    total = tl.zeros([COLUMNS], tl.float32)
    above = tl.zeros([COLUMNS], tl.float32)
    for start in range(0, whole, COLUMNS):
        at = start + column
        value = _values(logits, bias, at, None, SOFTCAP)[0]
        largest, total = _add(largest, total, value)
        if SMOOTHING != 0:
            above += value - own
    if whole < vocab_size:
        at = whole + column
        inside = at < vocab_size
        value = _values(logits, bias, at, inside, SOFTCAP)[0]
        if SMOOTHING != 0:
            above += tl.where(inside, value - own, 0.0)
        largest, total = _add(largest, total, tl.where(inside, value, LOWEST))
    shift = tl.max(largest, 0)
    sum_exp = tl.sum(total * tl.exp(largest - shift), 0)
    log_sum = tl.log(sum_exp)
    loss = (shift - own) + log_sum
    if SMOOTHING != 0:  # the mean of -log p is the loss less the mean lead over the target
        loss -= SMOOTHING * (tl.sum(above, 0) / vocab_size)
    factor = 1.0
    if Z_LOSS != 0:
        lse = shift + log_sum
        loss += Z_LOSS * lse * lse
        factor = 1.0 + 2.0 * Z_LOSS * lse
    tl.store(losses + row, loss)
    if derivative is not None:
        derivative += row * derivative_stride
        weight = GAIN
        if scale is not None:
            weight *= tl.load(scale + row)
        factor = factor * weight / sum_exp
        smooth = weight * SMOOTHING / vocab_size
        hit = weight * (1.0 - SMOOTHING)
        # backwards: the end of the row is what the cache still holds
        if whole < vocab_size:
            at = whole + column
            inside = at < vocab_size
            value, slope = _values(logits, bias, at, inside, SOFTCAP)
            slope *= tl.exp(value - shift) * factor - smooth - tl.where(at == word, hit, 0.0)
            tl.store(derivative + at, slope.to(derivative.dtype.element_ty), mask=inside)
        for block in range(whole // COLUMNS):
            at = whole - (block + 1) * COLUMNS + column
            value, slope = _values(logits, bias, at, None, SOFTCAP)
            slope *= tl.exp(value - shift) * factor - smooth - tl.where(at == word, hit, 0.0)
            tl.store(derivative + at, slope.to(derivative.dtype.element_ty))


@triton.jit
def _values(logits, bias, at, inside, SOFTCAP: tl.constexpr):
    """Logits of some columns with bias and softcap, and the slope of the softcap."""
    value = tl.load(logits + at, mask=inside)
    if bias is not None:
        value += tl.load(bias + at, mask=inside).to(tl.float32)
    slope = 1.0
    if SOFTCAP is not None:
        value, slope = _cap(value, SOFTCAP)
    return value, slope


@triton.jit
def _cap(value, SOFTCAP: tl.constexpr):
    """`softcap * tanh(value / softcap)` and its derivative.

    Triton has no tanh, and `(1 - e) / (1 + e)` with `e = exp(-2 x)` loses digits near 0.
    """
    signed = value * (1.0 / SOFTCAP)
    x = tl.abs(signed)
    decay = tl.exp(-2.0 * x)
    share = 1.0 / (1.0 + decay)
    square = x * x
    series = -17.0 / 315 + square * (62.0 / 2835 - square * (1382.0 / 155925))
    series = x + x * square * (-1.0 / 3 + square * (2.0 / 15 + square * series))
    capped = SOFTCAP * tl.where(x < SMALL, series, (1.0 - decay) * share)
    return tl.where(signed < 0, -capped, capped), 4.0 * decay * share * share


@triton.jit
def _add(largest, total, value):
    """Running maxima, and sums of exponentials relative to them, one exponential a value."""
    step = value - largest
    shrunk = tl.exp(-tl.abs(step))
    total = tl.where(step > 0, total * shrunk + 1.0, total + shrunk)
    return tl.maximum(largest, value), total
