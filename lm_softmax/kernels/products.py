"""Matrix products: which library makes them, and sums wider than their operands."""

from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from lm_softmax.kernels.workspace import workspace

FEW_ROWS = 8  # that MKL multiplies sooner as columns, where it is slow
WIDE = 96  # from which on it does so with one
MANY_WEIGHTS = 2**15  # for which the calls around that are worth it
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


def linear(left: Tensor, rows: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """`F.linear(left, rows, bias)` in `dtype`, on a CPU; the result may be overwritten."""
    if left.dtype == rows.dtype == dtype:
        bias = None if bias is None else bias.to(dtype).contiguous()  # oneDNN takes it for that
        if dtype == torch.float32 and _uses_onednn():
            return torch.ops.mkldnn._linear_pointwise(left, rows, bias, "none", [], "")
        out = workspace("product", (left.shape[0], rows.shape[0]), left, dtype)
        if bias is None:
            return torch.mm(left, rows.t(), out=out)
        return torch.addmm(bias, left, rows.t(), out=out)
    out = _product(left, rows.t(), dtype).to(dtype)
    return out if bias is None else out.add_(bias)


def linear_into(out: Tensor, left: Tensor, rows: Tensor, bias: Tensor | None) -> None:
    """`out = F.linear(left, rows, bias)`; without a bias `out` may be of a wider dtype."""
    if _goes_by_columns(left, rows):
        columns = torch.cat([left, left]) if left.shape[0] == 1 else left  # one is slower than two
        found = workspace("columns", (rows.shape[0], columns.shape[0]), left, left.dtype)
        found = torch.mm(rows, columns.t(), out=found).t()[: left.shape[0]]
        out.copy_(found) if bias is None else torch.add(found, bias, out=out)
    elif bias is None:
        multiply(out, left, rows.t())
    else:
        torch.addmm(bias, left, rows.t(), out=out)


def _goes_by_columns(left: Tensor, rows: Tensor) -> bool:
    """Whether a tall matrix times few columns is faster than few rows times a wide one.

    One row times 40,000 x 256 takes 7.0 ms, two columns 1.9 ms, on two Zen 4 cores.
    """
    num_rows, width = left.shape
    if not 0 < num_rows <= FEW_ROWS or (num_rows == 1 and width < WIDE):
        return False
    return (
        rows.numel() >= MANY_WEIGHTS
        and left.is_cpu
        and left.dtype == torch.float32
        and _mkl_is_slow()
    )


def filled_up(left: Tensor) -> int:
    """As how many rows an operand of `linear` is multiplied best, its own number at least.

    oneDNN makes code for each shape that it meets, in about 1 ms: so there are few of them.
    """
    num_rows = left.shape[0]
    if left.dtype != torch.float32 or not _uses_onednn():
        return num_rows
    step = max(2 ** (num_rows.bit_length() - 6), 1)
    return -(-num_rows // step) * step


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
        found = torch.ops.mkldnn._linear_pointwise(left, right, bias, "none", [], "")
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
