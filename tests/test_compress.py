"""Compressing the head of a trained checkpoint: what is written, measured and refused."""

import copy
import io
import json
import math
import os
import resource
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from functools import partial
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from tiny import trainer
from torch.testing import assert_close

from lm_softmax import cli
from lm_softmax.compress import main, study
from lm_softmax.compress.figures import ms_per_token
from lm_softmax.data import TextDataModule
from lm_softmax.encoders import LSTMEncoder
from lm_softmax.heads import (
    NCE,
    AdaptiveSoftmax,
    FullSoftmax,
    LowRankSoftmax,
    MixtureOfSoftmaxes,
    ProductQuantizedSoftmax,
    SampledSoftmax,
    TopK,
)
from lm_softmax.module import LanguageModel
from lm_softmax.schedule import WarmupDecay

HIDDEN = 8
WORDS = [f"w{number}" for number in range(60)]
KEYS = {
    *("epoch", "global_step", "pytorch-lightning_version", "hparams_name", "hyper_parameters"),
    *("datamodule_hparams_name", "datamodule_hyper_parameters", "state_dict"),
}
LOW, CODED = "LowRankSoftmax(rank=3)", "ProductQuantizedSoftmax(num_codebooks=4, codebook_size=16)"


pytestmark = [  # of the trainer that makes the checkpoints
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec"),
]


class Said(NamedTuple):
    code: int
    out: str
    err: str


