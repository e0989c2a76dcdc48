"""`benchmark train`: every contestant checked, timed and weighed at each vocabulary size."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from lm_softmax.benchmark.agreement import is_wrong, true_loss
from lm_softmax.benchmark.contestants import Contestant, Entry, Workshop
from lm_softmax.benchmark.line_up import line_up
from lm_softmax.benchmark.memory import measure
from lm_softmax.benchmark.problem import Problem
from lm_softmax.benchmark.results import Result
from lm_softmax.benchmark.steps import Apart, Here, optimizer_factory
from lm_softmax.benchmark.timing import (
    FORWARD_BACKWARD,
    Steps,
    first_line,
    paired_ratios,
    time_rounds,
)
from lm_softmax.specs import Spec

Say = Callable[[str], object]


@dataclass(frozen=True)
class Plan:
    """What to measure.

    Attributes:
        problem: Sizes but for the vocabulary, dtype, device, targets.
        vocab_sizes: Vocabularies.
        specs: Heads.
        bias: Whether softmaxes have biases where a spec does not say.
        without: Contestants with one of these in their name are left out; the standard stays.
        num_rounds: Rounds that count.
        num_warmups: Rounds before.
        optimizer: Class and options; None for none.
        memory: Whether to measure memory.
        against: Contestants that every head is compared with, by name.
        apart: Whether each contestant is timed in a process of its own.
        keep_pages: Whether the allocators of those processes keep freed memory.
    """

    problem: Problem
    vocab_sizes: Sequence[int]
    specs: Sequence[Spec]
    bias: bool = True
    without: Sequence[str] = ()
    num_rounds: int = 7
    num_warmups: int = 1
    optimizer: Spec | None = None
    memory: bool = True
    against: Sequence[str] = ()
    apart: bool = False
    keep_pages: bool = False


def run(plan: Plan, say: Say = lambda line: None) -> tuple[list[Result], dict[str, str]]:
    """Measures all.

    Args:
        plan: What.
        say: Told how far it is.

    Returns:
        Results in the order of vocabulary sizes and contestants, and by name why a peer is absent.

    Raises:
        ValueError: If the options of a head, of the optimizer or of the targets are wrong, or a
            contestant to compare with is not there; before anything is measured.
    """
    if plan.optimizer is not None:
        optimizer_factory(plan.optimizer)  # raises
    problems = [replace(plan.problem, vocab_size=size) for size in plan.vocab_sizes]
    line_ups = [line_up(problem, plan.specs, bias=plan.bias) for problem in problems]
    kept = [
        [
            entry
            for entry in entries
            if entry.kind == "standard" or not _has(entry.name, plan.without)
        ]
        for entries, _ in line_ups
    ]
    _check_names(plan.against, [entry.name for entries in kept for entry in entries])
    results: list[Result] = []
    for problem, entries in zip(problems, kept, strict=True):
        results += _run_one(problem, entries, plan, say)
    absent = {name: why for _, absent in line_ups for name, why in absent.items()}
    return results, {name: why for name, why in absent.items() if not _has(name, plan.without)}


def _run_one(problem: Problem, entries: Sequence[Entry], plan: Plan, say: Say) -> list[Result]:
    where = f"{problem.vocab_size:,} words"
    say(f"{where}: comparing losses")
    results, contestants = check(problem, entries)
    total = plan.num_warmups + plan.num_rounds
    times, failures = time_rounds(
        _steps(problem, entries, contestants, plan),
        plan.num_rounds,
        num_warmups=plan.num_warmups,
        after_round=lambda number: say(f"{where}: round {number} of {total}"),
    )
    for result in results:
        result.problem = result.problem or failures.get(result.name, "")
        if result.name in times:
            result.add_rounds(times[result.name])
    _add_speed_ups(results)
    contestants.clear()
    if problem.device.startswith("cuda"):
        torch.cuda.empty_cache()
    for entry, result in zip(entries, results, strict=True):
        if plan.memory and result.rounds and result.kind != "floor":
            say(f"{where}: memory of {entry.name}")
            _add_memory(result, problem, entry, plan)
    return results


def _steps(
    problem: Problem, entries: Sequence[Entry], contestants: dict[str, Contestant], plan: Plan
) -> dict[str, Steps]:
    """Of the contestants that may be timed; `contestants` is empty where others make them."""
    if not plan.apart:
        make = None if plan.optimizer is None else optimizer_factory(plan.optimizer)
        device = problem.device
        return {name: Here(one, make, device) for name, one in contestants.items()}
    found: dict[str, Steps] = {}
    num_threads = torch.get_num_threads()
    for entry in entries:
        if contestants.pop(entry.name, None) is not None:
            found[entry.name] = Apart(
                problem,
                entry.name,
                entry.spec,
                bias=plan.bias,
                optimizer=plan.optimizer,
                num_threads=num_threads,
                keeps_pages=plan.keep_pages,
            )
    if problem.device.startswith("cuda"):
        torch.cuda.empty_cache()
    return found


def check(problem: Problem, entries: Sequence[Entry]) -> tuple[list[Result], dict[str, Contestant]]:
    """Builds contestants and compares their losses, with and without gradients, with naive code.

    Returns:
        A result for each entry, and the contestants that may be timed.
    """
    workshop = Workshop(problem)
    results: list[Result] = []
    contestants: dict[str, Contestant] = {}
    truths: dict[str, float | None] = {}
    for entry in entries:
        result = Result(problem.vocab_size, entry.name, entry.kind, entry.group, entry.what)
        results.append(result)
        try:
            if entry.group not in truths:
                truths[entry.group] = true_loss(workshop.head(entry), *workshop.inputs)
            contestant = workshop.build(entry)
            result.truth = truths[entry.group]
            result.problem = _disagreement(contestant, result, problem)
        except Exception as error:  # another package may fail in any way
            result.problem = f"failed: {first_line(error)}"
        if not result.problem:
            contestants[entry.name] = contestant
    return results, contestants


def _disagreement(contestant: Contestant, result: Result, problem: Problem) -> str:
    """What is wrong with the losses, empty if nothing is."""
    without, together = contestant.forward(), contestant.forward_backward()
    contestant.clear()
    if without is None or together is None:
        result.truth = None
        return ""
    result.loss = float(without)
    for loss, how in ((result.loss, "without"), (float(together), "with")):
        if is_wrong(loss, result.truth, problem.torch_dtype):
            expected = "" if result.truth is None else f" where naive code has {result.truth:.6g}"
            return f"wrong loss {how} gradients: {loss:.6g}{expected}"
    return ""


def _add_speed_ups(results: Sequence[Result]) -> None:
    standard = next(result for result in results if result.kind == "standard")
    for result in results:
        if standard.rounds and result.rounds:
            times = result.rounds[FORWARD_BACKWARD], standard.rounds[FORWARD_BACKWARD]
            result.speed_up = paired_ratios(*times)


def _add_memory(result: Result, problem: Problem, entry: Entry, plan: Plan) -> None:
    try:
        result.memory = measure(problem, entry, bias=plan.bias, num_threads=torch.get_num_threads())
    except RuntimeError as error:
        result.memory_problem = first_line(error)


def _check_names(asked: Sequence[str], known: Sequence[str]) -> None:
    for name in asked:
        if name not in known:
            found = ", ".join(dict.fromkeys(known))
            raise ValueError(f"no contestant {name} to compare with, but {found}")


def _has(name: str, parts: Sequence[str]) -> bool:
    return any(part.lower() in name.lower() for part in parts)
