"""The Triton kernel against its equation in float64, in Triton's interpreter where no GPU is."""

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from lm_softmax.heads import AdaptiveSoftmax, FullSoftmax
from lm_softmax.kernels import Objective, clusters, dense, dense_pass, products, workspace

pytest.importorskip("triton", reason="the kernel needs Triton")

from lm_softmax.kernels import softmax_triton
from lm_softmax.kernels.softmax_triton import softmax_losses

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CUT_OFF = [torch.bfloat16] if DEVICE == "cpu" else []  # digits of it, by the interpreter alone
OPTIONS = [
    Objective(),
    Objective(softcap=3.0),
    Objective(label_smoothing=0.1),
    Objective(z_loss=0.01),
    Objective(softcap=3.0, label_smoothing=0.2, z_loss=0.02),
]


def equation(logits, target, objective, bias=None, scale=None):
    """Losses, and the derivative of `sum(scale * loss)` by the logits, in float64."""
    raw = logits.double().requires_grad_()
    softcap, smoothing, z_loss = objective
    values = raw if bias is None else raw + bias.double()
    values = values if softcap is None else softcap * torch.tanh(values / softcap)
    losses = F.cross_entropy(values, target, label_smoothing=smoothing, reduction="none")
    losses = losses + z_loss * values.logsumexp(1).square()
    total = losses.sum() if scale is None else (scale.double() * losses).sum()
    (derivative,) = torch.autograd.grad(total, raw)
    return losses.detach(), derivative


def problem(num_rows, vocab_size, factor=2.0):
    logits = torch.randn(num_rows, vocab_size, device=DEVICE) * factor
    return logits, torch.randint(vocab_size, (num_rows,), device=DEVICE)


def compare(logits, target, objective=OPTIONS[0], bias=None, scale=None):
    expected, slope = equation(logits, target, objective, bias, scale)
    derivative = torch.full_like(logits, torch.nan)
    options = {"scale": scale, "derivative": derivative}
    losses = softmax_losses(logits, bias, target, objective, **options)
    assert losses.dtype == torch.float32
    assert_close(losses, expected.float())
    assert_close(derivative, slope.float())
    assert_close(softmax_losses(logits, bias, target, objective), losses, rtol=0, atol=0)


@pytest.fixture
def narrow(monkeypatch):
    """128 columns of a row at once, so that few words are many sweeps."""
    monkeypatch.setattr(softmax_triton, "MOST_COLUMNS", 128)


@pytest.mark.parametrize("vocab_size", [1, 2, 127, 128, 129, 300, 512])
@pytest.mark.parametrize("objective", OPTIONS)
def test_equals_the_equation(narrow, vocab_size, objective):
    logits, target = problem(3, vocab_size)
    target[0], target[-1] = vocab_size - 1, 0  # in the part of the row that is masked, and not
    compare(logits, target, objective)


@pytest.mark.parametrize("vocab_size", [4095, 4096, 9000])
def test_wide_rows(vocab_size):
    compare(*problem(2, vocab_size), OPTIONS[-1])


@settings(max_examples=12, deadline=None)
@given(
    num_rows=st.integers(0, 2),
    vocab_size=st.integers(1, 400),
    objective=st.sampled_from(OPTIONS),
    bias_dtype=st.sampled_from([None, torch.float32, torch.bfloat16]),
    is_scaled=st.booleans(),
    factor=st.sampled_from([0.01, 1.0, 30.0]),
)
def test_any_shape_and_options(num_rows, vocab_size, objective, bias_dtype, is_scaled, factor):
    logits, target = problem(num_rows, vocab_size, factor)
    bias = None if bias_dtype is None else torch.randn(vocab_size, device=DEVICE).to(bias_dtype)
    scale = torch.rand(num_rows, device=DEVICE) * 3 if is_scaled else None
    compare(logits, target, objective, bias, scale)


@pytest.mark.parametrize("place", ["first", "middle", "last"])
def test_extreme_logits(narrow, place):
    """Differences of 2e4 between words, targets of all and of no probability, nothing infinite."""
    logits, _ = problem(4, 300)
    at = {"first": 0, "middle": 150, "last": 299}[place]
    logits[0, at], logits[1, at] = 1e4, -1e4
    logits[2] += 1e4
    logits[3] = torch.linspace(-1e4, 1e4, 300)
    for target in (at, 299 - at, 7):
        compare(logits, torch.full((4,), target, device=DEVICE))
    compare(logits, torch.full((4,), at, device=DEVICE), OPTIONS[2])
    compare(logits, torch.full((4,), at, device=DEVICE), OPTIONS[1])


def test_confident_words_are_as_exact_as_the_chain_of_operations():
    logits, target = problem(16, 50)
    logits[torch.arange(16), target] = torch.linspace(0, 30, 16, device=DEVICE)
    expected, _ = equation(logits, target, OPTIONS[0])
    error = (softmax_losses(logits, None, target, OPTIONS[0]) - expected).abs().max()
    naive = (F.cross_entropy(logits, target, reduction="none") - expected).abs().max()
    assert error <= max(naive, torch.finfo(torch.float32).eps)


