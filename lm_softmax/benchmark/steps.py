"""A contestant's steps, timed in this process or in one of its own."""

from collections.abc import Callable

import torch
from torch.optim import Optimizer

from lm_softmax.benchmark.contestants import Contestant, Workshop
from lm_softmax.benchmark.line_up import find_entry
from lm_softmax.benchmark.problem import Problem
from lm_softmax.benchmark.processes import OwnProcess
from lm_softmax.benchmark.timing import FORWARD, FORWARD_BACKWARD, OPTIMIZER, Clock
from lm_softmax.specs import Spec

MakeOptimizer = Callable[[list[torch.nn.Parameter]], Optimizer]
OPTIMIZERS = {
    name: cls
    for name, cls in vars(torch.optim).items()
    if isinstance(cls, type) and issubclass(cls, Optimizer) and cls is not Optimizer
}


def optimizer_factory(spec: Spec) -> MakeOptimizer:
    """Makes an optimizer of `torch.optim` whose learning rate is 0, so that no round differs.

    Raises:
        ValueError: If there is no such optimizer, or it refuses its options.
    """
    cls = spec.find(OPTIMIZERS)
    options = {**spec.options, "lr": 0.0}

    def make(parameters: list[torch.nn.Parameter]) -> Optimizer:
        optimizer: Optimizer = cls(parameters, **options)
        return optimizer

    try:
        make([torch.nn.Parameter(torch.zeros(1))])
    except (ValueError, TypeError, RuntimeError) as error:
        raise ValueError(f"{spec}: {error}") from error
    return make


class Here:
    """In this process.

    Of the optimizer, a step and the dropping of the gradients is timed; one that cannot take the
    contestant's gradients, sparse ones say, leaves that part out.

    Args:
        contestant: Whose steps.
        optimizer: Makes the optimizer, if there are parameters; None times none.
        device: Where it runs.
    """

    def __init__(
        self, contestant: Contestant, optimizer: MakeOptimizer | None = None, device: str = "cpu"
    ) -> None:
        self._contestant, self._clock = contestant, Clock(device)
        parameters = contestant.parameters()
        self._optimizer = optimizer(parameters) if optimizer and parameters else None

    def step(self) -> dict[str, float]:
        """See `timing.Steps`."""
        try:
            return self._step()
        except RuntimeError:
            self._contestant.clear()
            raise

    def close(self) -> None:
        """See `timing.Steps`."""

    def _step(self) -> dict[str, float]:
        times = {
            FORWARD: self._clock.time(self._contestant.forward),
            FORWARD_BACKWARD: self._clock.time(self._contestant.forward_backward),
        }
        if self._optimizer is not None:
            try:
                times[OPTIMIZER] = self._clock.time(self._optimize)
            except RuntimeError:
                if not any(map(_is_sparse, self._contestant.parameters())):
                    raise
                self._optimizer = None
        self._contestant.clear()
        return times

    def _optimize(self) -> None:
        assert self._optimizer is not None
        self._optimizer.step()
        self._contestant.after_step()
        self._contestant.clear()


class Apart:
    """In a process of its own, whose allocator knows no other contestant's blocks.

    Args:
        problem: The problem.
        name: Of the contestant.
        spec: See `contestants.Entry`.
        bias: See `line_up`.
        optimizer: Class and options; None for none.
        num_threads: Of torch.
        keeps_pages: Whether the allocator keeps freed memory.
    """

    def __init__(
        self,
        problem: Problem,
        name: str,
        spec: Spec,
        *,
        bias: bool,
        optimizer: Spec | None,
        num_threads: int,
        keeps_pages: bool,
    ) -> None:
        wanted = problem, name, spec, bias, optimizer
        self._process = OwnProcess(
            _find_and_make, wanted, num_threads=num_threads, keeps_pages=keeps_pages
        )

    def step(self) -> dict[str, float]:
        """See `timing.Steps`."""
        times: dict[str, float] = self._process.call("step")
        return times

    def close(self) -> None:
        """See `timing.Steps`."""
        self._process.close()


def _find_and_make(
    problem: Problem, name: str, spec: Spec, bias: bool, optimizer: Spec | None
) -> Here:
    """What the other process begins with."""
    entry = find_entry(problem, name, spec, bias=bias)
    make = None if optimizer is None else optimizer_factory(optimizer)
    return Here(Workshop(problem).build(entry), make, problem.device)


def _is_sparse(parameter: torch.nn.Parameter) -> bool:
    return parameter.grad is not None and parameter.grad.is_sparse
