"""Each head once more, as its equation reads, sharing no code with it.

Plain `F.linear` and `log_softmax` over whole matrices; of the parameters' dtype but for the
log-softmax, which is taken in at least float32. Autocast applies as it does to such code.
"""

import torch
import torch.nn.functional as F


def naive_full(head, hidden):
    """log softmax(W h + b)."""
    logits = F.linear(hidden.to(head.weight.dtype), head.weight, head.bias)
    return _log_softmax(logits, head.objective.softcap)


def naive_adaptive(head, hidden):
    """log p(w) = log p(c) + log p(w | c), c the cluster of w (Grave et al. 2017, section 4)."""
    hidden, softcap = hidden.to(head.weight.dtype), head.objective.softcap
    if not head.cutoffs:
        return naive_full(head, hidden)
    head_matrix = torch.cat([head.weight, head.cluster_weight])
    of_head = _log_softmax(F.linear(hidden, head_matrix, head.bias), softcap)
    columns = [of_head[..., : head.cutoffs[0]]]
    for i in range(len(head.cutoffs)):
        bias = None if head.tail_biases is None else head.tail_biases[i]
        logits = F.linear(F.linear(hidden, head.projections[i]), head.tail_weights[i], bias)
        of_cluster = of_head[..., head.cutoffs[0] + i, None]
        columns.append(of_cluster + _log_softmax(logits, softcap))
    return torch.cat(columns, -1)


def _log_softmax(logits, softcap):
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return logits - logits.logsumexp(-1, keepdim=True)
