"""`python -m lm_softmax.benchmark`: time and memory of every head beside its peers."""

from lm_softmax.benchmark.command import main

__all__ = ["main"]
