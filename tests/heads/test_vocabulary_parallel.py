"""Full and adaptive heads whose words two processes share, against one process with all of them."""

import copy
import itertools
import sys
from functools import partial
from typing import NamedTuple

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from cases import counts_of, randomise
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.testing import assert_close

from lm_softmax.encoders.embedding import look_up
from lm_softmax.heads import AdaptiveSoftmax, FullSoftmax, LowRankSoftmax
from lm_softmax.heads.parallel import shard_parameters, shard_vocabulary
from lm_softmax.kernels import sharded as sharded_kernel
from lm_softmax.kernels import sharded_operations

HIDDEN, TOKENS = 6, 13


class Case(NamedTuple):
    make: object
    vocab_size: int  # odd: the shares differ


def adaptive(cutoffs, **options):
    return partial(AdaptiveSoftmax, cutoffs=cutoffs, tail_sizes=[3] * len(cutoffs), **options)


CASES = {
    "full": Case(FullSoftmax, 11),
    "full-options": Case(
        partial(FullSoftmax, bias=False, softcap=3.0, label_smoothing=0.1, z_loss=0.01), 11
    ),
    "full-one-word": Case(partial(FullSoftmax, label_smoothing=0.1), 1),  # the second has none
    "adaptive": Case(adaptive([3, 8]), 15),
    "adaptive-options": Case(adaptive([4, 7], bias=False, softcap=3.0, z_loss=0.01), 12),
    "adaptive-narrow": Case(adaptive([1, 2, 4]), 5),  # clusters of which the second has no word
    "adaptive-no-clusters": Case(adaptive([]), 7),
}
TOLERANCES = {torch.float32: {}, torch.float64: {"rtol": 1e-10, "atol": 1e-10}}
METHODS = {
    "mean": lambda head, *batch: head.loss(*batch),
    "sum": lambda head, *batch: head.loss(*batch, reduction="sum"),
    "none": lambda head, *batch: head.loss(*batch, reduction="none"),
    "log_prob": lambda head, *batch: head.log_prob(*batch),
    "all": lambda head, hidden, target: head.log_prob(hidden),
}


def problem(case, dtype):
    torch.manual_seed(0)
    whole = randomise(case.make(HIDDEN, case.vocab_size, counts_of(case.vocab_size))).to(dtype)
    hidden = torch.randn(TOKENS, HIDDEN, dtype=dtype)
    target = torch.randint(case.vocab_size, (TOKENS,))
    target[::5] = -100
    return whole, hidden, target


def differentiated(head, method, hidden, target):
    """The value, the gradient of hidden and those of the parameters, of a weighted sum."""
    head.zero_grad()
    hidden = hidden.clone().requires_grad_()
    value = METHODS[method](head, hidden, target)
    generator = torch.Generator().manual_seed(2)
    weights = torch.randn(value.shape, dtype=value.dtype, generator=generator)
    (value * weights).sum().backward()
    of_parameters = {
        name: p.grad.full_tensor() if isinstance(p.grad, DTensor) else p.grad
        for name, p in head.named_parameters()
    }
    return value.detach(), hidden.grad, of_parameters


def check_gradients(name, mesh, dtypes=tuple(TOLERANCES), methods=tuple(METHODS)):
    for dtype, method in itertools.product(dtypes, methods):
        whole, hidden, target = problem(CASES[name], dtype)
        sharded = copy.deepcopy(whole)
        shard_vocabulary(sharded, mesh)
        ignored = hidden.clone()
        ignored[target == -100] = torch.nan if method != "all" else 0
        batches = {"all": target, "empty": target[:0], "ignored": torch.full_like(target, -100)}
        for kind, some in batches.items():
            rows = ignored[: len(some)] if kind == "all" else hidden[: len(some)]
            expected = differentiated(whole, method, rows, some)
            found = differentiated(sharded, method, rows, some)
            place = f"{name}, {dtype}, {method}, {kind}"
            assert_close(
                found,
                expected,
                equal_nan=True,
                msg=lambda m, p=place: f"{p}: {m}",
                **TOLERANCES[dtype],
            )


def check_chunks(name, mesh):
    """Many chunks, the last one smaller."""
    before, sharded_kernel.chunk_rows = sharded_kernel.chunk_rows, lambda *_: 4
    check_gradients(name, mesh, [torch.float64], ["sum", "none"])
    sharded_kernel.chunk_rows = before


def check_without_reads(name, mesh):
    """As on a GPU, where nobody looks at the targets to leave rows out."""
    before, sharded_kernel.reads_are_cheap = sharded_kernel.reads_are_cheap, lambda _: False
    check_gradients(name, mesh, [torch.float64], ["mean", "none"])
    sharded_kernel.reads_are_cheap = before


