"""The smallest run with all that the callbacks read, for their tests."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import lightning.pytorch as pl
import torch
from lightning.pytorch.loggers import Logger
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from lm_softmax.encoders import Encoder
from lm_softmax.heads import AdaptiveSoftmax, OutputHead
from lm_softmax.heads.cost_model import CostModel
from lm_softmax.metrics import Perplexity

VOCAB_SIZE, HIDDEN_SIZE = 12, 4
EOS = 0
LOGITS_ALONE = CostModel(0, 0, 0, 1, 0, 0, tokens=100)  # splits tiny vocabularies too
NO_TAILS = CostModel(0, 0, 0, 1, 0, cluster=1e9, tokens=100)


class Batch(NamedTuple):
    tokens: Tensor
    target: Tensor
    carry: bool


class Stats(NamedTuple):
    num_tokens: int
    num_unk: int
    num_bytes: int
    unigram_nats: float


class TinyVocab:
    """Ids are letters; `<eos>` is a full stop."""

    eos_id = EOS
    fingerprint = "f1"
    letters = ".abcdefghijk"

    def encode(self, text: str) -> list[int]:
        return [self.letters.index(letter) for letter in text]

    def decode(self, ids: list[int]) -> str:
        return "".join(self.letters[index] for index in ids)


class TinyEncoder(Encoder):
    hidden_size = HIDDEN_SIZE

    def __init__(self) -> None:
        super().__init__(VOCAB_SIZE)
        self.embedding = nn.Embedding(VOCAB_SIZE, HIDDEN_SIZE)

    def forward(self, tokens: Tensor, state: object = None) -> tuple[Tensor, None]:
        return self.embedding(tokens), None


class TinyModel(pl.LightningModule):
    """A bigram model; `on_train` and `on_val` run inside its steps."""

    def __init__(
        self,
        head: OutputHead | None = None,
        *,
        on_train: Callable[[int], object] = lambda _: None,
        on_val: Callable[[int], object] = lambda _: None,
    ) -> None:
        super().__init__()
        self.encoder = TinyEncoder()
        self.head = head or AdaptiveSoftmax(HIDDEN_SIZE, VOCAB_SIZE, cutoffs=[4], min_tail_size=2)
        self.vocab = TinyVocab()
        self.val_perplexity = Perplexity()
        self.test_perplexity = Perplexity()
        self.on_train, self.on_val = on_train, on_val

    def training_step(self, batch: Batch, batch_idx: int) -> dict[str, Tensor]:
        self.on_train(batch_idx)
        nats = self.head.loss(self.encoder(batch.tokens)[0], batch.target, reduction="sum")
        targets = (batch.target != self.head.ignore_index).sum()
        self.log("train/loss", nats.detach() / targets)
        return {"loss": nats / targets, "nats": nats.detach(), "targets": targets}

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self.on_val(batch_idx)
        self.val_perplexity.update(self._log_prob(batch), batch.target)

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        self.test_perplexity.update(self._log_prob(batch), batch.target)

    def on_validation_epoch_end(self) -> None:
        self._log_split("val", self.val_perplexity)

    def on_test_epoch_end(self) -> None:
        self._log_split("test", self.test_perplexity)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.5)

    def _log_prob(self, batch: Batch) -> Tensor:
        return self.head.log_prob(self.encoder(batch.tokens)[0], batch.target)

    def _log_split(self, stage: str, perplexity: Perplexity) -> None:
        self.log(f"{stage}/nll", perplexity.nll(), sync_dist=True)
        self.log(f"{stage}/ppl", perplexity.compute(), sync_dist=True)
        perplexity.reset()


class _Batches(Dataset[Batch]):
    def __init__(self, batches: list[Batch], on_load: Callable[[int], object]) -> None:
        self.batches, self.on_load = batches, on_load

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, index: int) -> Batch:
        self.on_load(index)
        return self.batches[index]


class TinyData(pl.LightningDataModule):
    """Batches of 2 x 3 targets; every second training batch has one target fewer."""

    statistics = Stats(num_tokens=12, num_unk=3, num_bytes=40, unigram_nats=24.0)

    def __init__(
        self, num_batches: int = 4, on_load: Callable[[int], object] = lambda _: None
    ) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        ids = torch.randint(VOCAB_SIZE, (num_batches, 2, 4), generator=generator)
        self.train = [Batch(row[:, :-1], row[:, 1:].clone(), True) for row in ids]
        for batch in self.train[1::2]:
            batch.target[0, 0] = -100
        self.on_load = on_load

    def stats(self, split: str) -> Stats:
        assert split in ("train", "validation", "test")
        return self.statistics

    def train_dataloader(self) -> DataLoader[Batch]:
        return DataLoader(_Batches(self.train, self.on_load), batch_size=None)

    def val_dataloader(self) -> DataLoader[Batch]:
        return DataLoader(_Batches(self.train[:2], lambda _: None), batch_size=None)

    def test_dataloader(self) -> DataLoader[Batch]:
        return self.val_dataloader()


class Recorder(Logger):
    """Keeps what is logged, as (step, metrics)."""

    name = "recorder"
    version = 0

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[tuple[int | None, dict[str, float]]] = []

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.rows.append((step, dict(metrics)))

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        raise AssertionError("no logger but TensorBoard is asked to")

    def column(self, name: str) -> list[float]:
        return [metrics[name] for _, metrics in self.rows if name in metrics]


def trainer(folder: Path, *callbacks: pl.Callback, **options: Any) -> pl.Trainer:
    """A quiet trainer on the CPU that logs every second step to a `Recorder`."""
    settings: dict[str, Any] = {
        "accelerator": "cpu",
        "default_root_dir": folder,
        "logger": Recorder(),
        "callbacks": list(callbacks),
        "log_every_n_steps": 2,
        "max_epochs": 1,
        "num_sanity_val_steps": 0,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    return pl.Trainer(**settings | options)
