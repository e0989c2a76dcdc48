"""Streams: every token a target once over ranks and workers, and resumed as if never stopped."""

import json
import threading
from functools import partial
from pathlib import Path

import lightning.pytorch as pl
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning.pytorch.callbacks import ModelCheckpoint

from lm_softmax import cli
from lm_softmax.corpus import Corpus, Source, stream
from lm_softmax.data import TextDataModule, stream_rows
from lm_softmax.data.stream_rows import Reader, RowMaker
from lm_softmax.data.streaming import StreamLoader, StreamParts
from lm_softmax.vocab import SymbolCounter, Vocab, load_tokenizer

EOS = 10**6
quick = settings(deadline=None, max_examples=50)
LINES = ["the cat sat", "", "the dog", "é cat", "NA", "1", "a b c"]


@pytest.fixture(autouse=True)
def _no_shared_data(monkeypatch):
    monkeypatch.delenv("LM_SOFTMAX_DATA", raising=False)


def parquet(path, lines, rows=2):
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({"text": lines, "n": [*range(len(lines))]}), path, row_group_size=rows)
    return str(path)


def files(folder, suffix, lines):
    """A file for each half of the rows."""
    folder.mkdir(exist_ok=True)
    for name, half in (("a", lines[:3]), ("b", lines[3:])):
        file = folder / f"{name}{suffix}"
        if suffix == ".parquet":
            parquet(file, half)
        elif suffix == ".jsonl":
            file.write_text("".join(json.dumps({"text": line}) + "\n" for line in half))
        elif suffix == ".csv":
            file.write_text("text,n\n" + "".join(f'"{line}",0\n' for line in half), "utf-8")
        else:
            file.write_text("".join(f"{line}\n" for line in half), "utf-8")
    return {"train": str(folder / f"*{suffix}")}


def complaint(call, *parts):
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - the parts are what is matched
        call()
    assert "\n" not in str(caught.value)
    for part in parts:
        assert str(part) in str(caught.value)


# Rows as they come


@pytest.mark.parametrize("suffix", [".txt", ".jsonl", ".csv", ".parquet"])
def test_a_stream_has_the_rows_of_its_files(tmp_path, suffix):
    lines = [line for line in LINES if line != "1" or suffix != ".jsonl"]
    named = files(tmp_path / "corpus", suffix, lines)
    for source in (
        Source(data_files=named, streaming=True),
        Source(str(tmp_path / "corpus"), streaming=True),
    ):
        rows = [row for b in source.rows("train").batches(10**6) for row in b.to_pylist()]
        assert rows == lines
        assert source.stream("train").num_shards == 2  # files
        assert source.stream("train").at_least(2).num_shards == 2  # are enough
        text = source.stream("train").at_least(4 if suffix == ".parquet" else 2)
        assert text.num_shards == (4 if suffix == ".parquet" else 2)  # row groups
        shards = [
            [row for piece in text.texts(shard) for row in piece.to_pylist()]
            for shard in range(text.num_shards)
        ]
        assert [row for shard in shards for row in shard] == lines
        assert all(shards)


def test_a_shard_is_read_from_a_piece_on(tmp_path, monkeypatch):
    monkeypatch.setattr(stream, "_ROWS", 2)
    named = {"train": parquet(tmp_path / "a.parquet", LINES, rows=3)}
    text = Source(data_files=named, streaming=True).stream("train").at_least(2)
    assert text.num_shards == 3  # row groups
    for shard, number in enumerate((2, 2, 1)):
        whole = [piece.to_pylist() for piece in text.texts(shard)]
        assert len(whole) == number
        for skip in range(number + 1):
            assert [piece.to_pylist() for piece in text.texts(shard, skip)] == whole[skip:]


