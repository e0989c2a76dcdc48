"""Approximate top k: a preview of all logits in few dimensions, the best of them in all."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from lm_softmax.heads.base import OutputHead, TopK, is_size
from lm_softmax.heads.clustered import output_rows
from lm_softmax.heads.singular import ROWS, right_singular
from lm_softmax.kernels import accumulation_dtype, autocast_off

CHUNK_BYTES = 2**26  # of logits, or of rows to rescore, that are held at once


class SVDPreview(nn.Module):
    """Approximate `topk` of a trained full softmax: SVD-softmax. Not a head: it has no loss.

    With the singular value decomposition `W = U S V.t()` of the output rows, `B = U S` and
    `h = V.t() @ hidden`, of which the first dimensions say most:

        preview = B[:, :window] @ h[:window] + bias
        best = preview.topk(num_rescored).indices
        logits = preview.scatter(0, best, B[best] @ h + bias[best])
        log_probs, found = log_softmax(logits)[best].topk(k)

    A word of the true top k is missed where its preview is not among the `num_rescored` best, and
    all log-probabilities lean on the normaliser, most of whose terms are previews. With a window of
    `hidden_size` all is exact. `agreement` measures the rest. Arithmetic falls from
    `vocab_size * hidden_size` to `vocab_size * window + num_rescored * (hidden_size - window)` a
    position, memory does not: `B` has the size of `W`.

    The matrices are copies, of at least float32: train the head, then make this.

    Source: Shim et al. 2017, "SVD-Softmax: Fast Softmax Approximation on Large Vocabulary Neural
    Networks", section 3.

    Args:
        head: A trained head with one row a word over `hidden` itself: `FullSoftmax`,
            `SampledSoftmax` or `NCE`.
        window: Dimensions of the preview; None is an eighth of `hidden_size`.
        num_rescored: Words whose logits are exact, and the largest k; None is a hundredth of the
            vocabulary.

    Raises:
        ValueError: If it is another head, its rows are not finite, or a number is out of range.
    """

    rotation: Tensor
    preview_rows: Tensor
    other_rows: Tensor
    bias: Tensor | None

    @torch.no_grad()
    def __init__(
        self, head: OutputHead, *, window: int | None = None, num_rescored: int | None = None
    ) -> None:
        super().__init__()
        rows, bias = output_rows(head)
        window = max(head.hidden_size // 8, 1) if window is None else window
        num_rescored = max(len(rows) // 100, 1) if num_rescored is None else num_rescored
        given = ("window", window, head.hidden_size), ("num_rescored", num_rescored, len(rows))
        for name, number, most in given:
            if not (is_size(number) and number <= most):
                raise ValueError(f"{name} must be in [1, {most}], got {number}")
        self.hidden_size, self.vocab_size = head.hidden_size, head.vocab_size
        self.window, self.num_rescored = window, num_rescored
        self.softcap: float | None = head.objective.softcap  # type: ignore[assignment, union-attr]
        _, vectors = right_singular(rows)
        dtype = accumulation_dtype(rows.dtype)
        rotated = rows.new_empty(rows.shape, dtype=dtype)
        for own, part in zip(torch.split(rotated, ROWS), torch.split(rows, ROWS), strict=True):
            own.copy_(part.to(vectors) @ vectors.t())
        self.register_buffer("rotation", vectors.to(rotated))
        self.register_buffer("preview_rows", rotated[:, :window].contiguous())
        self.register_buffer("other_rows", rotated[:, window:].contiguous())
        self.register_buffer("bias", None if bias is None else bias.detach().to(dtype, copy=True))

    @torch.no_grad()
    def topk(self, hidden: Float[Tensor, "*batch hidden"], k: int) -> TopK:
        """The most probable words of each position and their log-probabilities, approximately.

        Args:
            hidden: `(*batch, hidden_size)`.
            k: At most `num_rescored`.

        Raises:
            ValueError: If `k` is not in `[1, num_rescored]`, or `hidden` does not fit.
        """
        if not (is_size(k) and k <= self.num_rescored):
            raise ValueError(f"k must be in [1, num_rescored={self.num_rescored}], got {k}")
        if hidden.dim() < 1 or hidden.shape[-1] != self.hidden_size:
            raise ValueError(
                f"hidden must be (*batch, {self.hidden_size}), got {tuple(hidden.shape)}"
            )
        if not hidden.is_floating_point():
            raise ValueError(f"hidden must be floating point, got {hidden.dtype}")
        dtype = torch.promote_types(hidden.dtype, self.rotation.dtype)
        rows = hidden.reshape(-1, self.hidden_size).to(dtype)
        width = max(self.vocab_size, self.num_rescored * self.other_rows.shape[1])
        num = max(1, CHUNK_BYTES // (width * dtype.itemsize))
        with autocast_off(rows):
            found = [self._topk(part, k) for part in torch.split(rows, num)]
        shape = (*hidden.shape[:-1], k)
        return TopK(*(torch.cat(parts).view(shape) for parts in zip(*found, strict=True)))

    def _topk(self, rows: Tensor, k: int) -> TopK:
        inputs = F.linear(rows, self.rotation.to(rows.dtype))
        preview, others = inputs.tensor_split([self.window], 1)
        raw = F.linear(preview, self.preview_rows.to(rows.dtype), self._bias(rows.dtype))
        ids = raw.topk(self.num_rescored, sorted=False).indices.sort().values
        exact = raw.gather(1, ids)
        if self.other_rows.shape[1]:
            looked_up = F.embedding(ids, self.other_rows).to(rows.dtype)
            exact = exact + torch.bmm(looked_up, others.unsqueeze(2)).squeeze(2)
        logits = raw.scatter_(1, ids, exact)
        if self.softcap is not None:
            logits = self.softcap * torch.tanh(logits / self.softcap)
        log_probs = logits.gather(1, ids) - logits.logsumexp(1, keepdim=True)
        # stable over sorted ids: equal ones by lower id
        values, places = log_probs.sort(stable=True, dim=1, descending=True)
        return TopK(values[:, :k], ids.gather(1, places[:, :k]))

    def _bias(self, dtype: torch.dtype) -> Tensor | None:
        return None if self.bias is None else self.bias.to(dtype)

    def extra_repr(self) -> str:
        """Sizes, for `print(preview)`."""
        return (
            f"hidden_size={self.hidden_size}, vocab_size={self.vocab_size},"
            f" window={self.window}, num_rescored={self.num_rescored}"
        )


class Agreement(NamedTuple):
    """How far one top k agrees with another, in [0, 1]."""

    top_1: float  # share of positions with the same best word
    top_k: float  # share of the exact k best words that are among the other's, in any order


def agreement(exact: TopK, approximate: TopK) -> Agreement:
    """Compares the top k of the same positions, of an approximation or a compressed head.

    Args:
        exact: What is right.
        approximate: Of the same shape.

    Raises:
        ValueError: If shapes differ or there is no position.
    """
    ours, theirs = exact.indices, approximate.indices
    if ours.shape != theirs.shape or not ours.numel():
        shapes = f"{tuple(ours.shape)} and {tuple(theirs.shape)}"
        raise ValueError(f"agreement takes two top k of the same positions, got {shapes}")
    shared = (ours.unsqueeze(-1) == theirs.unsqueeze(-2)).any(-1)
    same = ours[..., 0] == theirs[..., 0]
    return Agreement(same.double().mean().item(), shared.double().mean().item())
