"""The vocabulary: token ids ranked by how often the training text has them."""

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from jaxtyping import Int
from numpy.typing import NDArray
from torch import Tensor

from lm_softmax.vocab.archive import load_archive
from lm_softmax.vocab.hub import one_line
from lm_softmax.vocab.tokenization import from_state_dict
from lm_softmax.vocab.tokenizer import LINE_END, Tokenizer

_FORMAT = 1
_KEYS = {"tokens", "counts", "unk_id", "eos_id", "tokenizer", "original_ids"}  # of a state
_MERGE_AT = 2**21  # symbols
_MISSING_UNK = -2  # symbol of an `<unk>` that the tokenizer does not have


class SymbolCounter:
    """Counts symbols batch by batch, as `collections.Counter.update` does, in Arrow."""

    def __init__(self) -> None:
        self._seen: list[tuple[pa.Array, NDArray[np.int64]]] = []
        self._pending = 0

    def update(self, symbols: pa.Array) -> None:
        """Count each element of a flat array."""
        encoded = symbols.dictionary_encode()
        counts = np.bincount(encoded.indices.to_numpy(), minlength=len(encoded.dictionary))
        self._seen.append((encoded.dictionary, counts))
        self._pending += len(counts)
        if self._pending > max(_MERGE_AT, 2 * len(self._seen[0][1])):  # linear in all, amortised
            self._merge()

    def result(self) -> tuple[pa.Array, NDArray[np.int64]]:
        """The distinct symbols in the order of their first appearance, and their counts."""
        if not self._seen:
            return pa.array([], pa.large_string()), np.zeros(0, np.int64)
        self._merge()
        return self._seen[0]

    def _merge(self) -> None:
        symbols = pa.concat_arrays([symbols for symbols, _ in self._seen]).dictionary_encode()
        counts = np.zeros(len(symbols.dictionary), np.int64)
        np.add.at(counts, symbols.indices.to_numpy(), np.concatenate([c for _, c in self._seen]))
        self._seen = [(symbols.dictionary, counts)]
        self._pending = 0


