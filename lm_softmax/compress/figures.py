"""What a model costs: size, and time of its top k."""

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from lm_softmax.heads import TopK

Finder = Callable[[Tensor, int], TopK]
BATCHES = {1: 16, 64: 2}  # batch size: calls timed at once
NUM_ROUNDS = 7
MOST = 10  # the larger k
MB = 1e6


@dataclass
class Figures:
    """A row of the report; what was not measured is None.

    Attributes:
        name: Of the row.
        head_mb: Megabytes (10**6 bytes) of the head's parameters and buffers.
        file_mb: Of a checkpoint of the weights alone.
        num_parameters: Of the whole model, shared ones once; codes are no parameters.
        val_ppl: Exact perplexity of the validation split.
        ms_per_token: Median time of `topk(k)` by "top-K, batch B", in milliseconds a position.
        top_1: Share of validation positions with the source's best word.
        top_10: Share of the source's ten best words among the ten best.
    """

    name: str
    head_mb: float
    file_mb: float | None = None
    num_parameters: int | None = None
    val_ppl: float | None = None
    ms_per_token: dict[str, float] = field(default_factory=dict)
    top_1: float | None = None
    top_10: float | None = None


def megabytes(module: nn.Module) -> float:
    """Of parameters and buffers."""
    held = [*module.parameters(), *module.buffers()]
    return sum(tensor.numel() * tensor.itemsize for tensor in held) / MB


def num_parameters(model: nn.Module) -> int:
    """Shared ones count once."""
    return sum(parameter.numel() for parameter in model.parameters())


def ms_per_token(
    finders: Mapping[str, tuple[Finder, Tensor]], vocab_size: int
) -> dict[str, dict[str, float]]:
    """Median time of top 1 and top 10 at batch sizes 1 and 64, one after another each round.

    Args:
        finders: By name, a `topk` and the hidden vectors it is timed on.
        vocab_size: The largest k.

    Returns:
        By name, milliseconds a position by "top-K, batch B".
    """
    times: dict[str, dict[str, list[float]]] = {name: {} for name in finders}
    for size, num_calls in BATCHES.items():
        for k in (1, min(MOST, vocab_size)):
            for number in range(NUM_ROUNDS + 1):
                for name, (topk, hidden) in finders.items():
                    ids = torch.arange(size * num_calls, device=hidden.device) % len(hidden)
                    batches = torch.split(hidden[ids], size)
                    begin = _now(hidden)
                    for batch in batches:
                        topk(batch, k)
                    took = (_now(hidden) - begin) * 1000 / (size * num_calls)
                    if number:  # the first one warms up
                        times[name].setdefault(f"top-{k}, batch {size}", []).append(took)
    return {
        name: {what: statistics.median(values) for what, values in own.items()}
        for name, own in times.items()
    }


def _now(hidden: Tensor) -> float:
    if hidden.is_cuda:
        torch.cuda.synchronize(hidden.device)
    return time.perf_counter()
