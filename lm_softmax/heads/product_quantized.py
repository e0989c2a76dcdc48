"""The full softmax with output rows made of shared centroids."""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lm_softmax.heads.base import TopK, is_size
from lm_softmax.heads.clustered import ClusteredHead, log_frequencies, output_rows, project
from lm_softmax.heads.exact import ExactHead
from lm_softmax.heads.quantize import check_kmeans, kmeans, truncated_svd
from lm_softmax.heads.quantized_matrix import (
    QuantizedMatrix,
    checked_codebooks,
    checked_rank,
    quantized_factors,
)
from lm_softmax.kernels import (
    Draws,
    Objective,
    Streamed,
    autocast_off,
    code_logits,
    draw_from_logits,
    product_dtype,
    streamed_loss,
    streamed_nll,
)
from lm_softmax.kernels.codes import TABLE_TOKENS, logit_chunks
from lm_softmax.kernels.dense_search import Best, best_of_chunks
from lm_softmax.kernels.ranking import LARGEST_K
from lm_softmax.kernels.workspace import reads_are_cheap


class MemoryBytes(NamedTuple):
    """What a head holds, and what the full softmax of its sizes would."""

    head: int  # parameters, the latent ones too, and codes
    dense: int  # output matrix and bias, in the same dtype


class ProductQuantizedSoftmax(ExactHead):
    """Exact softmax over output rows that are concatenations of shared centroids.

    Row w is `cat([centroids[m, codes[w, m]] for m in range(num_codebooks)])`, so a word costs
    `num_codebooks` small integers. Equals `F.log_softmax(F.linear(hidden, rows, bias), -1)`; the
    matrix `rows` is never rebuilt as a whole. With `rank` the output matrix is a product of
    matrices, hidden to `rank[0]` to ... to words, and each of them is such a code.

    Codes are learned on the way by default: a latent dense matrix receives the gradient of the
    rows, straight through the choice of centroids, which receive its sum; every `reassign_every`
    optimizer steps `after_optimizer_step` gives each part of a latent row the nearest centroid, and
    a centroid that nothing uses the part that is approximated worst; what is frozen stays as it is.
    `export` drops the latent matrix. `from_full` codes the rows of a trained head instead. Either
    way back-propagation trains the centroids.

    A training step takes about 1.3 to 1.45 times that of the full softmax, measured on one core,
    since rows are rebuilt and their gradient is shared out to centroids. While codes are learned,
    the latent matrix, its gradient and an optimizer's moments of it are dense, `(vocab_size,
    width)`: memory is saved after `export`, or where codes are fixed.

    Sources: Jegou et al. 2011, "Product quantization for nearest neighbor search", section II.B;
    van den Oord et al. 2017, "Neural discrete representation learning", section 3.2, for the
    straight-through gradient. Their term that ties latent rows to centroids, and centroids that
    follow the means of their members (appendix A.1), are left out: both raised perplexity in
    trials, centroids that learn by gradient alone came closest to the full softmax.

    Args:
        hidden_size: Width of `hidden`.
        vocab_size: Number of words.
        counts: Training-set frequencies; the bias starts at their log-probabilities.
        num_codebooks: Parts of a row, a divisor of its width; with `rank`, of the width of every
            matrix, or one number a matrix. None makes parts of 8 numbers, or of 4, 2 or 1 where 8
            does not divide the width.
        codebook_size: Centroids a codebook; up to 256 make codes of one byte. A matrix of as many
            rows or fewer has one a row, and is exact: with a `rank` of at most `codebook_size` all
            matrices but the words' are dense in effect.
        rank: Width of a word's row, or the widths from `hidden` on; None is `hidden_size`.
        learn_codes: Whether training changes the codes; else they stay random or as loaded.
        reassign_every: Optimizer steps from one choice of codes to the next.
        bias: Whether each word has a bias.
        softcap: Logits become `softcap * tanh(logits / softcap)`, in `log_prob` as well.
        label_smoothing: Share of the target's probability spread over all words, as in
            `F.cross_entropy` (Szegedy et al. 2016, section 7); in the loss only.
        z_loss: Weight of `logsumexp(logits) ** 2` added to the loss (Chowdhery et al. 2022,
            section 5, use 1e-4); in the loss only.
        ignore_index: Target of positions that count for nothing.

    Raises:
        ValueError: If codebooks do not divide a width or an option is out of range.
    """

    steps: Tensor

    def __init__(
        self,
        hidden_size: int,
        vocab_size: int,
        counts: Tensor | None = None,
        *,
        num_codebooks: int | Sequence[int] | None = None,
        codebook_size: int = 256,
        rank: int | Sequence[int] | None = None,
        learn_codes: bool = True,
        reassign_every: int = 10,
        bias: bool = True,
        softcap: float | None = None,
        label_smoothing: float = 0.0,
        z_loss: float = 0.0,
        ignore_index: int = -100,
    ) -> None:
        objective = Objective(softcap, label_smoothing, z_loss)
        super().__init__(
            hidden_size, vocab_size, counts, objective=objective, ignore_index=ignore_index
        )
        for name, number in (("codebook_size", codebook_size), ("reassign_every", reassign_every)):
            if not is_size(number):
                raise ValueError(f"{name} must be a whole number of at least 1, got {number}")
        self.rank = checked_rank(rank, hidden_size)
        widths = [hidden_size, *self.rank]
        self.num_codebooks = checked_codebooks(num_codebooks, widths)
        self.codebook_size = codebook_size
        self.learn_codes = learn_codes
        self.reassign_every = reassign_every
        factors = quantized_factors(
            [*widths, vocab_size],
            self.num_codebooks,
            codebook_size=codebook_size,
            learn_codes=learn_codes,
        )
        self.factors = nn.ModuleList(factors)
        self.bias = nn.Parameter(torch.zeros(vocab_size)) if bias else None
        if self.bias is not None and counts is not None:
            self.bias.data.copy_(log_frequencies(counts))
        self._steps_done: int | None = None  # the buffer's value, where reading it is not cheap
        if learn_codes:
            self.register_buffer("steps", torch.zeros((), dtype=torch.int64))

    @property
    def output(self) -> QuantizedMatrix:
        """The last factor: a row a word."""
        return self._factors()[-1]

    def _factors(self) -> list[QuantizedMatrix]:
        """The matrices from hidden on."""
        return cast(list[QuantizedMatrix], list(self.factors))

    def _token_losses(self, rows: Tensor, target: Tensor, objective: Objective) -> Tensor:
        inputs = self._inputs(rows, target)
        return streamed_nll(inputs, target, self._streamed(), objective, self.ignore_index)

    def _summed_loss(self, rows: Tensor, target: Tensor, objective: Objective) -> Tensor:
        inputs = self._inputs(rows, target)
        return streamed_loss(inputs, target, self._streamed(), objective, self.ignore_index)

    def _streamed(self) -> Streamed:
        """The parameters as the kernel takes them."""
        return Streamed(self.output.code, self.bias, self.output.latent)

    def _inputs(self, rows: Tensor, target: Tensor | None = None) -> Tensor:
        """What the words' rows are multiplied with; with `target`, ignored rows may be nan."""
        if self.rank and target is not None:  # 0 * nan is nan, in the gradients of the factors
            rows = rows.masked_fill((target == self.ignore_index).unsqueeze(1), 0)
        for factor in self._factors()[:-1]:
            rows = project(rows, factor.rows())
        return rows

    def _all_log_probs(self, rows: Tensor) -> Tensor:
        return torch.log_softmax(self._logits(self._inputs(rows), slice(None)), -1)

    def _logits(self, inputs: Tensor, part: slice) -> Tensor:
        """Logits of some words."""
        code, latent = self.output.code, self.output.latent
        dtype = product_dtype(inputs, code.centroids)  # which autocast decides
        with autocast_off(inputs):
            code = code._replace(codes=code.codes[part])
            logits = code_logits(inputs, code, None if latent is None else latent[part], dtype)
            if self.bias is not None:
                logits = logits + self.bias[part]
            if self.objective.softcap is not None:
                logits = self.objective.softcap * torch.tanh(logits / self.objective.softcap)
            return logits

    def _draw(self, rows: Tensor, draws: Draws) -> Tensor:
        if draws.top_p is not None:
            return super()._draw(rows, draws)
        return draw_from_logits(self._inputs(rows), self.vocab_size, self._logits, draws)

    @torch.no_grad()
    def topk(self, hidden: Float[Tensor, "*batch hidden"], k: int) -> TopK:
        """See `OutputHead.topk`; words are ranked chunk by chunk, never all at once.

        The normaliser takes the logits of all words, so no bound by codebooks would spare any.
        """
        self._check_k(k)
        if k > LARGEST_K:
            return super().topk(hidden, k)
        inputs = self._inputs(self._flatten(hidden))
        dtype = product_dtype(inputs, self.output.centroids)
        with autocast_off(inputs):
            parts = torch.split(inputs, TABLE_TOKENS)
            found = [best_of_chunks(self._logit_chunks(part, dtype), part, k) for part in parts]
        values, indices = map(torch.cat, zip(*map(Best.top, found), strict=True))
        shape = (*hidden.shape[:-1], k)
        return TopK(values.view(shape), indices.view(shape))

    def _logit_chunks(self, inputs: Tensor, dtype: torch.dtype) -> Iterator[Tensor]:
        code, softcap = self.output.code, self.objective.softcap
        for part, logits in zip(code.chunks(), logit_chunks(inputs, code, dtype), strict=True):
            if self.bias is not None:
                logits.add_(self.bias[part])
            if softcap is not None:
                logits.div_(softcap).tanh_().mul_(softcap)
            yield logits

    @torch.no_grad()
    def after_optimizer_step(self) -> None:
        """Choose the codes anew, every `reassign_every` calls; from the parameters alone."""
        if not self.learn_codes:
            return
        if self._steps_done is None or reads_are_cheap(self.steps):
            self._steps_done = int(self.steps)
        self._steps_done += 1
        self.steps += 1
        if self._steps_done % self.reassign_every == 0:
            for factor in self._factors():
                factor.reassign()

    def export(self) -> "ProductQuantizedSoftmax":
        """The same head without latent matrices: log-probabilities are equal to the last bit."""
        has_bias = self.bias is not None
        made = self._empty(self, self.rank, self.num_codebooks, self.codebook_size, has_bias)
        kept = made.state_dict().keys()
        made.load_state_dict({k: v for k, v in self.state_dict().items() if k in kept})
        own = dict(self.named_parameters())
        for name, parameter in made.named_parameters():
            parameter.requires_grad_(own[name].requires_grad)
        return made.train(self.training)

    @classmethod
    @torch.no_grad()
    def from_full(
        cls,
        head: ClusteredHead,
        *,
        num_codebooks: int | Sequence[int] | None = None,
        codebook_size: int = 256,
        rank: int | Sequence[int] | None = None,
        iterations: int = 20,
        seed: int = 0,
    ) -> "ProductQuantizedSoftmax":
        """A trained head with its output rows coded by k-means; bias and options are copied.

        With `rank` its matrix is first factored by truncated singular value decompositions, and
        dimensions are ordered so that the product of their variances is about the same in each
        sub-space of the words' rows (Ge et al. 2013, "Optimized product quantization", section
        3.2.3). Codes are then fixed; back-propagation trains the centroids.

        Args:
            head: A head with one row a word over `hidden` itself.
            num_codebooks: As in the constructor.
            codebook_size: As in the constructor.
            rank: As in the constructor.
            iterations: Steps of k-means at most.
            seed: Decides what k-means draws, in `[0, 2**64)`.

        Raises:
            ValueError: If `head` has tail clusters, other inputs or rows that are not finite, or an
                option is out of range.
        """
        check_kmeans(iterations, seed)
        rows, bias = output_rows(head)
        made = cls._empty(head, rank, num_codebooks, codebook_size, bias is not None)
        matrices = truncated_svd(rows, made.rank, made.num_codebooks)
        for factor, matrix in zip(made._factors(), matrices, strict=True):
            num, size, _ = factor.centroids.shape
            centroids, codes = kmeans(matrix, num, size, iterations=iterations, seed=seed)
            factor.centroids.copy_(centroids)
            factor.codes.copy_(codes)
        if made.bias is not None and bias is not None:
            made.bias.copy_(bias)
        return made

    @classmethod
    def _empty(
        cls,
        head: "ClusteredHead | ProductQuantizedSoftmax",
        rank: int | Sequence[int] | None,
        num_codebooks: int | Sequence[int] | None,
        codebook_size: int,
        bias: bool,
    ) -> "ProductQuantizedSoftmax":
        """A head of fixed codes with the sizes, objective, dtype and device of another one.

        Nothing is drawn: parameters and codes hold what the memory held.
        """
        like = next(head.parameters())
        with torch.device("meta"):
            made = cls(
                head.hidden_size,
                head.vocab_size,
                num_codebooks=num_codebooks,
                codebook_size=codebook_size,
                rank=rank,
                learn_codes=False,
                bias=bias,
                ignore_index=head.ignore_index,
                **head.objective._asdict(),
            )
        return made.to(like.dtype).to_empty(device=like.device)

    def memory_bytes(self) -> MemoryBytes:
        """Bytes of parameters and codes, and of a full softmax of the same sizes."""
        held = [*self.parameters(), *self.buffers()]
        itemsize = self.output.centroids.itemsize
        dense = self.vocab_size * (self.hidden_size + (self.bias is not None)) * itemsize
        return MemoryBytes(sum(t.numel() * t.itemsize for t in held), dense)

    def structure(self) -> dict[str, Any]:
        """Sizes of the codes, the widths, and whether codes are learned."""
        return {
            "num_codebooks": list(self.num_codebooks),
            "codebook_size": self.codebook_size,
            "rank": list(self.rank) or None,
            "learn_codes": self.learn_codes,
        }

    def extra_repr(self) -> str:
        """Sizes, for `print(head)`."""
        sizes = ", ".join(f"{name}={value}" for name, value in self.structure().items())
        return f"{super().extra_repr()}, {sizes}"

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._steps_done = None
        super()._load_from_state_dict(*args, **kwargs)
