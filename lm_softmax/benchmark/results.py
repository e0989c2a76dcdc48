"""What was measured of each contestant, and how they compare in the same rounds."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from math import isfinite
from statistics import median
from typing import Any, NamedTuple

from lm_softmax.benchmark.contestants import Kind
from lm_softmax.benchmark.memory import Memory
from lm_softmax.benchmark.timing import FORWARD, FORWARD_BACKWARD, Rounds, paired_ratios

BACKWARD = "backward"


class Spread(NamedTuple):
    """Of the values of all rounds."""

    min: float
    median: float
    max: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread | None":
        """None for no values."""
        return cls(min(values), median(values), max(values)) if values else None


@dataclass
class Result:
    """A contestant at one vocabulary size. What was not measured is None, or not there.

    Attributes:
        vocab_size: Number of words.
        name: Of the contestant.
        kind: See `Entry`.
        group: See `Entry`.
        what: What was called.
        loss: Mean loss in nats without gradients.
        truth: What naive code in float64 gives for the same weights.
        problem: Why it was not timed; empty if it was.
        rounds: Milliseconds of each part, one a round; "backward" is forward and backward together
            less forward without gradients.
        speed_up: Times faster than the standard, forward and backward, in the same round.
        memory: Of one step.
        memory_problem: Why there is no figure of the memory; empty if there is or none was asked.
    """

    vocab_size: int
    name: str
    kind: Kind
    group: str
    what: str
    loss: float | None = None
    truth: float | None = None
    problem: str = ""
    rounds: Rounds = field(default_factory=dict)
    speed_up: list[float] = field(default_factory=list)
    memory: Memory | None = None
    memory_problem: str = ""

    def add_rounds(self, rounds: Rounds) -> None:
        """Takes the times, and derives those of backward."""
        self.rounds = dict(rounds)
        pairs = zip(rounds[FORWARD_BACKWARD], rounds[FORWARD], strict=True)
        self.rounds[BACKWARD] = [together - forward for together, forward in pairs]

    def spread(self, part: str) -> Spread | None:
        """Milliseconds of a part."""
        return Spread.of(self.rounds.get(part, []))

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        memory = None if self.memory is None else self.memory._asdict()
        spreads = {f"{part}_ms": _spread_dict(self.spread(part)) for part in self.rounds}
        return {
            "vocab_size": self.vocab_size,
            "name": self.name,
            "kind": self.kind,
            "group": self.group,
            "what": self.what,
            "loss": _finite(self.loss),
            "loss_float64": self.truth,
            "problem": self.problem,
            **spreads,
            "speed_up": _spread_dict(Spread.of(self.speed_up)),
            "memory": memory,
            "memory_problem": self.memory_problem,
            "rounds_ms": self.rounds,
        }


class Comparison(NamedTuple):
    """A head and another contestant, forward and backward together, paired by round.

    Attributes:
        vocab_size: Number of words.
        head: Name of the head.
        other: Name of the other.
        times_faster: The other's time over the head's.
        time_ratio: The head's time over the other's.
        memory_ratio: The head's extra memory over the other's; None if either was not measured.
    """

    vocab_size: int
    head: str
    other: str
    times_faster: Spread
    time_ratio: Spread
    memory_ratio: float | None

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        spreads = {name: getattr(self, name)._asdict() for name in ("times_faster", "time_ratio")}
        return self._asdict() | spreads


def compare(results: Sequence[Result], against: Sequence[str] = ()) -> Iterator[Comparison]:
    """Each head with those that compute the same function, its floor, and those asked for.

    Args:
        results: Of all contestants and vocabulary sizes.
        against: Names of contestants that every head is compared with.
    """
    timed = [result for result in results if result.rounds]
    for head in (result for result in timed if result.kind == "head"):
        for other in timed:
            same = other.group == head.group and other.kind != "head"
            asked = other.name in against and other is not head
            if other.vocab_size == head.vocab_size and (same or asked):
                yield _comparison(head, other)


def _comparison(head: Result, other: Result) -> Comparison:
    own, others = head.rounds[FORWARD_BACKWARD], other.rounds[FORWARD_BACKWARD]
    faster, ratio = Spread.of(paired_ratios(own, others)), Spread.of(paired_ratios(others, own))
    assert faster is not None
    assert ratio is not None
    memory = None
    if head.memory is not None and other.memory is not None and other.memory.extra_mib > 0:
        memory = head.memory.extra_mib / other.memory.extra_mib
    return Comparison(head.vocab_size, head.name, other.name, faster, ratio, memory)


def _finite(value: float | None) -> float | None:
    return value if value is None or isfinite(value) else None  # JSON has no other number


def _spread_dict(spread: Spread | None) -> dict[str, float] | None:
    return None if spread is None else spread._asdict()
