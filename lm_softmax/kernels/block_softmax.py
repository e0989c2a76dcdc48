"""One softmax over the rows of a matrix, a block of its words at a time, as a CPU likes it.

The logits of a block lie in one piece, `(N, words)`: the product that makes them, the softmax over
them and the products that take their derivative to the gradients find them in the cache, and write
no rows of a wider matrix. A block's softmax is over its own words. Its share of the whole is known
when all blocks are there, and is one factor a row that the small operands of the last products
take.

A step has many blocks, and each call of torch takes a few microseconds: so there are few of them.
"""

import math
from collections.abc import Iterable, Sequence
from itertools import accumulate, chain, pairwise
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

BLOCK_VALUES = 2**20  # logits of a block, but of the last: more leave the cache
MIN_BLOCK_WORDS = 1792  # fewer make products slow
STEP_OF_WORDS = 256  # an odd number of steps: words of other rows then lie in other sets of a cache
UNDERFLOW_NLL = -math.log(UNDERFLOW)
LEAST_SHARE = 1e-20  # of a block in its row: its inverse is finite, and so is it, weighted

Sizes = Sequence[Sequence[int]]  # numbers of words: of each block of each of the matrix's


class Derivative(NamedTuple):
    """Of a loss by logits: that by the words of block i is `share[i][:, None] * parts[i]`.

    Rows may follow that only fill a product up; they have no share.
    """

    inputs: Tensor  # (N, width), what the matrix was multiplied with
    sizes: Sizes
    parts: Sequence[Tensor]  # (N, words of the block) each
    share: Tensor  # (blocks, N)


