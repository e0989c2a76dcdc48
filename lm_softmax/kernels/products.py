"""Matrix products: which library makes them, and sums wider than their operands."""

from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from lm_softmax.kernels.workspace import workspace

WORD_BLOCK = 2048  # a product into 100,000 columns at once takes MKL 1.5 times as long
BLOCK_ROWS = 48  # products of fewer rows, as of text in the making, take half as long undivided
# Where MKL is slow (docs/decisions/016-one-row-at-a-time.md):
FEW_ROWS, FEW_VALUES = 8, 2**11  # at most, of operands that are multiplied sooner as columns
WIDE = 96  # width from which on a single row is, too
NARROW = 64  # width below which MKL multiplies rows well, unless they are BLOCK_ROWS or more
SOME_WEIGHTS, MANY_WEIGHTS = 2**18, 2**20  # for which columns and oneDNN are worth their calls
STEP_OF_ROWS = 8  # numbers of rows that oneDNN makes code for: a power of two
BLOCK_VALUES = 2**19  # that oneDNN makes at once: they are copied while the cache has them
TURNED_ROWS, TURNED_SHAPE = 320, 5  # from so many on, or so many a column: decision 014
FP16_GAIN = 256.0  # lifts small probabilities out of fp16's subnormals; undone in float32


def products_widen(like: Tensor) -> bool:
    """Whether products of low-precision operands are returned in float32, as they are summed.

    A CPU rounds them. That does for logits, but gradients are summed over chunks and scaled
    afterwards, so there their operands are float32.
    """
    return like.is_cuda


def multiply(out: Tensor, left: Tensor, right: Tensor) -> None:
    """`out = left @ right`."""
    if left.dtype == out.dtype:
        torch.mm(left, right, out=out)
    elif left.is_cuda:
        torch.mm(left, right, out_dtype=out.dtype, out=out)
    else:
        out.copy_(_product(left, right, out.dtype))


def accumulate(out: Tensor, left: Tensor, right: Tensor, *, keep: bool, alpha: float) -> None:
    """`out = alpha * left @ right`, plus what it held with `keep`."""
    if left.dtype == out.dtype:
        torch.addmm(out, left, right, beta=int(keep), alpha=alpha, out=out)
    elif left.is_cuda:  # added up where the product is, with no copy of it
        dtype = out.dtype
        torch.addmm(out, left, right, out_dtype=dtype, beta=int(keep), alpha=alpha, out=out)
    elif keep:
        out.add_(_product(left, right, out.dtype), alpha=alpha)
    else:
        torch.mul(_product(left, right, out.dtype), alpha, out=out)


def weighted_sum(out: Tensor, weights: Tensor, rows: Tensor, *, keep: bool) -> None:
    """`out = weights @ rows`, plus what it held with `keep`, in as many parts as there are threads.

    MKL multiplies by a vector in one thread.

    Args:
        out: `(n,)`.
        weights: `(N,)`.
        rows: `(N, n)`.
        keep: Whether to add.
    """
    num_parts, beta = torch.get_num_threads(), int(keep)
    if out.shape[0] % num_parts:
        torch.addmv(out, rows.t(), weights, beta=beta, out=out)
        return
    parts, left = out.view(num_parts, 1, -1), weights.expand(num_parts, 1, -1)
    right = rows.view(rows.shape[0], num_parts, parts.shape[2]).transpose(0, 1)
    torch.baddbmm(parts, left, right, beta=beta, out=parts)


