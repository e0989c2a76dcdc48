"""The problem that all contestants of a benchmark solve: sizes, types, hidden vectors, targets."""

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lm_softmax.heads.cutoffs import zipf_counts

DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
}
ZIPF = "zipf"


@dataclass(frozen=True)
class Problem:
    """Sizes and sources of one problem; plain values, so that another process can make it too.

    Hidden vectors are normal with variance 1, drawn with the seed. Targets come from Zipf's law
    with exponent 1 (`p(rank) ~ 1 / rank`), drawn with the seed, or are the first `num_tokens` ids
    below `vocab_size` of a corpus. Hidden vectors and parameters have one dtype; there is no
    autocast, which not every peer supports.

    Attributes:
        vocab_size: Number of words, V.
        num_tokens: Number of targets, N.
        hidden_size: Width of the hidden vectors, d.
        dtype: Name of the dtype of hidden vectors and parameters.
        device: Where all is.
        targets: "zipf", or a `.npy` file: one dimension of whole numbers, the token ids of a
            text, ranked by frequency.
        seed: Of hidden vectors, targets and parameters.
    """

    vocab_size: int
    num_tokens: int
    hidden_size: int
    dtype: str = "float32"
    device: str = "cpu"
    targets: str = ZIPF
    seed: int = 0

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype itself."""
        return DTYPES[self.dtype]

    def counts(self) -> Tensor:
        """Training-set frequency of each word, `(vocab_size,)`, on the CPU.

        Raises:
            ValueError: See `read_ids`.
        """
        if self.targets == ZIPF:
            return zipf_counts(self.vocab_size)
        ids = torch.from_numpy(below(read_ids(self.targets), self.vocab_size))
        return torch.bincount(ids, minlength=self.vocab_size)

    def inputs(self) -> tuple[Tensor, Tensor]:
        """Hidden vectors `(N, d)` that want a gradient, and targets `(N,)`.

        Raises:
            ValueError: If the corpus has fewer tokens than N.
        """
        generator = torch.Generator().manual_seed(self.seed)
        shape = (self.num_tokens, self.hidden_size)
        hidden = torch.randn(shape, generator=generator).to(self.device, self.torch_dtype)
        target = draw_text(self.targets, self.vocab_size, self.num_tokens, generator)
        return hidden.requires_grad_(), target.to(self.device)


def draw_text(targets: str, vocab_size: int, num_tokens: int, generator: torch.Generator) -> Tensor:
    """Token ids `(num_tokens,)`, int64: drawn from Zipf's law, or the beginning of a corpus.

    Raises:
        ValueError: If the corpus is shorter.
    """
    if targets == ZIPF:
        sums = zipf_counts(vocab_size).cumsum(0)
        uniform = torch.rand(num_tokens, generator=generator, dtype=torch.float64)
        drawn = torch.searchsorted(sums, uniform * sums[-1], right=True)
        return drawn.clamp_(max=vocab_size - 1)
    ids = torch.from_numpy(below(read_ids(targets), vocab_size))
    if len(ids) < num_tokens:
        raise ValueError(
            f"{targets} holds {len(ids)} tokens below id {vocab_size}, {num_tokens} are asked for"
        )
    return ids[:num_tokens]


@cache
def read_ids(path: str) -> Any:
    """Token ids from a `.npy` file, int64.

    Raises:
        ValueError: If it cannot be read or holds anything else.
    """
    import numpy as np  # of the train extra

    if not Path(path).is_file():
        raise ValueError(f'targets must be "{ZIPF}" or a .npy file of token ids, no file {path}')
    try:
        ids = np.load(path, allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        raise ValueError(f"{path}: not a .npy file of token ids, {error}") from None
    if not isinstance(ids, np.ndarray) or ids.ndim != 1 or ids.dtype.kind not in "iu":
        got = f"{ids.dtype} {ids.shape}" if isinstance(ids, np.ndarray) else type(ids).__name__
        raise ValueError(f"{path}: token ids must be whole numbers in one dimension, got {got}")
    if len(ids) == 0 or int(ids.min()) < 0:
        raise ValueError(f"{path}: token ids must be at least 0, and there must be some")
    return ids.astype(np.int64)


def below(ids: Any, vocab_size: int) -> Any:
    """The ids of a vocabulary; rarer words are left out of the text."""
    return ids[ids < vocab_size]
