"""The softmax of a CPU, a block of words at a time, against the equation in float64."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from lm_softmax.kernels import block_softmax, products
from lm_softmax.kernels.block_softmax import add_block_gradients, block_losses, cut
from lm_softmax.kernels.dense import Gradients, Matrix, Objective

PLAIN = Objective()
USUAL = {name: getattr(block_softmax, name) for name in ("BLOCK_VALUES", "MIN_BLOCK_WORDS")}


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Of seven words, whatever the number of rows."""
    monkeypatch.setattr(block_softmax, "BLOCK_VALUES", 0)
    monkeypatch.setattr(block_softmax, "MIN_BLOCK_WORDS", 7)
    monkeypatch.setattr(block_softmax, "STEP_OF_WORDS", 1)


@pytest.fixture(params=["onednn", "mkl"])
def library(request, monkeypatch):
    """Each of the two that multiply float32, where torch has both."""
    if request.param == "onednn" and not products._prefers_onednn():
        pytest.skip("torch.mm is preferred on this processor")
    monkeypatch.setattr(products, "_prefers_onednn", lambda: request.param == "onednn")


def equation(hidden, blocks, bias, target, objective, scale):
    """Losses in float64, and the gradients of their weighted sum, by autograd."""
    inputs = [hidden, *blocks] + ([] if bias is None else [bias])
    doubles = [tensor.detach().double().requires_grad_() for tensor in inputs]
    of_bias = None if bias is None else doubles[-1]
    logits = F.linear(doubles[0], torch.cat(doubles[1 : len(blocks) + 1]), of_bias)
    if objective.softcap is not None:
        logits = objective.softcap * torch.tanh(logits / objective.softcap)
    loss = F.cross_entropy(
        logits, target, reduction="none", label_smoothing=objective.label_smoothing
    )
    loss = loss + objective.z_loss * logits.logsumexp(1).square()
    return loss.detach(), torch.autograd.grad((loss * scale).sum(), doubles)


def found(hidden, blocks, bias, target, objective, scale, num_chunks=1):
    """The same by the pass, with buffers that hold nan before."""
    gradients = Gradients(
        torch.full_like(hidden, torch.nan),
        [torch.full_like(block, torch.nan) for block in blocks],
        None if bias is None else torch.full_like(bias, torch.nan),
    )
    losses = []
    for index, part in enumerate(torch.arange(len(hidden)).chunk(num_chunks)):
        rows = slice(int(part[0]), int(part[-1]) + 1)
        loss, derivative = block_losses(
            hidden[rows],
            Matrix(blocks, bias),
            target[rows],
            objective,
            with_derivative=True,
            scale=scale[rows],
        )
        of_chunk = gradients._replace(hidden=gradients.hidden[rows])
        add_block_gradients(derivative, blocks, of_chunk, keep=index > 0)
        losses.append(loss)
    flat = [gradients.hidden, *gradients.blocks]
    return torch.cat(losses), flat + ([] if bias is None else [gradients.bias])


@given(
    num_rows=st.integers(1, 150),
    sizes=st.lists(st.integers(1, 30), min_size=1, max_size=3),
    width=st.integers(1, 9),
    has_bias=st.booleans(),
    softcap=st.sampled_from([None, 3.0]),
    smoothing=st.sampled_from([0.0, 0.2]),
    z_loss=st.sampled_from([0.0, 0.05]),
    num_chunks=st.integers(1, 3),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    seed=st.integers(0, 2**16),
)
@settings(max_examples=60, deadline=None)
def test_equals_the_equation(
    num_rows, sizes, width, has_bias, softcap, smoothing, z_loss, num_chunks, dtype, seed
):
    draw = torch.Generator().manual_seed(seed)

    def tensor(*shape):
        return torch.randn(*shape, generator=draw, dtype=torch.float64).to(dtype)

    hidden, blocks = tensor(num_rows, width), [tensor(size, width) for size in sizes]
    bias = tensor(sum(sizes)) if has_bias else None
    target = torch.randint(sum(sizes), (num_rows,), generator=draw)
    arguments = hidden, blocks, bias, target, Objective(softcap, smoothing, z_loss)
    scale = torch.randn(num_rows, generator=draw, dtype=torch.float64)
    losses, gradients = equation(*arguments, scale)
    own, own_gradients = found(*arguments, scale.to(dtype), num_chunks)
    close = (
        {"rtol": 1e-10, "atol": 1e-10} if dtype == torch.float64 else {"rtol": 2e-5, "atol": 2e-5}
    )
    assert_close(own.double(), losses, **close)
    for one, other in zip(own_gradients, gradients, strict=True):
        assert_close(one.double(), other, **close)
    alone, nothing = block_losses(
        hidden, Matrix(blocks, bias), target, arguments[-1], with_derivative=False
    )
    assert nothing is None
    assert_close(alone.double(), losses, **close)


