"""What `train.py predict` writes: log-probabilities of the rows of a split, and continuations."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from lightning.pytorch.utilities.exceptions import SIGTERMException

from lm_softmax.decoding import generate
from lm_softmax.decoding.stepping import check_num_tokens
from lm_softmax.parallel import Replica

NUM_TOKENS = 16


class PredictionWriter(pl.Callback):
    """Writes a line of JSON for each row of a batch of the split.

    `{"batch", "row", "tokens", "log_probs", "continuation"}`: the row's tokens, the log-probability
    of each in nats, given all before it in the split as far as the encoder sees, and the tokens
    that greedy decoding puts after the row, which it sees by itself. Ignored positions are left
    out. The file is there whole or not at all.

    Args:
        path: The file; of several replicas each writes its own, `<name>-<rank>.jsonl`.
        num_tokens: Tokens of a continuation; with 0 there is none.

    Attributes:
        path: The file that this process writes; None where another one of its replica does.

    Raises:
        ValueError: If a file exists, the model gives nan, or continuations are asked for that are
            too long, or where other processes may hold parts of the model.
    """

    path: Path | None

    def __init__(self, path: Path, num_tokens: int = NUM_TOKENS) -> None:
        if num_tokens:
            check_num_tokens(num_tokens)
        self._named = self.path = path
        self.num_tokens = num_tokens

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Refuses files that exist, and continuations of a model that is not here as a whole."""
        replica = Replica.of(trainer)
        paths = [self._named]
        if replica.size > 1:
            stem = self._named.stem
            paths = [self._named.with_stem(f"{stem}-{rank}") for rank in range(replica.size)]
        for path in trainer.strategy.broadcast([path for path in paths if path.exists()])[:1]:
            raise ValueError(f"{path} exists: remove it, or give another folder with --run")
        processes = trainer.world_size // replica.size  # of a replica, side by side
        self.path = None if trainer.global_rank % processes else paths[replica.rank]
        whole = isinstance(trainer.strategy, SingleDeviceStrategy | DDPStrategy)
        if self.num_tokens and not whole:
            raise ValueError(
                f"continuations need the whole model, and {type(trainer.strategy).__name__} may"
                " hold parts of it on other ranks: give --num_tokens 0"
            )

    def on_predict_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Opens the file under another name."""
        if self.path is None:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._partial = self.path.with_suffix(".partial")
        self._file = self._partial.open("w", encoding="utf-8")

    def on_predict_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: Any,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Writes the rows of a batch, unless the process is to end, which Lightning overlooks."""
        if trainer.received_sigterm:
            raise SIGTERMException
        if self.path is None:
            return
        words = pl_module.vocab.tokens
        kept = batch.target != pl_module.head.ignore_index
        rows = [
            (number, target[here], log_probs[here])
            for number, (target, here, log_probs) in enumerate(
                zip(batch.target, kept, outputs, strict=True)
            )
            if here.any()
        ]
        for number, _, log_probs in rows:
            if log_probs.isnan().any():
                raise ValueError(f"the model gives nan for row {number} of batch {batch_idx}")
        continuations = self._continue(pl_module, [target for _, target, _ in rows])
        for place, (number, target, log_probs) in enumerate(rows):
            line = {
                "batch": batch_idx,
                "row": number,
                "tokens": [words[i] for i in target.tolist()],
                "log_probs": [round(value, 6) for value in log_probs.tolist()],
            }
            if self.num_tokens:
                line["continuation"] = [words[i] for i in continuations[place]]
            self._file.write(json.dumps(line, ensure_ascii=False) + "\n")

    def _continue(self, pl_module: Any, rows: Sequence[torch.Tensor]) -> dict[int, list[int]]:
        """The continuation of each row, those of one length at once."""
        found: dict[int, list[int]] = {}
        for length in {len(row) for row in rows} if self.num_tokens else ():
            places = [place for place, row in enumerate(rows) if len(row) == length]
            prompts = torch.stack([rows[place] for place in places])
            tokens = generate(
                pl_module.encoder, pl_module.head, prompts, self.num_tokens, temperature=0
            )
            found.update(zip(places, tokens[:, length:].tolist(), strict=True))
        return found

    def on_predict_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Gives the file its name."""
        if self.path is None:
            return
        self._file.close()
        self._partial.replace(self.path)

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        """Leaves nothing behind."""
        if hasattr(self, "_file"):
            self._file.close()
            self._partial.unlink(missing_ok=True)
