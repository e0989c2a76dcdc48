"""Token embeddings: one width for all words, or less of it for rare ones."""

from collections.abc import Sequence
from typing import Any, Literal, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from lm_softmax.encoders.base import check_size
from lm_softmax.heads.cutoffs import resolve_clusters
from lm_softmax.kernels.workspace import reads_are_cheap


class WordEmbedding(nn.Embedding):
    """`nn.Embedding` of one row a word, drawn from N(0, 1 / embedding_size).

    Rows of unit length on average make a good start as output weights too: with a hidden vector
    of unit variance the logits have unit variance.

    Args:
        vocab_size: Number of words.
        embedding_size: Width of a row.
        counts: Not needed here; every embedding is built from the same three arguments.
        sparse: Whether the gradient is a sparse tensor of the rows that were looked up. A training
            step then costs the same at any `vocab_size`, with an optimizer that takes such
            gradients, as `torch.optim.Adagrad` does.

    Raises:
        ValueError: If a size is below 1.
    """

    def __init__(
        self,
        vocab_size: int,
        embedding_size: int,
        counts: Tensor | None = None,
        *,
        sparse: bool = False,
    ) -> None:
        check_size(vocab_size=vocab_size, embedding_size=embedding_size)
        super().__init__(vocab_size, embedding_size, sparse=sparse)

    def reset_parameters(self) -> None:
        """Draw every row anew."""
        nn.init.normal_(self.weight, std=self.embedding_dim**-0.5)

    def forward(self, tokens: Int[Tensor, "*shape"]) -> Float[Tensor, "*shape embedding"]:
        """Embeddings of ids of any shape; an id outside `[0, vocab_size)` is an `IndexError`."""
        return look_up(self.weight, tokens, sparse=self.sparse)


