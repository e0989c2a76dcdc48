"""Two processes on gloo take the steps of one process on the joined batch."""

import os
import socket
import warnings
from functools import partial
from typing import NamedTuple

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.loggers import Logger
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lm_softmax.encoders import LSTMEncoder
from lm_softmax.heads import AdaptiveSoftmax, FullSoftmax
from lm_softmax.kernels import warm_up
from lm_softmax.module import LanguageModel

V, CUTOFFS = 40, [6, 15]
HEADS = {
    "adaptive": partial(AdaptiveSoftmax, cutoffs=CUTOFFS, min_tail_size=3),
    "full": FullSoftmax,
}
CASES = [
    (head, accumulate, clip)
    for head in HEADS
    for accumulate, clip in ((1, None), (2, None), (3, 0.05))
]


class Batch(NamedTuple):
    tokens: Tensor
    target: Tensor
    carry: bool


class Rows(Logger):
    name = version = "rows"

    def __init__(self):
        super().__init__()
        self.rows = []

    def log_metrics(self, metrics, step=None):
        self.rows.append((step, metrics))

    def log_hyperparams(self, *args, **kwargs):
        pass


def batches(rank):
    """Rank 0 sees the short-list alone and few targets, rank 1 the last cluster and many."""
    generator = torch.Generator().manual_seed(rank)
    low, high, ignored = ((0, CUTOFFS[0], 0.8), (CUTOFFS[1], V, 0.1))[rank]
    made = []
    for number in range(5):
        target = torch.randint(low, high, (3, 7), generator=generator)
        target[torch.rand(3, 7, generator=generator) < ignored] = -100
        if (rank, number) in ((0, 1), (0, 4), (1, 4)):
            target[:] = -100  # one rank, then both without a target
        made.append(Batch(torch.randint(V, (3, 7), generator=generator), target, number > 0))
    return made


def model(head):
    torch.manual_seed(3)
    return LanguageModel(
        partial(LSTMEncoder, embedding_size=8, hidden_size=8),
        HEADS[head],
        torch.arange(V, 0, -1),
        optimizer=partial(torch.optim.SGD, lr=0.5),
    ).double()


def work(rank, port, folder):
    """What each of the two processes does."""
    warm_up()
    warnings.simplefilter("error")
    warnings.filterwarnings("ignore", ".*does not have many workers")
    warnings.filterwarnings("ignore", ".*isinstance.treespec, LeafSpec")
    torch.set_num_threads(1)
    os.environ |= {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "NODE_RANK": "0",
        "LOCAL_RANK": str(rank),
    }
    for number, (head, accumulate, clip) in enumerate(CASES):
        trained, logger = model(head), Rows()
        trainer = pl.Trainer(
            accelerator="cpu",
            devices=2,
            strategy="ddp",
            max_epochs=1,
            precision="64-true",
            accumulate_grad_batches=accumulate,
            gradient_clip_val=clip,
            logger=logger,
            log_every_n_steps=1,
            num_sanity_val_steps=0,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            use_distributed_sampler=False,
        )
        rows = DataLoader(batches(rank), batch_size=None)
        trainer.fit(trained, rows, rows)
        torch.save(
            {"weights": trained.state_dict(), "rows": logger.rows},
            f"{folder}/{number}-{rank}.pt",
        )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(work, (port, folder), nprocs=2)
    return folder


def reference(head, accumulate, clip):
    """A plain loop over the joined batches; its weights, and the loss of each step."""
    expected = model(head)
    optimizer = torch.optim.SGD(expected.parameters(), lr=0.5)
    joined = [
        (torch.cat([a.tokens, b.tokens]), torch.cat([a.target, b.target]))
        for a, b in zip(batches(0), batches(1), strict=True)
    ]
    state, losses = None, []
    for begin in range(0, len(joined), accumulate):
        nats, targets = torch.zeros((), dtype=torch.float64), 0
        for tokens, target in joined[begin : begin + accumulate]:
            hidden, state = expected.encoder(tokens, state)
            state = tuple(part.detach() for part in state)
            log_probs = expected.head.log_prob(hidden).flatten(0, 1)
            nats = nats + nn.functional.nll_loss(log_probs, target.flatten(), reduction="sum")
            targets += int((target != -100).sum())
        optimizer.zero_grad()
        (nats / max(targets, 1)).backward()
        losses.append(nats.item() / max(targets, 1))
        if clip is not None:
            nn.utils.clip_grad_norm_(expected.parameters(), clip)
        optimizer.step()
    return expected, joined, losses


@pytest.mark.parametrize("number", range(len(CASES)), ids=str)
def test_equals_one_process_on_the_joined_batch(number, folder):
    ranks = [torch.load(folder / f"{number}-{rank}.pt", weights_only=True) for rank in range(2)]
    expected, joined, losses = reference(*CASES[number])
    for name, value in expected.state_dict().items():
        for rank in ranks:
            torch.testing.assert_close(
                rank["weights"][name], value, rtol=1e-10, atol=1e-10, msg=name
            )

    logged = [row for _, row in ranks[0]["rows"]]
    assert [row["train/loss"] for row in logged if "train/loss" in row] == pytest.approx(losses)
    state, nats, targets = None, 0.0, 0
    for tokens, target in joined:  # validation: unequal numbers of targets
        hidden, state = expected.encoder(tokens, state)
        log_probs = expected.head.log_prob(hidden).flatten(0, 1)
        nats += nn.functional.nll_loss(log_probs, target.flatten(), reduction="sum").item()
        targets += int((target != -100).sum())
    (perplexity,) = [row["val/ppl"] for row in logged if "val/ppl" in row]
    assert perplexity == pytest.approx(torch.tensor(nats / targets).double().exp().item())
