"""Sparse gradients: whose they are, what can train on them, and how they are clipped.

A sparse gradient holds the rows that a step touched, so that a step costs the same whatever the
size of the vocabulary.
"""

from collections.abc import Iterable, Iterator, Mapping, Set
from typing import Any, cast

import torch
from lightning.pytorch import Trainer
from torch import Tensor, nn
from torch.optim import SGD, Adagrad, Optimizer, SparseAdam

# Options that must be off: torch refuses them, but for momentum, whose buffer would come to hold
# the rows of all steps so far.
TRAINS_ON_SPARSE: dict[type[Optimizer], tuple[str, ...]] = {
    Adagrad: ("weight_decay", "fused"),
    SGD: ("weight_decay", "fused", "momentum"),
    SparseAdam: (),
}


def sparse_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Trainable parameters whose gradients are sparse tensors, each under its first name.

    A module names them by a method `sparse_parameters()`, its own and those of modules below it;
    `nn.Embedding` and `nn.EmbeddingBag` by their option `sparse`, wherever they are.

    Raises:
        ValueError: If modules share a parameter and only some give it sparse gradients: the sum
            would be dense.
    """
    first: dict[nn.Parameter, tuple[str, bool]] = {}
    for name, parameter, is_sparse in _uses(model, ""):
        other, was_sparse = first.setdefault(parameter, (name, is_sparse))
        if is_sparse != was_sparse:
            one, another = (name, other) if is_sparse else (other, name)
            raise ValueError(
                f"{one} and {another} are one parameter, with sparse gradients here and dense ones"
                f" there: set sparse alike in both, or model.tie_weights to false"
            )
    return {name: parameter for parameter, (name, is_sparse) in first.items() if is_sparse}


def embeds_sparsely(module: nn.Module) -> bool:
    """Whether it is one of torch's embeddings, with sparse gradients."""
    return isinstance(module, nn.Embedding | nn.EmbeddingBag) and module.sparse


def listed(sparse: Mapping[str, nn.Parameter]) -> str:
    """The first names, as an error tells them."""
    names = list(sparse)
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def check_optimizer(optimizer: Optimizer, sparse: Mapping[str, nn.Parameter]) -> None:
    """Refuse what only fails at the first step, or makes sparse gradients dense as LBFGS does.

    Args:
        optimizer: One of torch's; others are taken at their word.
        sparse: Parameters whose gradients are sparse, by name.

    Raises:
        ValueError: If the optimizer, or an option of it, does not go with sparse gradients, or it
            takes no others and there are others; its steps are to be differentiable, or by a
            number beyond float32.
    """
    kind, known = type(optimizer).__name__, set(sparse.values())
    if not f"{type(optimizer).__module__}.".startswith("torch.optim."):
        return
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    if type(optimizer) is SparseAdam and (dense := len(set(parameters) - known)):
        raise ValueError(
            f"SparseAdam takes sparse gradients alone, and those of {dense} parameters are dense:"
            f" set model.optimizer to torch.optim.Adagrad, which takes both"
        )
    for group in optimizer.param_groups:
        if known.isdisjoint(group["params"]):
            continue
        if type(optimizer) not in TRAINS_ON_SPARSE:
            raise ValueError(
                f"{kind} does not go with the sparse gradients of {listed(sparse)}:"
                f" set model.optimizer to torch.optim.Adagrad, or sparse to false"
            )
        for option in TRAINS_ON_SPARSE[type(optimizer)]:
            if value := group.get(option):
                raise ValueError(
                    f"{kind} with {option}={value} does not go with the sparse gradients of"
                    f" {listed(sparse)}: set model.optimizer.init_args.{option} to"
                    f" {'false' if value is True else 0}, or sparse to false"
                )
    largest = torch.finfo(torch.float32).max
    for option, value in (pair for group in optimizer.param_groups for pair in group.items()):
        if isinstance(value, float) and largest < abs(value) < float("inf"):
            raise ValueError(
                f"{kind} cannot step by {option}={value}, which float32 does not hold: set"
                f" model.optimizer.init_args.{option} within {largest:.3g}"
            )
    if any(group.get("differentiable") for group in optimizer.param_groups):
        raise ValueError(
            f"{kind} with differentiable=True does not step parameters that are trained: set"
            f" model.optimizer.init_args.differentiable to false"
        )


def check_scaling(optimizer: Optimizer, trainer: Trainer) -> None:
    """Refuse what only fails at the first step: a fused optimizer takes scaled gradients.

    Raises:
        ValueError: If gradients are to be clipped before the optimizer unscales them.
    """
    scales = getattr(trainer, "scaler", None) is not None
    clips = (trainer.gradient_clip_val or 0) > 0
    if scales and clips and getattr(optimizer, "_step_supports_amp_scaling", False):
        raise ValueError(
            f"a fused optimizer cannot clip gradients under 16-mixed, as {type(optimizer).__name__}"
            f" unscales them itself: set model.optimizer.init_args.fused to false, or"
            f" trainer.precision to bf16-mixed"
        )


