"""The chunked pass: chunks, work buffers, drift, low precision."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from lm_softmax.kernels import Clusters, Tail, cluster_loss, dense, products, workspace
from lm_softmax.kernels.dense_pass import dense_pass


@given(rows=st.integers(0, 10**6), vocab_size=st.integers(1, 10**7))
def test_chunks_are_bounded(rows, vocab_size):
    chunk = dense.chunk_rows(rows, vocab_size, torch.float32)
    assert 1 <= chunk <= max(rows, 1)
    row_bytes = vocab_size * 4
    least = dense.MIN_CHUNK_ROWS * row_bytes
    assert chunk * row_bytes <= max(dense.CHUNK_BYTES * 1.5 + row_bytes, least)
    num_chunks = max(-(-rows // chunk), 1)
    assert max(rows, 1) > num_chunks * (chunk - 1)  # about equal in size


@pytest.mark.parametrize(("rows", "chunk"), [(100, 100), (149, 149), (150, 75), (249, 125)])
def test_a_few_rows_too_many_make_no_chunk(rows, chunk, monkeypatch):
    monkeypatch.setattr(dense, "CHUNK_BYTES", 100 * 50 * 4)
    assert dense.chunk_rows(rows, 50, torch.float32) == chunk
    assert dense.chunk_rows(rows, 50 * 2, torch.float32) <= 64  # no more where they are the fewest


@pytest.fixture
def small_chunks(monkeypatch):
    """Three rows of 50 words in float64 at a time."""
    monkeypatch.setattr(dense, "CHUNK_BYTES", 3 * 50 * 8)
    monkeypatch.setattr(dense, "MIN_CHUNK_ROWS", 1)


def parameters(*shapes, dtype=torch.float64):
    return [torch.randn(shape, dtype=dtype, requires_grad=True) for shape in shapes]


@pytest.mark.parametrize("softcap", [None, 2.0])
def test_many_chunks_equal_one(small_chunks, softcap):
    hidden, weight, bias = parameters((23, 7), (50, 7), (50,))
    target = torch.randint(50, (23,))
    assert dense.chunk_rows(23, 50, torch.float64) == 3
    objective = dense.Objective(softcap, 0.1, 0.01)
    loss = cluster_loss(hidden, target, Clusters(weight, None, bias), objective)
    logits = F.linear(hidden, weight, bias)
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    expected = F.cross_entropy(logits, target, label_smoothing=0.1, reduction="sum")
    expected = expected + 0.01 * (logits.logsumexp(-1) ** 2).sum()
    inputs = (hidden, weight, bias)
    assert_close(loss, expected, rtol=1e-12, atol=1e-12)
    assert_close(
        torch.autograd.grad(loss, inputs),
        torch.autograd.grad(expected, inputs),
        rtol=1e-10,
        atol=1e-10,
    )


class Largest(TorchDispatchMode):
    """The largest tensor that any operation makes."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, torch.Tensor) and tensor._base is None:
                self.numel = max(self.numel, tensor.numel())
        return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_are_never_held_as_a_whole(dtype):
    workspace._buffers.held.clear()
    hidden, weight = torch.randn(1792, 4, dtype=dtype), torch.randn(20_000, 4, dtype=dtype)
    gradients = dense.Gradients(
        torch.empty_like(hidden, dtype=torch.float32),
        [torch.empty_like(weight, dtype=torch.float32)],
        None,
    )
    target = torch.randint(20_000, (1792,))
    with Largest() as largest:
        matrix, objective = dense.Matrix([weight], None), dense.Objective()
        dense_pass(hidden, matrix, target, objective, dtype, gradients=gradients)
    assert largest.numel == 896 * 20_000  # 68.4 MiB, one of two chunks


def test_work_buffers_serve_inference_mode_and_training():
    workspace._buffers.held.clear()
    hidden, weight = parameters((5, 3), (11, 3))
    target = torch.randint(11, (5,))
    with torch.inference_mode():
        loss = cluster_loss(hidden, target, Clusters(weight, None, None))
    again = cluster_loss(hidden, target, Clusters(weight, None, None))
    again.backward()
    assert_close(loss, again.detach().clone(), rtol=0, atol=0)
    assert weight.grad is not None


def test_long_sums_do_not_drift():
    """65,536 tokens in bfloat16: the scalar keeps float32's precision."""
    hidden, weight = torch.randn(2**16, 8).bfloat16(), torch.randn(300, 8).bfloat16()
    target = torch.randint(300, (2**16,))
    logits = F.linear(hidden, weight).double()
    expected = F.cross_entropy(logits, target, reduction="sum")
    loss = cluster_loss(hidden, target, Clusters(weight, None, None))
    assert loss.dtype == torch.float32
    assert_close(loss.double(), expected, rtol=2e-6, atol=0)


