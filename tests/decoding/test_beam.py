"""Beam search against all continuations there are."""

import math
from itertools import product

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from toys import NUM_CONTEXTS, VOCAB_SIZE, SumEncoder, TableHead, table

from lm_softmax.decoding import beam_search, generate
from lm_softmax.encoders import LSTMEncoder, TransformerEncoder
from lm_softmax.heads import AdaptiveSoftmax, FullSoftmax

TIGHT = {"rel": 1e-10, "abs": 1e-10}


def log_prob_of(prompt, continuation, probabilities, window=None, suppress=()):
    """The sum over the words, each normalised over those that are not suppressed."""
    total, seen = 0.0, list(prompt)
    for word in continuation:
        context = seen[-window:] if window else seen
        row = probabilities[sum(token + 1 for token in context) % NUM_CONTEXTS].tolist()
        rest = sum(p for other, p in enumerate(row) if other not in suppress)
        total += math.log(row[word] / rest)
        seen.append(word)
    return total


def every_hypothesis(num_tokens, eos_id, suppress=()):
    """Continuations that end in their first `eos_id`, or have all tokens."""
    words = [word for word in range(VOCAB_SIZE) if word not in suppress]
    for length in range(1, num_tokens + 1):
        for tokens in product(words, repeat=length):
            if eos_id in tokens[:-1]:
                continue
            if tokens[-1] == eos_id or length == num_tokens:
                yield list(tokens)


@settings(max_examples=20, deadline=None)
@given(
    st.integers(0, 10_000),
    st.integers(1, 3),
    st.sampled_from([None, 0, 3]),
    st.sampled_from([0.0, 0.6, 1.0, 2.5, -0.5]),
    st.sampled_from([(), (1,), (0, 2)]),
    st.sampled_from([({}, None), ({"carries_state": True}, None), ({"max_positions": 2}, 2)]),
)
def test_wide_beams_find_the_best_of_all(seed, num_tokens, eos_id, penalty, suppress, kind):
    options, window = kind
    probabilities = table(seed)
    prompts = torch.tensor([[2, 1], [0, 3]])
    number = sum(1 for _ in every_hypothesis(num_tokens, eos_id, suppress))
    found = beam_search(
        SumEncoder(**options),
        TableHead(probabilities),
        prompts,
        num_tokens,
        num_beams=number + 1,
        num_return=number + 1,
        length_penalty=penalty,
        eos_id=eos_id,
        suppress=suppress,
    )
    for prompt, row in zip(prompts.tolist(), found, strict=True):
        expected = []
        for tokens in every_hypothesis(num_tokens, eos_id, suppress):
            total = log_prob_of(prompt, tokens, probabilities, window, suppress)
            expected.append((total / len(tokens) ** penalty, total, tokens))
        expected.sort(key=lambda one: -one[0])
        assert len(row) == len(expected)
        for hypothesis, (score, total, _) in zip(row, expected, strict=True):
            assert hypothesis.score == pytest.approx(score, **TIGHT)
            own = log_prob_of(prompt, hypothesis.tokens, probabilities, window, suppress)
            assert hypothesis.log_prob == pytest.approx(own, **TIGHT)
            assert hypothesis.log_prob == pytest.approx(total, **TIGHT) or penalty != 1.0
        assert sorted(one.tokens for one in row) == sorted(one[2] for one in expected)


@pytest.mark.parametrize("penalty", [0.0, 1.0, 3.0])
@pytest.mark.parametrize("eos_id", [None, 0, 2])
def test_one_beam_is_greedy(eos_id, penalty):
    prompts = torch.randint(VOCAB_SIZE, (6, 3))
    for seed in range(8):
        head = TableHead(table(seed))
        greedy = generate(SumEncoder(), head, prompts, 9, temperature=0, eos_id=eos_id)[:, 3:]
        options = {"num_beams": 1, "eos_id": eos_id, "length_penalty": penalty}
        found = beam_search(SumEncoder(), head, prompts, 9, **options)
        for row, (best,) in zip(greedy.tolist(), found, strict=True):
            end = row.index(eos_id) + 1 if eos_id in row else 9
            assert best.tokens == row[:end]


def narrow_search(prompt, probabilities, num_tokens, num_beams, eos_id):
    """The search written out: the first of each step's candidates end or stay open."""
    beams, done = [([], 0.0)], []
    for step in range(num_tokens):
        candidates = [
            ([*tokens, word], log_prob_of(prompt, [*tokens, word], probabilities))
            for tokens, _ in beams
            for word in range(VOCAB_SIZE)
        ]
        candidates.sort(key=lambda one: -one[1])
        done += [one for one in candidates[:num_beams] if one[0][-1] == eos_id]
        beams = [one for one in candidates if one[0][-1] != eos_id][:num_beams]
        if len(done) >= num_beams:
            return done
        if step == num_tokens - 1:
            return done + beams
    raise AssertionError


@settings(max_examples=15, deadline=None)
@example(8240, 4, 4, None)  # two as probable as each other
@given(st.integers(0, 10_000), st.integers(2, 5), st.integers(1, 7), st.sampled_from([None, 0, 3]))
def test_narrow_beams_follow_their_definition(seed, num_beams, num_tokens, eos_id):
    probabilities = table(seed)
    prompts = torch.tensor([[2, 1], [0, 3], [1, 1]])
    found = beam_search(
        SumEncoder(carries_state=True),
        TableHead(probabilities),
        prompts,
        num_tokens,
        num_beams=num_beams,
        num_return=num_beams,
        length_penalty=0.7,
        eos_id=eos_id,
    )
    for prompt, row in zip(prompts.tolist(), found, strict=True):
        expected = narrow_search(prompt, probabilities, num_tokens, num_beams, eos_id)
        expected.sort(key=lambda one: -one[1] / len(one[0]) ** 0.7)
        scores = [total / len(tokens) ** 0.7 for tokens, total in expected[:num_beams]]
        assert [one.score for one in row] == pytest.approx(scores, **TIGHT)
        for one in row:  # words in another order, of the same sum, may be as probable
            own = log_prob_of(prompt, one.tokens, probabilities)
            assert one.log_prob == pytest.approx(own, **TIGHT)
        assert len({tuple(one.tokens) for one in row}) == len(row)


