"""Generation against distributions that are known by heart."""

from itertools import product

import pytest
import torch
from toys import NUM_CONTEXTS, VOCAB_SIZE, SumEncoder, TableHead, table

from lm_softmax.decoding import generate, stream
from lm_softmax.encoders import LSTMEncoder, TransformerEncoder
from lm_softmax.heads import AdaptiveSoftmax, FullSoftmax


def next_probabilities(
    tokens, window, probabilities, temperature=1.0, top_k=None, top_p=None, suppress=()
):
    """The distribution of the next word by definition, as a list."""
    seen = tokens[-window:] if window else tokens
    row = probabilities[sum(token + 1 for token in seen) % NUM_CONTEXTS].tolist()
    weights = {word: p ** (1 / temperature) for word, p in enumerate(row) if word not in suppress}
    order = sorted(weights, key=weights.get, reverse=True)[:top_k]
    total, kept, mass = sum(weights[word] for word in order), [], 0.0
    for word in order:
        if top_p is not None and mass >= top_p:
            break
        kept.append(word)
        mass += weights[word] / total
    total = sum(weights[word] for word in kept)
    return [weights[word] / total if word in kept else 0.0 for word in range(VOCAB_SIZE)]


ENCODERS = pytest.mark.parametrize(
    ("options", "window"),
    [({}, None), ({"carries_state": True}, None), ({"max_positions": 2}, 2)],
    ids=["all", "state", "window"],
)


@ENCODERS
def test_greedy_takes_the_most_probable_word_given_all_before_it(options, window):
    prompts = torch.randint(VOCAB_SIZE, (6, 3))
    for seed in range(5):
        probabilities = table(seed)
        expected = prompts.tolist()
        for row in expected:
            for _ in range(9):
                p = next_probabilities(row, window, probabilities)
                row.append(p.index(max(p)))
        encoder, head = SumEncoder(**options), TableHead(probabilities)
        assert generate(encoder, head, prompts, 9, temperature=0).tolist() == expected
        assert generate(encoder, head, prompts, 9, temperature=3.0, top_k=1).tolist() == expected
        assert generate(encoder, head, prompts, 9, top_p=1e-9).tolist() == expected


@ENCODERS
@pytest.mark.parametrize(
    "sampling",
    [
        {},
        {"temperature": 0.5},
        {"temperature": 2.0, "top_k": 3},
        {"top_p": 0.7},
        {"temperature": 1.5, "top_k": 3, "top_p": 0.8},
        {"suppress": [2, 0], "temperature": 1.5},
        {"suppress": [1], "temperature": 0.5, "top_k": 2, "top_p": 0.9},
        {"suppress": [1], "temperature": 2.0, "top_p": 0.7},
    ],
)
def test_sampled_continuations_have_their_exact_probabilities(options, window, sampling):
    prompt, num_new, num_rows = [2, 0, 1], 3, 8_000
    tokens = generate(
        SumEncoder(**options),
        TableHead(table()),
        torch.tensor([prompt]).expand(num_rows, -1),
        num_new,
        **sampling,
        generator=torch.Generator().manual_seed(1),
    )
    assert tokens.shape == (num_rows, 6)
    assert tokens.dtype == torch.int64
    assert (tokens[:, :3] == torch.tensor(prompt)).all()
    powers = VOCAB_SIZE ** torch.arange(num_new - 1, -1, -1)
    found = torch.bincount(tokens[:, 3:] @ powers, minlength=VOCAB_SIZE**num_new) / num_rows
    for index, continuation in enumerate(product(range(VOCAB_SIZE), repeat=num_new)):
        row, probability = list(prompt), 1.0
        for word in continuation:
            probability *= next_probabilities(row, window, table(), **sampling)[word]
            row.append(word)
        error = (probability * (1 - probability) / num_rows) ** 0.5
        assert abs(found[index] - probability) <= 5 * max(error, 1 / num_rows)
        assert probability > 0 or found[index] == 0


def test_the_generator_decides():
    prompt = torch.zeros(3, 1, dtype=torch.int64)
    results = [
        generate(
            SumEncoder(), TableHead(table()), prompt, 20, generator=torch.Generator().manual_seed(s)
        )
        for s in (1, 1, 2)
    ]
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])


