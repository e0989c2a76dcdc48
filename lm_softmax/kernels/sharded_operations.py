"""The loss of a softmax whose words are dealt to several processes, as registered operations."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import distributed_c10d

from lm_softmax.kernels.clusters import Clusters
from lm_softmax.kernels.dense import Objective, accumulation_dtype, autocast_off, product_dtype
from lm_softmax.kernels.operations import register_derivatives, summed
from lm_softmax.kernels.sharded import Task, sharded_losses


def sharded_nll(
    hidden: Tensor,
    target: Tensor,
    clusters: Clusters,
    sizes: Sequence[int],
    group: dist.ProcessGroup,
    objective: Objective | None = None,
    ignore_index: int = -100,
) -> Tensor:
    """`cluster_nll` by a group of processes; see `sharded_losses` for who holds what.

    Every process calls it with the same tokens, gets all losses, and the whole gradient of hidden.
    Like its backward it is a collective.
    """
    options = _options(hidden, clusters, sizes, group, objective, ignore_index)
    return _token_losses(hidden, target, clusters.flatten(), *options)


def sharded_loss(
    hidden: Tensor,
    target: Tensor,
    clusters: Clusters,
    sizes: Sequence[int],
    group: dist.ProcessGroup,
    objective: Objective | None = None,
    ignore_index: int = -100,
) -> Tensor:
    """The sum of `sharded_nll`; gradients are made in the forward pass, as by `cluster_loss`."""
    options = _options(hidden, clusters, sizes, group, objective, ignore_index)
    operations = _token_losses, _loss_and_gradients
    return summed(operations, hidden, target, clusters.flatten(), options)


def _options(
    hidden: Tensor,
    clusters: Clusters,
    sizes: Sequence[int],
    group: dist.ProcessGroup,
    objective: Objective | None,
    ignore_index: int,
) -> tuple[bool, torch.dtype, int, float | None, float, float, list[int], str]:
    dtype = product_dtype(hidden, clusters.weight)
    loss = objective or Objective()
    return clusters.bias is not None, dtype, ignore_index, *loss, list(sizes), group.group_name


@torch.library.custom_op("lm_softmax::sharded_token_losses", mutates_args=())
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
    sizes: Sequence[int],
    group: str,
) -> Tensor:
    """Loss of each token; its backward is `_loss_and_gradients` scaled token by token."""
    objective = Objective(softcap, label_smoothing, z_loss)
    with autocast_off(hidden):
        return sharded_losses(
            hidden,
            target,
            None,
            Clusters.unflatten(parameters, has_bias),
            sizes,
            ignore_index,
            Task(_group(group), objective, dtype),
        )


@torch.library.custom_op("lm_softmax::sharded_loss_and_gradients", mutates_args=())
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
    sizes: Sequence[int],
    group: str,
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
    objective = Objective(softcap, label_smoothing, z_loss)
    with autocast_off(hidden):
        losses = sharded_losses(
            hidden,
            target,
            scale,
            Clusters.unflatten(parameters, has_bias),
            sizes,
            ignore_index,
            Task(_group(group), objective, dtype),
            buffers,
        )
    return [losses.sum(), *(losses.new_empty(0) if b is None else b for b in buffers)]


def _group(name: str) -> dist.ProcessGroup:
    """The process group of a name, which is what a registered operation can take of it."""
    resolve: Any = vars(distributed_c10d)["_resolve_process_group"]
    return resolve(name)


register_derivatives(_token_losses, _loss_and_gradients)
