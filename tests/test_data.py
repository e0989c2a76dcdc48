"""Batches: every token a target exactly once, after the token before it, on any number of ranks."""

import os
from types import SimpleNamespace

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning.pytorch.callbacks import ModelCheckpoint

from lm_softmax.data import SplitStats, TextDataModule, TokenBatch, datamodule
from lm_softmax.data.batching import BlockBatches, EpochSampler, ResumableLoader, StreamBatches
from lm_softmax.vocab import Vocab

SHARED = os.environ.get("LM_SOFTMAX_DATA", "")
EOS = 10**6  # of the property tests, whose token at place i is i
quick = settings(deadline=None, max_examples=80)
shapes = {
    "num_tokens": st.integers(1, 200),
    "rows": st.integers(1, 4),  # a rank
    "world_size": st.integers(1, 4),
    "block_size": st.integers(1, 12),
}
both_kinds = pytest.mark.parametrize("kind", [StreamBatches, BlockBatches])


@pytest.fixture(autouse=True)
def _no_shared_data(monkeypatch):
    monkeypatch.delenv("LM_SOFTMAX_DATA", raising=False)


def ranks(kind, num_tokens, rows, world_size, block_size, **options):
    """The batches of each rank, for a text whose token at place i is i."""
    return [
        kind(
            np.arange(num_tokens, dtype=np.uint32),
            EOS,
            batch_size=rows * world_size,
            block_size=block_size,
            rank=rank,
            world_size=world_size,
            **options,
        )
        for rank in range(world_size)
    ]


def epoch_of(batches, epoch=0):
    return [batches[epoch * len(batches) + step] for step in range(len(batches))]


def targets_of(batches):
    return sorted(t for batch in batches for t in batch.target.flatten().tolist() if t != -100)


@both_kinds
@quick
@given(**shapes, epoch=st.integers(0, 3))
def test_every_token_is_a_target_exactly_once(kind, epoch, num_tokens, **shape):
    everyone = ranks(kind, num_tokens, **shape)
    given_ = [epoch_of(batches, epoch) for batches in everyone]
    assert targets_of(batch for batches in given_ for batch in batches) == [*range(num_tokens)]
    assert len({len(batches) for batches in given_}) == 1  # ranks take the same number of steps
    for batch in (batch for batches in given_ for batch in batches):
        assert batch.tokens.shape == batch.target.shape == (shape["rows"], shape["block_size"])
        assert batch.tokens.dtype == batch.target.dtype == torch.int64


@both_kinds
@quick
@given(**shapes)
def test_the_input_is_the_token_before_the_target(kind, **shape):
    for batches in ranks(kind, **shape):
        for batch in epoch_of(batches):
            predicted = batch.target != -100
            before = torch.where(predicted, batch.target - 1, -1)
            opens = batch.tokens == EOS
            assert torch.equal(batch.tokens[predicted & ~opens], before[predicted & ~opens])
            assert not (opens & predicted)[:, 1:].any()  # only ever the first of a row
            row_goes_on = batch.target[:, :-1] != -100
            assert torch.equal(batch.tokens[:, 1:][row_goes_on], batch.target[:, :-1][row_goes_on])


@quick
@given(**shapes)
def test_streams_go_on_from_batch_to_batch(**shape):
    for batches in ranks(StreamBatches, **shape):
        first, *rest = epoch_of(batches)
        assert not first.carry
        assert (first.tokens[:, 0] == EOS).all()
        assert all(batch.carry for batch in rest)
        last = first.target[:, -1]
        for batch in rest:
            goes_on = batch.target[:, 0] != -100
            assert torch.equal(batch.tokens[:, 0][goes_on], last[goes_on])
            last = batch.target[:, -1]


@quick
@given(**shapes)
def test_streams_are_contiguous_and_differ_by_one_token_at_most(num_tokens, **shape):
    streams = []
    for batches in ranks(StreamBatches, num_tokens, **shape):
        targets = torch.cat([batch.target for batch in epoch_of(batches)], dim=1)
        streams += [row[row != -100].tolist() for row in targets]
    assert [token for stream in streams for token in stream] == [*range(num_tokens)]
    lengths = [len(stream) for stream in streams]
    assert max(lengths) - min(lengths) <= 1


