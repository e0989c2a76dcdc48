"""Noise: what is drawn is what the expected counts say, and every mass is what it should be."""

import copy
import math
from itertools import pairwise

import pytest
import torch
from cases import counts_of
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from lm_softmax.heads.noise import TOTAL, Noise, _share_of

KINDS = ["log_uniform", "unigram", "uniform", "given"]
kinds = pytest.mark.parametrize("kind", KINDS)
uniqueness = pytest.mark.parametrize("unique", [True, False], ids=["unique", "with replacement"])


@pytest.fixture(scope="module")
def large():
    """Ten million words."""
    return Noise(10_000_000, 4096, noise="log_uniform")


def noise_of(kind, vocab_size, num_samples, *, unique, power=1.0):
    """Given masses are in no order of ids."""
    noise = kind
    if kind == "given":
        noise = torch.rand(vocab_size, generator=torch.Generator().manual_seed(3)) ** 4 + 1e-6
    counts = counts_of(vocab_size)
    return Noise(vocab_size, num_samples, counts, noise=noise, power=power, unique=unique)


def expected_counts(noise):
    return noise.log_expected_counts(torch.arange(len(noise.cumulative) - 1)).exp()


@kinds
@uniqueness
@pytest.mark.parametrize("num_samples", [1, 40, 300])
def test_every_rank_is_drawn_as_often_as_the_correction_says(kind, unique, num_samples):
    """Mass of a bin of ranks, against its expectation, within five standard deviations."""
    vocab_size, repeats = 1000, 500
    noise = noise_of(kind, vocab_size, num_samples, unique=unique)
    drawn = torch.cat([noise.draw() for _ in range(repeats)])
    seen = drawn.bincount(minlength=vocab_size).double()
    expected = expected_counts(noise)
    borders = [0, 1, 2, 5, 10, 30, 100, 200, 400, 600, 800, 950, 1000]
    for left, right in pairwise(borders):
        wanted = expected[left:right].sum() * repeats
        # draws are independent, or at most one of each stratum: no more spread than Poisson's
        assert abs(seen[left:right].sum() - wanted) <= 5 * wanted.sqrt() + 2


@kinds
@uniqueness
def test_every_word_is_drawn_as_often_as_the_correction_says(kind, unique):
    """Pearson's statistic over single words."""
    vocab_size, repeats = 60, 3000
    noise = noise_of(kind, vocab_size, 12, unique=unique, power=0.75)
    drawn = torch.stack([noise.draw() for _ in range(repeats)])
    expected = expected_counts(noise)
    seen = drawn.flatten().bincount(minlength=vocab_size).double()
    per_draw = expected if unique else expected / 12
    spread = repeats * expected * (1 - per_draw)
    always = per_draw > 1 - 1e-12
    assert (seen[always] == repeats).all()
    terms = ((seen - repeats * expected) ** 2 / spread)[~always]
    degrees = torch.tensor(float(len(terms)))
    assert torch.special.gammaincc(degrees / 2, terms.sum() / 2) > 1e-4
    included = (drawn.unsqueeze(-1) == torch.arange(vocab_size)).any(1).double().mean(0)
    wanted = noise.log_inclusion(torch.arange(vocab_size)).exp()
    assert ((included - wanted).abs() <= 5 * (wanted * (1 - wanted) / repeats).sqrt() + 1e-6).all()


@settings(max_examples=40, deadline=None)
@given(data=st.data(), seed=st.integers(0, 2**20), skew=st.floats(0, 40))
def test_unique_draws_are_distinct_and_cover_every_word(data, seed, skew):
    vocab_size = data.draw(st.integers(1, 200))
    num_samples = data.draw(st.integers(1, vocab_size))
    masses = torch.rand(vocab_size, generator=torch.Generator().manual_seed(seed)).double() ** skew
    noise = Noise(vocab_size, num_samples, noise=masses + 1e-12)
    drawn = noise.draw()
    assert drawn.shape == (num_samples,)
    assert len(set(drawn.tolist())) == num_samples
    assert drawn.min() >= 0
    assert drawn.max() < vocab_size
    expected, words = expected_counts(noise), torch.arange(vocab_size)
    assert ((expected > 0) & (expected <= 1)).all()
    totals = torch.zeros(num_samples).double().index_add(0, noise.stratum(words), expected)
    assert_close(totals, torch.ones(num_samples).double())


@pytest.mark.parametrize("kind", ["log_uniform", "unigram"])
def test_strata_hold_about_equal_mass_and_frequent_words_are_always_drawn(kind):
    noise = noise_of(kind, 5000, 500, unique=True)
    masses = noise.cumulative.diff().double() / TOTAL
    expected = expected_counts(noise)
    always = int((expected == 1).long().cumprod(0).sum())
    assert always >= 20
    fair = (1 - masses[:always].sum()) / (500 - always)
    strata = noise.cumulative[noise.borders].diff().double()[always:] / TOTAL
    assert (masses[: always - 1] > 0.9 * fair).all()
    assert ((strata > 0.4 * fair) & (strata < 2 * fair)).all()
    rare = expected[2500:] / (masses[2500:] / fair)
    assert ((rare > 0.7) & (rare < 1.4)).all()


