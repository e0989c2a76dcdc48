"""Words of a large cluster drawn by rejection: the distribution, what is kept, when it is left."""

import gc
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from cases import adaptive
from test_contract import chi_square
from test_sampling import fits, problem
from torch import nn
from torch.testing import assert_close

from lm_softmax.heads import AdaptiveSoftmax
from lm_softmax.kernels import kept, tail_draws, two_stage

NUM_WORDS, WIDTH = 400, 5


@pytest.fixture(autouse=True)
def _of_any_size(monkeypatch):
    monkeypatch.setattr(tail_draws, "MIN_WORDS", 1)
    monkeypatch.setattr(tail_draws, "MOST_VALUES", 10**10)


def cluster(scale=0.2, dtype=torch.float64):
    torch.manual_seed(5)
    weight = torch.randn(NUM_WORDS, WIDTH, dtype=dtype) * scale
    bias = torch.randn(NUM_WORDS, dtype=dtype)
    return nn.Parameter(weight + 1), nn.Parameter(bias)  # rows that are not centred


@torch.no_grad()
def rejected(rows, row, weight, bias, seed=0):
    return tail_draws.draw_by_rejection(
        rows, row, weight, bias, torch.Generator().manual_seed(seed)
    )


def few_proposals(monkeypatch):
    """So that some draws are left without a word."""
    monkeypatch.setattr(tail_draws, "LOG_MISSED", 0.01)


@pytest.mark.parametrize("width", [1, WIDTH])  # of one number: the bound is reached
@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("few", [True, False])
def test_accepted_words_have_the_distribution_of_the_cluster(width, with_bias, few, monkeypatch):
    if few:
        few_proposals(monkeypatch)
    weight, bias = cluster()
    spread = torch.linspace(0, 3, NUM_WORDS).unsqueeze(1)
    weight = nn.Parameter((1 + (weight.detach() - 1) * spread)[:, :width].clone())
    bias = bias if with_bias else None
    rows = torch.tensor([0.9, 0.4, -0.7], dtype=torch.float64).unsqueeze(1)
    rows = rows * torch.ones(width) / width**0.5
    row = torch.arange(3).repeat(100_000)
    found = rejected(rows, row, weight, bias)
    missed = (found < 0).double().mean()
    assert missed > 0.1 if few else missed < 0.01
    for index in range(3):
        drawn = found[(row == index) & (found >= 0)]
        expected = F.linear(rows[index], weight, bias).softmax(0)
        assert chi_square(drawn, expected) > 1e-4


def test_as_many_are_accepted_as_is_promised():
    weight, bias = cluster()
    rows = torch.randn(1, WIDTH, dtype=torch.float64)
    row = torch.zeros(5000, dtype=torch.int64)
    missed = (rejected(rows, row, weight, bias) < 0).double().mean()
    assert missed < 3 * torch.exp(torch.tensor(-tail_draws.LOG_MISSED))


@pytest.mark.parametrize("few", [True, False])
@pytest.mark.parametrize("make", [adaptive(0.2, 0.5), adaptive(0.1, 0.2)])
def test_draws_of_a_head_have_its_distribution(make, few, monkeypatch):
    shares = []
    by_rejection = two_stage.draw_by_rejection

    def count(*arguments):
        found = by_rejection(*arguments)
        shares.append((found < 0).double().mean())
        return found

    monkeypatch.setattr(two_stage, "draw_by_rejection", count)
    if few:
        few_proposals(monkeypatch)
    head, hidden = problem(make, scale=0.2)
    assert fits(head, hidden)
    missed = torch.stack(shares).mean()
    assert missed > 0.1 if few else missed < 0.01


def test_one_row_at_a_time():
    head, hidden = problem(adaptive(0.1, 0.2), vocab_size=60)
    generator = torch.Generator().manual_seed(1)
    drawn = torch.cat([head.sample(hidden[:1], generator=generator) for _ in range(4000)])
    assert chi_square(drawn, head.log_prob(hidden[0]).exp()) > 1e-4


def test_what_is_left_is_drawn_for_its_own_row(monkeypatch):
    few_proposals(monkeypatch)
    head, _ = problem(adaptive(0.1, 0.2), vocab_size=60, scale=0.2)
    hidden = 4 * torch.eye(6, dtype=torch.float64)[:3]
    drawn = head.sample(hidden, 30_000, generator=torch.Generator().manual_seed(2))
    for row, words in zip(hidden, drawn, strict=True):
        assert chi_square(words, head.log_prob(row).exp()) > 1e-4


@pytest.mark.parametrize(
    ("softcap", "temperature", "asked"), [(None, 1.0, True), (None, 0.7, False), (2.0, 1.0, False)]
)
def test_of_the_plain_distribution_alone(softcap, temperature, asked, monkeypatch):
    calls = []
    monkeypatch.setattr(two_stage, "draw_by_rejection", lambda *_: calls.append(1))
    head = AdaptiveSoftmax(6, 50, cutoffs=[10, 20], softcap=softcap)
    head.sample(torch.randn(500, 6), temperature=temperature)
    assert bool(calls) == asked


def test_equal_generators_draw_equal_words():
    """Also of weights that nothing was derived from before, and after other rows."""
    head, hidden = problem(adaptive(0.2, 0.5), num_rows=50)
    first = head.sample(hidden, generator=torch.Generator().manual_seed(1))
    head.sample(3 * hidden)
    assert head.sample(hidden, generator=torch.Generator().manual_seed(1)).equal(first)


