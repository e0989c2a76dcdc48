"""Training with sparse gradients, end to end: the steps are those of dense ones."""

import copy
import csv
import math
import os
import socket
import warnings
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import NamedTuple

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader

from lm_softmax import cli, gradients
from lm_softmax.encoders import AdaptiveEmbedding, LSTMEncoder, WordEmbedding
from lm_softmax.heads import NCE, FullSoftmax, HierarchicalSoftmax, OutputHead, SampledSoftmax
from lm_softmax.kernels import warm_up
from lm_softmax.module import LanguageModel

V, WIDTH = 40, 8
COUNTS = torch.arange(V, 0, -1)
TIGHT = {"rtol": 1e-10, "atol": 1e-10}
ADAGRAD = partial(torch.optim.Adagrad, lr=0.1)
SGD = partial(torch.optim.SGD, lr=0.5)
EMBEDDINGS = {
    "word": WordEmbedding,
    "adaptive": partial(AdaptiveEmbedding, cutoffs=[6, 15], min_tail_size=3),
}

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*have no `val_dataloader`"),
    pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec"),
]


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    """Steps this small are slower on two."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Batch(NamedTuple):
    tokens: Tensor
    target: Tensor
    carry: bool


class Logistic(OutputHead):
    """Its loss is log(1 + exp(-logit)) of the target alone: a head without chance."""

    def __init__(self, hidden_size, vocab_size, counts=None, *, sparse=False, ignore_index=-100):
        super().__init__(hidden_size, vocab_size, counts, ignore_index=ignore_index)
        self.sparse = sparse
        self.weight = nn.Parameter(torch.randn(vocab_size, hidden_size))
        self.bias = nn.Parameter(torch.randn(vocab_size))

    def log_prob(self, hidden, target=None):
        log_probs = F.log_softmax(F.linear(hidden, self.weight, self.bias), -1)
        if target is None:
            return log_probs
        picked = log_probs.gather(-1, target.clamp(min=0).unsqueeze(-1)).squeeze(-1)
        return picked.masked_fill(target == self.ignore_index, 0.0)

    def loss(self, hidden, target, *, reduction="mean"):
        rows, ids = hidden.flatten(0, -2), target.flatten()
        kept = (ids != self.ignore_index).nonzero().squeeze(1)
        ids = ids[kept]
        weight = F.embedding(ids, self.weight, sparse=self.sparse)
        bias = torch.gather(self.bias, 0, ids, sparse_grad=self.sparse)
        total = F.softplus(-(rows[kept] * weight).sum(-1) - bias).sum()
        assert reduction == "sum"
        return total

    def tie_weight(self, embedding):
        self.weight = embedding.weight


def model(
    sparse,
    *,
    kind=LanguageModel,
    embedding="word",
    optimizer=ADAGRAD,
    sparse_head=None,
    **options,
):
    torch.manual_seed(3)
    embedding = partial(EMBEDDINGS[embedding], sparse=sparse)
    encoder = partial(
        LSTMEncoder, embedding_size=WIDTH, hidden_size=WIDTH, embedding=embedding, **options
    )
    head = partial(Logistic, sparse=sparse if sparse_head is None else sparse_head)
    return kind(encoder, head, COUNTS, optimizer=optimizer)


def batches(rank, number=5):
    """The ranks see different words; single batches, and one of both ranks, have no target."""
    generator = torch.Generator().manual_seed(rank)
    low, high, ignored = ((0, 6, 0.6), (4, V, 0.1))[rank]
    made = []
    for index in range(number):
        target = torch.randint(low, high, (3, 7), generator=generator)
        target[torch.rand(3, 7, generator=generator) < ignored] = -100
        if (rank, index) in ((0, 1), (0, 4), (1, 4)):
            target[:] = -100
        tokens = torch.randint(low, high, (3, 7), generator=generator)
        made.append(Batch(tokens, target, index > 0))
    return made


def trainer(**options):
    defaults = {
        "max_epochs": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
        "accelerator": "cpu",
        "use_distributed_sampler": False,
    }
    return pl.Trainer(**defaults | options)


def fit(trained, rows, ckpt_path=None, **options):
    made = trainer(**options)
    loader = DataLoader(rows, batch_size=None, generator=torch.Generator())
    made.fit(trained, loader, ckpt_path=ckpt_path)
    return made


def assert_same(found, expected, **tolerance):
    assert list(found) == list(expected)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, msg=name, **tolerance)


@pytest.mark.parametrize("embedding", EMBEDDINGS)
@pytest.mark.parametrize("optimizer", [SGD, ADAGRAD])
@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("clip", [(None, None), (0.05, "norm"), (0.05, None), (0.003, "value")])
def test_steps_are_those_of_dense_gradients(embedding, optimizer, accumulate, clip):
    options = {
        "precision": "64-true",
        "accumulate_grad_batches": accumulate,
        "gradient_clip_val": clip[0],
        "gradient_clip_algorithm": clip[1],
    }
    trained = []
    for sparse in (True, False):
        trained.append(model(sparse, embedding=embedding, optimizer=optimizer).double())
        before = copy.deepcopy(trained[-1].state_dict())
        fit(trained[-1], batches(1), **options)
    assert_same(trained[0].state_dict(), trained[1].state_dict(), **TIGHT)
    assert not torch.equal(trained[0].state_dict()["head.bias"], before["head.bias"])


class Layouts(pl.Callback):
    """What the optimizer was given, at all steps but the last."""

    def __init__(self):
        self.sparse, self.norms = set(), []

    def on_before_zero_grad(self, trainer, model, optimizer):
        grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        self.sparse |= {name for name, grad in grads.items() if grad.is_sparse}
        if grads:
            flat = torch.cat([grad.to_dense().flatten().double() for grad in grads.values()])
            self.norms.append(flat.norm().item())


@pytest.mark.parametrize("embedding", EMBEDDINGS)
def test_only_the_tables_have_sparse_gradients(embedding):
    layouts = Layouts()
    fit(model(True, embedding=embedding), batches(1), callbacks=[layouts])
    tables = {"word": [], "adaptive": ["tail_weights.0", "tail_weights.1"]}[embedding]
    tables = {f"encoder.embedding.{name}" for name in ("weight", *tables)}
    assert layouts.sparse == {*tables, "head.weight", "head.bias"}


def test_dense_gradients_are_clipped_by_lightning(monkeypatch):
    monkeypatch.setattr("lm_softmax.gradients.clip_gradients", lambda *_: pytest.fail("ours"))
    fit(model(False), batches(1), gradient_clip_val=0.1)
    with pytest.raises(pytest.fail.Exception):
        fit(model(True), batches(1), gradient_clip_val=0.1)
    fit(model(True), batches(1))


@pytest.mark.parametrize("sparse", [True, False])
@pytest.mark.parametrize("algorithm", ["norm", "value"])
def test_a_limit_that_is_none_to_lightning_is_none(algorithm, sparse):
    trained, expected = model(sparse), model(sparse)
    fit(expected, batches(1))
    fit(trained, batches(1), gradient_clip_val=-0.5, gradient_clip_algorithm=algorithm)
    assert_same(trained.state_dict(), expected.state_dict(), rtol=0, atol=0)


class Scaling(MixedPrecision):
    """A GradScaler without autocast: a CPU has no LSTM in fp16."""

    def forward_context(self):
        return nullcontext()


@pytest.mark.parametrize("sparse", [True, False])
def test_scaled_gradients_are_unscaled_before_they_are_clipped(sparse):
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12)
    layouts = Layouts()
    plugin = Scaling("16-mixed", "cpu", scaler)
    trained = model(sparse)
    before = copy.deepcopy(trained.state_dict())
    rows = batches(1, 3)
    fit(trained, rows, plugins=[plugin], gradient_clip_val=1e-3, callbacks=[layouts])
    assert layouts.norms == pytest.approx([1e-3] * 2, rel=1e-2)
    assert not torch.equal(trained.state_dict()["head.weight"], before["head.weight"])


class Unscaling(torch.optim.Adagrad):
    """Of no module of torch, and without an option `fused`."""

    _step_supports_amp_scaling = True

    def step(self, closure=None):
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.grad.div_(self.grad_scale)
        self.grad_scale = self.found_inf = None
        return super().step(closure)


Unscaling.__module__ = "elsewhere"


@pytest.mark.parametrize("own", [True, False])
def test_an_optimizer_that_unscales_cannot_clip(own, monkeypatch):
    if own:  # a model that makes its optimizer without a look at it
        monkeypatch.setattr(
            LanguageModel, "configure_optimizers", lambda self: Unscaling(self.parameters(), lr=0.1)
        )
    trained = model(True, optimizer=partial(torch.optim.Adagrad, lr=0.1))
    if not own:
        monkeypatch.setattr(
            "lm_softmax.factory.build", lambda *_, **__: Unscaling(trained.parameters(), lr=0.1)
        )
    before = copy.deepcopy(trained.state_dict())

    def run(**options):
        plugin = Scaling("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=2.0**12))
        fit(trained, batches(1, 3), plugins=[plugin], **options)

    with pytest.raises(ValueError, match="16-mixed, as Unscaling unscales them itself: set"):
        run(gradient_clip_val=1e-3)
    assert_same(trained.state_dict(), before, rtol=0, atol=0)
    run(gradient_clip_val=-1.0)


def test_goes_on_from_a_checkpoint_as_if_never_stopped(tmp_path):
    rows = batches(1, 4)
    whole, first, second = (model(True, output_dropout=0.3) for _ in range(3))
    options = {"gradient_clip_val": 0.1}
    torch.manual_seed(7)
    fit(whole, rows, max_epochs=2, **options)
    torch.manual_seed(7)
    fit(first, rows, **options).save_checkpoint(tmp_path / "a.ckpt")
    fit(second, rows, tmp_path / "a.ckpt", max_epochs=2, **options)
    assert_same(second.state_dict(), whole.state_dict(), rtol=0, atol=0)
    states = [m.optimizers().optimizer.state_dict()["state"] for m in (second, whole)]
    for one, other in zip(*[s.values() for s in states], strict=True):
        assert_same(one, other, rtol=0, atol=0)


def test_a_checkpoint_of_sparse_training_loads_into_dense(tmp_path):
    fit(model(True), batches(1)).save_checkpoint(tmp_path / "a.ckpt")
    made = fit(model(False), batches(1), tmp_path / "a.ckpt", max_epochs=2)
    assert made.current_epoch == 2
    again = LanguageModel.load_from_checkpoint(tmp_path / "a.ckpt")
    assert again.encoder.embedding.sparse
    assert again.head.sparse


class Allocations(TorchDispatchMode):
    """Remembers the largest strided tensor that an operation made anew."""

    def __init__(self):
        super().__init__()
        self.largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = {_storage(x) for x in tree_leaves((args, kwargs)) if _is_strided(x)}
        result = func(*args, **kwargs or {})
        for tensor in tree_leaves(result):
            if _is_strided(tensor) and _storage(tensor) not in given:
                self.largest = max(self.largest, tensor.untyped_storage().nbytes() // 4)
        return result


def _is_strided(value):
    return isinstance(value, Tensor) and value.layout == torch.strided


def _storage(tensor):
    return tensor.untyped_storage().data_ptr()


@pytest.mark.parametrize("sparse", [True, False])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_step_makes_nothing_of_the_size_of_the_vocabulary(sparse, accumulate):
    words = 50_000
    torch.manual_seed(0)
    encoder = partial(
        LSTMEncoder,
        embedding_size=WIDTH,
        hidden_size=WIDTH,
        embedding=partial(WordEmbedding, sparse=sparse),
    )
    trained = LanguageModel(
        encoder, partial(Logistic, sparse=sparse), torch.ones(words), optimizer=ADAGRAD
    )
    target = torch.randint(words, (4, 6))
    rows = [Batch(torch.randint(words, (4, 6)), target, False) for _ in range(2 * accumulate)]
    watched = Allocations()

    class Watch(pl.Callback):
        def on_train_batch_start(self, *_):
            watched.__enter__()

        def on_train_batch_end(self, *_):
            watched.__exit__(None, None, None)

    fit(
        trained,
        rows,
        gradient_clip_val=0.1,
        accumulate_grad_batches=accumulate,
        callbacks=[Watch()],
    )
    assert watched.largest > 0
    assert (watched.largest < words) is sparse


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"optimizer": torch.optim.AdamW}, "AdamW does not go with the sparse gradients of"),
        ({"optimizer": partial(ADAGRAD, weight_decay=0.1)}, "Adagrad with weight_decay=0.1"),
        ({"optimizer": torch.optim.SparseAdam}, "SparseAdam takes sparse gradients alone"),
    ],
)
def test_what_cannot_train_is_refused_before_a_step(options, message):
    trained = model(True, **options)
    trained.training_step = lambda *_: pytest.fail("a step")
    with pytest.raises(ValueError, match=message):
        fit(trained, batches(1))


def tied(sparse, sparse_head):
    torch.manual_seed(3)
    encoder = partial(
        LSTMEncoder,
        embedding_size=WIDTH,
        hidden_size=WIDTH,
        embedding=partial(WordEmbedding, sparse=sparse),
    )
    head = partial(Logistic, sparse=sparse_head)
    return LanguageModel(encoder, head, COUNTS, tie_weights=True, optimizer=SGD)


def test_tied_weights_are_sparse_on_both_sides_or_none():
    both, neither = tied(True, True), tied(False, False)
    for one in (both, neither):
        fit(one, batches(1), gradient_clip_val=0.1)
    assert_same(both.state_dict(), neither.state_dict())
    for sides in ((True, False), (False, True)):
        with pytest.raises(ValueError, match="are one parameter, with sparse gradients here"):
            fit(tied(*sides), batches(1))


def test_dense_heads_go_with_sparse_embeddings():
    torch.manual_seed(3)
    embedding = partial(WordEmbedding, sparse=True)
    encoder = partial(LSTMEncoder, embedding_size=WIDTH, hidden_size=WIDTH, embedding=embedding)
    trained = LanguageModel(encoder, FullSoftmax, COUNTS, optimizer=ADAGRAD)
    layouts = Layouts()
    fit(trained, batches(1), callbacks=[layouts], gradient_clip_val=0.1)
    assert layouts.sparse == {"encoder.embedding.weight"}


@pytest.mark.parametrize("sparse", [True, False])
@pytest.mark.parametrize(
    "kind", [SampledSoftmax, NCE, partial(NCE, log_partition="learned"), HierarchicalSoftmax]
)
def test_heads_know_which_of_their_gradients_are_sparse(kind, sparse):
    torch.sparse.check_sparse_tensor_invariants.disable()
    head = kind(WIDTH, V, COUNTS, sparse=sparse)
    found = gradients.sparse_parameters(head)
    assert bool(found) is sparse
    head.loss(torch.randn(5, WIDTH), torch.arange(5), reduction="sum").backward()
    for name, parameter in head.named_parameters():
        assert parameter.grad.is_sparse == (name in found), name


@pytest.fixture
def corpus(tmp_path, monkeypatch):
    """A text in which each of 64 words has one successor."""
    monkeypatch.chdir(tmp_path)
    for split, lines in (("train", 60), ("validation", 3), ("test", 3)):
        words = [f"{one}{two}" for one in "abcdefgh" for two in "ijklmnop"]
        text = "\n".join(" ".join(words) for _ in range(lines))
        Path(f"{split}.txt").write_text(f"{text}\n")
    config = Path(__file__).parent.parent / "configs" / "sparse.yaml"
    trainer = {
        "accelerator": "cpu",
        "max_steps": 60,
        "val_check_interval": 30,
        "log_every_n_steps": 10,
        "enable_progress_bar": "false",
        "enable_model_summary": "false",
    }
    return [
        *("fit", "-c", str(config), "--run", "run", f"--data.path={tmp_path}"),
        *("--data.batch_size=4", "--data.block_size=8", "--model.head.init_args.num_samples=20"),
        *(f"--trainer.{name}={value}" for name, value in trainer.items()),
    ]


def test_the_configuration_learns(corpus):
    cli.main(corpus)
    rows = list(csv.DictReader(Path("run/metrics.csv").read_text().splitlines()))
    losses = [float(row["train/loss"]) for row in rows if row["train/loss"]]
    nats = [float(row["val/nll"]) for row in rows if row["val/nll"]]
    assert losses[-1] < 0.5 * losses[0]
    assert nats[-1] < nats[0] < math.log(66)
    hparams = torch.load("run/checkpoints/best.ckpt", weights_only=True)["hyper_parameters"]
    embedding = hparams["encoder"]["init_args"]["embedding"]
    assert embedding["class_path"] == "lm_softmax.encoders.WordEmbedding"
    assert embedding["init_args"] == {"sparse": True}


def test_the_command_refuses_in_one_line(corpus, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main([*corpus, "--model.optimizer.init_args.weight_decay=0.1"])
    assert stop.value.code == 2
    error = "error: Adagrad with weight_decay=0.1 does not go with the sparse gradients of encoder"
    assert error in capsys.readouterr().err
    assert not Path("run").exists()


RUNS = [
    (embedding, accumulate, clip)
    for embedding in EMBEDDINGS
    for accumulate, clip in ((1, None), (3, None), (2, 0.05))
]


CLIPPED = {"devices": 2, "strategy": "ddp", "precision": "64-true", "gradient_clip_val": 0.05}
RESUMED = ("never stopped", "of two processes", "of one process")


class Plain(LanguageModel):
    """Makes its optimizer without a look at what `LanguageModel` does."""

    def configure_optimizers(self):
        return torch.optim.Adagrad(self.parameters(), lr=0.1)


class Aliased(LanguageModel):
    """Has the embedding under a second name."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.also, self.nothing = self.encoder.embedding, None


