"""How often each symbol occurs, in memory as far as it goes and then on disk."""

from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from lm_softmax.allocator import give_back_pages
from lm_softmax.vocab.symbols import hash_symbols
from lm_softmax.vocab.tokenizer import LINE_END

_MERGE_AT = 2**20  # symbols
_SPILL_AT = 2**21  # distinct symbols that stay in memory, some hundred bytes each when merged
_NUM_PARTS_LOG2 = 6  # of a spilled count, each of which is merged by itself


class Counts(NamedTuple):
    """Distinct symbols and how often each occurs.

    Attributes:
        symbols: In any order.
        counts: Of each.
    """

    symbols: pa.Array
    counts: NDArray[np.int64]

    @property
    def total(self) -> int:
        """Occurrences of all of them."""
        return int(self.counts.sum())

    @classmethod
    def of(cls, symbols: pa.Array) -> "Counts":
        """As `collections.Counter(symbols)`."""
        encoded = symbols.dictionary_encode()
        indices = encoded.indices.to_numpy()
        return cls(encoded.dictionary, np.bincount(indices, minlength=len(encoded.dictionary)))

    @classmethod
    def merged(cls, several: list["Counts"]) -> "Counts":
        """Sums by symbol, in the order of first appearance."""
        symbols = pa.concat_arrays([own.symbols for own in several]).dictionary_encode()
        counts = np.zeros(len(symbols.dictionary), np.int64)
        np.add.at(counts, symbols.indices.to_numpy(), np.concatenate([c for _, c in several]))
        return cls(symbols.dictionary, counts)


class SymbolCounter:
    """Counts symbols batch by batch, as `collections.Counter.update` does, in Arrow.

    Sums do not depend on the order of batches, and neither does anything that is made of them.

    Args:
        folder: Where counts go that do not fit into memory, an empty folder; None keeps them all.
        spill_at: Distinct symbols that are kept in memory.
    """

    def __init__(self, folder: Path | None = None, spill_at: int = _SPILL_AT) -> None:
        self._folder, self._spill_at = folder, spill_at
        self._seen: list[Counts] = []
        self._pending = self._num_files = 0

    def update(self, symbols: pa.Array | Counts) -> None:
        """Count each element of a flat array, or add what is counted already."""
        counted = symbols if isinstance(symbols, Counts) else Counts.of(symbols)
        self._seen.append(counted)
        self._pending += len(counted.counts)
        if self._pending > max(_MERGE_AT, len(self._seen[0].counts)):  # linear in all, amortised
            self._merge()

    def result(
        self, max_symbols: int | None = None, min_count: int = 1
    ) -> tuple[pa.Array, NDArray[np.int64], int]:
        """The distinct symbols, their counts, and the sum of the counts that were left out.

        Only counts that went to disk are left out, where they cannot be among the `max_symbols`
        most frequent ones (ties by code points) or are below `min_count`; line ends never are.
        The counter is empty then.
        """
        if not self._seen and not self._num_files:
            return pa.array([], pa.large_string()), np.zeros(0, np.int64), 0
        self._merge()
        if not self._num_files:
            (whole,) = self._seen
            self._seen = []
            return *whole, 0
        self._spill()
        left_out, kept = 0, []
        for part in self._parts():
            chosen = _candidates(part, max_symbols, min_count)
            left_out += part.total - int(part.counts[chosen].sum())
            kept.append(Counts(part.symbols.take(pa.array(chosen)), part.counts[chosen]))
        self._num_files = 0
        symbols = pa.concat_arrays([part.symbols for part in kept])
        counts = np.concatenate([part.counts for part in kept])
        del kept, part
        give_back()
        return symbols, counts, left_out

    def _merge(self) -> None:
        if len(self._seen) > 1:
            self._seen = [Counts.merged(self._seen)]
        self._pending = 0
        if self._folder is not None and self._seen and len(self._seen[0].counts) > self._spill_at:
            self._spill()

    def _spill(self) -> None:
        """Write what is in memory to a file, a record batch for each range of hashes."""
        if not self._seen or self._folder is None:
            return
        (whole,) = self._seen
        part = (hash_symbols(whole.symbols) >> np.uint64(64 - _NUM_PARTS_LOG2)).astype(np.uint8)
        order = np.argsort(part, kind="stable")
        borders = np.searchsorted(part[order], np.arange(2**_NUM_PARTS_LOG2 + 1))
        schema = pa.schema({"symbol": whole.symbols.type, "count": pa.int64()})
        with pa.ipc.new_file(str(self._file(self._num_files)), schema) as file:
            for begin, end in pairwise(borders):
                own = pa.array(order[begin:end])
                columns = [whole.symbols.take(own), pa.array(whole.counts[order[begin:end]])]
                file.write_batch(pa.record_batch(columns, schema=schema))
        self._seen = []
        self._num_files += 1
        del whole, columns, own
        give_back()

    def _parts(self) -> Iterator[Counts]:
        """The counts of each range of hashes."""
        names = [str(self._file(number)) for number in range(self._num_files)]
        for part in range(2**_NUM_PARTS_LOG2):
            found = []
            for name in names:
                with pa.OSFile(name) as file:
                    batch = pa.ipc.open_file(file).get_batch(part)
                    found.append(Counts(batch["symbol"], batch["count"].to_numpy()))
            yield Counts.merged(found)

    def _file(self, number: int) -> Path:
        assert self._folder is not None
        return self._folder / f"counts-{number}.arrow"


def give_back() -> None:
    """Return the memory of what was freed to the system, which Arrow and glibc put off."""
    pa.default_memory_pool().release_unused()
    give_back_pages()


def ranks(names: pa.Array, counts: NDArray[np.int64]) -> NDArray[np.signedinteger[Any]]:
    """Places by descending count, then by code points (which is the order of UTF-8 bytes)."""
    table = pa.table({"count": counts, "name": names})
    keys = [("count", "descending"), ("name", "ascending")]
    order = pc.sort_indices(table, sort_keys=keys).to_numpy()
    return np.asarray(order, np.int32 if len(order) < 2**31 else np.int64)


def _candidates(part: Counts, max_symbols: int | None, min_count: int) -> NDArray[np.int64]:
    """Places of what limits on the whole leave of a part."""
    if not pa.types.is_large_string(part.symbols.type):  # ties of ids go by the names of tokens
        return np.arange(len(part.counts))
    frequent = np.flatnonzero(part.counts >= min_count)
    if max_symbols is not None and len(frequent) > max_symbols:
        own = part.symbols.take(pa.array(frequent))
        frequent = frequent[ranks(own, part.counts[frequent])[:max_symbols]]
    ends = pc.equal(part.symbols, LINE_END).to_numpy(zero_copy_only=False)
    return np.union1d(frequent, np.flatnonzero(ends))
