"""The constants of the cost model of an adaptive softmax, measured on the machine at hand."""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from lm_softmax.heads import AdaptiveSoftmax
from lm_softmax.heads.cost_model import COST_MODELS, CostModel, predicted_time
from lm_softmax.heads.cutoffs import zipf_counts
from lm_softmax.kernels.dense import Gradients, Matrix, Objective
from lm_softmax.kernels.dense_pass import dense_pass

# rows, width and words of the products that a short-list and tails consist of
PRODUCTS = [
    *((2048, 256, 2000), (2048, 512, 1000), (512, 128, 4000), (512, 64, 8000), (512, 32, 8000)),
    *((256, 16, 16_000), (128, 64, 16_000), (32, 32, 30_000), (16, 16, 30_000), (4, 64, 30_000)),
]
SOFTMAXES = [(512, 16, 8000), (256, 32, 8000), (128, 64, 16_000), (512, 64, 4000)]
FIT_STEPS = 50
PARAMETERS = (60_000, 64)  # words and width of the head whose optimizer step is timed


class Clock:
    """Median seconds of calls on a device, in a dtype of the operands of products."""

    def __init__(self, device: str, dtype: torch.dtype, repeats: int) -> None:
        self.device, self.dtype, self.repeats = torch.device(device), dtype, repeats

    def once(self, call: Callable[[], object]) -> float:
        """Of one call."""
        self._wait()
        start = time.perf_counter()
        call()
        self._wait()
        return time.perf_counter() - start

    def median(self, call: Callable[[], object]) -> float:
        """Of `repeats` calls after one to warm up."""
        call()
        return statistics.median(self.once(call) for _ in range(self.repeats))

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


class Step:
    """A training step of a head: loss, gradients, and AdamW's update, on targets of one text."""

    def __init__(
        self,
        clock: Clock,
        hidden_size: int,
        counts: Tensor,
        tokens: int,
        cutoffs: Sequence[int],
        tail_sizes: Sequence[int],
    ) -> None:
        self.clock, device = clock, clock.device
        head = AdaptiveSoftmax(hidden_size, counts.numel(), cutoffs=cutoffs, tail_sizes=tail_sizes)
        self.head = head.to(device)
        self.optimizer = torch.optim.AdamW(self.head.parameters(), fused=True)
        generator = torch.Generator().manual_seed(0)
        self.hidden = torch.randn(tokens, hidden_size, generator=generator).to(device)
        self.hidden.requires_grad_()
        covered = counts.cpu().double().clamp(min=1).cumsum(0)
        drawn = torch.rand(tokens, dtype=torch.float64, generator=generator) * covered[-1]
        self.target = torch.searchsorted(covered, drawn, right=True).to(device)

    def __call__(self) -> None:
        """Take one step."""
        dtype = self.clock.dtype
        low = dtype != torch.float32
        with torch.autocast(self.clock.device.type, dtype if low else None, enabled=low):
            loss = self.head(self.hidden, self.target)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.hidden.grad = None


def measure(clock: Clock, hidden_size: int, tokens: int) -> CostModel:
    """The constants of this machine.

    Products alone give `product`, `multiply` and `move`; one softmax with its gradients, less its
    three products, gives `logit`; the step of a head of many parameters and few tokens, less its
    softmax, `parameter`; four small tails, less what they consist of, `cluster`.
    """
    multiply, move = fit_products(
        [
            (rows, inner, columns, clock.median(_product(clock, rows, inner, columns)))
            for shape in PRODUCTS
            for rows, inner, columns in _orders(*shape)
        ]
    )
    product = clock.median(_product(clock, 4, 8, 8))
    model = CostModel(product, multiply, move, 0.0, 0.0, 0.0, tokens)
    rests = [
        (clock.median(_softmax(clock, *shape)) - _softmax_time(model, *shape))
        / (shape[0] * shape[2])
        for shape in SOFTMAXES
    ]
    model = replace(model, logit=max(statistics.median(rests), 0.0))
    words, width = PARAMETERS
    step = Step(clock, width, zipf_counts(words), 4, [], [])
    rest = clock.median(step) - _softmax_time(model, 4, width, words)
    model = replace(model, parameter=max(rest / (words * (width + 1)), 0.0))
    counts = torch.ones(1032, dtype=torch.float64)
    rests = []
    for cutoffs in ([1000, 1008, 1016, 1024], []):
        sizes = [16] * len(cutoffs)
        seconds = clock.median(Step(clock, hidden_size, counts, 256, cutoffs, sizes))
        few = replace(model, tokens=256)
        rests.append(seconds - predicted_time(few, hidden_size, counts, cutoffs, sizes))
    return replace(model, cluster=max((rests[0] - rests[1]) / 4, 0.0))


def fit_products(times: Sequence[tuple[int, int, int, float]]) -> tuple[float, float]:
    """Fit `multiply * n * k * d + move * (n * k + n * d + k * d)` to times of products.

    Least absolute deviations of the logarithm, by reweighted Gauss-Newton steps from the constants
    that ship: a factor counts alike for short and long times, and a few interrupted ones little.

    Args:
        times: Rows, inner and outer width of products, and the seconds of each.

    Returns:
        `multiply` and `move`, both above 0.
    """
    rows, inner, outer, seconds = torch.tensor(times, dtype=torch.float64).unbind(1)
    work = torch.stack([rows * inner * outer, rows * (inner + outer) + inner * outer], 1)
    start = COST_MODELS["cpu"]
    logs = torch.tensor([start.multiply, start.move], dtype=torch.float64).log()
    for _ in range(FIT_STEPS):
        parts = work * logs.exp()
        error = parts.sum(1).log() - seconds.log()
        weights = error.abs().clamp(min=1e-6).rsqrt().unsqueeze(1)
        slopes = parts / parts.sum(1, keepdim=True)
        step = torch.linalg.lstsq(weights * slopes, -weights * error.unsqueeze(1)).solution
        logs += step.flatten().clamp(-1, 1)
    multiply, move = logs.exp().tolist()
    return multiply, move


def _orders(rows: int, width: int, words: int) -> list[tuple[int, int, int]]:
    """Of the logits, the gradient of the input, the gradient of the weight."""
    return [(rows, width, words), (rows, words, width), (words, rows, width)]


def _product(clock: Clock, rows: int, inner: int, outer: int) -> Callable[[], object]:
    left, right, out = (
        torch.ones(shape, dtype=clock.dtype, device=clock.device)
        for shape in ((rows, inner), (inner, outer), (rows, outer))
    )
    return lambda: torch.mm(left, right, out=out)


def _softmax(clock: Clock, rows: int, width: int, words: int) -> Callable[[], object]:
    hidden = torch.randn(rows, width, device=clock.device)
    weight = torch.randn(words, width, device=clock.device)
    bias = torch.zeros(words, device=clock.device)
    target = torch.arange(rows, device=clock.device) % words
    of_all = Gradients(torch.empty_like(hidden), [torch.empty_like(weight)], torch.empty_like(bias))
    matrix, objective = Matrix([weight], bias), Objective()
    return lambda: dense_pass(hidden, matrix, target, objective, clock.dtype, gradients=of_all)


def _softmax_time(model: CostModel, rows: int, width: int, words: int) -> float:
    sizes = torch.tensor([rows, words], dtype=torch.float64)
    return model.softmax(sizes[:1], width, sizes[1:]).item()
