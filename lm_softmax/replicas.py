"""Replicas of a model with sparse gradients: how `DistributedDataParallel` averages them.

It is told which gradients are sparse, and gathers their rows by collectives of dense tensors:
gloo's own reduction of sparse ones corrupts memory when several are under way.
"""

from collections.abc import Mapping
from functools import partial

import torch
import torch.distributed as dist
from lightning.pytorch.strategies import (
    DDPStrategy,
    DeepSpeedStrategy,
    FSDPStrategy,
    ModelParallelStrategy,
    Strategy,
)
from torch import Tensor, nn
from torch.futures import Future
from torch.nn.parallel import DistributedDataParallel
from torch.sparse import check_sparse_tensor_invariants

from lm_softmax.gradients import embeds_sparsely, listed, sparse_parameters

SHARDED = (DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy)


def prepare(model: nn.Module, strategy: Strategy) -> None:
    """Make a strategy ready to wrap a model with sparse gradients, which itself stays as it is.

    `DistributedDataParallel` expects sparse gradients of `nn.Embedding` alone and asks the module
    in which it meets a parameter first. While it is constructed, and at no other time, all that
    have them are shown to it in embeddings ahead of the modules they belong to.

    Raises:
        ValueError: If the strategy shards parameters, or it is a `DDPStrategy` and its process
            group is not of gloo, it has a communication hook of its own that Lightning would
            register, or a sparse gradient is of a parameter that the model itself holds, in no
            module of its own. Other strategies are taken at their word.
    """
    strategy.__dict__.pop("configure_ddp", None)  # of a training that failed before its use
    sparse = sparse_parameters(model)
    if not sparse:
        return
    _check_strategy(strategy, sparse)
    if not check_sparse_tensor_invariants.is_enabled():  # type: ignore[no-untyped-call]
        # Said aloud, or torch warns of its default.
        check_sparse_tensor_invariants.disable()  # type: ignore[no-untyped-call]
    if isinstance(strategy, DDPStrategy):
        _check_root(model, sparse)
        strategy.configure_ddp = partial(_wrap_shown, strategy)  # type: ignore[method-assign]


def _check_strategy(strategy: Strategy, sparse: Mapping[str, nn.Parameter]) -> None:
    if isinstance(strategy, SHARDED):
        raise ValueError(
            f"{type(strategy).__name__} does not shard {listed(sparse)}, whose gradients are"
            f" sparse: set trainer.strategy to ddp on several CPUs or auto on one device, or sparse"
            f" to false"
        )
    if not isinstance(strategy, DDPStrategy):
        return
    device = strategy.root_device.type
    config = dist.get_backend_config()  # as cpu:gloo,cuda:nccl
    backends = dict(part.split(":") for part in config.split(","))
    if (backend := backends.get(device)) != "gloo":
        raise ValueError(
            f"{backend} does not reduce the sparse gradients of {listed(sparse)} on {device}: set"
            f" sparse to false, or trainer.strategy to DDPStrategy with"
            f" process_group_backend gloo"
        )
    if device != "cpu" and getattr(strategy, "_ddp_comm_hook", None) is not None:
        raise ValueError(
            f"ddp_comm_hook does not go with the sparse gradients of {listed(sparse)}: leave it"
            f" out, or set sparse to false"
        )


def _check_root(model: nn.Module, sparse: Mapping[str, nn.Parameter]) -> None:
    held = {
        name: sparse[name] for name, _ in model.named_parameters(recurse=False) if name in sparse
    }
    if held and not embeds_sparsely(model):
        raise ValueError(
            f"DistributedDataParallel meets {listed(held)} in {type(model).__name__} itself and"
            f" expects dense gradients there, not sparse ones: hold it in a module of its own"
        )


def _wrap_shown(strategy: DDPStrategy) -> None:
    """`strategy.configure_ddp()`, to which the sparse parameters of its model are shown first."""
    del strategy.configure_ddp  # back to the class's
    model = strategy.model
    assert model is not None
    children = dict(model._modules)  # with names for one module, and those for None
    shown = nn.ModuleList(_embedding_of(p) for p in sparse_parameters(model).values())
    model._modules.clear()
    model._modules.update({"shown_sparse": shown} | children)
    try:
        strategy.configure_ddp()
    finally:
        model._modules.clear()
        model._modules.update(children)
    if isinstance(strategy.model, DistributedDataParallel):
        group = strategy.model.process_group
        strategy.model.register_comm_hook(None, lambda _, bucket: average(group, bucket.buffer()))


def _embedding_of(parameter: nn.Parameter) -> nn.Embedding:
    """An embedding that holds a parameter, of any shape."""
    embedding = nn.Embedding(1, 1, sparse=True, device="meta")
    embedding.weight = parameter
    return embedding


def average(group: "dist.ProcessGroup", gradient: Tensor) -> Future[Tensor]:
    """The mean of a dense or a sparse gradient over all replicas; it may overwrite the gradient.

    Equals `dist.all_reduce(gradient.div_(world_size))`. All replicas must call it in one order, as
    `DistributedDataParallel` calls its communication hook.
    """
    share = gradient.coalesce() if gradient.is_sparse else gradient
    share.div_(dist.get_world_size(group))
    if not share.is_sparse:
        work = dist.all_reduce(share, group=group, async_op=True)
        return work.get_future().then(lambda done: done.value()[0])
    mean: Future[Tensor] = Future()
    mean.set_result(_sum_of_rows(share, group))
    return mean


def _sum_of_rows(gradient: Tensor, group: "dist.ProcessGroup") -> Tensor:
    """The sum over all replicas of a coalesced gradient."""
    indices, values = gradient.indices().t(), gradient.values()
    num_rows = torch.tensor([values.shape[0]], device=gradient.device)
    numbers = [int(number) for number in _gathered(num_rows, group)]
    longest = max(numbers)
    parts = zip(
        _gathered(_filled(indices, longest), group),
        _gathered(_filled(values, longest), group),
        numbers,
        strict=True,
    )
    kept = [(where[:number], what[:number]) for where, what, number in parts]
    of_all, rows = (torch.cat(each) for each in zip(*kept, strict=True))
    return torch.sparse_coo_tensor(of_all.t(), rows, gradient.shape).coalesce()


def _filled(rows: Tensor, number: int) -> Tensor:
    """So many rows, those after the given ones of zeros."""
    filled = rows.new_zeros(number, *rows.shape[1:])
    filled[: rows.shape[0]] = rows
    return filled


def _gathered(own: Tensor, group: "dist.ProcessGroup") -> list[Tensor]:
    """A tensor of each replica, all of one shape."""
    everyone = [torch.empty_like(own) for _ in range(dist.get_world_size(group))]
    dist.all_gather(everyone, own, group=group)
    return everyone
