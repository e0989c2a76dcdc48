"""Product codes of given rows: nearest centroids, k-means, and centroids that nothing uses."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from lm_softmax.kernels import accumulation_dtype, autocast_off

DISTANCE_BYTES = 2**22  # of distances held at once
SVD_ROWS = 2**14  # of the matrix that a decomposition holds in float64 at once
SEEDED_ROWS = 64  # a centroid: k-means++ chooses among this many times as many rows
REFILL_ERRORS = 1e-6  # relative to a part's square: below it there is nothing to gain


def check_kmeans(iterations: int, seed: int) -> None:
    """ValueError if an option of `kmeans` is out of range."""
    whole = [isinstance(n, int) and not isinstance(n, bool) for n in (iterations, seed)]
    if not (whole[0] and iterations >= 0):
        raise ValueError(f"iterations must be a whole number of at least 0, got {iterations}")
    if not (whole[1] and 0 <= seed < 2**64):
        raise ValueError(f"seed must be a whole number in [0, 2**64), got {seed}")


def code_dtype(size: int) -> torch.dtype:
    """The smallest integers that count up to `size`: uint8 up to 256."""
    if size <= 2**8:
        return torch.uint8
    return torch.int16 if size <= 2**15 else torch.int32


def assign(points: Tensor, centroids: Tensor) -> tuple[Tensor, Tensor]:
    """The nearest centroid of each part of each row, and the squared distance to it.

    Equals `torch.cdist(points.view(n, M, s).transpose(0, 1), centroids).argmin(-1).T`, the first
    of equally near ones, without the `(n, M, K)` distances.

    Args:
        points: `(n, M * s)`.
        centroids: `(M, K, s)`.

    Returns:
        Codes `(n, M)` int64 and squared distances `(n, M)`.
    """
    num_codebooks, size, part_width = centroids.shape
    dtype = accumulation_dtype(points.dtype)
    own = centroids.to(dtype)
    half_squares = own.square().sum(-1, keepdim=True) / 2
    right = torch.cat([-own, half_squares], 2).transpose(1, 2)
    ids = torch.arange(size, dtype=torch.float32, device=points.device)
    num = max(1, DISTANCE_BYTES // (num_codebooks * size * dtype.itemsize))
    num = min(num, points.shape[0])
    codes = torch.empty(points.shape[0], num_codebooks, dtype=torch.int64, device=points.device)
    errors = torch.empty(codes.shape, dtype=dtype, device=points.device)
    buffer = right.new_empty(num_codebooks * num * size)
    with autocast_off(points):
        for start in range(0, points.shape[0], max(num, 1)):
            part = slice(start, start + num)
            parts = points[part].to(dtype).view(-1, num_codebooks, part_width).transpose(0, 1)
            left = torch.cat([parts, parts.new_ones(*parts.shape[:2], 1)], 2)
            shape = num_codebooks, parts.shape[1], size
            distances = buffer[: math.prod(shape)].view(shape)
            torch.bmm(left, right, out=distances)
            nearest = distances.amin(-1, keepdim=True)
            # twice as fast as `distances.min(-1)`, whose indices are not made by vector code
            found = torch.where(distances == nearest, ids, size).amin(-1)
            codes[part] = found.clamp_(max=size - 1).t()
            squares = parts.square().sum(-1) + 2 * nearest.squeeze(-1)
            errors[part] = squares.clamp_(min=0).t()
    return codes, errors


def member_means(points: Tensor, codes: Tensor, centroids: Tensor) -> tuple[Tensor, Tensor]:
    """The mean of each centroid's members, the centroid itself if it has none; and their number.

    Summed in float64.

    Returns:
        Means `(M, K, s)` and numbers of members `(M, K)`.
    """
    num_codebooks, size, part_width = centroids.shape
    starts = torch.arange(num_codebooks, device=codes.device) * size
    places = codes.to(torch.int64) + starts
    num = torch.zeros(num_codebooks * size, dtype=torch.int64, device=codes.device)
    num.scatter_add_(0, places.view(-1), torch.ones_like(places).view(-1))
    dtype = torch.float32 if codes.device.type == "mps" else torch.float64  # mps has none
    sums = torch.zeros(num_codebooks * size, part_width, dtype=dtype, device=codes.device)
    rows = max(1, DISTANCE_BYTES // (8 * num_codebooks * part_width))
    for start in range(0, points.shape[0], rows):
        part = slice(start, start + rows)
        parts = points[part].to(dtype).view(-1, part_width)
        sums.scatter_add_(0, places[part].view(-1, 1).expand_as(parts), parts)
    means = (sums / num.clamp(min=1).unsqueeze(1)).to(centroids.dtype).view_as(centroids)
    num = num.view(num_codebooks, size)
    return torch.where((num > 0).unsqueeze(-1), means, centroids), num


def refill(
    points: Tensor, codes: Tensor, errors: Tensor, centroids: Tensor, num_members: Tensor
) -> None:
    """Move each centroid without members to the worst approximated part of its codebook, in place.

    The row whose part that is takes its code. Nothing is drawn and nothing read back, so equal
    inputs on several ranks give equal results. Where no part is far from its centroid, nothing
    moves.

    Args:
        points: `(n, M * s)`.
        codes: `(n, M)`, written.
        errors: `(n, M)`, squared distances to the centroids of the codes.
        centroids: `(M, K, s)`, written.
        num_members: `(M, K)`.
    """
    num_codebooks, size, part_width = centroids.shape
    empty = num_members == 0
    worst = errors.topk(min(size, points.shape[0]), 0)
    turn = (empty.cumsum(1) - 1).clamp(min=0, max=worst.values.shape[0] - 1)
    rows = worst.indices.t().gather(1, turn)  # (M, K)
    books = torch.arange(num_codebooks, device=codes.device).unsqueeze(1).expand_as(rows)
    parts = points.view(-1, num_codebooks, part_width)[rows, books].to(centroids.dtype)
    gain = worst.values.t().gather(1, turn)
    moves = empty & (gain > REFILL_ERRORS * parts.square().sum(-1))
    centroids.copy_(torch.where(moves.unsqueeze(-1), parts, centroids))
    ids = torch.arange(size, device=codes.device).expand_as(rows)
    taken = torch.full_like(codes, -1, dtype=torch.int64)
    taken.scatter_reduce_(0, rows.t(), torch.where(moves, ids, -1).t(), "amax")
    codes.copy_(torch.where(taken >= 0, taken, codes.to(torch.int64)))


@torch.no_grad()
def kmeans(
    points: Tensor, num_codebooks: int, size: int, *, iterations: int, seed: int
) -> tuple[Tensor, Tensor]:
    """A product code of given rows: k-means in each sub-space (Jegou et al. 2011, section II.B).

    Starts at k-means++ (Arthur and Vassilvitskii 2007, section 2.2) and takes steps of Lloyd's
    algorithm until the codes stay or `iterations` are done. A centroid that loses its last member
    moves to the part that is approximated worst.

    Args:
        points: `(n, M * s)`.
        num_codebooks: M.
        size: Centroids a codebook, at most n.
        iterations: Steps at most.
        seed: Decides what is drawn.

    Returns:
        Centroids `(M, size, s)` and codes `(n, M)` int64.
    """
    points = points.to(accumulation_dtype(points.dtype))
    if size == points.shape[0]:  # each row has centroids of its own
        own = points.view(size, num_codebooks, -1).transpose(0, 1).clone()
        ids = torch.arange(size, device=points.device).unsqueeze(1)
        return own, ids.expand(size, num_codebooks).clone()
    generator = torch.Generator("cpu").manual_seed(seed)
    centroids = _seeds(points, num_codebooks, size, generator)
    codes, errors = assign(points, centroids)
    for _ in range(iterations):
        before = codes.clone()
        centroids, num_members = member_means(points, codes, centroids)
        refill(points, codes, errors, centroids, num_members)
        codes, errors = assign(points, centroids)
        if torch.equal(codes, before):
            break
    return centroids, codes


def _seeds(points: Tensor, num_codebooks: int, size: int, generator: torch.Generator) -> Tensor:
    """Parts chosen one after another, in proportion to the squared distance to the chosen ones."""
    num = min(points.shape[0], SEEDED_ROWS * size)
    chosen = torch.randperm(points.shape[0], generator=generator, device="cpu")[:num]
    chosen = chosen.to(points.device)
    parts = points[chosen].view(num, num_codebooks, -1).transpose(0, 1).contiguous()
    books = torch.arange(num_codebooks, device=points.device)
    seeds = parts.new_empty(num_codebooks, size, parts.shape[2])
    distances = parts.new_full((num_codebooks, num), torch.inf)
    weights = torch.ones(num_codebooks, num, device="cpu")  # where the generator is
    for index in range(size):
        drawn = torch.multinomial(weights, 1, generator=generator).squeeze(1)
        seeds[:, index] = parts[books, drawn.to(points.device)]
        from_last = (parts - seeds[:, index].unsqueeze(1)).square().sum(-1)
        distances = torch.minimum(distances, from_last)
        left = distances.sum(1, keepdim=True) > 0  # else every part has its centroid already
        weights = torch.where(left, distances, 1).cpu()
    return seeds


def truncated_svd(rows: Tensor, ranks: Sequence[int], num_codebooks: Sequence[int]) -> list[Tensor]:
    """Factors `(r1, width), (r2, r1), ..., (n, r_last)` whose product is nearest to `rows`.

    All but the last have orthonormal rows, so the last one's error is not amplified. The dimensions
    of a factor are ordered for the codebooks that code it.
    """
    factors = []
    rest = rows
    for rank, num in zip(ranks, num_codebooks[1:], strict=True):
        dtype = accumulation_dtype(rest.dtype)
        device = "cpu" if rest.device.type == "mps" else rest.device  # mps has no float64
        square = torch.zeros(rest.shape[1], rest.shape[1], dtype=torch.float64, device=device)
        for part in torch.split(rest, SVD_ROWS):
            square += part.to(square).t() @ part.to(square)
        values, vectors = torch.linalg.eigh(square)
        order = balanced_order(values.flip(0)[:rank], num)
        vectors = vectors.flip(1).t()[order].to(device=rest.device, dtype=dtype)
        factors.append(vectors)
        rest = rest.to(dtype) @ vectors.t()
    return [*factors, rest]


def balanced_order(variances: Tensor, num_groups: int) -> Tensor:
    """Falling variances in groups of equal size and about equal product, group after group.

    The next one goes to the group of the smallest product that is not full (Ge et al. 2013, section
    3.2.3), in units of the smallest variance: the order does not depend on the scale.
    """
    size, device = len(variances) // num_groups, variances.device
    variances = variances.double()
    least = variances[-1].clamp(min=variances[0] * 1e-12 + 1e-300)
    logs = (variances / least).clamp(min=1).log().tolist()  # none below that of an empty group
    groups: list[list[int]] = [[] for _ in range(num_groups)]
    products = [0.0] * num_groups
    for index, value in enumerate(logs):
        open_groups = [g for g in range(num_groups) if len(groups[g]) < size]
        group = min(open_groups, key=lambda g: products[g])
        groups[group].append(index)
        products[group] += value
    return torch.tensor([index for group in groups for index in group], device=device)