def check_scaled(name, mesh):
    """fp16 under a GradScaler, whose factor is beyond what fp16 holds, with a GPU's operands."""
    whole, hidden, target = problem(CASES[name], torch.float32)
    sharded = copy.deepcopy(whole)
    shard_vocabulary(sharded, mesh)
    weights = torch.linspace(0.5, 2, TOKENS)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sharded_kernel, "products_widen", lambda _: True)
        patch.setattr(sharded_operations, "product_dtype", lambda *_: torch.float16)
        for reduction, factors in (("sum", weights[0]), ("none", weights), ("none", 0 * weights)):
            gradients = []
            for head in (whole, sharded):
                head.zero_grad()
                own = hidden.clone().requires_grad_()
                loss = head.loss(own, target, reduction=reduction)
                (2.0**17 * factors * loss).sum().backward()
                found = [own.grad, *(p.grad for p in head.parameters())]
                found = [g.full_tensor() if isinstance(g, DTensor) else g for g in found]
                gradients.append([gradient / 2.0**17 for gradient in found])
            assert_close(*gradients, rtol=1e-2, atol=1e-2)


def check_search(name, mesh):
    """Top words and draws; scaled logits make ties and certainties."""
    whole, hidden, _ = problem(CASES[name], torch.float32)
    sharded = copy.deepcopy(whole)
    shard_vocabulary(sharded, mesh)
    zeros = torch.zeros_like(hidden)
    for rows, k in itertools.product((hidden, zeros, 1e4 * hidden, hidden[:0]), (1, 3, 99)):
        k = min(k, CASES[name].vocab_size)
        assert_close(sharded.topk(rows, k).log_probs, whole.topk(rows, k).log_probs)
        if rows is not zeros:
            assert (sharded.topk(rows, k).indices == whole.topk(rows, k).indices).all()
    with torch.no_grad():
        for parameter in [*whole.parameters(), *sharded.parameters()]:
            parameter.zero_()
    if name.startswith("full"):  # all words tie
        for k in {1, CASES[name].vocab_size}:
            assert (sharded.topk(zeros, k).indices == torch.arange(k)).all()


def check_draws(name, mesh):
    whole, hidden, _ = problem(CASES[name], torch.float32)
    sharded = copy.deepcopy(whole)
    shard_vocabulary(sharded, mesh)
    torch.manual_seed(3 + mesh.get_local_rank())  # the first process's numbers are taken
    row, num = hidden[:1], 4000
    log_probs = whole.log_prob(row)[0].double()
    for options in (
        {},
        {"temperature": 0.5},
        {"top_k": 4},
        {"top_p": 0.7},
        {"top_k": 6, "top_p": 0.6, "temperature": 2.0},
    ):
        if "top_k" in options:
            options["top_k"] = min(options["top_k"], len(log_probs))
        top_k, top_p = options.get("top_k"), options.get("top_p", 1.0)
        p = torch.softmax(log_probs / options.get("temperature", 1.0), -1)
        order = p.argsort(descending=True)
        p[order[top_k or len(p) :]] = 0
        p = p / p.sum()
        before = p[order].cumsum(0) - p[order]
        p[order[before >= top_p]] = 0
        p = p / p.sum()
        drawn = sharded.sample(row, num, **options)
        assert drawn.shape == (1, num)
        both = [torch.empty_like(drawn) for _ in range(2)]
        dist.all_gather(both, drawn)
        assert (both[0] == both[1]).all()
        frequency = torch.bincount(drawn[0], minlength=len(p)) / num
        assert (frequency[p == 0] == 0).all(), options
        assert ((frequency - p).abs() < 5 * (p * (1 - p) / num).sqrt() + 1e-9).all(), options
    greedy = sharded.sample(hidden, 2, temperature=0)
    assert (greedy == whole.topk(hidden, 1).indices).all()
    assert sharded.sample(hidden[:0], 2).shape == (0, 2)


def check_low_precision(name, mesh):
    """bf16 under autocast: no worse than one process, both against float64."""
    whole, hidden, target = problem(CASES[name], torch.float32)
    sharded = copy.deepcopy(whole)
    shard_vocabulary(sharded, mesh)
    exact, of_hidden, _ = differentiated(
        copy.deepcopy(whole).double(), "sum", hidden.double(), target
    )
    with torch.autocast("cpu", torch.bfloat16):
        one, one_hidden, _ = differentiated(whole, "sum", hidden, target)
        two, two_hidden, _ = differentiated(sharded, "sum", hidden, target)
    assert two.dtype == torch.float32
    assert (two - exact).abs() <= (one - exact).abs() * 1.5 + 1e-3
    error = (two_hidden - of_hidden).abs().max()
    assert error <= (one_hidden - of_hidden).abs().max() * 1.5 + 1e-3


