"""One softmax over stacked blocks of output rows, in chunks of tokens, gradients on the way.

The `(N, V)` matrix of logits never exists as a whole. A chunk of it is written into a work buffer,
turned into probabilities in place, then into the derivative of the loss by the logits in place,
and multiplied into the gradients of hidden and weight before the next chunk overwrites it.
"""

import torch
from torch import Tensor

from lm_softmax.kernels import products
from lm_softmax.kernels.block_softmax import add_block_gradients, block_losses
from lm_softmax.kernels.dense import (
    Gradients,
    Matrix,
    Objective,
    accumulation_dtype,
    add_gradients,
    chunk_rows,
    row_losses,
)
from lm_softmax.kernels.workspace import reads_are_cheap


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
    gradient_dtype = dtype if products.products_widen(hidden) else total_dtype
    blocks = [block.to(gradient_dtype) for block in matrix.blocks] if gradients else []
    loss = torch.empty(hidden.shape[0], dtype=total_dtype, device=hidden.device)
    largest = None
    if scale is not None:
        scale = scale.to(total_dtype)
        if dtype == torch.float16 and scale.numel():  # a GradScaler's factor would overflow
            largest = scale.abs().amax().clamp(min=torch.finfo(total_dtype).tiny)
            scale = scale / largest
    rows = chunk_rows(hidden.shape[0], matrix.num_rows, total_dtype, hidden)
    for start in range(0, hidden.shape[0], rows):
        part = slice(start, start + rows)
        inputs, of_chunk = hidden[part].to(dtype), None
        chunk = inputs, rounded, target[part], objective
        own_scale = None if scale is None else scale[part]
        if gradients is not None:
            of_hidden = None if gradients.hidden is None else gradients.hidden[part]
            of_chunk = gradients._replace(hidden=of_hidden)
        wanted = of_chunk is not None
        if reads_are_cheap(hidden):
            loss[part], of_blocks = block_losses(*chunk, with_derivative=wanted, scale=own_scale)
            if of_chunk is not None and of_blocks is not None:
                add_block_gradients(of_blocks, blocks, of_chunk, keep=start > 0)
        else:
            loss[part], derivative = row_losses(
                *chunk, with_derivative=wanted, scale=own_scale, dtype=gradient_dtype
            )
            if of_chunk is not None and derivative is not None:
                add_gradients(derivative, inputs, blocks, of_chunk, keep=start > 0)
    if gradients is not None:
        for buffer in (gradients.hidden, *gradients.blocks, gradients.bias):
            if buffer is not None and hidden.shape[0] == 0:
                buffer.zero_()
            elif buffer is not None and largest is not None:
                buffer.mul_(largest)
    return loss
