"""Matrix products against `F.linear` in float64, and which library makes them."""

from contextlib import contextmanager

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from lm_softmax.kernels import dense, products
from lm_softmax.kernels.dense import Matrix

THRESHOLDS = {
    "WORD_BLOCK": 7,
    "BLOCK_ROWS": 12,
    "BLOCK_VALUES": 120,
    "FEW_VALUES": 40,
    "FEW_ROWS": 4,
    "WIDE": 9,
    "NARROW": 8,
    "SOME_WEIGHTS": 100,
    "MANY_WEIGHTS": 200,
}


@contextmanager
def small_thresholds():
    """Which small matrices pass, with the other library whatever the processor is."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in THRESHOLDS.items():
            patch.setattr(products, name, value)
        patch.setattr(products, "_prefers_onednn", lambda: True)
        yield


@pytest.fixture
def small():
    with small_thresholds():
        yield


class Calls(TorchDispatchMode):
    """Names of the operations that were called, and the shapes of what they were given."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        shapes = [tuple(one.shape) for one in args if isinstance(one, torch.Tensor)]
        self.found.append((func._schema.name.split("::")[1], shapes))
        return func(*args, **(kwargs or {}))

    def of(self, *names):
        """The shapes given to these operations."""
        return [shapes for name, shapes in self.found if name in names]


def strided(matrix, how):
    """The same numbers, laid out otherwise."""
    return {
        "whole": lambda: matrix,
        "rows of another": lambda: torch.stack([matrix, matrix], 1)[:, 1],
        "columns of another": lambda: torch.cat([matrix, matrix], 1)[:, : matrix.shape[1]],
        "every second": lambda: matrix.repeat_interleave(2, 1)[:, ::2],
        "transposed": lambda: matrix.t().contiguous().t(),
    }[how]()


LAYOUTS = [
    *("whole", "whole", "rows of another", "columns of another", "every second", "transposed")
]


@pytest.mark.filterwarnings("ignore:TF32")  # which torch says of any of its switches
@pytest.mark.parametrize("other", [True, False])
@settings(max_examples=200, deadline=None)
@given(
    num_rows=st.sampled_from([0, 1, 2, 4, 5, 8, 11, 12, 13, 70]),
    num_words=st.one_of(st.integers(0, 40), st.integers(20, 60)),
    width=st.sampled_from([1, 7, 8, 9, 10, 20]),
    bias=st.booleans(),
    dtype=st.sampled_from([torch.float32] * 4 + [torch.float64, torch.bfloat16]),
    layouts=st.tuples(*[st.sampled_from(LAYOUTS)] * 3),
    is_nan=st.booleans(),
)
def test_linear_into_equals_its_equation(
    num_rows, num_words, width, bias, dtype, other, layouts, is_nan
):
    left, rows = torch.randn(num_rows, width).to(dtype), torch.randn(num_words, width).to(dtype)
    if is_nan:
        left[-1:] = torch.nan
    left, rows = strided(left, layouts[0]), strided(rows, layouts[1]).requires_grad_()
    offset = torch.randn(num_words, 2).to(dtype)[:, 0] if bias else None
    whole = torch.full((num_rows, num_words + 3), torch.inf, dtype=dtype)
    out = whole[:, 1 : num_words + 1]
    if layouts[2] == "transposed":
        out = whole.new_empty(num_words, num_rows).t()
    with small_thresholds(), torch.no_grad(), torch.backends.mkldnn.flags(enabled=other):
        products.linear_into(out, left, rows, offset)
        expected = F.linear(left.double(), rows.double(), offset.double() if bias else None)
    tolerance = {torch.float64: (1e-10, 1e-10), torch.float32: (1e-5, 1e-4)}.get(dtype, (2e-2, 0.1))
    rtol, atol = tolerance
    assert_close(out.double(), expected, rtol=rtol, atol=atol, equal_nan=True)
    assert (whole[:, [0, -2, -1]] == torch.inf).all()


def test_a_wider_result_of_narrow_operands(small):
    """Logits are summed in float32."""
    left, rows = torch.randn(12, 20).bfloat16(), torch.randn(20, 20).bfloat16()
    out = torch.empty(12, 20)
    products.linear_into(out, left, rows, None)
    assert_close(out, (left.double() @ rows.double().t()).float(), rtol=1e-2, atol=0.1)


WAYS = [  # rows, words, width, and how, of float32 where MKL is slow
    (1, 2**11, 2**7, "columns"),  # 2**18 weights
    (1, 2**11 - 1, 2**7, "mm"),
    (1, 2**12, 95, "mm"),
    (1, 2**12, 96, "columns"),
    (1, 2**8, 2**12, "columns"),  # one row may be as wide as it wants
    (0, 2**14, 2**7, "mm"),
    (2, 2**13, 63, "mm"),
    (2, 2**13, 64, "columns"),
    (8, 2**14, 256, "columns"),  # 2**11 values
    (8, 2**14, 257, "onednn"),
    (9, 2**14, 128, "onednn"),  # FEW_ROWS, of as few values
    (9, 2**13, 128, "onednn"),  # 2**20 weights
    (9, 2**13 - 1, 128, "mm"),
    (47, 2**13 - 1, 128, "mm"),
    (48, 2**13 - 1, 128, "onednn"),
    (48, 2**11, 128, "onednn"),
    (48, 2**11 - 1, 128, "mm"),
    (47, 2**16, 63, "mm"),
    (48, 2**16, 63, "onednn"),
]