def test_what_cannot_be_streamed_is_one_line(tmp_path):
    file = parquet(tmp_path / "a.parquet", LINES)
    source = partial(Source, data_files={"train": file}, streaming=True)
    complaint(lambda: source(text_column="body").stream("train"), "'body'", "columns are text, n")
    complaint(lambda: source(text_column="n").stream("train"), "'n'", "holds int64, not text")
    complaint(lambda: source().stream("validation"), "no split 'validation', only train")
    complaint(lambda: source(validation_fraction=0.1), "validation_fraction=0.1", "stream")
    complaint(lambda: Source(streaming=True), "python-stdlib", "streaming=true")
    (tmp_path / "bad.txt").write_bytes(b"fine\n\xff\n")
    bad = Source(data_files={"train": str(tmp_path / "bad.txt")}, streaming=True)
    complaint(lambda: bad.stream("train"), "bad.txt", "see byte 5")
    (tmp_path / "broken.parquet").write_bytes(b"PAR")
    broken = Source(data_files={"train": str(tmp_path / "broken.parquet")}, streaming=True)
    complaint(lambda: broken.stream("train"), "cannot read")
    (tmp_path / "empty.txt").touch()
    empty = Source(data_files={"train": str(tmp_path / "empty.txt")}, streaming=True)
    complaint(lambda: empty.stream("train"), "empty")


def late_damage(tmp_path):
    """Two files, the second of which breaks off where it is read."""
    (tmp_path / "a.txt").write_text("a b\n" * 300)
    (tmp_path / "b.txt").write_bytes(b"a b\n" * 300 + b"\xff\n")
    return {"train": [str(tmp_path / "a.txt"), str(tmp_path / "b.txt")]}


def test_what_cannot_be_read_later_is_one_line(tmp_path):
    text = Source(data_files=late_damage(tmp_path), streaming=True).stream("train")
    assert sum(map(len, text.texts(0))) == 300
    complaint(lambda: [*text.texts(1)], "b.txt", "see byte 1200")
    complaint(lambda: [*text.rows().batches(10**6)], "b.txt", "see byte 1200")


def test_another_text_has_another_vocabulary(tmp_path):
    cache = {"cache_dir": str(tmp_path / "cache")}
    for word in ("a", "b"):
        file = parquet(tmp_path / f"{word}.parquet", [word])
        source = Source(data_files={"train": file}, streaming=True)
        assert word in Corpus(source, "whitespace", **cache).vocab.tokens


@pytest.mark.parametrize("num_proc", [1, 3])
def test_the_vocabulary_is_counted_from_the_first_tokens(tmp_path, num_proc):
    lines = [f"a w{i}" for i in range(2000)]
    source = Source(data_files={"train": parquet(tmp_path / "a.parquet", lines)}, streaming=True)

    def vocab(number):
        options = {"cache_dir": str(tmp_path / "cache"), "num_proc": num_proc}
        return Corpus(source, "whitespace", vocab_tokens=number, **options).vocab

    assert dict(zip(vocab(8).tokens, vocab(8).counts.tolist(), strict=True)) == {
        **{"a": 3, "<eos>": 2, "w0": 1, "w1": 1, "w2": 1, "<unk>": 0}
    }
    assert vocab(10**6).counts.sum() == 6000


# Batches of streams


class Numbers:
    """A stream whose text is 0, 1, 2, ... over all shards, in pieces of given lengths."""

    def __init__(self, shards):
        self.shards, self.num_shards = shards, len(shards)

    def texts(self, shard, skip=0):
        begin = sum(sum(lengths) for lengths in self.shards[:shard])
        for number, length in enumerate(self.shards[shard]):
            if number >= skip:
                yield np.arange(begin, begin + length)
            begin += length


class NumberVocab:
    eos_id = EOS

    def encode_rows(self, rows):
        return rows


class Agreement:
    """What a reduction over ranks does, between threads."""

    def __init__(self, world_size):
        self.barrier, self.numbers = threading.Barrier(world_size, timeout=30), [0] * world_size

    def __call__(self, rank, number):
        return max(self.gathered(rank, number))

    def gathered(self, rank, item):
        self.numbers[rank] = item
        self.barrier.wait()
        items = [*self.numbers]
        self.barrier.wait()
        return items


