"""Memory that is kept between calls, where a device's allocator does not keep it itself."""

import threading
from collections.abc import Sequence

import torch
from torch import Tensor

from lm_softmax.allocator import serve_from_heap

ROW_ALIGNMENT = 64  # elements: 128 bytes in the narrowest dtype, what the widest accesses want


class _Buffers(threading.local):
    """Work buffers of one thread, by name and dtype."""

    def __init__(self) -> None:
        self.held: dict[tuple[str, torch.dtype], Tensor] = {}


_buffers = _Buffers()


def reads_are_cheap(like: Tensor) -> bool:
    """Whether the host may look at values, and keep memory, without a device that waits for it."""
    return like.is_cpu


def workspace(name: str, shape: Sequence[int], like: Tensor, dtype: torch.dtype) -> Tensor:
    """An uninitialised buffer; on a CPU the same memory at each call of a thread.

    There the allocator returns a block of this size when it is freed, and the next one pays for
    fresh pages; the allocators of other devices keep their memory.
    """
    if not reads_are_cheap(like):
        return torch.empty(shape, dtype=dtype, device=like.device)
    if not (_buffers.held or torch.compiler.is_compiling()):
        serve_from_heap()
    size = shape[0] * shape[1]
    held = _buffers.held.get((name, dtype))
    if held is None or held.numel() < size:
        with torch.inference_mode(False):  # else it could be written inside of that mode only
            held = _buffers.held[name, dtype] = torch.empty(size, dtype=dtype)
    return held.as_strided((shape[0], shape[1]), (shape[1], 1))


def aligned_rows(shape: tuple[int, int], like: Tensor, dtype: torch.dtype) -> Tensor:
    """An uninitialised matrix whose rows all begin at an aligned address.

    An odd number of words would leave most rows at odd ones, where neither a kernel nor the tensor
    cores' products read 16 bytes at once.
    """
    width = -(-shape[1] // ROW_ALIGNMENT) * ROW_ALIGNMENT
    return torch.empty(shape[0], width, dtype=dtype, device=like.device)[:, : shape[1]]
