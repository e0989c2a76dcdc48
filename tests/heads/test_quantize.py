"""Nearest centroids, k-means and dead centroids against plain code."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from lm_softmax.heads import quantize
from lm_softmax.heads.quantize import (
    assign,
    balanced_order,
    code_dtype,
    kmeans,
    member_means,
    refill,
    truncated_svd,
)


def decoded(centroids, codes):
    return torch.cat([book[codes[:, m].long()] for m, book in enumerate(centroids)], 1)


@pytest.mark.parametrize(
    ("size", "dtype"),
    [
        (1, torch.uint8),
        (256, torch.uint8),
        (257, torch.int16),
        (32_768, torch.int16),
        (32_769, torch.int32),
    ],
)
def test_codes_take_the_smallest_integers(size, dtype):
    assert code_dtype(size) == dtype
    assert size - 1 <= torch.iinfo(dtype).max


@settings(max_examples=40, deadline=None)
@given(
    num=st.integers(1, 40),
    num_codebooks=st.integers(1, 4),
    size=st.integers(1, 9),
    part_width=st.integers(1, 4),
    chunk=st.sampled_from([1, 500, 2**24]),
    seed=st.integers(0, 2**20),
)
def test_assignment_is_the_nearest(num, num_codebooks, size, part_width, chunk, seed):
    torch.manual_seed(seed)
    points = torch.randn(num, num_codebooks * part_width, dtype=torch.float64)
    centroids = torch.randn(num_codebooks, size, part_width, dtype=torch.float64)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(quantize, "DISTANCE_BYTES", chunk)
        codes, errors = assign(points, centroids)
    parts = points.view(num, num_codebooks, part_width).transpose(0, 1)
    nearest = torch.cdist(parts, centroids).square().min(-1)
    assert (codes == nearest.indices.t()).all()
    assert_close(errors, nearest.values.t(), rtol=1e-10, atol=1e-10)


def test_assignment_takes_the_first_of_equally_near_ones_and_no_autocast():
    centroids = torch.tensor([[[1.0], [-1.0], [1.0]]])
    codes, errors = assign(torch.tensor([[0.0], [1.0]]), centroids)
    assert codes.tolist() == [[0], [0]]
    assert errors.tolist() == [[1.0], [0.0]]
    points = torch.randn(200, 8)
    own = points[:30].view(30, 2, 4).transpose(0, 1)
    expected = assign(points, own)
    with torch.autocast("cpu", torch.bfloat16):
        found = assign(points, own)
    assert_close(found, expected, rtol=0, atol=0)


def test_means_are_those_of_the_members():
    points = torch.randn(50, 6, dtype=torch.float64)
    centroids = torch.randn(2, 5, 3, dtype=torch.float64)
    codes = torch.randint(4, (50, 2))  # the last centroid has none
    means, num = member_means(points, codes.to(torch.uint8), centroids)
    for m in range(2):
        for k in range(4):
            members = points[codes[:, m] == k, 3 * m : 3 * m + 3]
            assert num[m, k] == len(members)
            assert_close(means[m, k], members.mean(0))
        assert_close(means[m, 4], centroids[m, 4], rtol=0, atol=0)
    assert (num[:, 4] == 0).all()


def test_centroids_without_members_go_where_the_error_is_largest():
    points = torch.tensor([[0.0, 5.0], [1.0, 5.0], [9.0, 5.0], [4.0, 5.0]])
    centroids = torch.tensor([[[0.5], [70.0], [80.0]], [[5.0], [60.0], [50.0]]])
    codes, errors = assign(points, centroids)
    num = torch.tensor([[4, 0, 0], [4, 0, 0]])
    refill(points, codes, errors, centroids, num)
    assert centroids[0].tolist() == [[0.5], [9.0], [4.0]]
    assert centroids[1].tolist() == [[5.0], [60.0], [50.0]]  # all is exact: nothing moves
    assert codes[:, 0].tolist() == [0, 0, 1, 2]
    assert (codes[:, 1] == 0).all()


class TestKMeans:
    def test_recovers_a_product_code(self):
        torch.manual_seed(0)
        centroids = torch.randn(3, 16, 4)
        codes = torch.randint(16, (500, 3))
        points = decoded(centroids, codes)
        found, found_codes = kmeans(points, 3, 16, iterations=20, seed=0)
        assert_close(decoded(found, found_codes), points, rtol=1e-6, atol=1e-6)
        for m in range(3):  # equal up to the numbering
            pairs = {tuple(pair) for pair in torch.stack([codes, found_codes], -1)[:, m].tolist()}
            assert len(pairs) == 16

    def test_is_better_than_its_start_and_decided_by_the_seed(self):
        points = torch.randn(600, 8, generator=torch.Generator().manual_seed(0))
        results = [
            kmeans(points, 2, 9, iterations=steps, seed=seed)
            for steps, seed in ((0, 1), (30, 1), (30, 1), (30, 2))
        ]
        errors = [(decoded(*result) - points).square().sum() for result in results]
        assert errors[1] < 0.95 * errors[0]
        assert_close(results[1], results[2], rtol=0, atol=0)
        assert not torch.equal(results[1][0], results[3][0])
        for centroids, codes in results:
            assert (codes == assign(points, centroids)[0]).all()

    def test_default_device_does_not_matter(self):
        points = torch.randn(90, 8)
        expected = kmeans(points, 2, 5, iterations=2, seed=0)
        with torch.device("meta"):
            found = kmeans(points, 2, 5, iterations=2, seed=0)
        assert_close(found, expected, rtol=0, atol=0)

    def test_as_many_centroids_as_rows_is_exact(self):
        points = torch.randn(7, 6)
        assert_close(decoded(*kmeans(points, 3, 7, iterations=3, seed=0)), points, rtol=0, atol=0)

    def test_fewer_distinct_rows_than_centroids(self):
        points = torch.randn(3, 4)[torch.arange(40) % 3]
        found = kmeans(points, 2, 8, iterations=5, seed=0)
        assert found[0].isfinite().all()
        assert_close(decoded(*found), points)

    def test_fills_centroids_that_lose_their_members(self, monkeypatch):
        points = torch.cat([torch.zeros(50, 1), torch.tensor([[10.0], [20.0], [30.0]])])
        monkeypatch.setattr(quantize, "_seeds", lambda *_: torch.zeros(1, 4, 1))
        found = kmeans(points, 1, 4, iterations=10, seed=0)
        assert_close(decoded(*found), points)


@pytest.mark.parametrize("ranks", [[], [4], [6, 3]])
def test_factors_are_the_truncated_decomposition(ranks):
    torch.manual_seed(0)
    rows = torch.randn(60, 8, dtype=torch.float64) @ torch.randn(8, 8, dtype=torch.float64)
    factors = truncated_svd(rows, ranks, [1] * (len(ranks) + 1))
    shapes = [*ranks, 60]
    assert [factor.shape for factor in factors] == list(zip(shapes, [8, *ranks], strict=True))
    product = torch.eye(8, dtype=torch.float64)
    for factor in factors:
        product = factor @ product
    left, values, right = torch.linalg.svd(rows, full_matrices=False)
    kept = min([8, *ranks])
    expected = left[:, :kept] * values[:kept] @ right[:kept]
    assert_close(product, expected, rtol=1e-8, atol=1e-8)


def test_full_rank_changes_nothing(monkeypatch):
    monkeypatch.setattr(quantize, "SVD_ROWS", 7)
    rows = torch.randn(60, 8, dtype=torch.float64)
    first, second = truncated_svd(rows, [8], [4, 2])
    assert_close(second @ first, rows, rtol=1e-10, atol=1e-10)


def test_variance_is_shared_out():
    variances = torch.tensor([64.0, 16.0, 8.0, 4.0, 2.0, 1.0])
    order = balanced_order(variances, 2)
    assert sorted(order.tolist()) == list(range(6))
    products = variances[order].view(2, 3).prod(1)
    assert products.max() / products.min() < 64 * 16 * 8 / 8 / 4
    assert order.tolist() == [0, 3, 5, 1, 2, 4]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("num_groups", [2, 3, 4])
def test_order_of_variances_does_not_depend_on_their_scale(dtype, num_groups):
    torch.manual_seed(0)
    variances = torch.rand(12, dtype=dtype).pow(4).sort(descending=True).values
    expected = balanced_order(variances, num_groups).tolist()
    for scale in (1e-12, 1e-3, 1e3):
        assert balanced_order(variances * scale, num_groups).tolist() == expected
    logs = variances[expected].double().log().view(num_groups, -1).sum(1)
    assert logs.max() - logs.min() < (variances[0] / variances[-1]).double().log()


def test_each_of_the_largest_variances_has_a_group_of_its_own():
    variances = torch.tensor([0.9, 0.5, 0.3, 0.2, 0.1, 0.01])
    order = balanced_order(variances, 3).view(3, 2)
    assert order.tolist() == [[0, 5], [1, 4], [2, 3]]


@pytest.mark.parametrize("variances", [[0.0] * 4, [2.0, 1.0, 0.0, 0.0], [2.0, 1.0, 0.0, -1e-17]])
def test_variances_that_vanish_are_shared_out_too(variances):
    order = balanced_order(torch.tensor(variances, dtype=torch.float64), 2).tolist()
    assert sorted(order) == [0, 1, 2, 3]
    if variances[0]:
        assert sorted(order.index(index) // 2 for index in (0, 1)) == [0, 1]
