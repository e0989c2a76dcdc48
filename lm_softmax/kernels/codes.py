"""Rows that are concatenations of shared centroids, made a chunk at a time."""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from lm_softmax.kernels.dense import accumulation_dtype
from lm_softmax.kernels.workspace import workspace

ROWS_BYTES = 2**22  # of rows rebuilt at once: they stay in the cache until they are multiplied
TABLE_TOKENS = 64  # tokens of one table of products, which then stays in the cache


class ProductCode(NamedTuple):
    """A matrix `(n, M * s)` whose row w is `cat([centroids[m, codes[w, m]] for m in range(M)])`.

    Source: Jegou et al. 2011, "Product quantization for nearest neighbor search", section II.B.
    """

    centroids: Tensor  # (M, K, s)
    codes: Tensor  # (n, M), of any integer dtype, each below K

    @property
    def num_rows(self) -> int:
        """Number of rows."""
        return self.codes.shape[0]

    @property
    def width(self) -> int:
        """Width of a row."""
        return self.centroids.shape[0] * self.centroids.shape[2]

    def chunks(self) -> list[slice]:
        """Rows to rebuild at once, in order."""
        row_bytes = self.width * accumulation_dtype(self.centroids.dtype).itemsize
        size = max(ROWS_BYTES // row_bytes, 16)
        return [
            slice(start, min(start + size, self.num_rows))
            for start in range(0, self.num_rows, size)
        ]

    def places(self, part: slice) -> Tensor:
        """Where the centroids of some rows lie among all `M * K`: `(rows, M)`, int32."""
        num_codebooks, size, _ = self.centroids.shape
        starts = torch.arange(num_codebooks, dtype=torch.int32, device=self.codes.device) * size
        return self.codes[part].to(torch.int32) + starts

    def table(self, dtype: torch.dtype) -> Tensor:
        """All centroids, `(M * K, s)`."""
        return self.centroids.flatten(0, 1).to(dtype)

    def add_rows(self, part: slice, of_rows: Tensor, out: Tensor) -> None:
        """Add the gradient of some rows, `(rows, width)`, to that of the centroids `out`."""
        places = self.places(part).view(-1, 1).long()
        parts = of_rows.view(places.shape[0], -1)
        out.view(-1, parts.shape[1]).scatter_add_(0, places.expand_as(parts), parts)


class RowChunks(Sequence[Tensor]):
    """The chunks of a product code's rows, each rebuilt when it is asked for.

    A chunk is valid until the next one is asked for.
    """

    def __init__(self, code: ProductCode, dtype: torch.dtype) -> None:
        self.code = code
        self.slices = code.chunks()
        self.table = code.table(dtype)

    def __len__(self) -> int:
        return len(self.slices)

    def __getitem__(self, index: Any) -> Any:
        places = self.code.places(self.slices[index])
        if torch.compiler.is_compiling():  # which plans its own memory
            return self.table.index_select(0, places.view(-1)).view(places.shape[0], -1)
        shape = places.numel(), self.table.shape[1]
        rows = workspace("rows", shape, self.table, self.table.dtype)
        torch.index_select(self.table, 0, places.view(-1), out=rows)
        return rows.view(places.shape[0], -1)

    def __iter__(self) -> Iterator[Tensor]:
        return (self[index] for index in range(len(self)))


def code_logits(
    inputs: Tensor, code: ProductCode, latent: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """`F.linear(inputs, rows)` of all rows, `(N, n)`, in at least float32.

    Few tokens are scored from the table of their products with all centroids, many from rows that
    are rebuilt chunk by chunk, whichever costs less. Whatever autograd may differentiate is scored
    from rebuilt rows. The values are the same up to rounding: the table is summed in at least
    float32, a product with rows of bfloat16 or float16 returns each logit in that dtype, as
    `F.linear` does.

    Args:
        inputs: `(N, width)`.
        code: The rows.
        latent: `(n, width)`, takes the gradient of the rows and no part in their value.
        dtype: Of the operands of the products.
    """
    if needs_gradient(inputs, code.centroids, latent):
        return differentiable_logits(inputs, code, latent, dtype)
    if table_is_cheaper(inputs.shape[0], code, dtype):
        return table_logits(inputs, code, dtype)
    return rebuilt_logits(inputs, code, dtype)


def needs_gradient(*tensors: Tensor | None) -> bool:
    """Whether autograd follows any of them."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def table_is_cheaper(num_tokens: int, code: ProductCode, dtype: torch.dtype) -> bool:
    """Whether sums of table entries cost less than rebuilt rows and a matrix product.

    A sum takes M additions a token and a word, which no library does in float64 at speed, where
    the product takes M * s multiplications at a several times higher rate.
    """
    if accumulation_dtype(dtype) == torch.float64:
        return False
    return num_tokens <= TABLE_TOKENS and num_tokens <= 16 * code.centroids.shape[2]


def table_logits(inputs: Tensor, code: ProductCode, dtype: torch.dtype) -> Tensor:
    """Sums of the products of each part of `inputs` with the centroids of its codebook."""
    total_dtype = accumulation_dtype(dtype)
    out = torch.empty(inputs.shape[0], code.num_rows, dtype=total_dtype, device=inputs.device)
    for start in range(0, inputs.shape[0], TABLE_TOKENS):
        tokens = slice(start, start + TABLE_TOKENS)
        table = product_table(inputs[tokens], code, dtype)
        for part in code.chunks():
            sums = F.embedding_bag(code.places(part), table, mode="sum")
            out[tokens, part] = sums.t()
    return out


def product_table(inputs: Tensor, code: ProductCode, dtype: torch.dtype) -> Tensor:
    """Product of each centroid with its part of each row of `inputs`, `(M * K, N)`."""
    num_codebooks, size, part_width = code.centroids.shape
    total_dtype = accumulation_dtype(dtype)
    centroids = code.centroids.to(dtype).to(total_dtype)
    parts = inputs.to(dtype).to(total_dtype).view(-1, num_codebooks, part_width)
    table = torch.bmm(centroids, parts.permute(1, 2, 0))
    return table.view(num_codebooks * size, inputs.shape[0])


def rebuilt_logits(inputs: Tensor, code: ProductCode, dtype: torch.dtype) -> Tensor:
    """Products with the rows of one chunk after another."""
    out_dtype = accumulation_dtype(dtype)
    out = torch.empty(inputs.shape[0], code.num_rows, dtype=out_dtype, device=inputs.device)
    rounded = inputs.to(dtype)
    chunks = RowChunks(code, dtype)
    for part, rows in zip(chunks.slices, chunks, strict=True):
        out[:, part] = F.linear(rounded, rows)
    return out


def logit_chunks(inputs: Tensor, code: ProductCode, dtype: torch.dtype) -> Iterator[Tensor]:
    """`code_logits` of `code.chunks()`, one after the other, not for autograd.

    A chunk is valid until the next one is asked for.
    """
    total_dtype, chunks = accumulation_dtype(dtype), code.chunks()
    if len(inputs) and table_is_cheaper(len(inputs), code, dtype):  # sums want a token
        table = product_table(inputs, code, dtype)
        for part in chunks:
            yield F.embedding_bag(code.places(part), table, mode="sum").t().contiguous()
        return
    rounded, shape = inputs.to(dtype), (inputs.shape[0], chunks[0].stop)
    out = workspace("logits", shape, inputs, total_dtype)
    for part, rows in zip(chunks, RowChunks(code, dtype), strict=True):
        columns = out[:, : part.stop - part.start]
        yield columns.copy_(F.linear(rounded, rows))


def differentiable_logits(
    inputs: Tensor, code: ProductCode, latent: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """`rebuilt_logits` for autograd, second derivatives too; backward rebuilds a chunk's rows."""

    def product(inputs: Tensor, centroids: Tensor, of_part: Tensor | None, part: slice) -> Tensor:
        rows = code_rows(ProductCode(centroids, code.codes), of_part, part)
        return F.linear(inputs.to(dtype), rows.to(dtype)).to(accumulation_dtype(dtype))

    rebuild = partial(checkpoint, product, use_reentrant=False, preserve_rng_state=False)
    chunks = code.chunks()
    of_parts: Sequence[Tensor | None] = [None] * len(chunks)
    if latent is not None:  # split, not sliced: each slice's gradient would be a whole matrix
        of_parts = torch.split(latent, [part.stop - part.start for part in chunks])
    parts = [
        rebuild(inputs, code.centroids, of_part, part)
        for of_part, part in zip(of_parts, chunks, strict=True)
    ]
    return torch.cat(parts, -1)


def code_rows(code: ProductCode, latent: Tensor | None = None, part: slice | None = None) -> Tensor:
    """Rows of a code for autograd: their gradient goes to the centroids and to the latent rows."""
    part = slice(0, code.num_rows) if part is None else part
    places = code.places(part)
    rows = F.embedding(places, code.centroids.flatten(0, 1)).flatten(1)
    return rows if latent is None else rows + (latent - latent.detach())
