"""Automatic cutoffs against all there are, and what is asked of them."""

import math
from dataclasses import replace
from itertools import combinations, pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lm_softmax.encoders import AdaptiveEmbedding
from lm_softmax.heads import AdaptiveSoftmax
from lm_softmax.heads import cost_model as cost_model_module
from lm_softmax.heads.cost_model import (
    COST_MODELS,
    CostModel,
    cost_model_of,
    optimal_cutoffs,
    predicted_time,
)
from lm_softmax.heads.cutoffs import resolve_clusters, resolve_tail_sizes, zipf_counts

CPU = COST_MODELS["cpu"]
HAND_WRITTEN = [  # ids, or shares of the words
    *([], [2000, 10_000], [20_000, 40_000, 200_000], (0.1, 0.35), (1 / 3, 2 / 3)),
    *([800, 4000, 12_000], (0.05,), (0.02, 0.1, 0.4)),  # of these, some are near the optimum
]


def naive_matmul(model, n, d, k):
    time = model.multiply * n * d * k + model.move * (n * k + n * d + d * k)
    return max(model.product, time)


def naive_time(model, hidden_size, counts, cutoffs, widths):
    """The model written out for one list of cutoffs, cluster by cluster."""
    counts = [max(count, 1) for count in counts]
    tokens, num_words = model.tokens, (cutoffs or [len(counts)])[0]
    rows = num_words + len(cutoffs)
    time = 3 * naive_matmul(model, tokens, hidden_size, rows)
    time += model.logit * tokens * rows + model.parameter * rows * (hidden_size + 1)
    borders = pairwise([*cutoffs, len(counts)])
    for (start, end), width in zip(borders, widths, strict=True):
        rows, words = tokens * sum(counts[start:end]) / sum(counts), end - start
        time += model.cluster + 3 * naive_matmul(model, rows, hidden_size, width)
        time += 3 * naive_matmul(model, rows, width, words) + model.logit * rows * words
        time += model.parameter * (words * (width + 1) + width * hidden_size)
    return time


def all_cutoffs(counts, num_tails, min_coverage, min_growth):
    """Every way to cut that is allowed."""
    effective = [max(count, 1) for count in counts]
    for cutoffs in combinations(range(1, len(counts)), num_tails):
        borders = pairwise([*cutoffs, len(counts)])
        grows = all(end >= min_growth * start for start, end in borders)
        short_list = cutoffs[0] if cutoffs else len(counts)
        if grows and sum(effective[:short_list]) / sum(effective) >= min_coverage - 1e-12:
            yield list(cutoffs)


constants = st.builds(
    CostModel,
    **{name: st.floats(0, 3) for name in ("product", "multiply", "move", "logit", "parameter")},
    cluster=st.floats(0, 200),
    tokens=st.integers(1, 50),
)


@settings(max_examples=150, deadline=None)
@given(
    model=constants,
    counts=st.lists(st.integers(0, 40), min_size=1, max_size=10),
    hidden_size=st.integers(1, 9),
    widths=st.lists(st.lists(st.integers(1, 9), max_size=4), max_size=4),
    slack=st.sampled_from([0.0, 0.05, 0.5]),
    min_coverage=st.sampled_from([0.0, 0.5]),
    min_growth=st.sampled_from([1.0, 1.5, 2.0]),
)
def test_equals_the_best_of_all(
    model, counts, hidden_size, widths, slack, min_coverage, min_growth
):
    counts = sorted(counts, reverse=True)
    widths = [[], *{len(sizes): sizes for sizes in widths if sizes}.values()]
    times = {
        tuple(cutoffs): naive_time(model, hidden_size, counts, cutoffs, sizes)
        for sizes in widths
        for cutoffs in all_cutoffs(counts, len(sizes), min_coverage, min_growth)
    }
    options = {"min_coverage": min_coverage, "min_growth": min_growth}
    arguments = (model, hidden_size, torch.tensor(counts), widths)
    shortest = min(times.values())
    best = optimal_cutoffs(*arguments, slack=0.0, **options)
    assert best.time == pytest.approx(shortest, rel=1e-12, abs=1e-12)
    assert times[tuple(best.cutoffs)] == pytest.approx(shortest, rel=1e-12, abs=1e-12)

    found = optimal_cutoffs(*arguments, slack=slack, **options)
    step = shortest + 24 * model.multiply * model.tokens * hidden_size**2
    limit = shortest + slack * step
    assert found.time == pytest.approx(times[tuple(found.cutoffs)], rel=1e-12, abs=1e-12)
    assert found.time <= limit * (1 + 1e-12)
    clear = [cutoffs for cutoffs, time in times.items() if time < limit * (1 - 1e-9)]
    fewest = min((len(cutoffs) for cutoffs in clear), default=len(found.cutoffs))
    assert len(found.cutoffs) <= fewest
    first = [cutoffs[0] for cutoffs in clear if cutoffs and len(cutoffs) == len(found.cutoffs)]
    assert not found.cutoffs or found.cutoffs[0] >= max(first, default=0)
    rivals = [
        time
        for cutoffs, time in times.items()
        if list(cutoffs[:1]) == found.cutoffs[:1] and len(cutoffs) == len(found.cutoffs)
    ]
    assert found.time == pytest.approx(min(rivals), rel=1e-12, abs=1e-12)


