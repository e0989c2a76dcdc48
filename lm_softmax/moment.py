"""What the next training step depends on beside weights and optimizer, in each process."""

import random
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lm_softmax.gradients import local, placed_like
from lm_softmax.parallel import Replica

ROW_DIM = 1  # of the tensors of a carried state: (layers, rows, width)


def random_numbers(device: torch.device) -> dict[str, Any]:
    """The state of the generators of torch, numpy, python and a device, as plain data."""
    name, keys, *position = np.random.get_state()  # noqa: NPY002 the global one is what others use
    return {
        "torch": torch.get_rng_state(),
        "numpy": (name, torch.from_numpy(np.asarray(keys, np.int64)), *position),
        "python": random.getstate(),
        "device": _of_device(device),
    }


def set_random_numbers(state: Mapping[str, Any], device: torch.device) -> None:
    """Sets the generators to what `random_numbers` gave, where they are of the same kind."""
    torch.set_rng_state(state["torch"].cpu())
    name, keys, *position = state["numpy"]
    np.random.set_state((name, keys.cpu().numpy().astype(np.uint32), *position))  # noqa: NPY002
    random.setstate(state["python"])
    kind, numbers = state["device"]
    if kind == device.type and numbers is not None:
        module: Any = torch.get_device_module(device)
        module.set_rng_state(numbers.cpu(), *([] if kind == "mps" else [device]))


def _of_device(device: torch.device) -> tuple[str, Tensor | None]:
    if device.type == "cpu":
        return device.type, None
    module: Any = torch.get_device_module(device)
    return device.type, module.get_rng_state(*([] if device.type == "mps" else [device]))


def detached(state: Any, device: torch.device | str) -> Any:
    """A nested state without its graph, on a device."""
    if isinstance(state, tuple):
        return tuple(detached(item, device) for item in state)
    return None if state is None else state.detach().to(device)


def accumulated(module: nn.Module) -> dict[str, Tensor]:
    """The gradients of batches that no step was taken for yet, by the names of parameters.

    Of parameters that are dealt to several processes, the share of this one.
    """
    return {
        name: local(parameter.grad).detach().cpu()
        for name, parameter in module.named_parameters()
        if parameter.grad is not None
    }


def set_accumulated(module: nn.Module, gradients: Mapping[str, Tensor]) -> None:
    """Gives the parameters their gradients back."""
    for name, parameter in module.named_parameters():
        if name in gradients:
            parameter.grad = placed_like(parameter, gradients[name].to(parameter.device))


def gathered(moment: dict[str, Any], world_size: int, rank: int) -> list[dict[str, Any]]:
    """The moments of all processes, on the first one; an empty list on the others."""
    if world_size == 1:
        return [moment]
    moments: list[Any] | None = [None] * world_size if rank == 0 else None
    torch.distributed.gather_object(moment, moments)  # between processes of one run
    return moments or []


def own(
    moments: Sequence[Mapping[str, Any]], world_size: int, rank: int, replica: Replica
) -> dict[str, Any]:
    """What a process takes of a checkpoint's moments.

    Of as many processes and replicas as there were before, each goes on with its own. Among another
    number, a process has the random numbers of the replica of its rank, if there was one, and its
    share of the rows of all states; gradients that were accumulated are left to nobody.
    """
    if len(moments) == world_size and moments[0]["replica"][1] == replica.size:
        return dict(moments[rank])
    # processes that share the words of a head hold the same rows
    before = list({moment["replica"][0]: moment for moment in moments}.values())
    moment: dict[str, Any] = {"random": None, "window": [], "gradients": {}}
    if replica.rank < len(before):
        moment["random"] = before[replica.rank]["random"]
    rows = sum(each["state"][0] for each in before) // replica.size
    joined = _joined([each["state"][1] for each in before])
    moment["state"] = (rows, _rows(joined, replica.rank * rows, rows))
    return moment


def _joined(states: Sequence[Any]) -> Any:
    if isinstance(states[0], tuple):
        return tuple(_joined(parts) for parts in zip(*states, strict=True))
    return None if states[0] is None else torch.cat([*states], ROW_DIM)


def _rows(state: Any, begin: int, rows: int) -> Any:
    if isinstance(state, tuple):
        return tuple(_rows(part, begin, rows) for part in state)
    return None if state is None else state.narrow(ROW_DIM, begin, rows).clone()