@quick
@given(**shapes)
def test_blocks_begin_with_the_true_token_before_them(**shape):
    for batches in ranks(BlockBatches, **shape):
        for batch in epoch_of(batches):
            assert not batch.carry
            first = batch.target[:, 0]
            assert torch.equal(batch.tokens[first == 0, 0], torch.full_like(first, EOS)[first == 0])
            assert torch.equal(batch.tokens[first > 0, 0], first[first > 0] - 1)
            assert ((first == -100) | (first % shape["block_size"] == 0)).all()


@both_kinds
@quick
@given(**shapes)
def test_ranks_share_the_rows_of_one_process(kind, rows, world_size, **shape):
    alone = epoch_of(*ranks(kind, rows=rows * world_size, world_size=1, **shape))
    shared = [
        epoch_of(batches) for batches in ranks(kind, rows=rows, world_size=world_size, **shape)
    ]
    for whole, parts in zip(alone, zip(*shared, strict=True), strict=True):
        assert torch.equal(whole.tokens, torch.cat([part.tokens for part in parts]))
        assert torch.equal(whole.target, torch.cat([part.target for part in parts]))


def test_blocks_come_in_another_order_each_epoch_and_seed():
    shape = {"num_tokens": 1000, "rows": 2, "world_size": 1, "block_size": 5}

    def order(seed, epoch):
        (batches,) = ranks(BlockBatches, **shape, seed=seed)
        return tuple(t for batch in epoch_of(batches, epoch) for t in batch.target[:, 0].tolist())

    orders = [order(seed, epoch) for seed in (0, 1) for epoch in (0, 1)]
    assert len(set(orders)) == 4
    assert order(0, 1) == orders[1]
    assert [*range(0, 1000, 5)] not in [[*first] for first in orders]


def test_all_rows_past_the_end_are_ignored():
    first, second = ranks(BlockBatches, num_tokens=5, rows=2, world_size=2, block_size=5)
    assert targets_of(epoch_of(first) + epoch_of(second)) == [0, 1, 2, 3, 4]
    assert (second[0].target == -100).all()
    assert (second[0].tokens == EOS).all()


@both_kinds
def test_a_loader_goes_on_in_the_midst_of_an_epoch(kind):
    (batches,) = ranks(kind, num_tokens=100, rows=2, world_size=1, block_size=5)

    def loader():
        return ResumableLoader(batches, sampler=EpochSampler(batches), batch_size=None)

    def targets(given_):
        return [batch.target.tolist() for batch in given_]

    stopped = loader()
    stopped.sampler.set_epoch(1)
    iterator = iter(stopped)
    begun = [next(iterator) for _ in range(3)]
    resumed = loader()
    resumed.load_state_dict(stopped.state_dict())
    resumed.sampler.set_epoch(1)
    assert len(resumed) == 10
    assert targets(begun) + targets(resumed) == targets(epoch_of(batches, 1))
    assert targets(resumed) == targets(epoch_of(batches, 1))  # the next time, all of it
    assert resumed.state_dict()["given"] == 10
    other = loader()
    other.load_state_dict(resumed.state_dict())  # the epoch was complete
    assert targets(other) == targets(epoch_of(batches, 0))


@both_kinds
@pytest.mark.parametrize(
    ("name", "other"), [("rows", 4), ("block_size", 6), ("num_tokens", 99), ("world_size", 2)]
)
def test_the_rest_of_an_epoch_is_that_of_the_same_batches(kind, name, other):
    shape = {"num_tokens": 100, "rows": 2, "world_size": 1, "block_size": 5}
    shapes = shape, shape | {name: other} | ({"rows": 1} if name == "world_size" else {})
    begun, goes_on = (
        ResumableLoader(batches, sampler=EpochSampler(batches), batch_size=None)
        for batches in (ranks(kind, **each)[0] for each in shapes)
    )
    iterator = iter(begun)
    for _ in range(3):
        next(iterator)
    if name == "world_size":  # which may change: the rows are dealt anew
        goes_on.load_state_dict(begun.state_dict())
        assert len([*goes_on]) == len(begun) - 3
        return
    with pytest.raises(ValueError, match=r"text would be left out or repeated: .* was .*, is "):
        goes_on.load_state_dict(begun.state_dict())
    assert len([*iterator]) == len(begun) - 3
    goes_on.load_state_dict(begun.state_dict())  # between two epochs it may change
    assert len([*goes_on]) == len(goes_on)


