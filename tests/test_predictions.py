"""The lines that `predict` writes, against plain calls, and what is there while it writes them."""

import json
from functools import partial
from pathlib import Path

import lightning.pytorch as pl
import pyarrow as pa
import pytest
import torch
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch.utils.data import DataLoader

from lm_softmax.cli.predictions import PredictionWriter
from lm_softmax.data import TokenBatch
from lm_softmax.decoding import generate
from lm_softmax.encoders import LSTMEncoder
from lm_softmax.heads import FullSoftmax
from lm_softmax.module import LanguageModel
from lm_softmax.vocab import Vocab, load_tokenizer

V = 12

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec"),
]


def model():
    words = pa.array([f"w{i:02}" for i in range(V - 2)] + ["<eos>", "<unk>"], pa.large_string())
    counts = torch.arange(V, 0, -1)
    encoder = partial(LSTMEncoder, embedding_size=8, hidden_size=8)
    vocab = Vocab(words, counts, V - 1, V - 2, load_tokenizer("words"))
    return LanguageModel(encoder, FullSoftmax, counts, vocab=vocab)


def batches():
    """Rows of several lengths, the first and another one of nothing to predict."""
    lengths = [[0, 3, 5], [5, 5, 5], [2, 0, 3], [0, 0, 0]]
    made = []
    for number, rows in enumerate(lengths):
        target = torch.randint(V, (3, 5))
        target[torch.arange(5) >= torch.tensor(rows).unsqueeze(1)] = -100
        made.append(TokenBatch(torch.randint(V, (3, 5)), target, carry=number > 0))
    return made


class Watch(pl.Callback):
    """Notes the names in a folder after each batch, and stops after some of them."""

    def __init__(self, folder, stop=-1):
        self.folder, self.stop, self.names = Path(folder), stop, []

    def on_predict_batch_end(self, trainer, pl_module, outputs, batch, batch_idx, *_):
        self.names.append([path.suffix for path in self.folder.iterdir()])
        if batch_idx == self.stop:
            raise OSError("the disk is full")


def predict(some, rows, *callbacks):
    options = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = pl.Trainer(**options, callbacks=[*callbacks], accelerator="cpu")
    return trainer.predict(some, DataLoader(rows, batch_size=None))


@pytest.mark.parametrize("num_tokens", [0, 3])
def test_lines_are_the_rows_that_have_a_target(num_tokens, tmp_path):
    some, rows = model(), batches()
    log_probs = predict(some, rows)
    file = tmp_path / "new" / "a.jsonl"
    predict(some, rows, PredictionWriter(file, num_tokens))
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    expected = []
    for number, batch in enumerate(rows):
        for row, target in enumerate(batch.target):
            if not (kept := target[target != -100]).numel():
                continue
            values = log_probs[number][row][: len(kept)].tolist()
            line = {"batch": number, "row": row, "tokens": [some.vocab.tokens[i] for i in kept]}
            line["log_probs"] = pytest.approx(values, abs=1e-6)
            if num_tokens:
                prompt = kept.unsqueeze(0)
                made = generate(some.encoder, some.head, prompt, num_tokens, temperature=0)
                line["continuation"] = [some.vocab.tokens[i] for i in made[0, len(kept) :]]
            expected.append(line)
    assert lines == expected
    assert len(lines) == 7


def test_the_file_is_there_whole_or_not_at_all(tmp_path):
    some, rows, watch = model(), batches(), Watch(tmp_path)
    predict(some, rows, PredictionWriter(tmp_path / "a.jsonl"), watch)
    assert watch.names == [[".partial"]] * len(rows)
    assert [path.name for path in tmp_path.iterdir()] == ["a.jsonl"]
    (tmp_path / "a.jsonl").unlink()
    with pytest.raises(OSError, match="full"):
        predict(some, rows, PredictionWriter(tmp_path / "a.jsonl"), Watch(tmp_path, stop=2))
    assert [*tmp_path.iterdir()] == []


class Terminate(pl.Callback):
    """Asks the process to end, as a cluster does, after the first batch."""

    def on_predict_batch_end(self, trainer, *_):
        trainer._signal_connector.received_sigterm = True


def test_sigterm_ends_it_and_leaves_nothing(tmp_path):
    writer = PredictionWriter(tmp_path / "a.jsonl")
    with pytest.raises(SIGTERMException):
        predict(model(), batches(), writer, Terminate())
    assert [*tmp_path.iterdir()] == []


def test_nan_and_impossible_numbers_are_refused(tmp_path):
    some = model()
    with torch.no_grad():
        some.head.weight.fill_(torch.nan)
    with pytest.raises(ValueError, match="the model gives nan for row 1 of batch 0"):
        predict(some, batches(), PredictionWriter(tmp_path / "a.jsonl"))
    assert [*tmp_path.iterdir()] == []
    with pytest.raises(
        ValueError, match=r"num_tokens must be below 2\*\*63, got 9223372036854775808"
    ):
        PredictionWriter(tmp_path / "a.jsonl", 2**63)
