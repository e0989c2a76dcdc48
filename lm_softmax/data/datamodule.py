"""`TextDataModule`: a corpus as batches for Lightning."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, Literal

import torch
from lightning.pytorch import LightningDataModule

from lm_softmax.corpus import Corpus, Source, SplitStats
from lm_softmax.data.batching import (
    BlockBatches,
    EpochSampler,
    ResumableLoader,
    StreamBatches,
    TokenBatch,
    TokenBatches,
)
from lm_softmax.data.streaming import StreamLoader, StreamParts
from lm_softmax.kernels import warm_up
from lm_softmax.parallel import Replica, gathered
from lm_softmax.vocab import Vocab


class TextDataModule(LightningDataModule):
    """Text as batches of token ids, ranked by frequency.

    The vocabulary and the token files are made when they are first asked for, by whichever process
    comes first, and kept in a cache (see `lm_softmax.corpus.Corpus`). Every token of a split is a
    target exactly once an epoch, over all processes. Validation and test are read as streams with
    carried state.

    With `streaming`, train is read as it comes, from the hub or from files here, and no copy of it
    is kept: its shards (files, row groups of Parquet files) are shared out to processes and their
    workers, and each row of a batch takes runs of 32 blocks from its worker's share. Processes that
    run out of text before others get batches of ignored targets. Validation and test are token
    files as ever.

    Args:
        path: "python-stdlib" (the source of Python's standard library, which is on every machine),
            a local folder in the layout of a hub dataset or of files with text, or the id of a
            dataset on the Hugging Face Hub. Where the environment variable LM_SOFTMAX_DATA names a
            folder that has `path`, or its last component, that is taken instead of the hub's.
        name: Configuration of the dataset, such as "wikitext-2-v1".
        data_files: Files of each split ("train", "validation", "test") instead of a dataset; names,
            lists or glob patterns. The suffix tells the format: .json, .jsonl, .csv, .parquet, and
            all else is text with a row a line. With a `path`, they are files of that dataset.
        text_column: Column that holds the text.
        validation_fraction: Share of the rows of train, its last ones, that become validation in a
            corpus without that split; 0 for none.
        tokenizer: "whitespace" (`str.split` and one `<eos>` a line, as in WikiText and PTB),
            "words" (runs of ASCII letters, and each other character by itself; one `<eos>` a
            line), or a `tokenizer.json`, a folder that holds one or the id of a hub repository
            (one end-of-sequence token a row).
        max_vocab_size: Most tokens to keep, `<unk>` and `<eos>` among them; the others are `<unk>`.
        min_count: Words that occur less often in train are `<unk>`.
        batching: "stream": `batch_size` contiguous streams, each batch continuing the one before.
            "blocks": blocks of `block_size`, shuffled each epoch.
        batch_size: Rows of a training batch, over all processes.
        eval_batch_size: Streams of validation and test, over all processes.
        block_size: Tokens of a row.
        vocab_path: A file of `Vocab.save`, or a checkpoint: the vocabulary and its tokenizer are
            those, nothing is counted, and `tokenizer`, `max_vocab_size` and `min_count`, which say
            how to make one, have nothing to say.
        cache_dir: Folder of the token files; the environment variable LM_SOFTMAX_CACHE or
            `~/.cache/lm_softmax` if None.
        seed: Of the order of blocks.
        num_workers: Processes that make batches beside each training process.
        num_proc: Cores that count and encode the text, all that there are if None.
        streaming: Train on text as it comes, without a copy on this machine; needs
            `trainer.max_steps`, since nobody knows how many steps an epoch has.
        vocab_tokens: Tokens from the beginning of train that the vocabulary of a stream is counted
            from, 100,000,000 if None; `vocab_path` gives one that is counted already.

    Raises:
        ValueError: For options that cannot be; what is wrong with the corpus shows when it is read.
    """

    def __init__(
        self,
        path: str = "python-stdlib",
        name: str | None = None,
        *,
        data_files: Mapping[str, str | Sequence[str]] | None = None,
        text_column: str = "text",
        validation_fraction: float = 0.0,
        tokenizer: str = "words",
        max_vocab_size: int | None = None,
        min_count: int = 1,
        batching: Literal["stream", "blocks"] = "stream",
        batch_size: int = 64,
        eval_batch_size: int = 16,
        block_size: int = 35,
        vocab_path: str | None = None,
        cache_dir: str | None = None,
        seed: int = 0,
        num_workers: int = 0,
        num_proc: int | None = None,
        streaming: bool = False,
        vocab_tokens: int | None = None,
    ) -> None:
        super().__init__()
        if min(batch_size, eval_batch_size, block_size) < 1:
            raise ValueError(
                f"batch_size={batch_size}, eval_batch_size={eval_batch_size} and"
                f" block_size={block_size} must be at least 1"
            )
        if batching not in ("stream", "blocks"):
            raise ValueError(f"batching={batching!r} is neither 'stream' nor 'blocks'")
        if num_workers < 0 or seed < 0:
            raise ValueError(f"num_workers={num_workers} and seed={seed} must not be negative")
        for option, value in (("num_proc", num_proc), ("vocab_tokens", vocab_tokens)):
            if value is not None and value < 1:
                raise ValueError(f"{option}={value} must be at least 1")
        if vocab_tokens is not None and not streaming:
            raise ValueError(
                f"vocab_tokens={vocab_tokens} is for streaming=true: all of train is counted"
            )
        if streaming and batching != "stream":
            raise ValueError(
                f"batching={batching!r} shuffles all of train, which a stream does not have: leave"
                " it at 'stream'"
            )
        self.save_hyperparameters(logger=False)
        self.batching, self.seed, self.num_workers = batching, seed, num_workers
        self.batch_size, self.eval_batch_size = batch_size, eval_batch_size
        self.block_size = block_size
        self._corpus = Corpus(
            Source(path, name, data_files, text_column, validation_fraction, streaming),
            tokenizer=tokenizer,
            max_vocab_size=max_vocab_size,
            min_count=min_count,
            vocab_path=vocab_path,
            cache_dir=cache_dir,
            **({} if vocab_tokens is None else {"vocab_tokens": vocab_tokens}),
            num_proc=num_proc,
        )
        self.streaming = streaming
        self._stream_loader: StreamLoader | None = None

    @property
    def vocab(self) -> Vocab:
        """The vocabulary, built from train at first access unless `vocab_path` names one."""
        return self._corpus.vocab

    def stats(self, split: str) -> SplitStats:
        """Size of "train", "validation" or "test", and how well a unigram model predicts it."""
        return self._corpus.stats(split)

    def train_dataloader(self) -> ResumableLoader | StreamLoader:
        """Batches of train, as `batching` says."""
        shape = self._shape("batch_size", self.batch_size)
        if self.streaming:
            self._stream_loader = self._streamed(shape)
            return self._stream_loader
        tokens = self._corpus.tokens("train")
        if self.batching == "stream":
            return self._loader(StreamBatches(tokens, self.vocab.eos_id, **shape))
        return self._loader(BlockBatches(tokens, self.vocab.eos_id, seed=self.seed, **shape))

    def val_dataloader(self) -> ResumableLoader:
        """Streams of validation."""
        return self._streams("validation")

    def test_dataloader(self) -> ResumableLoader:
        """Streams of test."""
        return self._streams("test")

    def predict_dataloader(self) -> ResumableLoader:
        """Streams of test."""
        return self._streams("test")

    def on_before_batch_transfer(self, batch: TokenBatch, dataloader_idx: int) -> TokenBatch:
        """Take note of the batch of a training step."""
        if self._stream_loader is not None and self.trainer is not None and self.trainer.training:
            self._stream_loader.note_use()
        return batch

    def _streamed(self, shape: dict[str, int]) -> StreamLoader:
        """Train as it comes.

        Raises:
            ValueError: If the training has no end, or there is too little to share.
        """
        if self.trainer is not None and self.trainer.max_steps < 0:
            raise ValueError(
                "streaming=true, so nobody knows how many steps an epoch has: set trainer.max_steps"
            )
        workers = max(1, self.num_workers)
        rows, everyone = shape["batch_size"] // shape["world_size"], shape["world_size"] * workers
        if rows % workers:
            raise ValueError(
                f"the {rows} rows of a process cannot be shared evenly by num_workers={workers}:"
                f" make batch_size={self.batch_size} a multiple of {everyone}"
            )
        stream = self._corpus.source.stream("train").at_least(everyone)
        parts = StreamParts(stream, self.vocab, **shape, num_workers=workers)
        gather = partial(gathered, trainer=self.trainer)
        return StreamLoader(parts, self._largest, gather, **self._loader_options())

    def _largest(self, number: int) -> int:
        """The largest of a number over all processes."""
        if self.trainer is None or self.trainer.world_size == 1:
            return number
        strategy = self.trainer.strategy
        own = torch.tensor(number, device=strategy.root_device)
        return int(strategy.reduce(own, reduce_op="max"))

    def _streams(self, split: str) -> ResumableLoader:
        shape = self._shape("eval_batch_size", self.eval_batch_size)
        return self._loader(StreamBatches(self._corpus.tokens(split), self.vocab.eos_id, **shape))

    def _shape(self, option: str, rows: int) -> dict[str, int]:
        rank, world_size = 0, 1
        if self.trainer is not None:
            rank, world_size = Replica.of(self.trainer)
        if rows % world_size:
            raise ValueError(
                f"{option}={rows} rows cannot be shared evenly by {world_size} processes: make it"
                f" a multiple of {world_size}"
            )
        return {
            "batch_size": rows,
            "block_size": self.block_size,
            "rank": rank,
            "world_size": world_size,
        }

    def _loader(self, batches: TokenBatches) -> ResumableLoader:
        return ResumableLoader(
            batches,
            sampler=EpochSampler(batches),
            batch_size=None,
            persistent_workers=self.num_workers > 0,
            **self._loader_options(),
        )

    def _loader_options(self) -> dict[str, Any]:
        return {
            "num_workers": self.num_workers,
            "worker_init_fn": _start_worker,
            "pin_memory": torch.cuda.is_available(),
            "generator": torch.Generator(),  # else each pass draws a number from training's
        }


def _start_worker(_: int) -> None:
    warm_up()
