"""A recurrent encoder: LSTM layers with the dropout variants of AWD-LSTM and carried state."""

from typing import cast

import torch
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


class LockedDropout(nn.Module):
    """Dropout with one mask for all positions of a sequence: `x * dropout(ones(batch, 1, size))`.

    Args:
        probability: Share of components set to zero while training, in `[0, 1)`.

    Source:
        Gal and Ghahramani, "A Theoretically Grounded Application of Dropout in Recurrent Neural
        Networks", NeurIPS 2016, arXiv:1512.05287.
    """

    def __init__(self, probability: float) -> None:
        super().__init__()
        self.probability = probability

    def forward(self, x: Float[Tensor, "batch time size"]) -> Float[Tensor, "batch time size"]:
        """Mask whole components; a new mask each call, no change outside training."""
        if not self.training or self.probability == 0.0:
            return x
        ones = x.new_ones(x.shape[0], 1, x.shape[2])
        return x * nn.functional.dropout(ones, self.probability)

    def extra_repr(self) -> str:
        """The probability, for `print`."""
        return f"{self.probability}"


class LSTMEncoder(Encoder):
    """Embedding, LSTM layers, and a projection if `output_size` is given.

    Returns the last layer's hidden vectors, `(batch, time, hidden_size)` where the attribute
    `hidden_size` is `output_size` if given, and the state `(h, c)`, each
    `(num_layers, batch, hidden_size of a layer)`.

    All dropout is off outside training, where the layers are exactly `nn.LSTM`. In training each
    call draws every mask once: a word dropped by `embedding_dropout` is missing at all positions,
    a locked mask holds for all positions of a row, and `weight_drop` removes the same recurrent
    connections at all steps. The parameters are those of one `nn.LSTM` whatever the dropout.

    Args:
        vocab_size: Number of token ids.
        counts: Training-set frequency of each id, for embeddings that need it.
        embedding_size: Width of the token embedding.
        hidden_size: Width of each layer.
        num_layers: Number of layers.
        output_size: Width to project the hidden vectors to; `embedding_size` makes weights that
            can be shared with the output head. `None` for no projection.
        embedding: Builds the token embedding from vocab_size, embedding_size and counts; its
            options, `sparse` for one, are given with it.
        embedding_dropout: Probability that a word of the vocabulary is dropped.
        input_dropout: Locked dropout between the embedding and the first layer.
        hidden_dropout: Locked dropout between layers.
        output_dropout: Locked dropout of the returned vectors.
        weight_drop: Dropout of the hidden-to-hidden weights (DropConnect).

    Raises:
        ValueError: If a size is below 1 or a probability outside `[0, 1)`.

    Source:
        Merity, Keskar and Socher, "Regularizing and Optimizing LSTM Language Models", ICLR 2018,
        arXiv:1708.02182, sections 2 and 4.
    """

    carries_state = True
    state_batch_axis = 1

    def __init__(
        self,
        vocab_size: int,
        counts: Tensor | None = None,
        *,
        embedding_size: int = 256,
        hidden_size: int = 256,
        num_layers: int = 1,
        output_size: int | None = None,
        embedding: EmbeddingFactory = WordEmbedding,
        embedding_dropout: float = 0.0,
        input_dropout: float = 0.0,
        hidden_dropout: float = 0.0,
        output_dropout: float = 0.0,
        weight_drop: float = 0.0,
    ) -> None:
        super().__init__(vocab_size, counts)
        self.hidden_size = hidden_size if output_size is None else output_size
        check_size(
            embedding_size=embedding_size,
            hidden_size=hidden_size,
            output_size=self.hidden_size,
        )
        check_num_layers(num_layers)
        check_probability(
            embedding_dropout=embedding_dropout,
            input_dropout=input_dropout,
            hidden_dropout=hidden_dropout,
            output_dropout=output_dropout,
            weight_drop=weight_drop,
        )
        self.embedding_dropout, self.weight_drop = embedding_dropout, weight_drop
        self.embedding = embedding(vocab_size, embedding_size, counts)
        self.input_dropout = LockedDropout(input_dropout)
        self.lstm = nn.LSTM(embedding_size, hidden_size, num_layers, batch_first=True)
        self.hidden_dropout = LockedDropout(hidden_dropout)
        self.projection = (
            nn.Identity() if output_size is None else nn.Linear(hidden_size, output_size)
        )
        self.output_dropout = LockedDropout(output_dropout)

    def forward(
        self, tokens: Int[Tensor, "batch time"], state: State = None
    ) -> tuple[Float[Tensor, "batch time hidden"], State]:
        """Hidden vectors and the state `(h, c)` after the last position; see `Encoder.forward`."""
        self.check_input(tokens, state)
        embedded = self.input_dropout(self._embed(tokens))
        outputs, state = self._recur(embedded, state)
        return self.output_dropout(self.projection(outputs)), state

    def _embed(self, tokens: Tensor) -> Tensor:
        embedded = self.embedding(tokens)
        if not self.training or self.embedding_dropout == 0.0:
            return embedded
        kept = nn.functional.dropout(embedded.new_ones(self.vocab_size, 1), self.embedding_dropout)
        return embedded * kept[tokens]

    # It does not trace LSTMs; said so, it breaks the graph just once.
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _recur(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        """All layers in one call, or layer by layer where a mask comes between them."""
        h, c = self._unpack(state, x)
        num_layers = self.lstm.num_layers
        if num_layers == 1 or not self.training or self.hidden_dropout.probability == 0.0:
            return self._layers(x, h, c, range(num_layers))
        states = []
        for layer in range(num_layers):
            this = slice(layer, layer + 1)
            x = self.hidden_dropout(x) if layer else x
            x, layer_state = self._layers(x, h[this], c[this], range(layer, layer + 1))
            states.append(layer_state)
        hs, cs = zip(*states, strict=True)
        return x, (torch.cat(hs), torch.cat(cs))

    def _unpack(self, state: State, x: Tensor) -> tuple[Tensor, Tensor]:
        """`(h, c)`, zeros at the start of a text."""
        shape = self.lstm.num_layers, x.shape[0], self.lstm.hidden_size
        if state is None:
            return x.new_zeros(shape), x.new_zeros(shape)
        shapes = [tuple(part.shape) for part in cast("tuple[Tensor, ...]", state)]
        if shapes != [shape, shape]:
            raise ValueError(
                f"state must be (h, c), each of shape {shape} for {x.shape[0]} rows of tokens,"
                f" got {shapes}"
            )
        return cast("tuple[Tensor, Tensor]", state)

    def _layers(
        self, x: Tensor, h: Tensor, c: Tensor, layers: range
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """`nn.LSTM` over some of its layers, on weights that may have been masked.

        The masked weights are a function of the parameters, which so stay what they are: nothing
        to restore after the call, and gradients reach them through the mask.
        """
        weights = [weight for layer in layers for weight in self._weights(layer)]
        x, h, c = torch.lstm(x, (h, c), weights, True, len(layers), 0.0, self.training, False, True)
        return x, (h, c)

    def _weights(self, layer: int) -> list[Tensor]:
        input_weight, hidden_weight, *biases = (
            getattr(self.lstm, f"{name}_l{layer}")
            for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
        )
        hidden_weight = nn.functional.dropout(hidden_weight, self.weight_drop, self.training)
        return [input_weight, hidden_weight, *biases]
