"""`benchmark decode`: what is checked, counted, timed, weighed, written and refused."""

import csv
import json
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from tiny import trainer

from lm_softmax.benchmark import main
from lm_softmax.benchmark.decode import (
    HEAD,
    NAIVE,
    TASKS,
    Random,
    Result,
    Trial,
    _batches,
    measure,
    naive_draw,
    weigh,
    wrong,
)
from lm_softmax.benchmark.decode_plot import draw
from lm_softmax.benchmark.opened import opened
from lm_softmax.benchmark.problem import Problem
from lm_softmax.data import TextDataModule
from lm_softmax.encoders import LSTMEncoder
from lm_softmax.heads import AdaptiveSoftmax, FullSoftmax, HierarchicalSoftmax, TopK
from lm_softmax.module import LanguageModel
from lm_softmax.specs import parse_spec

pytestmark = [  # of the trainer that makes the checkpoints
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec"),
]
ADAPTIVE = "AdaptiveSoftmax(cutoffs=[12, 30])"
CLASSES = "HierarchicalSoftmax(tree='classes')"
WORDS = [f"w{number}" for number in range(40)]


def trial(text: str, vocab_size: int = 60, num_vectors: int = 64) -> Trial:
    problem = Problem(vocab_size, num_vectors, 8, dtype="float64")
    source = Random(problem, parse_spec(text))
    return Trial(text, source, source.head(), problem.inputs()[0].detach())


# Checks


@pytest.mark.parametrize("text", ["FullSoftmax", ADAPTIVE, "HierarchicalSoftmax", CLASSES])
def test_heads_decode_as_naive_code_does(text: str) -> None:
    assert wrong(trial(text)) == ""


