"""Log-probabilities and perplexities of sentences, as JSON lines."""

import json
import math
import sys
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

from lm_softmax.decoding import score
from lm_softmax.module import LanguageModel

LINES_AT_ONCE = 2048  # enough to find sentences of like length, and little to wait for


def write_scores(
    model: LanguageModel, lines: Iterator[str], source: str, *, per_token: bool
) -> Callable[[float], str]:
    """Writes a line for each sentence, in their order; returns what to say at the end.

    Each is a text of its own: its first token is given `<eos>` alone, as in training, and the
    `<eos>` at its end is scored. An empty sentence is that `<eos>`.

    Args:
        model: The model, with a vocabulary.
        lines: Sentences.
        source: Where they come from, for messages.
        per_token: Whether to write each token with its log-probability.

    Raises:
        ValueError: If there is no sentence, or the model gives nan.
    """
    vocab = model.vocab
    assert vocab is not None
    sentences = num_tokens = num_unk = 0
    nats = 0.0
    while chunk := list(islice(lines, LINES_AT_ONCE)):
        texts = [ids.tolist() for ids in vocab.encode_each(chunk)]
        found = score(model.encoder, model.head, texts, context_id=vocab.eos_id)
        for ids, log_probs in zip(texts, found, strict=True):
            sentences += 1
            total = float(log_probs.double().sum())
            if math.isnan(total):
                raise ValueError(f"the model gives nan for line {sentences} of {source}")
            unknown = sum(id_ == vocab.unk_id for id_ in ids)
            line: dict[str, Any] = {
                "log_prob": round(total, 6),
                "num_tokens": len(ids),
                "num_unk": unknown,
                "perplexity": round(_perplexity(total, len(ids)), 6),
            }
            if per_token:
                line["tokens"] = [vocab.tokens[id_] for id_ in ids]
                line["log_probs"] = [round(value, 6) for value in log_probs.tolist()]
            sys.stdout.write(json.dumps(line, ensure_ascii=False) + "\n")
            nats, num_tokens, num_unk = nats + total, num_tokens + len(ids), num_unk + unknown
        sys.stdout.flush()
    if not sentences:
        raise ValueError(f"{source} holds no sentence")
    return lambda seconds: (
        f"{sentences} sentences, {num_tokens} tokens, {num_unk} of them <unk>: log-probability"
        f" {nats:.4f} nats, perplexity {_perplexity(nats, num_tokens):.4f};"
        f" {num_tokens / seconds:,.0f} tokens/s"
    )


def _perplexity(nats: float, num_tokens: int) -> float:
    try:
        return math.exp(-nats / num_tokens)
    except OverflowError:
        return math.inf
