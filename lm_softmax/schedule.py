"""Learning-rate schedules that know how long the training is."""

import math
from typing import Literal

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR


class WarmupDecay(LambdaLR):
    """Linear warm-up, then cosine or linear decay; stepped once per optimizer step.

    With `w` warm-up steps, step `t` (from 0) runs at `lr * (t + 1) / (w + 1)` while `t < w`, at
    `lr` when `t == w`, and then decays to `final * lr`, reached at `t == total_steps` and kept:
    `factor = final + (1 - final) * decay((t - w) / (total_steps - w))` with
    `decay(x) = (1 + cos(pi * x)) / 2` (cosine) or `1 - x` (linear).

    The options are not part of the state: a run that resumes with a longer training stretches the
    schedule to the new end.

    Args:
        optimizer: The optimizer whose groups' learning rates are scheduled.
        total_steps: Optimizer steps of the whole training.
        warmup: Share of `total_steps` below 1, number of steps from 1 on.
        shape: Form of the decay.
        final: Last learning rate as a share of the first, in `[0, 1]`.

    Raises:
        ValueError: If an option is out of range, the warm-up fills the training, or the number of
            steps is unknown because training is bounded by time alone.

    Source:
        Loshchilov and Hutter, "SGDR", ICLR 2017, equation 5, without restarts.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        total_steps: int,
        *,
        warmup: float = 0.05,
        shape: Literal["cosine", "linear"] = "cosine",
        final: float = 0.0,
    ) -> None:
        warmup_steps = _warmup_steps(total_steps, warmup)
        if shape not in ("cosine", "linear"):
            raise ValueError(f'shape must be "cosine" or "linear", got {shape!r}')
        if not 0 <= final <= 1:
            raise ValueError(f"final must be in [0, 1], a share of the learning rate, got {final}")

        def factor(step: int) -> float:
            if step < warmup_steps:
                return (step + 1) / (warmup_steps + 1)
            done = min(1.0, (step - warmup_steps) / (total_steps - warmup_steps))
            decay = (1 + math.cos(math.pi * done)) / 2 if shape == "cosine" else 1 - done
            return final + (1 - final) * decay

        super().__init__(optimizer, factor)


def _warmup_steps(total_steps: float, warmup: float) -> int:
    """Number of warm-up steps, after checking that they fit into the training."""
    if total_steps == math.inf or total_steps == -1:
        raise ValueError(
            "the schedule needs a number of steps, but training is bounded by time alone: "
            "set trainer.max_steps or trainer.max_epochs"
        )
    if total_steps < 1:
        raise ValueError(f"total_steps must be at least 1, got {total_steps}")
    if not 0 <= warmup < math.inf or (warmup >= 1 and warmup != int(warmup)):
        raise ValueError(f"warmup must be a share in [0, 1) or a number of steps, got {warmup}")
    steps = int(warmup) if warmup >= 1 else round(warmup * total_steps)
    if steps >= total_steps:
        raise ValueError(f"a warm-up of {steps} steps does not fit into {total_steps} steps")
    return steps