def test_slack_is_a_share_of_head_and_encoder():
    """Multiplications alone: the full softmax of 60 words 8 wide takes 1440, an LSTM layer 1536."""
    model = CostModel(0, 1, 0, 0, 0, 0, tokens=1)
    arguments = (model, 8, zipf_counts(60), [[], [1]])
    shortest = optimal_cutoffs(*arguments, slack=0.0).time
    share = (1440 - shortest) / (1536 + shortest)
    assert optimal_cutoffs(*arguments, slack=0.99 * share).cutoffs != []
    assert optimal_cutoffs(*arguments, slack=1.01 * share).cutoffs == []


@settings(max_examples=60, deadline=None)
@given(
    model=constants,
    counts=st.lists(st.integers(0, 40), min_size=1, max_size=30),
    hidden_size=st.integers(1, 9),
    data=st.data(),
)
def test_prediction_equals_the_model_written_out(model, counts, hidden_size, data):
    ids = st.integers(1, max(len(counts) - 1, 1))
    cutoffs = sorted(id for id in data.draw(st.sets(ids, max_size=4)) if id < len(counts))
    widths = data.draw(st.lists(st.integers(1, 9), min_size=len(cutoffs), max_size=len(cutoffs)))
    found = predicted_time(model, hidden_size, torch.tensor(counts), cutoffs, widths)
    expected = naive_time(model, hidden_size, counts, cutoffs, widths)
    assert found == pytest.approx(expected, rel=1e-12, abs=1e-12)


@pytest.mark.parametrize("exponent", [0.7, 1.0, 1.3])
def test_a_grid_of_borders_loses_next_to_nothing(exponent, monkeypatch):
    counts = zipf_counts(700) ** exponent
    widths = [resolve_tail_sizes(64, num_tails, 2.0, 16) for num_tails in range(5)]
    times = []
    for most in (700, 300):
        monkeypatch.setattr(cost_model_module, "MAX_BORDERS", most)
        times.append(optimal_cutoffs(CPU, 64, counts, widths, slack=0.0).time)
    assert times[0] <= times[1] <= times[0] * 1.002


def hand_written(vocab_size):
    for rule in HAND_WRITTEN:
        ids = [int(share * vocab_size) for share in rule] if isinstance(rule, tuple) else rule
        if not ids or ids[-1] < vocab_size:
            yield ids, rule not in HAND_WRITTEN[5:]


@pytest.mark.parametrize("device", COST_MODELS)
@pytest.mark.parametrize("hidden_size", [128, 512])
@pytest.mark.parametrize("vocab_size", [27_565, 100_000, 267_735, 1_000_000])
def test_no_hand_written_rule_is_predicted_to_be_faster(device, hidden_size, vocab_size):
    counts, model = zipf_counts(vocab_size), COST_MODELS[device]
    auto = resolve_clusters("auto", hidden_size, vocab_size, cost_model=device)
    auto_time = predicted_time(model, hidden_size, counts, *auto)
    widths = [resolve_tail_sizes(hidden_size, num_tails, 2.0, 16) for num_tails in range(5)]
    free = {"slack": 0.0, "min_coverage": 0.0, "min_growth": 1.0}
    shortest = optimal_cutoffs(model, hidden_size, counts, widths, **free)
    assert shortest.time == pytest.approx(
        predicted_time(model, hidden_size, counts, shortest.cutoffs, widths[len(shortest.cutoffs)])
    )
    for ids, is_common in hand_written(vocab_size):
        time = predicted_time(model, hidden_size, counts, ids, widths[len(ids)])
        assert shortest.time < time
        if is_common:  # capacity and all
            assert auto_time < time


