"""`python -m lm_softmax.generate`: text from a checkpoint, and log-probabilities of texts."""

from lm_softmax.generate.command import main

__all__ = ["main"]
