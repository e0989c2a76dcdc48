"""One softmax over the rows of a matrix, a block of its words at a time, as a CPU likes it.

The logits of a block lie in one piece, `(N, words)`: the product that makes them, the softmax over
them and the products that take their derivative to the gradients find them in the cache, and write
no rows of a wider matrix. A block's softmax is over its own words. Its share of the whole is known
when all blocks are there, and is one factor a row that the small operands of the last products
take.
"""

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from lm_softmax.kernels import products
from lm_softmax.kernels.dense import (
    UNDERFLOW,
    Gradients,
    Matrix,
    Objective,
    accumulation_dtype,
)
from lm_softmax.kernels.workspace import workspace

BLOCK_VALUES = 2**20  # logits of a block: more leave the cache, or have glibc give pages back
MIN_BLOCK_WORDS = 2048  # fewer make products slow
STEP_OF_WORDS = 256  # an odd number of steps: words of other rows then lie in other sets of a cache
LEAST_SHARE = 1e-20  # of a block in its row: its inverse is finite, and so is it, weighted


class Block(NamedTuple):
    """Words that lie in one block of a matrix."""

    number: int  # of the matrix's block
    rows: slice  # of that block
    words: slice  # of the softmax


class Derivative(NamedTuple):
    """Of a loss by logits: that by the words of block i is `share[i][:, None] * parts[i]`.

    Rows may follow that only fill a product up; they have no share.
    """

    inputs: Tensor  # (N, width), what the matrix was multiplied with
    blocks: Sequence[Block]
    parts: Sequence[Tensor]  # (N, words of the block) each
    share: Tensor  # (blocks, N)


class _Normaliser(NamedTuple):
    """Of the rows of a softmax."""

    peak: Tensor  # (N,): largest logit
    log_total: Tensor  # (N,): of the exponentials of what logits are above it
    log_share: Tensor  # (blocks, N): of a row's blocks


