"""Output heads: `p(target | hidden)` over 10,000 to several million words, behind one contract."""

from lm_softmax.heads.adaptive import AdaptiveSoftmax
from lm_softmax.heads.base import OutputHead, TopK
from lm_softmax.heads.full import FullSoftmax

__all__ = ["AdaptiveSoftmax", "FullSoftmax", "OutputHead", "TopK"]
