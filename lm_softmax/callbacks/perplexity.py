"""Perplexity of the training, and figures that compare across vocabularies."""

import logging
import math
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor

from lm_softmax.log_steps import LogSteps, ever_logs, on_host
from lm_softmax.parallel import summed

log = logging.getLogger(__name__)


class PerplexityMonitor(pl.Callback):
    """Logs what the negative log-likelihood of a `LanguageModel` means.

    While training, when the trainer logs:

    - `train/ppl`: exp of the mean nats per target since the last log; only for heads whose
      training loss is a likelihood (`loss_is_nll`). It comes from what `training_step` returns
      beside the loss: `nats` and `targets`, summed over the batches of all ranks.

    At validation, and as `test/...` at a test, from the perplexity that the module keeps of the
    split (`val_perplexity`, `test_perplexity`) and the statistics that the data module has of it
    (`stats("validation")`, `stats("test")`; with plain data loaders these are not logged):

    - `val/unk_rate`: share of the split's tokens that the vocabulary folds into `<unk>`, in [0, 1];
    - `val/bits_per_byte`: nats per token / ln 2 * tokens / bytes, which compares across
      vocabularies (with the rate of `<unk>` beside it, since an `<unk>` is easier than its word);
    - `val/ppl_unigram`: perplexity of the unigram model of the vocabulary's counts on the split.

    The statistics are those of the whole split. Where the trainer evaluates a part of it
    (`limit_val_batches`, `limit_test_batches`), the last two would describe other text than
    `val/nll` and are left out, with a warning.
    """

    def __init__(self) -> None:
        self._log_steps = LogSteps()
        self._window: list[Tensor] = []  # [nats, targets] of each batch since the last log
        self._earlier: list[Tensor] = []  # of the fit that wrote the checkpoint to go on from
        self._warned = False

    def state_dict(self) -> dict[str, Any]:
        """The window since the last log."""
        return {"window": [part.cpu() for part in self._window]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes on with the window of a checkpoint."""
        self._earlier = state_dict["window"]

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Starts a new window, or goes on with that of the checkpoint."""
        self._log_steps.start(trainer)
        self._window, self._earlier = [part.to(pl_module.device) for part in self._earlier], []

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Adds a batch, and logs when the trainer does."""
        if not (pl_module.head.loss_is_nll and ever_logs(trainer)):  # type: ignore[union-attr]
            return
        nats, targets = outputs["nats"], outputs["targets"]
        self._window.append(torch.stack([nats, targets.to(nats.dtype)]))
        if self._log_steps.ended_step(trainer) and self._log_steps.is_due(trainer):
            total_nats, total_targets = torch.stack(self._window).cpu().double().sum(0).tolist()
            self._window = []
            if total_targets:
                metrics = on_host({"train/ppl": _exp(total_nats / total_targets)})
                pl_module.log_dict(metrics, prog_bar=True)

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Logs the validation's figures."""
        if not trainer.sanity_checking:
            self._log_split(trainer, pl_module, "val", "validation")

    def on_test_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Logs the test's figures."""
        self._log_split(trainer, pl_module, "test", "test")

    def _log_split(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str, split: str
    ) -> None:
        datamodule: Any = trainer.datamodule  # type: ignore[attr-defined]
        if not hasattr(datamodule, "stats"):
            return
        stats = datamodule.stats(split)
        # The module's own hook, which logs the perplexity and resets it, runs after this one.
        perplexity = getattr(pl_module, f"{stage}_perplexity")
        metrics = {f"{stage}/unk_rate": stats.num_unk / stats.num_tokens}
        if self._is_whole(trainer, stage, perplexity.count, stats.num_tokens):
            bits = perplexity.nll().item() / math.log(2)
            metrics |= {
                f"{stage}/bits_per_byte": bits * stats.num_tokens / stats.num_bytes,
                f"{stage}/ppl_unigram": _exp(stats.unigram_nats / stats.num_tokens),
            }
        pl_module.log_dict(metrics, sync_dist=True)  # equal on all ranks

    def _is_whole(self, trainer: Any, stage: str, count: Tensor, num_tokens: int) -> bool:
        """Whether what was evaluated, over all ranks, is the split that the statistics are of."""
        limit = getattr(trainer, f"limit_{stage}_batches")
        if isinstance(limit, float) and limit == 1.0:  # 1 is a single batch
            return True
        counted = int(summed(count.clone(), trainer))
        if counted != num_tokens and trainer.is_global_zero and not self._warned:
            self._warned = True
            log.warning(
                f"no {stage}/bits_per_byte and {stage}/ppl_unigram: {counted} targets of the"
                f" split's {num_tokens} were evaluated (limit_{stage}_batches={limit})"
            )
        return counted == num_tokens


def _exp(nats: float) -> float:
    try:
        return math.exp(nats)
    except OverflowError:
        return math.inf