def check_memory_and_errors(name, mesh):
    whole, hidden, target = problem(CASES[name], torch.float32)
    sharded = copy.deepcopy(whole)
    shard_vocabulary(sharded, mesh)
    rank = mesh.get_local_rank()
    for part, parameter in sharded.named_parameters():
        rows = parameter.shape[0]
        most = -(-rows // 2)
        shares = (most, rows - most)[rank], rows
        is_small = part.startswith(("projections", "cluster_weight"))
        is_small |= part == "bias" and bool(getattr(whole, "cutoffs", ()))
        assert parameter.to_local().shape[0] == shares[is_small], part
        assert parameter.to_local().untyped_storage().nbytes() <= 4 * parameter.to_local().numel()
    assert list(sharded.state_dict()) == list(whole.state_dict())
    with pytest.raises(ValueError, match="already"):
        shard_vocabulary(sharded, mesh)
    with pytest.raises(ValueError, match="tie it before"):
        sharded.tie_weight(torch.nn.Embedding(3, 3))
    with pytest.raises(ValueError, match="in \\[1, vocab_size="):
        sharded.topk(hidden, 0)
    with pytest.raises(ValueError, match="nan"):
        sharded.sample(hidden * torch.nan)
    loss = sharded.loss(hidden.requires_grad_(), target)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(loss, hidden, create_graph=True)
    loss = sharded.loss(hidden, target)
    first = torch.autograd.grad(loss, hidden, retain_graph=True)
    assert_close(torch.autograd.grad(loss, hidden), first)  # a second backward is right


def check_meta(name, mesh):
    """Without values: rows of its own in each process, and the same of what both hold."""
    sizes = HIDDEN, CASES[name].vocab_size
    counts = counts_of(sizes[1])
    with torch.device("meta"):
        head = CASES[name].make(*sizes, counts)
    shard_vocabulary(head, mesh, counts=counts)
    made = CASES[name].make(*sizes, counts)
    for part, parameter in head.named_parameters():
        value, expected = parameter.full_tensor(), made.get_parameter(part)
        both = [torch.empty_like(value) for _ in range(2)]
        dist.all_gather(both, value)
        assert (both[0] == both[1]).all(), part
        if value.ndim == 1:
            assert_close(value, expected, msg=part)
            continue
        assert value.shape == expected.shape
        assert value.abs().max() <= value.shape[1] ** -0.5, part
        assert len(value.unique()) == value.numel(), part  # no process draws another's
    assert_close(head.log_prob(torch.zeros(1, HIDDEN)), made.log_prob(torch.zeros(1, HIDDEN)))


def check_look_up(mesh):
    """Rows of a table that is dealt, also of one that the second process has nothing of."""
    for num_rows in (1, 5, 6):
        whole = torch.nn.Embedding(num_rows, 3)
        dealt = copy.deepcopy(whole)
        shard_parameters(dealt, mesh, ("weight",), tied={})
        ids = torch.tensor([[0, num_rows - 1, 0], [num_rows // 2, 0, 0]])
        slope = torch.arange(18.0).view(2, 3, 3)
        for table in (whole, dealt):
            (look_up(table.weight, ids) * slope).sum().backward()
        assert_close(look_up(dealt.weight, ids), whole(ids))
        assert_close(dealt.weight.grad.full_tensor(), whole.weight.grad)
        assert look_up(dealt.weight, ids[:0]).shape == (0, 3, 3)
        for wrong in (-1, num_rows):
            with pytest.raises(IndexError, match=f"in \\[0, {num_rows}\\)"):
                look_up(dealt.weight, torch.tensor([wrong]))


CHECKS = [
    check_meta,
    check_gradients,
    check_chunks,
    check_without_reads,
    check_scaled,
    check_search,
    check_draws,
    check_low_precision,
    check_memory_and_errors,
]


def check_all(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,))
    for check, name in itertools.product(CHECKS, CASES):
        try:
            check(name, mesh)
        except Exception as error:
            raise AssertionError(f"{check.__name__}({name}): {error}") from error
    check_look_up(mesh)
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.skipif(sys.platform == "win32", reason="gloo's file store needs POSIX paths")
def test_two_processes_equal_one(tmp_path):
    mp.spawn(check_all, args=(tmp_path,), nprocs=2)


def test_which_heads_can_is_said():
    message = "LowRankSoftmax cannot share its words .* FullSoftmax and AdaptiveSoftmax can"
    with pytest.raises(ValueError, match=message):
        shard_vocabulary(LowRankSoftmax(4, 8, rank=2), None)
