"""Rows of a parameter for targets and for negatives, with one gradient summed in float32.

A low-precision sum stops growing where a summand is below half of its last digit: a word that is
the target of thousands of positions would get a fraction of its gradient.
"""

from typing import Any

import torch
from torch import Tensor

from lm_softmax.kernels.dense import accumulation_dtype


@torch.library.custom_op("lm_softmax::look_up", mutates_args=())
def look_up(
    parameter: Tensor, target: Tensor, negatives: Tensor, sparse: bool
) -> tuple[Tensor, Tensor]:
    """`parameter[target]` and `parameter[negatives]` in at least float32.

    Two outputs of one operation, not two parts of one output: their gradient is one tensor without
    a sum of padded parts, which inductor could not compile where it is sparse.

    Args:
        parameter: `(V, ...)`.
        target: `(N,)` int64.
        negatives: `(S,)` int64.
        sparse: Whether the gradient is a sparse tensor, of `N + S` entries of which repeats are 0.
    """
    dtype = accumulation_dtype(parameter.dtype)
    return parameter[target].to(dtype), parameter[negatives].to(dtype)


@look_up.register_fake
def _fake_look_up(
    parameter: Tensor, target: Tensor, negatives: Tensor, sparse: bool
) -> tuple[Tensor, Tensor]:
    dtype, width = accumulation_dtype(parameter.dtype), parameter.shape[1:]
    of_target = parameter.new_empty((*target.shape, *width), dtype=dtype)
    return of_target, parameter.new_empty((*negatives.shape, *width), dtype=dtype)


def _save(
    ctx: Any, inputs: tuple[Tensor, Tensor, Tensor, bool], output: tuple[Tensor, Tensor]
) -> None:
    parameter, target, negatives, ctx.sparse = inputs
    ctx.save_for_backward(target, negatives)
    ctx.shape, ctx.dtype = parameter.shape, parameter.dtype


def _backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
    if ctx.sparse:
        ids, values = _sum_repeats(torch.cat(ctx.saved_tensors), torch.cat(gradients))
        total = torch.sparse_coo_tensor(
            ids.unsqueeze(0), values.to(ctx.dtype), ctx.shape, check_invariants=False
        )
        return total, None, None, None
    total = gradients[0].new_zeros(ctx.shape)
    for ids, gradient in zip(ctx.saved_tensors, gradients, strict=True):
        total.index_add_(0, ids, gradient)
    return total.to(ctx.dtype), None, None, None


def _sum_repeats(ids: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Sorted ids, and for each the sum of its values at the first of equals, 0 at the others.

    Shapes do not depend on the ids, and adding zeros later is exact in every dtype.
    """
    ordered = ids.sort().values
    first = torch.searchsorted(ordered, ids)
    return ordered, values.new_zeros(values.shape).index_add_(0, first, values)


look_up.register_autograd(_backward, setup_context=_save)
