"""Output heads: `p(target | hidden)` over 10,000 to several million words, behind one contract."""

from lm_softmax.heads.adaptive import AdaptiveSoftmax
from lm_softmax.heads.base import OutputHead, Search, TopK
from lm_softmax.heads.full import FullSoftmax
from lm_softmax.heads.hierarchical import HierarchicalSoftmax
from lm_softmax.heads.low_rank import LowRankSoftmax
from lm_softmax.heads.mixture import MixtureOfSoftmaxes
from lm_softmax.heads.nce import NCE
from lm_softmax.heads.preview import Agreement, SVDPreview, agreement
from lm_softmax.heads.product_quantized import ProductQuantizedSoftmax
from lm_softmax.heads.sampled import SampledSoftmax

__all__ = [
    "NCE",
    "AdaptiveSoftmax",
    "Agreement",
    "FullSoftmax",
    "HierarchicalSoftmax",
    "LowRankSoftmax",
    "MixtureOfSoftmaxes",
    "OutputHead",
    "ProductQuantizedSoftmax",
    "SVDPreview",
    "SampledSoftmax",
    "Search",
    "TopK",
    "agreement",
]