def test_weight_gradients_add_up_in_float32():
    """Over many chunks no worse than one float32 product of the rounded operands."""
    hidden, weight = torch.randn(2**15, 8).bfloat16(), torch.randn(2000, 8).bfloat16()
    weight.requires_grad_()
    target = torch.randint(2000, (2**15,))
    cluster_loss(hidden, target, Clusters(weight, None, None)).backward()
    exact = weight.detach().double().requires_grad_()
    logits = F.linear(hidden.double(), exact)
    F.cross_entropy(logits, target, reduction="sum").backward()
    naive = weight.detach().clone().requires_grad_()
    F.cross_entropy(F.linear(hidden, naive).float(), target, reduction="sum").backward()
    error, naive_error = ((w.grad - exact.grad).norm() for w in (weight, naive))
    assert error <= 1.05 * naive_error


@pytest.fixture
def accelerator(monkeypatch):
    """The paths of a device that the host does not wait for, run on a CPU."""
    for module in ("dense", "dense_pass", "clusters", "workspace"):
        monkeypatch.setattr(f"lm_softmax.kernels.{module}.reads_are_cheap", lambda tensor: False)


@pytest.mark.parametrize("scaled", [False, True])
def test_fp16_operands_neither_overflow_nor_vanish(scaled, accelerator, monkeypatch):
    """The path of a GPU, whose products of fp16 have float32 sums."""
    monkeypatch.setattr(products, "products_widen", lambda tensor: True)
    hidden, weight = torch.randn(500, 16), torch.randn(3000, 16) * 0.1
    target = torch.zeros(500, dtype=torch.int64)
    scale = torch.full((500,), 65536.0) if scaled else None
    results = []
    for dtype in (torch.float64, torch.float16):
        total = dense.accumulation_dtype(dtype)
        buffers = dense.Gradients(
            torch.empty(500, 16, dtype=total), [torch.empty(3000, 16, dtype=total)], None
        )
        matrix = dense.Matrix([weight], None)
        dense_pass(hidden, matrix, target, dense.Objective(), dtype, scale=scale, gradients=buffers)
        results.append([buffers.hidden.double(), buffers.blocks[0].double()])
    for exact, low in zip(*results, strict=True):
        assert low.isfinite().all()
        assert (low - exact).norm() <= 2e-3 * exact.norm()
        assert ((low == 0) & (exact != 0)).sum() == 0


def test_an_accelerator_computes_the_same(accelerator):
    """Extreme logits included: probabilities of the target that underflow."""
    hidden, short_list, words, projection, rare = parameters(
        (60, 5), (9, 5), (1, 5), (3, 5), (8, 3)
    )
    target = torch.randint(17, (60,))
    for factor in (1.0, 60.0):
        clusters = Clusters(short_list * factor, words, None, [Tail(projection, rare, None)])
        head = F.linear(hidden, torch.cat([short_list * factor, words])).log_softmax(-1)
        inside = F.linear(F.linear(hidden, projection), rare).log_softmax(-1)
        all_words = torch.cat([head[:, :9], head[:, 9:] + inside], 1)
        expected = F.nll_loss(all_words, target, reduction="sum")
        inputs = (hidden, short_list, words, projection, rare)
        loss = cluster_loss(hidden, target, clusters)
        assert_close(loss, expected, rtol=1e-12, atol=0)
        assert_close(torch.autograd.grad(loss, inputs), torch.autograd.grad(expected, inputs))


def test_a_full_softmax_off_the_cpu_masks_instead_of_dropping(monkeypatch):
    """The sort-free path of accelerators, run on a CPU."""
    hidden, weight, bias = parameters((9, 4), (13, 4), (13,))
    target = torch.randint(13, (9,))
    target[[0, 5]] = -100
    clusters = Clusters(weight, None, bias)
    expected = cluster_loss(hidden, target, clusters)
    wanted = torch.autograd.grad(expected, (hidden, weight, bias))
    monkeypatch.setattr("lm_softmax.kernels.clusters.reads_are_cheap", lambda tensor: False)
    poisoned = hidden.detach().index_fill(0, torch.tensor([0, 5]), torch.nan).requires_grad_()
    loss = cluster_loss(poisoned, target, clusters)
    assert_close(loss, expected)
    assert_close(torch.autograd.grad(loss, (poisoned, weight, bias)), wanted)


@pytest.mark.parametrize("num_tails", [0, 1, 3])
@pytest.mark.parametrize("has_projection", [True, False])
@pytest.mark.parametrize("has_bias", [True, False])
def test_flatten_round_trip(num_tails, has_projection, has_bias):
    def tensor(num_rows=2):
        return torch.randn(num_rows, 2)

    bias = tensor() if has_bias else None
    tails = [Tail(tensor() if has_projection else None, tensor(), bias) for _ in range(num_tails)]
    clusters = Clusters(tensor(), tensor(num_tails) if num_tails else None, bias, tails)
    assert Clusters.unflatten(clusters.flatten(), has_bias) == clusters  # the same tensors


def test_the_first_work_buffer_of_a_process_compiles_into_one_graph(monkeypatch):
    """The allocator is spoken to by code that runs alone."""
    monkeypatch.setattr(workspace._buffers, "held", {})

    def ones(like):
        return workspace.workspace("compiled", (2, 3), like, like.dtype).fill_(1).sum()

    compiled = torch.compile(ones, fullgraph=True, backend="eager")
    assert compiled(torch.zeros(1)) == 6