def test_a_wrong_value_a_wrong_word_and_wrong_draws_are_seen(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    one = trial("FullSoftmax")
    exact, sample = FullSoftmax.topk, FullSoftmax.sample
    with monkeypatch.context() as patch:
        patch.setattr(FullSoftmax, "topk", lambda *a: TopK(exact(*a)[0] + 1e-6, exact(*a)[1]))
        assert wrong(one).startswith("topk(hidden, 1) is off by up to 1e-06")
    with monkeypatch.context() as patch:
        patch.setattr(FullSoftmax, "topk", lambda *a: TopK(exact(*a)[0], exact(*a)[1].flip(1)))
        assert wrong(one).startswith("topk(hidden, 10) is off")
    with monkeypatch.context() as patch:
        patch.setattr(FullSoftmax, "sample", lambda *a, **k: sample(*a, temperature=0.3, **k))
        assert wrong(one).startswith("draws have a mean log-probability that is off by")
        results = measure([one, trial(ADAPTIVE)], [2], 1, 0)
    for result in results:
        assert bool(result.problem) == (result.head == "FullSoftmax") == (not result.rounds)


def test_naive_draws_follow_the_distribution() -> None:
    one = trial("FullSoftmax", vocab_size=12)
    drawn = naive_draw(
        one.head, one.hidden[:1].expand(40_000, -1), torch.Generator().manual_seed(0)
    )
    shares = torch.bincount(drawn[:, 0], minlength=12).double() / 40_000
    expected = one.head.log_prob(one.hidden[0]).exp().detach()
    torch.testing.assert_close(shares, expected, atol=0.012, rtol=0)


def test_a_tree_starts_with_drawn_weights_which_all_processes_draw_alike() -> None:
    source = trial("HierarchicalSoftmax").source
    heads = source.head(), source.head()
    assert all(isinstance(head, HierarchicalSoftmax) for head in heads)
    first, second = (head.get_parameter("weight") for head in heads)
    assert first.abs().amax() > 0.1
    assert torch.equal(first, second)


# What is opened


def brute(rows: torch.Tensor, borders: list[int], k: int, before: bool) -> tuple[Any, Any]:
    """Row by row: whose mass is above the k-th best, and who holds one of the k best."""
    by_mass, needed = [], []
    for row in rows.double():
        order = row.sort(descending=True, stable=True)
        for start, end in pairwise(borders):
            among = row[:start].sort(descending=True).values if before else order.values
            by_mass.append(float(row[start:end].exp().sum().log() > among[k - 1]))
            needed.append(float(any(start <= int(word) < end for word in order.indices[:k])))
    shape = (len(rows), len(borders) - 1)
    return torch.tensor(by_mass).view(shape), torch.tensor(needed).view(shape)


def test_shares_of_tails_are_those_of_brute_force(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lm_softmax.benchmark.opened.CHUNK_BYTES", 60 * 8 * 7)  # several chunks
    one = trial(ADAPTIVE)
    with torch.no_grad():
        one.head.get_parameter("tail_weights.0").mul_(8)  # some rows need it, some do not
        one.head.get_parameter("cluster_weight").mul_(4)
    found = opened(one)
    assert [(count.k, count.part) for count in found] == [
        *((1, "tail 1, 18 words"), (1, "tail 2, 30 words")),
        *((10, "tail 1, 18 words"), (10, "tail 2, 30 words")),
    ]
    log_probs = one.head.log_prob(one.hidden).detach()
    for k, counts in ((1, found[:2]), (10, found[2:])):
        by_mass, needed = brute(log_probs, [12, 30, 60], k, before=True)
        assert [count.by_mass for count in counts] == pytest.approx(by_mass.mean(0).tolist())
        assert [count.needed for count in counts] == pytest.approx(needed.mean(0).tolist())
        for count in counts:
            assert count.by_mass is not None
            assert count.needed is not None
            assert count.needed <= count.opened <= count.by_mass
    assert 0 < found[0].needed < found[0].by_mass < 1  # type: ignore[operator]


def test_shares_of_classes_and_of_nodes() -> None:
    one = trial(CLASSES)
    assert isinstance(one.head, HierarchicalSoftmax)
    borders = [0, *one.head.cutoffs, 60]
    by_mass, needed = brute(one.head.log_prob(one.hidden).detach(), borders, 10, before=False)
    _, found = opened(one)
    assert found.part == f"{len(borders) - 1} classes"
    assert found.by_mass == pytest.approx(by_mass.mean().item())
    assert found.needed == pytest.approx(needed.mean().item())
    nodes = opened(trial("HierarchicalSoftmax"))
    assert [(count.part, count.by_mass, count.needed) for count in nodes] == [
        ("59 nodes", None, None)
    ] * 2
    assert all(0 < count.opened <= 1 for count in nodes)
    assert opened(trial("FullSoftmax")) == []


# Times


def test_each_round_takes_the_next_vectors_and_divides_by_their_number(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    hidden = torch.arange(40.0).view(40, 1)
    for batch_size, num_calls in [(1, 64), (8, 8), (16, 4), (17, 4), (64, 4)]:  # 64 rows, 4 calls
        parts = _batches(hidden, batch_size, 0)
        assert [len(part) for part in parts] == [batch_size] * num_calls
    assert _batches(hidden, 8, 2)[0][:, 0].tolist() == [8, 9, 10, 11, 12, 13, 14, 15]
    assert _batches(hidden, 8, 2)[4][:, 0].tolist() == [0, 1, 2, 3, 4, 5, 6, 7]

    log: list[int] = []

    class Fake:
        def __init__(self, device: str) -> None:
            pass

        def time(self, call: Any) -> float:
            log.append(len(call()))
            return 32.0 if len(log) % 2 else 64.0

    monkeypatch.setattr("lm_softmax.benchmark.decode.Clock", Fake)
    results = measure([trial("FullSoftmax")], [8], 3, 1)
    assert log == [8] * (4 * len(TASKS) * 2)
    for result in results:  # 64 rows a round; naive code goes first in those of even number
        assert result.rounds == {HEAD: [0.5, 1.0, 0.5], NAIVE: [1.0, 0.5, 1.0]}
        assert result.times_faster() == (0.5, 2.0, 2.0)


def test_a_call_that_fails_is_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("out of memory\nby much")

    monkeypatch.setattr("lm_softmax.benchmark.decode.wrong", lambda _: "")
    monkeypatch.setattr(FullSoftmax, "topk", fail)
    greedy, _, sampling = measure([trial("FullSoftmax")], [1], 2, 0)
    assert (greedy.problem, greedy.rounds) == ("out of memory", {})
    assert (sampling.problem, len(sampling.rounds[HEAD])) == ("", 2)


def test_memory_of_naive_code_is_that_of_all_log_probabilities() -> None:
    problem = Problem(30_000, 64, 8)
    source = Random(problem, parse_spec("AdaptiveSoftmax(cutoffs=[500, 5000])"))
    one = Trial("adaptive", source, source.head(), problem.inputs()[0].detach())
    results = [Result(30_000, "adaptive", 64, "greedy", {HEAD: [1.0], NAIVE: [1.0]})]
    weigh(results, one)
    (result,) = results
    assert result.problem == ""
    logits = 64 * 30_000 * 4 / 2**20
    assert 1.8 * logits < result.memory[NAIVE] < 5 * logits
    assert result.memory[HEAD] > 0


# Commands

DECODE = ["decode", "--rounds", "2", "--threads", "1", "--num-vectors", "16"]
DECODE += ["--batch-sizes", "4", "1", "--no-memory"]


def test_random_weights_give_tables_and_three_files(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [*DECODE, "--vocab-sizes", "60", "40", "--hidden-size", "8"]
    words += ["--heads", "FullSoftmax", ADAPTIVE, "--output", str(tmp_path)]
    assert main(words) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert out.index("vocabulary 40") < out.index("vocabulary 60")
    found = json.loads((tmp_path / "decode.json").read_text())
    assert set(found) == {
        *("format", "command", "machine", "versions", "options"),
        *("results", "opened", "agreement"),
    }
    listed = [(row["head"], row["batch_size"], row["task"]) for row in found["results"][:12]]
    assert listed == [
        (head, size, task)
        for head in ("FullSoftmax", ADAPTIVE)
        for size in (1, 4)
        for task in TASKS
    ]
    for row in found["results"]:
        assert row["problem"] == ""
        assert len(row["rounds_ms"]["naive"]) == 2
        for name in ("head_ms", "naive_ms", "times_faster"):
            assert 0 < row[name]["min"] <= row[name]["median"] <= row[name]["max"]
    assert {row["part"] for row in found["opened"]} == {
        *("tail 1, 18 words", "tail 2, 10 words", "tail 2, 30 words"),
    }
    with (tmp_path / "decode.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert {row["measure"] for row in rows} >= {"time", "time of naive code", "times faster"}
    assert sum(row["measure"].startswith("opened: tail") for row in rows) == 8
    with Image.open(tmp_path / "decoding.png") as picture:
        assert picture.format == "PNG"
    assert len(list(tmp_path.iterdir())) == 3


def test_picture_has_a_panel_for_each_task_and_batch_size() -> None:
    rounds = {HEAD: [1.0, 3.0, 2.0], NAIVE: [4.0, 6.0, 8.0]}
    results = [
        Result(50, head, size, task, dict(rounds) if head == "a" else {})
        for head in ("a", "b")
        for size in (1, 8)
        for task in TASKS
    ]
    figure = draw(results, 3, ["how"])
    titles = [axes.get_title() for axes in figure.axes]
    assert titles == [f"{task}, batch {size}" for task in TASKS for size in (1, 8)]
    for axes in figure.axes:
        marks = [bars.lines[0].get_xdata().tolist() for bars in axes.containers]  # type: ignore[union-attr]
        assert marks == [[2.0], [6.0]]
        assert [text.get_text() for text in axes.texts] == [" 4.0x"]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two checkpoints with one encoder, the second's head a little off; and one of other words."""
    folder = tmp_path_factory.mktemp("decode")
    found = {}
    for name, words in (("good", WORDS), ("other", WORDS[:30])):
        texts = folder / name
        texts.mkdir()
        generator = torch.Generator().manual_seed(1)
        for split, length in (("train", 900), ("validation", 300)):
            ids = torch.randint(len(words), (length,), generator=generator).tolist()
            (texts / f"{split}.txt").write_text(" ".join(words[i] for i in ids) + "\n")
        data = TextDataModule(
            str(texts),
            tokenizer="whitespace",
            batch_size=4,
            eval_batch_size=4,
            block_size=5,
            cache_dir=str(folder / "cache"),
        )
        torch.manual_seed(0)
        model = LanguageModel(
            partial(LSTMEncoder, embedding_size=6, hidden_size=8),
            partial(AdaptiveSoftmax, cutoffs=[15]),
            data.vocab.counts,
            vocab=data.vocab,
        )
        fit = trainer(folder, max_steps=1, limit_val_batches=0)
        fit.fit(model, datamodule=data)
        found[name] = folder / f"{name}.ckpt"
        fit.save_checkpoint(found[name])
        if name == "good":
            content = torch.load(found[name], weights_only=True)
            content["state_dict"]["head.weight"][0] += 3 * torch.randn(8, generator=generator)
            found["worse"] = folder / "worse.ckpt"
            torch.save(content, found["worse"])
    return found


def test_a_checkpoint_decodes_its_own_text_and_agrees_with_its_source(
    checkpoints: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [*DECODE, "--num-vectors", "64", "--output", str(tmp_path)]
    words += ["--checkpoint", str(checkpoints["worse"]), "--source", str(checkpoints["good"])]
    assert main(words) == 0
    out, err = capsys.readouterr()
    assert err == ""
    found = json.loads((tmp_path / "decode.json").read_text())
    heads = list(dict.fromkeys(row["head"] for row in found["results"]))
    assert heads == ["AdaptiveSoftmax", "AdaptiveSoftmax (source)"]
    hidden, best = None, []
    for name in ("worse", "good"):
        model = LanguageModel.load_from_checkpoint(checkpoints[name]).eval()
        if hidden is None:
            hidden = first_vectors(model, checkpoints[name], 64)
        best.append(model.head.log_prob(hidden).detach().sort(descending=True).indices[:, :10])
    top_1 = (best[0][:, 0] == best[1][:, 0]).double().mean().item()
    top_10 = [
        len(set(own) & set(exact)) / 10
        for own, exact in zip(*(ids.tolist() for ids in best), strict=True)
    ]
    assert found["agreement"]["top_1"] == pytest.approx(top_1)
    assert found["agreement"]["top_k"] == pytest.approx(sum(top_10) / 64)
    assert 0 < top_1 < 1
    assert f"The best word is that of {checkpoints['good']} at {top_1:.2%} of 64 positions" in out


def first_vectors(model: LanguageModel, path: Path, number: int) -> torch.Tensor:
    """Of the validation text."""
    options = torch.load(path, weights_only=True)["datamodule_hyper_parameters"]
    data = TextDataModule(**options)
    found, state = [], None
    for batch in data.val_dataloader():
        hidden, state = model.encoder(batch.tokens, state)
        found.append(hidden[batch.target >= 0])
    return torch.cat(found)[:number].detach()


def refused(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as caught:
        main(words)
    out, err = capsys.readouterr()
    assert caught.value.code == 2
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    return err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--batch-sizes", "0"], "must be at least 1, got 0"),
        (["--heads", "Unknown"], "no Unknown among "),
        (["--heads", "AdaptiveSoftmax(cutoffs=[90])", "--vocab-sizes", "40"], "with 40 words"),
        (["--vocab-sizes", "9"], "--vocab-sizes must be at least 10, for a top 10, got 9"),
        (["--num-vectors", "63"], "--num-vectors 63 do not fill a batch of 64: raise it"),
        (["--source", "x"], "--source goes with --checkpoint: add it"),
        (["--data-path", "x"], "--data-path goes with --checkpoint: add it"),
        (["--checkpoint", "x", "--vocab-sizes", "40"], "--vocab-sizes is for random weights"),
        (["--checkpoint", "x", "--heads", "NCE"], "--heads is for random weights"),
        (["--checkpoint", "nowhere.ckpt"], "no checkpoint nowhere.ckpt"),
        (
            ["--checkpoint", "GOOD", "--source", "OTHER"],
            "--source has 32 words, the checkpoint has",
        ),
        (["--checkpoint", "GOOD", "--data-path", "/nowhere"], "(--data-path names another)"),
        (["--checkpoint", "GOOD", "--num-vectors", "10000"], "--num-vectors 10000 are asked for"),
    ],
)
def test_wrong_options_are_one_line(
    words: list[str],
    message: str,
    checkpoints: dict[str, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    paths = {"GOOD": str(checkpoints["good"]), "OTHER": str(checkpoints["other"])}
    words = [paths.get(word, word) for word in words]
    assert message in refused(["decode", *words, "--output", str(tmp_path / "out")], capsys)
    assert not (tmp_path / "out").exists()