def resume(rank, folder):
    """Two epochs, and the second of them from the file of two processes and that of one."""
    names = list(model(True).state_dict())
    files = [None, f"{folder}/two.ckpt", f"{folder}/one.ckpt"]
    fit(model(True).double(), batches(rank), **CLIPPED).save_checkpoint(files[1])
    assert list(torch.load(files[1], weights_only=True)["state_dict"]) == names
    for number, file in enumerate(files):
        made = fit(model(True).double(), batches(rank), file, max_epochs=2, **CLIPPED)
        assert made.global_step == 10
        made.save_checkpoint(f"{folder}/resumed-{number}.ckpt")


def fail(rank):
    """A training that failed leaves model and strategy fit for another."""
    refused = model(True, optimizer=partial(ADAGRAD, weight_decay=0.1)).double()
    names = list(refused.state_dict())
    with pytest.raises(ValueError, match="Adagrad with weight_decay"):
        fit(refused, batches(rank), **CLIPPED)
    assert list(refused.state_dict()) == names
    made = trainer(**CLIPPED)
    loader = DataLoader(batches(rank), batch_size=None)
    refused.configure_model = lambda: pytest.fail("between `setup` and the wrapping")
    with pytest.raises(pytest.fail.Exception):
        made.fit(refused, loader)
    assert list(refused.state_dict()) == names
    dense = model(False).double()
    made.fit(dense, loader)
    assert dense.global_step == 5