def test_masked_words_take_no_part():
    """Logits of -inf, as a mask sets them."""
    logits, target = problem(3, 300)
    logits[:, 100:] = -torch.inf
    logits[0, 0] = -torch.inf
    target %= 100
    target[0] = 5
    compare(logits, target)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # of numpy, which interprets
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("at", [0, 127, 299])
def test_what_is_no_number_is_seen(narrow, bad, at):
    logits, target = problem(2, 300)
    logits[0, at] = bad
    losses = softmax_losses(logits, None, target, OPTIONS[0])
    assert losses.isnan().tolist() == [True, False]


@pytest.mark.parametrize("wrong", [-1, 300, 2**40])
def test_targets_out_of_range_give_nan(wrong):
    logits, target = problem(2, 300)
    target[0] = wrong
    bias = torch.zeros(300, device=DEVICE)
    assert softmax_losses(logits, bias, target, OPTIONS[0]).isnan().tolist() == [True, False]


def test_a_derivative_over_the_logits(narrow):
    logits, target = problem(5, 300)
    expected, slope = equation(logits, target, OPTIONS[-1])
    losses = softmax_losses(logits, None, target, OPTIONS[-1], derivative=logits)
    assert_close(losses, expected.float())
    assert_close(logits, slope.float())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_derivative_of_low_precision_is_rounded_once(dtype):
    logits, target = problem(5, 300)
    target[:] = 3
    exact, rounded = torch.empty_like(logits), torch.empty_like(logits, dtype=dtype)
    softmax_losses(logits, None, target, OPTIONS[0], derivative=exact, gain=256.0)
    softmax_losses(logits, None, target, OPTIONS[0], derivative=rounded, gain=256.0)
    rtol = torch.finfo(dtype).eps if dtype in CUT_OFF else 0
    assert_close(rounded, exact.to(dtype), rtol=rtol, atol=0)
    assert_close(exact / 256, equation(logits, target, OPTIONS[0])[1].float())


def test_rows_may_lie_apart(narrow):
    """Padded rows, and a weight of the rows that is one number in memory."""
    held, out = (torch.full((4, 320), torch.nan, device=DEVICE) for _ in range(2))
    logits, target = problem(4, 300)
    held[:, :300] = logits
    scale = torch.full((1,), 0.5, device=DEVICE).expand(4)
    expected, slope = equation(logits, target, OPTIONS[0], scale=scale)
    options = {"scale": scale, "derivative": out[:, :300]}
    losses = softmax_losses(
        held[:, :300], None, target.repeat_interleave(2)[::2], OPTIONS[0], **options
    )
    assert_close(losses, expected.float())
    assert_close(out[:, :300], slope.float())
    assert out[:, 300:].isnan().all()  # nothing is written past the end of a row


@pytest.fixture
def fused(monkeypatch):
    """A device with the kernel, run on a CPU."""
    if DEVICE == "cuda":
        pytest.skip("no interpreter here, and heads on a GPU take the kernel by themselves")
    calls = []

    def counted(*arguments, **options):
        calls.append(arguments[0].shape)
        return softmax_losses(*arguments, **options)

    for module in (dense, dense_pass, clusters, workspace):
        monkeypatch.setattr(module, "reads_are_cheap", lambda like: False)
    monkeypatch.setattr(dense, "fuses", lambda like: True)
    monkeypatch.setattr(softmax_triton, "softmax_losses", counted)
    return calls


HEADS = [
    lambda **options: FullSoftmax(6, 90, **options),
    lambda **options: AdaptiveSoftmax(6, 90, cutoffs=[20, 50], **options),
]
HEAD_OPTIONS = [
    {"softcap": 4.0, "z_loss": 0.01, "bias": True},
    {"bias": False},
]


def step(head, hidden, target, reduction="mean"):
    loss = head.loss(hidden, target, reduction=reduction)
    total = loss if loss.dim() == 0 else (loss * torch.linspace(0, 2, loss.numel())).sum()
    return loss.detach(), torch.autograd.grad(total, [hidden, *head.parameters()])


@pytest.mark.parametrize("make", HEADS, ids=["full", "adaptive"])
@pytest.mark.parametrize("options", HEAD_OPTIONS, ids=str)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_whole_heads_compute_the_same(make, options, reduction, request, monkeypatch):
    """In several chunks; with and without gradients."""
    monkeypatch.setattr(dense, "CHUNK_BYTES", 3 * 90 * 4)
    monkeypatch.setattr(dense, "MIN_CHUNK_ROWS", 1)
    head = make(**options)
    hidden = (torch.randn(9, 6) * 3).requires_grad_()
    target = torch.randint(90, (9,))
    target[[3, 7]] = -100
    expected = step(head, hidden, target, reduction)
    calls = request.getfixturevalue("fused")
    found = step(head, hidden, target, reduction)
    assert len(calls) >= 2
    assert_close(found, expected)
    with torch.no_grad():
        assert_close(head.loss(hidden, target, reduction=reduction), expected[0])
    double = head.double()
    calls.clear()
    step(double, hidden.double().detach().requires_grad_(), target, reduction)
    assert not calls  # float64 has no kernel


