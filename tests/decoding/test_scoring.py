"""Scores of texts against one text and one token at a time."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from lm_softmax.decoding import score, scoring
from lm_softmax.encoders import LSTMEncoder, TransformerEncoder
from lm_softmax.heads import AdaptiveSoftmax

VOCAB_SIZE, CONTEXT = 17, 3
TIGHT = {"atol": 1e-10, "rtol": 1e-10}


def build(kind, **options):
    torch.manual_seed(0)
    encoder = kind(VOCAB_SIZE, hidden_size=8, dropout=0.3, **options)
    return encoder.double(), AdaptiveSoftmax(8, VOCAB_SIZE, cutoffs=[5]).double()


MODELS = {
    "lstm": lambda: (
        LSTMEncoder(VOCAB_SIZE, embedding_size=6, hidden_size=8, output_dropout=0.3).double(),
        AdaptiveSoftmax(8, VOCAB_SIZE, cutoffs=[5]).double(),
    ),
    "transformer": lambda: build(TransformerEncoder, num_heads=2, num_layers=2, max_positions=7),
    "lone position": lambda: build(TransformerEncoder, num_heads=2, max_positions=1),
}
texts = st.lists(st.lists(st.integers(0, VOCAB_SIZE - 1), max_size=23), max_size=5)


def expected(encoder, head, text):
    """Token by token; past `max_positions` in windows that begin as the documentation says."""
    inputs, found, limit = [CONTEXT, *text], [], encoder.max_positions
    begin = 0
    for place, word in enumerate(text):
        if limit is not None and place - begin == limit:
            begin = place - limit // 2
        hidden, _ = encoder(torch.tensor([inputs[begin : place + 1]]))
        found.append(head.log_prob(hidden[0, -1])[word])
    return torch.stack(found) if found else torch.empty(0, dtype=torch.float64)


@pytest.mark.parametrize("name", MODELS)
@settings(max_examples=7, deadline=None)
@given(texts=texts, batch_tokens=st.sampled_from([1, 20, 1000]), chunk=st.sampled_from([5, 2048]))
def test_each_token_is_given_those_before_it(name, texts, batch_tokens, chunk):
    encoder, head = MODELS[name]()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scoring, "CHUNK", chunk)
        found = score(encoder, head, texts, context_id=CONTEXT, batch_tokens=batch_tokens)
    assert encoder.training
    encoder.eval()
    assert len(found) == len(texts)
    with torch.no_grad():
        for one, text in zip(found, texts, strict=True):
            assert_close(one, expected(encoder, head, text), check_dtype=bool(text), **TIGHT)


def test_texts_of_like_length_go_together():
    encoder, head = MODELS["lstm"]()
    seen = []
    encoder.register_forward_pre_hook(lambda _, args: seen.append(tuple(args[0].shape)))
    score(encoder, head, [[1] * n for n in (2, 9, 3, 8, 2, 0)], context_id=0, batch_tokens=18)
    assert seen == [(2, 9), (3, 3)]


@pytest.mark.parametrize(
    ("texts", "options", "shown"),
    [
        ([[1, 17]], {}, r"ids from 1 to 17, outside \[0, vocab_size=17\)"),
        ([[1, -1]], {}, "ids from -1 to 3"),
        ([[1]], {"context_id": 17}, "ids from 1 to 17"),
        ([[1]], {"batch_tokens": 0}, "batch_tokens must be at least 1, got 0"),
    ],
)
def test_refuses_impossible_options(texts, options, shown):
    encoder, head = MODELS["lstm"]()
    with pytest.raises(ValueError, match=shown):
        score(encoder, head, texts, **({"context_id": CONTEXT} | options))