def cut(matrix: Matrix, num_rows: int) -> list[Block]:
    """The words of a matrix in the order of their ids, in blocks for so many rows of logits."""
    num_steps = max(BLOCK_VALUES // max(num_rows, 1), MIN_BLOCK_WORDS) // STEP_OF_WORDS
    size = ((num_steps - 1) | 1) * STEP_OF_WORDS
    found, first = [], 0
    for index, block in enumerate(matrix.blocks):
        num_words = block.shape[0]
        starts = range(0, max(num_words - size // 2, 1), size)  # a short rest joins the last
        for start, stop in pairwise([*starts, num_words]):
            found.append(Block(index, slice(start, stop), slice(first + start, first + stop)))
        first += num_words
    return found


def block_losses(
    inputs: Tensor,
    matrix: Matrix,
    target: Tensor,
    objective: Objective,
    *,
    with_derivative: bool,
    scale: Tensor | None = None,
) -> tuple[Tensor, Derivative | None]:
    """Loss of each row, and the derivative of `scale * loss` by its logits in the work buffer.

    Equals `F.cross_entropy(F.linear(inputs, torch.cat(blocks), bias), target, reduction="none")`
    with the options of `objective`.

    Args:
        inputs: `(N, width)`, of the dtype of the matrix.
        matrix: Output rows, V in all.
        target: `(N,)`, each in `[0, V)`.
        objective: The loss of a row.
        with_derivative: Whether it is wanted.
        scale: `(N,)`; None is one.
    """
    num_rows, dtype = inputs.shape[0], accumulation_dtype(inputs.dtype)
    inputs = products.fill_up(inputs)
    if filling := inputs.shape[0] - num_rows:
        target = torch.cat([target, target[-1:].expand(filling)])
    blocks, softcap = cut(matrix, inputs.shape[0]), objective.softcap
    size = (1, inputs.shape[0] * matrix.num_rows)
    flat = workspace("logits", size, inputs, dtype)[0]
    parts, slopes = list(_parts(flat, blocks, inputs.shape[0])), None
    if softcap is not None and with_derivative:
        slope = workspace("slope", size, inputs, dtype)[0]
        slopes = list(_parts(slope, blocks, inputs.shape[0]))
    normaliser, logit_sum = _softmax(inputs, matrix, blocks, objective, parts, slopes)

    place, block = _places(blocks, target)
    probability = flat[place]
    nll = -(probability.log() + normaliser.log_share.gather(0, block.unsqueeze(0))[0])
    lost = probability < UNDERFLOW  # in its block: the logit tells what is left
    if lost.any():
        logit = _target_logits(inputs[lost], matrix, target[lost], softcap).to(dtype)
        nll[lost] = (normaliser.peak[lost] - logit) + normaliser.log_total[lost]
    lse, loss = normaliser.peak + normaliser.log_total, nll
    smoothing, z_loss = objective.label_smoothing, objective.z_loss
    if smoothing:
        loss = (1 - smoothing) * nll + smoothing * (lse - logit_sum / matrix.num_rows)
    if z_loss:
        loss = loss + z_loss * lse.square()
    if not with_derivative:
        return loss[:num_rows], None

    share = normaliser.log_share.exp().clamp_(min=LEAST_SHARE)
    for part, own in zip(parts, share, strict=True):
        if z_loss:
            part.mul_((1 + 2 * z_loss * lse).unsqueeze(1))
        if smoothing:
            part.sub_((smoothing / matrix.num_rows / own).unsqueeze(1))
    flat[place] += (smoothing - 1) / share.gather(0, block.unsqueeze(0))[0]
    if slopes is not None:
        for part, slope_of_part in zip(parts, slopes, strict=True):
            part.mul_(slope_of_part)
    if scale is not None:
        share[:, :num_rows].mul_(scale)
    share[:, num_rows:] = 0
    return loss[:num_rows], Derivative(inputs, blocks, parts, share)


def _parts(flat: Tensor, blocks: Sequence[Block], num_rows: int) -> Iterator[Tensor]:
    """Where the logits of each block lie, `(num_rows, words)`."""
    for block in blocks:
        yield flat[num_rows * block.words.start : num_rows * block.words.stop].view(num_rows, -1)


def _places(blocks: Sequence[Block], target: Tensor) -> tuple[Tensor, Tensor]:
    """Where the logit of each row's target lies among those of all blocks, and in which."""
    starts = torch.tensor([block.words.start for block in blocks])
    sizes = torch.tensor([block.words.stop for block in blocks]) - starts
    block = torch.bucketize(target, starts, right=True) - 1
    row = torch.arange(target.shape[0])
    start = starts[block]
    return target.shape[0] * start + row * sizes[block] + (target - start), block


def _softmax(
    inputs: Tensor,
    matrix: Matrix,
    blocks: Sequence[Block],
    objective: Objective,
    parts: Sequence[Tensor],
    slopes: Sequence[Tensor] | None,
) -> tuple[_Normaliser, Tensor]:
    """Fill the parts with the softmax of each block; also the sum of a row's logits, if wanted."""
    softcap, smoothing, _ = objective
    top = parts[0].new_empty(len(blocks), inputs.shape[0])
    log_sum, logit_sum = torch.empty_like(top), top.new_zeros(inputs.shape[0])
    for i, (block, part) in enumerate(zip(blocks, parts, strict=True)):
        bias = None if matrix.bias is None else matrix.bias[block.words]
        logits = products.linear(inputs, matrix.blocks[block.number][block.rows], bias, part.dtype)
        if softcap is not None:
            logits.div_(softcap).tanh_()
            if slopes is not None:  # of tanh, 1 - tanh(a / softcap)**2
                torch.square(logits, out=slopes[i]).neg_().add_(1)
            logits.mul_(softcap)
        if smoothing:
            logit_sum += logits.sum(1)
        torch.amax(logits, 1, out=top[i])
        torch.softmax(logits, 1, out=part)
        torch.amax(part, 1, out=log_sum[i])
    log_sum.log_().neg_()  # of the exponentials of what logits are above the block's largest
    impossible = top == -torch.inf  # all words of a block, which those of others need not be
    if impossible.any():
        log_sum.masked_fill_(impossible, 0)
        for part, rows in zip(parts, impossible, strict=True):
            part.masked_fill_(rows.unsqueeze(1), 0)
    peak = top.amax(0)
    log_share = top.sub_(peak).add_(log_sum)
    log_total = log_share.logsumexp(0)
    log_share.sub_(log_total)
    return _Normaliser(peak, log_total, log_share), logit_sum


def _target_logits(inputs: Tensor, matrix: Matrix, target: Tensor, softcap: float | None) -> Tensor:
    """Of each row's target alone, in at least float32; elsewhere those of bfloat16 are rounded."""
    dtype = accumulation_dtype(inputs.dtype)
    rows, first = torch.empty(inputs.shape, dtype=dtype), 0
    for block in matrix.blocks:
        of_block = ((target >= first) & (target < first + block.shape[0])).nonzero().squeeze(1)
        rows[of_block] = block[target[of_block] - first].to(dtype)
        first += block.shape[0]
    logits = (inputs.to(dtype) * rows).sum(1)
    if matrix.bias is not None:
        logits += matrix.bias[target]
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def add_block_gradients(
    derivative: Derivative, matrix: Sequence[Tensor], gradients: Gradients, *, keep: bool
) -> None:
    """Add a chunk's share to the gradients of the matrix (or overwrite them), write hidden's.

    Args:
        derivative: Of the chunk.
        matrix: Blocks of output rows, of the dtype of the derivative.
        gradients: Buffers.
        keep: Whether to add to those of the matrix.
    """
    inputs = derivative.inputs.to(derivative.share.dtype)
    turned = _turned(inputs) if products.is_faster_turned(inputs) else None
    for index, (block, part, share) in enumerate(
        zip(derivative.blocks, derivative.parts, derivative.share, strict=True)
    ):
        buffer = gradients.blocks[block.number]
        of_rows = None if buffer is None else buffer[block.rows]
        of_bias = None if gradients.bias is None else gradients.bias[block.words]
        if of_rows is not None and turned is not None:
            found = products.linear(turned * share, part.t(), None, part.dtype)
            _put(of_rows, found[:-1].t(), keep)
            _put(of_bias, found[-1], keep)
        else:
            if of_bias is not None:
                torch.addmv(of_bias, part.t(), share, beta=int(keep), out=of_bias)
            if of_rows is not None:
                weighted = inputs * share.unsqueeze(1)
                products.accumulate(of_rows, part.t(), weighted, keep=keep, alpha=1.0)
        if gradients.hidden is not None:
            rows = matrix[block.number][block.rows]
            num_rows, factor = gradients.hidden.shape[0], share.unsqueeze(1)
            of_hidden = products.linear(part, rows.t(), None, part.dtype)[:num_rows]
            if index:
                gradients.hidden.addcmul_(of_hidden, factor[:num_rows])
            else:
                torch.mul(of_hidden, factor[:num_rows], out=gradients.hidden)


def _turned(inputs: Tensor) -> Tensor:
    """`(width + 1, N)`: the last row sums up the bias's gradient in the product of the others."""
    return torch.cat([inputs, inputs.new_ones(inputs.shape[0], 1)], 1).t().contiguous()


def _put(out: Tensor | None, found: Tensor, keep: bool) -> None:
    """Add what was found, or overwrite what there was; `copy_` would transpose in one thread."""
    if out is not None:
        out.add_(found) if keep else torch.mul(found, 1, out=out)
