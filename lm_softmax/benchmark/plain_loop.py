"""The training loop that a PyTorch user writes."""

from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lm_softmax.benchmark.loops import LOG_EVERY, EncoderSizes, Loop, Outcome, Text


class PlainModel(nn.Module):
    """Embedding, `nn.LSTM`, and one of torch's heads.

    Args:
        vocab_size: Number of words.
        sizes: Of embedding and LSTM.
        cutoffs: Of torch's adaptive softmax; None for a full one.
    """

    def __init__(self, vocab_size: int, sizes: EncoderSizes, cutoffs: Sequence[int] | None) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, sizes.embedding_size)
        self.lstm = nn.LSTM(
            sizes.embedding_size, sizes.hidden_size, sizes.num_layers, batch_first=True
        )
        self.head: nn.Module
        if cutoffs is None:
            self.head = nn.Linear(sizes.hidden_size, vocab_size)
        else:
            width = sizes.hidden_size
            self.head = nn.AdaptiveLogSoftmaxWithLoss(width, vocab_size, list(cutoffs))

    def forward(self, tokens: Tensor, target: Tensor, state: Any) -> tuple[Tensor, Any]:
        """Mean loss, and the state after the block."""
        hidden, state = self.lstm(self.embedding(tokens), state)
        rows, flat = hidden.flatten(0, 1), target.flatten()
        if isinstance(self.head, nn.AdaptiveLogSoftmaxWithLoss):
            loss: Tensor = self.head(rows, flat).loss
        else:
            loss = F.cross_entropy(self.head(rows), flat)
        return loss, tuple(part.detach() for part in state)


class PlainLoop(Loop):
    """The loop that a PyTorch user writes: torch's head, `torch.optim.AdamW` as by default.

    Args:
        text: See `Loop`.
        device: See `Loop`.
        clip: See `Loop`.
        kind: Head: "adaptive" or "full".
        sizes: Of embedding and LSTM.
        cutoffs: Of the adaptive head.
        lr: Learning rate.
    """

    def __init__(
        self,
        text: Text,
        device: str,
        clip: float | None,
        kind: Literal["adaptive", "full"],
        sizes: EncoderSizes,
        cutoffs: Sequence[int],
        lr: float,
    ) -> None:
        super().__init__(text, device, clip)
        torch.manual_seed(text.seed)
        is_adaptive = kind == "adaptive"
        self._what = f"nn.AdaptiveLogSoftmaxWithLoss, cutoffs {list(cutoffs)}"
        if not is_adaptive:
            self._what = "nn.Linear and F.cross_entropy"
        model = PlainModel(text.vocab_size, sizes, cutoffs if is_adaptive else None)
        self.model = model.to(device)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=lr)
        self._what = f"nn.Embedding, nn.LSTM, {self._what}, AdamW(lr={lr})"
        ids = text.ids().view(text.batch_size, -1)
        first = torch.zeros_like(ids[:, :1])  # <eos>
        self._inputs = torch.cat([first, ids[:, :-1]], 1)
        self._targets = ids

    def run(self) -> Outcome:
        """See `Loop.run`."""
        text, state, last_loss = self.text, None, float("nan")
        start = self.now()
        self.model.train()
        for step in range(text.total_steps):
            if step == text.num_warmups:
                start = self.now()
            part = slice(step * text.block_size, (step + 1) * text.block_size)
            tokens = self._inputs[:, part].to(self.device)
            loss, state = self.model(tokens, self._targets[:, part].to(self.device), state)
            self.optimizer.zero_grad()
            loss.backward()
            if self.clip is not None:
                nn.utils.clip_grad_norm_(self.model.parameters(), self.clip)
            self.optimizer.step()
            if step % LOG_EVERY == 0 or step + 1 == text.total_steps:
                last_loss = loss.item()
        return Outcome(self.now() - start, last_loss, self._what)