# The data module


@pytest.fixture
def files(tmp_path):
    lines = [" ".join(str(i * j % 19) for j in range(i % 30)) for i in range(60)]
    named = {"train": lines, "validation": lines[:20], "test": lines[20:25]}
    for split, rows in named.items():
        (tmp_path / f"{split}.txt").write_text("".join(f"{row}\n" for row in rows))
    return {split: str(tmp_path / f"{split}.txt") for split in named}


def module(files, **options):
    defaults = {"batch_size": 4, "eval_batch_size": 2, "block_size": 7, "tokenizer": "whitespace"}
    return TextDataModule(data_files=files, **defaults | options)


def test_splits_are_batches_of_their_text(files):
    data = module(files)
    assert isinstance(data.vocab, Vocab)
    loaders = {
        "train": data.train_dataloader(),
        "validation": data.val_dataloader(),
        "test": data.test_dataloader(),
    }
    for split, loader in loaders.items():
        with open(files[split]) as text:
            ids = data.vocab.encode(text.read())
        batches = [*loader]
        assert all(isinstance(batch, TokenBatch) for batch in batches)
        streams = torch.cat([batch.target for batch in batches], dim=1)
        assert streams[streams != -100].tolist() == ids
        assert batches[0].tokens.shape == (4 if split == "train" else 2, 7)
        assert (batches[0].tokens[:, 0] == data.vocab.eos_id).all()
        assert isinstance(data.stats(split), SplitStats)
        assert data.stats(split).num_tokens == len(ids)
    assert targets_of(data.predict_dataloader()) == targets_of(loaders["test"])


def test_blocks_are_for_training_alone(files):
    data = module(files, batching="blocks")
    assert not any(batch.carry for batch in data.train_dataloader())
    assert [batch.carry for batch in data.val_dataloader()][:2] == [False, True]
    assert targets_of(data.train_dataloader()) == targets_of(module(files).train_dataloader())
    seeded = module(files, batching="blocks", seed=1)
    one, other = next(iter(data.train_dataloader())), next(iter(seeded.train_dataloader()))
    assert one.target.tolist() != other.target.tolist()


@pytest.mark.parametrize("batching", ["stream", "blocks"])
def test_ranks_come_from_the_trainer(files, batching):
    def loaders(rank, world_size):
        data = module(files, batching=batching)
        data.trainer = SimpleNamespace(global_rank=rank, world_size=world_size)
        return data.train_dataloader(), data.val_dataloader()

    for alone, one, other in zip(loaders(0, 1), loaders(0, 2), loaders(1, 2), strict=True):
        assert len(alone) == len(one) == len(other)
        for whole, first, second in zip(alone, one, other, strict=True):
            assert torch.equal(whole.target, torch.cat([first.target, second.target]))


def test_rows_that_ranks_cannot_share(files):
    data = module(files, batch_size=6, eval_batch_size=4)
    data.trainer = SimpleNamespace(global_rank=0, world_size=4)
    with pytest.raises(ValueError, match=r"batch_size=6 rows .* by 4 processes"):
        data.train_dataloader()
    assert len(data.val_dataloader()) > 0
    data.trainer = SimpleNamespace(global_rank=0, world_size=3)
    with pytest.raises(ValueError, match=r"eval_batch_size=4 rows .* multiple of 3"):
        data.val_dataloader()


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_workers_give_the_same_batches_and_are_warmed_up(files, monkeypatch, tmp_path):
    monkeypatch.setattr(datamodule, "warm_up", lambda: (tmp_path / str(os.getpid())).touch())
    alone, helped = (
        module(files, batching="blocks"),
        module(files, batching="blocks", num_workers=2),
    )
    one, other = alone.train_dataloader(), helped.train_dataloader()
    for epoch in (0, 1):
        one.sampler.set_epoch(epoch)
        other.sampler.set_epoch(epoch)
        assert [b.target.tolist() for b in other] == [b.target.tolist() for b in one]
    workers = {str(worker.pid) for worker in other._iterator._workers}
    assert workers <= {file.name for file in tmp_path.iterdir()}
    other._iterator._shutdown_workers()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size=0"),
        ({"eval_batch_size": -1}, "eval_batch_size=-1"),
        ({"block_size": 0}, "block_size=0"),
        ({"batching": "sorted"}, "batching='sorted'"),
        ({"num_workers": -1}, "num_workers=-1"),
        ({"seed": -1}, "seed=-1"),
        ({"max_vocab_size": 2}, "max_vocab_size=2"),
        ({"min_count": 0}, "min_count=0"),
        ({"validation_fraction": 1.5}, "validation_fraction=1.5"),
        ({"name": "small"}, "name='small'"),
    ],
)
def test_options_that_cannot_be(options, message):
    with pytest.raises(ValueError, match=message) as caught:
        TextDataModule(**options)
    assert "\n" not in str(caught.value)


