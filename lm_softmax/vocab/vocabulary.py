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
from lm_softmax.vocab.counting import SymbolCounter, give_back, ranks
from lm_softmax.vocab.hub import one_line
from lm_softmax.vocab.symbols import SymbolIndex
from lm_softmax.vocab.tokenization import from_state_dict
from lm_softmax.vocab.tokenizer import LINE_END, Tokenizer

_FORMAT = 2
_KEYS = {"tokens", "lengths", "counts", "unk_id", "eos_id", "tokenizer", "original_ids"}
_MISSING_UNK = -2  # symbol of an `<unk>` that the tokenizer does not have


@dataclass(frozen=True, eq=False, repr=False)
class Vocab:
    r"""Tokens ranked by their count in the training text, ties by code points; immutable.

    Id 0 is the most frequent token. Specials have no place of their own: `<unk>` and `<eos>` are
    ranked by how often they occur.

    Attributes:
        names: Token of each id, `large_string`.
        counts: Occurrences in the training text, never increasing, shape `(vocab_size,)`.
        unk_id: Id of unknown words; None if the tokenizer has an encoding for every text.
        eos_id: Id of the end of a line (words) or of a row (Hugging Face tokenizers).
        tokenizer: What cuts text.
        original_ids: The id of each token in its Hugging Face tokenizer, shape `(vocab_size,)`,
            negative for a special that the tokenizer lacks; None for word tokenizers.
    """

    names: pa.Array
    counts: Int[Tensor, "vocab"]
    unk_id: int | None
    eos_id: int
    tokenizer: Tokenizer
    original_ids: Int[Tensor, "vocab"] | None = None

    @classmethod
    def build(
        cls,
        tokenizer: Tokenizer,
        counter: SymbolCounter,
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
            counter: Has counted the symbols of the training text; it is empty then.
            max_vocab_size: Most tokens to keep, `<unk>` and `<eos>` among them.
            min_count: Tokens that occur less often are folded, save `<unk>` and `<eos>`.

        Raises:
            ValueError: If `max_vocab_size` or `min_count` is too small.
        """
        check_folding(max_vocab_size, min_count)
        # one copy of each at a time, where it can be: there may be millions
        *counted, num_folded = counter.result(max_vocab_size, min_count)
        names, original_ids, counts = tokenizer.complete(*counted)
        del counted
        special = _is_any(names, [tokenizer.eos, tokenizer.unk])
        rare = ~special & (counts < min_count) if min_count > 1 else np.zeros(len(names), bool)
        unk = tokenizer.unk
        too_many = len(names) > (max_vocab_size or len(names))
        if unk is None and (too_many or rare.any() or num_folded):
            unk = "<unk>"
            names = pa.concat_arrays([names, pa.array([unk], names.type)])
            assert original_ids is not None  # of words there is one
            original_ids = np.append(original_ids, _MISSING_UNK)
            counts, rare = np.append(counts, 0), np.append(rare, False)
            special = np.append(special, True)

        order = ranks(names, counts)
        ordinary = (~special & ~rare)[order]
        if max_vocab_size is not None:
            ordinary &= np.cumsum(ordinary) <= max_vocab_size - int(special.sum())
        kept = order[special[order] | ordinary]
        total, counts = counts.sum() + num_folded, counts[kept]
        del order
        names = names.take(pa.array(kept))
        if unk is not None and (folded := total - counts.sum()):
            counts[pc.index(names, unk).as_py()] += folded
            order = ranks(names, counts)
            names, kept, counts = names.take(pa.array(order)), kept[order], counts[order]
        give_back()
        return cls(
            names=names,
            counts=torch.from_numpy(counts),
            unk_id=None if unk is None else pc.index(names, unk).as_py(),
            eos_id=pc.index(names, tokenizer.eos).as_py(),
            tokenizer=tokenizer,
            original_ids=None if original_ids is None else torch.from_numpy(original_ids[kept]),
        )

    def __len__(self) -> int:
        return len(self.names)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Vocab) and self.fingerprint == other.fingerprint

    def __hash__(self) -> int:
        return hash(self.fingerprint)

    def __repr__(self) -> str:
        return f"Vocab({len(self):,} tokens of {int(self.counts.sum()):,} counted)"

    @cached_property
    def tokens(self) -> list[str]:
        """Token of each id as Python's strings, which take some hundred bytes each."""
        return list(self.names.to_pylist())

    @cached_property
    def _index(self) -> SymbolIndex:
        if self.original_ids is not None:
            return SymbolIndex(pa.array(self.original_ids.numpy()))
        return SymbolIndex(self.names)

    def encode_rows(self, rows: pa.Array) -> NDArray[np.int64]:
        """Ids of rows of text, one after the other, each ended by `<eos>`.

        Args:
            rows: `large_string` array without nulls, of valid UTF-8.
        """
        return self._ids(self.tokenizer.symbols(rows))

    def encode_each(self, rows: Sequence[str]) -> list[NDArray[np.int64]]:
        """Ids of each of some rows of text, ended by `<eos>`: `encode_rows`, cut at the rows."""
        if not rows:
            return []
        symbols = [self.tokenizer.symbols(pa.array([row], pa.large_string())) for row in rows]
        ends = np.cumsum([len(part) for part in symbols])
        return np.split(self._ids(pa.concat_arrays(symbols)), ends[:-1])

    def encode(self, text: str) -> list[int]:
        r"""Ids of a text that may go on, such as a prompt: no `<eos>` is put after it.

        With word tokenizers each `\n` in it is an `<eos>`.
        """
        return [int(i) for i in self._ids(self.tokenizer.open_symbols(text))]

    def _ids(self, symbols: pa.Array) -> NDArray[np.int64]:
        encoded = symbols.dictionary_encode()
        ids = self._index.find(encoded.dictionary)
        if self.original_ids is None:  # no word is cut that reads `<eos>`
            ids[pc.equal(encoded.dictionary, LINE_END).to_numpy(zero_copy_only=False)] = self.eos_id
        if self.unk_id is not None:
            ids[ids < 0] = self.unk_id
        return ids[encoded.indices.to_numpy()]

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids: words joined by blanks, or what the Hugging Face tokenizer makes of them.

        `<eos>` is a line end.
        """
        return self.tokenizer.decode([self._symbol(int(i)) for i in ids])

    def _symbol(self, token: int) -> str | int:
        """What the tokenizer takes an id for."""
        if self.original_ids is not None:
            return int(self.original_ids[token])
        return LINE_END if token == self.eos_id else str(self.names[token])

    @cached_property
    def fingerprint(self) -> str:
        """The same for equal vocabularies, in any process: tokens, counts and tokenizer."""
        names = [self.unk_id, self.eos_id, self.tokenizer.state_dict()]
        digest = hashlib.blake2b(json.dumps(names).encode(), digest_size=16)
        text, lengths = _text(self.names)
        digest.update(text.data)
        for numbers in (lengths, self.counts.numpy(), self.original_ids):
            digest.update(b"" if numbers is None else np.asarray(numbers, "<i8").data)
        return digest.hexdigest()

    def state_dict(self) -> dict[str, Any]:
        """Plain strings, numbers and tensors, with all that `from_state_dict` needs."""
        text, lengths = map(torch.from_numpy, _text(self.names))
        return {
            "format": _FORMAT,
            "tokens": text,  # strings of Python would load a hundred times slower
            "lengths": lengths,
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
            ValueError: If another version of lm_softmax wrote it, or it is damaged.
        """
        if state["format"] != _FORMAT:
            raise ValueError(
                f"the vocabulary is of format {state['format']}, this version reads {_FORMAT}:"
                " use the version of lm_softmax that wrote it"
            )
        return cls(
            names=_names(state["tokens"].numpy(), state["lengths"].numpy()),
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


def _text(names: pa.Array) -> tuple[NDArray[np.uint8], NDArray[np.int32]]:
    """All names one after the other in UTF-8, and how many bytes each has."""
    _, offsets, data = names.buffers()
    ends = np.frombuffer(offsets, np.int64)[names.offset : names.offset + len(names) + 1]
    text = np.frombuffer(data or b"", np.uint8)[ends[0] : ends[-1]]
    return text.copy(), np.diff(ends).astype(np.int32)


def _names(text: NDArray[np.uint8], lengths: NDArray[np.int32]) -> pa.Array:
    """The names that `_text` took apart.

    Raises:
        ValueError: If they are not whole.
    """
    ends = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
    if (lengths < 0).any() or ends[-1] != len(text):
        raise ValueError(f"the vocabulary is damaged: {len(text)} bytes of {ends[-1]}")
    names = pa.LargeStringArray.from_buffers(len(lengths), pa.py_buffer(ends), pa.py_buffer(text))
    names.validate(full=True)
    return names