@uniqueness
def test_masses_are_what_was_asked_for(unique):
    counts = torch.tensor([50, 20, 7, 1, 0, 0])
    ids = torch.arange(6, dtype=torch.float64)
    given = torch.tensor([1.0, 5.0, 0.25, 2.0, 9.0, 3.0])
    for noise, power, masses in (
        ("unigram", 1.0, counts.clamp(min=1).double()),
        ("unigram", 0.75, counts.clamp(min=1).double() ** 0.75),
        ("log_uniform", 1.0, ((ids + 2) / (ids + 1)).log()),
        ("uniform", 1.0, torch.ones(6)),
        ("unigram", 0.0, torch.ones(6)),
        (given, 1.0, given),
        (given, 2.0, given.double() ** 2),
    ):
        made = Noise(6, 3, counts, noise=noise, power=power, unique=unique)
        words = torch.arange(6) if made.order is None else made.order
        shares = masses.double() / masses.double().sum()
        assert_close(made.cumulative.diff().double() / TOTAL, shares[words])
        assert made.cumulative[0] == 0
        assert made.cumulative[-1] == TOTAL
    zipf = Noise(6, 3, noise="unigram").cumulative.diff().double()
    assert_close(zipf / zipf[0], 1 / (ids + 1))


def test_expected_counts_are_multiples_of_the_probability_with_replacement():
    noise = noise_of("unigram", 50, 80, unique=False)
    counts = counts_of(50).clamp(min=1).double()
    assert_close(expected_counts(noise), 80 * counts / counts.sum())


def test_all_words_are_drawn_when_there_are_as_many_unique_draws():
    for kind in KINDS:
        noise = noise_of(kind, 77, 77, unique=True)
        assert (noise.draw().sort().values == torch.arange(77)).all()
        assert (noise.log_expected_counts(torch.arange(77)) == 0).all()


@uniqueness
def test_no_dtype_moves_the_distribution(unique):
    noise = noise_of("unigram", 300, 20, unique=unique)
    ids = torch.arange(300)
    before = noise.log_expected_counts(ids)
    assert_close(noise.to(torch.bfloat16).half().log_expected_counts(ids), before, rtol=0, atol=0)
    assert before.dtype == torch.float64


def test_the_state_dict_is_empty():
    ours = noise_of("given", 40, 9, unique=True)
    before = expected_counts(ours)
    assert not ours.state_dict()
    ours.load_state_dict(Noise(40, 3, noise="uniform", unique=False).state_dict())
    assert_close(expected_counts(ours), before, rtol=0, atol=0)


@kinds
@uniqueness
def test_leaving_the_meta_device_keeps_the_distribution(kind, unique):
    emptied, moved = (noise_of(kind, 40, 9, unique=unique) for _ in range(2))
    expected, masses = expected_counts(emptied), emptied.given
    moved.to("meta")
    counts = counts_of(40)
    with torch.device("meta"):
        built = Noise(40, 9, counts, noise=kind if masses is None else masses, unique=unique)
    for noise in (built, moved):
        assert all(buffer.is_meta for buffer in noise.buffers())
    for noise in (built, copy.deepcopy(moved), emptied):
        noise.to_empty(device="cpu")
        assert_close(expected_counts(noise), expected, rtol=0, atol=0)
        assert (noise.draw() < 40).all()
        assert not noise._spare


@pytest.mark.parametrize("num_samples", [1, 3, 10])
def test_words_need_not_be_ranked(num_samples):
    """Given masses in another order give each word the same expected count."""
    masses = torch.tensor([40.0, 20, 10, 8, 7, 5, 4, 3, 2, 1])
    order = torch.tensor([5, 9, 0, 3, 1, 8, 2, 7, 6, 4])
    ranked = Noise(10, num_samples, noise=masses)
    mixed = Noise(10, num_samples, noise=masses[order])
    assert ranked.order is None
    assert_close(expected_counts(mixed), expected_counts(ranked)[order])
    assert (mixed.stratum(torch.arange(10)) == ranked.stratum(order)).all()
    for _ in range(20):
        assert (mixed.stratum(mixed.draw()) == torch.arange(num_samples)).all()


def test_masses_may_be_a_list():
    listed, tensor = Noise(3, 2, noise=[3, 1.0, 2]), Noise(3, 2, noise=torch.tensor([3.0, 1, 2]))
    assert_close(expected_counts(listed), expected_counts(tensor), rtol=0, atol=0)


def test_masses_of_the_callers_are_copied():
    masses = torch.tensor([3.0, 2.0, 1.0], dtype=torch.float64)
    noise = Noise(3, 2, noise=masses)
    masses.zero_()
    assert noise.given.tolist() == [3.0, 2.0, 1.0]


