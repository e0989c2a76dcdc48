"""Sharded training: several processes take the steps of one, and end in one file for anyone."""

import io
import os
import socket
import warnings
from functools import partial
from typing import NamedTuple

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from test_distributed import CUTOFFS, Batch, Rows, V, batches
from torch import nn
from torch.testing import assert_close
from torch.utils.data import DataLoader

from lm_softmax import moment, parallel
from lm_softmax.encoders import AdaptiveEmbedding, LSTMEncoder, TransformerEncoder, WordEmbedding
from lm_softmax.heads import AdaptiveSoftmax, FullSoftmax, LowRankSoftmax, SampledSoftmax
from lm_softmax.kernels import warm_up
from lm_softmax.module import LanguageModel

CLUSTERS = {"cutoffs": CUTOFFS, "tail_sizes": [5, 3]}
HEADS = {"full": FullSoftmax, "adaptive": partial(AdaptiveSoftmax, **CLUSTERS)}
EMBEDDINGS = {"full": WordEmbedding, "adaptive": partial(AdaptiveEmbedding, **CLUSTERS)}
FSDP2, WORDS, BOTH = (2, 1), (1, 2), (2, 2)  # data and tensor parallel sizes


class Case(NamedTuple):
    sizes: tuple[int, int]
    head: str
    tie_weights: bool = False
    accumulate: int = 1
    clip: float | None = None
    epochs: int = 1  # beyond the first, resumed from the file of the one before
    encoder: str = "lstm"


CASES = [
    Case(FSDP2, "adaptive", accumulate=3, clip=0.05),
    Case(FSDP2, "full", tie_weights=True, clip=0.05, epochs=2, encoder="transformer"),
    Case(WORDS, "full", accumulate=3, clip=0.05),
    Case(WORDS, "adaptive", tie_weights=True, clip=0.05, epochs=2),
    Case(WORDS, "full", tie_weights=True, encoder="transformer"),
    Case(BOTH, "full", accumulate=3, clip=0.05, epochs=2),
    Case(BOTH, "adaptive", encoder="transformer"),
]


def optimizer(case):
    """Of gradients that are not clipped, the scale shows in the weights."""
    return partial(torch.optim.AdamW, lr=0.05) if case.clip else partial(torch.optim.SGD, lr=0.5)


def model(case):
    torch.manual_seed(3)
    encoders = {"lstm": LSTMEncoder, "transformer": TransformerEncoder}
    options = {
        "lstm": {"embedding_size": 8, "hidden_size": 8},
        "transformer": {"hidden_size": 8, "num_layers": 2, "num_heads": 2, "dropout": 0.0},
    }
    return LanguageModel(
        partial(encoders[case.encoder], embedding=EMBEDDINGS[case.head], **options[case.encoder]),
        HEADS[case.head],
        torch.arange(V, 0, -1),
        tie_weights=case.tie_weights,
        optimizer=partial(optimizer(case), fused=case.clip is not None),
    ).double()


def joined():
    return [
        Batch(torch.cat([a.tokens, b.tokens]), torch.cat([a.target, b.target]), a.carry)
        for a, b in zip(batches(0), batches(1), strict=True)
    ]


def trainer(**options):
    settings = {
        "accelerator": "cpu",
        "devices": 2,
        "max_epochs": 1,
        "logger": False,
        "log_every_n_steps": 1,
        "num_sanity_val_steps": 0,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "use_distributed_sampler": False,
    }
    return pl.Trainer(**settings | options)


def sharded(sizes, **options):
    return ModelParallelStrategy(*sizes, **{"save_distributed_checkpoint": False, **options})


