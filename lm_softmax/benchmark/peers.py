"""Other ways to compute the same losses: torch's own, and those of packages that are installed."""

import importlib
import inspect
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lm_softmax.benchmark.contestants import Contestant, Entry, Kind, Loss
from lm_softmax.benchmark.problem import Problem
from lm_softmax.heads import AdaptiveSoftmax, FullSoftmax, OutputHead
from lm_softmax.specs import Spec

PLAIN, PLAIN_FLOAT = "plain full softmax", "plain full softmax, float32 logits"
CHUNKED, COMPILED = "torch linear_cross_entropy", "compiled full softmax"
LIGER, CCE = "Liger", "Cut Cross-Entropy"
INSTALL = 'not installed: pip install "lm_softmax[peers]"'
FULL = Spec("FullSoftmax")
FullLoss = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]


def plain(hidden: Tensor, target: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The standard softmax."""
    return F.cross_entropy(F.linear(hidden, weight, bias), target)


def plain_float(hidden: Tensor, target: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The standard softmax, its logits widened before the loss as training code does."""
    return F.cross_entropy(F.linear(hidden, weight, bias).float(), target)


def full_peers(
    problem: Problem, weights: Callable[[], OutputHead], *, bias: bool
) -> tuple[list[Entry], dict[str, str]]:
    """The standard softmax and its faster forms.

    Args:
        problem: Device and dtype decide who takes part.
        weights: Makes the `FullSoftmax` whose weights they share.
        bias: Whether it has biases.

    Returns:
        Entries, and by name why a peer is not among them.
    """
    found: list[Entry] = []
    absent: dict[str, str] = {}

    def add(name: str, what: str, loss: FullLoss | str, kind: Kind = "peer") -> None:
        if isinstance(loss, str):
            absent[name] = loss
        else:
            found.append(Entry(name, kind, "full", what, FULL, weights, _of_full(loss)))

    add(PLAIN, "F.cross_entropy(F.linear(hidden, weight, bias), target)", plain, "standard")
    on_gpu = problem.device.startswith("cuda")
    if problem.torch_dtype.itemsize < 4:
        what = "F.cross_entropy(F.linear(hidden, weight, bias).float(), target)"
        add(PLAIN_FLOAT, what, plain_float)
    add(CHUNKED, "F.linear_cross_entropy with its chunks as by default", _chunked())
    add(COMPILED, "torch.compile of the plain one", compiled if on_gpu else "needs CUDA")
    add(LIGER, "liger_kernel's LigerFusedLinearCrossEntropyLoss()", _liger(on_gpu))
    add(CCE, "cut_cross_entropy.linear_cross_entropy as by default", _cce(on_gpu, bias))
    return found, absent


def adaptive_peers(
    outline: AdaptiveSoftmax, group: str, spec: Spec, weights: Callable[[], OutputHead]
) -> list[Entry]:
    """Torch's adaptive softmax with the same clusters, widths and weights.

    Args:
        outline: An adaptive head with these clusters.
        group: Theirs.
        spec: Of that head.
        weights: Makes the head whose weights are copied.
    """
    name = f"torch adaptive {structure_name(spec)}"
    what = f"nn.AdaptiveLogSoftmaxWithLoss, cutoffs {outline.cutoffs}, widths {outline.tail_sizes}"
    return [Entry(name, "peer", group, what, spec, weights, torch_adaptive)]


def structure_name(spec: Spec) -> str:
    """Cutoffs where they say all, else the head itself, the same for each vocabulary."""
    given = {name: value for name, value in spec.options.items() if name != "bias"}
    cutoffs = given.pop("cutoffs", "auto")
    return f"of {spec}" if given or isinstance(cutoffs, str) else str(list(cutoffs))


def torch_adaptive(head: AdaptiveSoftmax, inputs: tuple[Tensor, Tensor]) -> Contestant:
    """Torch's adaptive softmax with a head's weights; those of its tails' biases are left out."""
    module = nn.AdaptiveLogSoftmaxWithLoss(
        head.hidden_size, head.vocab_size, head.cutoffs, 1.0, head.bias is not None, device="meta"
    )
    assert head.cluster_weight is not None
    with torch.no_grad():
        module.head.weight = nn.Parameter(torch.cat([head.weight, head.cluster_weight]))
        if head.bias is not None:
            module.head.bias = nn.Parameter(head.bias.clone())
        pairs = zip(head.projections, head.tail_weights, strict=True)
        for i, (projection, weight) in enumerate(pairs):
            module.tail[i] = nn.Sequential(_linear(projection), _linear(weight))

    def loss(hidden: Tensor, target: Tensor) -> Tensor:
        result: Tensor = module(hidden, target).loss
        return result

    return Loss(loss, list(module.parameters()), inputs)


def _linear(weight: Tensor) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    layer.weight = nn.Parameter(weight.detach().clone())
    return layer


def _of_full(loss: FullLoss) -> Callable[[FullSoftmax, tuple[Tensor, Tensor]], Contestant]:
    def make(head: FullSoftmax, inputs: tuple[Tensor, Tensor]) -> Contestant:
        return Loss(
            lambda hidden, target: loss(hidden, target, head.weight, head.bias),
            list(head.parameters()),
            inputs,
        )

    return make


def _chunked() -> FullLoss | str:
    """Torch's chunked form; without its options it is the plain one."""
    function: Any = getattr(F, "linear_cross_entropy", None)
    options: Any = getattr(nn, "LinearCrossEntropyOptions", None)
    if function is None or options is None:
        return f"torch {torch.__version__} has none, it came with 2.13"

    def loss(hidden: Tensor, target: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        result: Tensor = function(hidden, weight, target, linear_bias=bias, options=options())
        return result

    return loss


@cache
def _compile() -> FullLoss:
    function: FullLoss = torch.compile(plain, dynamic=False)
    return function


def compiled(hidden: Tensor, target: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The standard softmax, compiled at the first call."""
    return _compile()(hidden, target, weight, bias)


def _liger(on_gpu: bool) -> FullLoss | str:
    if not on_gpu:
        return "needs CUDA"
    try:
        module = importlib.import_module("liger_kernel.transformers.fused_linear_cross_entropy")
    except ImportError as error:
        return INSTALL if _is_missing(error, "liger_kernel") else f"cannot be imported: {error}"
    fused = module.LigerFusedLinearCrossEntropyLoss()

    def loss(hidden: Tensor, target: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        result: Tensor = fused(weight, hidden, target, bias)
        return result

    return loss


def _cce(on_gpu: bool, bias: bool) -> FullLoss | str:
    if not on_gpu:
        return "needs CUDA"
    try:
        function = importlib.import_module("cut_cross_entropy").linear_cross_entropy
    except ImportError as error:
        missing = _is_missing(error, "cut_cross_entropy")
        return INSTALL if missing else f"cannot be imported: {error}"
    takes_bias = "bias" in inspect.signature(function).parameters
    if bias and not takes_bias:
        return "the version installed takes no bias: compare with --no-bias"

    def loss(hidden: Tensor, target: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        options = {} if bias is None else {"bias": bias}
        result: Tensor = function(hidden, weight, target, **options)
        return result

    return loss


def _is_missing(error: ImportError, package: str) -> bool:
    return isinstance(error, ModuleNotFoundError) and error.name == package
