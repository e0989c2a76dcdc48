"""The most probable words of a mixture of softmaxes, its log-probabilities never held all at once.

One pass over the words keeps of each expert its normaliser and its largest logit of each block of
words. For any block, with `u_k = log_prior_k + (largest logit of expert k) - lse_k`,

    max_k u_k  <=  the largest log-probability of the block  <=  logsumexp_k u_k

so a block whose upper bound is below the k-th largest lower bound holds none of the k best words.
Few are left, and only their words are mixed.
"""

import torch
from torch import Tensor

from lm_softmax.kernels.dense import Matrix, accumulation_dtype, autocast_off, dense_logits
from lm_softmax.kernels.dense_search import Normaliser, chunk_words, normaliser
from lm_softmax.kernels.mixture import Mixture
from lm_softmax.kernels.ranking import BLOCK, block_maxima, wide_topk

MIXED_ROWS = 256  # of all experts, that share a chunk of words
FEW = 8  # a token with more than this part of all blocks left is given up
SLACK = 32  # rounding errors of bounds, in units in the last place of the largest logit


def mixture_topk(
    inputs: Tensor, mixture: Mixture, k: int, softcap: float | None
) -> tuple[Tensor, Tensor, Tensor]:
    """The `k` highest log-probabilities of each token, equal ones by lower id, and their words.

    Args:
        inputs: `(N, K, width)`, in the dtype of the products.
        mixture: Log-priors, and the output rows that the experts share.
        k: Number of words.
        softcap: Of the logits of each expert.

    Returns:
        Log-probabilities `(N, k)` and ids `(N, k)`, and which tokens `(N,)` were given up, since
        bounds left them too many words or they met nan.
    """
    num, num_experts, _ = inputs.shape
    dtype = accumulation_dtype(inputs.dtype)
    values = inputs.new_zeros(num, k, dtype=dtype)
    ids = torch.zeros(num, k, dtype=torch.int64, device=inputs.device)
    failed = torch.ones(num, dtype=torch.bool, device=inputs.device)
    size = max(1, MIXED_ROWS // num_experts)
    with autocast_off(inputs):
        for start in range(0, num, size):
            part = inputs[start : start + size]
            prior = mixture.log_prior[start : start + size].unsqueeze(2)
            kept, lse = _blocks_left(part, prior, mixture, k, softcap)
            few = (kept.sum(1) * FEW <= kept.shape[1]).nonzero().squeeze(1).tolist()
            for token in few:
                own = Normaliser(*(of_rows.view(-1, num_experts)[token] for of_rows in lse))
                words = _words(kept[token], mixture.weight.shape[0])
                bias = None if mixture.bias is None else mixture.bias[words]
                matrix = Matrix([mixture.weight.index_select(0, words)], bias)
                logits = dense_logits(part[token], matrix, softcap)
                mixed = (prior[token] + own.subtracted_from(logits)).logsumexp(0, keepdim=True)
                best, places = wide_topk(mixed, k)
                values[start + token], ids[start + token] = best[0], words[places[0]]
                failed[start + token] = False
    return values, ids, failed


def _blocks_left(
    part: Tensor, prior: Tensor, mixture: Mixture, k: int, softcap: float | None
) -> tuple[Tensor, Normaliser]:
    """Blocks of words of each token that may hold one of the best, and each expert's normaliser."""
    rows, num_words = part.flatten(0, 1), mixture.weight.shape[0]
    size = chunk_words(rows.shape[0], prior.dtype)
    found, lse = [], None
    for start in range(0, num_words, size):
        bias = None if mixture.bias is None else mixture.bias[start : start + size]
        matrix = Matrix([mixture.weight[start : start + size]], bias)
        logits = dense_logits(rows, matrix, softcap)
        found.append(block_maxima(logits))
        of_chunk = normaliser(logits, found[-1].amax(1))
        lse = of_chunk if lse is None else lse + of_chunk
    assert lse is not None  # there is a word
    maxima = torch.cat(found, 1)
    bounds = prior + lse.subtracted_from(maxima).view(*part.shape[:2], -1)
    if k >= bounds.shape[2]:
        return torch.ones_like(bounds[:, 0], dtype=torch.bool), lse
    largest = maxima.abs().amax(1).view(part.shape[:2]).amax(1, keepdim=True)
    slack = SLACK * torch.finfo(part.dtype).eps * (1 + largest)
    least = bounds.amax(1).topk(k, 1).values[:, -1:]
    return ~(bounds.logsumexp(1) < least - slack), lse  # nan is left


def _words(kept: Tensor, num_words: int) -> Tensor:
    """The words of some blocks."""
    blocks = kept.nonzero()
    words = (blocks * BLOCK + torch.arange(BLOCK, device=kept.device)).flatten()
    return words[words < num_words]
