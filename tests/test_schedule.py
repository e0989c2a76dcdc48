"""The learning rate of every step follows the documented equation."""

import math
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.optim.lr_scheduler import CosineAnnealingLR

from lm_softmax.schedule import WarmupDecay


def sgd(lr=0.5):
    return torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=lr)


def rates(schedule, steps):
    """Learning rates of the first `steps` optimizer steps."""
    found = []
    for _ in range(steps):
        found.append(schedule.optimizer.param_groups[0]["lr"])
        schedule.optimizer.step()
        schedule.step()
    return found


@settings(deadline=None)
@given(
    total=st.integers(1, 60),
    warmup=st.floats(0, 0.9),
    final=st.floats(0, 1),
    shape=st.sampled_from(["cosine", "linear"]),
)
def test_follows_the_equation(total, warmup, final, shape):
    w = round(warmup * total)
    expected = []
    for t in range(total + 5):
        if t < w:
            expected.append(0.5 * (t + 1) / (w + 1))
            continue
        x = min(1.0, (t - w) / (total - w)) if w < total else 1.0
        decay = 0.5 * (1 + math.cos(math.pi * x)) if shape == "cosine" else 1 - x
        expected.append(0.5 * (final + (1 - final) * decay))
    if w == total:
        with pytest.raises(ValueError, match=f"a warm-up of {w} steps does not fit into {total}"):
            WarmupDecay(sgd(), total, warmup=warmup, shape=shape, final=final)
        return
    schedule = WarmupDecay(sgd(), total, warmup=warmup, shape=shape, final=final)
    assert rates(schedule, total + 5) == pytest.approx(expected, abs=1e-12)


def test_without_warmup_cosine_is_torchs():
    expected = rates(CosineAnnealingLR(sgd(), 20, eta_min=0.05), 20)
    assert rates(WarmupDecay(sgd(), 20, warmup=0, final=0.1), 20) == pytest.approx(expected)


def test_whole_numbers_are_steps():
    assert rates(WarmupDecay(sgd(1.0), 10, warmup=4), 5) == pytest.approx([0.2, 0.4, 0.6, 0.8, 1])


def test_a_resumed_run_follows_the_new_length():
    first = WarmupDecay(sgd(1.0), 10, warmup=0, shape="linear")
    rates(first, 5)
    second = WarmupDecay(sgd(1.0), 20, warmup=0, shape="linear")
    second.load_state_dict(first.state_dict())
    second.step()
    assert second.get_last_lr() == pytest.approx([1 - 6 / 20])


@pytest.mark.parametrize(
    ("total", "options", "message"),
    [
        (math.inf, {}, "set trainer.max_steps or trainer.max_epochs"),
        (-1, {}, "set trainer.max_steps or trainer.max_epochs"),
        (0, {}, "total_steps must be at least 1, got 0"),
        (10, {"warmup": -0.5}, "warmup must be a share in [0, 1) or a number of steps, got -0.5"),
        *(
            (10, {"warmup": float(wild)}, f"a share in [0, 1) or a number of steps, got {wild}")
            for wild in ("inf", "nan")
        ),
        (10, {"warmup": 2.5}, "warmup must be a share in [0, 1) or a number of steps, got 2.5"),
        (10, {"warmup": 10}, "a warm-up of 10 steps does not fit into 10 steps"),
        (10, {"final": 1.5}, "final must be in [0, 1], a share of the learning rate, got 1.5"),
        (10, {"shape": "step"}, 'shape must be "cosine" or "linear", got \'step\''),
    ],
)
def test_refuses_impossible_options(total, options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        WarmupDecay(sgd(), total, **options)
