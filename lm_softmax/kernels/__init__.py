"""Tensors in, tensors out: the passes that the heads are made of. Torch only, no modules."""

from lm_softmax.kernels.clusters import Clusters, Tail
from lm_softmax.kernels.dense import Objective, accumulation_dtype, autocast_off, product_dtype
from lm_softmax.kernels.operations import cluster_loss, cluster_nll
from lm_softmax.kernels.startup import warm_up

__all__ = [
    "Clusters",
    "Objective",
    "Tail",
    "accumulation_dtype",
    "autocast_off",
    "cluster_loss",
    "cluster_nll",
    "product_dtype",
    "warm_up",
]

warm_up()  # here once, so that no user of a kernel can forget it
