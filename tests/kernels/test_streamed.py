"""The streamed loss and the scores of a product code: chunks, both ways, memory, autograd."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from lm_softmax.kernels import (
    Objective,
    ProductCode,
    Streamed,
    code_logits,
    dense,
    streamed_loss,
    streamed_nll,
    workspace,
)
from lm_softmax.kernels import codes as codes_module
from lm_softmax.kernels import streamed as streamed_module

EXACT = {"rtol": 1e-10, "atol": 1e-10}


def indexed(code):
    """The whole matrix, as the definition reads."""
    books = enumerate(code.centroids)
    return torch.cat([book[code.codes[:, m].long()] for m, book in books], 1)


def random_code(num_rows, num_codebooks, size, part_width, dtype=torch.float64):
    centroids = torch.randn(num_codebooks, size, part_width, dtype=dtype, requires_grad=True)
    kind = torch.uint8 if size <= 256 else torch.int16
    return ProductCode(centroids, torch.randint(size, (num_rows, num_codebooks)).to(kind))


@pytest.fixture
def small_chunks(monkeypatch):
    """About three tokens of 50 words and sixteen words of 12 numbers at a time."""
    monkeypatch.setattr(dense, "CHUNK_BYTES", 3 * 50 * 8)
    monkeypatch.setattr(dense, "MIN_CHUNK_ROWS", 1)
    monkeypatch.setattr(codes_module, "ROWS_BYTES", 1)
    monkeypatch.setattr(codes_module, "TABLE_TOKENS", 5)


@pytest.mark.parametrize("has_latent", [False, True])
@pytest.mark.parametrize("size", [7, 300])
def test_many_chunks_equal_the_whole(small_chunks, has_latent, size):
    code = random_code(50, 4, size, 3)
    assert len(code.chunks()) == 4
    hidden, bias = torch.randn(23, 12).double().requires_grad_(), torch.randn(50).double()
    bias.requires_grad_()
    latent = torch.randn(50, 12, dtype=torch.float64, requires_grad=True) if has_latent else None
    target = torch.randint(50, (23,))
    target[4] = -100
    objective = Objective(2.0, 0.1, 0.01)
    rows = indexed(code)
    logits = 2.0 * torch.tanh(F.linear(hidden, rows, bias) / 2.0)
    expected = F.cross_entropy(logits, target, label_smoothing=0.1, reduction="none")
    expected = expected + 0.01 * logits.logsumexp(-1) ** 2 * (target != -100)
    inputs = [hidden, rows, code.centroids, bias]
    weights = torch.randn(23, dtype=torch.float64)
    streamed = Streamed(code, bias, latent)
    losses = streamed_nll(hidden, target, streamed, objective)
    assert_close(losses, expected, **EXACT)
    total = streamed_loss(hidden, target, streamed, objective)
    assert_close(total, expected.sum(), **EXACT)
    for ours, theirs in ((total, expected.sum()), (losses @ weights, expected @ weights)):
        of_hidden, of_rows, *others = torch.autograd.grad(theirs, inputs, retain_graph=True)
        wanted = [of_hidden, *others, of_rows][: 4 if has_latent else 3]
        asked = [hidden, code.centroids, bias, latent][: len(wanted)]
        assert_close(list(torch.autograd.grad(ours, asked)), wanted, **EXACT)


@pytest.mark.parametrize("wanted", ["hidden", "centroids", "bias", "latent"])
def test_one_gradient_alone(wanted):
    code = random_code(50, 4, 7, 3)
    leaves = {
        "hidden": torch.randn(9, 12).double(),
        "centroids": code.centroids.detach(),
        "bias": torch.randn(50).double(),
        "latent": torch.randn(50, 12).double(),
    }
    target = torch.randint(50, (9,))

    def loss():
        made = ProductCode(leaves["centroids"], code.codes)
        streamed = Streamed(made, leaves["bias"], leaves["latent"])
        return streamed_loss(leaves["hidden"], target, streamed)

    for leaf in leaves.values():
        leaf.requires_grad_()
    expected = torch.autograd.grad(loss(), leaves[wanted])
    for name, leaf in leaves.items():
        leaf.requires_grad_(name == wanted)
    assert_close(torch.autograd.grad(loss(), leaves[wanted]), expected, **EXACT)


@settings(max_examples=30, deadline=None)
@given(
    tokens=st.integers(0, 20),
    num_rows=st.integers(1, 60),
    num_codebooks=st.integers(1, 5),
    size=st.integers(1, 9),
    part_width=st.integers(1, 4),
    seed=st.integers(0, 2**20),
)
def test_scores_are_the_same_every_way(tokens, num_rows, num_codebooks, size, part_width, seed):
    torch.manual_seed(seed)
    code = random_code(num_rows, num_codebooks, size, part_width)
    inputs = torch.randn(tokens, num_codebooks * part_width, dtype=torch.float64)
    expected = F.linear(inputs, indexed(code)).detach()
    arguments = inputs, code, torch.float64
    with torch.no_grad():
        assert_close(codes_module.table_logits(*arguments), expected, **EXACT)
        assert_close(codes_module.rebuilt_logits(*arguments), expected, **EXACT)
    differentiable = codes_module.differentiable_logits(inputs, code, None, torch.float64)
    assert_close(differentiable.detach(), expected, **EXACT)


def test_scores_in_small_chunks(small_chunks):
    code = random_code(50, 4, 7, 3)
    inputs = torch.randn(13, 12, dtype=torch.float64)
    expected = F.linear(inputs, indexed(code)).detach()
    with torch.no_grad():
        for way in (codes_module.table_logits, codes_module.rebuilt_logits):
            assert_close(way(inputs, code, torch.float64), expected, **EXACT)


def test_the_cheaper_way_is_taken(monkeypatch):
    code = random_code(50, 4, 7, 3, torch.float32)
    ways = []
    for name in ("table_logits", "rebuilt_logits"):
        way = getattr(codes_module, name)

        def noted(*args, name=name, way=way):
            ways.append(name)
            return way(*args)

        monkeypatch.setattr(codes_module, name, noted)
    with torch.no_grad():
        for tokens in (1, 48, 49):
            inputs = torch.randn(tokens, 12)
            found = code_logits(inputs, code, None, torch.float32)
            assert_close(found, F.linear(inputs, indexed(code)))
    assert ways == ["table_logits", "table_logits", "rebuilt_logits"]


@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16])
def test_low_precision_scores_agree(low):
    code = random_code(90, 4, 7, 8, torch.float32)
    inputs = torch.randn(5, 32)
    rounded = F.linear(inputs.to(low).float(), indexed(code).to(low).float()).detach()
    with torch.no_grad():
        table = codes_module.table_logits(inputs, code, low)
        rebuilt = codes_module.rebuilt_logits(inputs, code, low)
    assert table.dtype == rebuilt.dtype == torch.float32
    assert_close(table, rounded)
    assert_close(rebuilt, rounded, rtol=0, atol=torch.finfo(low).eps * rounded.abs().max().item())


def test_scores_have_second_derivatives_and_a_latent_gradient(small_chunks):
    code = random_code(21, 2, 4, 3)
    inputs = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)
    latent = torch.randn(21, 6, dtype=torch.float64, requires_grad=True)

    def scores(inputs, centroids):
        return code_logits(inputs, ProductCode(centroids, code.codes), None, torch.float64)

    assert torch.autograd.gradcheck(scores, (inputs, code.centroids))
    assert torch.autograd.gradgradcheck(scores, (inputs, code.centroids))
    rows = indexed(code)
    weights = torch.randn(3, 21, dtype=torch.float64)
    found = code_logits(inputs, code, latent, torch.float64)
    wanted = torch.autograd.grad((F.linear(inputs, rows) * weights).sum(), rows)
    assert_close(torch.autograd.grad((found * weights).sum(), latent), wanted, **EXACT)


class Largest(TorchDispatchMode):
    """The largest tensor that any operation makes, and all matrices of this width."""

    def __init__(self, width):
        super().__init__()
        self.numel, self.width, self.made = 0, width, []

    @property
    def rows(self):
        return max(self.made, default=0)

    def of_rows(self, num):
        return self.made.count(num)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, torch.Tensor) and tensor._base is None:
                self.numel = max(self.numel, tensor.numel())
                if tensor.dim() == 2 and tensor.shape[1] == self.width:
                    self.made.append(tensor.shape[0])
        return out


@pytest.mark.parametrize("cheap", [True, False], ids=["cpu", "as-on-a-gpu"])
@pytest.mark.parametrize("learned", [False, True])
@pytest.mark.parametrize("derived", [False, True])
def test_neither_logits_nor_rows_are_held_as_a_whole(learned, derived, cheap, monkeypatch):
    for module in (dense, streamed_module, workspace):
        monkeypatch.setattr(module, "reads_are_cheap", lambda _: cheap)
    workspace._buffers.held.clear()
    num_rows, width, tokens = 40_000, 64, 200
    monkeypatch.setattr(dense, "CHUNK_BYTES", tokens * num_rows)  # a quarter of the logits
    code = random_code(num_rows, 8, 16, 8, torch.float32)
    latent = torch.zeros(num_rows, width) if learned else None
    streamed = Streamed(code, None, latent)
    shapes = [(tokens, width), code.centroids.shape, (num_rows, width)]
    made = [torch.zeros(shape) for shape in shapes]
    buffers = streamed_module._Buffers(*made[:2], None, made[2] if learned else None)
    hidden, target = torch.randn(tokens, width), torch.randint(num_rows, (tokens,))
    target[7] = -100
    arguments = streamed, torch.float32, -100, Objective(), buffers if derived else None
    # the pass itself: inside of a registered operation the mode would see nothing
    with torch.no_grad(), Largest(width) as largest:
        streamed_module._losses(hidden, target, None, *arguments)
    # an accelerator's chunk has at least as many rows as the matrix is wide
    assert largest.numel == (50 if cheap else width) * num_rows
    assert largest.rows <= codes_module.ROWS_BYTES // (4 * width)


def test_scores_do_not_hold_the_rows_as_a_whole():
    num_rows, width = 40_000, 64
    code = random_code(num_rows, 8, 16, 8, torch.float32)
    inputs = torch.randn(4, width, requires_grad=True)
    with Largest(width) as largest:
        code_logits(inputs, code, None, torch.float32).sum().backward()
    assert 0 < largest.rows <= codes_module.ROWS_BYTES // (4 * width)


def test_latent_gradient_of_scores_is_made_once():
    num_rows, width = 40_000, 64
    code = random_code(num_rows, 8, 16, 8, torch.float32)
    assert len(code.chunks()) > 2
    latent = torch.zeros(num_rows, width, requires_grad=True)
    scores = code_logits(torch.randn(4, width), code, latent, torch.float32)
    with Largest(width) as largest:
        torch.autograd.grad(scores.sum(), latent)
    assert largest.of_rows(num_rows) == 1


def test_low_precision_gradients_use_the_rows_as_they_are():
    code = random_code(50, 4, 7, 3, torch.float32)
    hidden, target = torch.zeros(5, 12, requires_grad=True), torch.arange(5)
    with torch.autocast("cpu", torch.bfloat16):
        streamed_loss(hidden, target, Streamed(code, None)).backward()
    rows = indexed(code).detach()  # all words are as probable
    assert_close(hidden.grad, rows.mean(0) - rows[:5])


def test_rows_are_not_kept_for_backward():
    code = random_code(40_000, 8, 16, 8, torch.float32)
    inputs = torch.randn(4, 64, requires_grad=True)
    kept = []

    def pack(tensor):
        kept.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        code_logits(inputs, code, None, torch.float32)
    assert sum(kept) < 40_000 * 64 / 2


def test_work_buffers_do_not_hold_the_rows():
    workspace._buffers.held.clear()
    code = random_code(40_000, 8, 16, 8, torch.float32)
    hidden = torch.randn(400, 64, requires_grad=True)
    streamed_loss(hidden, torch.zeros(400, dtype=torch.int64), Streamed(code, None)).backward()
    held = {name: buffer.numel() * 4 for (name, _), buffer in workspace._buffers.held.items()}
    assert held["rows"] <= codes_module.ROWS_BYTES
    assert held["of_rows"] <= codes_module.ROWS_BYTES
    assert held["logits"] <= dense.CHUNK_BYTES
