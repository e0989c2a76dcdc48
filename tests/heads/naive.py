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


def naive_low_rank(head, hidden):
    """log softmax(W (P h) + b) (Sainath et al. 2013, section 2)."""
    hidden = hidden.to(head.weight.dtype)
    logits = F.linear(F.linear(hidden, head.projection), head.weight, head.bias)
    return _log_softmax(logits, head.objective.softcap)


def naive_mixture(head, hidden):
    """log sum_k pi_k softmax(W h_k + b) (Yang et al. 2018, equation (5)), pi_k of h as well."""
    hidden = hidden.to(head.weight.dtype)
    log_prior = _log_softmax(F.linear(hidden, head.prior), None)
    projections = head.projection.chunk(head.num_experts)
    biases = head.projection_bias.chunk(head.num_experts)
    of_experts = []
    for k in range(head.num_experts):
        expert = torch.tanh(F.linear(hidden, projections[k], biases[k]))
        logits = F.linear(expert, head.weight, head.bias)
        of_experts.append(log_prior[..., k, None] + _log_softmax(logits, head.objective.softcap))
    return torch.stack(of_experts).logsumexp(0)


def naive_sampled(head, hidden, target):
    """-log of the target's share in itself and the negatives of the other strata (SampledSoftmax).

    With replacement, or one negative, those that differ from it instead.
    """
    ids, (expected, included) = head.noise.draw(), _occurrences(head.noise)
    logits = _all_logits(head, hidden)
    of_target = logits.gather(-1, target.unsqueeze(-1)) - included[target].log().unsqueeze(-1)
    of_negatives = logits[..., ids] - expected[ids].log()
    kind = torch.arange(head.vocab_size)
    if head.noise.borders is not None and len(ids) > 1:
        kind = _strata_of_words(head.noise)
    of_negatives = of_negatives.masked_fill(kind[ids] == kind[target].unsqueeze(-1), -torch.inf)
    losses = torch.cat([of_target, of_negatives], -1).logsumexp(-1) - of_target.squeeze(-1)
    return losses.to(logits.dtype)


def naive_nce(head, hidden, target):
    """-log of how surely the target is told from noise, and noise from targets (NCE)."""
    ids, (expected, _) = head.noise.draw(), _occurrences(head.noise)
    logits, correction = _all_logits(head, hidden), expected.log() + head.log_partition
    if not head.corrected:
        correction = 0 * expected
    of_target = logits.gather(-1, target.unsqueeze(-1)).squeeze(-1) - correction[target]
    of_negatives = logits[..., ids] - correction[ids]
    losses = F.softplus(-of_target, threshold=500) + F.softplus(of_negatives, threshold=500).sum(-1)
    return losses.to(logits.dtype)


def _occurrences(noise):
    """Expected number of draws of each word, and the probability that it is drawn at all."""
    masses = noise.cumulative.diff().double() / 2**62
    if noise.borders is None:
        missed = (1 - masses) ** noise.num_samples
        return masses * noise.num_samples, 1 - missed
    strata = masses.split(noise.borders.diff().tolist())
    shares = _by_word(noise, torch.cat([stratum / stratum.sum() for stratum in strata]))
    return shares, shares


def _strata_of_words(noise):
    sizes = noise.borders.diff()
    return _by_word(noise, torch.arange(len(sizes)).repeat_interleave(sizes))


def _by_word(noise, values):
    """Values in the order of the noise's words, in the order of ids."""
    if noise.order is None:
        return values
    result = values.clone()
    for word, value in zip(noise.order.tolist(), values, strict=True):
        result[word] = value
    return result


def _all_logits(head, hidden):
    logits = F.linear(hidden.to(head.weight.dtype), head.weight, head.bias)
    logits, softcap = (
        logits.to(torch.promote_types(logits.dtype, torch.float32)),
        head.objective.softcap,
    )
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def naive_tree(head, hidden):
    """The log-sigmoids of all decisions from the root down, word by word (Mikolov et al. 2013)."""
    logits = F.linear(hidden.to(head.weight.dtype), head.weight, head.bias)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    children, columns = head.tree.tolist(), [None] * head.vocab_size
    waiting = [(head.vocab_size if children else 0, torch.zeros_like(hidden[..., 0]).to(logits))]
    while waiting:
        entry, reached = waiting.pop()
        if entry < head.vocab_size:
            columns[entry] = reached
            continue
        logit = logits[..., entry - head.vocab_size]
        left, right = children[entry - head.vocab_size]
        waiting.append((left, reached + F.logsigmoid(logit)))
        waiting.append((right, reached + F.logsigmoid(-logit)))
    return torch.stack(columns, -1)


def naive_classes(head, hidden):
    """log p(c) + log p(w | c), both a softmax over hidden (Goodman 2001)."""
    hidden, starts = hidden.to(head.weight.dtype), [0, *head.cutoffs, head.vocab_size]
    of_classes = _log_softmax(F.linear(hidden, head.class_weight, head.class_bias), None)
    columns = []
    for i in range(len(starts) - 1):
        words = slice(starts[i], starts[i + 1])
        bias = None if head.bias is None else head.bias[words]
        of_words = _log_softmax(F.linear(hidden, head.weight[words], bias), None)
        columns.append(of_classes[..., i, None] + of_words)
    return torch.cat(columns, -1)


def naive_product_quantized(head, hidden):
    """log softmax(W h + b), each factor of W indexed out of its codebooks (Jegou et al. 2011)."""
    hidden = hidden.to(head.factors[0].centroids.dtype)
    for factor in head.factors:
        bias = head.bias if factor is head.factors[-1] else None
        books = enumerate(factor.centroids)
        rows = torch.cat([book[factor.codes[:, m].long()] for m, book in books], 1)
        if factor.latent is not None:
            rows = rows + (factor.latent - factor.latent.detach())
        hidden = F.linear(hidden, rows, bias)
    return _log_softmax(hidden, head.objective.softcap)


def _log_softmax(logits, softcap):
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return logits - logits.logsumexp(-1, keepdim=True)