def call(*args):
    """The command in this process: its exit code and what it printed."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    with redirect_stdout(out), redirect_stderr(err):
        try:
            code = main([str(arg) for arg in args])
        except SystemExit as stop:
            code = stop.code
    return Said(code, out.getvalue(), err.getvalue())


def done(*args):
    said = call(*args)
    assert (said.code, said.err) == (0, "")
    return said.out


def error_of(*args):
    said = call(*args)
    assert said.code == 2, said
    assert said.err.startswith("error: ")
    assert said.err.count("\n") == 1, said.err
    return said.err.removeprefix("error: ").rstrip("\n")


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def _fast_timing(monkeypatch):
    monkeypatch.setattr("lm_softmax.compress.figures.NUM_ROUNDS", 1)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    place = tmp_path_factory.mktemp("compress")
    (place / "corpus").mkdir()
    generator = torch.Generator().manual_seed(0)
    for split, num in (("train", 90), ("validation", 25), ("test", 9)):
        starts = torch.randint(len(WORDS), (num, 1), generator=generator)
        steps = torch.randint(1, 3, (num, 8), generator=generator).cumsum(1)
        ids = (starts + steps) % len(WORDS)  # each word has two successors
        lines = [" ".join(WORDS[i] for i in line) for line in ids.tolist()]
        lines += [" ".join(WORDS)] if split == "train" else []
        (place / "corpus" / f"{split}.txt").write_text("\n".join(lines) + "\n")
    return place


@pytest.fixture(scope="module")
def make(place):
    """Trains a model for some steps and writes its checkpoint."""
    files: dict[str, Path] = {}

    def make(name, head=FullSoftmax, dtype=None, **options):
        if name in files:
            return files[name]
        torch.manual_seed(1)
        data = TextDataModule(
            str(place / "corpus"), tokenizer="whitespace", batch_size=4, eval_batch_size=2
        )
        options = {
            "encoder": partial(LSTMEncoder, embedding_size=HIDDEN, hidden_size=HIDDEN),
            "optimizer": partial(torch.optim.AdamW, lr=0.05),
            "lr_scheduler": partial(WarmupDecay, warmup=0.1),
            **options,
        }
        model = LanguageModel(head=head, counts=data.vocab.counts, vocab=data.vocab, **options)
        fitter = trainer(place, limit_val_batches=0, max_steps=12, max_epochs=5, logger=False)
        fitter.fit(model, datamodule=data)
        files[name] = place / f"{name}.ckpt"
        fitter.save_checkpoint(files[name])
        if dtype is not None:
            content = torch.load(files[name], weights_only=True)
            weights = content["state_dict"].items()
            content["state_dict"] = {
                key: value.to(dtype) if value.is_floating_point() else value
                for key, value in weights
            }
            torch.save(content, files[name])
        return files[name]

    return make


@pytest.fixture
def full(make):
    return make("full")


def load(path):
    return LanguageModel.load_from_checkpoint(path, map_location="cpu").eval()


def report_of(output):
    return json.loads(output.with_suffix(".json").read_text())


def perplexity(model, place):
    """exp of the mean nats over the validation stream, batch after batch, by hand."""
    vocab = model.vocab
    nats = count = 0
    data = TextDataModule(
        str(place / "corpus"), tokenizer="whitespace", eval_batch_size=2, vocab_path=None
    )
    assert data.vocab.fingerprint == vocab.fingerprint
    state = None
    with torch.no_grad():
        for batch in data.val_dataloader():
            hidden, state = model.encoder(batch.tokens, state)
            log_probs = model.head.log_prob(hidden).double()
            keep = batch.target != -100
            nats -= log_probs[keep].gather(1, batch.target[keep].unsqueeze(1)).sum().item()
            count += int(keep.sum())
    return math.exp(nats / count)


@pytest.mark.parametrize(
    ("name", "head"),
    [
        ("full", FullSoftmax),
        ("capped", partial(FullSoftmax, bias=False, softcap=4.0, label_smoothing=0.1)),
        ("sampled", partial(SampledSoftmax, num_samples=20)),
        ("nce", partial(NCE, num_samples=20, log_partition="learned")),
        ("no-tails", partial(AdaptiveSoftmax, cutoffs=[])),
    ],
)
def test_at_full_rank_the_model_is_the_source(name, head, make, place, tmp_path):
    source = make(name, head)
    output = tmp_path / "small.ckpt"
    head = f"LowRankSoftmax(rank={HIDDEN})"
    out = done("--checkpoint", source, "--head", head, "--output", output)
    before, after = load(source), load(output)
    assert type(after.head) is LowRankSoftmax
    assert after.head.objective == before.head.objective
    hidden = torch.randn(20, HIDDEN)
    assert_close(after.head.log_prob(hidden), before.head.log_prob(hidden), rtol=1e-4, atol=1e-4)
    rows = report_of(output)["rows"]
    assert [row["name"] for row in rows] == ["source", "compressed"]
    assert (rows[1]["top_1"], rows[1]["top_10"]) == (1.0, 1.0)
    for row, model in zip(rows, (before, after), strict=True):
        assert row["val_ppl"] == pytest.approx(perplexity(model, place), rel=1e-4)
        assert f"{row['val_ppl']:,.2f}" in out


def test_a_low_rank_checkpoint_is_complete(full, tmp_path, capsys):
    output = tmp_path / "small.ckpt"
    out = done("--checkpoint", full, "--head", LOW, "--output", output)
    content, source = (torch.load(path, weights_only=True) for path in (output, full))
    assert set(content) == KEYS
    hparams = content["hyper_parameters"]
    assert hparams["head"] == hparams["requested"]["head"]
    assert hparams["head"]["class_path"] == "lm_softmax.heads.LowRankSoftmax"
    assert hparams["head"]["init_args"]["rank"] == 3
    for name in ("encoder", "optimizer", "lr_scheduler", "tie_weights"):
        assert hparams[name] == source["hyper_parameters"][name]
    before, after = load(full), load(output)
    assert after.vocab.fingerprint == before.vocab.fingerprint
    assert torch.equal(after.hparams["counts"], before.hparams["counts"])
    expected = LowRankSoftmax.from_full(before.head, 3).state_dict()
    for name, value in expected.items():
        assert_close(after.head.state_dict()[name], value)
    for name, value in source["state_dict"].items():
        if name.startswith("encoder."):
            assert torch.equal(content["state_dict"][name], value)
    row = report_of(output)["rows"][1]
    assert row["num_parameters"] == sum(p.numel() for p in after.parameters())
    assert row["head_mb"] * 1e6 == sum(p.numel() * 4 for p in after.head.parameters())
    assert row["file_mb"] * 1e6 == pytest.approx(output.stat().st_size, abs=2000)
    assert full.stat().st_size > report_of(output)["rows"][0]["file_mb"] * 1e6 + 4000  # moments
    assert out.splitlines()[-2:] == [f"checkpoint: {output}", f"report: {tmp_path / 'small.json'}"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["small.ckpt", "small.json"]


def test_train_py_evaluates_it_and_refuses_to_go_on(full, tmp_path, capsys):
    output = tmp_path / "small.ckpt"
    done("--checkpoint", full, "--head", LOW, "--output", output)
    quiet = ("--trainer.enable_progress_bar=false", "--trainer.accelerator=cpu")
    cli.main(["validate", "--ckpt_path", str(output), "--run", str(tmp_path / "run"), *quiet])
    metrics = (tmp_path / "run" / "metrics.csv").read_text().splitlines()
    found = dict(zip(metrics[0].split(","), metrics[1].split(","), strict=True))
    expected = report_of(output)["rows"][1]["val_ppl"]
    assert float(found["val/ppl"]) == pytest.approx(expected, rel=1e-5)
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        cli.main(["fit", "--ckpt_path", str(output), "--run", str(tmp_path / "fit"), *quiet])
    assert stop.value.code == 2
    assert "holds weights alone, no training to go on with" in capsys.readouterr().err
    assert not (tmp_path / "fit").exists()


def test_codes_are_small_integers_and_no_latent_matrix_is_kept(full, tmp_path):
    output = tmp_path / "coded.ckpt"
    done("--checkpoint", full, "--head", CODED, "--output", output, "--no-eval")
    weights = torch.load(output, weights_only=True)["state_dict"]
    head = {name: value for name, value in weights.items() if name.startswith("head.")}
    source, made = load(full), load(output)
    vocab_size = made.head.vocab_size
    assert {name: (value.dtype, tuple(value.shape)) for name, value in head.items()} == {
        "head.bias": (torch.float32, (vocab_size,)),
        "head.factors.0.centroids": (torch.float32, (4, 16, HIDDEN // 4)),
        "head.factors.0.codes": (torch.uint8, (vocab_size, 4)),
    }
    options = {"num_codebooks": 4, "codebook_size": 16}
    expected = ProductQuantizedSoftmax.from_full(source.head, **options)
    hidden = torch.randn(20, HIDDEN)
    assert_close(made.head.log_prob(hidden), expected.log_prob(hidden))
    rows = report_of(output)["rows"]
    saved = (rows[0]["head_mb"] - rows[1]["head_mb"]) * 1e6
    assert saved == vocab_size * HIDDEN * 4 - (vocab_size * 4 + 4 * 16 * 2 * 4)
    assert rows[0]["file_mb"] * 1e6 - output.stat().st_size == pytest.approx(saved, abs=2000)
    assert [row["val_ppl"] for row in rows] == [None, None]


def test_tied_weights_are_untied(make, tmp_path):
    source, output = make("tied", tie_weights=True), tmp_path / "small.ckpt"
    out = done("--checkpoint", source, "--head", LOW, "--output", output, "--finetune-steps", 2)
    before, after = load(source), load(output)
    assert before.encoder.embedding.weight is before.head.weight
    assert not after.hparams["tie_weights"]
    assert after.encoder.embedding.weight.shape == before.head.weight.shape
    assert not torch.equal(after.encoder.embedding.weight, before.head.weight)  # it was trained
    assert after.head.weight.shape == (before.head.vocab_size, 3)
    assert "untied: the output matrix was the embedding too, which keeps it (0.00 MB)" in out
    rows = report_of(output)["rows"]
    own = 3 * (before.head.vocab_size + HIDDEN)
    assert rows[1]["num_parameters"] == rows[0]["num_parameters"] + own
    done("--checkpoint", source, "--head", LOW, "--output", output, "--force", "--no-eval")
    assert torch.equal(load(output).encoder.embedding.weight, before.head.weight)


def test_the_dtype_of_the_source_is_kept(make, tmp_path):
    source, output = make("half", dtype=torch.bfloat16), tmp_path / "small.ckpt"
    done("--checkpoint", source, "--head", CODED, "--output", output, "--no-eval")
    weights = torch.load(output, weights_only=True)["state_dict"]
    assert {value.dtype for value in weights.values()} == {torch.bfloat16, torch.uint8}


class TestFineTuning:
    def test_trains_all_weights_and_reports_it(self, full, place, tmp_path):
        before = full.read_bytes()
        first, second = tmp_path / "first.ckpt", tmp_path / "second.ckpt"
        for output in (first, second):
            words = ("--head", LOW, "--output", output, "--finetune-steps", 30, "--lr", 0.02)
            out = done("--checkpoint", full, *words)
        assert "fine-tuned: 30 steps of AdamW with lr 0.02\n" in out
        assert full.read_bytes() == before
        content, other = (torch.load(path, weights_only=True) for path in (first, second))
        assert set(content) == KEYS
        start = torch.load(full, weights_only=True)
        assert content["hyper_parameters"]["optimizer"] == start["hyper_parameters"]["optimizer"]
        assert content["hyper_parameters"]["lr_scheduler"] is not None
        for name, value in content["state_dict"].items():
            assert torch.equal(value, other["state_dict"][name]), name
            if name in start["state_dict"]:
                assert not torch.equal(value, start["state_dict"][name]), name
        rows = report_of(first)["rows"]
        assert [row["name"] for row in rows] == ["source", "compressed", "fine-tuned"]
        assert rows[2]["val_ppl"] < rows[1]["val_ppl"]
        assert rows[2]["val_ppl"] == pytest.approx(perplexity(load(first), place), rel=1e-4)
        assert rows[1]["top_10"] < 1

    def test_draws_from_its_seed(self, make, tmp_path):
        encoder = partial(
            LSTMEncoder, embedding_size=HIDDEN, hidden_size=HIDDEN, output_dropout=0.5
        )
        source, found = make("dropout", encoder=encoder), []
        for words in ((), ("--seed", 1), ("--seed", 2)):
            output = tmp_path / f"{len(found)}.ckpt"
            words = ("--head", LOW, "--output", output, "--finetune-steps", 3, *words)
            done("--checkpoint", source, *words, "--eval-batches", 1)
            found.append(load(output).head.weight)
        assert torch.equal(found[0], found[1])
        assert not torch.equal(found[0], found[2])

    def test_of_codes_keeps_the_codes(self, full, tmp_path):
        plain, tuned = tmp_path / "plain.ckpt", tmp_path / "tuned.ckpt"
        done("--checkpoint", full, "--head", CODED, "--output", plain, "--no-eval")
        words = ("--head", CODED, "--output", tuned, "--finetune-minutes", 0.001)
        out = done("--checkpoint", full, *words)
        assert " of AdamW with lr 0.005\n" in out  # a tenth of the run's
        before, after = (load(path).head.factors[0] for path in (plain, tuned))
        assert torch.equal(before.codes, after.codes)
        assert not torch.equal(before.centroids, after.centroids)

    def test_that_diverges_ends_in_one_line_and_leaves_nothing(self, full, tmp_path):
        words = ("--head", LOW, "--output", tmp_path / "y.ckpt", "--finetune-steps", 9)
        assert "train/loss is nan" in error_of("--checkpoint", full, *words, "--lr", 1e30)
        assert not list(tmp_path.iterdir())


def test_previews_are_measured_without_writing(full, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exact, rough = f"SVDPreview(window={HIDDEN}, num_rescored=10)", "SVDPreview(num_rescored=10)"
    out = done("--checkpoint", full, "--preview", exact, rough).splitlines()
    assert [line[: len(exact)].strip() for line in out[2:5]] == ["source", exact, rough]
    assert out[3].split()[-2:] == ["100.00%", "100.00%"]
    assert 0 < float(out[4].split()[-1].rstrip("%")) < 100
    assert not list(tmp_path.iterdir())


def test_times_are_those_of_each_position():
    calls = []

    def topk(hidden, k):
        calls.append((len(hidden), k))
        return TopK(hidden[:, :k], hidden[:, :k].long())

    found = ms_per_token({"a": (topk, torch.zeros(5, 20))}, 12)
    assert list(found["a"]) == [f"top-{k}, batch {size}" for size in (1, 64) for k in (1, 10)]
    assert calls == [(1, 1)] * 32 + [(1, 10)] * 32 + [(64, 1)] * 4 + [(64, 10)] * 4
    assert list(ms_per_token({"a": (topk, torch.zeros(5, 20))}, 4)["a"])[1] == "top-4, batch 1"


def test_data_elsewhere(full, place, tmp_path):
    """A run whose corpus has moved; the vocabulary is that of the checkpoint."""
    content = torch.load(full, weights_only=True)
    content["datamodule_hyper_parameters"] |= {"path": str(place / "gone"), "name": None}
    moved = tmp_path / "moved.ckpt"
    torch.save(content, moved)
    words = ("--checkpoint", moved, "--head", LOW, "--output", tmp_path / "y.ckpt")
    line = error_of(*words)
    assert line.startswith("no text to measure on: ")
    assert line.endswith(" (--data-path names another); --no-eval does without")
    done(*words, "--data-path", place / "corpus", "--eval-batches", 1)
    line = error_of(*words, "--force", "--data-path", tmp_path / "nowhere")
    assert "nowhere" in line
    del content["datamodule_hyper_parameters"]
    torch.save(content, moved)
    assert "does not say what it was trained on" in error_of(*words, "--force")
    done(*words, "--force", "--no-eval")


@pytest.mark.parametrize(
    ("head", "message"),
    [
        ("LowRankSoftmax(rank=9)", "rank must be in [1, hidden_size=8], got 9"),
        ("LowRankSoftmax(rank=0)", "rank must be in [1, hidden_size=8], got 0"),
        ("LowRankSoftmax(bias=True)", "LowRankSoftmax has no option bias, but rank"),
        ("ProductQuantizedSoftmax(num_codebooks=3)", "must divide the width of the rows: got 3 fo"),
        ("ProductQuantizedSoftmax(seed=-1)", "seed must be a whole number in [0, 2**64), got -1"),
        ("AdaptiveSoftmax()", "no AdaptiveSoftmax among LowRankSoftmax, ProductQuantizedSoftmax"),
        ("LowRankSoftmax(", "expected Name or Name(option=value, ...), got 'LowRankSoftmax('"),
    ],
)
def test_a_wrong_head_ends_in_one_line(head, message, full, tmp_path):
    words = ("--checkpoint", full, "--output", tmp_path / "y.ckpt", "--no-eval")
    assert message in error_of(*words, "--head", head)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("name", "head", "message"),
    [
        ("adaptive", partial(AdaptiveSoftmax, cutoffs=[9, 20]), "AdaptiveSoftmax with 2 tail clu"),
        ("mixture", partial(MixtureOfSoftmaxes, num_experts=2), "got MixtureOfSoftmaxes"),
        ("codes", ProductQuantizedSoftmax, "got ProductQuantizedSoftmax"),
    ],
)
@pytest.mark.parametrize("what", [("--head", CODED, "--output", "y"), ("--preview", "SVDPreview")])
def test_a_head_without_a_full_matrix_is_refused(name, head, message, what, make, tmp_path):
    path = make(name, head)
    words = [tmp_path / word if word == "y" else word for word in what]
    line = error_of("--checkpoint", path, *words)
    assert line.startswith("expected a full softmax, one output row of hidden_size=8 a word, got ")
    assert message in line
    assert not list(tmp_path.iterdir())


def test_a_file_that_is_no_checkpoint_is_refused(full, tmp_path):
    whole = full.read_bytes()
    torch.save({"weights": torch.zeros(2)}, tmp_path / "other.pt")
    (tmp_path / "half.ckpt").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "text.ckpt").write_text("no checkpoint\n")
    content = torch.load(full, weights_only=True)
    content["state_dict"].popitem()
    torch.save(content, tmp_path / "part.ckpt")
    output = tmp_path / "y.ckpt"
    for name, message in (
        ("part.ckpt", "part.ckpt holds a model that cannot be built: "),
        ("nowhere.ckpt", "no checkpoint "),
        ("other.pt", "other.pt is not the checkpoint of a language model"),
        ("half.ckpt", "half.ckpt is damaged or incomplete"),
        ("text.ckpt", "no archive that torch.save wrote"),
    ):
        line = error_of("--checkpoint", tmp_path / name, "--head", LOW, "--output", output)
        assert message in line
    assert not output.exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "nothing to do: give --head and --output, or --preview"),
        (("--head", LOW), "--head makes what --output names: give both"),
        (("--output", "y.ckpt", "--preview", "SVDPreview"), "--head makes what --output names"),
        (("--finetune-steps", 3, "--preview", "SVDPreview"), "nothing to fine-tune without --head"),
        (("--head", LOW, "--output", "y.ckpt", "--lr", 1), "--lr is that of fine-tuning: add "),
        (("--head", LOW, "--output", "y.ckpt", "--lr", -1), "--lr: expected a number above 0, got"),
        (("--head", LOW, "--output", "y.ckpt", "--finetune-minutes", "inf"), "a number above 0"),
        (("--head", LOW, "--output", "y.ckpt", "--finetune-steps", 0), "at least 1, got '0'"),
        (
            ("--head", LOW, "--output", "y.ckpt", "--no-eval", "--finetune-steps", 3),
            "--finetune-steps needs data, --no-eval reads none",
        ),
        (
            ("--head", LOW, "--output", "y.ckpt", "--finetune-minutes", 1e300),
            "--finetune-minutes: expected at most 1e+09, got '1e+300'",
        ),
        (
            ("--head", LOW, "--output", "y.ckpt", "--threads", 10**30),
            "--threads: expected a whole number below 2**31, got '1000",
        ),
        (("--head", LOW, "--output", "y.ckpt", "--seed", 3), "--seed is that of fine-tuning: add"),
        (
            ("--head", LOW, "--output", "y.ckpt", "--finetune-steps", 3, "--seed", -1),
            "--seed: expected a whole number below 2**32, got '-1'",
        ),
        (("--preview", "SVDPreview", "--force"), "--force replaces what --output names: give both"),
        (("--preview", "SVDPreview", "--no-eval"), "--preview is measured on data"),
        (("--preview", "SVDPreview(window=9)"), "window must be in [1, 8], got 9"),
        (("--preview", "SVDPreview(size=9)"), "no option size, but window, num_rescored"),
        (("--preview", "SVDPreview(num_rescored=9)"), "k must be in [1, num_rescored=9], got 10"),
        (("--head", LOW, "--output", "nowhere/y.ckpt"), "nowhere: no such folder to write y.ckpt"),
        (("--head", LOW, "--output", "y.json"), "y.json would be the report's name: give --output"),
        (("--head", LOW, "--output", "."), ". is a folder, --output names a file"),
        (("--head", LOW, "--output", "exists.ckpt"), "exists.ckpt exists: give another --output,"),
        (("--head", LOW, "--output", "report.ckpt"), "report.json exists: give another --output"),
        (("--head", LOW, "--output", "source.ckpt", "--force"), "would replace the checkpoint tha"),
    ],
)
def test_a_wrong_command_ends_in_one_line(words, message, full, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("source.ckpt").symlink_to(full)
    for name in ("exists.ckpt", "report.json"):
        Path(name).write_text("mine")
    assert message in error_of("--checkpoint", full, *words)
    assert sorted(os.listdir()) == ["exists.ckpt", "report.json", "source.ckpt"]
    assert {Path(name).read_text() for name in ("exists.ckpt", "report.json")} == {"mine"}


def test_what_is_no_regular_file_is_left_alone(full, tmp_path):
    os.mkfifo(tmp_path / "y.ckpt")
    words = ("--checkpoint", full, "--head", LOW, "--output", tmp_path / "y.ckpt", "--no-eval")
    assert "y.ckpt is no regular file, which could be replaced" in error_of(*words, "--force")
    assert (tmp_path / "y.ckpt").is_fifo()
    assert len(list(tmp_path.iterdir())) == 1


def test_an_existing_file_is_replaced_only_by_force_and_only_as_a_whole(
    full, tmp_path, monkeypatch
):
    output = tmp_path / "y.ckpt"
    words = ("--checkpoint", full, "--output", output, "--no-eval", "--force")
    done(*words, "--head", LOW)
    before = output.read_bytes()

    def stop(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(study, "content", stop)
        said = call(*words, "--head", CODED)
    assert (said.code, said.err) == (130, "interrupted; nothing was written\n")
    assert output.read_bytes() == before
    done(*words, "--head", CODED)
    assert type(load(output).head) is ProductQuantizedSoftmax


def test_a_full_disk_ends_in_one_line_and_leaves_nothing(full, tmp_path):
    """In a process of its own, whose files may not grow beyond some kilobytes."""
    limit = 4000

    def limited():
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    words = ["--checkpoint", full, "--head", LOW, "--output", tmp_path / "y.ckpt", "--no-eval"]
    ended = subprocess.run(
        [sys.executable, "-m", "lm_softmax.compress", *map(str, words)],
        capture_output=True,
        text=True,
        preexec_fn=limited,
    )
    assert ended.returncode == 2, ended.stderr
    assert ended.stderr == f"error: cannot write {tmp_path / 'y.ckpt'}: File too large\n"
    assert ended.stdout == ""
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("stream", "code", "message", "written"),
    [
        (">&-", 2, "error: standard output is closed\n", False),
        (
            "> /dev/full",
            2,
            "error: No space left on device: standard output; the files are written\n",
            True,
        ),
    ],
)
def test_a_table_that_cannot_be_printed(stream, code, message, written, full, tmp_path):
    words = ["--checkpoint", full, "--head", LOW, "--output", tmp_path / "y.ckpt", "--no-eval"]
    command = [sys.executable, "-m", "lm_softmax.compress", *map(str, words)]
    ended = subprocess.run(
        ["sh", "-c", f'"$@" {stream}', "sh", *command], capture_output=True, text=True
    )
    assert (ended.returncode, ended.stderr) == (code, message)
    assert len(list(tmp_path.iterdir())) == 2 * written


def test_a_reader_of_the_table_that_leaves(full, tmp_path):
    words = ["--checkpoint", full, "--head", LOW, "--output", tmp_path / "y.ckpt", "--no-eval"]
    command = [sys.executable, "-m", "lm_softmax.compress", *map(str, words)]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        process.stdout.close()
        errors = process.stderr.read()
    assert (process.returncode, errors) == (141, "")
    assert len(list(tmp_path.iterdir())) == 2


def test_help_needs_nothing():
    said = call("--help")
    assert said.code == 0
    assert "LowRankSoftmax(rank=64)" in said.out


def test_the_source_is_left_alone_in_memory(full):
    """`compress` shares nothing: training one model does not change the other."""
    from lm_softmax.compress import compress
    from lm_softmax.specs import parse_spec

    source = load(full)
    weights = copy.deepcopy(source.state_dict())
    made = compress(source, parse_spec(LOW))
    for parameter in made.parameters():
        parameter.data.zero_()
    for name, value in source.state_dict().items():
        assert torch.equal(value, weights[name])
