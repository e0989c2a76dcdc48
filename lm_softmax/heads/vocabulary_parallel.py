"""A head whose words are dealt to several processes: every method is a collective of theirs."""

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

from lm_softmax.heads.base import ROW_CHUNK_BYTES, Search, TopK, is_size
from lm_softmax.heads.clustered import ClusteredHead, project
from lm_softmax.kernels import Clusters, Objective, accumulation_dtype, autocast_off, product_dtype
from lm_softmax.kernels.sharded import Share
from lm_softmax.kernels.sharded_operations import sharded_loss, sharded_nll


class VocabularyParallel(ClusteredHead):
    """What a head becomes in `shard_vocabulary`; everything in it is a collective of the group.

    All processes call the same methods with the same `hidden` and `target`, and get the same
    results and the whole gradient of `hidden`. `log_prob(hidden)` gathers the logits of all words,
    `(N, vocab_size)` in every process; nothing else does, but for `sample` with `top_p` alone, a
    chunk of rows at a time.
    """

    weight: nn.Parameter

    @property
    def mesh(self) -> DeviceMesh:
        """The processes that share the words."""
        weight = self.weight
        if not isinstance(weight, DTensor) or weight.device_mesh.ndim != 1:
            raise RuntimeError(
                "the rows of this head are sharded by FSDP too: call its methods through a module"
                " whose forward methods gather them"
            )
        return weight.device_mesh

    @property
    def sizes(self) -> list[int]:
        """Number of words of the short-list and of each tail, over all processes."""
        tails = getattr(self, "tail_weights", ())
        return [weight.shape[0] for weight in (self.weight, *tails)]

    def clusters(self) -> Clusters:
        """This process's rows, and what all processes hold."""
        whole = super().clusters()  # type: ignore[safe-super]
        return Clusters.unflatten([local(t) for t in whole.flatten()], whole.bias is not None)

    def _token_losses(self, rows: Tensor, target: Tensor, objective: Objective) -> Tensor:
        group = self.mesh.get_group()
        return sharded_nll(
            rows, target, self.clusters(), self.sizes, group, objective, self.ignore_index
        )

    def _summed_loss(self, rows: Tensor, target: Tensor, objective: Objective) -> Tensor:
        group = self.mesh.get_group()
        return sharded_loss(
            rows, target, self.clusters(), self.sizes, group, objective, self.ignore_index
        )

    def _all_log_probs(self, rows: Tensor) -> Tensor:
        """Gathers the logits, as a differentiable collective."""
        weight, cluster_weight, bias, tails = self.clusters()
        own_bias = bias if cluster_weight is None else None
        head = _gather(
            _logits(_copied(rows, self.mesh), weight, own_bias), self.mesh, self.sizes[0]
        )
        if cluster_weight is not None:
            head = torch.cat([head, _logits(rows, cluster_weight, None)], -1)
            head = head if bias is None else head + bias
        short_list, masses = self._normalised(head).tensor_split(self.sizes[:1], -1)
        parts = [short_list]
        for i, tail in enumerate(tails):
            assert tail.projection is not None
            narrow = _copied(project(rows, tail.projection), self.mesh)
            logits = _gather(_logits(narrow, tail.weight, tail.bias), self.mesh, self.sizes[i + 1])
            parts.append(masses[:, i : i + 1] + self._normalised(logits))
        return torch.cat(parts, -1)

    def _normalised(self, logits: Tensor) -> Tensor:
        return torch.log_softmax(_capped(logits, self.objective.softcap), -1)

    def tie_weight(self, embedding: nn.Module) -> None:
        """Comes too late: tied matrices are sharded together.

        Raises:
            ValueError: Always.
        """
        raise ValueError("the words of this head are dealt to processes already: tie it before")

    @torch.no_grad()
    def topk(self, hidden: Float[Tensor, "*batch hidden"], k: int) -> TopK:
        """See `OutputHead.topk`: the best of each process's own best words.

        Raises:
            ValueError: If `k` is not in `[1, vocab_size]`.
        """
        if not (is_size(k) and k <= self.vocab_size):
            raise ValueError(f"k must be in [1, vocab_size={self.vocab_size}], got {k}")
        ids = self._own_ids(hidden.device)
        found = [
            self._best_of_all(self._own_log_probs(part), ids, k)
            for part in self._own_chunks(self._flatten(hidden))
        ]
        shape = (*hidden.shape[:-1], k)
        values = torch.cat([chunk.log_probs for chunk in found]).view(shape)
        return TopK(values, torch.cat([chunk.indices for chunk in found]).view(shape))

    def search(self, hidden: Float[Tensor, "*batch hidden"], k: int) -> Search:
        """`topk(hidden, k)`, for which every position opens every cluster."""
        shape = (*hidden.shape[:-1], len(self.sizes) - 1)
        return Search(
            self.topk(hidden, k), torch.ones(shape, dtype=torch.bool, device=hidden.device)
        )

    @torch.no_grad()
    def sample(
        self,
        hidden: Float[Tensor, "*batch hidden"],
        num_samples: int = 1,
        *,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        generator: torch.Generator | None = None,
    ) -> Int[Tensor, "*batch num_samples"]:
        """See `OutputHead.sample`; the random numbers are those of the group's first process.

        Raises:
            ValueError: If an option is out of range, as there.
        """
        self._check_sampling(num_samples, temperature, top_k, top_p)
        if temperature == 0:
            best = self.topk(hidden, 1).indices
            return best.expand(*hidden.shape[:-1], num_samples).contiguous()
        ids, drawn = self._own_ids(hidden.device), []
        for part in self._own_chunks(self._flatten(hidden)):
            log_probs = self._own_log_probs(part).double()
            best = _largest(log_probs, self.mesh)  # subtracted lest a quotient overflow
            weights = torch.exp((log_probs - best) / temperature)
            weights = self._truncated(weights, ids, top_k, top_p)
            drawn.append(self._draw_ids(weights, ids, num_samples, generator))
        return torch.cat(drawn).view(*hidden.shape[:-1], num_samples)

    def _own_ids(self, device: torch.device) -> Tensor:
        """Ids of the words of this process, increasing."""
        ranges, begin = [], 0
        for size in self.sizes:
            share = Share.of(size, self.mesh.get_group())
            ranges.append(torch.arange(begin + share.start, begin + share.end, device=device))
            begin += size
        return torch.cat(ranges)

    def _own_chunks(self, rows: Tensor) -> tuple[Tensor, ...]:
        """Parts of the rows, the same in all processes; at least one part."""
        words = sum(Share.of(size, self.mesh.get_group()).most for size in self.sizes)
        itemsize = accumulation_dtype(rows.dtype).itemsize
        size = max(1, ROW_CHUNK_BYTES // (itemsize * words))
        return torch.split(rows, size) if rows.shape[0] else (rows,)

    def _own_log_probs(self, rows: Tensor) -> Tensor:
        """Log-probabilities of the words of this process, `(N, own words)`; no gradients."""
        weight, cluster_weight, bias, tails = self.clusters()
        softcap, share = self.objective.softcap, Share.of(self.sizes[0], self.mesh.get_group())
        own_bias, masses = bias, rows.new_empty(rows.shape[0], 0)
        if cluster_weight is not None:
            own_bias = None if bias is None else bias[share.start : share.end]
            cluster_bias = None if bias is None else bias[share.num_rows :]
            masses = _capped(_logits(rows, cluster_weight, cluster_bias), softcap)
        short_list = _capped(_logits(rows, weight, own_bias), softcap)
        both = torch.cat([short_list, masses.to(short_list.dtype)], -1)
        own = short_list if self.mesh.get_local_rank() else both  # the first has the clusters
        both = _log_softmax(own, both, self.mesh)
        short_list, masses = both.tensor_split([weight.shape[0]], -1)
        parts = [short_list]
        for i, tail in enumerate(tails):
            assert tail.projection is not None
            narrow = project(rows, tail.projection)
            logits = _capped(_logits(narrow, tail.weight, tail.bias), softcap)
            parts.append(masses[:, i : i + 1] + _log_softmax(logits, logits, self.mesh))
        return torch.cat(parts, -1)

    def _best_of_all(self, values: Tensor, ids: Tensor, k: int) -> TopK:
        """The k largest of all processes' `(N, own words)`, sorted; equal ones by lower id."""
        most = sum(Share.of(size, self.mesh.get_group()).most for size in self.sizes)
        own = min(k, most)  # candidates, as many from each process
        order = values.sort(stable=True, dim=-1, descending=True)
        missing = (0, max(own - values.shape[1], 0))
        candidates = F.pad(order.values[:, :own], missing, value=-torch.inf)
        of_candidates = F.pad(ids[order.indices[:, :own]], missing, value=self.vocab_size)
        total = own * self.mesh.size()
        candidates = _gather(candidates, self.mesh, total)
        of_candidates, by_id = _gather(of_candidates, self.mesh, total).sort(-1)
        best = candidates.gather(-1, by_id).sort(stable=True, dim=-1, descending=True)
        indices = of_candidates.gather(-1, best.indices)
        return TopK(best.values[:, :k], indices[:, :k])

    def _truncated(
        self, weights: Tensor, ids: Tensor, top_k: int | None, top_p: float | None
    ) -> Tensor:
        """Weights of own words cut to the top k, then to the nucleus of what is left."""
        top_p = None if top_p == 1 else top_p
        if top_p is None and top_k is None:
            return weights
        best = self._best_of_all(weights, ids, top_k or self.vocab_size)
        kept = torch.ones_like(best.indices, dtype=torch.bool)
        if top_p is not None:
            before = best.log_probs.cumsum(-1) - best.log_probs
            kept = before < top_p * best.log_probs.sum(-1, keepdim=True)
        last = kept.sum(-1, keepdim=True) - 1
        value, word = best.log_probs.gather(-1, last), best.indices.gather(-1, last)
        return weights.masked_fill((weights < value) | ((weights == value) & (ids > word)), 0)

    def _draw_ids(
        self, weights: Tensor, ids: Tensor, num_samples: int, generator: torch.Generator | None
    ) -> Tensor:
        """Ids drawn in proportion to the weights of all processes, the same in each."""
        mesh, sums = self.mesh, F.pad(weights.cumsum(-1), (1, 0))
        ends = _gather(sums[:, -1:].contiguous(), mesh, mesh.size()).cumsum(-1)
        if ends[:, -1].isnan().any():
            raise ValueError("hidden gives some position no distribution to draw from, but nan")
        shape = (weights.shape[0], num_samples)
        uniform = torch.rand(shape, generator=generator, dtype=weights.dtype, device=weights.device)
        dist.broadcast(uniform, group=mesh.get_group(), group_src=0)
        place = uniform * ends[:, -1:]
        owner = torch.searchsorted(ends, place, right=True)
        masses = torch.diff(ends, dim=-1, prepend=torch.zeros_like(ends[:, :1]))
        owner = torch.minimum(owner, _last_positive(masses))  # rounding may lead past it
        drawn = torch.zeros(shape, dtype=torch.int64, device=weights.device)
        if len(ids):
            rank = mesh.get_local_rank()
            begin = ends[:, rank : rank + 1] - masses[:, rank : rank + 1]
            place = torch.searchsorted(sums[:, 1:].contiguous(), place - begin, right=True)
            place = torch.minimum(place, _last_positive(weights))
            drawn = torch.where(owner == rank, ids[place], 0)
        dist.all_reduce(drawn, group=mesh.get_group())
        return drawn


def local(tensor: Tensor) -> Tensor:
    """What this process holds of a parameter."""
    assert isinstance(tensor, DTensor)
    return tensor.to_local()


def _copied(rows: Tensor, mesh: DeviceMesh) -> Tensor:
    """The same rows, whose gradients are summed over the processes."""
    shared: Any = DTensor.from_local(rows, mesh, [Replicate()], run_check=False)
    return shared.to_local(grad_placements=[Partial()])


def _gather(own: Tensor, mesh: DeviceMesh, num_columns: int) -> Tensor:
    """All columns of a matrix `(N, own columns)`, dealt as `torch.chunk` deals them."""
    shape = (own.shape[0], num_columns)
    whole: Any = DTensor.from_local(
        own, mesh, [Shard(1)], run_check=False, shape=torch.Size(shape), stride=(num_columns, 1)
    )
    return whole.full_tensor(grad_placements=[Replicate()])


def _logits(rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`F.linear(rows, weight, bias)` in at least float32, under autocast too."""
    dtype = product_dtype(rows, weight)
    with autocast_off(rows):
        logits = F.linear(rows.to(dtype), weight.to(dtype)).to(accumulation_dtype(dtype))
        return logits if bias is None else logits + bias


def _capped(logits: Tensor, softcap: float | None) -> Tensor:
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def _largest(own: Tensor, mesh: DeviceMesh) -> Tensor:
    """The largest value of each row, over all processes, `(N, 1)`."""
    largest = F.pad(own, (0, 1), value=-torch.inf).amax(-1, keepdim=True)
    dist.all_reduce(largest, dist.ReduceOp.MAX, group=mesh.get_group())
    return largest


def _log_softmax(own: Tensor, logits: Tensor, mesh: DeviceMesh) -> Tensor:
    """Log-probabilities of logits in the softmax over the `(N, own columns)` of all processes."""
    largest = _largest(own, mesh)
    total = (own - largest).exp_().sum(-1, keepdim=True)
    dist.all_reduce(total, group=mesh.get_group())
    return logits - largest - total.log_()


def _last_positive(weights: Tensor) -> Tensor:
    """Column of the last weight above 0 of each row, `(N, 1)`."""
    return (weights > 0).cumsum(-1).argmax(-1, keepdim=True)
