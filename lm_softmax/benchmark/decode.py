"""`benchmark decode`: `topk` and `sample` of heads beside naive code: checked, timed, weighed."""

import gc
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from lm_softmax.benchmark.agreement import TOLERANCES
from lm_softmax.benchmark.line_up import make_head
from lm_softmax.benchmark.memory import MIB, high_water
from lm_softmax.benchmark.problem import Problem
from lm_softmax.benchmark.processes import in_new_process
from lm_softmax.benchmark.results import Spread
from lm_softmax.benchmark.timing import Clock, first_line, in_turn, paired_ratios
from lm_softmax.heads import OutputHead
from lm_softmax.specs import Spec

MOST = 10  # the larger k
GREEDY, TOP, SAMPLING = "greedy", f"top-{MOST}", "sampling"
TASKS = (GREEDY, TOP, SAMPLING)
HEAD, NAIVE = "head", "naive"
SIDES = (HEAD, NAIVE)
TIMED_ROWS, TIMED_CALLS = 64, 4  # at least, one after another as when text is made
CHECKED_ROWS, CHECKED_DRAWS, MOST_SIGMAS = 32, 512, 6.0
Call = Callable[[OutputHead, Tensor, torch.Generator], object]
Key = tuple[int, str]  # batch size, task


class Source(Protocol):
    """Where a head comes from; plain values, so that another process can make it too."""

    def head(self) -> OutputHead:
        """The head, on its device."""


@dataclass(frozen=True)
class Random:
    """A head with the seed's weights; those that it starts at 0 are drawn as well.

    Attributes:
        problem: Sizes, device, dtype and seed.
        spec: Class and options.
    """

    problem: Problem
    spec: Spec

    def head(self) -> OutputHead:
        """See `Source`."""
        head = make_head(self.spec, self.problem, self.problem.counts(), bias=True).eval()
        generator = torch.Generator().manual_seed(self.problem.seed)
        for parameter in head.parameters():  # of a tree: else all texts would be decoded alike
            if parameter.dim() == 2 and not parameter.any():
                drawn = torch.rand(parameter.shape, generator=generator) * 2 - 1
                parameter.data.copy_(drawn * parameter.shape[1] ** -0.5)
        return head


class Trial(NamedTuple):
    """A head that takes part, and the hidden vectors it decodes, `(N, hidden_size)`."""

    name: str
    source: Source
    head: OutputHead
    hidden: Tensor


@dataclass
class Result:
    """A head at one batch size and task, beside naive code. What was not measured is not there.

    Attributes:
        vocab_size: Number of words.
        head: Name of the head.
        batch_size: Rows of a call.
        task: "greedy" is `topk(hidden, 1)`, "top-10" `topk(hidden, 10)`, "sampling"
            `sample(hidden)`.
        rounds: Milliseconds a row, one a round, by "head" and "naive".
        memory: MiB by the same.
        problem: Why there is no time or memory; empty if there is, or none was asked.
    """

    vocab_size: int
    head: str
    batch_size: int
    task: str
    rounds: dict[str, list[float]] = field(default_factory=dict)
    memory: dict[str, float] = field(default_factory=dict)
    problem: str = ""

    def spread(self, side: str) -> Spread | None:
        """Milliseconds a row."""
        return Spread.of(self.rounds.get(side, []))

    def times_faster(self) -> Spread | None:
        """Than the naive code in the same round."""
        ours, naive = (self.rounds.get(side, []) for side in SIDES)
        return Spread.of(paired_ratios(ours, naive)) if ours else None

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        spreads = {f"{side}_ms": _plain(self.spread(side)) for side in SIDES}
        memory = {f"{side}_mib": self.memory.get(side) for side in SIDES}
        return {
            "vocab_size": self.vocab_size,
            "head": self.head,
            "batch_size": self.batch_size,
            "task": self.task,
            **spreads,
            "times_faster": _plain(self.times_faster()),
            **memory,
            "problem": self.problem,
            "rounds_ms": self.rounds,
        }


def naive_draw(head: OutputHead, hidden: Tensor, generator: torch.Generator) -> Tensor:
    """One word a row by the inverse of the distribution function, over all words.

    It is what is the fastest of the naive ways: `torch.multinomial` draws a number for each word.
    """
    sums = head.log_prob(hidden).exp().cumsum(-1)
    uniform = torch.rand(len(sums), 1, generator=generator, device=sums.device, dtype=sums.dtype)
    return torch.searchsorted(sums, uniform * sums[:, -1:], right=True)


CALLS: Mapping[str, Mapping[str, Call]] = {
    HEAD: {
        GREEDY: lambda head, hidden, _: head.topk(hidden, 1),
        TOP: lambda head, hidden, _: head.topk(hidden, MOST),
        SAMPLING: lambda head, hidden, generator: head.sample(hidden, generator=generator),
    },
    NAIVE: {
        GREEDY: lambda head, hidden, _: head.log_prob(hidden).topk(1),
        TOP: lambda head, hidden, _: head.log_prob(hidden).topk(MOST),
        SAMPLING: naive_draw,
    },
}


