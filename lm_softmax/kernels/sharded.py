"""The loss of a clustered softmax whose words are dealt to several processes.

Each process holds a contiguous share of the rows of every matrix and computes the logits of its
words alone. Chunk by chunk the processes share the largest logit and the sum of exponentials of
each token, and at the end the gradients of what all of them hold. All processes of a group see the
same tokens (Shoeybi et al. 2019, "Megatron-LM", section 3, the loss of the output embedding).
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from lm_softmax.kernels.clusters import Clusters, Order, projected, sort_by_cluster
from lm_softmax.kernels.dense import (
    Gradients,
    Matrix,
    Objective,
    accumulation_dtype,
    add_gradients,
    chunk_logits,
    chunk_rows,
)
from lm_softmax.kernels.products import products_widen
from lm_softmax.kernels.workspace import reads_are_cheap, workspace


class Share(NamedTuple):
    """The rows `[start, end)` of a matrix that this process holds, as `torch.chunk` deals them."""

    start: int
    end: int
    num_rows: int  # of all processes
    most: int  # rows that a process holds

    @classmethod
    def of(cls, num_rows: int, group: dist.ProcessGroup) -> "Share":
        """Of a matrix of so many rows."""
        most = -(-num_rows // group.size())
        start = min(group.rank() * most, num_rows)
        return cls(start, min(start + most, num_rows), num_rows, most)


class Task(NamedTuple):
    """What all softmaxes of a loss have in common."""

    group: dist.ProcessGroup
    objective: Objective
    dtype: torch.dtype  # of the operands of the matrix products


class _Buffers(NamedTuple):
    """Where the gradients go, named as in `Clusters`; None where none is wanted."""

    hidden: Tensor | None
    weight: Tensor | None
    cluster_weight: Tensor | None
    bias: Tensor | None
    tails: list[tuple[Tensor | None, Tensor | None, Tensor | None]]

    @classmethod
    def of(cls, buffers: Sequence[Tensor | None], clusters: Clusters) -> "_Buffers":
        """Buffers in the order of hidden and `Clusters.flatten`, or no buffer at all."""
        rest = iter(buffers)
        hidden, weight = next(rest, None), next(rest, None)
        cluster_weight = None if clusters.cluster_weight is None else next(rest, None)
        bias = None if clusters.bias is None else next(rest, None)
        tails = [
            (next(rest, None), next(rest, None), None if tail.bias is None else next(rest, None))
            for tail in clusters.tails
        ]
        return cls(hidden, weight, cluster_weight, bias, tails)


def sharded_losses(
    hidden: Tensor,
    target: Tensor,
    scale: Tensor | None,
    clusters: Clusters,
    sizes: Sequence[int],
    ignore_index: int,
    task: Task,
    buffers: Sequence[Tensor | None] = (),
) -> Tensor:
    """`clustered_losses` by a group of processes, each with its share of the words.

    Args:
        hidden: `(N, width)`, the same in all processes.
        target: `(N,)`, the same in all processes.
        scale: `(N,)`, weight of each row in the gradients; None is one.
        clusters: This process's rows of `weight` and of each tail's `weight` and `bias`; without
            tails of `bias` too. All else is whole.
        sizes: Number of words of the short-list and of each tail, over all processes.
        ignore_index: Target of positions that count for nothing.
        task: The processes, the loss of a row, the dtype of the products.
        buffers: For the gradients of hidden and `clusters.flatten()`, whole where that is.
    """
    ignored, into = target == ignore_index, _Buffers.of(buffers, clusters)
    if clusters.tails or reads_are_cheap(target):
        order = sort_by_cluster(hidden, target, sizes, ignored)
        scale = None if scale is None else scale[order.tokens]
        losses = _sorted_losses(order, scale, clusters, sizes, task, into)
        losses = losses.new_zeros(target.shape).index_copy_(0, order.tokens, losses)
    else:  # no look at the targets: rows to ignore weigh nothing
        hidden = hidden.masked_fill(ignored.unsqueeze(1), 0)
        one = hidden.new_ones((), dtype=accumulation_dtype(task.dtype)) if scale is None else scale
        target = target.masked_fill(ignored, 0)
        scale = torch.where(ignored, 0, one)
        losses = _head_losses(hidden, target, scale, clusters, sizes[0], task, into)
        losses = losses.masked_fill(ignored, 0)
    of_bias = into.bias if clusters.tails else None
    for whole in (into.hidden, into.cluster_weight, of_bias, *(tail[0] for tail in into.tails)):
        if whole is not None:
            dist.all_reduce(whole, group=task.group)
    return losses


def _sorted_losses(
    order: Order,
    scale: Tensor | None,
    clusters: Clusters,
    sizes: Sequence[int],
    task: Task,
    into: _Buffers,
) -> Tensor:
    """Loss of the sorted tokens, and this process's share of their gradients."""
    of_hidden = None if into.hidden is None else into.hidden.new_empty(order.hidden.shape)
    losses = _head_losses(
        order.hidden, order.target, scale, clusters, sizes[0], task, into._replace(hidden=of_hidden)
    )
    for i, (tail, part) in enumerate(zip(clusters.tails, order.slices, strict=True)):
        of_projection, *of_rows = into.tails[i]
        inputs, share = order.hidden[part], Share.of(sizes[i + 1], task.group)
        narrow, of_narrow = projected(inputs, tail.projection, task.dtype), None
        if of_projection is not None or of_hidden is not None:
            of_narrow = losses.new_empty(narrow.shape)
        losses[part] += _softmax_pass(
            narrow,
            Matrix([tail.weight], tail.bias),
            _Columns.of(order.tail_targets[i], share),
            share,
            task,
            scale=None if scale is None else scale[part],
            gradients=Gradients(of_narrow, of_rows[:1], of_rows[1]),
        )
        if of_narrow is not None and of_projection is not None:
            torch.mm(of_narrow.t(), inputs.to(losses.dtype), out=of_projection)
        if of_narrow is not None and of_hidden is not None:
            assert tail.projection is not None
            of_hidden[part].addmm_(of_narrow, tail.projection.to(losses.dtype))
    if into.hidden is not None and of_hidden is not None:
        into.hidden.zero_().index_copy_(0, order.tokens, of_hidden)
    return losses


