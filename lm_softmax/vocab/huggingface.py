"""Tokenizers of the `tokenizers` library, by their `tokenizer.json`."""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import groupby
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import tokenizers
from numpy.typing import NDArray
from typing_extensions import override

from lm_softmax.vocab.hub import one_line
from lm_softmax.vocab.tokenizer import LINE_END, Tokenizer

MISSING_EOS = -1  # symbol of `<eos>` where the tokenizer has no such token


class HuggingFaceTokenizer(Tokenizer):
    """A `tokenizer.json`; one end-of-sequence token a row.

    Truncation and padding of the file are off, and no template adds tokens: the tokens of a row
    are those of its text.

    Args:
        definition: Contents of the `tokenizer.json`.
        eos: Name of its end-of-sequence token. Looked for among the usual names if None; where
            there is none, `<eos>` is a token of the vocabulary alone.

    Raises:
        ValueError: If the definition cannot be read.
    """

    batch_bytes = 2 * 2**20  # an encoding takes some hundred bytes a token
    _USUAL_EOS = ("<|endoftext|>", "</s>", "<eos>", "<|end_of_text|>", "[EOS]")

    def __init__(self, definition: str, eos: str | None = None) -> None:
        try:
            self._tokenizer = tokenizers.Tokenizer.from_str(definition)
        except Exception as error:  # it raises nothing narrower
            raise ValueError(f"not a tokenizer.json: {one_line(error)}") from error
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self.definition = definition
        vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
        known = [name for name in (eos, *self._USUAL_EOS) if name in vocabulary]
        self.eos = known[0] if known else "<eos>"
        self._eos_id = vocabulary.get(self.eos, MISSING_EOS)
        unknown = (_unknown_token(json.loads(definition)["model"]), "<unk>")
        # an unknown word must not read as a line end: a vocabulary that folds has its own <unk>
        usable = [name for name in unknown if name in vocabulary and name != self.eos]
        self.unk = usable[0] if usable else None

    @override
    def symbols(self, rows: pa.Array) -> pa.Array:
        end = np.array([self._eos_id])
        with _told():
            encoded = self._tokenizer.encode_batch_fast(rows.to_pylist(), add_special_tokens=False)
        parts = [part for row in encoded for part in (np.array(row.ids, np.int64), end)]
        return pa.array(np.concatenate(parts or [end[:0]]))

    @override
    def open_symbols(self, text: str) -> pa.Array:
        with _told():
            encoded = self._tokenizer.encode(text, add_special_tokens=False)
        return pa.array(encoded.ids, pa.int64())

    @override
    def complete(
        self, symbols: pa.Array, counts: NDArray[np.int64]
    ) -> tuple[pa.Array, NDArray[np.int64], NDArray[np.int64]]:
        vocabulary = self._tokenizer.get_vocab(with_added_tokens=True) | {self.eos: self._eos_id}
        everything = np.array(list(vocabulary.values()), np.int64)
        places = pc.index_in(symbols, value_set=pa.array(everything)).to_numpy(zero_copy_only=False)
        complete = np.zeros(len(everything), np.int64)
        complete[places] = counts
        return pa.array(list(vocabulary), pa.large_string()), everything, complete

    @override
    def decode(self, symbols: Sequence[Any]) -> str:
        pieces = []
        for special, run in groupby(symbols, lambda symbol: symbol < 0 or symbol == self._eos_id):
            if special:
                pieces += [LINE_END if s == self._eos_id else "<unk>" for s in run]
            else:
                pieces.append(self._tokenizer.decode(list(run), skip_special_tokens=False))
        return "".join(pieces)

    @override
    def state_dict(self) -> dict[str, str | None]:
        return {"kind": "huggingface", "definition": self.definition, "eos": self.eos}


@contextmanager
def _told() -> Iterator[None]:
    """Make a ValueError of what the library raises for text that a tokenizer has no token for."""
    try:
        yield
    except Exception as error:  # it raises nothing narrower
        raise ValueError(
            f"the tokenizer cannot encode the text: {one_line(error)}; its unknown token must be in"
            " its vocabulary"
        ) from error


def _unknown_token(model: dict[str, Any]) -> str | None:
    """The unknown token that the model of a `tokenizer.json` names."""
    if model.get("unk_id") is not None:  # Unigram: a place in a list of pairs
        return str(model["vocab"][model["unk_id"]][0])
    return model.get("unk_token")
