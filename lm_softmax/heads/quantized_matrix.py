"""A matrix whose rows are concatenations of shared centroids, as a module."""

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from lm_softmax.heads.base import is_size
from lm_softmax.heads.quantize import assign, code_dtype, refill
from lm_softmax.kernels import ProductCode, code_rows
from lm_softmax.kernels.workspace import reads_are_cheap

LATENT_NOISE = 0.5  # of the rows' range: how far at most latent rows start from them


class QuantizedMatrix(nn.Module):
    """Row w of `(num_rows, width)` is `cat([centroids[m, codes[w, m]] for m in range(M)])`.

    With `learn_codes` there is a `latent` matrix besides. It takes no part in the value, and its
    gradient is that of the rows (the straight-through estimator of Bengio et al. 2013, section
    4); `reassign` gives each part of a latent row its nearest centroid. A matrix of no more rows
    than centroids is exact: each row has centroids of its own, and there is nothing to learn.
    Codes start at random, latent rows near the rows themselves, so that no search is needed.

    Args:
        num_rows: Number of rows.
        width: Width of a row.
        num_codebooks: M, which divides `width`.
        codebook_size: Centroids a codebook; more than rows would be of no use and are not made.
        learn_codes: Whether there is a latent matrix; else codes stay what they are.
        bound: Entries of the rows start uniform in `[-bound, bound]`.
    """

    codes: Tensor

    def __init__(
        self,
        num_rows: int,
        width: int,
        *,
        num_codebooks: int,
        codebook_size: int,
        learn_codes: bool,
        bound: float,
    ) -> None:
        super().__init__()
        size = min(codebook_size, num_rows)
        part_width = width // num_codebooks
        centroids = torch.empty(num_codebooks, size, part_width).uniform_(-bound, bound)
        codes = _spread_codes(num_rows, num_codebooks, size)
        self.latent = None
        if learn_codes and num_rows > size:
            noise = LATENT_NOISE * bound
            latent = torch.empty(num_rows, width).uniform_(-noise, noise)
            code = ProductCode(centroids, codes)
            for part in code.chunks():
                latent[part] += code_rows(code, part=part)
            self.latent = nn.Parameter(latent)
        self.centroids = nn.Parameter(centroids)
        self.register_buffer("codes", codes.to(code_dtype(size)))

    @property
    def code(self) -> ProductCode:
        """As the kernels take it."""
        return ProductCode(self.centroids, self.codes)

    def rows(self) -> Tensor:
        """The whole matrix, for autograd."""
        return code_rows(self.code, self.latent)

    @torch.no_grad()
    def reassign(self) -> None:
        """Codes of the nearest centroids to the latent rows, and work for centroids without any.

        A function of the state alone: ranks of equal parameters keep equal codes. Where the latent
        matrix is frozen the codes stay, and frozen centroids do not move.
        """
        if self.latent is None or not self.latent.requires_grad:
            return
        latent, centroids = _whole(self.latent), _whole(self.centroids)
        codes, errors = assign(latent, centroids)
        num_codebooks, size, _ = centroids.shape
        num_members = torch.zeros(num_codebooks, size, dtype=torch.int64, device=codes.device)
        num_members.scatter_add_(1, codes.t(), torch.ones_like(codes).t())
        if self.centroids.requires_grad and not (
            reads_are_cheap(codes) and (num_members > 0).all()
        ):
            refill(latent, codes, errors, centroids, num_members)
            _write(self.centroids, centroids)
        self.codes.copy_(codes)


def _whole(parameter: nn.Parameter) -> Tensor:
    """Its values, gathered from all ranks where it is sharded (FSDP2)."""
    return parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter.detach()


def _write(parameter: nn.Parameter, values: Tensor) -> None:
    """Give a parameter these values, each rank its shard."""
    sharded: Any = parameter
    if hasattr(sharded, "full_tensor"):
        from torch.distributed.tensor import distribute_tensor  # not in every build of torch

        values = distribute_tensor(values, sharded.device_mesh, sharded.placements)
    parameter.copy_(values)


def _spread_codes(num_rows: int, num_codebooks: int, size: int) -> Tensor:
    """Random codes: of `size` rows in succession, no two share a centroid.

    So frequent words, whose ids lie together, keep apart, and all centroids have as many rows.
    """
    num_blocks = -(-num_rows // size)
    columns = (torch.rand(num_blocks, size).argsort(1).flatten() for _ in range(num_codebooks))
    return torch.stack([column[:num_rows] for column in columns], 1)


def quantized_factors(
    widths: list[int],
    num_codebooks: list[int],
    *,
    codebook_size: int,
    learn_codes: bool,
) -> list[QuantizedMatrix]:
    """Matrices from each width to the next one; all but the last keep the variance of inputs."""
    factors: list[QuantizedMatrix] = []
    for num, (width, num_rows) in zip(num_codebooks, pairwise(widths), strict=True):
        inner = len(factors) < len(num_codebooks) - 1
        factor = QuantizedMatrix(
            num_rows,
            width,
            num_codebooks=num,
            codebook_size=codebook_size,
            learn_codes=learn_codes,
            bound=(3 / width if inner else 1 / width) ** 0.5,
        )
        factors.append(factor)
    return factors


def checked_rank(rank: int | Sequence[int] | None, hidden_size: int) -> list[int]:
    """Widths after `hidden_size`, none wider than the one before."""
    ranks = [] if rank is None else list(rank) if isinstance(rank, Sequence) else [rank]
    for before, width in pairwise([hidden_size, *ranks]):
        if not (is_size(width) and width <= before):
            raise ValueError(
                f"rank must be widths from hidden_size={hidden_size} down to at least 1, none above"
                f" the one before, got {rank}"
            )
    return ranks


def checked_codebooks(num_codebooks: int | Sequence[int] | None, widths: list[int]) -> list[int]:
    """Number of codebooks of each matrix."""
    if num_codebooks is None:
        return [width // math.gcd(width, 8) for width in widths]
    given = num_codebooks
    numbers = list(given) if isinstance(given, Sequence) else [given] * len(widths)
    if len(numbers) != len(widths):
        raise ValueError(
            f"num_codebooks must be one number, or one for each of the {len(widths)} widths"
            f" {widths}, got {numbers}"
        )
    for number, width in zip(numbers, widths, strict=True):
        if not (is_size(number) and width % number == 0):
            raise ValueError(
                f"num_codebooks must divide the width of the rows: got {number} for {width}"
            )
    return numbers
