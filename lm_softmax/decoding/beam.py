"""Beam search."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lm_softmax.decoding.stepping import (
    Stepper,
    check_num_tokens,
    check_prompt,
    evaluating,
    without,
)
from lm_softmax.encoders import Encoder
from lm_softmax.heads import OutputHead

MOST_CONTINUATIONS = 2**27  # ranked at once, some gigabytes
MOST_EXPONENT = 700.0  # of e in float64


class Hypothesis(NamedTuple):
    """A continuation that beam search found.

    Attributes:
        tokens: Ids after the prompt, the `<eos>` that ended them included.
        log_prob: Their summed log-probability in nats.
        score: `log_prob / len(tokens) ** length_penalty`.
    """

    tokens: list[int]
    log_prob: float
    score: float


@torch.no_grad()
def beam_search(
    encoder: Encoder,
    head: OutputHead,
    prompt: Int[Tensor, "batch time"],
    num_tokens: int,
    *,
    num_beams: int = 4,
    length_penalty: float = 1.0,
    eos_id: int | None = None,
    num_return: int = 1,
    suppress: Sequence[int] = (),
    use_cache: bool = True,
) -> list[list[Hypothesis]]:
    """The best continuations of each row that a search of bounded width finds.

    Each step extends the `num_beams` most probable open hypotheses of a row by each word, which
    `head.topk` gives without looking at all of them, and ranks what comes out by its summed
    log-probability (in float64). Of the first `num_beams`, those that end in `eos_id` are finished;
    the first `num_beams` that do not end stay open. A row is done when `num_beams` hypotheses are
    finished, or after `num_tokens` tokens, which finish what is open.

    With one beam it is greedy decoding; with as many beams as there are continuations it is the
    exact search over all of them. Rows are independent of each other. Prompts of different lengths
    are given one by one.

    Args:
        encoder: Turns tokens into hidden vectors.
        head: Turns a hidden vector into a distribution.
        prompt: Ids, at least one a row.
        num_tokens: Largest number of tokens to add, at least 1.
        num_beams: Number of hypotheses that stay open, at least 1. A step ranks their
            continuations, `batch * num_beams * min(vocab_size, num_beams + 1)` of them, at most
            2**27.
        length_penalty: Exponent of the length that the log-probability is divided by: 0 ranks
            finished hypotheses by their probability, which prefers short ones, 1 by the mean a
            token, more prefers long ones. Hypotheses of one length have the same order with any.
        eos_id: The id that ends a hypothesis. `None`: all have `num_tokens` tokens.
        num_return: Number of hypotheses to return for each row, at most `num_beams`.
        suppress: Ids that are in no hypothesis; the others are normalised again.
        use_cache: Whether the encoder goes on from its cache; the result is the same.

    Returns:
        For each row its hypotheses by descending score; fewer than `num_return` where there are no
        more.

    Raises:
        ValueError: If the prompt is empty or holds an id outside the vocabulary, an option is out
            of its range, or the model gives nan.

    Source:
        Graves, "Sequence Transduction with Recurrent Neural Networks", 2012, arXiv:1211.3711,
        section 2.5, without its prefix probabilities; dividing by a power of the length as in Wu et
        al., "Google's Neural Machine Translation System", 2016, arXiv:1609.08144, equation 14, with
        the length itself in place of `(5 + length) / 6`.
    """
    check_prompt(prompt, head.vocab_size, eos_id)
    check_num_tokens(num_tokens)
    _check_options(num_beams, num_return, length_penalty, num_tokens)
    _check_size(prompt.shape[0], num_beams, num_tokens, head.vocab_size)
    head = without(head, suppress)
    stepper = Stepper(encoder, use_cache=use_cache)
    beams = _Beams(prompt, num_beams, length_penalty, eos_id)
    with evaluating(encoder, head):
        hidden = stepper.feed(prompt.to(torch.int64))
        for step in range(num_tokens):
            # one more than the beams: `<eos>` may be among the best, and leaves them
            best = head.topk(hidden, min(head.vocab_size, num_beams + 1))
            rows = beams.extend(best.log_probs, best.indices)
            if step == num_tokens - 1 or beams.all_done():
                break
            stepper.select_rows(rows)
            hidden = stepper.feed(beams.tokens[:, -1:])
    return beams.best(num_return)


class _Beams:
    """Open and finished hypotheses of each row of a prompt.

    Attributes:
        tokens: Those of the open ones, `(batch * width, length)`; a row begins with one, of no
            token, and has `num_beams` as soon as there are as many.
        sums: Their log-probabilities, `(batch, width)`; `-inf` for places that are not taken.
    """

    def __init__(
        self, prompt: Tensor, num_beams: int, length_penalty: float, eos_id: int | None
    ) -> None:
        batch, device = prompt.shape[0], prompt.device
        self.num_beams = min(num_beams, MOST_CONTINUATIONS)  # no step has more
        self.length_penalty, self.eos_id = length_penalty, eos_id
        dtype = torch.float32 if device.type == "mps" else torch.float64  # which it lacks
        self.tokens = torch.zeros(batch, 0, dtype=torch.int64, device=device)
        self.sums = torch.zeros(batch, 1, dtype=dtype, device=device)
        self.finished: list[list[Hypothesis]] = [[] for _ in range(batch)]

    def extend(
        self,
        log_probs: Float[Tensor, "batch*width k"],
        indices: Int[Tensor, "batch*width k"],
    ) -> Int[Tensor, "batch*width"]:
        """Takes the best words of each open hypothesis; returns the rows that went on."""
        (batch, width), k = self.sums.shape, indices.shape[1]
        totals = (self.sums.view(-1, 1) + log_probs.to(self.sums.dtype)).reshape(batch, -1)
        if totals.isnan().any():
            raise ValueError("the model gives some hypothesis no probability, but nan")
        words = indices.reshape(batch, -1)
        totals, order = totals.sort(dim=-1, descending=True, stable=True)
        words = words.gather(1, order)
        parents = order // k + width * torch.arange(batch, device=order.device)[:, None]
        ends = torch.zeros_like(words, dtype=torch.bool)
        if self.eos_id is not None:
            ends = words == self.eos_id
            self._finish(totals, parents, ends)
        # the first ones that do not end, in their order
        open_first = ends.to(torch.int8).sort(dim=-1, stable=True).indices[:, : self.num_beams]
        rows = parents.gather(1, open_first).flatten()
        self.sums = totals.masked_fill(ends, -torch.inf).gather(1, open_first)
        latest = words.gather(1, open_first).view(-1, 1)
        self.tokens = torch.cat([self.tokens[rows], latest], 1)
        self._close_done_rows()
        return rows

    def all_done(self) -> bool:
        """Whether no hypothesis is open."""
        return not bool(self.sums.isfinite().any())

    def best(self, num_return: int) -> list[list[Hypothesis]]:
        """The finished hypotheses of each row, and the open ones, by descending score."""
        sums = self.sums.tolist()
        tokens = self.tokens.view(*self.sums.shape, -1).tolist()
        found = []
        for done, row_sums, row_tokens in zip(self.finished, sums, tokens, strict=True):
            rest = [
                self._hypothesis(ids, total)
                for ids, total in zip(row_tokens, row_sums, strict=True)
                if total > -math.inf
            ]
            found.append(sorted([*done, *rest], key=lambda one: -one.score)[:num_return])
        return found

    def _finish(self, totals: Tensor, parents: Tensor, ends: Tensor) -> None:
        """Keeps what ended among the first `num_beams`."""
        first = slice(0, self.num_beams)
        done = ends[:, first] & totals[:, first].isfinite()
        rows, _ = done.nonzero(as_tuple=True)
        before = self.tokens[parents[:, first][done]].tolist()
        for row, ids, total in zip(
            rows.tolist(), before, totals[:, first][done].tolist(), strict=True
        ):
            assert self.eos_id is not None
            self.finished[row].append(self._hypothesis([*ids, self.eos_id], total))

    def _close_done_rows(self) -> None:
        """A row with enough finished hypotheses has no open ones."""
        done = [len(hypotheses) >= self.num_beams for hypotheses in self.finished]
        if any(done):
            self.sums[torch.tensor(done, device=self.sums.device)] = -torch.inf

    def _hypothesis(self, tokens: list[int], log_prob: float) -> Hypothesis:
        return Hypothesis(tokens, log_prob, log_prob / len(tokens) ** self.length_penalty)


def _check_options(num_beams: int, num_return: int, length_penalty: float, num_tokens: int) -> None:
    if num_beams < 1:
        raise ValueError(f"num_beams must be at least 1, got {num_beams}")
    if not 1 <= num_return <= num_beams:
        raise ValueError(
            f"num_return must be in [1, num_beams={num_beams}], got {num_return}:"
            " raise num_beams or ask for fewer"
        )
    if not math.isfinite(length_penalty):
        raise ValueError(f"length_penalty must be a finite number, got {length_penalty}")
    if abs(length_penalty) * math.log(num_tokens) > MOST_EXPONENT:
        raise ValueError(
            f"length_penalty={length_penalty} is too large: {num_tokens} tokens to that power are"
            " no number"
        )


def _check_size(batch: int, num_beams: int, num_tokens: int, vocab_size: int) -> None:
    """Refuse a search whose widest step does not fit into memory."""
    width = min(num_beams, vocab_size ** min(num_tokens - 1, num_beams.bit_length()))
    num_ranked = batch * width * min(vocab_size, num_beams + 1)
    if num_ranked > MOST_CONTINUATIONS:
        raise ValueError(
            f"num_beams={num_beams} of {batch} prompts would rank {num_ranked} continuations in a"
            f" step, more than {MOST_CONTINUATIONS}: lower num_beams"
        )
