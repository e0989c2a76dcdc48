"""Matrix products whose sums are wider than their operands."""

import torch
from torch import Tensor

from lm_softmax.kernels.workspace import workspace

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
