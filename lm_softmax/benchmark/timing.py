"""Times of the parts of a step, contestant after contestant, round after round."""

from collections.abc import Callable, Mapping, Sequence
from time import perf_counter
from typing import NamedTuple, Protocol, TypeVar

import torch

FORWARD, FORWARD_BACKWARD, OPTIMIZER = "forward", "forward_backward", "optimizer"
PARTS = (FORWARD, FORWARD_BACKWARD, OPTIMIZER)
Rounds = dict[str, list[float]]  # part: milliseconds, one a round
ItemT = TypeVar("ItemT")


class Timings(NamedTuple):
    """What `time_rounds` found.

    Attributes:
        rounds: Milliseconds of each part that was measured, by contestant.
        failures: Why a contestant has none, by contestant.
    """

    rounds: dict[str, Rounds]
    failures: dict[str, str]


class Steps(Protocol):
    """The steps of a contestant."""

    def step(self) -> dict[str, float]:
        """Milliseconds of each part of one, from an idle device to an idle device.

        Raises:
            RuntimeError: If it fails, for want of memory say.
        """

    def close(self) -> None:
        """Ends what was started for them."""


def time_rounds(
    contestants: Mapping[str, Steps],
    num_rounds: int,
    *,
    num_warmups: int = 1,
    after_round: Callable[[int], object] = lambda number: None,
) -> Timings:
    """Times every contestant once a round, so that a machine that slows down slows all of them.

    Each round begins with the next contestant. One that fails in any round is out.

    Args:
        contestants: By name; they are closed in the end.
        num_rounds: Rounds that count.
        num_warmups: Rounds before, that do not.
        after_round: Called with the number of rounds done.

    Returns:
        Times, and failures.
    """
    rounds: dict[str, Rounds] = {name: {} for name in contestants}
    failures: dict[str, str] = {}
    try:
        for number in range(-num_warmups, num_rounds):
            for name in in_turn(list(contestants), number):
                if name in failures:
                    continue
                try:
                    times = contestants[name].step()
                except RuntimeError as error:
                    failures[name] = first_line(error)
                    del rounds[name]
                    continue
                if number >= 0:
                    for part, milliseconds in times.items():
                        rounds[name].setdefault(part, []).append(milliseconds)
            after_round(number + num_warmups + 1)
    finally:
        for contestant in contestants.values():
            contestant.close()
    return Timings(rounds, failures)


def in_turn(items: Sequence[ItemT], number: int) -> list[ItemT]:
    """The order of a round by its number: each begins with the next item."""
    first = number % len(items) if items else 0
    return [*items[first:], *items[:first]]


def call_rounds(
    calls: Mapping[str, Callable[[], ItemT]], num_rounds: int, say: Callable[[str], object]
) -> dict[str, list[ItemT]]:
    """What each call returns, round after round.

    Args:
        calls: By name.
        num_rounds: How often each is called.
        say: Told how far it is.
    """
    results: dict[str, list[ItemT]] = {name: [] for name in calls}
    for number in range(num_rounds):
        say(f"round {number + 1} of {num_rounds}")
        for name in in_turn(list(calls), number):
            results[name].append(calls[name]())
    return results


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


def paired_ratios(times: Sequence[float], others: Sequence[float]) -> list[float]:
    """How many times faster than another in the same round: `others / times`, round by round."""
    return [other / time for time, other in zip(times, others, strict=True)]


def first_line(error: Exception) -> str:
    """What an error says, in one line that is not too long."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0] if len(lines[0]) <= 200 else f"{lines[0][:197]}..."
