"""The whole loss of a clustered softmax as one registered operation.

Gradients of a sum are made in the forward pass, those of one loss a token by computing logits
again in backward. One operation per cluster, sliced by counts that depend on the data, would break
`torch.compile(fullgraph=True)`.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lm_softmax.kernels.clusters import Clusters, clustered_losses
from lm_softmax.kernels.dense import Objective, accumulation_dtype, autocast_off, product_dtype


def cluster_nll(
    hidden: Tensor,
    target: Tensor,
    clusters: Clusters,
    objective: Objective | None = None,
    ignore_index: int = -100,
) -> Tensor:
    """Loss of each token, `(N,)`, at least float32, 0 where ignored; backward computes logits anew.

    Args:
        hidden: `(N, width)`.
        target: `(N,)` int64, in `[0, V)` or `ignore_index`.
        clusters: The parameters.
        objective: The loss of a row; the negative log-likelihood by default.
        ignore_index: Target of positions that count for nothing.
    """
    options = _options(hidden, clusters, objective, ignore_index)
    return _token_losses(hidden, target, clusters.flatten(), *options)


def cluster_loss(
    hidden: Tensor,
    target: Tensor,
    clusters: Clusters,
    objective: Objective | None = None,
    ignore_index: int = -100,
) -> Tensor:
    """The sum of `cluster_nll`; its gradients are made in the forward pass and scaled in backward.

    A second backward through the same graph makes them anew. Double backward is refused.
    """
    options = _options(hidden, clusters, objective, ignore_index)
    operations = _token_losses, _loss_and_gradients
    return summed(operations, hidden, target, clusters.flatten(), options)


def _options(
    hidden: Tensor, clusters: Clusters, objective: Objective | None, ignore_index: int
) -> tuple[bool, torch.dtype, int, float | None, float, float]:
    dtype = product_dtype(hidden, clusters.weight)
    return clusters.bias is not None, dtype, ignore_index, *(objective or Objective())


@torch.library.custom_op("lm_softmax::token_losses", mutates_args=())
def _token_losses(
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
    """Loss of each token; its backward is `_loss_and_gradients` scaled token by token."""
    with autocast_off(hidden):
        return clustered_losses(
            hidden,
            target,
            None,
            Clusters.unflatten(parameters, has_bias),
            dtype,
            ignore_index,
            Objective(softcap, label_smoothing, z_loss),
        )


@torch.library.custom_op("lm_softmax::loss_and_gradients", mutates_args=())
def _loss_and_gradients(
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
    """The summed loss, then the gradients of `sum(scale * loss)` by hidden and each parameter.

    They are in at least float32; one that `needs` does not ask for is an empty tensor.
    """
    total_dtype = accumulation_dtype(dtype)
    buffers = [
        torch.empty_like(tensor, dtype=total_dtype, memory_format=torch.contiguous_format)
        if need
        else None
        for tensor, need in zip((hidden, *parameters), needs, strict=True)
    ]
    with autocast_off(hidden):
        losses = clustered_losses(
            hidden,
            target,
            scale,
            Clusters.unflatten(parameters, has_bias),
            dtype,
            ignore_index,
            Objective(softcap, label_smoothing, z_loss),
            buffers,
        )
    return [losses.sum(), *(losses.new_empty(0) if b is None else b for b in buffers)]


def summed(
    operations: tuple[Any, Any],
    hidden: Tensor,
    target: Tensor,
    parameters: Sequence[Tensor],
    options: Sequence[Any],
) -> Tensor:
    """The summed loss, and with it the gradients, if any are wanted.

    Args:
        operations: The two that `register_derivatives` was given.
        hidden: `(N, width)`.
        target: `(N,)`.
        parameters: As the operations take them.
        options: What they take after the parameters.
    """
    token_losses, loss_and_gradients = operations
    needs = [torch.is_grad_enabled() and t.requires_grad for t in (hidden, *parameters)]
    if not any(needs):
        return token_losses(hidden, target, parameters, *options).sum()
    return loss_and_gradients(hidden, target, None, parameters, needs, *options)[0]


def register_derivatives(token_losses: Any, loss_and_gradients: Any) -> None:
    """Make two operations traceable, and each differentiable by means of the second.

    Args:
        token_losses: `(hidden, target, parameters, has_bias, dtype, ...)` to the loss of each
            target.
        loss_and_gradients: `(hidden, target, scale, parameters, needs, has_bias, dtype, ...)` to
            the summed loss and the gradients of `sum(scale * loss)`, as `_loss_and_gradients`.
    """
    token_losses.register_fake(_fake_token_losses)
    loss_and_gradients.register_fake(_fake_loss_and_gradients)
    token_losses.register_autograd(
        partial(_backward_token_losses, loss_and_gradients), setup_context=_save_token_losses
    )
    loss_and_gradients.register_autograd(
        partial(_backward_gradients, loss_and_gradients), setup_context=_save_gradients
    )


def _fake_token_losses(
    hidden: Tensor,
    target: Tensor,
    parameters: Any,
    has_bias: bool,
    dtype: torch.dtype,
    *options: Any,
) -> Tensor:
    return hidden.new_empty(target.shape, dtype=accumulation_dtype(dtype))


def _fake_loss_and_gradients(
    hidden: Tensor,
    target: Tensor,
    scale: Any,
    parameters: Any,
    needs: Any,
    has_bias: bool,
    dtype: torch.dtype,
    *options: Any,
) -> list[Tensor]:
    total_dtype = accumulation_dtype(dtype)
    shapes = [
        tensor.shape if need else (0,)
        for tensor, need in zip((hidden, *parameters), needs, strict=True)
    ]
    return [hidden.new_empty(shape, dtype=total_dtype) for shape in ((), *shapes)]


def _refuse_double_backward() -> None:
    if torch.is_grad_enabled():
        raise RuntimeError(
            "this loss has no second derivative: differentiate log_prob(hidden), which holds all"
            " words, where one is needed"
        )


def _save_token_losses(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    hidden, target, parameters, *options = inputs
    ctx.save_for_backward(hidden, target, *parameters)
    ctx.options = options


def _backward_token_losses(loss_and_gradients: Any, ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
    _refuse_double_backward()
    hidden, target, *parameters = ctx.saved_tensors
    needs = [ctx.needs_input_grad[0], *ctx.needs_input_grad[2]]
    _, *found = loss_and_gradients(hidden, target, gradient, parameters, needs, *ctx.options)
    of_hidden, *of_parameters = (
        grad.to(tensor.dtype) if need else None
        for grad, tensor, need in zip(found, (hidden, *parameters), needs, strict=True)
    )
    return of_hidden, None, of_parameters, *[None] * len(ctx.options)


def _save_gradients(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    hidden, target, _, parameters, *options = inputs
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(hidden, target, *parameters)
    ctx.options = options
    ctx.made = output[1:]


def _backward_gradients(
    loss_and_gradients: Any, ctx: Any, gradients: list[Tensor | None]
) -> tuple[Any, ...]:
    _refuse_double_backward()
    needs, *options = ctx.options
    factor = gradients[0]
    if factor is None:  # the loss took no part in what is differentiated
        return None, None, None, [None] * (len(needs) - 1), *[None] * len(ctx.options)
    hidden, target, *parameters = ctx.saved_tensors
    made, ctx.made = ctx.made, None  # scaled in place and handed out, by the first backward
    if made is None:
        made = loss_and_gradients(hidden, target, None, parameters, needs, *options)[1:]
    made, found = list(made), []
    for tensor, need in zip((hidden, *parameters), needs, strict=True):
        gradient = made.pop(0)  # in float32, and freed when it has been converted
        found.append(gradient.mul_(factor).to(tensor.dtype) if need else None)
    return found[0], None, None, found[1:], *[None] * len(ctx.options)


register_derivatives(_token_losses, _loss_and_gradients)
