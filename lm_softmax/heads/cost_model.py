"""Predicted time of a training step of an adaptive softmax, and the cutoffs that minimise it."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, NamedTuple

import torch
from torch import Tensor

Device = Literal["cpu", "cuda"]

MAX_TAILS = 4  # Grave et al. 2017 search among 1 to 4
MAX_BORDERS = 600  # beyond, candidates for a cutoff are a geometric grid of the ids
MIN_COVERAGE = 0.5  # share of the running text that the short-list makes up at least
MIN_GROWTH = 2.0  # a tail has as many words at least as all that are more frequent
SLACK = 0.02  # share of a whole step that is spent on fewer tails and a longer short-list


@dataclass(frozen=True)
class CostModel:
    """Seconds that the parts of a step take on a kind of device.

    A product of `(n, d)` and `(d, k)` matrices takes
    `max(product, multiply * n * k * d + move * (n * k + n * d + k * d))`: as Grave et al. 2017
    (section 4.1, equation 5) measured, a constant while a dimension is small, and affine in it
    beyond. Their threshold is `k0`; here it follows from the two slopes, in each dimension alike.

    Attributes:
        product: Of the smallest matrix product.
        multiply: Of a multiplication and an addition inside of one.
        move: Of an entry of its operands or its result.
        logit: Of the passes over a logit: softmax, its derivative, the sum for the bias.
        parameter: Of an entry of a gradient, written, scaled and read, and of the optimizer's step.
        cluster: Of a tail, whatever its size.
        tokens: Number of tokens in a step.
    """

    product: float
    multiply: float
    move: float
    logit: float
    parameter: float
    cluster: float
    tokens: int

    def matmul(self, rows: Tensor, inner: int, columns: Tensor) -> Tensor:
        """Of a product of `(rows, inner)` and `(inner, columns)`; element by element."""
        entries = rows * columns + inner * (rows + columns)
        time = self.multiply * inner * rows * columns + self.move * entries
        return time.clamp(min=self.product)

    def softmax(self, rows: Tensor, width: int, words: Tensor) -> Tensor:
        """Of one softmax and its gradients: logits, gradient of the input, gradient of the weight.

        The three products have the same three dimensions.
        """
        products = 3 * self.matmul(rows, width, words)
        return products + self.logit * rows * words + self.parameter * words * (width + 1)

    def encoder(self, hidden_size: int) -> float:
        """Of an LSTM layer as wide as its input, the least that a step takes besides the head.

        Eight matrices, forward and for two gradients, multiply each token.
        """
        return 24 * self.multiply * self.tokens * hidden_size**2

    def tail(self, rows: Tensor, hidden_size: int, width: int, words: Tensor) -> Tensor:
        """Of a tail cluster: its projection, likewise three products, and its softmax."""
        projection = 3 * self.matmul(rows, hidden_size, torch.full_like(rows, width))
        fixed = self.cluster + self.parameter * width * hidden_size
        return fixed + projection + self.softmax(rows, width, words)


# "cpu": one core of an AMD EPYC (Zen 4), float32, AdamW; "cuda": orders of magnitude from the data
# sheet of an H100 in bfloat16, not measured. `python -m lm_softmax.benchmark cutoffs` measures them
# on the machine at hand. Only their ratios decide the clusters.
COST_MODELS: dict[Device, CostModel] = {
    "cpu": CostModel(
        product=2e-6,
        multiply=2.6e-11,
        move=4e-10,
        logit=1.2e-9,
        parameter=3e-9,
        cluster=4e-4,
        tokens=64 * 35,
    ),
    "cuda": CostModel(
        product=8e-6,
        multiply=5e-15,
        move=1.5e-12,
        logit=1e-11,
        parameter=1.5e-11,
        cluster=1.5e-4,
        tokens=16_384,
    ),
}


def cost_model_of(device: str) -> CostModel:
    """The constants of `cost_model="cpu"` or `"cuda"`.

    Raises:
        ValueError: If there are none by that name.
    """
    for name, model in COST_MODELS.items():
        if name == device:
            return model
    raise ValueError(f"cost_model must be one of {', '.join(COST_MODELS)}, got {device!r}")


def predicted_time(
    model: CostModel,
    hidden_size: int,
    counts: Tensor,
    cutoffs: Sequence[int],
    tail_sizes: Sequence[int],
) -> float:
    """Seconds of a step with these clusters: equation 7 of Grave et al. 2017, in three dimensions.

    `softmax(N, d, cutoffs[0] + J) + sum_i tail(p_i * N, d, tail_sizes[i], k_i)` for N tokens, J
    tails, and the share p_i of the running text that the k_i words of tail i make up.

    Args:
        model: Constants of the device.
        hidden_size: Width of the short-list.
        counts: Frequency of each word by rank; 0 counts as 1.
        cutoffs: Ids at which tails begin.
        tail_sizes: Width of each.
    """
    covered = _covered(counts)
    borders = [*cutoffs, counts.numel()]
    time = _short_list(model, hidden_size, covered.new_tensor(borders[:1]), len(cutoffs))
    for (start, end), width in zip(pairwise(borders), tail_sizes, strict=True):
        rows = model.tokens * (covered[end] - covered[start])
        time = time + model.tail(rows, hidden_size, width, covered.new_tensor(end - start))
    return time.item()


class Clustering(NamedTuple):
    """Cutoffs and the predicted seconds of a step."""

    cutoffs: list[int]
    time: float


def optimal_cutoffs(
    model: CostModel,
    hidden_size: int,
    counts: Tensor,
    widths: Sequence[Sequence[int]],
    *,
    slack: float = SLACK,
    min_coverage: float = MIN_COVERAGE,
    min_growth: float = MIN_GROWTH,
) -> Clustering:
    """The clusters of the shortest predicted step, or of nearly the shortest with more capacity.

    Dynamic programming over the borders of clusters (Grave et al. 2017, section 4.3) from the last
    tail to the first, for each number of tails. Clusters are ranges of ranks, the most frequent
    words first, which the paper shows to be the best.

    Where widths fall from tail to tail, time alone would make tails of a single word, only to get
    to a narrower one, and a short-list of thirty words. So the short-list covers `min_coverage` of
    the text, and each tail ends at `min_growth` times the id where it begins, or later. And times
    are as good as the shortest if the difference is at most `slack` of the whole step, head and
    encoder (`CostModel.encoder`): of these, the fewest tails are taken (none if the full softmax is
    one), then the longest short-list, then the shortest time. The paper finds few clusters with
    many words in the short-list to give a better perplexity, and near the optimum the time is flat.

    Borders are searched among all ids, in vocabularies beyond `MAX_BORDERS` words among a geometric
    grid of so many, of neighbours 1 to 3 % apart. The time is then above that of the best of all
    ids by 0.2 % at most where a bound on capacity falls between two of them, else by some 0.001 %.

    Args:
        model: Constants of the device.
        hidden_size: Width of the short-list.
        counts: Frequency of each word by rank, `(vocab_size,)`; 0 counts as 1.
        widths: For each number of tails that is to be tried, the width of each.
        slack: Share of a step that capacity may cost.
        min_coverage: Share of the text that the short-list makes up at least.
        min_growth: Least ratio of the end of a tail to its beginning.

    Raises:
        ValueError: If no clusters are as asked.
    """
    borders = _candidates(counts.numel())
    covered = _covered(counts)[borders]
    found: list[tuple[Tensor, list[Tensor]]] = []  # time by first border, and best next borders
    for sizes in widths:
        rest = torch.full_like(covered, torch.inf)
        rest[-1] = 0
        nexts: list[Tensor] = []
        for width in reversed(sizes):
            times = _tail_times(model, hidden_size, width, borders, covered, min_growth)
            rest, following = (times + rest).min(1)
            nexts.insert(0, following)
        time = rest + _short_list(model, hidden_size, borders.to(rest.dtype), len(sizes))
        found.append((time.masked_fill(covered < min_coverage, torch.inf), nexts))
    shortest = min(time.min().item() for time, _ in found)
    if shortest == torch.inf:
        raise ValueError(
            f"{counts.numel()} words cannot form {min(map(len, widths))} tails, each ending at"
            f" {min_growth:g} times its first id or later, beside a short-list of"
            f" {min_coverage:.0%} of the text"
        )
    limit = shortest + slack * (shortest + model.encoder(hidden_size))
    for time, nexts in sorted(found, key=lambda option: len(option[1])):
        good = (time <= limit).nonzero()
        if good.numel():
            at = int(good[-1])
            best, cutoffs = time[at].item(), []
            for following in nexts:
                cutoffs.append(int(borders[at]))
                at = int(following[at])
            return Clustering(cutoffs, best)
    raise AssertionError("the shortest time is within the limit")


def _covered(counts: Tensor) -> Tensor:
    """Share of the running text that the first i words make up, for i from 0 to all."""
    total = counts.to("cpu", torch.float64).clamp(min=1).cumsum(0)
    return torch.cat([total.new_zeros(1), total / total[-1]])


def _candidates(vocab_size: int) -> Tensor:
    """Ids at which a cluster may begin, and the end of the last, increasing."""
    if vocab_size <= MAX_BORDERS:
        return torch.arange(1, vocab_size + 1, device="cpu")
    steps = torch.arange(MAX_BORDERS, dtype=torch.float64, device="cpu") / (MAX_BORDERS - 1)
    return torch.tensor(sorted(set((vocab_size**steps).round().long().tolist())), device="cpu")


def _short_list(model: CostModel, hidden_size: int, words: Tensor, num_tails: int) -> Tensor:
    """Time of the softmax over the short-list and a word for each tail, that all tokens enter."""
    return model.softmax(torch.full_like(words, model.tokens), hidden_size, words + num_tails)


def _tail_times(
    model: CostModel,
    hidden_size: int,
    width: int,
    borders: Tensor,
    covered: Tensor,
    min_growth: float,
) -> Tensor:
    """Time of a tail from each border (first axis) to each that is far enough, else infinite."""
    words = (borders - borders.unsqueeze(1)).to(covered.dtype)
    rows = model.tokens * (covered - covered.unsqueeze(1))
    times = model.tail(rows.clamp(min=0), hidden_size, width, words.clamp(min=0))
    near = (words <= 0) | (borders < min_growth * borders.unsqueeze(1))
    return times.masked_fill(near, torch.inf)
