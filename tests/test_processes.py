"""Commands in several processes, as a launcher starts them: text, checkpoints and figures."""

import json
from collections import Counter
from pathlib import Path

import pytest
import survival
from survival import assert_same_run, call, call_ranks, rows, seen

pytestmark = pytest.mark.slow  # each starts several processes, most of them more than once

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
        pytest.param(WORDS, FULL, id="words"),
        pytest.param(FSDP2, FULL, id="fsdp2"),
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


# Text that is here as a whole


def files(run):
    return {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Two epochs of one run: some steps by one process, some by two, the rest by one."""
    folder = tmp_path_factory.mktemp("trained")
    text = survival.write_numbered_corpus(folder / "corpus", 4)
    options = {"data.tokenizer": "whitespace", "model.lr_scheduler": None}
    survival.write_config(folder, "all.yaml", **FULL, **options, **{"trainer.callbacks+": SEEN})
    first = ("fit", "-c", "all.yaml", "--run", "runs/trained", "--trainer.max_steps=3")
    assert call(*first, folder=folder).code == 0
    on = ("fit", "--run", "runs/trained", "--ckpt_path", "last", "--trainer.max_steps")
    codes(call_ranks(*on, "10", folder=folder, world_size=2), 0, 0)
    before = files(folder / "runs/trained")
    refused = call_ranks(*on, "11", folder=folder, world_size=3)
    assert files(folder / "runs/trained") == before
    one = ("--trainer.devices=1", "--trainer.strategy=auto")
    said = call(*on, "-1", *one, folder=folder)
    assert said.code == 0, said.err
    return folder, text, refused


def test_another_number_of_processes_reads_on(trained):
    folder, text, refused = trained
    run = folder / "runs/trained"
    per_rank = [Counter(epoch for epoch, _ in seen(run, rank)) for rank in range(2)]
    assert 0 < per_rank[1][0] < per_rank[0][0]  # both changes are in the midst of an epoch
    assert 0 < per_rank[1][1] < per_rank[0][1]
    assert epochs(run, 2) == {0: Counter(text), 1: Counter(text)}
    for said in refused:
        assert said.code == 2
        assert said.err.splitlines()[-1] == (
            "error: batch_size=4 rows cannot be shared evenly by 3 processes: make it a multiple"
            " of 3"
        )
        assert "Traceback" not in said.err


def lines(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_two_processes_evaluate_as_one(trained):
    folder, *_ = trained
    asked = ("--ckpt_path", "runs/trained/checkpoints/last.ckpt", "--trainer.accelerator=cpu")
    two = {"folder": folder, "world_size": 2, "strategy": WORDS}

    def run(command, *more, **ranks):
        words = (command, *asked, "--run", f"runs/{command}-{len(ranks)}", *more)
        said = call_ranks(*words, **ranks) if ranks else [call(*words, folder=folder)]
        codes(said, *[0] * len(said))
        return folder / words[len(asked) + 2], said

    for command, name in (("validate", "val/ppl"), ("test", "test/ppl")):
        (expected,), (found,) = (rows(run(command, **ranks)[0]) for ranks in ({}, two))
        assert found.keys() == expected.keys() > {name}
        for name in found:
            assert float(found[name]) == pytest.approx(float(expected[name]), rel=1e-6), name
    whole, _ = run("predict", "--num_tokens=0")
    shared, said = run("predict", "--num_tokens=0", **two)
    expected, found = lines(whole / "predictions.jsonl"), lines(shared / "predictions.jsonl")
    assert [path.name for path in shared.glob("*.jsonl")] == ["predictions.jsonl"]
    assert "predictions.jsonl" in said[0].out
    assert "predictions" not in said[1].out
    for line, other in zip(expected, found, strict=True):
        assert other | {"log_probs": pytest.approx(line["log_probs"], abs=1e-5)} == line


def test_replicas_write_a_file_each(trained):
    folder, *_ = trained
    asked = ("--ckpt_path", "last", "--run", "runs/trained", "--trainer.accelerator=cpu")
    command = ("predict", *asked, "--num_tokens=2")
    said = call(*command, folder=folder)
    assert said.code == 0, said.err
    expected = lines(folder / "runs/trained/predictions.jsonl")
    two = {"folder": folder, "world_size": 2, "strategy": DDP}
    codes(call_ranks(*command, **two), 0, 0)
    files = [folder / f"runs/trained/predictions-{rank}.jsonl" for rank in range(2)]
    found = [(line["batch"], line["tokens"]) for file in files for line in lines(file)]
    assert sorted(found) == sorted((line["batch"], line["tokens"]) for line in expected)

    files[0].unlink()  # the other one is there
    refused = call_ranks(*command, **two)
    for said in refused:
        assert said.code == 2
        assert said.err.splitlines()[-1] == (
            "error: runs/trained/predictions-1.jsonl exists: remove it, or give another folder"
            " with --run"
        )
        assert "Traceback" not in said.err
    assert not files[0].exists()
