"""The Transformer encoder against its equations."""

import math

import pytest
import torch
from torch.nn.functional import gelu
from torch.testing import assert_close

from lm_softmax.encoders import TransformerEncoder
from lm_softmax.encoders.transformer import sinusoids

VOCAB_SIZE = 19
TIGHT = {"atol": 1e-10, "rtol": 1e-10}


def build(**options):
    torch.manual_seed(0)
    sizes = {"hidden_size": 12, "num_layers": 2, "num_heads": 3, "max_positions": 9}
    return TransformerEncoder(VOCAB_SIZE, **(sizes | options)).double()


def normalise(x, norm):
    centred = x - x.mean(-1, keepdim=True)
    spread = centred.square().mean(-1, keepdim=True)
    return centred / (spread + 1e-5).sqrt() * norm.weight + norm.bias


def attend(x, attention, num_heads):
    """Causal attention of one row, `(time, hidden)`, head by head and position by position."""
    queries, keys, values = (x @ attention.in_proj_weight.T + attention.in_proj_bias).chunk(3, -1)
    width = x.shape[-1] // num_heads
    heads = []
    for head in range(num_heads):
        part = slice(head * width, (head + 1) * width)
        rows = []
        for position in range(len(x)):
            scores = keys[: position + 1, part] @ queries[position, part] / math.sqrt(width)
            rows.append((scores.exp() / scores.exp().sum()) @ values[: position + 1, part])
        heads.append(torch.stack(rows))
    return torch.cat(heads, -1) @ attention.out_proj.weight.T + attention.out_proj.bias


def feed_forward(x, layer):
    inner = gelu(x @ layer.linear1.weight.T + layer.linear1.bias)
    return inner @ layer.linear2.weight.T + layer.linear2.bias


def reference(encoder, row, num_heads, norm_first):
    x = encoder.embedding.weight[row] * math.sqrt(encoder.hidden_size)
    x = x + encoder.positions[: len(row)]
    for layer in encoder.layers:
        if norm_first:
            x = x + attend(normalise(x, layer.norm1), layer.self_attn, num_heads)
            x = x + feed_forward(normalise(x, layer.norm2), layer)
        else:
            x = normalise(x + attend(x, layer.self_attn, num_heads), layer.norm1)
            x = normalise(x + feed_forward(x, layer), layer.norm2)
    return normalise(x, encoder.norm) if norm_first else x


@pytest.mark.parametrize("norm_first", [True, False])
@pytest.mark.parametrize("positions", ["sinusoidal", "learned"])
@pytest.mark.parametrize("num_heads", [1, 2, 3])
def test_equals_the_equations(norm_first, positions, num_heads):
    encoder = build(norm_first=norm_first, positions=positions, num_heads=num_heads, dropout=0.0)
    with torch.no_grad():  # biases and norms start where they would hide a mistake
        for parameter in encoder.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.3)
    tokens = torch.randint(VOCAB_SIZE, (2, 7))
    expected = torch.stack([reference(encoder, row, num_heads, norm_first) for row in tokens])
    assert_close(encoder(tokens)[0], expected, **TIGHT)
    with torch.no_grad():
        assert_close(encoder.eval()(tokens)[0], expected, **TIGHT)


@pytest.mark.parametrize("size", [1, 2, 7, 10])
def test_sinusoids_follow_the_paper(size):
    table = sinusoids(30, size)
    assert table.shape == (30, size)
    for position, column in [(0, 0), (13, size - 1), (29, size // 2)]:
        angle = position / 10000 ** ((column - column % 2) / size)
        expected = math.cos(angle) if column % 2 else math.sin(angle)
        assert_close(table[position, column].item(), expected, atol=1e-5, rtol=0)


def test_learned_positions_are_a_parameter_and_sinusoids_are_no_weights():
    assert "positions" in dict(build(positions="learned").named_parameters())
    assert "positions" not in build().state_dict()
    assert torch.equal(build(positions="learned").positions, build().positions)


def test_matrices_start_small_and_different_in_each_layer():
    encoder = build(hidden_size=96, num_layers=8)
    first, last = encoder.layers[0], encoder.layers[7]
    assert not torch.equal(first.linear1.weight, last.linear1.weight)
    for weight, std in [
        (first.self_attn.in_proj_weight, 0.02),
        (first.linear1.weight, 0.02),
        (first.self_attn.out_proj.weight, 0.005),
        (last.linear2.weight, 0.005),
    ]:
        assert abs(weight.std() / std - 1) < 0.03
    assert not first.linear1.bias.any()
    assert not first.self_attn.in_proj_bias.any()
    assert (first.norm1.weight == 1).all()
    assert first.linear1.out_features == 4 * 96
    hidden, _ = encoder.eval()(torch.arange(9)[None])
    assert_close(hidden.square().mean(-1), torch.ones(1, 9).double(), atol=1e-3, rtol=0)


def test_dropout_is_drawn_in_training_alone():
    encoder = build(dropout=0.5)
    tokens = torch.randint(VOCAB_SIZE, (2, 5))
    assert not torch.equal(encoder(tokens)[0], encoder(tokens)[0])
    encoder.eval()
    assert torch.equal(encoder(tokens)[0], encoder(tokens)[0])


@pytest.mark.parametrize(
    ("options", "shown"),
    [
        ({"num_heads": 5}, "hidden_size=12 is not a multiple of num_heads=5"),
        ({"num_heads": 0}, "num_heads must be at least 1, got 0"),
        ({"num_layers": 0}, "num_layers must be at least 1, got 0"),
        ({"feedforward_size": 0}, "feedforward_size must be at least 1, got 0"),
        ({"max_positions": 0}, "max_positions must be at least 1, got 0"),
        ({"dropout": 1.0}, r"dropout is a probability in \[0, 1\), got 1.0"),
        ({"positions": "rotary"}, "positions must be .* got 'rotary'"),
    ],
)
def test_refuses_impossible_options(options, shown):
    with pytest.raises(ValueError, match=shown):
        build(**options)