def subclass(kind, rank, folder):
    """Checkpoints of models that are not quite a `LanguageModel`."""
    made = model(True, kind=kind).double()
    children = list(made._modules.items())
    layouts = Layouts()
    fit(made, batches(rank), callbacks=[layouts], **CLIPPED).save_checkpoint(
        f"{folder}/{kind.__name__}.ckpt"
    )
    assert list(made._modules.items()) == children
    assert "encoder.embedding.weight" in layouts.sparse


def work(rank, port, folder):
    """What each of the two processes does."""
    warm_up()
    warnings.simplefilter("error")
    warnings.filterwarnings("ignore", ".*does not have many workers")
    warnings.filterwarnings("ignore", ".*isinstance.treespec, LeafSpec")
    warnings.filterwarnings("ignore", ".*have no `val_dataloader`")
    torch.set_num_threads(1)
    os.environ |= {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "NODE_RANK": "0",
        "LOCAL_RANK": str(rank),
    }
    for number, (embedding, accumulate, clip) in enumerate(RUNS):
        trained, layouts = model(True, embedding=embedding).double(), Layouts()
        names = list(trained.state_dict())
        if rank == 1:  # the first process gives the others its weights
            nn.init.zeros_(trained.head.weight)
        fit(
            trained,
            batches(rank),
            devices=2,
            strategy="ddp",
            precision="64-true",
            accumulate_grad_batches=accumulate,
            gradient_clip_val=clip,
            callbacks=[layouts],
        )
        assert list(trained.state_dict()) == names
        torch.save(
            {"weights": trained.state_dict(), "sparse": sorted(layouts.sparse)},
            f"{folder}/{number}-{rank}.pt",
        )
    resume(rank, folder)
    fail(rank)
    for kind in (Plain, Aliased):
        subclass(kind, rank, folder)