class AdaptiveEmbedding(nn.Module):
    """Word embedding whose width falls with the frequency of the word.

    Equals a lookup in the table whose rows `cutoffs[i]` to `cutoffs[i + 1]` are
    `tail_weights[i] @ projections[i]`, and whose rows before `cutoffs[0]` are `weight`; the table
    itself is never made. Shapes are those of `AdaptiveSoftmax`, so that the two can share them.

    On a CPU each cluster looks up its own tokens. Elsewhere, and compiled, traced, transformed or
    dealt to several processes, it looks up every token, those of other clusters as a row that is
    masked to zero: shapes then depend on `tokens.shape` alone, without host synchronisation or
    graph break, and the projections of `N` tokens cost `N * embedding_size * sum(tail_sizes)`
    multiplications. Either way each parameter gets a (zero) gradient from a batch without its
    words.

    Entries of a table start from N(0, 1 / its width) as in fairseq, those of a projection from
    N(0, 1 / embedding_size): every embedding then has unit length on average, in each cluster.

    Args:
        vocab_size: Number of words, ranked by frequency.
        embedding_size: Width of an embedding.
        counts: Training-set frequency of each word by rank, `(vocab_size,)`, for `"auto"`.
        cutoffs: Ids at which tail clusters begin, increasing inside `(0, vocab_size)`, or "auto":
            those of an `AdaptiveSoftmax` of this width with the same other options.
        div_value: Tail i, from 1, is `embedding_size // div_value**i` wide; unless it is said, 2
            with "auto" and 4 with cutoffs that are given.
        min_tail_size: No tail is narrower.
        tail_sizes: The widths themselves, one for each tail, instead of `div_value` and
            `min_tail_size`.
        cost_model: The device that "auto" predicts the time for, "cpu" or "cuda".
        sparse: Whether the gradients of the tables are sparse tensors, see `WordEmbedding`; those
            of the projections are dense. Where each table looks up every token, the tokens of other
            clusters add zeros to its first row, which Adagrad and SGD do not notice; SparseAdam
            takes that row for touched in every step.

    Raises:
        ValueError: If cutoffs or widths are impossible.

    Source:
        Baevski and Auli, "Adaptive Input Representations for Neural Language Modeling", ICLR 2019,
        arXiv:1809.10853, section 3.
    """

    def __init__(
        self,
        vocab_size: int,
        embedding_size: int,
        counts: Tensor | None = None,
        *,
        cutoffs: Literal["auto"] | Sequence[int] = "auto",
        div_value: float | None = None,
        min_tail_size: int = 16,
        tail_sizes: Sequence[int] | None = None,
        cost_model: Literal["cpu", "cuda"] = "cpu",
        sparse: bool = False,
    ) -> None:
        super().__init__()
        check_size(vocab_size=vocab_size, embedding_size=embedding_size)
        self.sparse = sparse
        self.num_embeddings, self.embedding_size = vocab_size, embedding_size
        self.cutoffs, self.tail_sizes = resolve_clusters(
            cutoffs,
            embedding_size,
            vocab_size,
            counts,
            div_value=div_value,
            min_tail_size=min_tail_size,
            tail_sizes=tail_sizes,
            cost_model=cost_model,
        )

        begins = [*self.cutoffs, vocab_size]
        self.weight = nn.Parameter(torch.empty(begins[0], embedding_size))
        self.tail_weights = nn.ParameterList(
            torch.empty(end - begin, size)
            for begin, end, size in zip(begins, begins[1:], self.tail_sizes, strict=False)
        )
        self.projections = nn.ParameterList(
            torch.empty(size, embedding_size) for size in self.tail_sizes
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw every parameter anew."""
        for table in (self.weight, *self.tail_weights):
            nn.init.normal_(table, std=table.shape[1] ** -0.5)
        for projection in self.projections:
            nn.init.normal_(projection, std=self.embedding_size**-0.5)

    def forward(self, tokens: Int[Tensor, "*shape"]) -> Float[Tensor, "*shape embedding"]:
        """Embeddings of ids of any shape; an id outside `[0, vocab_size)` is an `IndexError`."""
        if not self.cutoffs:
            return look_up(self.weight, tokens, sparse=self.sparse)
        if reads_are_cheap(tokens) and not (_is_traced(tokens) or _is_dealt(self.weight)):
            return self._of_sorted_tokens(tokens)
        rows = []
        for table, begin, end in zip(
            self.tail_weights, self.cutoffs, [*self.cutoffs[1:], None], strict=True
        ):
            inside = tokens >= begin
            if end is not None:  # ids past the vocabulary stay in the last tail, which refuses them
                inside &= tokens < end
            rows.append(self._masked_rows(table, tokens - begin, inside))
        projected = torch.cat(rows, -1) @ torch.cat([_own(part) for part in self.projections])
        return self._masked_rows(self.weight, tokens, tokens < self.cutoffs[0]) + projected

    def _of_sorted_tokens(self, tokens: Tensor) -> Tensor:
        flat = tokens.flatten().contiguous()
        begins = torch.tensor([0, *self.cutoffs], device=tokens.device)
        cluster, order = torch.bucketize(flat, begins[1:], right=True).sort(stable=True)
        rows = flat[order] - begins[cluster]
        sizes = torch.bincount(cluster, minlength=len(begins)).tolist()
        frequent, *rest = rows.split_with_sizes(sizes)
        found = [look_up(self.weight, frequent, sparse=self.sparse)]
        for table, projection, own in zip(self.tail_weights, self.projections, rest, strict=True):
            found.append(look_up(table, own, sparse=self.sparse) @ projection)
        sorted_rows = torch.cat(found)
        out = sorted_rows.new_empty(sorted_rows.shape).index_copy(0, order, sorted_rows)
        return out.view(*tokens.shape, self.embedding_size)

    def _masked_rows(self, table: Tensor, rows: Tensor, inside: Tensor) -> Tensor:
        """`table[rows]` where `inside`, and zeros elsewhere."""
        found = look_up(table, torch.where(inside, rows, 0), sparse=self.sparse)
        return torch.where(inside.unsqueeze(-1), found, 0.0)

    def sparse_parameters(self) -> list[nn.Parameter]:
        """Parameters whose gradients are sparse tensors."""
        return [self.weight, *self.tail_weights] if self.sparse else []

    def structure(self) -> dict[str, Any]:
        """Keyword arguments that pin the clusters, whatever rule "auto" follows later."""
        return {"cutoffs": list(self.cutoffs), "tail_sizes": list(self.tail_sizes)}

    def extra_repr(self) -> str:
        """Sizes, for `print`."""
        return (
            f"{self.num_embeddings}, {self.embedding_size}, cutoffs={self.cutoffs},"
            f" tail_sizes={self.tail_sizes}{', sparse=True' if self.sparse else ''}"
        )


def look_up(table: Tensor, rows: Tensor, *, sparse: bool = False) -> Tensor:
    """`F.embedding(rows, table)`, also of a table whose rows are dealt to several processes.

    Those all look up the same rows, and each adds the ones that it holds.
    """
    if not _is_dealt(table):
        return nn.functional.embedding(rows, table, sparse=sparse)
    from torch.distributed.tensor import DTensor, Partial, Replicate

    placed, own = cast(DTensor, table), _own(table)
    if rows.is_cpu and ((rows < 0) | (rows >= len(table))).any():
        raise IndexError(f"ids must be in [0, {len(table)})")
    most = -(-len(table) // placed.device_mesh.size())
    place = rows - placed.device_mesh.get_local_rank() * most
    inside = (place >= 0) & (place < len(own))
    padded = own if len(own) else torch.cat([own, own.new_zeros(1, own.shape[1])])
    found = nn.functional.embedding(torch.where(inside, place, 0), padded)
    found = torch.where(inside.unsqueeze(-1), found, 0.0)
    shared = DTensor.from_local(found, placed.device_mesh, [Partial()], run_check=False)
    return cast(Any, shared).full_tensor(grad_placements=[Replicate()])


def _is_traced(tokens: Tensor) -> bool:
    """Whether a compiler, a tracer or a transform follows the operations: values mean nothing."""
    return (
        torch.compiler.is_compiling()
        or torch._C._get_tracing_state() is not None
        or torch._C._are_functorch_transforms_active()
        or torch._C._len_torch_dispatch_stack() > 0
        or type(tokens) is not Tensor
    )


def _is_dealt(table: Tensor) -> bool:
    return hasattr(table, "device_mesh")  # a DTensor, which not every build of torch has


def _own(table: Tensor) -> Tensor:
    """What this process holds of a parameter."""
    return cast(Any, table).to_local() if _is_dealt(table) else table
