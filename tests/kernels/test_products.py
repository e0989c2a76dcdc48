"""Matrix products against `F.linear` in float64, and which library makes them."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from lm_softmax.kernels import products


@pytest.mark.parametrize("slow", [True, False])
@settings(max_examples=100, deadline=None)
@given(
    num_rows=st.sampled_from([0, 1, 2, 5, 8, 9]),
    num_words=st.integers(0, 40),
    width=st.sampled_from([1, 95, 96, 130]),
    bias=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.float32, torch.float64, torch.bfloat16]),
    strided=st.booleans(),
)
def test_linear_into_equals_its_equation(num_rows, num_words, width, bias, dtype, slow, strided):
    left = torch.randn(num_rows, width).to(dtype)
    rows = torch.randn(num_words, width).to(dtype)
    offset = torch.randn(num_words).to(dtype) if bias else None
    whole = torch.full((num_rows, num_words + 3), torch.nan, dtype=dtype)
    out = whole[:, 1 : num_words + 1] if strided else torch.empty(num_rows, num_words, dtype=dtype)
    if strided:  # operands that are parts of others
        left = torch.stack([left, left], 1)[:, 1]
        rows = torch.cat([rows, rows], 1)[:, :width]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(products, "_mkl_is_slow", lambda: slow)
        patch.setattr(products, "MANY_WEIGHTS", 100)
        products.linear_into(out, left, rows, offset)
    expected = F.linear(left.double(), rows.double(), None if offset is None else offset.double())
    tolerance = {} if dtype == torch.bfloat16 else {"rtol": 1e-5, "atol": 1e-4}
    assert_close(out, expected.to(dtype), **tolerance)
    if strided:
        assert whole[:, 0].isnan().all()
        assert whole[:, num_words + 1 :].isnan().all()


@pytest.mark.parametrize(
    ("shape", "num_words", "dtype", "by_columns"),
    [
        ((0, 128), 1000, torch.float32, False),
        ((1, 95), 1000, torch.float32, False),
        ((1, 96), 1000, torch.float32, True),
        ((1, 128), 255, torch.float32, False),
        ((1, 128), 256, torch.float32, True),
        ((2, 16), 10_000, torch.float32, True),
        ((8, 128), 1000, torch.float32, True),
        ((9, 128), 1000, torch.float32, False),
        ((2, 128), 1000, torch.float64, False),
    ],
)
def test_few_rows_are_multiplied_as_columns_where_that_is_faster(
    shape, num_words, dtype, by_columns, monkeypatch
):
    for slow in (True, False):
        monkeypatch.setattr(products, "_mkl_is_slow", lambda slow=slow: slow)
        left = torch.empty(shape, dtype=dtype)
        rows = left.new_empty(num_words, shape[1])
        assert products._goes_by_columns(left, rows) == (by_columns and slow)
    monkeypatch.setattr(products, "_mkl_is_slow", lambda: True)
    assert not products._goes_by_columns(left.to("meta"), rows)


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

    class Named:
        @staticmethod
        def _linear_pointwise(left, right, bias, *options):
            return F.linear(left, right) if missing == "result" else F.linear(left, right, bias)

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