def any_unusual(parameters: Iterable[nn.Parameter]) -> bool:
    """Whether a gradient is sparse, or sharded among processes."""
    given = [p.grad for p in parameters if p.grad is not None]
    return any(gradient.is_sparse or _is_sharded(gradient) for gradient in given)


def local(gradient: Tensor) -> Tensor:
    """What this process holds of a gradient; changes of it in place are changes of the gradient."""
    return cast(Any, gradient).to_local() if _is_sharded(gradient) else gradient


def placed_like(parameter: nn.Parameter, share: Tensor) -> Tensor:
    """The gradient of a parameter whose share in this process is given; see `local`."""
    if not _is_sharded(parameter):
        return share
    from torch.distributed.tensor import DTensor  # not in every build of torch

    placed = cast(Any, parameter)
    return DTensor.from_local(
        share,
        placed.device_mesh,
        placed.placements,
        run_check=False,
        shape=placed.shape,
        stride=placed.stride(),
    )


def _is_sharded(gradient: Tensor) -> bool:
    return hasattr(gradient, "device_mesh")  # a DTensor, which not every build of torch has


@torch.no_grad()
def clip_gradients(parameters: Iterable[nn.Parameter], limit: float, algorithm: str) -> None:
    """Clip gradients of which any may be sparse or sharded, in place.

    Equals `nn.utils.clip_grad_norm_` or `nn.utils.clip_grad_value_` on the dense ones. Sparse ones
    are coalesced first, for a row that occurs twice is one row of their sum; the norm is taken in
    float32 or better.

    Args:
        parameters: Those whose gradients are clipped together.
        limit: The largest Euclidean norm of all gradients, or the largest absolute value.
        algorithm: "norm" or "value".

    Raises:
        ValueError: If the limit is below 0: gradients would change their sign.
    """
    if not limit >= 0:
        raise ValueError(f"the limit of clipped gradients must be at least 0, got {limit}")
    values, shares = [], []
    for parameter in parameters:
        if (gradient := parameter.grad) is None:
            continue
        if gradient.is_sparse and not gradient.is_coalesced():
            parameter.grad = gradient = gradient.coalesce()
        values.append(gradient._values() if gradient.is_sparse else local(gradient))  # no copy
        shares.append(_shared_by(gradient))
    if algorithm == "value":
        for value in values:
            value.clamp_(-limit, limit)
    elif values:
        scale = (limit / (_norm(values, shares) + 1e-6)).clamp(max=1.0)
        for value in values:
            value.mul_(scale.to(value.device))


def _norm(tensors: list[Tensor], shares: list[tuple[Any, ...]]) -> Tensor:
    """Euclidean norm of all tensors as one vector, in float32 or better.

    Args:
        tensors: What this process holds.
        shares: The process groups over which each is sharded.
    """
    norms = [
        torch.linalg.vector_norm(tensor, dtype=torch.promote_types(tensor.dtype, torch.float32))
        for tensor in tensors
    ]
    of_groups: list[Tensor] = []
    for groups in dict.fromkeys(shares):
        alike = [norm for norm, own in zip(norms, shares, strict=True) if own == groups]
        norm = torch.linalg.vector_norm(torch.stack([norm.to(alike[0].device) for norm in alike]))
        for group in groups:
            squares = norm.double().square()
            torch.distributed.all_reduce(squares, group=group)
            norm = squares.sqrt().to(norm.dtype)
        of_groups.append(norm.to(norms[0].device))
    return torch.linalg.vector_norm(torch.stack(of_groups))


def _shared_by(gradient: Tensor) -> tuple[Any, ...]:
    """The process groups of the dimensions of a mesh that a gradient is sharded over."""
    if not _is_sharded(gradient):
        return ()
    placed = cast(Any, gradient)
    return tuple(
        placed.device_mesh.get_group(dim)
        for dim, placement in enumerate(placed.placements)
        if not placement.is_replicate()
    )


def _uses(
    module: nn.Module, prefix: str, above: Set[nn.Parameter] = frozenset()
) -> Iterator[tuple[str, nn.Parameter, bool]]:
    """Each trainable parameter of each module, and whether its gradients are sparse there.

    Args:
        module: Where to look, and below.
        prefix: Its name.
        above: What modules above it have named.
    """
    named = getattr(module, "sparse_parameters", None)
    sparse = above if named is None else above | set(named())
    for name, parameter in module.named_parameters(prefix, recurse=False):
        if parameter.requires_grad:
            yield name, parameter, parameter in sparse or embeds_sparsely(module)
    for name, child in module.named_children():
        yield from _uses(child, f"{prefix}.{name}" if prefix else name, sparse)
