"""Words by white space, and words and signs: cut with whole-batch look-ups over bytes."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray
from typing_extensions import override

from lm_softmax.vocab.tokenizer import LINE_END, Tokenizer


class WordTokenizer(Tokenizer):
    r"""Words between white space, or words and punctuation; one `<eos>` a line.

    `WordTokenizer("whitespace")` equals, line by line, `[*line.split(), "<eos>"]`; a literal
    `<eos>` in the text is the same token. `WordTokenizer("words")` equals
    `[*re.findall(r"[A-Za-z]+|\d|[^\sA-Za-z\d]", line), "<eos>"]`. A row is one or more lines: `\n`
    ends a line, and one at the end of a row opens no further line. An empty line is `<eos>` alone.

    The text is classified and cut as bytes of UTF-8 by table look-ups over whole batches.

    Args:
        kind: "whitespace" or "words".
    """

    batch_bytes = 4 * 2**20
    eos = "<eos>"
    unk = "<unk>"

    def __init__(self, kind: str) -> None:
        self.kind = kind

    @override
    def symbols(self, rows: pa.Array) -> pa.Array:
        end = pc.if_else(pc.ends_with(rows, LINE_END), "", LINE_END).cast(pa.large_string())
        empty = pa.scalar("", pa.large_string())
        return self._split(pc.binary_join_element_wise(rows, end, empty))

    @override
    def open_symbols(self, text: str) -> pa.Array:
        return self._split(pa.array([text], pa.large_string()))

    def _split(self, rows: pa.Array) -> pa.Array:
        text = _joined(rows)
        kinds = np.frombuffer(text.translate(_KIND_OF_BYTE), np.uint8)
        first = _starts_word(kinds) if self.kind == "whitespace" else _starts_piece(kinds)
        symbols = _cut(text, kinds, first)
        if self.kind == "whitespace" and pc.any(pc.match_substring(rows, self.eos)).as_py():
            symbols = pc.if_else(pc.equal(symbols, self.eos), LINE_END, symbols)
        return symbols

    @override
    def complete(
        self, symbols: pa.Array, counts: NDArray[np.int64]
    ) -> tuple[pa.Array, None, NDArray[np.int64]]:
        # one copy, and no table of all symbols: there may be millions
        symbols = symbols.cast(pa.large_string())
        eos, unk = (pa.array([name], pa.large_string()) for name in (self.eos, self.unk))
        end = pc.index(symbols, LINE_END).as_py() % (len(symbols) + 1)  # -1: after all
        has_unk = pc.index(symbols, self.unk).as_py() >= 0
        parts = [symbols[:end], eos, symbols[end + 1 :], unk[has_unk:]]
        names = pa.concat_arrays(parts)
        return names, None, np.append(counts, np.zeros(len(names) - len(counts), np.int64))

    @override
    def decode(self, symbols: Sequence[Any]) -> str:
        return " ".join(symbols).replace(" \n", "\n").replace("\n ", "\n")

    @override
    def state_dict(self) -> dict[str, str | None]:
        return {"kind": self.kind}


# White space is what `str.isspace` says, which is what `str.split` and `\s` go by. The characters
# of more than one byte are replaced by a blank before anything else.
_SPACES = b"\t\x0b\x0c\r\x1c\x1d\x1e\x1f "
_WIDE_SPACES = "[\x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000]"
_SPACE, _INSIDE, _LETTER, _NEWLINE, _OTHER = range(5)


def _kind(byte: int) -> int:
    if byte in _SPACES:
        return _SPACE
    if 0x80 <= byte < 0xC0:
        return _INSIDE  # of a character of more than one byte
    if byte == ord(LINE_END):
        return _NEWLINE
    return _LETTER if byte < 0x80 and chr(byte).isalpha() else _OTHER


_KIND_OF_BYTE = bytes(map(_kind, range(256)))


def _joined(rows: pa.Array) -> bytes:
    """All rows as one text, in which white space is single bytes."""
    if pc.any(pc.match_substring_regex(rows, _WIDE_SPACES)).as_py():
        rows = pc.replace_substring_regex(rows, _WIDE_SPACES, " ")
    _, offsets, data = rows.buffers()
    if data is None:  # nothing but empty rows
        return b""
    ends = np.frombuffer(offsets, np.int64)[rows.offset : rows.offset + len(rows) + 1]
    return memoryview(data)[ends[0] : ends[-1]].tobytes()


def _starts_word(kinds: NDArray[np.uint8]) -> NDArray[np.bool_]:
    """Where a line end is, or a word that nothing but white space or a line end precedes."""
    newline = kinds == _NEWLINE
    apart = newline | (kinds == _SPACE)
    first = kinds != _SPACE
    first[1:] &= apart[:-1] | newline[1:]
    return first


def _starts_piece(kinds: NDArray[np.uint8]) -> NDArray[np.bool_]:
    """Where a run of ASCII letters begins, and each other character that is not white space.

    Every digit and every sign is a piece of its own, so the digits of Unicode need no table.
    """
    letter = kinds == _LETTER
    first = kinds >= _LETTER
    first[1:] &= ~(letter[1:] & letter[:-1])
    return first


def _cut(text: bytes, kinds: NDArray[np.uint8], first: NDArray[np.bool_]) -> pa.Array:
    """The pieces of `text` that begin where `first` holds, without white space."""
    kept = text.translate(None, _SPACES)
    marks = first.view(np.uint8) | (kinds == _SPACE).view(np.uint8) << 1
    marks_kept = marks.tobytes().translate(None, b"\2") + b"\1"  # the last one ends the text
    offsets = np.flatnonzero(np.frombuffer(marks_kept, np.bool_)).astype(np.int64, copy=False)
    return pa.LargeStringArray.from_buffers(
        len(offsets) - 1, pa.py_buffer(offsets), pa.py_buffer(kept)
    )
