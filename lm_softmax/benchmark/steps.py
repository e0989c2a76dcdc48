"""A contestant's steps, timed in this process or in one of its own."""

from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from typing import NamedTuple

import torch
from torch.optim import Optimizer

from lm_softmax.allocator import keep_pages
from lm_softmax.benchmark.contestants import Contestant, Workshop
from lm_softmax.benchmark.line_up import find_entry
from lm_softmax.benchmark.memory import KILLED
from lm_softmax.benchmark.problem import Problem
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


class Request(NamedTuple):
    """What another process needs to make a contestant; plain values.

    Attributes:
        problem: The problem.
        name: Of the contestant.
        spec: See `contestants.Entry`.
        bias: See `line_up`.
        optimizer: Class and options; None for none.
        num_threads: Of torch.
        keep_pages: Whether its allocator keeps freed memory.
    """

    problem: Problem
    name: str
    spec: Spec
    bias: bool
    optimizer: Spec | None
    num_threads: int
    keep_pages: bool


class Apart:
    """In a process of its own, whose allocator knows no other contestant's blocks.

    Args:
        request: Which contestant.
    """

    def __init__(self, request: Request) -> None:
        self._pool = ProcessPoolExecutor(1, mp_context=get_context("spawn"))
        self._request = request

    def step(self) -> dict[str, float]:
        """See `timing.Steps`."""
        try:
            return self._pool.submit(_step_there, self._request).result()
        except BrokenProcessPool:
            raise RuntimeError(KILLED) from None

    def close(self) -> None:
        """See `timing.Steps`."""
        self._pool.shutdown()


_made: list[Here] = []  # in the other process


def _step_there(request: Request) -> dict[str, float]:
    """What the other process does; the contestant is made at the first step."""
    if not _made:
        torch.set_num_threads(request.num_threads)
        if request.keep_pages:
            keep_pages()
        entry = find_entry(request.problem, request.name, request.spec, bias=request.bias)
        optimizer = None if request.optimizer is None else optimizer_factory(request.optimizer)
        contestant = Workshop(request.problem).build(entry)
        _made.append(Here(contestant, optimizer, request.problem.device))
    return _made[0].step()


def _is_sparse(parameter: torch.nn.Parameter) -> bool:
    return parameter.grad is not None and parameter.grad.is_sparse