@dataclass(frozen=True, eq=False, repr=False)
class Vocab:
    r"""Tokens ranked by their count in the training text, ties by code points; immutable.

    Id 0 is the most frequent token. Specials have no place of their own: `<unk>` and `<eos>` are
    ranked by how often they occur.

    Attributes:
        tokens: Token of each id.
        counts: Occurrences in the training text, never increasing, shape `(vocab_size,)`.
        unk_id: Id of unknown words; None if the tokenizer has an encoding for every text.
        eos_id: Id of the end of a line (words) or of a row (Hugging Face tokenizers).
        tokenizer: What cuts text.
        original_ids: The id of each token in its Hugging Face tokenizer, shape `(vocab_size,)`,
            negative for a special that the tokenizer lacks; None for word tokenizers.
    """

    tokens: list[str]
    counts: Int[Tensor, "vocab"]
    unk_id: int | None
    eos_id: int
    tokenizer: Tokenizer
    original_ids: Int[Tensor, "vocab"] | None = None

    @classmethod
    def build(
        cls,
        tokenizer: Tokenizer,
        symbols: pa.Array,
        counts: NDArray[np.int64],
        *,
        max_vocab_size: int | None = None,
        min_count: int = 1,
    ) -> Self:
        """Rank counted symbols, and fold the rare ones into `<unk>`.

        With word tokenizers `<unk>` always exists, with a count of 0 if the text has none and
        nothing is folded. A Hugging Face tokenizer keeps all its tokens, seen or not, unless they
        are folded; where it has no unknown token of its own, folding adds `<unk>`.

        Args:
            tokenizer: What cut the text.
            symbols: Distinct symbols of the training text.
            counts: How often each occurs there.
            max_vocab_size: Most tokens to keep, `<unk>` and `<eos>` among them.
            min_count: Tokens that occur less often are folded, save `<unk>` and `<eos>`.

        Raises:
            ValueError: If `max_vocab_size` or `min_count` is too small.
        """
        check_folding(max_vocab_size, min_count)
        names, symbols, counts = tokenizer.complete(symbols, counts)
        special = _is_any(names, [tokenizer.eos, tokenizer.unk])
        rare = ~special & (counts < min_count) if min_count > 1 else np.zeros(len(names), bool)
        unk = tokenizer.unk
        if unk is None and (rare.any() or len(names) > (max_vocab_size or len(names))):
            unk = "<unk>"
            names = pa.concat_arrays([names, pa.array([unk], names.type)])
            symbols = pa.concat_arrays([symbols, pa.array([_MISSING_UNK], symbols.type)])
            counts, rare = np.append(counts, 0), np.append(rare, False)
            special = np.append(special, True)

        order = _ranks(names, counts)
        ordinary = (~special & ~rare)[order]
        room = len(names) if max_vocab_size is None else max_vocab_size - int(special.sum())
        kept = order[special[order] | (ordinary & (np.cumsum(ordinary) <= room))]
        names, symbols, folded = names.take(kept), symbols.take(kept), counts.sum()
        counts = counts[kept]
        if unk is not None:
            counts[pc.index(names, unk).as_py()] += folded - counts.sum()
            order = _ranks(names, counts)
            names, symbols, counts = names.take(order), symbols.take(order), counts[order]
        strings = pa.types.is_large_string(symbols.type)
        return cls(
            tokens=names.to_pylist(),
            counts=torch.from_numpy(counts),
            unk_id=None if unk is None else pc.index(names, unk).as_py(),
            eos_id=pc.index(names, tokenizer.eos).as_py(),
            tokenizer=tokenizer,
            original_ids=None if strings else torch.from_numpy(symbols.to_numpy().copy()),
        )

    def __len__(self) -> int:
        return len(self.tokens)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Vocab) and self.fingerprint == other.fingerprint

    def __hash__(self) -> int:
        return hash(self.fingerprint)

    def __repr__(self) -> str:
        return f"Vocab({len(self):,} tokens of {int(self.counts.sum()):,} counted)"

    @cached_property
    def _symbols(self) -> pa.Array:
        if self.original_ids is not None:
            return pa.array(self.original_ids.numpy())
        tokens = [*self.tokens]
        tokens[self.eos_id] = LINE_END
        return pa.array(tokens, pa.large_string())

    def encode_rows(self, rows: pa.Array) -> NDArray[np.int64]:
        """Ids of rows of text, one after the other, each ended by `<eos>`.

        Args:
            rows: `large_string` array without nulls, of valid UTF-8.
        """
        return self._ids(self.tokenizer.symbols(rows))

    def encode(self, text: str) -> list[int]:
        r"""Ids of a text that may go on, such as a prompt: no `<eos>` is put after it.

        With word tokenizers each `\n` in it is an `<eos>`.
        """
        return [int(i) for i in self._ids(self.tokenizer.open_symbols(text))]

    def _ids(self, symbols: pa.Array) -> NDArray[np.int64]:
        ids = pc.index_in(symbols, value_set=self._symbols)
        if self.unk_id is not None:
            ids = ids.fill_null(self.unk_id)
        return np.asarray(ids.to_numpy(), np.int64)

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids: words joined by blanks, or what the Hugging Face tokenizer makes of them.

        `<eos>` is a line end.
        """
        return self.tokenizer.decode([self._symbols[int(i)].as_py() for i in ids])

    @cached_property
    def fingerprint(self) -> str:
        """The same for equal vocabularies, in any process: tokens, counts and tokenizer."""
        names = [self.tokens, self.unk_id, self.eos_id, self.tokenizer.state_dict()]
        digest = hashlib.blake2b(json.dumps(names).encode(), digest_size=16)
        for tensor in (self.counts, self.original_ids):
            digest.update(b"" if tensor is None else tensor.numpy().astype("<i8").tobytes())
        return digest.hexdigest()

    def state_dict(self) -> dict[str, Any]:
        """Plain strings, numbers and tensors, with all that `from_state_dict` needs."""
        return {
            "format": _FORMAT,
            "tokens": json.dumps(self.tokens),  # a list loads ten times slower
            "counts": self.counts,
            "unk_id": self.unk_id,
            "eos_id": self.eos_id,
            "tokenizer": self.tokenizer.state_dict(),
            "original_ids": self.original_ids,
        }

    @classmethod
    def from_state_dict(cls, state: dict[str, Any]) -> Self:
        """The vocabulary whose `state_dict` this is.

        Raises:
            ValueError: If a newer version of lm_softmax wrote it.
        """
        if state["format"] != _FORMAT:
            raise ValueError(
                f"the vocabulary is of format {state['format']}, this version reads {_FORMAT}:"
                " use the version of lm_softmax that wrote it"
            )
        return cls(
            tokens=json.loads(state["tokens"]),
            counts=state["counts"],
            unk_id=state["unk_id"],
            eos_id=state["eos_id"],
            tokenizer=from_state_dict(state["tokenizer"]),
            original_ids=state["original_ids"],
        )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a file for `load`; it is there whole or not at all."""
        partial = Path(f"{os.fspath(path)}.partial")
        try:
            torch.save(self.state_dict(), partial)
        except RuntimeError as error:  # what torch makes of a full disk
            partial.unlink(missing_ok=True)
            raise OSError(f"cannot write {os.fspath(path)!r}: {one_line(error)}") from error
        partial.replace(path)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Read a vocabulary that `save` wrote, or the one in a checkpoint of `LanguageModel`.

        Raises:
            ValueError: If there is no such file, or no vocabulary in it.
        """
        if not Path(path).is_file():
            raise ValueError(f"no vocabulary or checkpoint file {os.fspath(path)!r}")
        state = load_archive(path, mmap=True)  # of a checkpoint, only the vocabulary is used
        if isinstance(state, dict) and "hyper_parameters" in state:
            hyper_parameters = state["hyper_parameters"]
            state = hyper_parameters.get("vocab") if isinstance(hyper_parameters, dict) else None
        if not isinstance(state, dict) or not {"format", "tokens", "counts"} <= state.keys():
            raise ValueError(f"{os.fspath(path)!r} holds no vocabulary")
        missing = _KEYS - state.keys() if state["format"] == _FORMAT else ()
        if missing:
            raise ValueError(
                f"the vocabulary in {os.fspath(path)!r} is not whole: {', '.join(sorted(missing))}"
                " is missing"
            )
        own = {k: v.clone() if isinstance(v, Tensor) else v for k, v in state.items()}
        try:
            return cls.from_state_dict(own)  # of its own memory: the file may be replaced
        except (AttributeError, KeyError, TypeError) as error:
            raise ValueError(
                f"the vocabulary in {os.fspath(path)!r} is damaged: {one_line(error)}"
            ) from error


def check_folding(max_vocab_size: int | None, min_count: int) -> None:
    """Raise a ValueError for limits that no vocabulary can have."""
    if max_vocab_size is not None and max_vocab_size < 3:
        raise ValueError(
            f"max_vocab_size={max_vocab_size} leaves no room for a word beside <unk> and <eos>:"
            " give at least 3, or none for no limit"
        )
    if min_count < 1:
        raise ValueError(f"min_count={min_count}: give 1 to keep all words, or more")


def _is_any(names: pa.Array, wanted: Sequence[str | None]) -> NDArray[np.bool_]:
    values = pa.array([name for name in wanted if name is not None], names.type)
    return np.asarray(pc.is_in(names, value_set=values).to_numpy(zero_copy_only=False))


def _ranks(names: pa.Array, counts: NDArray[np.int64]) -> NDArray[np.int64]:
    """Places by descending count, then by code points (which is the order of UTF-8 bytes)."""
    table = pa.table({"count": counts, "name": names})
    keys = [("count", "descending"), ("name", "ascending")]
    return np.asarray(pc.sort_indices(table, sort_keys=keys).to_numpy(), np.int64)
