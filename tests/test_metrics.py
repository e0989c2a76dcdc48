"""Perplexity against the equation, in exact arithmetic and over processes."""

import math
from collections.abc import Sequence
from fractions import Fraction

import pytest
import torch
import torch.multiprocessing as mp
from hypothesis import given
from hypothesis import strategies as st
from torch import distributed as dist
from torch import nn
from torchmetrics import Metric

from lm_softmax.metrics import Perplexity


def exact_nll(log_probs: list[float]) -> float:
    """Mean of the negated values in rational arithmetic."""
    return float(-sum(map(Fraction, log_probs)) / len(log_probs))


@given(st.lists(st.lists(st.floats(-50, 0, width=32), min_size=1, max_size=9), min_size=1))
def test_equals_the_mean_over_all_tokens_whatever_the_batches(batches: list[list[float]]) -> None:
    metric = Perplexity()
    for batch in batches:
        metric.update(torch.tensor(batch))
    expected = exact_nll([value for batch in batches for value in batch])
    assert metric.nll().item() == pytest.approx(expected, rel=1e-12, abs=1e-12)
    assert metric.compute().item() == pytest.approx(math.exp(expected), rel=1e-10)
    assert metric.compute().dtype == torch.float64


@pytest.mark.parametrize("ignore_index", [-100, 0])
def test_ignored_positions_change_nothing(ignore_index: int) -> None:
    log_prob = torch.tensor([[-1.0, -math.inf], [math.nan, -3.0]])
    target = torch.tensor([[5, ignore_index], [ignore_index, 7]])
    metric = Perplexity()
    metric.update(log_prob, target, ignore_index=ignore_index)
    assert metric.count.item() == 2
    assert metric.nll().item() == 2.0


def test_counts_past_what_float32_can() -> None:
    metric = Perplexity()
    metric.update(torch.full((2**24,), -1.0))
    metric.update(torch.tensor([-1.0]))
    assert metric.count.item() == 2**24 + 1
    assert metric.nll().item() == 1.0


def test_half_precision_input_is_summed_in_float64() -> None:
    log_prob = torch.full((5000,), -9.6875, dtype=torch.bfloat16)
    metric = Perplexity()
    metric.update(log_prob)
    assert metric.nll().item() == 9.6875


def test_only_what_float64_cannot_hold_is_infinite() -> None:
    metric = Perplexity()
    metric.update(torch.tensor([-700.0]))
    assert metric.compute().item() == pytest.approx(math.exp(700), rel=1e-12)
    metric.update(torch.tensor([-1000.0, -1000.0]))
    assert metric.nll().item() == 900.0
    assert metric.compute().item() == math.inf


def test_a_target_of_probability_zero_is_infinite() -> None:
    metric = Perplexity()
    metric.update(torch.tensor([-1.0, -math.inf]))
    assert metric.nll().item() == math.inf


def test_nothing_counted_is_nan() -> None:
    metric = Perplexity()
    with pytest.warns(UserWarning, match="before the ``update`` method"):
        assert math.isnan(metric.compute().item())
    metric.update(torch.empty(0))
    metric.update(torch.zeros(3), torch.full((3,), -100))
    assert math.isnan(metric.compute().item())
    assert math.isnan(metric.nll().item())


def test_reset_forgets() -> None:
    metric = Perplexity()
    metric.update(torch.tensor([-5.0]))
    metric.reset()
    metric.update(torch.tensor([-2.0]))
    assert metric.nll().item() == 2.0


def test_usable_in_and_after_inference_mode() -> None:
    metric = Perplexity()
    with torch.inference_mode():
        metric.reset()
        metric.update(torch.tensor([-1.0]))
    metric.update(torch.tensor([-3.0]))
    assert metric.nll().item() == 2.0


def test_keeps_its_precision_inside_a_module_moved_to_another() -> None:
    module = nn.ModuleDict({"linear": nn.Linear(2, 2), "metric": Perplexity()})
    metric = module["metric"]
    assert isinstance(metric, Perplexity)
    metric.update(torch.tensor([-1.0000001], dtype=torch.float64))
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        module.to(dtype)
        assert (metric.nats.dtype, metric.count.dtype) == (torch.float64, torch.int64)
    assert metric.nll().item() == 1.0000001


def test_sums_stay_on_the_cpu_beside_a_module_on_mps(monkeypatch: pytest.MonkeyPatch) -> None:
    moved: list[str] = []

    def move(metric: Metric, fn: object, exclude_state: Sequence[str] = ()) -> None:
        moved.extend(name for name in ("nats", "count") if name not in exclude_state)
        metric._device = torch.device("mps")

    metric = Perplexity()
    metric.update(torch.tensor([-1.0]))
    metric.compute()
    monkeypatch.setattr(Metric, "_apply", move)
    metric.to("mps")
    assert moved == []
    assert metric._computed is None  # a float64 result, which could not have moved either
    assert metric.nats.device.type == metric.count.device.type == "cpu"
    assert metric.nll().item() == 1.0


def test_follows_its_module_to_a_device() -> None:
    metric = Perplexity().to("meta")
    assert metric.nats.device.type == metric.count.device.type == "meta"
    assert metric.nats.dtype == torch.float64


def test_shapes_must_agree() -> None:
    with pytest.raises(ValueError, match=r"log_prob has shape \(2, 3\), target \(3, 2\)"):
        Perplexity().update(torch.zeros(2, 3), torch.zeros(3, 2, dtype=torch.int64))


def test_leaves_no_graph_behind() -> None:
    metric = Perplexity()
    metric.update(torch.zeros(2, requires_grad=True))
    assert not metric.nats.requires_grad


def _rank(rank: int, port_file: str, results: "mp.SimpleQueue[tuple[float, float, float]]") -> None:
    dist.init_process_group("gloo", init_method=f"file://{port_file}", rank=rank, world_size=2)
    try:
        metric = Perplexity()
        metric.update(torch.full((1 + 2 * rank,), -1.0 - rank, dtype=torch.float64))
        nll, perplexity = metric.nll().item(), metric.compute().item()
        metric.update(torch.full((1,), -1.0 - rank))  # the sums are this rank's own again
        results.put((nll, perplexity, metric.nll().item()))
    finally:
        dist.destroy_process_group()


def test_exact_over_two_processes_with_unequal_counts(tmp_path) -> None:
    context = mp.get_context("spawn")
    results = context.SimpleQueue()
    mp.spawn(_rank, args=(str(tmp_path / "rendezvous"), results), nprocs=2)
    expected = (1 * 1.0 + 3 * 2.0) / 4
    after = (2 * 1.0 + 4 * 2.0) / 6
    for nll, perplexity, later in (results.get(), results.get()):
        assert nll == expected
        assert perplexity == math.exp(expected)
        assert later == pytest.approx(after, rel=1e-15)
