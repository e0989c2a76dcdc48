"""Commands in several processes, as a launcher starts them: text, checkpoints and figures."""

import json
from collections import Counter
from pathlib import Path

import pytest
import survival
import torch
from survival import assert_same_run, call, call_ranks, rows, seen

OVERLAYS = Path(__file__).parent.parent / "configs" / "parallel"
DDP = ("-c", OVERLAYS / "ddp.yaml")
FSDP2 = ("-c", OVERLAYS / "fsdp2.yaml", "--trainer.strategy.data_parallel_size=2")
WORDS = ("-c", OVERLAYS / "vocab_parallel.yaml")
FULL = {
    "model.head": {"class_path": "FullSoftmax"},
    "model.encoder": {
        "class_path": "LSTMEncoder",
        "init_args": {"embedding_size": 8, "hidden_size": 8},
    },
}
SEEN = [
    {"class_path": "BetweenSteps", "init_args": {"every_n_steps": 2}},
    {"class_path": "survival.SeenText"},
]


def codes(said, *expected):
    assert [each.code for each in said] == [*expected], "".join(each.err for each in said)


def epochs(run, num_ranks):
    """The words of each epoch, over all ranks."""
    found: dict[int, Counter] = {}
    for rank in range(num_ranks):
        for (epoch, _), words in seen(run, rank).items():
            found.setdefault(epoch, Counter()).update(words)
    return found


# Streams


@pytest.mark.parametrize(
    ("strategy", "changes"),
    [
        pytest.param(DDP, {"data.num_workers": 2, "data.batch_size": 8}, id="ddp"),
        pytest.param(WORDS, FULL, id="words", marks=pytest.mark.slow),
        pytest.param(FSDP2, FULL, id="fsdp2", marks=pytest.mark.slow),
    ],
)
def test_a_stream_is_shared_and_gone_on_with(strategy, changes, tmp_path):
    """Killed in the midst of an epoch, and of a window of accumulated batches."""
    text = survival.write_numbered_corpus(tmp_path / "corpus", 4)
    options = {"data.streaming": True, "data.block_size": 4, "data.tokenizer": "whitespace"}
    options |= {"trainer.max_steps": 20, "trainer.max_epochs": -1, "trainer.val_check_interval": 9}
    options |= {"trainer.callbacks+": SEEN}
    survival.write_config(tmp_path, "all.yaml", **options | changes)
    ranks, fit = {"folder": tmp_path, "world_size": 2}, ("fit", "-c", "all.yaml", "--run")
    whole, run = Path("runs/whole"), Path("runs/killed")
    said = call_ranks(*fit, whole, strategy=strategy, **ranks)
    codes(said, 0, 0)
    expected = epochs(tmp_path / whole, 1 if strategy == WORDS else 2)
    assert len(expected) > 1
    assert expected[0] == Counter(text)
    if strategy == WORDS:
        assert seen(tmp_path / whole, 0) == seen(tmp_path / whole, 1)

    kill = (said[0].num_events // 2, 0)
    codes(call_ranks(*fit, run, strategy=strategy, kill=kill, **ranks), -9, -9)
    begun = seen(tmp_path / run)
    assert 0 < len(begun) < len(seen(tmp_path / whole))
    codes(call_ranks("fit", "--run", run, "--ckpt_path", "last", strategy=(), **ranks), 0, 0)
    assert_same_run(tmp_path / run, tmp_path / whole)
    for rank in range(2):
        assert seen(tmp_path / run, rank) == seen(tmp_path / whole, rank)