@pytest.mark.parametrize("make", HEADS, ids=["full", "adaptive"])
def test_low_precision_is_no_worse_than_the_chain_of_operations(make, request, monkeypatch):
    """As on a GPU: operands of low precision, sums in float32.

    The interpreter cuts bfloat16 off, which biases sums; it rounds float16.
    """
    dtype = torch.float16
    monkeypatch.setattr(products, "products_widen", lambda like: True)
    monkeypatch.setattr(dense_pass, "reads_are_cheap", lambda like: False)
    monkeypatch.setattr(dense, "product_dtype", lambda hidden, weight: dtype)
    monkeypatch.setattr("lm_softmax.kernels.operations.product_dtype", lambda *_: dtype)
    head = make(bias=True)
    hidden = torch.randn(16, 6, dtype=dtype).requires_grad_()
    target = torch.randint(90, (16,))
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.copy_(parameter.to(dtype))
    chain = step(head, hidden, target)
    calls = request.getfixturevalue("fused")
    kernel = step(head, hidden, target)
    assert calls
    monkeypatch.undo()
    exact = step(head.double(), hidden.detach().double().requires_grad_(), target)
    for found, other, wanted in zip(*((a, *b) for a, b in (kernel, chain, exact)), strict=True):
        error, of_chain = ((x.double() - wanted).norm() for x in (found, other))
        assert error <= 1.05 * of_chain + 1e-6 * wanted.norm()


def test_the_host_waits_at_most_once_a_step(fused, monkeypatch):
    """For the sizes of the clusters; never for a full softmax."""
    waits = []

    def counting(name, function):
        def wrapper(*arguments, **options):
            waits.append(name)
            return function(*arguments, **options)

        return wrapper

    for name in ("tolist", "item", "__bool__", "__int__", "__float__", "nonzero", "cpu", "unique"):
        monkeypatch.setattr(torch.Tensor, name, counting(name, getattr(torch.Tensor, name)))
    for name in ("tensor", "nonzero", "unique", "masked_select"):
        monkeypatch.setattr(torch, name, counting(name, getattr(torch, name)))
    hidden, target = torch.randn(9, 4), torch.randint(30, (9,))
    for cutoffs, most in (([], []), ([10, 20], ["tolist"])):
        head = AdaptiveSoftmax(4, 30, cutoffs=cutoffs).clusters()
        buffers = [torch.empty_like(tensor) for tensor in (hidden, *head.flatten())]
        waits.clear()
        arguments = head, torch.float32, -100, Objective(), buffers
        with torch.no_grad():
            clusters.clustered_losses(hidden, target, None, *arguments)
        assert [name for name in waits if name != "__bool__"] == most


COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from lm_softmax.kernels.softmax_triton import _rows

names = list(_rows.arg_names)
types = {"target": "*i64", "stride": "i64", "derivative_stride": "i64", "vocab_size": "i32"}
def build(bias, scale, derivative, softcap, smoothing, z_loss, columns, warps):
    constants = {"SOFTCAP": softcap, "SMOOTHING": smoothing, "Z_LOSS": z_loss, "GAIN": 1.0}
    constants["COLUMNS"] = columns
    given = {"bias": bias, "scale": scale, "derivative": derivative}
    constants |= {name: None for name, type_ in given.items() if type_ is None}
    signature = {
        name: "constexpr" if name in constants else given.get(name) or types.get(name, "*fp32")
        for name in names
    }
    wide = [n for n in names if n not in constants and n not in ("vocab_size",)]
    source = ASTSource(
        _rows,
        signature,
        {(names.index(name),): value for name, value in constants.items()},
        {(names.index(name),): [["tt.divisibility", 16]] for name in wide},
    )
    return triton.compile(source, GPUTarget("cuda", 90, 32), {"num_warps": warps}).asm["ptx"]

plain = build(None, "*fp32", "*bf16", None, 0.0, 0.0, 4096, 16)
assert "cvt.rn.bf16" in plain, "derivatives are not rounded to the nearest"
assert "ld.global.v4.b32" in plain, "logits are not read 16 bytes at once"
assert "st.global.v4.b32" in plain, "derivatives are not written 16 bytes at once"
build("*bf16", None, "*fp32", 30.0, 0.1, 0.01, 4096, 16)
"""


def test_compiles_for_a_gpu(tmp_path):
    """For Hopper, whether there is one or not, with wide reads and writes where rows are aligned.

    In a process of its own: this one may have loaded Triton as an interpreter.
    """
    environment = {"TRITON_CACHE_DIR": str(tmp_path), "PATH": "", "PYTHONPATH": ":".join(sys.path)}
    result = subprocess.run(
        [sys.executable, "-c", COMPILE], capture_output=True, text=True, env=environment
    )
    assert result.returncode == 0, result.stderr[-2000:]
