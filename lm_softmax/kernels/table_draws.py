"""Draws from log-probabilities of all words, or from the fewest that hold a share of them."""

import torch
from torch import Tensor

from lm_softmax.kernels.draws import Draws, check_total, draw, part_sums, softmax_weights


def draw_from_table(log_probs: Tensor, draws: Draws) -> Tensor:
    """Columns `(N, num_samples)` drawn from log-probabilities `(N, V)`, up to a constant a row.

    Raises:
        ValueError: If a row has no distribution but nan.
    """
    if draws.top_p is not None:
        return _draw_nucleus(log_probs, draws, draws.top_p)
    weights = softmax_weights(log_probs, draws.temperature)
    return draws.view(draw(weights, draws.rows(weights), draws.generator))


def _draw_nucleus(log_probs: Tensor, draws: Draws, top_p: float) -> Tensor:
    """The same from the nucleus.

    Holtzman et al. 2020, "The curious case of neural text degeneration", section 3.1.
    A word is in it if the words before it, by falling probability and then by id, hold less than
    `top_p` of the total. Nothing is sorted: words are drawn from all, and whether one is in the
    nucleus is told by the sum over the words before it. If it is not, neither are the words behind
    it, and what was drawn of these is drawn again from the words before it alone; if it is, what
    was drawn before it is accepted. So accepted words have the distribution of the nucleus, and a
    test settles about half of a row's draws, as the pivot of a quicksort does.
    """
    num, size = log_probs.shape
    ids = torch.arange(size, device=log_probs.device)
    rows = torch.arange(num, device=log_probs.device)
    weights = softmax_weights(log_probs, draws.temperature)
    limit = part_sums(weights).sum(1, keepdim=True)
    check_total(limit)
    limit = limit * top_p
    drawn = draws.view(draw(weights, draws.rows(weights), draws.generator))
    waiting = torch.ones_like(drawn, dtype=torch.bool)
    inner_value = log_probs.new_full((num, 1), torch.inf)  # the last word known to be inside
    inner_word = ids.new_full((num, 1), -1)
    while rows.numel():
        of_rows = log_probs if rows.numel() == num else log_probs[rows]
        words = drawn[rows]
        values = of_rows.gather(1, words)
        first = waiting[rows].to(torch.uint8).argmax(1, keepdim=True)  # draws are alike: any does
        value, word = values.gather(1, first), words.gather(1, first)
        before = _precede(of_rows, ids, value, word)
        left = weights[rows].mul_(before)
        inside = part_sums(left).sum(1, keepdim=True) < limit[rows]
        inner_value[rows] = torch.where(inside, value, inner_value[rows])
        inner_word[rows] = torch.where(inside, word, inner_word[rows])
        again = waiting[rows] & ~inside & ~_precede(values, words, value, word)
        outer = again.any(1).nonzero().squeeze(1)
        left = weights[rows[outer]] = left[outer]
        row, column = again[outer].nonzero().unbind(1)
        words[outer[row], column] = draw(left, row, draws.generator)
        drawn[rows], values = words, of_rows.gather(1, words)
        accepted = _precede(values, words, inner_value[rows], inner_word[rows] + 1)
        waiting[rows] &= ~accepted
        rows = waiting.any(1).nonzero().squeeze(1)
    return drawn


def _precede(values: Tensor, words: Tensor, value: Tensor, word: Tensor) -> Tensor:
    """Whether words of these log-probabilities come before the given one of each row."""
    return (values > value).logical_or_((values == value).logical_and_(words < word))
