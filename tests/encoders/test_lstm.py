"""The LSTM encoder against its equations, one step at a time."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from lm_softmax.encoders import AdaptiveEmbedding, LSTMEncoder
from lm_softmax.encoders.lstm import LockedDropout

VOCAB_SIZE = 19
TIGHT = {"atol": 1e-10, "rtol": 1e-10}
# torch has other LSTM kernels for float32 (oneDNN) than for float64
DTYPES = pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, {}), (torch.float64, TIGHT)]
)


def build(**options):
    torch.manual_seed(0)
    sizes = {"embedding_size": 5, "hidden_size": 6}
    return LSTMEncoder(VOCAB_SIZE, **(sizes | options)).double()


def draw(batch, time):
    return torch.randint(VOCAB_SIZE, (batch, time))


def layer_reference(lstm, layer, x, h, c, mask=1.0):
    """One layer by the equations of Hochreiter and Schmidhuber as torch documents them."""
    input_weight, hidden_weight, *biases = (
        getattr(lstm, f"{name}_l{layer}")
        for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
    )
    outputs = []
    for step in x.unbind(1):
        gates = step @ input_weight.T + h @ (hidden_weight * mask).T + sum(biases)
        i, f, g, o = gates.chunk(4, -1)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        h = o.sigmoid() * c.tanh()
        outputs.append(h)
    return torch.stack(outputs, 1), h, c


def reference(encoder, x, between=lambda x: x, masks=None, state=None):
    zeros = x.new_zeros(encoder.lstm.num_layers, x.shape[0], encoder.lstm.hidden_size)
    states = []
    for layer, (h, c) in enumerate(zip(*(state or (zeros, zeros)), strict=True)):
        x = between(x) if layer else x
        mask = masks[layer] if masks else 1.0
        x, h, c = layer_reference(encoder.lstm, layer, x, h, c, mask)
        states.append((h, c))
    return x, tuple(torch.stack(part) for part in zip(*states, strict=True))


def weight_masks(encoder, probability):
    return [
        nn.functional.dropout(
            torch.ones_like(getattr(encoder.lstm, f"weight_hh_l{layer}")), probability
        )
        for layer in range(encoder.lstm.num_layers)
    ]


@pytest.mark.parametrize("num_layers", [1, 3])
@pytest.mark.parametrize("output_size", [None, 5])
@DTYPES
def test_equals_the_equations(num_layers, output_size, dtype, tolerance):
    encoder = build(num_layers=num_layers, output_size=output_size).to(dtype)
    tokens = draw(3, 7)
    hidden, state = encoder(tokens)
    expected, end = reference(encoder, encoder.embedding(tokens))
    if output_size is not None:
        expected = expected @ encoder.projection.weight.T + encoder.projection.bias
    assert encoder.hidden_size == (output_size or 6)
    assert_close(hidden, expected, **tolerance)
    assert_close(state, end, **tolerance)


@pytest.mark.parametrize("num_layers", [1, 2])
@DTYPES
def test_weight_drop_masks_recurrent_weights_once_a_call(num_layers, dtype, tolerance):
    encoder = build(num_layers=num_layers, weight_drop=0.5).to(dtype)
    tokens = draw(3, 7)
    torch.manual_seed(5)
    hidden, _ = encoder(tokens)
    torch.manual_seed(5)
    masks = weight_masks(encoder, 0.5)
    expected, _ = reference(encoder, encoder.embedding(tokens), masks=masks)
    assert_close(hidden, expected, **tolerance)
    assert not torch.equal(hidden, encoder(tokens)[0])

    weights = torch.randn_like(hidden)
    parameters = list(encoder.parameters())
    gradients = torch.autograd.grad((hidden * weights).sum(), parameters)
    naive = torch.autograd.grad((expected * weights).sum(), parameters)
    for gradient, its_reference in zip(gradients, naive, strict=True):
        assert_close(gradient, its_reference, **tolerance)
    by_name = dict(zip(dict(encoder.named_parameters()), gradients, strict=True))
    assert not by_name["lstm.weight_hh_l0"][masks[0] == 0].any()


def test_evaluation_after_a_step_with_weight_drop_uses_the_whole_new_weights():
    encoder = build(num_layers=2, weight_drop=0.5, hidden_dropout=0.5)
    tokens = draw(3, 7)
    optimizer = torch.optim.SGD(encoder.parameters(), lr=0.5)
    encoder(tokens)[0].square().sum().backward()
    optimizer.step()
    plain = nn.LSTM(5, 6, 2, batch_first=True).double()
    plain.load_state_dict(encoder.lstm.state_dict())
    expected, end = plain(encoder.embedding(tokens))
    hidden, state = encoder.eval()(tokens)
    assert_close(hidden, expected, **TIGHT)
    assert_close(state, end, **TIGHT)


def test_hidden_dropout_lies_between_the_layers():
    encoder = build(num_layers=3, hidden_dropout=0.4, weight_drop=0.3)
    tokens = draw(3, 7)
    before = torch.randn(2, 3, 3, 6, dtype=torch.float64).unbind()
    torch.manual_seed(5)
    hidden, state = encoder(tokens, before)

    torch.manual_seed(5)  # masks are drawn in the order of the layers
    ones = torch.ones(3, 1, 6, dtype=torch.float64)
    masks, locked = [], []
    for layer in range(3):
        if layer:
            locked.append(nn.functional.dropout(ones, 0.4))
        weight = getattr(encoder.lstm, f"weight_hh_l{layer}")
        masks.append(nn.functional.dropout(torch.ones_like(weight), 0.3))
    remaining = iter(locked)
    expected, end = reference(
        encoder, encoder.embedding(tokens), lambda x: x * next(remaining), masks, before
    )
    assert_close(hidden, expected, **TIGHT)
    assert_close(state, end, **TIGHT)


@pytest.mark.parametrize("where", ["input_dropout", "output_dropout"])
def test_dropout_at_the_ends_is_locked_over_time(where):
    encoder = build(output_size=40, embedding_size=40, **{where: 0.5})
    seen = []
    getattr(encoder, where).register_forward_hook(lambda *call: seen.append(call[1:]))
    tokens = draw(4, 7)
    for _ in range(2):
        encoder(tokens)
    masks = [after / before[0] for before, after in seen]
    for mask in masks:
        assert_close(mask, mask[:, :1].expand_as(mask))
        assert_close(mask.unique(), torch.tensor([0.0, 2.0], dtype=torch.float64))
        assert not torch.equal(mask[0], mask[1])
    assert not torch.equal(masks[0], masks[1])
    seen.clear()
    encoder.eval()(tokens)
    assert torch.equal(seen[0][0][0], seen[0][1])


def test_locked_dropout_keeps_the_mean():
    dropout = LockedDropout(0.25)
    mean = dropout(torch.ones(400, 3, 50)).mean()
    assert abs(mean - 1) < 0.02
    with pytest.raises(ValueError, match=r"output_dropout is a probability in .*got 1\.0"):
        build(output_dropout=1.0)


@pytest.mark.parametrize("embedding", [None, AdaptiveEmbedding])
def test_embedding_dropout_takes_whole_words(embedding):
    options = {} if embedding is None else {"embedding": embedding}
    encoder = build(embedding_dropout=0.5, **options)
    seen = []
    encoder.input_dropout.register_forward_hook(lambda *call: seen.append(call[-1]))
    tokens = draw(8, 40)
    encoder(tokens)
    scale = seen[0] / encoder.embedding(tokens)
    factors = {word: scale[tokens == word].unique().tolist() for word in tokens.unique().tolist()}
    rounded = {round(value, 9) for values in factors.values() for value in values}
    assert rounded == {0.0, 2.0}
    assert all(max(values) - min(values) < 1e-9 for values in factors.values())
    encoder.eval()(tokens)
    assert torch.equal(seen[1], encoder.embedding(tokens))


def test_gradients_flow_through_an_undetached_state():
    encoder = build()
    _, state = encoder(draw(2, 3))
    hidden, _ = encoder(draw(2, 3), state)
    (gradient,) = torch.autograd.grad(hidden.sum(), state[0])
    assert gradient.any()


def test_refuses_a_state_of_other_rows():
    encoder = build(num_layers=2)
    _, state = encoder(draw(3, 4))
    with pytest.raises(ValueError, match=r"\(2, 4, 6\) for 4 rows.*\(2, 3, 6\)"):
        encoder(draw(4, 4), state)


@pytest.mark.parametrize(
    ("options", "shown"),
    [
        ({"num_layers": 0}, "num_layers must be at least 1, got 0"),
        ({"hidden_size": 0}, "hidden_size must be at least 1, got 0"),
        ({"output_size": 0}, "output_size must be at least 1, got 0"),
        ({"embedding_size": -1}, "embedding_size must be at least 1, got -1"),
        ({"weight_drop": -0.1}, r"weight_drop is a probability in \[0, 1\), got -0.1"),
        ({"embedding_dropout": 1.5}, "embedding_dropout is a probability"),
        ({"hidden_dropout": float("nan")}, "hidden_dropout is a probability"),
    ],
)
def test_refuses_impossible_options(options, shown):
    with pytest.raises(ValueError, match=shown):
        build(**options)
