"""Draws are those of the whole distribution, whichever way a head takes to them.

`test_contract` draws often from few rows; here there are many rows with a draw each, small blocks,
rejections and what is opened for them.
"""

import math

import pytest
import torch
from cases import CASES, adaptive, counts_of, hierarchical, randomise
from test_contract import chi_square, truncated
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from lm_softmax.heads import AdaptiveSoftmax, FullSoftmax, OutputHead
from lm_softmax.heads import hierarchical as hierarchical_module
from lm_softmax.kernels import draws, table_draws, tree_draws, two_stage

WORDS = 300
heads = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
trees = pytest.mark.parametrize("tree", ["huffman", "balanced", "random"])


def problem(make, vocab_size=WORDS, scale=0.5, num_rows=20_000, dtype=torch.float64):
    """A head and one hidden vector many times: each row is a draw of its own."""
    head = randomise(make(6, vocab_size, counts_of(vocab_size))).to(dtype)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.mul_(scale)
    return head, torch.randn(6, dtype=dtype).expand(num_rows, 6)


def fits(head, hidden, **options):
    drawn = head.sample(hidden, generator=torch.Generator().manual_seed(3), **options)
    return chi_square(drawn, truncated(head.log_prob(hidden[0]), **options)) > 1e-4


@heads
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 0.5},
        {"temperature": 1.5},
        {"top_p": 0.5},
        {"temperature": 2, "top_k": 9},
    ],
    ids=str,
)
def test_one_draw_a_row_in_small_blocks(case, options, monkeypatch):
    for name, value in (
        ("BLOCK_BYTES", 0),
        ("MIN_BLOCK_WORDS", 64),
        ("MAX_DRAWS", 999),
        ("FEW_WEIGHTS", 0),
    ):
        monkeypatch.setattr(draws, name, value)
    head, hidden = problem(case.make, 150, num_rows=4000)
    assert fits(head, hidden, **options)


@trees
@pytest.mark.parametrize("rounds", [1, 16])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.5, 4.0])
def test_walks_down_a_tree(tree, temperature, rounds, monkeypatch):
    monkeypatch.setattr(tree_draws, "ROUNDS", rounds)
    head, hidden = problem(hierarchical(tree), num_rows=6000)
    assert fits(head, hidden, temperature=temperature)


@trees
@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.5])
def test_walks_pass_few_nodes(tree, temperature, monkeypatch):
    """Neither all leaves, nor more walks than the bounds allow."""
    walks = []
    walk = tree_draws.walk

    def counted(rows, nodes, row, *rest):
        walks.append(row.numel())
        return walk(rows, nodes, row, *rest)

    monkeypatch.setattr(tree_draws, "walk", counted)
    monkeypatch.setattr(tree_draws, "ROUNDS", 10_000)
    monkeypatch.setattr(OutputHead, "_draw", None)
    head, hidden = problem(hierarchical(tree), num_rows=1000)
    best = head.topk(hidden[:1], 1).log_probs.exp().item()
    head.sample(hidden, temperature=temperature, generator=torch.Generator().manual_seed(0))
    most = 1 / best if temperature < 1 else WORDS ** (1 - 1 / temperature)
    assert sum(walks) <= 1.2 * most * 1000


def test_many_draws_of_a_row_read_all_words(monkeypatch):
    monkeypatch.setattr(hierarchical_module, "draw_from_tree", None)
    head, hidden = problem(hierarchical("huffman"), num_rows=2)
    assert head.sample(hidden, WORDS).shape == (2, WORDS)


@pytest.mark.parametrize("make", [adaptive(0.2, 0.5), hierarchical("classes")])
@pytest.mark.parametrize("temperature", [0.5, 1.5])
def test_draws_of_a_row_are_independent(make, temperature):
    """They share what was opened: neither is any more like the other for it."""
    head, hidden = problem(make, 10)
    drawn = head.sample(
        hidden, 2, temperature=temperature, generator=torch.Generator().manual_seed(5)
    )
    weights = truncated(head.log_prob(hidden[0]), temperature=temperature)
    pairs = drawn[:, 0] * 10 + drawn[:, 1]
    assert chi_square(pairs, torch.outer(weights, weights).flatten()) > 1e-4


@heads
def test_draws_fill_the_set_that_is_left(case):
    head, hidden = problem(case.make, 40, num_rows=3000)
    log_probs = head.log_prob(hidden[0])
    for options in (
        {"top_k": 7},
        {"top_p": 0.6},
        {"top_k": 12, "top_p": 0.7, "temperature": 1.5},
        {"top_p": 1e-9},
    ):
        wanted = truncated(log_probs, **options)
        wanted = (wanted > 5 / 3000).nonzero().squeeze(1), (wanted > 0).nonzero().squeeze(1)
        drawn = head.sample(hidden, generator=torch.Generator().manual_seed(2), **options).unique()
        assert torch.isin(drawn, wanted[1]).all()
        assert torch.isin(wanted[0], drawn).all()