@pytest.mark.filterwarnings("ignore:TF32")
@pytest.mark.parametrize(("num_rows", "num_words", "width", "way"), WAYS)
def test_the_way_to_multiply_is_the_one_that_was_measured(
    num_rows, num_words, width, way, monkeypatch
):
    left, rows = torch.empty(num_rows, width), torch.empty(1).expand(num_words, width)
    monkeypatch.setattr(products, "_prefers_onednn", lambda: True)
    assert products.way_of(left, rows) == way
    for dtype in (torch.float64, torch.bfloat16):
        assert products.way_of(left.to(dtype), rows.to(dtype)) == "mm"
    assert products.way_of(left.to("meta"), rows.to("meta")) == "mm"
    with torch.backends.mkldnn.flags(enabled=False):
        assert products.way_of(left, rows) == "mm"
    with monkeypatch.context() as patch:
        patch.setattr(torch.compiler, "is_compiling", lambda: True)
        assert products.way_of(left, rows) == "mm"
    monkeypatch.setattr(products, "_prefers_onednn", lambda: False)
    assert products.way_of(left, rows) == "mm"


@pytest.mark.parametrize(
    ("num_rows", "num_words", "made"),
    [
        (1, 20, [(20, 10), (10, 2)]),  # one as two columns
        (3, 20, [(20, 10), (10, 3)]),
        (5, 20, [(8, 10), (20, 10)]),  # filled up
        (8, 20, [(8, 10), (15, 10), (8, 10), (5, 10)]),  # 120 values at once
        (30, 20, [(32, 10), (7, 10), (32, 10), (7, 10), (32, 10), (6, 10)]),  # 7 words at least
        (11, 9, [(11, 10), (10, 9)]),
        (12, 9, [(12, 10), (10, 7), (12, 10), (10, 2)]),  # 7 words at once
    ],
)
def test_operands_of_each_way(small, num_rows, num_words, made):
    left, rows = torch.randn(num_rows, 10), torch.randn(num_words, 10)
    with Calls() as calls:
        products.linear_into(torch.empty(num_rows, num_words), left, rows, None)
    shapes = calls.of("mm", "_linear_pointwise")
    assert [shape for of_call in shapes for shape in of_call[:2]] == made


@pytest.mark.parametrize("num_rows", [0, 1, 3, 300])
def test_rows_that_fill_up_are_copies_of_the_last(num_rows, monkeypatch):
    monkeypatch.setattr(products, "_prefers_onednn", lambda: True)
    left = torch.randn(num_rows, 2)
    filled = products.fill_up(left, 4)
    assert len(filled) == {0: 0, 1: 4, 3: 4, 300: 304}[num_rows]
    assert torch.equal(filled[:num_rows], left)
    assert (filled[num_rows:] == left[-1:]).all()


@settings(max_examples=60, deadline=None)
@given(
    num_rows=st.integers(0, 3),
    sizes=st.lists(st.integers(0, 4), min_size=1, max_size=3),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    bias=st.sampled_from([None, torch.float32, torch.float64, torch.bfloat16]),
)
def test_linears_are_those_of_all_blocks(num_rows, sizes, dtype, bias):
    left, rows = torch.randn(num_rows, 5, dtype=dtype), torch.randn(sum(sizes), 5, dtype=dtype)
    offset = None if bias is None else torch.randn(sum(sizes), dtype=bias)
    found = products.linears(left, rows.split(sizes), offset)
    assert_close(found, F.linear(left, rows, None if bias is None else offset.to(dtype)))


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("of_bias", [None, torch.float32, torch.float64])
@pytest.mark.parametrize("num_rows", [0, 1, 5, 13])
def test_logits_equal_their_equation_by_few_calls_and_by_many(
    small, num_rows, of_bias, dtype, softcap, monkeypatch
):
    """And are as precise; the parameters may be of another dtype, and are not written."""
    rows, blocks = torch.randn(num_rows, 10).to(dtype), [torch.randn(n, 10) for n in (12, 3, 0)]
    bias = None if of_bias is None else torch.randn(15, dtype=of_bias)
    expected = F.linear(
        rows.double(),
        torch.cat(blocks).to(dtype).double(),
        None if bias is None else bias.double(),
    )
    if softcap is not None:
        expected = softcap * torch.tanh(expected / softcap)
    wide = torch.promote_types(dtype, torch.float32)
    close = {"rtol": 2e-2, "atol": 0.1} if dtype == torch.bfloat16 else {}
    for few in (15 * num_rows, 15 * num_rows - 1):
        monkeypatch.setattr(dense, "FEW_LOGITS", few)
        found = dense.dense_logits(rows, Matrix(blocks, bias), softcap)
        assert found.dtype == wide
        assert_close(found, expected.to(wide), **close)
    if bias is not None:
        assert bias.dtype == of_bias


