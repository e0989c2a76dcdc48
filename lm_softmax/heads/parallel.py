"""Heads whose matrices exceed one device: each process of a group holds a share of the words.

Import it by its own name; it needs a torch with `torch.distributed`.
"""

from typing import cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard

from lm_softmax.heads.adaptive import AdaptiveSoftmax
from lm_softmax.heads.base import OutputHead
from lm_softmax.heads.clustered import log_frequencies
from lm_softmax.heads.full import FullSoftmax
from lm_softmax.heads.vocabulary_parallel import VocabularyParallel, local
from lm_softmax.kernels.sharded import Share


class _ParallelFullSoftmax(VocabularyParallel, FullSoftmax):
    pass


class _ParallelAdaptiveSoftmax(VocabularyParallel, AdaptiveSoftmax):
    pass


PARALLEL: dict[type[OutputHead], type[VocabularyParallel]] = {
    FullSoftmax: _ParallelFullSoftmax,
    AdaptiveSoftmax: _ParallelAdaptiveSoftmax,
}


def check_shardable(head: OutputHead) -> None:
    """Raises a ValueError if the words of a head cannot be dealt to several processes."""
    if type(head) not in PARALLEL and not isinstance(head, VocabularyParallel):
        raise ValueError(
            f"{type(head).__name__} cannot share its words among processes, which"
            f" {' and '.join(kind.__name__ for kind in PARALLEL)} can: take one of them, or set"
            f" tensor_parallel_size to 1"
        )


def shard_vocabulary(
    head: OutputHead,
    mesh: DeviceMesh,
    *,
    counts: Tensor | None = None,
    tied: dict[nn.Parameter, nn.Parameter] | None = None,
) -> None:
    """Turn a full or an adaptive softmax into one whose words are dealt to the processes of a mesh.

    The rows of words (`weight`, `tail_weights`, `tail_biases`, and `bias` of a full softmax) become
    `DTensor`s with the placement `Shard(0)`, whatever their number; cluster words, projections and
    the bias of a short-list with clusters, all of them small, are replicated. Of the rows each
    process keeps its share of what it holds, on the device of the mesh; what is replicated takes
    the values of the first process. State dictionaries keep their names.

    A head that was made under `torch.device("meta")` has no values: each process then draws those
    of its own rows, and no memory ever holds a whole matrix.

    Gradients are whole: of the rows those of this process, of all else the same in each.

    Args:
        head: The head, in place; it computes what it did before, as a collective.
        mesh: One-dimensional, as `init_device_mesh("cuda", (8,))`.
        counts: Training-set frequencies, from which the biases of a head without values start.
        tied: Sharded parameters by the ones they take the place of, filled here: a module that
            shares a parameter with the head is to take the same one.

    Raises:
        ValueError: If the head is of another kind or the mesh not one-dimensional.
    """
    check_shardable(head)
    if mesh.ndim != 1:
        raise ValueError(f"the mesh must have one dimension, got {mesh.ndim}")
    if isinstance(head, VocabularyParallel):
        raise ValueError("the words of this head are dealt to processes already")
    has_clusters = isinstance(head, AdaptiveSoftmax) and bool(head.cutoffs)
    of_words = ("weight", "tail_weights", "tail_biases") if has_clusters else ("weight", "bias")
    without_values = [name for name, parameter in head.named_parameters() if parameter.is_meta]
    if without_values:
        _make_biases(head, counts)
    shard_parameters(head, mesh, of_words, tied={} if tied is None else tied)
    head.__class__ = PARALLEL[type(head)]
    _draw([head.get_parameter(name) for name in without_values], mesh)


def _make_biases(head: OutputHead, counts: Tensor | None) -> None:
    """Give values to the biases of a head that has none, as its constructor does."""
    for name, parameter in list(head.named_parameters()):
        if parameter.ndim == 1:
            owner, _, last = name.rpartition(".")
            made = nn.Parameter(torch.zeros_like(parameter, device="cpu"))
            setattr(head.get_submodule(owner), last, made)
    if counts is not None:
        assert isinstance(head, FullSoftmax | AdaptiveSoftmax)
        head._start_biases_at(log_frequencies(counts))


@torch.no_grad()
def _draw(parameters: list[nn.Parameter], mesh: DeviceMesh) -> None:
    """Give values to the matrices of a head that had none, as its constructor does."""
    generator = torch.Generator(mesh.device_type)
    generator.manual_seed((torch.initial_seed() + 1 + mesh.get_local_rank()) % 2**63)
    for parameter in parameters:
        own, bound = local(parameter), parameter.shape[-1] ** -0.5
        if parameter.ndim == 2:
            nn.init.uniform_(own, -bound, bound, generator=generator)
            if cast(DTensor, parameter).placements[0].is_replicate():
                dist.broadcast(own, group=mesh.get_group(), group_src=0)


def shard_parameters(
    module: nn.Module,
    mesh: DeviceMesh,
    of_words: tuple[str, ...],
    *,
    tied: dict[nn.Parameter, nn.Parameter],
) -> None:
    """Replace the parameters of a module by `DTensor`s; rows of words are dealt to the processes.

    Args:
        module: Whose parameters, in place.
        mesh: One-dimensional.
        of_words: Names, up to the first dot, of parameters whose rows are words.
        tied: Parameters that were replaced elsewhere, by those they took the place of; completed.
    """
    for name, parameter in list(module.named_parameters()):
        if isinstance(parameter, DTensor):  # of a list that is tied as a whole
            continue
        if parameter not in tied:
            placement: Placement = Replicate()
            if name.partition(".")[0] in of_words:
                placement = Shard(0)
            tied[parameter] = _distributed(parameter, mesh, placement)
        owner, _, last = name.rpartition(".")
        setattr(module.get_submodule(owner), last, tied[parameter])


def _distributed(parameter: nn.Parameter, mesh: DeviceMesh, placement: Placement) -> nn.Parameter:
    """A copy of this process's share; the whole never goes to the device."""
    own = parameter.detach()
    if isinstance(placement, Shard):
        share = Share.of(parameter.shape[0], mesh.get_group())
        own = own[share.start : share.end]
    if own.is_meta:
        own = torch.empty_like(own, device=mesh.device_type)
    else:
        own = own.clone().to(mesh.device_type)
    if isinstance(placement, Replicate) and not parameter.is_meta:
        dist.broadcast(own, group=mesh.get_group(), group_src=0)
    whole = DTensor.from_local(
        own,
        mesh,
        [placement],
        run_check=False,
        shape=parameter.shape,
        stride=parameter.stride(),
    )
    return nn.Parameter(whole, requires_grad=parameter.requires_grad)