def test_what_the_text_lacks_shows_when_it_is_read(files):
    data = module({"train": files["train"]})
    assert len(data.train_dataloader()) > 0
    with pytest.raises(ValueError, match=r"no split 'validation', only train.*validation_fraction"):
        data.val_dataloader()
    with pytest.raises(ValueError, match="no tokenizer 'wordss'"):
        assert module(files, tokenizer="wordss").vocab
    held_out = module({"train": files["train"]}, validation_fraction=0.1)
    assert held_out.stats("validation").num_tokens > 0


def test_a_vocabulary_of_a_checkpoint_replaces_counting(files, tmp_path):
    trained = module(files, max_vocab_size=9)
    torch.save({"hyper_parameters": {"vocab": trained.vocab.state_dict()}}, tmp_path / "a.ckpt")
    data = module({"test": files["test"]}, tokenizer="words", vocab_path=str(tmp_path / "a.ckpt"))
    assert data.vocab == trained.vocab
    assert targets_of(data.test_dataloader()) == targets_of(trained.test_dataloader())


class Recorder(pl.LightningModule):
    """Keeps what it is trained on."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen = []

    def training_step(self, batch, step):
        self.seen.append((self.current_epoch, step, batch.carry, batch.target.tolist()))
        return self.weight * 1.0

    def validation_step(self, batch, step):
        assert batch.target.shape == (2, 7)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning")  # lightning against torch
@pytest.mark.filterwarnings("ignore:.*does not have many workers")
@pytest.mark.filterwarnings("ignore:.*callbacks used to create the checkpoint")
@pytest.mark.parametrize("batching", ["stream", "blocks"])
@pytest.mark.parametrize("past_epoch", [False, True])
def test_training_resumed_is_training_uninterrupted(files, tmp_path, batching, past_epoch):
    def train(data, ckpt_path=None, callbacks=(), **limit):
        trainer = pl.Trainer(
            **limit,
            accelerator="cpu",
            logger=False,
            callbacks=[*callbacks],
            enable_checkpointing=bool(callbacks),
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        recorder = Recorder()
        trainer.fit(recorder, data, ckpt_path=ckpt_path, weights_only=True)
        return recorder.seen, trainer

    def data():
        return module(files, batching=batching)

    whole, trainer = train(data(), max_epochs=3)
    stop = 3 + past_epoch * trainer.num_training_batches
    saving = ModelCheckpoint(tmp_path / "saved", "stopped", every_n_train_steps=stop)
    before, _ = train(data(), callbacks=[saving], max_steps=stop)
    after, resumed = train(data(), tmp_path / "saved" / "stopped.ckpt", max_epochs=3)
    assert before + after == whole
    assert resumed.datamodule.hparams.batching == batching
    assert torch.load(tmp_path / "saved" / "stopped.ckpt", weights_only=True)[
        "datamodule_hyper_parameters"
    ]["data_files"] == {**files}


@pytest.mark.skipif(
    not os.path.isdir(os.path.join(SHARED, "wikitext")),
    reason="the environment variable LM_SOFTMAX_DATA names no folder with wikitext",
)
def test_wikitext_2_by_its_hub_id(monkeypatch):
    monkeypatch.setenv("LM_SOFTMAX_DATA", SHARED)
    data = TextDataModule("Salesforce/wikitext", "wikitext-2-v1", tokenizer="whitespace")
    assert len(data.vocab) == 33_278
    assert data.stats("train").num_tokens == 2_088_628
    batches = data.val_dataloader()
    assert sum(int((batch.target != -100).sum()) for batch in batches) == 217_646