def joined_batches():
    """Those of both ranks, for one process."""
    return [
        Batch(torch.cat([a.tokens, b.tokens]), torch.cat([a.target, b.target]), a.carry)
        for a, b in zip(batches(0), batches(1), strict=True)
    ]


ALONE = {"precision": "64-true", "gradient_clip_val": 0.05}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    fit(model(True).double(), joined_batches(), **ALONE).save_checkpoint(folder / "one.ckpt")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(work, (port, folder), nprocs=2)
    return folder


@pytest.mark.parametrize("number", range(len(RUNS)), ids=str)
def test_two_processes_equal_one_on_the_joined_batch(number, folder):
    embedding, accumulate, clip = RUNS[number]
    expected = model(False, embedding=embedding).double()
    optimizer = torch.optim.Adagrad(expected.parameters(), lr=0.1)
    joined, state = joined_batches(), None
    for begin in range(0, len(joined), accumulate):
        total, targets = torch.zeros((), dtype=torch.float64), 0
        for tokens, target, _ in joined[begin : begin + accumulate]:
            hidden, state = expected.encoder(tokens, state)
            state = tuple(part.detach() for part in state)
            logits = F.linear(hidden, expected.head.weight, expected.head.bias)
            picked = logits.gather(-1, target.clamp(min=0).unsqueeze(-1)).squeeze(-1)
            total = total + F.softplus(-picked)[target != -100].sum()
            targets += int((target != -100).sum())
        optimizer.zero_grad()
        (total / max(targets, 1)).backward()
        if clip is not None:
            nn.utils.clip_grad_norm_(expected.parameters(), clip)
        optimizer.step()
    for rank in range(2):
        found = torch.load(folder / f"{number}-{rank}.pt", weights_only=True)
        assert_same(found["weights"], expected.state_dict(), **TIGHT)
        assert found["sparse"][-2:] == ["head.bias", "head.weight"]
        assert "encoder.embedding.weight" in found["sparse"]