class _Columns(NamedTuple):
    """Where the targets are among the words that this process holds."""

    of_target: Tensor  # (N,); 0 where another process holds it
    owned: Tensor  # (N,), whether this one does

    @classmethod
    def of(cls, target: Tensor, share: Share, *, with_clusters: bool = False) -> "_Columns":
        """Of targets among the words, after which the words of the clusters come."""
        owned = (target >= share.start) & (target < share.end)
        column = target - share.start
        if with_clusters:
            is_cluster = target >= share.num_rows
            column = torch.where(is_cluster, target - share.num_rows + share.end, column)
            owned |= is_cluster
        return cls(torch.where(owned, column, 0), owned)


def _head_losses(
    hidden: Tensor,
    target: Tensor,
    scale: Tensor | None,
    clusters: Clusters,
    num_words: int,
    task: Task,
    into: _Buffers,
) -> Tensor:
    """The softmax over the short-list and the words of the clusters, which the first process has.

    With clusters `bias` is whole in every process: its rows are not dealt as those of `weight` are.
    """
    share, cluster_weight, bias = (
        Share.of(num_words, task.group),
        clusters.cluster_weight,
        clusters.bias,
    )
    first = task.group.rank() == 0
    blocks, of_blocks, of_bias = [clusters.weight], [into.weight], into.bias
    if cluster_weight is not None:
        if first:
            blocks.append(cluster_weight)
            of_blocks.append(into.cluster_weight)
        elif into.cluster_weight is not None:
            into.cluster_weight.zero_()
        if bias is not None:
            bias = _own_rows(bias, share, first=first)
            of_bias = None if of_bias is None else of_bias.new_zeros(bias.shape)
    losses = _softmax_pass(
        hidden,
        Matrix(blocks, bias),
        _Columns.of(target, share, with_clusters=first and cluster_weight is not None),
        share,
        task,
        scale=scale,
        gradients=Gradients(into.hidden, of_blocks, of_bias),
    )
    if cluster_weight is not None and into.bias is not None and of_bias is not None:
        words = share.end - share.start
        into.bias.zero_()[share.start : share.end] = of_bias[:words]
        if first:
            into.bias[num_words:] = of_bias[words:]
    return losses


def _own_rows(bias: Tensor, share: Share, *, first: bool) -> Tensor:
    own = bias[share.start : share.end]
    return torch.cat([own, bias[share.num_rows :]]) if first else own


