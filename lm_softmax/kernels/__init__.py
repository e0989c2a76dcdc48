"""Tensors in, tensors out: the passes that the heads are made of. No modules.

Torch alone, and on a GPU Triton where it is installed, as it is with torch for CUDA.
"""

from lm_softmax.kernels.clusters import Clusters, Tail
from lm_softmax.kernels.codes import ProductCode, code_logits, code_rows
from lm_softmax.kernels.dense import Objective, accumulation_dtype, autocast_off, product_dtype
from lm_softmax.kernels.draws import Draws, draw_from_logits
from lm_softmax.kernels.mixture import Mixture
from lm_softmax.kernels.mixture_operations import mixture_loss, mixture_nll
from lm_softmax.kernels.operations import cluster_loss, cluster_nll
from lm_softmax.kernels.startup import warm_up
from lm_softmax.kernels.streamed import Streamed, streamed_loss, streamed_nll
from lm_softmax.kernels.table_draws import draw_from_table
from lm_softmax.kernels.two_stage import draw_from_clusters, draw_from_mixture

__all__ = [
    "Clusters",
    "Draws",
    "Mixture",
    "Objective",
    "ProductCode",
    "Streamed",
    "Tail",
    "accumulation_dtype",
    "autocast_off",
    "cluster_loss",
    "cluster_nll",
    "code_logits",
    "code_rows",
    "draw_from_clusters",
    "draw_from_logits",
    "draw_from_mixture",
    "draw_from_table",
    "mixture_loss",
    "mixture_nll",
    "product_dtype",
    "streamed_loss",
    "streamed_nll",
    "warm_up",
]

warm_up()  # here once, so that no user of a kernel can forget it
