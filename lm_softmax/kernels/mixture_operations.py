"""The loss of a mixture of softmaxes as one registered operation, as that of a clustered one."""

from collections.abc import Sequence

import torch
from torch import Tensor

from lm_softmax.kernels.dense import Objective, accumulation_dtype, autocast_off, product_dtype
from lm_softmax.kernels.mixture import Mixture, MixtureGradients, mixture_losses
from lm_softmax.kernels.operations import register_derivatives, summed


def mixture_nll(
    inputs: Tensor,
    target: Tensor,
    mixture: Mixture,
    objective: Objective | None = None,
    ignore_index: int = -100,
) -> Tensor:
    """Loss of each token, `(N,)`, at least float32, 0 where ignored; backward computes logits anew.

    Args:
        inputs: `(N, K, width)`, what each expert's output rows are multiplied with.
        target: `(N,)` int64, in `[0, V)` or `ignore_index`.
        mixture: Priors and output rows.
        objective: The loss of a token; its z-loss must be 0.
        ignore_index: Target of positions that count for nothing.
    """
    options = _options(inputs, mixture, objective, ignore_index)
    return _token_losses(inputs, target, mixture.flatten(), *options)


def mixture_loss(
    inputs: Tensor,
    target: Tensor,
    mixture: Mixture,
    objective: Objective | None = None,
    ignore_index: int = -100,
) -> Tensor:
    """The sum of `mixture_nll`; its gradients are made in the forward pass and scaled in backward.

    A second backward through the same graph makes them anew. Double backward is refused.
    """
    options = _options(inputs, mixture, objective, ignore_index)
    operations = _token_losses, _loss_and_gradients
    return summed(operations, inputs, target, mixture.flatten(), options)


def _options(
    inputs: Tensor, mixture: Mixture, objective: Objective | None, ignore_index: int
) -> tuple[bool, torch.dtype, int, float | None, float]:
    softcap, label_smoothing, z_loss = objective or Objective()
    if z_loss:
        raise ValueError(f"a mixture has no one log-sum-exp: z_loss must be 0, got {z_loss}")
    dtype = product_dtype(inputs, mixture.weight)
    return mixture.bias is not None, dtype, ignore_index, softcap, label_smoothing


@torch.library.custom_op("lm_softmax::mixture_token_losses", mutates_args=())
def _token_losses(
    inputs: Tensor,
    target: Tensor,
    parameters: Sequence[Tensor],
    has_bias: bool,
    dtype: torch.dtype,
    ignore_index: int,
    softcap: float | None,
    label_smoothing: float,
) -> Tensor:
    """Loss of each token; its backward is `_loss_and_gradients` scaled token by token."""
    mixture, objective = Mixture.unflatten(parameters), Objective(softcap, label_smoothing)
    with autocast_off(inputs):
        return mixture_losses(inputs, target, None, mixture, dtype, ignore_index, objective, None)


@torch.library.custom_op("lm_softmax::mixture_loss_and_gradients", mutates_args=())
def _loss_and_gradients(
    inputs: Tensor,
    target: Tensor,
    scale: Tensor | None,
    parameters: Sequence[Tensor],
    needs: Sequence[bool],
    has_bias: bool,
    dtype: torch.dtype,
    ignore_index: int,
    softcap: float | None,
    label_smoothing: float,
) -> list[Tensor]:
    """The summed loss, then the gradients of `sum(scale * loss)` by inputs and each parameter.

    They are in at least float32; one that `needs` does not ask for is an empty tensor.
    """
    total_dtype = accumulation_dtype(dtype)
    buffers = [
        torch.empty(tensor.shape, dtype=total_dtype, device=tensor.device) if need else None
        for tensor, need in zip((inputs, *parameters), needs, strict=True)
    ]
    mixture = Mixture.unflatten(parameters)
    gradients = MixtureGradients(*buffers, *[] if has_bias else [None])
    objective = Objective(softcap, label_smoothing)
    with autocast_off(inputs):
        losses = mixture_losses(
            inputs, target, scale, mixture, dtype, ignore_index, objective, gradients
        )
    return [losses.sum(), *(losses.new_empty(0) if b is None else b for b in buffers)]


register_derivatives(_token_losses, _loss_and_gradients)
