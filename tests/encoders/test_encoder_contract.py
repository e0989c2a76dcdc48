"""What every encoder promises, whatever is inside."""

import copy
import pickle
import subprocess
import sys
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from lm_softmax.encoders import (
    AdaptiveEmbedding,
    HuggingFaceEncoder,
    LSTMEncoder,
    TransformerEncoder,
    WordEmbedding,
)

VOCAB_SIZE = 23
adaptive = partial(AdaptiveEmbedding, cutoffs=[5, 11], div_value=2.0, min_tail_size=1)
ENCODERS = {
    "lstm": partial(LSTMEncoder, embedding_size=6, hidden_size=10),
    "lstm_dropout": partial(
        LSTMEncoder,
        embedding_size=5,
        hidden_size=7,
        num_layers=3,
        output_size=4,
        embedding=adaptive,
        embedding_dropout=0.2,
        input_dropout=0.3,
        hidden_dropout=0.3,
        output_dropout=0.3,
        weight_drop=0.4,
    ),
    "transformer": partial(
        TransformerEncoder, hidden_size=12, num_layers=2, num_heads=2, dropout=0.2, max_positions=16
    ),
    "transformer_post_norm": partial(
        TransformerEncoder,
        hidden_size=9,
        num_layers=2,
        num_heads=3,
        feedforward_size=11,
        dropout=0.0,
        max_positions=16,
        positions="learned",
        norm_first=False,
        embedding=adaptive,
    ),
    "gpt2": partial(
        HuggingFaceEncoder,
        config={"model_type": "gpt2", "n_layer": 2, "n_embd": 8, "n_head": 2, "n_positions": 16},
    ),
    "llama": partial(
        HuggingFaceEncoder,
        config={
            "model_type": "llama",
            "num_hidden_layers": 2,
            "hidden_size": 8,
            "num_attention_heads": 2,
            "intermediate_size": 12,
            "max_position_embeddings": 16,
        },
    ),
}
STATEFUL = ("lstm", "lstm_dropout")
CASES = pytest.mark.parametrize("name", ENCODERS)
sizes = st.tuples(st.integers(1, 5), st.integers(1, 16))


def build(name, vocab_size=VOCAB_SIZE, dtype=torch.float32):
    torch.manual_seed(0)
    return ENCODERS[name](vocab_size).to(dtype)


def draw(batch, time, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(VOCAB_SIZE, (batch, time), generator=generator)


@CASES
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (5, 1), (3, 16)])
def test_one_hidden_vector_a_position(name, dtype, shape):
    encoder = build(name, dtype=dtype)
    hidden, state = encoder(draw(*shape))
    assert hidden.shape == (*shape, encoder.hidden_size)
    assert hidden.dtype == dtype
    assert hidden.isfinite().all()
    assert encoder.vocab_size == VOCAB_SIZE
    assert (state is None) == (not encoder.carries_state) == (name not in STATEFUL)


@CASES
@pytest.mark.parametrize("training", [False, True])
@settings(max_examples=8, deadline=None)
@given(size=sizes, data=st.data())
def test_tokens_after_a_position_do_not_change_it(name, training, size, data):
    encoder = build(name).train(training)
    tokens = draw(*size)
    position = data.draw(st.integers(0, size[1] - 1))
    changed = tokens.clone()
    changed[:, position + 1 :] = (changed[:, position + 1 :] + 7) % VOCAB_SIZE
    for grad_mode in (True, False):  # torch's own layers take another path without gradients
        with torch.set_grad_enabled(grad_mode):
            torch.manual_seed(1)
            hidden, _ = encoder(tokens)
            torch.manual_seed(1)
            other, _ = encoder(changed)
        assert torch.equal(hidden[:, : position + 1], other[:, : position + 1])


@CASES
@pytest.mark.parametrize("training", [False, True])
def test_no_gradient_comes_from_later_positions(name, training):
    encoder = build(name, dtype=torch.float64).train(training)
    embedded = []
    encoder.embedding.register_forward_hook(lambda *call: embedded.append(call[-1]))
    hidden, _ = encoder(draw(2, 9))
    weights = torch.arange(1.0, encoder.hidden_size + 1, dtype=torch.float64)
    seen = 0
    for position in range(9):
        (gradient,) = torch.autograd.grad(
            (hidden[:, position] @ weights).sum(), embedded[0], retain_graph=True
        )
        assert not gradient[:, position + 1 :].any()
        seen += bool(gradient[:, position].any())
    assert seen == 9 if not training else seen > 0  # dropout may take a whole position


