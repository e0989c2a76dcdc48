"""Texts from prompts: written as they are made, or the best ones of beam search."""

import json
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from lm_softmax.decoding import beam_search, stream
from lm_softmax.module import LanguageModel
from lm_softmax.vocab import Vocab

PARTIAL = "\N{REPLACEMENT CHARACTER}"  # what the bytes of a part of a character decode to
LONGEST = 60  # characters of a prompt in a message


class Detokenizer:
    """Text of ids that come one after the other; its pieces together are `vocab.decode(all)`.

    The text of a token depends on its neighbours (blanks between words, characters of several
    tokens). So each piece is what new tokens add to the text of those just before, and is held back
    while it ends within a character.

    Args:
        vocab: The vocabulary of the ids.
    """

    def __init__(self, vocab: Vocab) -> None:
        self._vocab = vocab
        self._ids: list[int] = []
        self._num_shown = 0  # of them, whose text was given

    def add(self, ids: Sequence[int]) -> str:
        """The text that some more ids add."""
        self._ids += ids
        text = self.rest()
        if not text or text.endswith(PARTIAL):
            return ""
        del self._ids[: self._num_shown]
        self._num_shown = len(self._ids)
        return text

    def rest(self) -> str:
        """What was held back; at the end."""
        shown = self._vocab.decode(self._ids[: self._num_shown])
        return self._vocab.decode(self._ids)[len(shown) :]


class Prompt(NamedTuple):
    """A text to continue.

    Attributes:
        text: The text.
        place: Where it comes from, for messages.
    """

    text: str
    place: str

    def __str__(self) -> str:
        text = self.text if len(self.text) <= LONGEST else f"{self.text[:LONGEST]}..."
        return f"{self.place} {text!r}"


def encode_prompts(vocab: Vocab, prompts: Sequence[Prompt]) -> list[list[int]]:
    """Ids of each prompt after the `<eos>` that a text begins with; of no prompt, that alone.

    Raises:
        ValueError: If a prompt is empty, no valid text, or has unknown words only.
    """
    encoded = []
    for prompt in prompts:
        try:
            prompt.text.encode()
        except UnicodeEncodeError:
            raise ValueError(f"{prompt} is not UTF-8") from None
        ids = vocab.encode(prompt.text)
        if not ids:
            raise ValueError(f"{prompt} is empty: give a word, or leave it out")
        if all(id_ == vocab.unk_id for id_ in ids):
            raise ValueError(f"{prompt} has no word that is among the {len(vocab):,} known ones")
        encoded.append([vocab.eos_id, *ids])
    return encoded or [[vocab.eos_id]]


def write_text(model: LanguageModel, prompt: list[int], num_tokens: int, **options: Any) -> int:
    """Writes a prompt and its continuation as it is made; returns the number of new tokens.

    Args:
        model: The model, with a vocabulary.
        prompt: Ids, of which the first is context alone.
        num_tokens: See `lm_softmax.decoding.stream`, like all others.
        **options: As there.
    """
    assert model.vocab is not None
    steps = stream(model.encoder, model.head, _row(model, prompt), num_tokens, **options)
    text = Detokenizer(model.vocab)
    num_new, last = 0, _show(text.add(prompt[1:]))
    for token in steps:
        num_new += 1
        last = _show(text.add(token.tolist())) or last
    last = _show(text.rest()) or last
    if not last.endswith("\n"):
        _show("\n")
    return num_new


def write_best(model: LanguageModel, prompt: list[int], num_tokens: int, **options: Any) -> int:
    """Writes what beam search found, best first; returns the number of tokens of the first.

    Args:
        model: The model, with a vocabulary.
        prompt: Ids, of which the first is context alone.
        num_tokens: See `lm_softmax.decoding.beam_search`, like all others.
        **options: As there.
    """
    assert model.vocab is not None
    (found,) = beam_search(model.encoder, model.head, _row(model, prompt), num_tokens, **options)
    for rank, hypothesis in enumerate(found, start=1):
        line = {
            "prompt": model.vocab.decode(prompt[1:]),
            "rank": rank,
            "score": round(hypothesis.score, 6),
            "log_prob": round(hypothesis.log_prob, 6),
            "num_tokens": len(hypothesis.tokens),
            "text": model.vocab.decode(hypothesis.tokens),
        }
        _show(json.dumps(line, ensure_ascii=False) + "\n")
    return len(found[0].tokens) if found else 0


def _row(model: LanguageModel, prompt: list[int]) -> torch.Tensor:
    return torch.tensor([prompt], device=model.device)


def _show(text: str) -> str:
    sys.stdout.write(text)
    sys.stdout.flush()
    return text