@pytest.mark.parametrize("top_p", [0.05, 0.5, 0.75, 0.99])
@pytest.mark.parametrize("num_samples", [1, 30])
def test_equal_words_at_the_border_go_by_id(top_p, num_samples):
    head = FullSoftmax(6, 16)
    with torch.no_grad():
        head.weight.zero_()
        head.bias.zero_()[5] = 1
    drawn = head.sample(torch.zeros(2000, 6), num_samples, top_p=top_p).unique().tolist()
    order = [5, *(word for word in range(16) if word != 5)]
    total = math.e + 15
    inside = [i for i in range(16) if (i and math.e + i - 1) < top_p * total]
    assert drawn == sorted(order[i] for i in inside)


def test_a_small_nucleus_takes_few_draws(monkeypatch):
    """What was refused bounds the next draw: a thousand rounds would be needed without."""
    calls = []
    draw = table_draws.draw
    monkeypatch.setattr(table_draws, "draw", lambda *args: calls.append(1) or draw(*args))
    head, _ = problem(FullSoftmax, 2000, scale=0.01)
    hidden = torch.randn(40, 6, dtype=torch.float64)
    assert (head.sample(hidden, 3, top_p=1e-9) == head.topk(hidden, 1).indices).all()
    assert len(calls) < 60


@heads
@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0},
        {"temperature": 0.5},
        {"temperature": 1.5},
        {"top_k": 3},
        {"top_p": 0.5},
    ],
    ids=str,
)
def test_nan_is_an_error(case, options):
    head, hidden = problem(case.make, num_rows=3)
    hidden = hidden.clone()
    hidden[1] = torch.nan
    with pytest.raises(ValueError, match="no distribution"):
        head.sample(hidden, **options)


@pytest.mark.parametrize("options", [{}, {"temperature": 0.5}, {"temperature": 1.5}], ids=str)
@pytest.mark.parametrize("make", [adaptive(0.2, 0.5), adaptive(0.1, 0.2)])
def test_one_draw_of_one_row_at_a_time(make, options):
    head, hidden = problem(make, num_rows=1)
    generator = torch.Generator().manual_seed(3)
    drawn = [head.sample(hidden, generator=generator, **options) for _ in range(1500)]
    assert drawn[0].shape == (1, 1)
    assert chi_square(torch.cat(drawn), truncated(head.log_prob(hidden[0]), **options)) > 1e-4
    with pytest.raises(ValueError, match="no distribution"):
        head.sample(hidden * torch.nan, **options)


@pytest.mark.parametrize("few", [True, False])
@pytest.mark.parametrize("temperature", [1e-300, 1e39, 1e300])
def test_extreme_temperatures(temperature, few, monkeypatch):
    """The best word, or all alike but those of no probability."""
    monkeypatch.setattr(draws, "FEW_WEIGHTS", 2**16 * few)
    head, hidden = problem(FullSoftmax, 30, num_rows=2000, dtype=torch.float32)
    with torch.no_grad():
        head.bias[7] = -torch.inf
    drawn = head.sample(hidden, temperature=temperature).unique()
    best = head.topk(hidden[0], 1).indices
    expected = best if temperature < 1 else torch.arange(30)[torch.arange(30) != 7]
    assert drawn.equal(expected)


@heads
@pytest.mark.parametrize("temperature", [1.0, 1.5])
def test_low_precision(case, temperature):
    head, hidden = problem(case.make, 60, num_rows=3000, dtype=torch.bfloat16)
    assert fits(head, hidden, temperature=temperature)


@pytest.mark.parametrize("temperature", [0.4, 1.0, 2.0])
def test_only_clusters_that_may_be_drawn_are_opened(temperature, monkeypatch):
    opened = []
    tail = two_stage._Rows.tail
    monkeypatch.setattr(
        two_stage._Rows, "tail", lambda rows, i, some: opened.append(i) or tail(rows, i, some)
    )
    head, hidden = problem(adaptive(0.2, 0.5), num_rows=500)
    with torch.no_grad():
        head.bias[-2] = -300
        head.bias[-1] = 30
    head.sample(hidden, temperature=temperature)
    assert set(opened) == {1}
    with torch.no_grad():
        head.bias[-1] = -300
    opened.clear()
    head.sample(hidden, temperature=temperature)
    assert not opened