@ENCODERS
@pytest.mark.parametrize("temperature", [0, 1.0])
def test_without_the_cache_the_text_is_the_same(options, window, temperature):
    prompt = torch.randint(VOCAB_SIZE, (5, 3))
    texts = []
    for use_cache in (True, False):
        encoder = SumEncoder(**options)
        generator = torch.Generator().manual_seed(4)
        sampling = {"temperature": temperature, "generator": generator, "use_cache": use_cache}
        texts.append(generate(encoder, TableHead(table()), prompt, 9, **sampling).tolist())
        fed = [len(rows[0]) for rows in encoder.calls]
        if not use_cache:
            assert fed == ([2] * 9 if window else list(range(3, 12)))
    assert texts[0] == texts[1]


def test_streamed_tokens_are_those_of_the_text_and_modes_are_restored_between_them():
    encoder, head = SumEncoder(carries_state=True), TableHead(table())
    prompt = torch.tensor([[0, 2], [1, 1], [3, 0]])
    generators = [torch.Generator().manual_seed(5) for _ in range(2)]
    whole = generate(encoder, head, prompt, 12, eos_id=0, generator=generators[0])
    steps = stream(encoder, head, prompt, 12, eos_id=0, generator=generators[1])
    columns = []
    for drawn in steps:
        columns.append(drawn)
        assert encoder.training
        assert head.training
        assert torch.is_grad_enabled()
    found = torch.stack(columns, 1)
    assert torch.equal(found, whole[:, 2 : 2 + len(columns)])
    assert len(columns) < 12  # all rows end before
    assert (whole[:, 2 + len(columns) :] == 0).all()


def test_a_stream_refuses_before_its_first_token():
    with pytest.raises(ValueError, match="num_tokens must be at least 1, got 0"):
        stream(SumEncoder(), TableHead(table()), PROMPT, 0)


def test_what_the_encoder_is_fed():
    prompt = torch.tensor([[3, 1, 2]])
    head = TableHead(torch.full((NUM_CONTEXTS, VOCAB_SIZE), 0.25, dtype=torch.float64))
    for options, lengths in [
        ({"carries_state": True}, [3, 1, 1, 1]),
        ({}, [3, 4, 5, 6]),
        ({"max_positions": 5}, [3, 4, 5, 5]),
        ({"max_positions": 2}, [2, 2, 2, 2]),
    ]:
        encoder = SumEncoder(**options)
        tokens = generate(encoder, head, prompt, 4)[0].tolist()
        assert [len(rows[0]) for rows in encoder.calls] == lengths
        ends = [3, 4, 5, 6]
        fed = [tokens[end - length : end] for end, length in zip(ends, lengths, strict=True)]
        assert [rows[0] for rows in encoder.calls] == fed


def test_a_row_ends_at_the_end_of_sequence():
    prompt = torch.tensor([[0, 2]]).expand(400, -1)  # an id in the prompt ends nothing
    generator = torch.Generator().manual_seed(1)
    free = generate(SumEncoder(), TableHead(table()), prompt, 12, generator=generator)
    generator = torch.Generator().manual_seed(1)
    ended = generate(SumEncoder(), TableHead(table()), prompt, 12, eos_id=0, generator=generator)
    lengths = set()
    for whole, row in zip(free.tolist(), ended.tolist(), strict=True):
        end = whole.index(0, 2) if 0 in whole[2:] else len(whole)
        assert row == whole[:end] + [0] * (len(whole) - end)
        lengths.add(end)
    assert len(lengths) > 5


def test_stops_when_all_rows_have_ended():
    probabilities = torch.zeros(NUM_CONTEXTS, VOCAB_SIZE, dtype=torch.float64)
    probabilities[:, 3] = 1
    encoder = SumEncoder()
    tokens = generate(encoder, TableHead(probabilities), torch.tensor([[1], [2]]), 50, eos_id=3)
    assert tokens.tolist() == [[1, *[3] * 50], [2, *[3] * 50]]
    assert len(encoder.calls) == 1