def linear(left: Tensor, rows: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """`F.linear(left, rows, bias)` in `dtype`, on a CPU; the result may be overwritten."""
    if left.dtype == rows.dtype == dtype:
        bias = None if bias is None else bias.to(dtype).contiguous()  # oneDNN takes it for that
        if dtype == torch.float32 and _uses_onednn():
            return torch.ops.mkldnn._linear_pointwise.default(left, rows, bias, "none", [], "")
        out = workspace("product", (left.shape[0], rows.shape[0]), left, dtype)
        if bias is None:
            return torch.mm(left, rows.t(), out=out)
        return torch.addmm(bias, left, rows.t(), out=out)
    out = _product(left, rows.t(), dtype).to(dtype)
    return out if bias is None else out.add_(bias)


def linear_into(out: Tensor, left: Tensor, rows: Tensor, bias: Tensor | None) -> None:
    """`out = F.linear(left, rows, bias)`; without a bias `out` may be of a wider dtype."""
    way, num_rows = way_of(left, rows), left.shape[0]
    if way == "columns":
        columns = torch.cat([left, left]) if num_rows == 1 else left
        found = workspace("columns", (rows.shape[0], columns.shape[0]), left, left.dtype)
        found = torch.mm(rows, columns.t(), out=found).t()[:num_rows]
        out.copy_(found) if bias is None else torch.add(found, bias, out=out)
    elif way == "onednn":
        filled = fill_up(left, STEP_OF_ROWS)
        size = max(BLOCK_VALUES // num_rows, WORD_BLOCK)
        for part, words, offset in _in_blocks(out, rows, bias, size):
            part.copy_(linear(filled, words, offset, left.dtype)[:num_rows])
    elif left.is_cpu and num_rows >= BLOCK_ROWS:
        for part, words, offset in _in_blocks(out, rows, bias, WORD_BLOCK):
            _linear_by_mm(part, left, words, offset)
    else:
        _linear_by_mm(out, left, rows, bias)


def _linear_by_mm(out: Tensor, left: Tensor, rows: Tensor, bias: Tensor | None) -> None:
    """See `linear_into`."""
    if bias is None:
        multiply(out, left, rows.t())
    else:
        torch.addmm(bias, left, rows.t(), out=out)


def _in_blocks(
    out: Tensor, rows: Tensor, bias: Tensor | None, size: int
) -> Iterator[tuple[Tensor, Tensor, Tensor | None]]:
    """The operands of `linear_into`, some words at a time."""
    for start in range(0, rows.shape[0], size):
        words = slice(start, start + size)
        yield out[:, words], rows[words], None if bias is None else bias[words]


def linears(left: Tensor, blocks: Sequence[Tensor], bias: Tensor | None) -> Tensor:
    """`F.linear(left, torch.cat(blocks), bias)` by few calls, into memory of its own."""
    bias = None if bias is None else bias.to(left.dtype)
    if len(blocks) == 1:
        return F.linear(left, blocks[0], bias)
    biases: Sequence[Tensor | None] = [None] * len(blocks)
    if bias is not None:
        biases = bias.split_with_sizes([rows.shape[0] for rows in blocks])
    return torch.cat(list(map(F.linear, [left] * len(blocks), blocks, biases)), 1)


def way_of(left: Tensor, rows: Tensor) -> Literal["mm", "onednn", "columns"]:
    """How `linear_into` multiplies: by one call, by torch's other library, or transposed."""
    num_rows, width = left.shape
    num_weights = rows.numel()
    if num_weights < SOME_WEIGHTS or not num_rows or left.dtype != torch.float32:
        return "mm"
    if torch.compiler.is_compiling() or not (left.is_cpu and _uses_onednn()):
        return "mm"
    if num_rows == 1:
        return "columns" if width >= WIDE else "mm"
    if num_rows < BLOCK_ROWS and width < NARROW:
        return "mm"
    if num_rows <= FEW_ROWS and num_rows * width <= FEW_VALUES:
        return "columns"
    return "onednn" if num_rows >= BLOCK_ROWS or num_weights >= MANY_WEIGHTS else "mm"


def fill_up(left: Tensor, least_step: int = 1) -> Tensor:
    """Rows that `linear` multiplies best, its own and copies of the last, as finite as itself.

    oneDNN makes code for each shape that it meets, in about 1 ms: so there are few of them.

    Args:
        left: `(N, width)`.
        least_step: A power of two that divides their number.
    """
    num_rows = left.shape[0]
    if left.dtype != torch.float32 or not _uses_onednn():
        return left
    step = max(2 ** (num_rows.bit_length() - 6), least_step)
    filling = -num_rows % step
    return torch.cat([left, left[-1:].expand(filling, -1)]) if filling else left


def is_faster_turned(left: Tensor) -> bool:
    """Whether `linear(left.t(), logits.t())` makes `logits.t() @ left` sooner than MKL does.

    So it does of many rows, and of fewer where they are narrow (`TURNED_ROWS`, `TURNED_SHAPE`).
    """
    num_rows, width = left.shape
    many = num_rows >= min(TURNED_SHAPE * width, TURNED_ROWS)
    return many and left.dtype == torch.float32 and _uses_onednn()


def _uses_onednn() -> bool:
    """`torch.backends.mkldnn.flags(enabled=False)` is the way to do without it."""
    return bool(torch.backends.mkldnn.enabled) and _prefers_onednn()


@cache
def _mkl_is_slow() -> bool:
    """Whether `torch.mm` takes MKL on a processor whose AVX-512 that leaves unused, as AMD's."""
    if not torch.backends.mkl.is_available():  # type: ignore[no-untyped-call]
        return False
    return torch.backends.cpu.get_cpu_capability() == "AVX512" and _of_amd()


@cache
def _prefers_onednn() -> bool:
    """Whether torch's other library multiplies float32 faster than the one that `torch.mm` takes.

    Where MKL is slow: 138 for 212 GFLOP/s on two Zen 4 cores.
    """
    if not (torch.backends.mkldnn.is_available() and _mkl_is_slow()):  # type: ignore[no-untyped-call]
        return False
    left = torch.eye(3, 5, dtype=torch.float32, device="cpu")
    right, bias = left.new_tensor(range(20)).view(4, 5), left.new_tensor(range(4))
    try:
        found = torch.ops.mkldnn._linear_pointwise.default(left, right, bias, "none", [], "")
        return torch.allclose(found, torch.addmm(bias, left, right.t()))
    except (AttributeError, RuntimeError, TypeError):  # no public name: it may change
        return False


def _of_amd() -> bool:
    try:
        return "AuthenticAMD" in Path("/proc/cpuinfo").read_text()
    except OSError:
        return False


def gain_of(dtype: torch.dtype) -> float:
    """What derivatives are multiplied by before they become operands of this dtype."""
    return FP16_GAIN if dtype == torch.float16 else 1.0


def operand(derivative: Tensor, dtype: torch.dtype) -> Tensor:
    """A derivative as an operand, times its gain; what has the dtype already is returned as is."""
    if derivative.dtype == dtype:
        return derivative
    out = torch.empty(derivative.shape, dtype=dtype, device=derivative.device)
    return torch.mul(derivative, gain_of(dtype), out=out)


def _product(left: Tensor, right: Tensor, dtype: torch.dtype) -> Tensor:
    """Matrix product of low-precision operands as `dtype`, on a CPU."""
    if left.dtype == torch.float16:  # slow on a CPU, and soon beyond 65504
        return torch.mm(left.to(dtype), right.to(dtype))
    shape = (left.shape[0], right.shape[1])
    return torch.mm(left, right, out=workspace("product", shape, left, left.dtype))