def test_clusters_of_unlikely_words_alone():
    """Words with a logit of -inf are never drawn, nor do they make nan of a block."""
    head = AdaptiveSoftmax(4, 30, cutoffs=[10])
    with torch.no_grad():
        head.tail_biases[0][:-1] = -torch.inf
        head.bias[:9] = -torch.inf
    for temperature in (0.5, 1.0, 1.5):
        drawn = head.sample(torch.randn(400, 4), 2, temperature=temperature)
        assert drawn.unique().tolist() == [9, 29]


class Largest(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, torch.Tensor):
                self.numel = max(self.numel, tensor.numel())
        return out


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("name", ["full", "low-rank", "sampled", "product-quantized", "adaptive"])
def test_log_probabilities_of_all_words_are_never_held(name, temperature):
    case = next(case for case in CASES if case.name == name)
    head, hidden = problem(case.make, 60_000, num_rows=64, dtype=torch.float32)
    with Largest() as largest:
        head.sample(hidden, temperature=temperature)
    assert largest.numel < 64 * 60_000 / 2


@pytest.mark.parametrize("temperature", [0.1, 0.5, 1.0, 1.5, 30.0])
def test_sum_of_powers_over_blocks(temperature, monkeypatch):
    for name, value in (("BLOCK_BYTES", 0), ("MIN_BLOCK_WORDS", 64)):
        monkeypatch.setattr(draws, name, value)
    logits = torch.randn(5, 300, dtype=torch.float64) + torch.linspace(0, 900, 300)
    logits = torch.cat([logits, logits.flip(1)])
    words = draws.Words(10, 300, lambda part: logits[:, part].clone())
    expected = torch.logsumexp(logits.log_softmax(1) / temperature, 1)
    assert_close(draws.log_power_sum(words, temperature), expected, rtol=1e-10, atol=1e-10)


class TestInverse:
    """`draw` finds the word in whose part of the running sum a number falls."""

    @pytest.mark.parametrize("few", [True, False])
    @pytest.mark.parametrize("size", [1, 63, 64, 65, 1000, 5000])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
    def test_equals_a_search_of_the_running_sum(self, size, dtype, few, monkeypatch):
        monkeypatch.setattr(draws, "FEW_WEIGHTS", 900 * size * few)
        weights = torch.rand(3, size, dtype=dtype) ** 8
        weights[:, ::3] = 0
        weights[:, -1] = 1e-9
        numbers = torch.rand(900, dtype=torch.float64)
        numbers[:3], numbers[-3:] = 0, 1 - 2**-53
        monkeypatch.setattr(draws, "uniform", lambda like, _: numbers.view(like.shape).clone())
        row = torch.arange(3).repeat_interleave(300)
        found = draws.draw(weights, row, None)
        shares = weights.double() / weights.double().sum(1, keepdim=True)
        above = shares.cumsum(1)[row].gather(1, found.unsqueeze(1)).squeeze(1)
        below = above - shares[row].gather(1, found.unsqueeze(1)).squeeze(1)
        slack = 1e-6 if dtype == torch.float32 else 1e-14
        assert (weights[row, found] > 0).all()
        assert (below - slack <= numbers).all()
        assert (numbers <= above + slack).all()

    def test_many_draws_copy_no_row_of_sums(self, monkeypatch):
        """They are searched in parts of parts."""
        weights, row = torch.ones(1, 64 * 3000), torch.zeros(1000, dtype=torch.int64)
        sizes = []

        class Largest(TorchDispatchMode):
            def __torch_dispatch__(self, func, types, args=(), kwargs=None):
                made = func(*args, **(kwargs or {}))
                if isinstance(made, torch.Tensor):
                    sizes.append(made.numel())
                return made

        with Largest():
            found = draws.draw(weights, row, None)
        assert max(sizes) <= weights.numel() < 3000 * len(found)

    @pytest.mark.parametrize("few", [True, False])
    def test_a_rare_word_is_within_reach(self, few, monkeypatch):
        """In float32 too: of parts the sums are float64, of words the difference."""
        monkeypatch.setattr(draws, "FEW_WEIGHTS", 2000 * few)
        weights = torch.zeros(1, 1000)
        weights[0, 0], weights[0, 700] = 1, 1e-12
        numbers = torch.tensor([1 - 1.5e-12, 1 - 5e-13], dtype=torch.float64)
        monkeypatch.setattr(draws, "uniform", lambda like, _: numbers.view(like.shape).clone())
        assert draws.draw(weights, torch.tensor([0, 0]), None).tolist() == [0, 700]


@pytest.mark.parametrize("few", [True, False])
def test_one_row_without_weight_is_an_error(few, monkeypatch):
    monkeypatch.setattr(draws, "FEW_WEIGHTS", 2**16 * few)
    weights = torch.tensor([[1.0, 2.0], [0.0, 0.0], [1.0, 1.0]])
    with pytest.raises(ValueError, match="no distribution"):
        draws.draw(weights, torch.arange(3), None)