@pytest.mark.filterwarnings("ignore:TF32")  # which torch says of any of its switches
def test_a_library_that_is_switched_off_is_not_used(monkeypatch):
    monkeypatch.setattr(products, "_prefers_onednn", lambda: True)
    left = torch.empty(129, 1)
    assert len(products.fill_up(left)) == 132
    with torch.backends.mkldnn.flags(enabled=False):
        assert len(products.fill_up(left)) == 129


@pytest.mark.parametrize("num_rows", [1, 7, 64, 129, 1025])
def test_both_libraries_agree_with_the_equation(library, num_rows):
    """Of rows that fill a product up nothing is left."""
    hidden, blocks = torch.randn(num_rows, 6), [torch.randn(20, 6), torch.randn(2, 6)]
    bias, target = torch.randn(22), torch.randint(22, (num_rows,))
    scale = torch.randn(num_rows)
    expected = equation(hidden, blocks, bias, target, PLAIN, scale)
    losses, gradients = found(hidden, blocks, bias, target, PLAIN, scale)
    assert losses.shape == (num_rows,)
    assert_close(losses.double(), expected[0], rtol=1e-5, atol=1e-5)
    for own, other in zip(gradients, expected[1], strict=True):
        assert_close(own.double(), other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("gap", [50.0, 80.0, 500.0, 1e4])
@pytest.mark.parametrize("softcap", [None, 600.0])
def test_targets_far_below_the_most_probable_words(dtype, gap, softcap):
    """In a block of their own, which then has no share, or in that of those words."""
    weight, bias = torch.zeros(21, 2, dtype=dtype), torch.linspace(0, 1, 21, dtype=dtype)
    weight[3:5, 0], weight[10, 1] = gap, 1.0
    bias[3:5] = 0
    hidden = torch.tensor([[1.0, 0.5]], dtype=dtype).expand(4, 2).contiguous()
    target = torch.tensor([3, 10, 20, 6])
    arguments = hidden, [weight], bias, target, Objective(softcap), torch.ones(4, dtype=dtype)
    losses, gradients = equation(*arguments)
    own, own_gradients = found(*arguments)
    assert_close(own, losses.to(dtype), rtol=1e-6, atol=1e-30)
    assert_close(own_gradients, [gradient.to(dtype) for gradient in gradients])
    assert own[1:].min() > min(gap, 400) - 1


def test_operands_of_low_precision():
    """Logits of bfloat16 operands are rounded once and everything else is float32."""
    hidden, weight = torch.randn(30, 6).bfloat16(), torch.randn(20, 6).bfloat16()
    bias, target = torch.randn(20), torch.randint(20, (30,))
    losses, _ = block_losses(hidden, Matrix([weight], bias), target, PLAIN, with_derivative=False)
    assert losses.dtype == torch.float32
    logits = (hidden @ weight.t()).float() + bias
    assert_close(losses, F.cross_entropy(logits, target, reduction="none"))


def test_a_bias_need_not_lie_in_one_piece(library):
    """A column of a matrix, and one value for all words."""
    hidden, weight, target = torch.randn(65, 6), torch.randn(20, 6), torch.randint(20, (65,))
    for bias in (torch.randn(20, 3)[:, 1], torch.ones(1).expand(20)):
        losses, _ = block_losses(
            hidden, Matrix([weight], bias), target, PLAIN, with_derivative=False
        )
        expected = F.cross_entropy(F.linear(hidden, weight, bias), target, reduction="none")
        assert_close(losses, expected)


def test_rows_that_fill_a_product_up_are_as_finite_as_the_others(library):
    """A word forbidden by its weights, which rows of zeros would make nan."""
    hidden, weight = torch.rand(65, 6) + 0.1, torch.randn(20, 6)
    weight[7] = -torch.inf
    target = torch.randint(8, 20, (65,))
    _, derivative = block_losses(
        hidden, Matrix([weight], None), target, PLAIN, with_derivative=True
    )
    gradients = Gradients(None, [torch.zeros(20, 6)], None)
    add_block_gradients(derivative, [weight], gradients, keep=False)
    assert gradients.blocks[0].isfinite().all()
    assert (gradients.blocks[0][7] == 0).all()


@pytest.mark.parametrize("weighted", [1.0, 1e-8, 1e-14])
def test_small_weights_of_targets_in_blocks_that_have_no_share(weighted):
    weight, bias = torch.randn(21, 6), torch.zeros(21)
    bias[7:] -= 90
    hidden, target = torch.randn(5, 6), torch.randint(7, 21, (5,))
    arguments = hidden, [weight], bias, target, PLAIN
    _, own = found(*arguments, torch.full((5,), weighted))
    _, expected = equation(*arguments, torch.ones(5))
    for gradient, wanted in zip(own, expected, strict=True):
        assert_close(gradient.double() / weighted, wanted, rtol=1e-4, atol=1e-5)


def test_impossible_words():
    """A block of biases -inf takes no share, and a target in it costs inf."""
    bias = torch.zeros(21)
    bias[7:14] = -torch.inf
    hidden, weight = torch.randn(4, 3), torch.randn(21, 3)
    target = torch.tensor([0, 20, 3, 8])
    logits = F.linear(hidden, weight, bias)
    expected = F.cross_entropy(logits, target, reduction="none")
    losses, _ = block_losses(hidden, Matrix([weight], bias), target, PLAIN, with_derivative=False)
    assert losses[3] == torch.inf
    assert_close(losses, expected)
    every = torch.full((21,), -torch.inf)
    losses, _ = block_losses(hidden, Matrix([weight], every), target, PLAIN, with_derivative=False)
    assert losses.isnan().all()  # as of torch.cross_entropy
    arguments = hidden[:3], [weight], bias, target[:3], PLAIN
    _, gradients = found(*arguments, torch.ones(3))
    _, wanted = equation(*arguments, torch.ones(3))
    for own, other in zip(gradients, wanted, strict=True):
        assert_close(own.double(), other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
def test_what_is_not_finite_is_not_hidden(poison):
    weight = torch.randn(21, 3)
    weight[9, 1] = poison
    hidden, target = torch.ones(2, 3), torch.tensor([9, 1])
    losses, derivative = block_losses(
        hidden, Matrix([weight], None), target, PLAIN, with_derivative=True
    )
    assert not losses.isfinite().any()
    gradients = Gradients(torch.zeros(2, 3), [torch.zeros(21, 3)], None)
    add_block_gradients(derivative, [weight], gradients, keep=False)
    assert not gradients.hidden.isfinite().any()


@given(num_rows=st.integers(0, 5000), sizes=st.lists(st.integers(1, 9000), min_size=1, max_size=4))
def test_blocks_cover_all_words(num_rows, sizes):
    blocks = cut(Matrix([torch.empty(size, 0) for size in sizes], None), num_rows)
    assert [sum(words) for words in blocks] == sizes
    assert min(map(min, blocks)) > 0


@given(num_rows=st.integers(0, 5000), size=st.integers(1, 10**6))
def test_blocks_are_of_one_size_whose_rows_do_not_share_the_sets_of_a_cache(num_rows, size):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(block_softmax, "STEP_OF_WORDS", 256)
        for name, value in USUAL.items():
            patch.setattr(block_softmax, name, value)
        ((*others, last),) = cut(Matrix([torch.empty(size, 0)], None), num_rows)
    assert len({*others}) <= 1
    for length in others:
        assert length % 512 == 256
        assert length * num_rows <= max(USUAL["BLOCK_VALUES"], num_rows * USUAL["MIN_BLOCK_WORDS"])
        assert 0.5 * length <= last <= 1.5 * length


@given(num_rows=st.integers(1, 10**5))
def test_few_shapes_of_products(num_rows):
    """At most 3 % more rows, and at most 32 numbers of rows from one power of two to the next."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(products, "_prefers_onednn", lambda: True)
        filled = len(products.fill_up(torch.empty(num_rows, 0)))
        assert num_rows <= filled <= num_rows * 33 / 32
        assert filled % max(2 ** (num_rows.bit_length() - 6), 1) == 0
        assert len(products.fill_up(torch.empty(num_rows, 0, dtype=torch.bfloat16))) == num_rows
        patch.setattr(products, "_prefers_onednn", lambda: False)
        assert len(products.fill_up(torch.empty(num_rows, 0))) == num_rows
