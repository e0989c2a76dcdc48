"""Log-probabilities of given texts."""

from collections.abc import Iterator, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from lm_softmax.decoding.stepping import evaluating
from lm_softmax.encoders import Encoder
from lm_softmax.heads import OutputHead

CHUNK = 2048  # positions of a text that an encoder with a state takes at once


@torch.no_grad()
def score(
    encoder: Encoder,
    head: OutputHead,
    texts: Sequence[Sequence[int]],
    *,
    context_id: int,
    batch_tokens: int = 8192,
) -> list[Float[Tensor, "time"]]:
    """The log-probability in nats of each token of each text, given all before it in its text.

    Equals `head.log_prob(encoder(tensor([[context_id, *text[:-1]]]))[0][0], tensor(text))`, text by
    text. They are computed together, texts of like length side by side; on a batch's size the
    results depend within rounding only. `(N, V)` log-probabilities are never held.

    A text longer than the encoder's `max_positions` goes through overlapping windows of that
    length: the first is as ever, and each token after it is given at least the
    `max_positions // 2 + 1` tokens before it.

    Args:
        encoder: Turns tokens into hidden vectors.
        head: Turns a hidden vector into a distribution.
        texts: Ids of each text; an empty one has no log-probabilities.
        context_id: The id before each text's first, `<eos>` in training; it is not scored.
        batch_tokens: Number of positions to compute at once, padding included, unless one text
            alone has more.

    Returns:
        A tensor `(len(text),)` on the CPU for each text, in the order given.

    Raises:
        ValueError: If an id is outside the vocabulary, or `batch_tokens` is below 1.
    """
    if batch_tokens < 1:
        raise ValueError(f"batch_tokens must be at least 1, got {batch_tokens}")
    _check_ids([context_id, *(id_ for text in texts for id_ in text)], head.vocab_size)
    scores: list[Tensor] = [torch.empty(0)] * len(texts)
    device = next(encoder.parameters()).device
    with evaluating(encoder, head):
        for places in _batches([len(text) for text in texts], batch_tokens):
            longest = len(texts[places[0]])
            shape = len(places), longest
            target = torch.full(shape, head.ignore_index, dtype=torch.int64)
            for row, place in enumerate(places):
                target[row, : len(texts[place])] = torch.tensor(texts[place])
            context = torch.full((len(places), 1), context_id)
            tokens = torch.cat([context, target[:, :-1]], 1)
            tokens = tokens.masked_fill(tokens == head.ignore_index, context_id)
            found = _log_probs(encoder, head, tokens.to(device), target.to(device)).cpu()
            for row, place in enumerate(places):
                scores[place] = found[row, : len(texts[place])].clone()
    return scores


def _batches(lengths: Sequence[int], batch_tokens: int) -> Iterator[list[int]]:
    """Places of texts by descending length, so many at once that their padded size fits."""
    order = sorted((i for i, length in enumerate(lengths) if length), key=lambda i: -lengths[i])
    while order:
        size = max(1, batch_tokens // lengths[order[0]])
        yield order[:size]
        order = order[size:]


def _log_probs(
    encoder: Encoder, head: OutputHead, tokens: Tensor, target: Tensor
) -> Float[Tensor, "batch time"]:
    """Log-probability of each target, 0 where ignored, whatever the length."""
    time, limit = tokens.shape[1], encoder.max_positions
    found, state, end = [], None, 0
    while end < time:
        if encoder.carries_state:
            begin, stop = end, end + CHUNK
        elif limit is None:
            begin, stop = 0, time
        else:
            begin = max(0, end - limit // 2)
            stop = begin + limit
        hidden, state = encoder(tokens[:, begin:stop], state)
        found.append(head.log_prob(hidden[:, end - begin :], target[:, end:stop].contiguous()))
        end = stop
    return torch.cat(found, 1)


def _check_ids(ids: Sequence[int], vocab_size: int) -> None:
    lowest, highest = min(ids), max(ids)
    if lowest < 0 or highest >= vocab_size:
        raise ValueError(
            f"texts hold ids from {lowest} to {highest}, outside [0, vocab_size={vocab_size})"
        )
