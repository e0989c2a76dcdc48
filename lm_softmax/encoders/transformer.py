"""A causal Transformer encoder made of torch's own layers."""

import math
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from lm_softmax.encoders.base import (
    EmbeddingFactory,
    Encoder,
    State,
    check_num_layers,
    check_probability,
    check_size,
)
from lm_softmax.encoders.embedding import WordEmbedding


class TransformerEncoder(Encoder):
    """Embedding, positions and a stack of causal `nn.TransformerEncoderLayer`.

    Returns hidden vectors `(batch, time, hidden_size)` that end in a layer norm, and no state: a
    position sees the tokens of its own call only, at most `max_positions` of them. Attention goes
    through `scaled_dot_product_attention` with `is_causal`, so a GPU picks its fused kernels. While
    decoding, `continue_from` keeps the keys and values of the tokens before.

    Embeddings are multiplied by `sqrt(hidden_size)` (Vaswani et al. 2017, section 3.4), which
    gives those of this package unit variance. Matrices start from N(0, 0.02^2) and biases from 0,
    those that write to the residual stream divided by `sqrt(2 * num_layers)` as in GPT-2.

    Args:
        vocab_size: Number of token ids.
        counts: Training-set frequency of each id, for embeddings that need it.
        hidden_size: Width of every layer, a multiple of `num_heads`.
        num_layers: Number of layers.
        num_heads: Attention heads of each layer.
        feedforward_size: Width inside the feed-forward blocks; `None` for `4 * hidden_size`.
        dropout: Dropout of the sum of embedding and position, the attention weights and both
            blocks of each layer.
        max_positions: Longest sequence in tokens.
        positions: "sinusoidal", or "learned", a table that starts from the sinusoids.
        norm_first: Layer norm before each block, and once more at the end of the stack. `False`
            puts it after each block, as the paper has it.
        embedding: Builds the token embedding from vocab_size, hidden_size and counts; its options,
            `sparse` for one, are given with it.

    Raises:
        ValueError: If a size is below 1, `dropout` outside `[0, 1)`, `hidden_size` no multiple of
            `num_heads`, or `positions` another word. In `forward`, if there are more than
            `max_positions` tokens in a row.

    Source:
        Vaswani et al., "Attention Is All You Need", NeurIPS 2017, arXiv:1706.03762.
    """

    max_positions: int

    def __init__(
        self,
        vocab_size: int,
        counts: Tensor | None = None,
        *,
        hidden_size: int = 256,
        num_layers: int = 4,
        num_heads: int = 4,
        feedforward_size: int | None = None,
        dropout: float = 0.1,
        max_positions: int = 512,
        positions: Literal["sinusoidal", "learned"] = "sinusoidal",
        norm_first: bool = True,
        embedding: EmbeddingFactory = WordEmbedding,
    ) -> None:
        super().__init__(vocab_size, counts)
        width = 4 * hidden_size if feedforward_size is None else feedforward_size
        check_size(
            hidden_size=hidden_size,
            num_heads=num_heads,
            feedforward_size=width,
            max_positions=max_positions,
        )
        check_num_layers(num_layers)
        check_probability(dropout=dropout)
        if hidden_size % num_heads:
            raise ValueError(
                f"hidden_size={hidden_size} is not a multiple of num_heads={num_heads}"
            )
        if positions not in ("sinusoidal", "learned"):
            raise ValueError(f'positions must be "sinusoidal" or "learned", got {positions!r}')
        self.hidden_size, self.max_positions = hidden_size, max_positions
        self.embedding = embedding(vocab_size, hidden_size, counts)
        table = sinusoids(max_positions, hidden_size)
        if positions == "learned":
            self.positions = nn.Parameter(table)
        else:
            self.register_buffer("positions", table, persistent=False)
        self.dropout = nn.Dropout(dropout)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(
                hidden_size,
                num_heads,
                width,
                dropout,
                "gelu",
                batch_first=True,
                norm_first=norm_first,
            )
            for _ in range(num_layers)
        )
        self.norm = nn.LayerNorm(hidden_size) if norm_first else nn.Identity()
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the matrices of all layers anew; embedding and positions stay as they are."""
        for name, parameter in self.layers.named_parameters():
            if parameter.ndim == 2:
                to_residual = name.endswith(("out_proj.weight", "linear2.weight"))
                depth = math.sqrt(2 * len(self.layers)) if to_residual else 1.0
                nn.init.normal_(parameter, std=0.02 / depth)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    def forward(
        self, tokens: Int[Tensor, "batch time"], state: State = None
    ) -> tuple[Float[Tensor, "batch time hidden"], State]:
        """Hidden vectors and `None`; see `Encoder.forward`."""
        self.check_input(tokens, state)
        time = tokens.shape[1]
        hidden = self.embedding(tokens) * math.sqrt(self.hidden_size) + self.positions[:time]
        hidden = self.dropout(hidden)
        future = torch.ones(time, time, dtype=torch.bool, device=tokens.device).triu(1)
        for layer in self.layers:
            hidden = layer(hidden, src_mask=future, is_causal=True)
        return self.norm(hidden), None

    def _continue(
        self, window: Int[Tensor, "batch time"], num_new: int, memory: Any
    ) -> tuple[Float[Tensor, "batch hidden"], Any]:
        """The last hidden vector; the memory holds each layer's keys and values, without dropout.

        They are `(batch, num_heads, time, hidden_size // num_heads)`.
        """
        self.check_input(window, None)
        tokens, first = window[:, -num_new:], window.shape[1] - num_new
        hidden = self.embedding(tokens) * math.sqrt(self.hidden_size)
        hidden = hidden + self.positions[first : window.shape[1]]
        kept = []
        for number, layer in enumerate(self.layers):
            hidden, keys_and_values = _continue_layer(layer, hidden, memory and memory[number])
            kept.append(keys_and_values)
        return self.norm(hidden[:, -1]), tuple(kept)


def _continue_layer(
    layer: Any, hidden: Float[Tensor, "batch new size"], past: tuple[Tensor, Tensor] | None
) -> tuple[Float[Tensor, "batch new size"], tuple[Tensor, Tensor]]:
    """An `nn.TransformerEncoderLayer` on new positions, and the keys and values of all so far."""
    attention, num_new = layer.self_attn, hidden.shape[1]
    inputs = layer.norm1(hidden) if layer.norm_first else hidden
    projected = F.linear(inputs, attention.in_proj_weight, attention.in_proj_bias)
    shape = (*hidden.shape[:2], 3, attention.num_heads, -1)
    query, key, value = projected.view(shape).permute(2, 0, 3, 1, 4)
    if past is not None:
        key, value = torch.cat([past[0], key], 2), torch.cat([past[1], value], 2)
    num_past = key.shape[2] - num_new
    seen = torch.ones(num_new, key.shape[2], dtype=torch.bool, device=hidden.device).tril(num_past)
    attended = F.scaled_dot_product_attention(query, key, value, attn_mask=seen)
    hidden = hidden + attention.out_proj(attended.transpose(1, 2).flatten(2))
    if not layer.norm_first:
        hidden = layer.norm1(hidden)
    inputs = layer.norm2(hidden) if layer.norm_first else hidden
    hidden = hidden + layer.linear2(layer.activation(layer.linear1(inputs)))
    return hidden if layer.norm_first else layer.norm2(hidden), (key, value)


def sinusoids(num_positions: int, size: int) -> Float[Tensor, "position size"]:
    """Sines of `position / 10000^(i / size)` in the even columns i, cosines in the odd ones.

    Source:
        Vaswani et al. 2017, section 3.5.
    """
    rates = torch.exp(torch.arange(0, size, 2) * (-math.log(10000.0) / size))
    angles = torch.arange(num_positions).unsqueeze(1) * rates
    return torch.stack((angles.sin(), angles.cos()), -1).flatten(1)[:, :size].contiguous()