def _softmax_pass(
    hidden: Tensor,
    matrix: Matrix,
    columns: _Columns,
    share: Share,
    task: Task,
    *,
    scale: Tensor | None,
    gradients: Gradients,
) -> Tensor:
    """`dense_pass` over the words of all processes; gradients are this process's share.

    The chunks are the same in all processes, whatever number of words each holds.
    """
    dtype = task.dtype
    total_dtype = accumulation_dtype(dtype)
    rounded = Matrix([block.to(dtype) for block in matrix.blocks], matrix.bias)
    gradient_dtype = dtype if products_widen(hidden) else total_dtype
    wanted = not gradients.none_wanted
    blocks = [block.to(gradient_dtype) for block in matrix.blocks] if wanted else []
    loss = torch.empty(hidden.shape[0], dtype=total_dtype, device=hidden.device)
    largest = None
    if scale is not None:
        scale = scale.to(total_dtype)
        if dtype == torch.float16 and scale.numel():  # a GradScaler's factor would overflow
            largest = scale.abs().amax().clamp(min=torch.finfo(total_dtype).tiny)
            scale = scale / largest
    rows = chunk_rows(hidden.shape[0], share.most, total_dtype, hidden)
    for start in range(0, hidden.shape[0], rows):
        part = slice(start, start + rows)
        inputs, own = hidden[part].to(dtype), _Columns(*(tensor[part] for tensor in columns))
        loss[part], derivative = _row_losses(inputs, rounded, own, share, task, wanted=wanted)
        if derivative is not None:
            if scale is not None:
                derivative.mul_(scale[part].unsqueeze(1))
            of_hidden = None if gradients.hidden is None else gradients.hidden[part]
            of_chunk = gradients._replace(hidden=of_hidden)
            add_gradients(derivative, inputs, blocks, of_chunk, keep=start > 0)
    for buffer in (gradients.hidden, *gradients.blocks, gradients.bias):
        if buffer is not None and hidden.shape[0] == 0:
            buffer.zero_()
        elif buffer is not None and largest is not None:
            buffer.mul_(largest)
    return loss


def _row_losses(
    inputs: Tensor, matrix: Matrix, columns: _Columns, share: Share, task: Task, *, wanted: bool
) -> tuple[Tensor, Tensor | None]:
    """Loss of each row, and its derivative by this process's logits in the work buffer."""
    softcap, smoothing, z_loss = task.objective
    dtype, shape = accumulation_dtype(inputs.dtype), (inputs.shape[0], matrix.num_rows)
    logits = chunk_logits(inputs, matrix, softcap, workspace("logits", shape, inputs, dtype))
    slope = None
    if softcap is not None and wanted:  # of tanh, 1 - tanh(a / softcap)**2
        slope = torch.div(logits, softcap, out=workspace("slope", shape, inputs, dtype))
        slope.square_().neg_().add_(1)
    largest = logits.new_full(shape[:1], -torch.inf) if shape[1] == 0 else logits.amax(1)
    dist.all_reduce(largest, dist.ReduceOp.MAX, group=task.group)
    logits.sub_(largest.unsqueeze(1))
    column = columns.of_target.unsqueeze(1)
    shares = logits.new_zeros(3, shape[0])  # of the sum of exponentials, of two kinds of logits
    if shape[1]:
        shares[1] = logits.gather(1, column).squeeze(1).masked_fill_(~columns.owned, 0)
        if smoothing:
            torch.sum(logits, 1, out=shares[2])
        torch.sum(logits.exp_(), 1, out=shares[0])
    dist.all_reduce(shares, group=task.group)
    exponentials, target_logit, logit_sum = shares
    log_total = exponentials.log()
    loss, lse = log_total - target_logit, largest + log_total
    if smoothing:
        mean_logit = logit_sum / share.num_rows
        loss = (1 - smoothing) * loss + smoothing * (log_total - mean_logit)
    if z_loss:
        loss = loss + z_loss * lse.square()
    if not wanted:
        return loss, None
    factor = (1 + 2 * z_loss * lse) / exponentials
    logits.mul_(factor.unsqueeze(1))
    if smoothing:
        logits.sub_(smoothing / share.num_rows)
    if shape[1]:
        of_target = logits.new_full(shape[:1], smoothing - 1).masked_fill_(~columns.owned, 0)
        logits.scatter_add_(1, column, of_target.unsqueeze(1))
    return loss, logits if slope is None else logits.mul_(slope)