def by_name(path):
    """Weights and optimizer states of a checkpoint, each under its parameter's name."""
    saved = torch.load(path, weights_only=True)
    names = [name for name, _ in model(True).named_parameters()]
    (optimizer,) = saved["optimizer_states"]
    assert optimizer["param_groups"][0]["params"] == list(range(len(names)))
    states = {name: optimizer["state"][number]["sum"] for number, name in enumerate(names)}
    return saved["state_dict"], states


@pytest.mark.parametrize("number", range(len(RESUMED)), ids=RESUMED)
def test_two_processes_go_on_as_if_never_stopped(number, folder):
    """From the file of either number of processes; and so does one from the file of two."""
    alone = model(True).double()
    made = fit(alone, joined_batches(), folder / "two.ckpt", max_epochs=2, **ALONE)
    made.save_checkpoint(folder / "alone.ckpt")
    for found, expected in zip(
        by_name(folder / f"resumed-{number}.ckpt"), by_name(folder / "alone.ckpt"), strict=True
    ):
        assert_same(found, expected, **TIGHT)


def test_optimizer_states_are_those_of_the_named_parameters(folder):
    for found, expected in zip(
        by_name(folder / "two.ckpt"), by_name(folder / "one.ckpt"), strict=True
    ):
        assert_same(found, expected, **TIGHT)


def test_a_model_with_its_own_optimizer_writes_sound_checkpoints(folder):
    for found, expected in zip(
        by_name(folder / "Plain.ckpt"), by_name(folder / "one.ckpt"), strict=True
    ):
        assert_same(found, expected, **TIGHT)


def test_a_module_of_two_names_trains_as_of_one(folder):
    found = torch.load(folder / "Aliased.ckpt", weights_only=True)["state_dict"]
    also = found.pop("also.weight")
    assert torch.equal(also, found["encoder.embedding.weight"])
    assert_same(found, by_name(folder / "one.ckpt")[0], **TIGHT)