def each_rank(world_size, work):
    """What `work(rank)` gives, with all ranks side by side."""
    found = [None] * world_size
    threads = [
        threading.Thread(target=lambda rank=rank: found.__setitem__(rank, work(rank)))
        for rank in range(world_size)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def targets_of(batches):
    return [t for batch in batches for t in batch.target.flatten().tolist() if t != -100]


shards_ = st.lists(st.lists(st.integers(0, 12), max_size=4), min_size=3, max_size=7)


@quick
@given(shards_, st.integers(1, 3), st.integers(1, 3), st.integers(1, 6), st.integers(1, 3))
def test_every_token_is_a_target_exactly_once_over_ranks(shards, world, rows, block, run):
    numbers, agreement = Numbers(shards), Agreement(world)
    before, stream_rows.RUN_BLOCKS = stream_rows.RUN_BLOCKS, run
    try:

        def work(rank):
            parts = StreamParts(numbers, NumberVocab(), rows * world, block, rank, world)
            return list(StreamLoader(parts, partial(agreement, rank)))

        given_ = each_rank(world, work)
    finally:
        stream_rows.RUN_BLOCKS = before
    total = sum(sum(lengths) for lengths in shards)
    assert sorted(t for batches in given_ for t in targets_of(batches)) == [*range(total)]
    assert len({len(batches) for batches in given_}) == 1
    for step in range(len(given_[0])):  # no step without a target
        assert targets_of(batches[step] for batches in given_)
    borders = [len(shards) * rank // world for rank in range(world + 1)]
    for rank, batches in enumerate(given_):
        first = sum(sum(lengths) for lengths in shards[: borders[rank]])
        for number, batch in enumerate(batches):
            assert batch.tokens.shape == batch.target.shape == (rows, block)
            assert batch.carry == (number > 0)
            there = batch.target != -100
            expected = torch.where(batch.target == first, EOS, batch.target - 1)
            assert torch.equal(batch.tokens[there], expected[there])
            assert (batch.tokens[~there] == EOS).all()
        for row in range(rows if batches else 0):
            own = torch.cat([batch.target[row] for batch in batches])
            own = own[own != -100]
            jumps = (own.diff() != 1).nonzero().flatten() + 1
            assert all(jump % (run * block) == 0 for jump in jumps.tolist())


@quick
@given(shards_, st.integers(1, 3), st.integers(1, 5), st.integers(1, 3), st.integers(0, 9))
def test_a_row_maker_goes_on_from_its_state(shards, rows, block, run, stop):
    def maker():
        return RowMaker(Reader(Numbers(shards), range(len(shards)), NumberVocab()), rows, block)

    before, stream_rows.RUN_BLOCKS = stream_rows.RUN_BLOCKS, run
    try:
        whole, again = maker(), maker()
        for _ in range(stop):
            whole.part(EOS)
        again.load_state_dict(whole.state_dict())
        for _ in range(12):
            one, other = whole.part(EOS), again.part(EOS)
            assert torch.equal(one[0], other[0])
            assert torch.equal(one[1], other[1])
            assert one[2] == other[2]
    finally:
        stream_rows.RUN_BLOCKS = before


@pytest.mark.parametrize("stop", [1, 31, 32, 33, 40])
@pytest.mark.parametrize("fetched", [0, 1])
def test_a_loader_goes_on_where_it_was_left(stop, fetched):
    def loader():
        return StreamLoader(StreamParts(Numbers([[300], [500, 60]]), NumberVocab(), 3, 5))

    whole = list(loader())
    stopped = loader()
    iterator = iter(stopped)
    for _ in range(stop + fetched):  # Lightning fetches a batch before it is used
        next(iterator)
    for _ in range(stop):
        stopped.note_use()
    state = stopped.state_dict()
    for again in (loader(), loader()):
        again.load_state_dict(state)
        rest = list(again)
        assert [b.target.tolist() for b in rest] == [b.target.tolist() for b in whole[stop:]]
        assert all(batch.carry for batch in rest)
        assert targets_of(again) == targets_of(whole)  # the next epoch, all of it
    given_back = loader()  # an interrupted step gives its batch back
    given_back.load_state_dict(state | {"given": stop - 1})
    assert targets_of(given_back) == targets_of(whole[stop - 1 :])


def test_a_complete_epoch_is_followed_by_another():
    loader = StreamLoader(StreamParts(Numbers([[20]]), NumberVocab(), 2, 5))
    whole = targets_of(loader)
    for _ in range(loader._given):
        loader.note_use()
    again = StreamLoader(StreamParts(Numbers([[20]]), NumberVocab(), 2, 5))
    again.load_state_dict(loader.state_dict())
    assert targets_of(again) == whole


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_two_ranks_of_two_workers_go_on_where_they_were_left():
    """Each worker of each rank goes on with its own text."""
    numbers, agreement = Numbers([[300], [200, 90], [310], [150, 150]]), Agreement(2)

    def loader(rank):
        parts = StreamParts(numbers, NumberVocab(), 4, 5, rank, 2, num_workers=2)
        both = partial(agreement, rank), partial(agreement.gathered, rank)
        return StreamLoader(parts, *both, num_workers=2)

    def work(rank):
        whole = [batch.target.tolist() for batch in loader(rank)]
        stopped = loader(rank)
        iterator = iter(stopped)
        for _ in range(40):
            next(iterator)
            stopped.note_use()
        again = loader(rank)
        again.load_state_dict(stopped.state_dict())
        return whole, [batch.target.tolist() for batch in again]

    for whole, rest in each_rank(2, work):
        assert len(whole) > 50
        assert rest == whole[40:]


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_an_error_of_a_worker_is_one_line(tmp_path):
    text = Source(data_files=late_damage(tmp_path), streaming=True).stream("train")
    for num_workers in (1, 2):
        parts = StreamParts(text, vocab_of_a(), 2, 5, num_workers=num_workers)
        loader = StreamLoader(parts, num_workers=num_workers, timeout=30)
        complaint(lambda loader=loader: [*loader], "b.txt", "see byte 1200")


def vocab_of_a():
    counter = SymbolCounter()
    counter.update(pa.array(["a", "b"], pa.large_string()))
    return Vocab.build(load_tokenizer("whitespace"), counter)


def test_a_stream_goes_on_with_the_shares_it_was_left_with():
    one = StreamLoader(StreamParts(Numbers([[20]] * 4), NumberVocab(), 4, 5))
    state = one.state_dict()
    for other in (
        StreamParts(Numbers([[20]] * 4), NumberVocab(), 4, 5, rank=0, world_size=2),
        StreamParts(Numbers([[20]] * 4), NumberVocab(), 4, 5, num_workers=2),
        StreamParts(Numbers([[20]] * 3), NumberVocab(), 4, 5),
    ):
        complaint(lambda other=other: StreamLoader(other).load_state_dict(state), "not ", "shards")


# The data module


@pytest.fixture
def corpus(tmp_path):
    lines = [" ".join(f"w{10 * i + j}" for j in range(i % 17)) for i in range(90)]
    return {
        "train": parquet(tmp_path / "corpus" / "train.parquet", lines, rows=5),
        "validation": parquet(tmp_path / "corpus" / "validation.parquet", lines[:20]),
    }


def module(files, **options):
    defaults = {"batch_size": 4, "eval_batch_size": 2, "block_size": 7, "tokenizer": "whitespace"}
    return TextDataModule(data_files=files, streaming=True, **defaults | options)


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_two_ranks_of_two_workers_share_the_text(corpus):
    data, copied = module(corpus), TextDataModule(data_files=corpus, tokenizer="whitespace")
    assert data.vocab == copied.vocab
    text, agreement = data._corpus.source.stream("train").at_least(4), Agreement(2)

    def work(rank):
        parts = StreamParts(text, data.vocab, 8, 7, rank, 2, num_workers=2)
        loader = StreamLoader(parts, partial(agreement, rank), num_workers=2)
        return [(batch.tokens, batch.target) for batch in loader]

    shared = each_rank(2, work)
    seen = np.concatenate([t.flatten() for batches in shared for _, t in batches])
    ids = copied.train_dataloader().dataset.tokens[:]
    size = len(data.vocab)
    assert np.bincount(seen[seen >= 0], minlength=size).tolist() == (
        np.bincount(ids, minlength=size).tolist()
    )
    assert len(shared[0]) == len(shared[1])
    assert shared[0][0][0].shape == (4, 7)


def test_validation_is_exact(corpus):
    streamed, copied = module(corpus), TextDataModule(data_files=corpus, tokenizer="whitespace")
    assert streamed.stats("validation") == copied.stats("validation")
    assert sorted(targets_of(streamed.val_dataloader())) == sorted(
        targets_of(copied.val_dataloader())
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batching": "blocks"}, "batching='blocks' shuffles"),
        ({"vocab_tokens": 0}, "vocab_tokens=0"),
        ({"vocab_tokens": 9, "streaming": False}, "vocab_tokens=9 is for streaming"),
        ({"num_proc": 0}, "num_proc=0"),
        ({"validation_fraction": 0.1}, "validation_fraction=0.1"),
    ],
)
def test_options_that_cannot_be(options, message):
    complaint(lambda: TextDataModule("corpus", **{"streaming": True, **options}), message)


def test_too_little_to_share(corpus, tmp_path):
    few = {"train": parquet(tmp_path / "few.parquet", LINES, rows=100)}
    complaint(lambda: module(few, num_workers=2).train_dataloader(), "1 shards", "too few for 2")
    complaint(lambda: module(corpus, num_workers=3).train_dataloader(), "4 rows", "num_workers=3")


def test_training_needs_a_number_of_steps(corpus, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    options = ["fit", "--config", str(Path(__file__).parent.parent / "configs/quickstart.yaml")]
    options += [f"--data.path={tmp_path / 'corpus'}", "--data.streaming=true", "--run=run"]
    with pytest.raises(SystemExit) as exit_:
        cli.main([*options, "--trainer.max_epochs=1"])
    assert exit_.value.code == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "set trainer.max_steps" in error


class Recorder(pl.LightningModule):
    """Keeps what it is trained on."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen = []

    def training_step(self, batch, step):
        self.seen.append((self.current_epoch, batch.carry, batch.target.tolist()))
        return self.weight * 1.0

    def validation_step(self, batch, step):
        assert batch.target.shape == (2, 7)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning")  # lightning against torch
@pytest.mark.filterwarnings("ignore:.*does not have many workers")
@pytest.mark.filterwarnings("ignore:.*callbacks used to create the checkpoint")
@pytest.mark.parametrize("stop", [3, "epoch", 60])
def test_training_resumed_is_training_uninterrupted(corpus, tmp_path, monkeypatch, stop):
    monkeypatch.setattr(stream_rows, "RUN_BLOCKS", 2)

    def train(ckpt_path=None, callbacks=(), steps=80):
        trainer = pl.Trainer(
            max_steps=steps,
            accelerator="cpu",
            logger=False,
            callbacks=[*callbacks],
            enable_checkpointing=bool(callbacks),
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        recorder = Recorder()
        trainer.fit(recorder, module(corpus), ckpt_path=ckpt_path, weights_only=True)
        return recorder.seen

    whole = train()
    assert {epoch for epoch, *_ in whole} >= {0, 1, 2}  # several epochs
    if stop == "epoch":
        stop = sum(epoch == 0 for epoch, *_ in whole)
    saving = ModelCheckpoint(tmp_path / "saved", "stopped", every_n_train_steps=stop)
    before = train(callbacks=[saving], steps=stop)
    after = train(tmp_path / "saved" / "stopped.ckpt")
    assert before + after == whole