def test_changed_weights_are_noticed():
    weight, bias = cluster()
    rows = torch.randn(1, WIDTH, dtype=torch.float64)
    row = torch.zeros(20_000, dtype=torch.int64)
    rejected(rows, row, weight, bias)
    with torch.no_grad():
        weight.mul_(-1.5)
        bias[7] += 2
    drawn = rejected(rows, row, weight, bias)
    expected = F.linear(rows[0], weight, bias).softmax(0)
    assert chi_square(drawn[drawn >= 0], expected) > 1e-4
    assert kept.derived_from(weight, bias)
    with torch.no_grad():
        weight[0, 1] += 1  # none of the entries that are compared
    assert kept.derived_from(weight, bias) == {}


def test_biases_written_through_data_are_noticed():
    weight, bias = cluster()
    rows, row = torch.full((1, WIDTH), 0.3).double(), torch.zeros(20_000, dtype=torch.int64)
    bias.data[7] = 4.0
    assert (rejected(rows, row, weight, bias) == 7).any()
    bias.data[7] = -torch.inf
    assert not (rejected(rows, row, weight, bias) == 7).any()
    bias.data[9] = 9.0
    assert (rejected(rows, row, weight, bias) == 9).double().mean() > 0.9


def test_threads_share_a_cluster(monkeypatch):
    """Each with lengths that push out those of others."""
    monkeypatch.setattr(tail_draws, "MOST_KEPT", 2)
    weight, bias = cluster()
    row = torch.zeros(1, dtype=torch.int64)
    lengths = [2 ** (i / 2 - 2) for i in range(8)]

    def draw(seed):
        for i in range(100):
            rows = torch.full((1, WIDTH), lengths[(seed + i) % 8], dtype=torch.float64)
            rejected(rows, row, weight, bias)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(draw, range(4)))
    finally:
        sys.setswitchinterval(interval)


@pytest.mark.parametrize("length", [0.0, 60.0, 1e31, torch.inf, torch.nan])
def test_rows_that_are_too_long_or_have_no_length_are_left(length):
    weight, bias = cluster()
    rows = torch.zeros(2, WIDTH, dtype=torch.float64)
    rows[1, 0] = length
    assert rejected(rows, torch.arange(2), weight, bias) is None


def test_what_cannot_be_kept_or_is_rounded_is_left(monkeypatch):
    weight, bias = cluster(dtype=torch.float32)
    rows, row = torch.full((1, WIDTH), 0.3), torch.zeros(1, dtype=torch.int64)
    assert rejected(rows, row, weight, bias) is not None
    mixed = [nn.Parameter(each.detach().bfloat16()) for each in (weight, bias)]
    for _ in range(2):
        assert rejected(rows, row, *mixed) is not None
    low = [rows.bfloat16(), *(nn.Parameter(each.detach().bfloat16()) for each in (weight, bias))]
    assert rejected(low[0], row, *low[1:]) is None
    assert rejected(rows, row, weight * 1, bias) is None  # made anew for each call
    with torch.inference_mode():
        made = nn.Parameter(weight.clone())
        assert rejected(rows, row, made, bias) is None
        inside = rejected(rows, row, weight, bias)
    assert_close(inside, rejected(rows, row, weight, bias))
    monkeypatch.setattr(tail_draws, "MIN_WORDS", NUM_WORDS + 1)
    assert rejected(rows, row, weight, bias) is None
    monkeypatch.setattr(tail_draws, "MIN_WORDS", NUM_WORDS)
    monkeypatch.setattr(tail_draws, "MOST_VALUES", WIDTH)
    assert rejected(rows, row, weight, bias) is None


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_weights_that_are_no_numbers_are_left_to_the_sum(value):
    weight, bias = cluster()
    bias.data[3] = value
    rows, row = torch.randn(1, WIDTH, dtype=torch.float64), torch.zeros(1, dtype=torch.int64)
    assert rejected(rows, row, weight, bias) is None


def test_forbidden_words_are_never_drawn():
    weight, bias = cluster()
    bias.data[::2] = -torch.inf
    rows = torch.randn(1, WIDTH, dtype=torch.float64)
    drawn = rejected(rows, torch.zeros(9000, dtype=torch.int64), weight, bias)
    assert (drawn[drawn >= 0] % 2 == 1).all()


@pytest.mark.parametrize("most", [2, 4, 8])
def test_few_running_sums_are_kept(most, monkeypatch):
    monkeypatch.setattr(tail_draws, "MOST_KEPT", most)
    weight, bias = cluster()
    row = torch.zeros(1, dtype=torch.int64)
    gc.collect()
    before, seen, with_sums = len(kept._entries), set(), set()
    for length in torch.linspace(0.01, 9, 90):
        rejected(torch.full((1, WIDTH), length.item(), dtype=torch.float64), row, weight, bias)
        proposals = kept._entries[weight].derived["draws"].proposals
        seen |= proposals.keys()
        sums = [each.running is not None for each in proposals.values()]
        with_sums |= {key for key, each in proposals.items() if each.running is not None}
        assert sum(sums) == min(most, len(with_sums))
    assert len(seen) > 5  # of which the long ones have no sums
    assert len(kept._entries) == before + 1
    del weight
    assert len(kept._entries) == before


def test_nan_is_an_error():
    head, hidden = problem(adaptive(0.2, 0.5), num_rows=4)
    hidden = hidden.clone()
    hidden[2] = torch.nan
    with pytest.raises(ValueError, match="no distribution"):
        head.sample(hidden)
