"""A model dealt to several devices: what belongs where under Lightning's `ModelParallelStrategy`.

The strategy has a mesh of `data_parallel_size` times `tensor_parallel_size` processes. Those of one
row of it read the same batches and share the words of the output head and the embedding; those of
one column read different batches and share the rows of all parameters, by FSDP2.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple, cast

import lightning.pytorch as pl
import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn

from lm_softmax.encoders import AdaptiveEmbedding, WordEmbedding
from lm_softmax.heads import OutputHead

STEPS = ("training_step", "validation_step", "test_step", "predict_step")
METHODS = ("loss", "log_prob", "topk", "sample")
SEED_STRIDE = 0x9E3779B97F4A7C15  # of 2**64, the golden ratio: seeds of neighbours lie far apart


class Replica(NamedTuple):
    """Which part of a batch a process reads."""

    rank: int
    size: int  # number of parts

    @classmethod
    def of(cls, trainer: pl.Trainer) -> "Replica":
        """Every process has its own, but for those that share the words of a head."""
        if isinstance(strategy := getattr(trainer, "strategy", None), ModelParallelStrategy):
            mesh = strategy.device_mesh["data_parallel"]
            return cls(mesh.get_local_rank(), mesh.size())
        return cls(trainer.global_rank, trainer.world_size)


def summed(tensor: Tensor, trainer: pl.Trainer) -> Tensor:
    """The sum over all parts of a batch, each counted once."""
    if Replica.of(trainer).size == 1:
        return tensor
    group, strategy = None, trainer.strategy
    if isinstance(strategy, ModelParallelStrategy):
        group = strategy.device_mesh["data_parallel"].get_group()
    return cast(Tensor, strategy.reduce(tensor, group=group, reduce_op="sum"))


def gathered(own: Any, trainer: pl.Trainer | None) -> list[Any]:
    """An object of each part of a batch, in the order of their ranks."""
    if trainer is None or trainer.world_size == 1:
        return [own]
    everyone: list[Any] = [None] * trainer.world_size
    torch.distributed.all_gather_object(everyone, (Replica.of(trainer).rank, own))
    return list(dict(everyone).values())


def seed(trainer: pl.Trainer) -> None:
    """Give each replica of several random numbers of its own, from the seed of the first process.

    Dropout and negatives then differ among replicas, and are the same in the processes that share
    the words of a head, which compute the same hidden vectors.
    """
    rank, size = Replica.of(trainer)
    if trainer.world_size > 1:
        first = trainer.strategy.broadcast(torch.initial_seed())
        numbers = rank + 1 + size * trainer.global_step
        torch.manual_seed((first + numbers * SEED_STRIDE) % 2**63)


def check(head: OutputHead, encoder: nn.Module, trainer: pl.Trainer) -> None:
    """Refuse what a `ModelParallelStrategy` would only fail at later, or never tell.

    Args:
        head: The output head.
        encoder: The encoder, with its `embedding`.
        trainer: With its strategy.

    Raises:
        ValueError: If checkpoints would be folders of shards, or the head or a tied embedding
            cannot share its words.
    """
    if not isinstance(strategy := trainer.strategy, ModelParallelStrategy):
        return
    if strategy._save_distributed_checkpoint:
        raise ValueError(
            "checkpoints are to be one file, which every command reads: set"
            " trainer.strategy.init_args.save_distributed_checkpoint to false"
        )
    mesh = strategy.device_mesh
    data, tensor = mesh["data_parallel"].size(), mesh["tensor_parallel"].size()
    if tensor == 1:
        return
    from lm_softmax.heads.parallel import check_shardable  # not in every build of torch

    check_shardable(head)
    if not _is_tied(head, encoder):
        return
    if not isinstance(encoder.embedding, WordEmbedding | AdaptiveEmbedding):
        raise ValueError(
            f"{type(encoder.embedding).__name__} cannot share its words among processes: set"
            f" model.tie_weights to false, or tensor_parallel_size to 1"
        )
    if data > 1:
        raise ValueError(
            f"tied weights cannot be dealt to both data_parallel_size={data} and"
            f" tensor_parallel_size={tensor}: set one of them to 1, or model.tie_weights to false"
        )


def check_sizes(strategy: Any) -> None:
    """Refuse sizes of a `ModelParallelStrategy` that do not multiply to the number of processes.

    Raises:
        ValueError: If they do not.
    """
    if not isinstance(strategy, ModelParallelStrategy):
        return
    world_size = strategy.num_nodes * strategy.num_processes
    data, tensor = strategy._data_parallel_size, strategy._tensor_parallel_size
    data = strategy.num_nodes if data == "auto" else data
    tensor = strategy.num_processes if tensor == "auto" else tensor
    if not isinstance(data, int) or not isinstance(tensor, int) or data * tensor != world_size:
        raise ValueError(
            f"data_parallel_size={data} times tensor_parallel_size={tensor} must be the number of"
            f" processes, which is {world_size}: trainer.devices={strategy.num_processes} on"
            f" trainer.num_nodes={strategy.num_nodes}"
        )


def shard(model: nn.Module, mesh: Any) -> None:
    """Deal the parameters of a model with `encoder` and `head` to the processes of a mesh, once.

    With `tensor_parallel_size` above 1 the rows of words go to the processes that share a batch,
    and all else in the encoder to all processes, by FSDP2. Otherwise everything goes to the
    replicas, by FSDP2: block by block of the encoder, and what is left as one.

    Args:
        model: The Lightning module, in place.
        mesh: Of two dimensions, "data_parallel" and "tensor_parallel".
    """
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
    from torch.distributed.tensor import DTensor

    encoder, head = cast(Any, model.encoder), cast(Any, model.head)
    if any(isinstance(parameter, DTensor) for parameter in model.parameters()):
        return
    data, tensor = mesh["data_parallel"], mesh["tensor_parallel"]
    if tensor.size() == 1:
        for block in _blocks(encoder):
            fully_shard(block, mesh=data)
        if not _is_tied(head, encoder):
            fully_shard(head, mesh=data)
        fully_shard(model, mesh=data)
        for step in STEPS:
            register_fsdp_forward_method(model, step)
    else:
        of_words = _shard_words(head, encoder, tensor)
        if data.size() > 1:
            for module in of_words:
                fully_shard(module, mesh=data)
        elsewhere = {parameter for module in of_words for parameter in module.parameters()}
        fully_shard(encoder, mesh=mesh._flatten("all"), ignored_params=elsewhere)
    for method in METHODS:
        register_fsdp_forward_method(head, method)


def _shard_words(head: OutputHead, encoder: Any, mesh: Any) -> list[nn.Module]:
    """Deal the words of the head, and of the embedding where it can be; returns the two."""
    from lm_softmax.heads.parallel import shard_parameters, shard_vocabulary

    tied: dict[nn.Parameter, nn.Parameter] = {}
    shard_vocabulary(head, mesh, tied=tied)
    if not isinstance(encoder.embedding, WordEmbedding | AdaptiveEmbedding):
        return [head]
    shard_parameters(encoder.embedding, mesh, ("weight", "tail_weights"), tied=tied)
    return [head, encoder.embedding]


def _is_tied(head: nn.Module, encoder: nn.Module) -> bool:
    return not set(head.parameters()).isdisjoint(encoder.parameters())


def _blocks(module: nn.Module) -> Iterator[nn.Module]:
    """The members of the outermost lists of modules: the layers of a Transformer."""
    for child in module.children():
        if isinstance(child, nn.ModuleList):
            yield from child
        else:
            yield from _blocks(child)
