"""What a process should do before its first large vector call."""

import torch


def warm_up() -> None:
    """Call exp, log and tanh on tiny tensors so that the first large calls are right.

    On some CPUs the first large multi-threaded exp, log or tanh of a process that follows a matrix
    product is wrong in one thread's part (relative error up to 1.5e-4 in float32, in about 6 % of
    processes); the next call is right. A call on four elements first removes it. Commands,
    workers and tests call this at their start; it takes microseconds.
    """
    for dtype in (torch.float32, torch.float64):
        tiny = torch.ones(4, dtype=dtype)
        for function in (torch.exp, torch.log, torch.tanh):
            function(tiny)