def test_strata_are_of_unique_draws():
    with pytest.raises(ValueError, match="with replacement have no strata"):
        Noise(3, 2, unique=False).stratum(torch.tensor([1]))


def test_draws_follow_the_global_generator():
    noise = noise_of("uniform", 5000, 50, unique=True)
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first, second = noise.draw(), noise.draw()
    assert (first != second).any()
    torch.set_rng_state(state)
    assert (noise.draw() == first).all()


@uniqueness
def test_ten_million_words(unique, large, monkeypatch):
    if not unique:
        monkeypatch.setattr(large, "borders", None)
    drawn = torch.cat([large.draw() for _ in range(20)])
    assert (drawn > 2**23).any()
    share = math.log(10_000_001 / 100_001) / math.log(10_000_001)
    wanted = share * len(drawn)
    if unique:
        ids = torch.arange(100_000, 10_000_000, 99)
        wanted = large.log_expected_counts(ids).exp().sum() * 99 * 20
    assert abs((drawn >= 100_000).sum() - wanted) < 5 * wanted**0.5


def test_tiny_masses_are_drawn_in_proportion():
    """Beyond float32's and float64's resolution of a number in [0, 1)."""
    masses = torch.tensor([1.0, 1e-17, 1e-17, 3e-18], dtype=torch.float64)
    noise = Noise(4, 2, noise=masses)
    assert_close(
        noise.cumulative.diff()[1:].double() / TOTAL, masses[1:], rtol=0.3, atol=0
    )  # 4.6, 46 and 46 units of 2**-62
    drawn = torch.stack([noise.draw() for _ in range(2000)])
    assert (drawn[:, 0] == 0).all()
    shares = drawn[:, 1].bincount(minlength=4).double() / 2000
    assert_close(shares, expected_counts(noise) * torch.tensor([0, 1, 1, 1]), rtol=0, atol=0.06)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"noise": torch.tensor([1.0, 0.0, 2.0])}, r"word 1 has 0.0, 1 such words"),
        ({"noise": torch.tensor([1.0, 2.0, -0.5])}, r"word 2 has -0.5, 1 such"),
        ({"noise": torch.tensor([torch.nan, 0.0, 1.0])}, r"word 0 has nan, 2 such"),
        ({"noise": torch.tensor([1.0, torch.inf, 1.0])}, r"word 1 has inf"),
        ({"noise": torch.ones(4)}, r"\(3,\), got \(4,\)"),
        ({"noise": "zipf"}, "masses of all words, got 'zipf'"),
        ({"noise": None}, "masses of all words, got NoneType"),
        ({"noise": [1.0, 2.0]}, r"\(3,\), got \(2,\)"),
        ({"noise": [1.0, "2", 3.0]}, "one number a word, got str"),
        ({"noise": [1.0, None, 3.0]}, "one number a word, got NoneType"),
        ({"noise": [1.0, 0.0, 3.0]}, "word 1 has 0.0, 1 such"),
        ({"noise": torch.ones(3, dtype=torch.complex64)}, "real masses, got torch.complex64"),
        ({"num_samples": 4}, "num_samples=4 unique words of 3"),
        ({"num_samples": 0}, "at least 1, got 0"),
        ({"num_samples": 1.5}, "at least 1, got 1.5"),
        ({"num_samples": True}, "at least 1, got True"),
        ({"power": "0.75"}, "noise_power must be at least 0 and finite, got '0.75'"),
        ({"power": None}, "noise_power must be .*, got None"),
        ({"power": -0.75}, "noise_power must be at least 0 and finite, got -0.75"),
        ({"power": float("nan")}, "got nan"),
    ],
    ids=str,
)
def test_impossible_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Noise(3, **{"num_samples": 2, **options})


def test_more_samples_than_words_are_legal_with_replacement():
    assert Noise(3, 10, unique=False).draw().shape == (10,)


@given(size=st.integers(1, TOTAL), point=st.integers(0, TOTAL - 1))
def test_shares_are_those_of_unbounded_integers(size, point):
    found = _share_of(torch.tensor([size]), torch.tensor([point])).item()
    assert 0 <= size * point // TOTAL - found <= 2


@kinds
def test_the_first_and_the_last_point_give_the_first_and_the_last_word(kind, monkeypatch):
    """Of each stratum, or of all words."""
    ours, all_words = (noise_of(kind, 50, 9, unique=unique) for unique in (True, False))
    monkeypatch.setattr(torch, "randint", lambda high, size, device: torch.zeros(size).long())
    words = torch.arange(50) if ours.order is None else ours.order
    assert (ours.draw() == words[ours.borders[:-1]]).all()
    assert (all_words.draw() == 0).all()
    monkeypatch.setattr(torch, "randint", lambda high, size, device: torch.full(size, high - 1))
    assert (ours.draw() == words[ours.borders[1:] - 1]).all()
    assert (all_words.draw() == 49).all()