def cut(matrix: Matrix, num_rows: int) -> list[list[int]]:
    """How many words to take at once, of each block of the matrix, for so many rows of logits."""
    num_steps = max(BLOCK_VALUES // max(num_rows, 1), MIN_BLOCK_WORDS) // STEP_OF_WORDS
    size = ((num_steps - 1) | 1) * STEP_OF_WORDS
    sizes = []
    for block in matrix.blocks:
        num_words = block.shape[0]
        starts = range(0, max(num_words - size // 2, 1), size)  # a short rest joins the last
        stops = [*starts, num_words] if num_words else []  # a block of the matrix may be empty
        sizes.append([stop - start for start, stop in pairwise(stops)])
    return sizes


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
    sizes, (softcap, smoothing, z_loss) = cut(matrix, inputs.shape[0]), objective
    size = (1, inputs.shape[0] * matrix.num_rows)
    flat, slopes = workspace("logits", size, inputs, dtype)[0], None
    parts = _parts(flat, sizes, inputs.shape[0])
    if softcap is not None and with_derivative:
        slopes = _parts(workspace("slope", size, inputs, dtype)[0], sizes, inputs.shape[0])
    top, most, logit_sum = _softmax(inputs, matrix, sizes, objective, parts, slopes)

    peak, (share, total) = top.amax(0), _shares(top, most)
    place, slot = _places(sizes, target)
    own_share = share.view(-1).index_select(0, slot)
    nll = flat.index_select(0, place).mul_(own_share).log_().neg_()
    if not nll.amax() < UNDERFLOW_NLL:  # which is nan where a block has no possible word
        impossible = top == -torch.inf
        for part, rows in zip(parts, impossible, strict=True):
            part.masked_fill_(rows.unsqueeze(1), 0)
        share, total = _shares(top, most.masked_fill_(impossible, 1))
        own_share = share.view(-1).index_select(0, slot)
        nll = flat.index_select(0, place).mul_(own_share).log_().neg_()
        lost = ~(nll < UNDERFLOW_NLL)  # the logit tells what is left of the probability
        logit = _target_logits(inputs[lost], matrix, target[lost], softcap).to(dtype)
        nll[lost] = (peak[lost] - logit) + total[lost].log()
    loss = nll
    if smoothing or z_loss:
        lse = peak + total.log()
        if smoothing:
            loss = (1 - smoothing) * nll + smoothing * (lse - logit_sum / matrix.num_rows)
        if z_loss:
            loss = loss + z_loss * lse.square()
            for part in parts if with_derivative else ():
                part.mul_((1 + 2 * z_loss * lse).unsqueeze(1))
    if not with_derivative:
        return loss[:num_rows], None

    share.clamp_(min=LEAST_SHARE)
    if smoothing:
        for part, own in zip(parts, share, strict=True):
            part.sub_((smoothing / matrix.num_rows / own).unsqueeze(1))
    flat.index_add_(0, place, (smoothing - 1) / own_share.clamp_(min=LEAST_SHARE))
    if slopes is not None:
        for part, slope in zip(parts, slopes, strict=True):
            part.mul_(slope)
    if scale is not None:
        share[:, :num_rows].mul_(scale)
    if filling:
        share[:, num_rows:] = 0
    return loss[:num_rows], Derivative(inputs, sizes, parts, share)


def _parts(flat: Tensor, sizes: Sizes, num_rows: int) -> list[Tensor]:
    """Where the logits of each block lie, `(num_rows, words)`."""
    pieces = flat.split_with_sizes([num_rows * size for size in chain(*sizes)])
    return [piece.view(num_rows, -1) for piece in pieces]


def _places(sizes: Sizes, target: Tensor) -> tuple[Tensor, Tensor]:
    """Where each row's target lies among the logits of all blocks, and its share among theirs."""
    num_rows, words = target.shape[0], [*chain(*sizes)]
    row = torch.arange(num_rows, device=target.device)
    if len(words) == 1:
        return torch.add(target, row, alpha=words[0]), row
    starts = [0, *accumulate(words[:-1])]
    block = torch.bucketize(target, target.new_tensor(starts[1:]), right=True)
    table = target.new_tensor([[(num_rows - 1) * start for start in starts], words])
    before, width = table.index_select(1, block)
    # target - start + row * width, after num_rows * start logits of the blocks before
    return before.add_(target).addcmul_(row, width), torch.add(row, block, alpha=num_rows)


def _softmax(
    inputs: Tensor,
    matrix: Matrix,
    sizes: Sizes,
    objective: Objective,
    parts: Sequence[Tensor],
    slopes: Sequence[Tensor] | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Fill the parts with the softmax of each block.

    Returns:
        The largest logit and the largest probability of each block, `(blocks, N)`, and the sum of a
        row's logits, `(N,)`, if it is wanted.
    """
    softcap, smoothing, _ = objective
    top = parts[0].new_empty(len(parts), inputs.shape[0])
    most, logit_sum = torch.empty_like(top), top.new_zeros(inputs.shape[0])
    rows, biases = _pieces(matrix.blocks, sizes), _pieces([matrix.bias], [[*chain(*sizes)]])
    outputs = zip(parts, top.unbind(0), most.unbind(0), strict=True)
    for i, (block, bias, (part, own_top, own_most)) in enumerate(
        zip(rows, biases, outputs, strict=True)
    ):
        assert block is not None
        logits = products.linear(inputs, block, bias, part.dtype)
        if softcap is not None:
            logits.div_(softcap).tanh_()
            if slopes is not None:  # of tanh, 1 - tanh(a / softcap)**2
                torch.square(logits, out=slopes[i]).neg_().add_(1)
            logits.mul_(softcap)
        if smoothing:
            logit_sum += logits.sum(1)
        torch.amax(logits, 1, out=own_top)
        torch.softmax(logits, 1, out=part)
        torch.amax(part, 1, out=own_most)
    return top, most, logit_sum


def _pieces(tensors: Iterable[Tensor | None], sizes: Sizes) -> list[Tensor | None]:
    """The rows of each block, None where there is no tensor."""
    found: list[Tensor | None] = []
    for tensor, words in zip(tensors, sizes, strict=True):
        found += [None] * len(words) if tensor is None else tensor.split_with_sizes([*words])
    return found


def _shares(top: Tensor, most: Tensor) -> tuple[Tensor, Tensor]:
    """The share of each block in its row, `(blocks, N)`, and the sum that it is of, `(N,)`.

    Args:
        top: Largest logit, `(blocks, N)`.
        most: Its probability in its block, one over the sum of the exponentials.
    """
    share = (top - top.amax(0)).exp_().div_(most)
    total = share.sum(0)
    return share.div_(total), total


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
    _, sizes, parts, share = derivative
    inputs, hidden = derivative.inputs.to(share.dtype), gradients.hidden
    turned = _turned(inputs) if products.is_faster_turned(inputs) else None
    buffers = _pieces(gradients.blocks, sizes)
    of_biases = _pieces([gradients.bias], [[*chain(*sizes)]])
    blocks = zip(parts, share.unbind(0), _pieces(matrix, sizes), buffers, of_biases, strict=True)
    for index, (part, own, rows, of_rows, of_bias) in enumerate(blocks):
        if of_rows is not None and turned is not None:
            found = products.linear(turned * own, part.t(), None, part.dtype)
            _put(of_rows, found[:-1].t(), keep)
            _put(of_bias, found[-1], keep)
        else:
            if of_bias is not None:
                products.weighted_sum(of_bias, own, part, keep=keep)
            if of_rows is not None:
                weighted = inputs * own.unsqueeze(1)
                products.accumulate(of_rows, part.t(), weighted, keep=keep, alpha=1.0)
        if hidden is not None and rows is not None:
            found = products.linear(part, rows.t(), None, part.dtype)
            factor = own.unsqueeze(1)
            if len(found) > len(hidden):
                found, factor = found[: len(hidden)], factor[: len(hidden)]
            if index:
                hidden.addcmul_(found, factor)
            else:
                torch.mul(found, factor, out=hidden)


def _turned(inputs: Tensor) -> Tensor:
    """`(width + 1, N)`: the last row sums up the bias's gradient in the product of the others."""
    return torch.cat([inputs, inputs.new_ones(inputs.shape[0], 1)], 1).t().contiguous()


def _put(out: Tensor | None, found: Tensor, keep: bool) -> None:
    """Add what was found, or overwrite what there was; `copy_` would transpose in one thread."""
    if out is not None:
        out.add_(found) if keep else torch.mul(found, 1, out=out)
