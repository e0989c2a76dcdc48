"""Times of the parts of a step, contestant after contestant, round after round, in one process."""

from collections.abc import Callable, Mapping, Sequence
from time import perf_counter
from typing import NamedTuple

import torch
from torch.optim import Optimizer

from lm_softmax.benchmark.contestants import Contestant

FORWARD, FORWARD_BACKWARD, OPTIMIZER = "forward", "forward_backward", "optimizer"
PARTS = (FORWARD, FORWARD_BACKWARD, OPTIMIZER)
MakeOptimizer = Callable[[list[torch.nn.Parameter]], Optimizer]
Rounds = dict[str, list[float]]  # part: milliseconds, one a round


class Timings(NamedTuple):
    """What `time_rounds` found.

    Attributes:
        rounds: Milliseconds of each part that was measured, by contestant.
        failures: Why a contestant has none, by contestant.
    """

    rounds: dict[str, Rounds]
    failures: dict[str, str]


def time_rounds(
    contestants: Mapping[str, Contestant],
    num_rounds: int,
    *,
    num_warmups: int = 1,
    optimizer: MakeOptimizer | None = None,
    device: str = "cpu",
    after_round: Callable[[int], object] = lambda number: None,
) -> Timings:
    """Times every contestant once a round, so that a machine that slows down slows all of them.

    Each round begins with the next contestant. A part is measured from an idle device to an idle
    device. Of the optimizer, a step and the dropping of the gradients; one that cannot take a
    contestant's gradients, sparse ones say, leaves that part out. A contestant that fails in any
    round, for want of memory say, is out.

    Args:
        contestants: By name.
        num_rounds: Rounds that count.
        num_warmups: Rounds before, that do not.
        optimizer: Makes the optimizer of a contestant with parameters; None times none.
        device: Where they run.
        after_round: Called with the number of rounds done.

    Returns:
        Times, and failures.
    """
    clock = Clock(device)
    optimizers = {
        name: optimizer(contestant.parameters())
        for name, contestant in contestants.items()
        if optimizer is not None and contestant.parameters()
    }
    rounds: dict[str, Rounds] = {name: {} for name in contestants}
    failures: dict[str, str] = {}
    names = list(contestants)
    for number in range(-num_warmups, num_rounds):
        first = number % len(names) if names else 0
        for name in names[first:] + names[:first]:
            if name in failures:
                continue
            try:
                times = _step(contestants[name], optimizers.get(name), clock)
            except RuntimeError as error:
                contestants[name].clear()
                failures[name] = first_line(error)
                del rounds[name]
                optimizers.pop(name, None)
                continue
            if OPTIMIZER not in times:
                optimizers.pop(name, None)
            if number >= 0:
                for part, milliseconds in times.items():
                    rounds[name].setdefault(part, []).append(milliseconds)
        after_round(number + num_warmups + 1)
    return Timings(rounds, failures)


class Clock:
    """Milliseconds of a call, the device idle before and after.

    Args:
        device: "cpu" or a CUDA device.
    """

    def __init__(self, device: str) -> None:
        self._wait: Callable[[], None] = lambda: None
        if device.startswith("cuda"):
            self._wait = lambda: torch.cuda.synchronize(device)

    def time(self, call: Callable[[], object]) -> float:
        """How long a call takes."""
        self._wait()
        start = perf_counter()
        call()
        self._wait()
        return (perf_counter() - start) * 1000


def _step(contestant: Contestant, optimizer: Optimizer | None, clock: Clock) -> dict[str, float]:
    times = {
        FORWARD: clock.time(contestant.forward),
        FORWARD_BACKWARD: clock.time(contestant.forward_backward),
    }
    if optimizer is not None:
        try:
            times[OPTIMIZER] = clock.time(lambda: _optimize(contestant, optimizer))
        except RuntimeError:
            if not any(_is_sparse(parameter) for parameter in contestant.parameters()):
                raise
    contestant.clear()
    return times


def _optimize(contestant: Contestant, optimizer: Optimizer) -> None:
    optimizer.step()
    contestant.after_step()
    contestant.clear()


def _is_sparse(parameter: torch.nn.Parameter) -> bool:
    return parameter.grad is not None and parameter.grad.is_sparse


def paired_ratios(times: Sequence[float], others: Sequence[float]) -> list[float]:
    """How many times faster than another in the same round: `others / times`, round by round."""
    return [other / time for time, other in zip(times, others, strict=True)]


def first_line(error: Exception) -> str:
    """What an error says, in one line that is not too long."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0] if len(lines[0]) <= 200 else f"{lines[0][:197]}..."