ENCODERS = {
    "lstm": lambda: LSTMEncoder(13, hidden_size=8, embedding_size=6, num_layers=2),
    "transformer": lambda: TransformerEncoder(13, hidden_size=8, num_heads=2, max_positions=9),
    "transformer_after": lambda: TransformerEncoder(
        13, hidden_size=8, num_heads=2, max_positions=30, norm_first=False, positions="learned"
    ),
}


def randomise(module):
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(std=0.7)
    return module.double()


@pytest.mark.parametrize("head_type", [FullSoftmax, AdaptiveSoftmax])
@pytest.mark.parametrize("name", ENCODERS)
def test_caches_follow_their_hypotheses(name, head_type):
    """Also past `max_positions`; each log-probability is that of its own tokens."""
    torch.manual_seed(1)
    encoder = randomise(ENCODERS[name]())
    options = {"cutoffs": [5]} if head_type is AdaptiveSoftmax else {}
    head = randomise(head_type(8, 13, **options))
    prompt = torch.randint(13, (3, 4))
    search = {"num_beams": 5, "num_return": 5, "eos_id": 1}
    found = beam_search(encoder, head, prompt, 10, **search)
    again = beam_search(encoder, head, prompt, 10, use_cache=False, **search)
    encoder.eval()
    for before, row, same in zip(prompt.tolist(), found, again, strict=True):
        assert [one.tokens for one in row] == [one.tokens for one in same]
        assert len({tuple(one.tokens) for one in row}) == 5
        for hypothesis in row:
            tokens, total = list(before), 0.0
            for word in hypothesis.tokens:
                window = torch.tensor([tokens[-(encoder.max_positions or 99) :]])
                with torch.no_grad():
                    hidden = encoder(window)[0][0, -1]
                    total += float(head.log_prob(hidden)[word])
                tokens.append(word)
            assert hypothesis.log_prob == pytest.approx(total, **TIGHT)


def test_search_of_a_lone_word():
    head = FullSoftmax(NUM_CONTEXTS, 1)
    encoder = SumEncoder()
    encoder.forward = lambda tokens, state=None: (torch.ones(*tokens.shape, NUM_CONTEXTS), None)
    prompt = torch.zeros(1, 1, dtype=torch.int64)
    ((best,),) = beam_search(encoder, head, prompt, 3, num_beams=4, num_return=4)
    assert best.tokens == [0, 0, 0]
    ((best,),) = beam_search(encoder, head, prompt, 3, num_beams=4, eos_id=0)
    assert (best.tokens, best.log_prob) == ([0], 0.0)


PROMPT = torch.zeros(2, 3, dtype=torch.int64)


@pytest.mark.parametrize(
    ("prompt", "options", "shown"),
    [
        (PROMPT, {"num_tokens": 0}, "num_tokens must be at least 1, got 0"),
        (PROMPT, {"num_beams": 0}, "num_beams must be at least 1, got 0"),
        (PROMPT, {"num_return": 0}, r"num_return must be in \[1, num_beams=4\], got 0"),
        (PROMPT, {"num_return": 5}, r"num_return must be in \[1, num_beams=4\], got 5"),
        (
            PROMPT,
            {"num_tokens": 2**63},
            "num_tokens must be below 2\\*\\*63, got 9223372036854775808",
        ),
        (
            PROMPT,
            {"num_beams": 10**20, "num_tokens": 14},
            f"num_beams={10**20} of 2 prompts would rank {2 * 4**14} continuations in a step, more"
            f" than {2**27}: lower num_beams",
        ),
        (PROMPT, {"length_penalty": math.nan}, "length_penalty must be a finite number, got nan"),
        (PROMPT, {"length_penalty": 1e9}, "length_penalty=1000000000.0 is too large"),
        (PROMPT, {"length_penalty": -1e9}, "length_penalty=-1000000000.0 is too large"),
        (PROMPT, {"suppress": [9]}, "words to exclude"),
        (PROMPT, {"eos_id": 4}, r"eos_id must be in \[0, vocab_size=4\), got 4"),
        (PROMPT[:, :0], {}, r"at least one token a row, got shape \(2, 0\)"),
    ],
)
def test_refuses_impossible_options(prompt, options, shown):
    encoder = SumEncoder()
    with pytest.raises(ValueError, match=shown):
        beam_search(encoder, TableHead(table()), prompt, **({"num_tokens": 2} | options))
    assert encoder.calls == []


def test_more_beams_than_there_are_texts_cost_no_more_than_these():
    for num_tokens in (1, 3):
        (few,) = beam_search(
            SumEncoder(), TableHead(table()), PROMPT[:1], num_tokens, num_beams=64, num_return=64
        )
        (many,) = beam_search(
            SumEncoder(),
            TableHead(table()),
            PROMPT[:1],
            num_tokens,
            num_beams=10**20,
            num_return=10**20,
        )
        assert many == few
        assert len(few) == 4**num_tokens


def test_refuses_nan():
    head = TableHead(table() * math.nan)
    with pytest.raises(ValueError, match="nan"):
        beam_search(SumEncoder(), head, PROMPT, 2)