@torch.no_grad()
def wrong(trial: Trial) -> str:
    """What is wrong with what a head decodes, by naive code; empty if nothing is.

    Values are compared, and words by their values: those that are closer than the dtype tells may
    change places. Of draws, the mean log-probability is compared with the negative entropy.
    """
    head, rows = trial.head, trial.hidden[:CHECKED_ROWS]
    log_probs = head.log_prob(rows)
    tolerance = TOLERANCES[rows.dtype]
    for k in (1, MOST):
        found = head.topk(rows, k)
        best = log_probs.topk(k).values
        limit = tolerance * best.abs().clamp(min=1)
        for values in (found.log_probs, log_probs.gather(1, found.indices)):
            error = (values - best).abs()
            if not (error <= limit).all():
                return f"topk(hidden, {k}) is off by up to {error.max():.3g} nats"
    generator = _generator(rows, 0)
    drawn = head.sample(rows[:1].expand(CHECKED_DRAWS, -1), generator=generator)[:, 0]
    row = log_probs[0].double()
    mean = (row.exp() * row).sum()
    sigma = ((row.exp() * (row - mean) ** 2).sum() / CHECKED_DRAWS).sqrt()
    error = (row[drawn].mean() - mean).abs()
    if not error <= MOST_SIGMAS * sigma + tolerance * mean.abs().clamp(min=1):
        return f"draws have a mean log-probability that is off by {error / sigma:.3g} sigma"
    return ""


def measure(
    trials: Sequence[Trial],
    batch_sizes: Sequence[int],
    num_rounds: int,
    num_warmups: int,
    say: Callable[[str], object] = lambda line: None,
) -> list[Result]:
    """Times every head and its naive code once a round, at each batch size and task.

    Each round takes other hidden vectors, the same ones for all, and begins with another head.
    A head that decodes wrongly is not timed; a call that fails, for want of memory say, is out.
    """
    results = {
        (trial.name, batch_size, task): Result(trial.head.vocab_size, trial.name, batch_size, task)
        for trial in trials
        for batch_size in batch_sizes
        for task in TASKS
    }
    for trial in trials:
        say(f"comparing {trial.name} with naive code")
        problem = wrong(trial)
        for (name, *_), result in results.items():
            if name == trial.name:
                result.problem = problem
    for number in range(num_warmups + num_rounds):
        say(f"round {number + 1} of {num_warmups + num_rounds}")
        for batch_size in batch_sizes:
            for task in TASKS:
                for trial in in_turn(trials, number):
                    result = results[trial.name, batch_size, task]
                    _time(result, trial, number, counts=number >= num_warmups)
    return list(results.values())


@torch.no_grad()
def _time(result: Result, trial: Trial, number: int, *, counts: bool) -> None:
    """One round of one head at one batch size and task."""
    if result.problem:
        return
    clock = Clock(str(trial.hidden.device))
    batches = _batches(trial.hidden, result.batch_size, number)
    times = {}
    try:
        for side in SIDES if number % 2 else reversed(SIDES):
            call, generator = CALLS[side][result.task], _generator(trial.hidden, number)
            took = clock.time(
                lambda call=call, generator=generator: [  # type: ignore[misc]
                    call(trial.head, batch, generator) for batch in batches
                ]
            )
            times[side] = took / (len(batches) * result.batch_size)
    except RuntimeError as error:
        result.problem, result.rounds = first_line(error), {}
        return
    if counts:
        for side, time in times.items():
            result.rounds.setdefault(side, []).append(time)


def _batches(hidden: Tensor, batch_size: int, number: int) -> list[Tensor]:
    num_calls = max(TIMED_CALLS, TIMED_ROWS // batch_size)
    size = num_calls * batch_size
    places = (torch.arange(size, device=hidden.device) + number * size) % len(hidden)
    return list(torch.split(hidden[places], batch_size))


def _generator(hidden: Tensor, seed: int) -> torch.Generator:
    return torch.Generator(hidden.device).manual_seed(seed)


def weigh(results: Sequence[Result], trial: Trial) -> None:
    """Adds the memory of a head's calls, each side in a process of its own.

    It is the high-water mark of a call over what was held before the first one: work buffers and
    whatever a head keeps from call to call are in it, parameters and hidden vectors are not.
    """
    own = [result for result in results if result.head == trial.name and result.rounds]
    keys: list[Key] = sorted({(result.batch_size, result.task) for result in own})
    if not own:
        return
    hidden = trial.hidden[: max(batch_size for batch_size, _ in keys)].cpu()
    for side in SIDES:
        try:
            found = in_new_process(
                _weigh_here, trial.source, hidden, side, keys, torch.get_num_threads()
            )
        except RuntimeError as error:
            for result in own:
                result.problem = f"no memory of the {side}: {first_line(error)}"
            continue
        for result in own:
            result.memory[side] = found[result.batch_size, result.task]


@torch.no_grad()
def _weigh_here(
    source: Source, hidden: Tensor, side: str, keys: Sequence[Key], num_threads: int
) -> dict[Key, float]:
    """What the new process does; small batches come first."""
    torch.set_num_threads(num_threads)
    head = source.head()
    device = str(next(head.parameters()).device)
    rows = hidden.to(device)
    tiny = torch.ones(64, 64, device=device)
    (tiny @ tiny).log_softmax(1).topk(2)  # loads libraries and starts threads
    gc.collect()  # what made the head
    before = high_water(lambda: None, device).before
    found = {}
    for key in keys:
        batch, call = rows[: key[0]], CALLS[side][key[1]]
        peak = 0
        for _ in range(2):  # what a head keeps may be made at the second call
            mark = high_water(lambda: call(head, batch, _generator(batch, 0)), device)  # noqa: B023
            peak = max(peak, mark.peak)
        found[key] = max(0, peak - before) / MIB
    return found


def _plain(spread: Spread | None) -> dict[str, float] | None:
    return None if spread is None else spread._asdict()