class TestAuto:
    @given(st.integers(1, 1500), st.integers(1, 300), st.floats(0, 4), st.integers(0, 10**6))
    @settings(max_examples=25, deadline=None)
    def test_is_always_valid(self, vocab_size, hidden_size, exponent, most):
        counts = (most / torch.arange(1.0, vocab_size + 1) ** exponent).long()
        clusters = resolve_clusters("auto", hidden_size, vocab_size, counts)
        assert clusters == resolve_clusters(
            clusters[0], hidden_size, vocab_size, tail_sizes=clusters[1]
        )
        assert clusters == resolve_clusters("auto", hidden_size, vocab_size, counts)  # again

    @pytest.mark.parametrize("vocab_size", [5000, 27_565, 300_000])
    def test_keeps_capacity(self, vocab_size):
        ids, sizes = resolve_clusters("auto", 256, vocab_size)
        counts = zipf_counts(vocab_size)
        assert counts[: ids[0]].sum() >= counts.sum() / 2
        assert all(end >= 2 * start for start, end in pairwise([*ids, vocab_size]))
        assert sizes == [128, 64, 32, 16][: len(ids)]

    def test_without_counts_assumes_zipf(self):
        assert resolve_clusters("auto", 256, 50_000) == resolve_clusters(
            "auto", 256, 50_000, zipf_counts(50_000)
        )

    @pytest.mark.parametrize("vocab_size", [1, 2, 15, 50])
    def test_few_words_have_no_clusters(self, vocab_size):
        assert resolve_clusters("auto", 256, vocab_size) == ([], [])
        assert AdaptiveSoftmax(8, vocab_size).cutoffs == []

    def test_words_that_are_all_as_frequent_have_no_clusters(self):
        assert resolve_clusters("auto", 256, 2000, torch.ones(2000)) == ([], [])

    def test_one_word_that_is_nearly_the_whole_text_leaves_the_rest_to_tails(self):
        counts = torch.tensor([10**9, *[1] * 19_999])
        ids, _ = resolve_clusters("auto", 256, 20_000, counts)
        assert ids
        assert ids[0] < resolve_clusters("auto", 256, 20_000)[0][0]

    def test_counts_of_zero_are_ones(self):
        counts = torch.tensor([500, 100, *[1] * 4998])
        assert resolve_clusters("auto", 64, 5000, counts) == resolve_clusters(
            "auto", 64, 5000, counts - (counts == 1).long()
        )

    def test_rarer_tails_make_a_shorter_short_list(self):
        lengths = [
            resolve_clusters("auto", 256, 50_000, zipf_counts(50_000) ** exponent)[0][0]
            for exponent in (0.9, 1.0, 1.2, 1.5)
        ]
        assert lengths == sorted(lengths, reverse=True)
        assert len(set(lengths)) == 4

    def test_tails_that_cost_more_are_fewer(self, monkeypatch):
        numbers = []
        for cluster in (0.0, 0.02, 0.1, 10.0):
            monkeypatch.setitem(COST_MODELS, "cpu", replace(CPU, cluster=cluster))
            numbers.append(len(resolve_clusters("auto", 256, 50_000)[0]))
        assert numbers == sorted(numbers, reverse=True)
        assert numbers[0] == 4
        assert numbers[-1] == 0

    def test_has_as_many_tails_as_widths_are_given(self):
        for sizes in ([], [16], [96, 24], [64, 64, 32, 32, 16]):
            ids, widths = resolve_clusters("auto", 256, 30_000, tail_sizes=sizes)
            assert len(ids) == len(sizes)
            assert widths == sizes
        with pytest.raises(ValueError, match=r"^3 words cannot form 2 tails"):
            resolve_clusters("auto", 256, 3, tail_sizes=[4, 4])

    def test_widths_above_hidden_are_possible(self):
        ids, sizes = resolve_clusters("auto", 8, 3000, min_tail_size=64)
        assert ids
        assert set(sizes) == {64}

    def test_tails_that_would_have_no_width_are_not_tried(self):
        ids, sizes = resolve_clusters("auto", 64, 30_000, div_value=4.0, min_tail_size=0)
        assert sizes == [16, 4, 1]
        assert len(ids) == 3

    def test_follows_the_device(self):
        by_device = [
            resolve_clusters("auto", 512, 100_000, cost_model=device)[0] for device in COST_MODELS
        ]
        assert by_device[0] != by_device[1]
        head = AdaptiveSoftmax(512, 100_000, cost_model="cuda", bias=False)
        assert head.cutoffs == by_device[1]

    def test_halves_widths_where_given_cutoffs_quarter_them(self):
        assert AdaptiveSoftmax(256, 30_000).tail_sizes == [128, 64, 32, 16]
        assert AdaptiveSoftmax(256, 300, cutoffs=[100, 200]).tail_sizes == [64, 16]
        assert AdaptiveSoftmax(256, 30_000, div_value=4.0).tail_sizes[0] == 64

    @pytest.mark.parametrize("device", COST_MODELS)
    def test_is_the_same_in_an_embedding(self, device):
        counts = zipf_counts(9000) ** 1.1
        options = {"cost_model": device, "min_tail_size": 20}
        head = AdaptiveSoftmax(64, 9000, counts, **options)
        embedding = AdaptiveEmbedding(9000, 64, counts, **options)
        assert head.cutoffs == embedding.cutoffs != []
        assert head.tail_sizes == embedding.tail_sizes
        head.tie_weight(embedding)

    def test_does_not_need_memory_for_its_counts(self):
        with torch.device("meta"):
            head = AdaptiveSoftmax(64, 9000)
        assert head.cutoffs == AdaptiveSoftmax(64, 9000).cutoffs

    def test_is_pinned_by_the_structure(self):
        head = AdaptiveSoftmax(64, 9000)
        assert head.cutoffs
        again = AdaptiveSoftmax(64, 9000, torch.ones(9000), **head.structure())
        assert (again.cutoffs, again.tail_sizes) == (head.cutoffs, head.tail_sizes)


def test_a_device_without_constants_is_refused():
    with pytest.raises(ValueError, match="one of cpu, cuda, got 'tpu'"):
        cost_model_of("tpu")
    with pytest.raises(ValueError, match="got 'tpu'"):
        AdaptiveSoftmax(8, 100, cost_model="tpu")


def test_constants_are_times():
    for model in COST_MODELS.values():
        assert all(math.isfinite(value) and value > 0 for value in vars(model).values())
