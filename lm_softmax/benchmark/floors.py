"""The matrix products alone, into buffers allocated before: what a head cannot be faster than."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from lm_softmax.benchmark.contestants import Contestant, Entry
from lm_softmax.benchmark.peers import structure_name
from lm_softmax.heads import AdaptiveSoftmax, FullSoftmax, OutputHead
from lm_softmax.specs import Spec

MOST_LOGITS = 2**32  # bytes of logits that are held at once


class Product:
    """`logits = inputs @ weight.t()` and the two products of its gradients.

    Args:
        inputs: `(n, width)`.
        weight: `(words, width)`.
        logits: Buffer for logits, and then taken for their gradients, any number of elements; the
            rows that fit are one chunk.
    """

    def __init__(self, inputs: Tensor, weight: Tensor, logits: Tensor) -> None:
        self.inputs, self.weight = inputs, weight
        row_bytes = weight.shape[0] * logits.element_size()
        self.parts = [
            (part, logits[: (part.stop - part.start) * weight.shape[0]].view(-1, weight.shape[0]))
            for part in _chunks(inputs.shape[0], row_bytes, logits.nbytes)
        ]
        self.of_inputs, self.of_weight = torch.empty_like(inputs), torch.empty_like(weight)

    def forward(self) -> None:
        """The logits."""
        for part, logits in self.parts:
            torch.mm(self.inputs[part], self.weight.t(), out=logits)

    def forward_backward(self) -> None:
        """The logits, then the gradients of inputs and weight."""
        for i, (part, logits) in enumerate(self.parts):
            torch.mm(self.inputs[part], self.weight.t(), out=logits)
            torch.mm(logits, self.weight, out=self.of_inputs[part])
            if i == 0:
                torch.mm(logits.t(), self.inputs[part], out=self.of_weight)
            else:
                torch.addmm(self.of_weight, logits.t(), self.inputs[part], out=self.of_weight)


class Floor(Contestant):
    """The products of a full or an adaptive head for the targets at hand, sorted by cluster.

    Without biases, softmax, sort and copies of hidden vectors; the buffers are there before.

    Args:
        head: Whose matrices are multiplied.
        hidden: Hidden vectors.
        target: Targets, which decide how many tokens each tail has.
    """

    def __init__(self, head: FullSoftmax | AdaptiveSoftmax, hidden: Tensor, target: Tensor) -> None:
        clusters = head.clusters()
        hidden = hidden.detach()
        weight = clusters.weight.detach()
        if clusters.cluster_weight is not None:
            weight = torch.cat([weight, clusters.cluster_weight.detach()])
        tails = [
            (tail.projection.detach(), tail.weight.detach())
            for tail in clusters.tails
            if tail.projection is not None  # as those of an adaptive head are
        ]
        borders = torch.tensor(getattr(head, "cutoffs", []), dtype=target.dtype)
        cluster = torch.bucketize(target.cpu(), borders, right=True)
        order = cluster.sort(stable=True).indices
        hidden = hidden[order.to(hidden.device)]
        sizes = torch.bincount(cluster, minlength=len(tails) + 1).tolist()
        most = max(
            sum(sizes) * weight.shape[0],
            *(size * rows.shape[0] for size, (_, rows) in zip(sizes[1:], tails, strict=True)),
            1,
        )
        widest = max(weight.shape[0], *(rows.shape[0] for _, rows in tails), 1)
        logits = hidden.new_empty(max(min(most, MOST_LOGITS // hidden.element_size()), widest))
        self.short_list = Product(hidden, weight, logits)
        self.tails: list[tuple[Product, Product]] = []
        start = sizes[0]
        for size, (projection, rows) in zip(sizes[1:], tails, strict=True):
            projected = hidden.new_empty(size, projection.shape[0])
            inner = Product(hidden[start : start + size], projection, projected.view(-1))
            if size:
                self.tails.append((inner, Product(projected, rows, logits)))
            start += size

    def forward(self) -> None:
        """The products of the forward pass."""
        self.short_list.forward()
        for inner, outer in self.tails:
            inner.forward()
            outer.forward()

    def forward_backward(self) -> None:
        """The products of the forward pass and of the gradients."""
        self.short_list.forward_backward()
        for inner, outer in self.tails:
            inner.forward()
            outer.forward_backward()
            torch.mm(outer.of_inputs, inner.weight, out=inner.of_inputs)
            torch.mm(outer.of_inputs.t(), inner.inputs, out=inner.of_weight)


def floor_entry(
    outline: OutputHead, group: str, spec: Spec, weights: Callable[[], OutputHead]
) -> Entry:
    """The floor of a full or an adaptive head.

    Args:
        outline: A head with the same clusters.
        group: Whose floor it is.
        spec: Of that head.
        weights: Makes the head.
    """
    has_tails = bool(getattr(outline, "cutoffs", []))
    name = f"products alone {structure_name(spec)}" if has_tails else "products alone, full"
    what = "torch.mm of the same sizes into buffers allocated before"
    return Entry(name, "floor", group, what, spec, weights, _make)


def _make(head: OutputHead, inputs: tuple[Tensor, Tensor]) -> Contestant:
    assert isinstance(head, FullSoftmax | AdaptiveSoftmax)
    return Floor(head, *inputs)


def _chunks(num_rows: int, row_bytes: int, most_bytes: int) -> Iterator[slice]:
    """Slices of rows that together take at most so many bytes each."""
    size = max(1, most_bytes // max(row_bytes, 1))
    for start in range(0, num_rows, size):
        yield slice(start, min(start + size, num_rows))
