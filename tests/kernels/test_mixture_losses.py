"""The chunked pass of a mixture: chunks, memory, other devices' paths, low precision."""

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from lm_softmax.heads import MixtureOfSoftmaxes
from lm_softmax.kernels import (
    Mixture,
    Objective,
    dense,
    mixture_loss,
    mixture_nll,
    products,
    workspace,
)
from lm_softmax.kernels import mixture as kernel

EXACT = {"rtol": 1e-10, "atol": 1e-10}
smoothings = pytest.mark.parametrize("smoothing", [0.0, 0.2])


def problem(num=23, experts=3, width=4, vocab_size=50, dtype=torch.float64):
    """Inputs, target, and log-prior, weight and bias."""
    shapes = (num, experts, width), (num, experts), (vocab_size, width), (vocab_size,)
    inputs, prior, *rest = (torch.randn(shape, dtype=dtype) for shape in shapes)
    leaves = [leaf.requires_grad_() for leaf in (inputs, prior.log_softmax(1), *rest)]
    target = torch.randint(vocab_size, (num,))
    return leaves[0], target, Mixture(*leaves[1:])


def naive(inputs, target, mixture, softcap=None, smoothing=0.0):
    """The cross-entropy of each token; priors need not sum to 1 for its derivative."""
    logits = F.linear(inputs, mixture.weight, mixture.bias)
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    joint = mixture.log_prior.unsqueeze(-1) + logits.log_softmax(-1)
    log_probs = joint.logsumexp(1)
    kept = target != -100
    of_target = log_probs.gather(1, target.clamp(min=0).unsqueeze(1)).squeeze(1)
    losses = (smoothing - 1) * of_target - smoothing * log_probs.mean(1)
    return losses.where(kept, 0)


def compare(inputs, target, mixture, softcap=None, smoothing=0.0, **tolerance):
    """Values and gradients of the sum, and of the losses weighted."""
    tolerance = tolerance or EXACT
    leaves = [inputs, *mixture.flatten()]
    objective = Objective(softcap, smoothing)
    expected = naive(inputs, target, mixture, softcap, smoothing)
    losses = mixture_nll(inputs, target, mixture, objective)
    assert_close(losses, expected, **tolerance)
    weights = torch.randn_like(expected)
    loss = mixture_loss(inputs, target, mixture, objective)
    assert_close(loss, expected.sum(), **tolerance)
    for ours, theirs in ((loss, expected.sum()), (losses @ weights, expected @ weights)):
        assert_close(
            torch.autograd.grad(ours, leaves, retain_graph=True),
            torch.autograd.grad(theirs, leaves, retain_graph=True),
            **tolerance,
        )


@pytest.fixture
def small_chunks(monkeypatch):
    """Seven rows of 50 words in float64 at a time: two tokens of three experts."""
    monkeypatch.setattr(dense, "CHUNK_BYTES", 7 * 50 * 8)
    monkeypatch.setattr(dense, "MIN_CHUNK_ROWS", 1)


@pytest.mark.parametrize("softcap", [None, 2.0])
@smoothings
def test_many_chunks_equal_one(small_chunks, softcap, smoothing):
    assert kernel._chunk_tokens(23, 3, 50, torch.float64) == 2
    inputs, target, mixture = problem()
    target[[4, 5, 11]] = -100
    compare(inputs, target, mixture, softcap, smoothing)
    compare(inputs, target, mixture._replace(bias=None), softcap, smoothing)


def test_more_experts_than_rows_of_a_chunk(small_chunks):
    assert kernel._chunk_tokens(5, 9, 50, torch.float64) == 1
    compare(*problem(5, 9))


@pytest.fixture
def accelerator(monkeypatch):
    """The paths of a device that the host does not wait for, run on a CPU."""
    for module in (dense, kernel, workspace):
        monkeypatch.setattr(module, "reads_are_cheap", lambda tensor: False)


@smoothings
def test_an_accelerator_masks_what_it_ignores(accelerator, smoothing):
    inputs, target, mixture = problem()
    target[[0, 5]] = -100
    compare(inputs, target, mixture, None, smoothing)
    expected = mixture_loss(inputs, target, mixture, Objective(None, smoothing))
    leaves = [inputs, *mixture.flatten()]
    wanted = torch.autograd.grad(expected, leaves)
    with torch.no_grad():
        inputs[0], mixture.log_prior[5] = torch.nan, torch.nan
    loss = mixture_loss(inputs, target, mixture, Objective(None, smoothing))
    assert_close(loss, expected)
    assert_close(torch.autograd.grad(loss, leaves), wanted)