@CASES
def test_without_gradients_the_result_is_the_same(name):
    encoder = build(name, dtype=torch.float64).eval()
    tokens = draw(3, 11)
    with torch.no_grad():
        expected = encoder(tokens)[0]
    assert_close(encoder(tokens)[0], expected, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("name", STATEFUL)
@settings(max_examples=15, deadline=None)
@given(size=st.tuples(st.integers(1, 4), st.integers(2, 13)), data=st.data())
def test_two_halves_with_state_equal_the_whole(name, size, data):
    encoder = build(name, dtype=torch.float64).eval()
    tokens = draw(*size)
    cut = data.draw(st.integers(1, size[1] - 1))
    whole, end = encoder(tokens)
    first, state = encoder(tokens[:, :cut])
    second, other_end = encoder(tokens[:, cut:], state)
    assert_close(torch.cat([first, second], 1), whole, atol=1e-10, rtol=1e-10)
    assert_close(other_end, end, atol=1e-10, rtol=1e-10)


def randomised(name):
    """In float64, without zeros that would hide a mistake."""
    encoder = build(name, dtype=torch.float64).eval()
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.3)
    return encoder


@CASES
@settings(max_examples=8, deadline=None)
@given(st.integers(1, 3), st.lists(st.integers(1, 9), min_size=1, max_size=8), st.data())
def test_decoding_from_a_cache_equals_the_last_window_computed_again(name, batch, sizes, data):
    """Also beyond `max_positions`, and after rows were dropped, copied and reordered."""
    encoder = randomised(name)
    seen, cache = draw(batch, 0), None
    for number, size in enumerate(sizes):
        new = draw(len(seen), size, seed=number)
        seen = torch.cat([seen, new], 1)
        with torch.no_grad():
            hidden, cache = encoder.continue_from(new, cache)
            expected = encoder(seen[:, -(encoder.max_positions or 99) :])[0][:, -1]
        assert_close(hidden, expected, atol=1e-10, rtol=1e-10)
        places = st.lists(st.integers(0, len(seen) - 1), min_size=1, max_size=4)
        rows = torch.tensor(data.draw(places))
        seen, cache = seen[rows], encoder.select_rows(cache, rows)


@CASES
def test_a_cache_spares_the_tokens_before(name):
    encoder = randomised(name)
    looked_up = []
    encoder.embedding.register_forward_hook(lambda _, args, out: looked_up.append(args[0].shape[1]))
    cache = None
    for size in (5, 1, 2):
        _, cache = encoder.continue_from(draw(2, size), cache)
    assert looked_up == [5, 1, 2]


@pytest.mark.parametrize("name", ["transformer", "transformer_post_norm", "gpt2", "llama"])
def test_decoding_starts_no_state_in_training(name):
    encoder = build(name)
    _, cache = encoder.continue_from(draw(2, 3))
    assert encoder(draw(2, 3))[1] is None
    with pytest.raises(ValueError, match="carries no state"):
        encoder(draw(2, 3), cache)


@CASES
def test_decoding_refuses_what_are_no_tokens(name):
    encoder = build(name)
    _, cache = encoder.continue_from(draw(2, 3))
    with pytest.raises(ValueError, match=r"tokens must be int64 of shape.* \(2, 0\)"):
        encoder.continue_from(draw(2, 0), cache)


@CASES
def test_rows_do_not_see_each_other(name):
    encoder = build(name, dtype=torch.float64).eval()
    tokens = draw(4, 9)
    together, _ = encoder(tokens)
    alone = torch.cat([encoder(row[None])[0] for row in tokens])
    assert_close(together, alone, atol=1e-10, rtol=1e-10)


@CASES
def test_every_parameter_gets_a_gradient(name):
    encoder = build(name)
    encoder(torch.zeros(2, 3, dtype=torch.int64))[0].sum().backward()
    without = [key for key, value in encoder.named_parameters() if value.grad is None]
    assert without == []