@pytest.mark.parametrize("fails", [False, True])
def test_modules_get_their_modes_back(fails):
    encoder, head = SumEncoder(), TableHead(table())
    encoder.embedding.eval()
    if fails:
        encoder.max_positions = -1  # no input fits
    before = [part.training for part in encoder.modules()]
    if fails:
        with pytest.raises(ValueError, match="tokens"):
            generate(encoder, head, torch.zeros(1, 1, dtype=torch.int64), 2)
    else:
        generate(encoder, head, torch.zeros(1, 1, dtype=torch.int64), 2)
    assert [part.training for part in encoder.modules()] == before == [True, False, True]
    assert head.training


@pytest.mark.parametrize("head_type", [FullSoftmax, AdaptiveSoftmax])
@pytest.mark.parametrize("encoder_type", [LSTMEncoder, TransformerEncoder])
def test_real_modules_equal_feeding_the_whole_text_again(encoder_type, head_type):
    torch.manual_seed(0)
    options = {"max_positions": 30} if encoder_type is TransformerEncoder else {"num_layers": 2}
    encoder = encoder_type(13, hidden_size=8, **options).double()
    head = head_type(8, 13, **({"cutoffs": [5]} if head_type is AdaptiveSoftmax else {})).double()
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.normal_()
    prompt = torch.randint(13, (3, 4))
    generated = generate(encoder, head, prompt, 12, temperature=0)
    encoder.eval()
    with torch.no_grad():
        for end in range(4, 16):
            hidden, _ = encoder(generated[:, :end])
            assert torch.equal(head.log_prob(hidden[:, -1]).argmax(-1), generated[:, end])
    assert generated.unique().numel() > 3


PROMPT = torch.zeros(2, 3, dtype=torch.int64)


@pytest.mark.parametrize(
    ("prompt", "options", "shown"),
    [
        (PROMPT, {"num_tokens": 0}, "num_tokens must be at least 1, got 0"),
        (
            PROMPT,
            {"num_tokens": 2**63},
            r"num_tokens must be below 2\*\*63, got 9223372036854775808",
        ),
        (PROMPT, {"temperature": -0.5}, r"temperature must be at least 0 .*got -0\.5"),
        (PROMPT, {"temperature": float("nan")}, "temperature .*got nan"),
        (PROMPT, {"temperature": float("inf")}, "temperature .*got inf"),
        (PROMPT, {"top_k": 0}, r"top_k must be in \[1, vocab_size=4\], got 0"),
        (PROMPT, {"top_k": 5, "temperature": 0}, r"top_k must be in \[1, vocab_size=4\], got 5"),
        (PROMPT, {"top_p": 0.0}, r"top_p must be in \(0, 1\], got 0\.0"),
        (PROMPT, {"top_p": 1.1, "temperature": 0}, r"top_p must be in \(0, 1\], got 1\.1"),
        (PROMPT, {"suppress": [1, 4]}, r"words to exclude .*vocab_size=4\), got ids from 1 to 4"),
        (PROMPT, {"suppress": range(4)}, "no word is left of vocab_size=4"),
        (PROMPT, {"eos_id": 4}, r"eos_id must be in \[0, vocab_size=4\), got 4"),
        (PROMPT[:, :0], {}, r"at least one token a row, got shape \(2, 0\)"),
        (PROMPT[0], {}, r"got shape \(3,\)"),
        (PROMPT.double(), {}, "prompt must be int64, got torch.float64"),
        (PROMPT + 4, {}, "ids from 4 to 4, outside"),
        (PROMPT - 1, {}, "ids from -1 to -1, outside"),
    ],
)
def test_refuses_impossible_options(prompt, options, shown):
    encoder = SumEncoder()
    with pytest.raises(ValueError, match=shown):
        generate(encoder, TableHead(table()), prompt, **({"num_tokens": 2} | options))
    assert encoder.calls == []


@pytest.mark.parametrize("options", [{"temperature": 0}, {}, {"temperature": 0, "suppress": [1]}])
def test_refuses_nan(options):
    with pytest.raises(ValueError, match="nan"):
        generate(SumEncoder(), TableHead(table() * torch.nan), PROMPT, 2, **options)