@pytest.mark.parametrize("cheap", [True, False])
@smoothings
def test_probabilities_that_underflow(monkeypatch, cheap, smoothing):
    for module in (dense, kernel, workspace):
        monkeypatch.setattr(module, "reads_are_cheap", lambda tensor: cheap)
    inputs, target, mixture = problem(dtype=torch.float32)
    with torch.no_grad():
        mixture.weight.mul_(60)
    assert naive(inputs, target, mixture).max() > 104  # e**-104 is 0 in float32
    exact = [tensor.detach().double() for tensor in (inputs, *mixture)]
    expected = naive(exact[0], target, Mixture(*exact[1:]), None, smoothing)
    losses = mixture_nll(inputs, target, mixture, Objective(None, smoothing))
    assert_close(losses.double(), expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("scaled", [False, True])
@smoothings
def test_fp16_operands_neither_overflow_nor_vanish(scaled, smoothing, monkeypatch):
    """The path of a GPU, whose products of fp16 have float32 sums, and a GradScaler's factor."""
    monkeypatch.setattr(products, "products_widen", lambda tensor: True)
    inputs, target, mixture = problem(150, 2, 16, 3000, torch.float32)
    with torch.no_grad():
        mixture.weight.mul_(0.1)
        mixture.bias.zero_()
    scale = torch.full((150,), 65536.0) if scaled else None
    results = [
        kernel_gradients(inputs, target, scale, mixture, dtype, smoothing)
        for dtype in (torch.float64, torch.float16)
    ]
    for exact, low in zip(*results, strict=True):
        assert low.isfinite().all()
        low = low.double()
        assert (low - exact).norm() <= 4e-3 * exact.norm()
        assert ((low == 0) & (exact != 0)).sum() == 0


def kernel_gradients(inputs, target, scale, mixture, dtype, smoothing, softcap=None):
    """What the pass writes into its buffers."""
    total = dense.accumulation_dtype(dtype)
    leaves = (inputs, *mixture)
    buffers = kernel.MixtureGradients(
        *(torch.full_like(leaf, torch.nan, dtype=total, requires_grad=False) for leaf in leaves)
    )
    with torch.no_grad():
        kernel.mixture_losses(
            inputs, target, scale, mixture, dtype, -100, Objective(softcap, smoothing), buffers
        )
    return buffers


class Allocated(TorchDispatchMode):
    """The largest tensor that any operation makes."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, torch.Tensor) and tensor._base is None:
                self.largest = max(self.largest, tensor.numel())
        return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("softcap", [None, 5.0])
@smoothings
def test_memory_does_not_grow_with_the_number_of_experts(softcap, smoothing, dtype, monkeypatch):
    """No tensor of the pass is larger than a chunk of the logits of one softmax."""
    most = 50 * 2000
    monkeypatch.setattr(dense, "CHUNK_BYTES", most * 4)
    monkeypatch.setattr(dense, "MIN_CHUNK_ROWS", 1)
    found = []
    for experts in (1, 4, 16):
        workspace._buffers.held.clear()
        inputs, target, mixture = problem(100, experts, 4, 2000, dtype)
        with Allocated() as allocated:
            kernel_gradients(
                inputs, target, None, mixture, dtype, smoothing=smoothing, softcap=softcap
            )
        held = sum(buffer.numel() for buffer in workspace._buffers.held.values())
        found.append((allocated.largest, held))
    largest, kept = (torch.tensor(numbers) for numbers in zip(*found, strict=True))
    assert (largest > 100 * 2000 / 8).all()
    assert (largest <= most).all()
    num_buffers = 1 + (softcap is not None) + (smoothing > 0) + (dtype != torch.float32)
    assert (kept <= num_buffers * most).all()


def test_a_head_holds_nothing_beside_the_pass():
    head = MixtureOfSoftmaxes(4, 20_000, num_experts=8)
    hidden, target = torch.randn(60, 4, requires_grad=True), torch.randint(20_000, (60,))
    for reduction in ("mean", "none"):
        with Allocated() as allocated:
            head.loss(hidden, target, reduction=reduction).sum().backward()
        assert allocated.largest <= 20_000 * 4  # the gradient of the output rows
