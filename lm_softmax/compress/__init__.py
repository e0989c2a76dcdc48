"""`python -m lm_softmax.compress`: a smaller head from a trained one, and what that costs."""

from lm_softmax.compress.command import main
from lm_softmax.compress.convert import compress

__all__ = ["compress", "main"]
