"""Symbols by the million: hashed in whole arrays, and looked up in a table that is built once."""

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

_CHUNK = 2**16  # symbols that are hashed at a time: some ten bytes of work for each of theirs
_NEAR = 2**16  # bytes of a symbol with multipliers of their own
_ODD = np.uint64(0x9E3779B97F4A7C15)


def hash_symbols(symbols: pa.Array, seed: int = 0) -> NDArray[np.uint64]:
    """A 64-bit number for each symbol, the same for equal ones.

    Strings by multilinear hashing over their bytes, `sum(random[i] * (byte[i] + 1))` modulo 2**64:
    two different ones meet by chance alone, and not again under another seed. Numbers do not meet.

    Args:
        symbols: `large_string` or int64 array without nulls.
        seed: Of the multipliers.

    Source:
        Lemire and Kaser, "Strongly universal string hashing is fast", 2014, arXiv:1202.4961.
    """
    if not pa.types.is_large_string(symbols.type):
        return _mix(symbols.to_numpy().astype(np.int64).view(np.uint64))
    hashes = np.empty(len(symbols), np.uint64)
    for begin in range(0, len(symbols), _CHUNK):
        part = slice(begin, begin + _CHUNK)
        hashes[part] = _hash_strings(symbols[part], seed)
    return hashes


def _hash_strings(symbols: pa.Array, seed: int) -> NDArray[np.uint64]:
    _, offsets, data = symbols.buffers()
    ends = np.frombuffer(offsets, np.int64)[symbols.offset : symbols.offset + len(symbols) + 1]
    lengths = np.diff(ends)
    hashes = np.zeros(len(symbols), np.uint64)
    if ends[-1] > ends[0]:  # else there may be no data at all
        text = np.frombuffer(data, np.uint8)[ends[0] : ends[-1]]
        begins = ends[:-1] - ends[0]
        terms = text.astype(np.uint64)
        terms += np.uint64(1)
        terms *= _multipliers(np.arange(len(text)) - np.repeat(begins, lengths), seed)
        filled = lengths > 0
        hashes[filled] = np.add.reduceat(terms, begins[filled])
    return _mix(hashes)


def _multipliers(place: NDArray[np.int64], seed: int) -> NDArray[np.uint64]:
    """The random number of each place within a symbol."""
    longest = int(place.max()) + 1
    near, far = (np.random.default_rng([seed, stream]) for stream in (0, 1))
    numbers = near.integers(2**64, size=min(longest, _NEAR), dtype=np.uint64)
    if longest <= _NEAR:
        return numbers[place]
    farther = far.integers(2**64, size=-(-longest // _NEAR), dtype=np.uint64) | np.uint64(1)
    return numbers[place % _NEAR] * farther[place // _NEAR]


def _mix(hashes: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Spread what the low bits know over the high ones, one to one."""
    hashes = hashes * _ODD
    hashes ^= hashes >> np.uint64(32)
    hashes *= _ODD
    return hashes


class SymbolIndex:
    """Places of symbols in an array, as `{symbol: place}.get(symbol, -1)` gives them.

    Arrow's own look-ups build their table anew with each call, which for millions of symbols takes
    longer than what they look up.

    Args:
        symbols: Distinct symbols.
    """

    def __init__(self, symbols: pa.Array) -> None:
        self._symbols, self._seed = symbols, -1
        while True:  # once, but for a chance of some 2**-64 for each pair of symbols
            self._seed += 1
            hashes = hash_symbols(symbols, self._seed)
            order = np.argsort(hashes).astype(np.min_scalar_type(len(symbols)))
            hashes = hashes[order]
            if not (hashes[1:] == hashes[:-1]).any():
                break
        self._hashes, self._order = hashes, order

    def find(self, wanted: pa.Array) -> NDArray[np.int64]:
        """The place of each of `wanted`, -1 where it is not there."""
        if len(self._symbols) == 0:
            return np.full(len(wanted), -1)
        hashes = hash_symbols(wanted, self._seed)
        near = np.searchsorted(self._hashes, hashes).clip(max=len(self._hashes) - 1)
        places = self._order[near].astype(np.int64)
        places[self._hashes[near] != hashes] = -1
        hits = np.flatnonzero(places >= 0)
        same = pc.equal(self._symbols.take(pa.array(places[hits])), wanted.take(pa.array(hits)))
        places[hits[~same.to_numpy(zero_copy_only=False)]] = -1
        return places
