"""Continuing a text with an encoder and an output head."""

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from lm_softmax.encoders import Encoder
from lm_softmax.heads import OutputHead


@torch.no_grad()
def generate(
    encoder: Encoder,
    head: OutputHead,
    prompt: Int[Tensor, "batch time"],
    num_tokens: int,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    eos_id: int | None = None,
    generator: torch.Generator | None = None,
) -> Int[Tensor, "batch time+new"]:
    """Continue each row of the prompt by `num_tokens` tokens, each drawn given all before it.

    Equals, row by row, `tokens.append(head.sample(encoder(tokens)[0][-1]))` repeated. An encoder
    that carries state is fed each token once; any other is fed the last `max_positions` tokens
    again at each step. Both modules run in evaluation mode and get their modes back.

    Args:
        encoder: Turns tokens into hidden vectors.
        head: Turns a hidden vector into a distribution.
        prompt: Ids, at least one a row.
        num_tokens: Number of tokens to add, at least 1.
        temperature: Exponent `1 / temperature` of the probabilities. 0 takes the most probable
            word, whatever `top_k` and `top_p`, which never exclude it.
        top_k: Draw among the `top_k` most probable words only.
        top_p: Draw among the fewest most probable words that hold this much probability.
        eos_id: A row that draws this id ends there and is filled up with it. `None`: never.
        generator: Source of randomness, on the device of the prompt.

    Returns:
        Prompt and continuation, int64.

    Raises:
        ValueError: If the prompt is empty or holds an id outside the vocabulary, or an option is
            out of its range.
    """
    _check_prompt(prompt, head.vocab_size, eos_id)
    _check_options(num_tokens, temperature, top_k, top_p, head.vocab_size)
    batch, time = prompt.shape
    fill = 0 if eos_id is None else eos_id
    tokens = prompt.new_full((batch, time + num_tokens), fill, dtype=torch.int64)
    tokens[:, :time] = prompt
    finished = torch.zeros(batch, dtype=torch.bool, device=prompt.device)
    with _evaluating(encoder, head):
        for position, hidden in enumerate(_hidden_vectors(encoder, tokens, time), start=time):
            if temperature == 0:
                drawn = head.topk(hidden, 1).indices[:, 0]
            else:
                drawn = head.sample(
                    hidden,
                    temperature=temperature,
                    top_k=top_k,
                    top_p=top_p,
                    generator=generator,
                )[:, 0]
            if eos_id is None:
                tokens[:, position] = drawn
                continue
            tokens[:, position] = drawn.masked_fill(finished, eos_id)
            finished |= drawn == eos_id
            if finished.all():
                break
    return tokens


def _hidden_vectors(
    encoder: Encoder, tokens: Tensor, time: int
) -> Iterator[Float[Tensor, "batch hidden"]]:
    """The last hidden vector of the first `time` tokens, then of one more each, as they come in."""
    state, begin = None, 0
    for end in range(time, tokens.shape[1]):
        if not encoder.carries_state and encoder.max_positions is not None:
            begin = max(0, end - encoder.max_positions)
        hidden, state = encoder(tokens[:, begin:end], state)
        if encoder.carries_state:
            begin = end
        yield hidden[:, -1]


@contextmanager
def _evaluating(*modules: nn.Module) -> Iterator[None]:
    """Evaluation mode for a while; then each submodule has its own mode again."""
    modes = [(part, part.training) for module in modules for part in module.modules()]
    try:
        for module in modules:
            module.eval()
        yield
    finally:
        for part, mode in modes:
            part.training = mode


def _check_prompt(prompt: Tensor, vocab_size: int, eos_id: int | None) -> None:
    if prompt.ndim != 2 or prompt.numel() == 0:
        raise ValueError(
            "prompt must be (batch, time) with at least one token a row,"
            f" got shape {tuple(prompt.shape)}"
        )
    if prompt.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"prompt must be int64, got {prompt.dtype}")
    lowest, highest = int(prompt.min()), int(prompt.max())
    if lowest < 0 or highest >= vocab_size:
        raise ValueError(
            f"prompt holds ids from {lowest} to {highest}, outside [0, vocab_size={vocab_size})"
        )
    if eos_id is not None and not 0 <= eos_id < vocab_size:
        raise ValueError(f"eos_id must be in [0, vocab_size={vocab_size}), got {eos_id}")


def _check_options(
    num_tokens: int, temperature: float, top_k: int | None, top_p: float | None, vocab_size: int
) -> None:
    if num_tokens < 1:
        raise ValueError(f"num_tokens must be at least 1, got {num_tokens}")
    if not 0 <= temperature < math.inf:
        raise ValueError(f"temperature must be at least 0 (0 is greedy), got {temperature}")
    if top_k is not None and not 1 <= top_k <= vocab_size:
        raise ValueError(f"top_k must be in [1, vocab_size={vocab_size}], got {top_k}")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p must be in (0, 1], got {top_p}")
