"""The loss of words along their paths as a registered operation.

Backward takes the steps anew, which costs less than keeping them, and either writes the gradients
of all nodes or, sparse, of those that are passed.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lm_softmax.kernels.dense import accumulation_dtype, autocast_off
from lm_softmax.kernels.paths import (
    Tree,
    all_nodes,
    by_node,
    follow,
    gradient_of_hidden,
    losses_of,
    passed_nodes,
)
from lm_softmax.kernels.workspace import reads_are_cheap


def path_nll(
    hidden: Tensor,
    target: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    tree: Tree,
    ignore_index: int = -100,
    *,
    sparse: bool = False,
) -> Tensor:
    """`-sum(logsigmoid(+-(weight[node] @ hidden + bias[node])))` over the path to each target.

    Gradients are of at least float32 while they are summed. Double backward is refused.

    Args:
        hidden: `(N, width)`.
        target: `(N,)` int64, in `[0, V)` or `ignore_index`, whose loss is 0.
        weight: `(V - 1, width)`.
        bias: `(V - 1,)`, or None.
        tree: The paths.
        ignore_index: Target of positions that count for nothing.
        sparse: Whether the gradients of weight and bias are sparse tensors over the nodes that the
            batch passes; they are coalesced where reading their number costs nothing.

    Returns:
        `(N,)`, at least float32.
    """
    return _path_nll(hidden, target, weight, bias, *tree, ignore_index, sparse)


@torch.library.custom_op("lm_softmax::path_nll", mutates_args=())
def _path_nll(
    hidden: Tensor,
    target: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    up: Tensor,
    depth: Tensor,
    max_depth: int,
    ignore_index: int,
    sparse: bool,
) -> Tensor:
    """Loss of each token."""
    with autocast_off(hidden):
        tree = Tree(up, depth, max_depth)
        return losses_of(follow(hidden, target, weight, bias, tree, ignore_index))


@torch.library.custom_op("lm_softmax::path_gradients", mutates_args=())
def _path_gradients(
    scale: Tensor,
    hidden: Tensor,
    target: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    up: Tensor,
    depth: Tensor,
    max_depth: int,
    ignore_index: int,
    sparse: bool,
    needs: Sequence[bool],
) -> list[Tensor]:
    """Gradients of `sum(scale * loss)` by hidden, weight and bias, then node ids if sparse.

    One that `needs` does not ask for is empty. Sparse ones have `N * max_depth` rows, whatever
    the batch: what is left over are rows of zeros.
    """
    arguments = hidden, target, weight, bias, Tree(up, depth, max_depth), ignore_index
    with autocast_off(hidden):
        made, slope, of_hidden = gradient_of_hidden(scale, *arguments, needs[0])
        empty = slope.new_empty(0)
        if not sparse:
            rows, biases = all_nodes(made, slope, weight.shape[0], needs[1], needs[2])
            return [x if x is not None else empty.clone() for x in (of_hidden, rows, biases, None)]
        ids, rows, biases = passed_nodes(made, slope, needs[1], needs[2])
    missing = target.shape[0] * max_depth - ids.shape[0]
    return [
        of_hidden if of_hidden is not None else empty.clone(),
        empty.clone() if rows is None else F.pad(rows, (0, 0, 0, missing)),
        empty.clone() if biases is None else F.pad(biases, (0, missing)),
        F.pad(ids, (0, missing)),
    ]


@_path_nll.register_fake
def _(hidden: Tensor, target: Tensor, weight: Tensor, *options: Any) -> Tensor:
    dtype = accumulation_dtype(torch.promote_types(hidden.dtype, weight.dtype))
    return hidden.new_empty(target.shape, dtype=dtype)


@_path_gradients.register_fake
def _(
    scale: Tensor,
    hidden: Tensor,
    target: Tensor,
    weight: Tensor,
    bias: Any,
    up: Any,
    depth: Any,
    max_depth: int,
    ignore_index: int,
    sparse: bool,
    needs: Any,
) -> list[Tensor]:
    dtype = accumulation_dtype(torch.promote_types(hidden.dtype, weight.dtype))
    num = target.shape[0] * max_depth if sparse else weight.shape[0]
    shapes = [hidden.shape, (num, weight.shape[1]), (num,)]
    found = [
        hidden.new_empty(shape if need else (0,), dtype=dtype)
        for shape, need in zip(shapes, needs, strict=True)
    ]
    return [*found, target.new_empty(num if sparse else 0)]


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.max_depth, ctx.ignore_index, ctx.sparse = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, scale: Tensor) -> tuple[Tensor | None, ...]:
    if torch.is_grad_enabled():
        raise RuntimeError(
            "this loss has no second derivative: differentiate log_prob(hidden), which holds all"
            " words, where one is needed"
        )
    hidden, target, weight, bias, up, depth = ctx.saved_tensors
    needs = [ctx.needs_input_grad[0], ctx.needs_input_grad[2], ctx.needs_input_grad[3]]
    inputs = hidden, target, weight, bias
    ids: Tensor | None = None
    eager = reads_are_cheap(scale) and not torch.compiler.is_compiling()
    if ctx.sparse and eager:
        tree = Tree(up, depth, ctx.max_depth)
        with autocast_off(hidden):
            made, slope, of_hidden = gradient_of_hidden(
                scale, *inputs, tree, ctx.ignore_index, needs[0]
            )
            ids, rows, biases = by_node(made, slope, needs[1], needs[2])
    else:
        options = up, depth, ctx.max_depth, ctx.ignore_index, ctx.sparse, needs
        found = _path_gradients(scale, *inputs, *options)
        ids = found[3] if ctx.sparse else None
        of_hidden, rows, biases = (
            x if need else None for x, need in zip(found, needs, strict=False)
        )
    if ids is not None:
        rows, biases = (
            None
            if x is None
            else torch.sparse_coo_tensor(
                ids.unsqueeze(0),
                x.to(weight.dtype),
                (weight.shape[0], *x.shape[1:]),
                is_coalesced=eager,
                check_invariants=False,
            )
            for x in (rows, biases)
        )
    of_hidden = None if of_hidden is None else of_hidden.to(hidden.dtype)
    of_weight = None if rows is None else rows.to(weight.dtype)
    of_bias = None if biases is None or bias is None else biases.to(bias.dtype)
    return of_hidden, None, of_weight, of_bias, None, None, None, None, None


_path_nll.register_autograd(_backward, setup_context=_save)