def test_few_logits_are_made_by_few_calls_unless_another_way_is_faster(small, monkeypatch):
    rows, blocks, bias = (
        torch.randn(1, 10),
        [torch.randn(9, 10), torch.randn(2, 10)],
        torch.ones(11),
    )
    many = [torch.randn(10, 10), torch.randn(1, 10)]

    def operands(rows, blocks):
        with Calls() as calls:
            dense.dense_logits(rows, Matrix(blocks, bias), None)
        return len(calls.found), calls.of("mm", "addmm")

    monkeypatch.setattr(dense, "FEW_LOGITS", 11)
    few, made = operands(rows, blocks)
    assert [shapes[-1] for shapes in made] == [(10, 9), (10, 2)]
    assert operands(rows, many)[1][0] == [(10, 10), (10, 2)]  # as columns
    monkeypatch.setattr(dense, "FEW_LOGITS", 10)
    assert operands(rows, blocks)[0] > few


@pytest.mark.parametrize("num_rows", [2, 12])
def test_products_compile_into_one_graph(num_rows, monkeypatch):
    """What looks at the processor and its libraries does not."""
    monkeypatch.setattr(products, "SOME_WEIGHTS", 100)
    left, rows = torch.randn(num_rows, 10), torch.randn(20, 10)

    def product(left, rows):
        out = left.new_empty(left.shape[0], rows.shape[0])
        products.linear_into(out, left, rows, None)
        return out

    compiled = torch.compile(product, backend="eager", fullgraph=True)
    assert_close(compiled(left, rows), left @ rows.t())


def test_logits_of_weights_that_are_trained_and_of_both_modes(small):
    """Inside of inference mode, outside of it, and inside of it again."""
    weight = torch.nn.Parameter(torch.randn(40, 10))
    for num_rows in (1, 3, 5, 12):
        rows = torch.randn(num_rows, 10, requires_grad=True)
        expected = F.linear(rows, weight).detach()
        for mode in (torch.inference_mode, torch.no_grad, torch.inference_mode):
            with mode():
                assert_close(dense.dense_logits(rows, Matrix([weight], None), None), expected)


def test_the_trial_of_the_other_library_is_of_float32():
    """Whatever the default dtype is when it is made."""
    prefers = products._prefers_onednn.__wrapped__
    expected = prefers()
    torch.set_default_dtype(torch.float64)
    try:
        assert prefers() == expected
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("missing", ["mkl", "mkldnn", "capability", "maker", "name", "result"])
def test_the_other_library_is_a_choice_only_where_it_is_known(missing, monkeypatch):
    """Another processor, a torch without it, or one where the private name means something else."""
    monkeypatch.setattr(products, "_of_amd", lambda: missing != "maker")
    monkeypatch.setattr(
        torch.backends.cpu,
        "get_cpu_capability",
        lambda: "AVX2" if missing == "capability" else "AVX512",
    )
    for name in ("mkl", "mkldnn"):
        backend = getattr(torch.backends, name)
        monkeypatch.setattr(backend, "is_available", lambda name=name: missing != name)

    class Product:
        @staticmethod
        def default(left, right, bias, *options):
            return F.linear(left, right) if missing == "result" else F.linear(left, right, bias)

    class Named:
        _linear_pointwise = Product

    class Other:
        mkldnn = object() if missing == "name" else Named

    prefers = products._prefers_onednn.__wrapped__
    monkeypatch.setattr(products, "_mkl_is_slow", products._mkl_is_slow.__wrapped__)
    with monkeypatch.context() as patch:
        patch.setattr(torch, "ops", Other)
        assert not prefers()
        missing = "nothing"
        patch.setattr(products, "_of_amd", lambda: True)
        patch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
        for name in ("mkl", "mkldnn"):
            patch.setattr(getattr(torch.backends, name), "is_available", lambda: True)
        Other.mkldnn = Named
        assert prefers()


@pytest.mark.parametrize("num_words", [1, 7, 24])
@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("num_threads", [1, 2, 3])
@pytest.mark.parametrize("num_rows", [0, 5])
def test_a_weighted_sum_of_rows(num_rows, num_words, keep, num_threads, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: num_threads)
    weights, rows = torch.randn(num_rows).double(), torch.randn(num_rows, num_words).double()
    before = torch.randn(num_words).double() if keep else torch.full((num_words,), torch.nan)
    out = before.double().clone()
    products.weighted_sum(out, weights, rows, keep=keep)
    expected = before if keep else torch.zeros_like(out)
    for weight, row in zip(weights, rows, strict=True):
        expected = expected + weight * row
    assert_close(out, expected)
