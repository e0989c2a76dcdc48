"""An output head that never gives some words."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lm_softmax.heads import OutputHead
from lm_softmax.heads.base import TopK

NUM_TRIES = 8  # a row drew excluded words that often: its distribution is computed
MOST = math.log(0.9)  # of the probability: beyond it, one minus it loses too many digits


class WithoutWords(OutputHead):
    """Another head's distribution with some words excluded and the rest normalised again.

    `log_prob` equals `log_softmax(head.log_prob(hidden).index_fill(-1, words, -inf), -1)`, and
    `topk` and `sample` are exact for it: `topk` asks the head for as many more words as there are
    excluded ones; `sample` draws again what fell on an excluded word, and within `top_k` draws from
    what `topk` gives. With `top_p` alone, and where nearly all probability is on excluded words, it
    computes the log-probabilities of all words.

    Args:
        head: The head, which is not copied.
        words: Ids to exclude, few of them.

    Raises:
        ValueError: If a word is outside the vocabulary, or none is left.
    """

    words: Tensor

    def __init__(self, head: OutputHead, words: Sequence[int]) -> None:
        super().__init__(head.hidden_size, head.vocab_size, ignore_index=head.ignore_index)
        distinct = sorted(set(words))
        if distinct and not 0 <= distinct[0] <= distinct[-1] < head.vocab_size:
            raise ValueError(
                f"words to exclude must be in [0, vocab_size={head.vocab_size}),"
                f" got ids from {distinct[0]} to {distinct[-1]}"
            )
        if len(distinct) == head.vocab_size:
            raise ValueError(f"no word is left of vocab_size={head.vocab_size}")
        self.head = head
        self.register_buffer("words", torch.tensor(distinct, dtype=torch.int64), persistent=False)

    def log_prob(
        self, hidden: Float[Tensor, "*batch hidden"], target: Int[Tensor, "*batch"] | None = None
    ) -> Tensor:
        """See `OutputHead.log_prob`; `-inf` for an excluded word."""
        words = self.words.to(hidden.device)
        if target is None:
            log_probs = self.head.log_prob(hidden).index_fill(-1, words, -torch.inf)
            return log_probs - log_probs.logsumexp(-1, keepdim=True)
        log_probs = self.head.log_prob(hidden, target) - self._log_rest(hidden)
        log_probs = log_probs.masked_fill(target == self.ignore_index, 0)
        return log_probs.masked_fill(torch.isin(target, words), -torch.inf)

    @torch.no_grad()
    def topk(self, hidden: Float[Tensor, "*batch hidden"], k: int) -> TopK:
        """See `OutputHead.topk`."""
        words = self.words.to(hidden.device)
        if not 1 <= k <= self.vocab_size:
            raise ValueError(f"k must be in [1, vocab_size={self.vocab_size}], got {k}")
        found = self.head.topk(hidden, min(k + len(words), self.vocab_size))
        values = found.log_probs.masked_fill(torch.isin(found.indices, words), -torch.inf)
        values, order = values.sort(dim=-1, descending=True, stable=True)
        indices = found.indices.gather(-1, order)
        return TopK((values - self._log_rest(hidden)[..., None])[..., :k], indices[..., :k])

    @torch.no_grad()
    def sample(
        self,
        hidden: Float[Tensor, "*batch hidden"],
        num_samples: int = 1,
        *,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        generator: torch.Generator | None = None,
    ) -> Int[Tensor, "*batch num_samples"]:
        """See `OutputHead.sample`."""
        self._check_sampling(num_samples, temperature, top_k, top_p)
        rows = self._flatten(hidden)
        shape = (*hidden.shape[:-1], num_samples)
        if temperature > 0 and top_k is not None:
            best = self.topk(rows, top_k)
            weights = _weights(best.log_probs, temperature, top_p)
            if weights.isnan().any():
                raise ValueError("hidden gives some position no distribution to draw from, but nan")
            if rows.shape[0] == 0:
                return best.indices.new_empty(shape)
            places = torch.multinomial(weights, num_samples, replacement=True, generator=generator)
            return best.indices.gather(-1, places).view(shape)
        if temperature > 0 and top_p in (None, 1.0):
            return self._sample_again(rows, num_samples, temperature, generator).view(shape)
        return super().sample(
            hidden,
            num_samples,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            generator=generator,
        )

    def _sample_again(
        self, rows: Tensor, num_samples: int, temperature: float, generator: torch.Generator | None
    ) -> Tensor:
        """Draws of the head, those of excluded words repeated: what is left has its conditional."""
        options: dict[str, Any] = {"temperature": temperature, "generator": generator}
        drawn = self.head.sample(rows, num_samples, **options)
        for _ in range(NUM_TRIES):
            wrong = torch.isin(drawn, self.words.to(drawn.device))
            if not wrong.any():
                return drawn
            drawn[wrong] = self.head.sample(rows[wrong.nonzero()[:, 0]], 1, **options)[:, 0]
        wrong = torch.isin(drawn, self.words.to(drawn.device))
        drawn[wrong] = super().sample(rows[wrong.nonzero()[:, 0]], 1, **options)[:, 0]
        return drawn

    def _log_rest(self, hidden: Tensor) -> Tensor:
        """Logarithm of the probability of all other words, `(*batch,)`.

        One minus that of the excluded words; where little is left of it, from all words' instead.
        """
        words = self.words.to(hidden.device)
        shape = (*hidden.shape[:-1], len(words))
        every = hidden.unsqueeze(-2).expand(*shape, self.hidden_size)
        excluded = self.head.log_prob(every, words.expand(shape).contiguous()).logsumexp(-1)
        cancels = ~(excluded <= MOST)  # nan too
        rest = torch.log1p(-excluded.masked_fill(cancels, MOST).exp())
        if not cancels.any():
            return rest
        exact = [
            self.head.log_prob(part).index_fill(-1, words, -torch.inf).logsumexp(-1)
            for part in self._row_chunks(hidden[cancels])
        ]
        return rest.masked_scatter(cancels, torch.cat(exact))


def _weights(log_probs: Tensor, temperature: float, top_p: float | None) -> Tensor:
    """Probabilities of the best words, best first, tempered and cut to the nucleus."""
    if log_probs.device.type != "mps":  # which has no float64
        log_probs = log_probs.double()
    weights = torch.softmax((log_probs - log_probs[:, :1]) / temperature, -1)
    if top_p is None:
        return weights
    before = weights.cumsum(-1) - weights
    return weights.masked_fill(before >= top_p * weights.sum(-1, keepdim=True), 0)
