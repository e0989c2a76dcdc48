"""Greedy decoding and sampling."""

import math
from collections.abc import Callable, Iterator, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lm_softmax.decoding.stepping import (
    Stepper,
    check_num_tokens,
    check_prompt,
    evaluating,
    without,
)
from lm_softmax.encoders import Encoder
from lm_softmax.heads import OutputHead


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
    suppress: Sequence[int] = (),
    generator: torch.Generator | None = None,
    use_cache: bool = True,
) -> Int[Tensor, "batch time+new"]:
    """Continue each row of the prompt by `num_tokens` tokens, each drawn given all before it.

    Equals, row by row, `tokens.append(head.sample(encoder(tokens)[0][-1]))` repeated. An encoder
    with `max_positions` sees the last `max_positions` tokens. Both modules run in evaluation mode
    and get their modes back.

    Args:
        encoder: Turns tokens into hidden vectors.
        head: Turns a hidden vector into a distribution.
        prompt: Ids, at least one a row.
        num_tokens: Number of tokens to add, at least 1 and below 2**63.
        temperature: Exponent `1 / temperature` of the probabilities. 0 takes the most probable
            word, whatever `top_k` and `top_p`, which never exclude it.
        top_k: Draw among the `top_k` most probable words only.
        top_p: Draw among the fewest most probable words that hold this much probability.
        eos_id: A row that draws this id ends there and is filled up with it. `None`: never.
        suppress: Ids that are never drawn; the others are normalised again, before `temperature`,
            `top_k` and `top_p`. See `WithoutWords`.
        generator: Source of randomness, on the device of the prompt.
        use_cache: Whether the encoder goes on from its cache (keys and values, or a state) instead
            of computing all tokens again at each step; the text is the same.

    Returns:
        Prompt and continuation, int64.

    Raises:
        ValueError: If the prompt is empty or holds an id outside the vocabulary, an option is out
            of its range, or the model gives nan.
    """
    steps = stream(
        encoder,
        head,
        prompt,
        num_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        eos_id=eos_id,
        suppress=suppress,
        generator=generator,
        use_cache=use_cache,
    )
    made = torch.stack(list(steps), 1)
    fill = 0 if eos_id is None else eos_id
    rest = made.new_full((len(made), num_tokens - made.shape[1]), fill)
    return torch.cat([prompt.to(torch.int64), made, rest], 1)


def stream(
    encoder: Encoder,
    head: OutputHead,
    prompt: Int[Tensor, "batch time"],
    num_tokens: int,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    eos_id: int | None = None,
    suppress: Sequence[int] = (),
    generator: torch.Generator | None = None,
    use_cache: bool = True,
) -> Iterator[Int[Tensor, "batch"]]:
    """The tokens that `generate` would add, as they are made: one for each row at a time.

    The arguments are those of `generate`. It ends after `num_tokens`, or once each row has ended; a
    row that ended before the others goes on with `eos_id`. Between two tokens both modules are in
    their own modes.

    Raises:
        ValueError: At the call, as `generate`; where a step finds nan, at the step.
    """
    check_prompt(prompt, head.vocab_size, eos_id)
    check_num_tokens(num_tokens)
    _check_options(temperature, top_k, top_p, head.vocab_size)
    head = without(head, suppress)

    def draw(hidden: Float[Tensor, "batch hidden"]) -> Int[Tensor, "batch"]:
        if temperature == 0:
            best = head.topk(hidden, 1)
            if best.log_probs.isnan().any():
                raise ValueError("the model gives no most probable word, but nan")
            return best.indices[:, 0]
        drawn = head.sample(
            hidden, temperature=temperature, top_k=top_k, top_p=top_p, generator=generator
        )
        return drawn[:, 0]

    stepper = Stepper(encoder, use_cache=use_cache)
    return _steps(stepper, head, draw, prompt.to(torch.int64), num_tokens, eos_id)


def _steps(
    stepper: Stepper,
    head: OutputHead,
    draw: Callable[[Tensor], Tensor],
    tokens: Int[Tensor, "batch time"],
    num_tokens: int,
    eos_id: int | None,
) -> Iterator[Int[Tensor, "batch"]]:
    finished = torch.zeros(tokens.shape[0], dtype=torch.bool, device=tokens.device)
    for _ in range(num_tokens):
        with torch.no_grad(), evaluating(stepper.encoder, head):
            drawn = draw(stepper.feed(tokens))
        if eos_id is not None:
            drawn = drawn.masked_fill(finished, eos_id)
            finished |= drawn == eos_id
        yield drawn
        if eos_id is not None and finished.all():
            return
        tokens = drawn[:, None]


def _check_options(
    temperature: float, top_k: int | None, top_p: float | None, vocab_size: int
) -> None:
    if not 0 <= temperature < math.inf:
        raise ValueError(f"temperature must be at least 0 (0 is greedy), got {temperature}")
    if top_k is not None and not 1 <= top_k <= vocab_size:
        raise ValueError(f"top_k must be in [1, vocab_size={vocab_size}], got {top_k}")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p must be in (0, 1], got {top_p}")
