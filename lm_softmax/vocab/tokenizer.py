"""What a tokenizer is: rows of text to one flat Arrow array of symbols."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

LINE_END = "\n"  # the symbol of `<eos>` while text is cut: no word can collide with it


class Tokenizer(ABC):
    r"""Cuts text into symbols: strings for word tokenizers, ids for Hugging Face tokenizers.

    Attributes:
        batch_bytes: Bytes of text that one call of `symbols` should be given, about.
        eos: Name of the token that ends a line (words) or a row (Hugging Face).
        unk: Name of the token of unknown words; None where every text has an encoding.
    """

    batch_bytes: ClassVar[int]
    eos: str
    unk: str | None

    @abstractmethod
    def symbols(self, rows: pa.Array) -> pa.Array:
        """Cut rows of text, end each as its last line or the row itself ends, and join them.

        Args:
            rows: `large_string` array without nulls, of valid UTF-8.
        """

    @abstractmethod
    def open_symbols(self, text: str) -> pa.Array:
        """Cut a text that may go on, such as a prompt: no `eos` is put after it."""

    @abstractmethod
    def complete(
        self, symbols: pa.Array, counts: NDArray[np.int64]
    ) -> tuple[pa.Array, NDArray[np.int64] | None, NDArray[np.int64]]:
        """Add what a vocabulary has whether it was seen or not, with a count of 0.

        Args:
            symbols: Distinct symbols that were seen, in any order.
            counts: How often each was seen.

        Returns:
            Names, ids (None where symbols are strings) and counts of the whole vocabulary, in any
            order.
        """

    @abstractmethod
    def decode(self, symbols: Sequence[Any]) -> str:
        """Text of symbols, `eos` as a line end."""

    @abstractmethod
    def state_dict(self) -> dict[str, str | None]:
        """All that `from_state_dict` needs to make this tokenizer again, without a file."""