@CASES
def test_copies_and_loaded_weights_give_the_same(name):
    encoder = build(name).eval()
    tokens = draw(2, 5)
    expected, _ = encoder(tokens)
    torch.manual_seed(99)
    loaded = ENCODERS[name](VOCAB_SIZE, **encoder.structure()).eval()
    assert not torch.equal(loaded(tokens)[0], expected)
    loaded.load_state_dict(encoder.state_dict())
    for other in (copy.deepcopy(encoder), pickle.loads(pickle.dumps(encoder)), loaded):
        assert torch.equal(other(tokens)[0], expected)


@CASES
def test_training_mode_matters_only_for_dropout(name):
    encoder = build(name)
    assert encoder.training
    tokens = draw(2, 5)
    if name in ("lstm", "transformer_post_norm"):
        assert_close(encoder(tokens)[0], encoder.eval()(tokens)[0])
    else:
        encoder.eval()
        assert torch.equal(encoder(tokens)[0], encoder(tokens)[0])


# Where a graph breaks dynamo looks at `.grad` of what lies there, and hides the warning too late.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@CASES
def test_compiled_it_gives_the_same(name):
    encoder = build(name).eval()
    tokens = draw(2, 5)
    compiled = torch.compile(encoder, backend="eager")
    assert_close(compiled(tokens)[0], encoder(tokens)[0])


@CASES
def test_runs_under_bfloat16_autocast(name):
    encoder = build(name)
    with torch.autocast("cpu", torch.bfloat16):
        hidden, state = encoder(draw(3, 4))
        hidden, _ = encoder(draw(3, 4), state)
    hidden.float().square().sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in encoder.parameters())
    assert hidden.isfinite().all()


@CASES
@pytest.mark.parametrize(
    ("tokens", "shown"),
    [
        (torch.zeros(5, dtype=torch.int64), r"\(5,\)"),
        (torch.zeros(2, 0, dtype=torch.int64), r"\(2, 0\)"),
        (torch.zeros(0, 2, dtype=torch.int64), r"\(0, 2\)"),
        (torch.zeros(2, 2), "float32"),
    ],
)
def test_refuses_what_are_no_tokens(name, tokens, shown):
    with pytest.raises(ValueError, match=shown):
        build(name)(tokens)


@pytest.mark.parametrize("name", ["transformer", "gpt2", "llama"])
def test_refuses_more_tokens_than_positions(name):
    encoder = build(name)
    assert encoder.max_positions == 16
    with pytest.raises(ValueError, match="17 tokens in a row exceed max_positions=16"):
        encoder(draw(1, 17))


@pytest.mark.parametrize("name", ["transformer", "gpt2"])
def test_refuses_a_state_it_cannot_carry(name):
    with pytest.raises(ValueError, match="carries no state"):
        build(name)(draw(1, 2), (torch.zeros(1),))


@CASES
def test_refuses_impossible_vocabularies(name):
    with pytest.raises(ValueError, match="vocab_size must be at least 1, got 0"):
        ENCODERS[name](0)
    with pytest.raises(ValueError, match=r"\(23,\).*\(22,\)"):
        ENCODERS[name](VOCAB_SIZE, torch.ones(22))


@pytest.mark.parametrize("name", ["lstm", "transformer", "gpt2"])
def test_without_pretrained_weights_there_is_nothing_to_permute(name):
    encoder = build(name)
    before = encoder.embedding.weight.clone()
    encoder.permute_embedding(torch.arange(VOCAB_SIZE).flip(0))
    assert torch.equal(encoder.embedding.weight, before)


def test_the_embedding_is_built_from_the_counts():
    seen = []

    def embedding(vocab_size, embedding_size, counts):
        seen.append((vocab_size, embedding_size, counts))
        return WordEmbedding(vocab_size, embedding_size)

    counts = torch.arange(VOCAB_SIZE, 0, -1)
    LSTMEncoder(VOCAB_SIZE, counts, embedding_size=3, hidden_size=2, embedding=embedding)
    TransformerEncoder(VOCAB_SIZE, counts, hidden_size=4, embedding=embedding)
    assert [call[:2] for call in seen] == [(VOCAB_SIZE, 3), (VOCAB_SIZE, 4)]
    assert all(call[2] is counts for call in seen)


def test_importing_the_encoders_imports_no_other_library():
    code = (
        "import sys, lm_softmax.encoders;"
        "sys.exit(str({'transformers', 'lightning', 'datasets'} & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stderr.strip() == "set()"