def train(number, case, rank, folder):
    """One fit an epoch; what it logged, and one file a fit."""
    data, tensor = case.sizes
    rows = joined() if data == 1 else batches(rank // tensor)
    loader, path, logger = DataLoader(rows, batch_size=None), None, Rows()
    for epoch in range(case.epochs):
        fits = trainer(
            devices=data * tensor,
            strategy=sharded(case.sizes),
            accumulate_grad_batches=case.accumulate,
            gradient_clip_val=case.clip,
            max_epochs=epoch + 1,
            logger=logger,
        )
        fits.fit(model(case), loader, loader, ckpt_path=path)
        path = f"{folder}/{number}.ckpt"
        fits.save_checkpoint(path)
    if rank == 0:
        torch.save(logger.rows, f"{folder}/{number}.rows")


class Draws(pl.Callback):
    """The first random numbers of a training, without taking them away."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        with torch.random.fork_rng():
            noise = getattr(pl_module.head, "noise", None)
            self.found = (torch.rand(8) if noise is None else noise.draw()).tolist()


def draw(strategy, head, devices=2):
    pl.seed_everything(5, verbose=False)
    made = LanguageModel(
        partial(LSTMEncoder, embedding_size=8, hidden_size=8), head, torch.arange(V, 0, -1)
    )
    draws = Draws()
    loader = DataLoader(batches(0)[:1], batch_size=None)
    trainer(strategy=strategy, callbacks=[draws], devices=devices).fit(made, loader, loader)
    return draws.found


def refusals(rank):
    """What cannot be trained, and the line that says so."""
    loader = DataLoader(batches(rank), batch_size=None)

    def refused(strategy, made):
        with pytest.raises(ValueError, match=" ") as caught:
            trainer(strategy=strategy).fit(made, loader, loader)
        return str(caught.value)

    encoder = partial(LSTMEncoder, embedding_size=8, hidden_size=8)
    counts = torch.arange(V, 0, -1)
    low_rank = LanguageModel(encoder, partial(LowRankSoftmax, rank=2), counts)
    return [
        refused(sharded(WORDS), low_rank),
        refused(sharded(WORDS, save_distributed_checkpoint=True), model(CASES[0])),
    ]


def kept_gradients():
    """Accumulated gradients of sharded parameters before and after a checkpoint had them."""
    found = []
    for sizes in (FSDP2, WORDS):
        made, loader = model(CASES[0]._replace(sizes=sizes)), DataLoader(joined(), batch_size=None)
        trainer(strategy=sharded(sizes), max_steps=1).fit(made, loader, loader)
        for parameter in made.parameters():
            parameter.grad = parameter.detach() * 3
        buffer = io.BytesIO()
        torch.save(moment.accumulated(made), buffer)
        buffer.seek(0)
        made.zero_grad()
        moment.set_accumulated(made, torch.load(buffer, weights_only=True))
        for name, parameter in made.named_parameters():
            same = torch.equal(parameter.grad.full_tensor(), (parameter * 3).full_tensor())
            found.append((name, same and parameter.grad.placements == parameter.placements))
    return found


def work(rank, world_size, port, folder):
    """What each of two or four processes does."""
    warm_up()
    warnings.simplefilter("error")
    warnings.filterwarnings("ignore", ".*does not have many workers")
    warnings.filterwarnings("ignore", ".*isinstance.treespec, LeafSpec")
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor")
    warnings.filterwarnings("ignore", ".*but have no logger configured")
    torch.set_num_threads(1)
    os.environ |= {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "NODE_RANK": "0",
        "LOCAL_RANK": str(rank),
    }
    for number, case in enumerate(CASES):
        if case.sizes[0] * case.sizes[1] == world_size:
            train(number, case, rank, folder)
    if world_size == 4:
        torch.save({"draws": [draw(sharded(BOTH), FullSoftmax, 4)]}, f"{folder}/{rank}-of-4.pt")
        return
    negatives = partial(SampledSoftmax, num_samples=8)
    draws = [draw("ddp", negatives) for _ in range(2)] + [draw(sharded(FSDP2), negatives)]
    draws.append(draw(sharded(WORDS), FullSoftmax))
    said = {"draws": draws, "refusals": refusals(rank), "kept": kept_gradients()}
    torch.save(said, f"{folder}/{rank}.pt")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    for world_size in (2, 4):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        torch.multiprocessing.spawn(work, (world_size, port, folder), nprocs=world_size)
    return folder


def reference(case):
    """A plain loop over the joined batches; its weights, the loss of each step, val/ppl."""
    expected, losses = model(case), []
    steps = optimizer(case)(expected.parameters())
    for _ in range(case.epochs):
        state = None
        for begin in range(0, len(joined()), case.accumulate):
            nats, targets = torch.zeros((), dtype=torch.float64), 0
            for tokens, target, _ in joined()[begin : begin + case.accumulate]:
                more, num, state = nats_of(expected, tokens, target, state)
                nats, targets = nats + more, targets + num
            steps.zero_grad()
            (nats / max(targets, 1)).backward()
            losses.append(nats.item() / max(targets, 1))
            if case.clip is not None:
                nn.utils.clip_grad_norm_(expected.parameters(), case.clip)
            steps.step()
    state, sums = None, torch.zeros(2, dtype=torch.float64)
    for tokens, target, _ in joined():
        nats, num, state = nats_of(expected, tokens, target, state)
        sums += torch.tensor([nats.item(), num])
    return expected, losses, (sums[0] / sums[1]).exp().item()


def nats_of(expected, tokens, target, state):
    hidden, state = expected.encoder(tokens, state)
    state = state if state is None else tuple(part.detach() for part in state)
    log_probs = expected.head.log_prob(hidden).flatten(0, 1)
    nats = nn.functional.nll_loss(log_probs, target.flatten(), reduction="sum")
    return nats, int((target != -100).sum()), state


@pytest.mark.parametrize("number", range(len(CASES)), ids=str)
def test_equals_one_process_on_the_joined_batch(number, folder):
    expected, losses, perplexity = reference(CASES[number])
    path = folder / f"{number}.ckpt"
    found = torch.load(path, weights_only=True)["state_dict"]
    loaded = LanguageModel.load_from_checkpoint(path).state_dict()  # float32
    assert found.keys() == loaded.keys()
    for name, value in expected.state_dict().items():
        assert_close(found[name], value, rtol=1e-8, atol=1e-10, msg=lambda m, n=name: f"{n}: {m}")
        assert_close(loaded[name], value.float())
    logged = [row for _, row in torch.load(folder / f"{number}.rows", weights_only=True)]
    assert [row["train/loss"] for row in logged if "train/loss" in row] == pytest.approx(losses)
    assert [row["val/ppl"] for row in logged if "val/ppl" in row][-1] == pytest.approx(perplexity)


@pytest.mark.filterwarnings("ignore:.*does not have many workers")
@pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec")
def test_one_process_goes_on_from_the_file(folder):
    case = CASES[2]
    made, loader = model(case), DataLoader(joined(), batch_size=None)
    fits = trainer(devices=1, max_epochs=2, accumulate_grad_batches=3, gradient_clip_val=0.05)
    fits.fit(made, loader, loader, ckpt_path=folder / "2.ckpt")
    expected, *_ = reference(case._replace(epochs=2))
    for name, value in expected.state_dict().items():
        assert_close(made.state_dict()[name], value, rtol=1e-8, atol=1e-10)


def test_negatives_differ_between_ranks_and_not_between_runs(folder):
    first, second = (torch.load(folder / f"{rank}.pt")["draws"] for rank in range(2))
    assert first[0] == first[1]
    assert second[0] == second[1]
    assert first[0] != second[0]
    assert first[2] != second[2]


def test_processes_that_share_words_draw_the_same(folder):
    """Dropout, and negatives if a head had them: their hidden vectors are to be one."""
    first, second = (torch.load(folder / f"{rank}.pt")["draws"] for rank in range(2))
    assert first[3] == second[3]
    four = [torch.load(folder / f"{rank}-of-4.pt")["draws"][0] for rank in range(4)]
    assert four[0] == four[1] != four[2] == four[3]


def test_accumulated_gradients_go_into_checkpoints(folder):
    for rank in range(2):
        kept = torch.load(folder / f"{rank}.pt")["kept"]
        assert {"head.weight", "encoder.lstm.weight_hh_l0"} <= {name for name, _ in kept}
        assert [name for name, same in kept if not same] == []


def test_what_cannot_be_sharded_is_said(folder):
    refused = torch.load(folder / "0.pt")["refusals"]
    assert refused[0].startswith("LowRankSoftmax cannot share its words among processes")
    assert "save_distributed_checkpoint to false" in refused[1]


def test_sizes_are_those_of_the_processes():
    strategy = sharded((3, 2))
    strategy.parallel_devices = [torch.device("cpu")] * 4
    with pytest.raises(ValueError, match=r"data_parallel_size=3 times .*=2 .* which is 4"):
        parallel.check_sizes(strategy)
    parallel.check_sizes("ddp")
