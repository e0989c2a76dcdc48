"""The commands of train.py on a tiny corpus: what they write, say and refuse."""

import csv
import io
import json
import os
import re
import runpy
import shutil
import signal
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import lightning.pytorch as pl
import pytest
import torch
import yaml
from jsonargparse import Namespace
from lightning.pytorch.callbacks import EarlyStopping
from lightning.pytorch.callbacks.early_stopping import EarlyStoppingReason
from lightning.pytorch.utilities import rank_zero_only
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny import LOGITS_ALONE, NO_TAILS

from lm_softmax import cli
from lm_softmax.cli.checkpoint import RunCheckpoint
from lm_softmax.cli.run_folder import FOLDER_OF_RUN, RunFolder
from lm_softmax.cli.run_start import RunStart
from lm_softmax.decoding import generate
from lm_softmax.heads import FullSoftmax
from lm_softmax.heads.cost_model import COST_MODELS
from lm_softmax.module import LanguageModel

EPOCHS = "--trainer.max_epochs={}"
TRAIN_PY = Path(__file__).parent.parent / "train.py"
OPTIONS = {
    "model": {
        "encoder": {
            "class_path": "LSTMEncoder",
            "init_args": {"embedding_size": 8, "hidden_size": 8, "output_dropout": 0.1},
        },
        "head": {"class_path": "AdaptiveSoftmax", "init_args": {"min_tail_size": 2}},
        "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.01}},
    },
    "data": {"batch_size": 4, "eval_batch_size": 2, "block_size": 8},
    "trainer": {
        "accelerator": "cpu",
        "max_epochs": 1,
        "log_every_n_steps": 2,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    },
}


class Said(NamedTuple):
    code: int
    out: str
    err: str


def call(*args):
    """The command in this process: its exit code and what it printed."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    with redirect_stdout(out), redirect_stderr(err):
        try:
            cli.main([str(arg) for arg in args])
        except SystemExit as stop:
            code = stop.code
    return Said(code, out.getvalue(), err.getvalue())


def done(*args):
    said = call(*args)
    assert said.code == 0, said.err
    return said


def error_of(*args):
    """The one line that a wrong command ends in."""
    said = call(*args)
    assert said.code == 2, said
    lines = [line for line in said.err.splitlines() if not line.startswith(("INFO: ", "Seed "))]
    assert len(lines) == 1, said.err
    assert lines[0].startswith("error: ")
    return lines[0].removeprefix("error: ")


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    """Steps this small are slower on two."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a corpus and a configuration."""
    place = tmp_path_factory.mktemp("cli")
    words = ["the", "a", "cat", "dog", "sat", "ran", "on", "to", "mat", "it", "then", ";", "."]
    generator = torch.Generator().manual_seed(0)
    (place / "corpus").mkdir()
    for split, lines in (("train", 40), ("validation", 12), ("test", 9)):
        picks = torch.randint(len(words), (lines, 7), generator=generator).tolist()
        text = "\n".join(" ".join(words[i] for i in line) for line in picks)
        (place / "corpus" / f"{split}.txt").write_text(f"{text}\n")
    options = OPTIONS | {"data": {**OPTIONS["data"], "path": str(place / "corpus")}}
    (place / "tiny.yaml").write_text(yaml.safe_dump(options))
    return place


@pytest.fixture(autouse=True)
def _elsewhere(place, monkeypatch):
    """Every command runs in the folder; the rule for cutoffs splits small vocabularies too."""
    monkeypatch.chdir(place)
    monkeypatch.setitem(COST_MODELS, "cpu", LOGITS_ALONE)


@pytest.fixture(scope="module")
def trained(place):
    """A run of one epoch."""
    before, before_model = Path.cwd(), COST_MODELS["cpu"]
    os.chdir(place)
    COST_MODELS["cpu"] = LOGITS_ALONE
    try:
        said = done("fit", "-c", "tiny.yaml", "--run", "trained")
    finally:
        os.chdir(before)
        COST_MODELS["cpu"] = before_model
    return place / "trained", said


def checkpoint(run, name="last"):
    return torch.load(run / "checkpoints" / f"{name}.ckpt", weights_only=True)


def rows(run):
    with (run / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


def assert_same_weights(first, second):
    one, other = checkpoint(first)["state_dict"], checkpoint(second)["state_dict"]
    assert one.keys() == other.keys()
    for name, value in one.items():
        torch.testing.assert_close(value, other[name], rtol=0, atol=0, msg=name)


def test_fit_leaves_one_folder_and_closes_with_its_figures(trained):
    run, said = trained
    files = {str(path.relative_to(run)) for path in run.rglob("*") if path.is_file()}
    events = {name for name in files if name.startswith("events.out.tfevents")}
    assert len(events) == 1
    assert files - events == {
        "checkpoints/best.ckpt",
        "checkpoints/last.ckpt",
        "config.yaml",
        "metrics.csv",
        "summary.json",
    }
    summary = json.loads((run / "summary.json").read_text())
    assert summary["status"] == "finished"
    assert f"val/ppl {summary['best']['val/ppl']:.1f}" in said.out
    for part in ("unigram model", "val/unk_rate", "val/bits_per_byte", "generated text:"):
        assert part in said.out
    assert "best checkpoint: trained/checkpoints/best.ckpt" in said.out
    assert "tensorboard --logdir trained" in said.out
    logged = {name for row in rows(run) for name, value in row.items() if value}
    assert {"train/loss", "train/ppl", "val/ppl", "val/nll", "lr-AdamW"} <= logged


def test_progress_bar_shows_loss_perplexity_and_speed(place):
    said = done("fit", "-c", "tiny.yaml", "--run", "bar", "--trainer.enable_progress_bar=true")
    for name in ("train/loss=", "train/ppl=", "perf/tokens_per_s="):
        assert name in said.out


def test_config_of_a_run_repeats_it(trained):
    run, _ = trained
    done("fit", "-c", run / "config.yaml", "--run", "repeated")
    assert_same_weights(run, Path("repeated"))
    assert (run / "config.yaml").read_text() == Path("repeated/config.yaml").read_text()


def test_a_checkpoint_alone_is_evaluated_on_the_split_alone(trained, tmp_path, monkeypatch):
    """Without the training text, an earlier cache, the rule for cutoffs, or the folder."""
    run, _ = trained
    for split in ("validation", "test"):
        (tmp_path / split).mkdir()
        shutil.copy(f"corpus/{split}.txt", tmp_path / split)
    shutil.copy(run / "checkpoints" / "best.ckpt", tmp_path / "b.ckpt")
    monkeypatch.setenv("LM_SOFTMAX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setitem(COST_MODELS, "cpu", NO_TAILS)
    monkeypatch.chdir(tmp_path)
    best = json.loads((run / "summary.json").read_text())["best"]
    said = done("validate", "--ckpt_path", "b.ckpt", "--data.path=validation")
    assert f"{best['val/ppl']:.4f}"[:-1] in said.out
    assert "val/bits_per_byte" in said.out
    said = done("test", "--ckpt_path", "b.ckpt", "--data.path=test")
    nll = float(re.search(r"test/nll\W+([\d.]+)", said.out)[1])

    said = done("predict", "--ckpt_path", "b.ckpt", "--data.path=test", "--num_tokens=3")
    assert "of each token and a continuation of each row: predictions.jsonl" in said.out
    lines = [json.loads(line) for line in Path("predictions.jsonl").read_text().splitlines()]
    text = [word for line in lines for word in line["tokens"]]
    assert sorted(text) == sorted(
        Path("test/test.txt").read_text().replace("\n", " <eos> ").split()
    )
    log_probs = [value for line in lines for value in line["log_probs"]]
    assert -sum(log_probs) / len(log_probs) == pytest.approx(nll, rel=1e-4)
    model = LanguageModel.load_from_checkpoint("b.ckpt")
    ids = {word: number for number, word in enumerate(model.vocab.tokens)}
    assert {len(line["tokens"]) for line in lines} == {8, 4}  # rows of the end are shorter
    for line in lines:
        prompt = torch.tensor([[ids[word] for word in line["tokens"]]])
        tokens = generate(model.encoder, model.head, prompt, 3, temperature=0)[0, -3:]
        assert line["continuation"] == [model.vocab.tokens[number] for number in tokens]
    message = error_of("predict", "--ckpt_path", "b.ckpt", "--data.path=test")
    assert message.startswith("predictions.jsonl exists: remove it")
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        *("b.ckpt", "cache", "predictions.jsonl", "test", "validation")
    ]


def test_evaluation_keeps_a_folder_if_asked(trained):
    run, _ = trained
    done("validate", "--ckpt_path", "best", "--run", run)  # the run's own stays as it is
    assert len(list(run.glob("events*"))) == 1
    done("validate", "--ckpt_path", run / "checkpoints/best.ckpt", "--run", "evaluated")
    assert rows(Path("evaluated"))[0]["val/ppl"]
    said = done("predict", "--ckpt_path", "best", "--run", run, "--num_tokens=0")
    assert f"log-probabilities of each token: {run}/predictions.jsonl" in said.out
    line = json.loads((run / "predictions.jsonl").read_text().splitlines()[0])
    assert list(line) == ["batch", "row", "tokens", "log_probs"]


def test_resumed_run_equals_an_uninterrupted_one(place):
    done("fit", "-c", "tiny.yaml", "--run", "whole", "--trainer.max_epochs=2")
    done("fit", "-c", "tiny.yaml", "--run", "halves")
    half = rows(Path("halves"))
    done("fit", "--run", "halves", "--ckpt_path", "last", "--trainer.max_epochs=2")
    assert_same_weights(Path("whole"), Path("halves"))
    assert [row["step"] for row in rows(Path("halves"))] == [
        row["step"] for row in rows(Path("whole"))
    ]
    for old, new in zip(half, rows(Path("halves")), strict=False):
        assert {name: value for name, value in new.items() if value} == {
            name: value for name, value in old.items() if value
        }
    assert yaml.safe_load(Path("halves/config.yaml").read_text())["trainer"]["max_epochs"] == 2


def test_choices_made_from_the_data_are_not_made_again(trained, monkeypatch):
    chosen = checkpoint(trained[0])["hyper_parameters"]["head"]["init_args"]["cutoffs"]
    assert chosen
    done("fit", "-c", "tiny.yaml", "--run", "pinned")
    monkeypatch.setitem(COST_MODELS, "cpu", NO_TAILS)
    done("fit", "--run", "pinned", "--ckpt_path", "last", "--trainer.max_epochs=2")
    again = checkpoint(Path("pinned"))
    assert again["hyper_parameters"]["head"]["init_args"]["cutoffs"] == chosen
    assert again["epoch"] == 1


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (
            ["--model.head=FullSoftmax", "--model.head.bias=false"],
            {"head": "FullSoftmax", "bias": False},
        ),
        (
            ["-c", str(TRAIN_PY.parent / "configs" / "head" / "full.yaml")],
            {"head": "FullSoftmax", "bias": True},
        ),
        (
            [
                *("--model.encoder=TransformerEncoder", "--model.encoder.num_layers=1"),
                *("--model.encoder.num_heads=2", "--data.tokenizer=whitespace"),
                *("--model.lr_scheduler=WarmupDecay", "--model.lr_scheduler.final=0.5"),
                *("--trainer.logger=false", "--trainer.enable_checkpointing=true"),
            ],
            {"encoder": "TransformerEncoder", "head": "AdaptiveSoftmax"},
        ),
        (["--model.head=test_cli.PrivateHead"], {"head": "PrivateHead"}),
    ],
)
def test_any_part_is_swapped_from_the_command_line(words, expected, place, tmp_path):
    run = tmp_path / "run"
    limits = ("--trainer.max_steps=2", "--trainer.log_every_n_steps=1", "--run", run)
    done("fit", "-c", "tiny.yaml", *words, *limits)
    hparams = checkpoint(run)["hyper_parameters"]
    for part, name in expected.items():
        if part == "bias":
            assert hparams["head"]["init_args"]["bias"] is name
        else:
            assert hparams[part]["class_path"].endswith(f".{name}")
    done("validate", "--run", run, "--ckpt_path", "last")


class PrivateHead(FullSoftmax):
    """A head of somebody else's module."""


def test_a_head_of_ones_own_is_evaluated_once_it_is_imported(trained, tmp_path):
    content = checkpoint(trained[0])
    spec = {"class_path": "my_heads.Mine", "init_args": {}}
    content["hyper_parameters"]["head"] = content["hyper_parameters"]["requested"]["head"] = spec
    torch.save(content, tmp_path / "a.ckpt")
    line = error_of("validate", "--ckpt_path", tmp_path / "a.ckpt")
    assert line == (
        "model.head: the imported modules hold no class my_heads.Mine; import its module first; "
        "a --config that names it does"
    )


def test_default_folder_is_named_after_config_and_head(place):
    done("fit", "-c", "tiny.yaml", "--trainer.fast_dev_run=1", "--trainer.callbacks=[]")
    said = done("fit", "-c", "tiny.yaml", "--trainer.max_steps=1", "--trainer.log_every_n_steps=1")
    (run,) = Path("runs").iterdir()
    assert re.fullmatch(r"tiny-adaptive-softmax-\d{8}-\d{6}", run.name)
    assert str(run) in said.out


TRAINED = "trained/checkpoints/last.ckpt"
FIT = ("fit", "-c", "tiny.yaml", "--run", "refused")
DECAY = {"class_path": "WarmupDecay"}


@pytest.mark.usefixtures("trained")
@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "missing: a subcommand, one of fit, validate, test, predict"),
        (["fitt"], "no subcommand 'fitt'; nearest: fit, "),
        (["fit"], "missing: --model.encoder, --model.head; a --config may hold it"),
        (["validate"], "validate needs a trained model: give --ckpt_path FILE"),
        ([*FIT, "--model.haed=FullSoftmax"], "no option --model.haed; nearest: --model.head, "),
        ([*FIT, "--trainer.max_epoch=1"], "no option --trainer.max_epoch; nearest: --trainer.max_"),
        ([*FIT, "--data.tokeniser=words"], "no option --data.tokeniser; nearest: --data.tokenizer"),
        ([*FIT, "--model.head=FulSoftmax"], "model.head: no class FulSoftmax; nearest: FullSoftm"),
        (
            [*FIT, "--model.head=lm_softmax.heads.FulSoftmax"],
            "model.head: no class lm_softmax.heads.FulSoftmax; nearest: FullSoftmax",
        ),
        (
            [*FIT, "--model.head.cutofs=[2]"],
            "model.head: no option 'cutofs' of AdaptiveSoftmax; nearest: cutoffs",
        ),
        (
            [*FIT, "--model.encoder.embedding=AdaptivEmbedding"],
            "model.encoder.embedding: no class AdaptivEmbedding; nearest: AdaptiveEmbedding",
        ),
        (
            [*FIT, "--model.optimizer.learning_rate=1"],
            "model.optimizer: no option 'learning_rate' of AdamW; nearest: ",
        ),
        ([*FIT, "--trainer.callbacks+=ModelChekpoint"], "no class ModelChekpoint; nearest: ModelC"),
        ([*FIT, "--trainer.max_epochs=many"], "trainer.max_epochs: expected int or null, got many"),
        ([*FIT, "--model.head.div_value=x"], "model.head.div_value: expected float or null, got x"),
        ([*FIT, "--trainer.precision=33"], "trainer.precision: expected Literal[64, 32, 16] or "),
        ([*FIT, "-c", "nowhere.yaml"], "config: File does not exist: "),
        ([*FIT, "-c", "wrong-key.yaml"], "no option --model.encodr; nearest: --model.encoder"),
        ([*FIT, "-c", "null.yaml"], "data is None: give its options, or leave it out"),
        ([*FIT, "-c", "wrong-yaml.yaml"], "Problems parsing config: "),
        ([*FIT, "-c", "latin1.yaml"], "a configuration file is not UTF-8: "),
        ([*FIT, "-c", "resumes.yaml"], "ckpt_path stands in a config: give --ckpt_path instead"),
        ([*FIT, "--trainer.default_root_dir=x"], "trainer.default_root_dir is the run's folder: "),
        ([*FIT, "--model.optimizer.lr=-1"], "Invalid learning rate: -1.0"),
        ([*FIT, "--trainer.callbacks+=StepTimeMonitor"], "more than one stateful callback of type"),
        ([*FIT, "--trainer.val_check_interval=999"], "`val_check_interval` (999) must be less"),
        ([*FIT, "--trainer.devices=9", "--trainer.accelerator=gpu"], "No supported gpu backend"),
        (
            [*FIT, "--model.lr_scheduler=WarmupDecay", "--trainer.max_epochs=-1"],
            "training is bounded by time alone: set trainer.max_steps or trainer.max_epochs",
        ),
        ([*FIT, "--ckpt_path", "last"], "no checkpoint refused/checkpoints/last.ckpt"),
        (["fit", "-c", "tiny.yaml", "--ckpt_path", "last"], "needs the run's folder: add --run"),
        (["predict", "--ckpt_path", TRAINED, "--num_tokens=-1"], "num_tokens: "),
        (["fit", "--num_tokens=1"], "no option --num_tokens; nearest: "),
        (["validate", "--ckpt_path", "nowhere.ckpt"], "no checkpoint nowhere.ckpt"),
        (["validate", "--ckpt_path", "tiny.yaml"], "cannot read 'tiny.yaml': "),
        (["validate", "--ckpt_path", "other.pt"], "other.pt is not the checkpoint of a language m"),
    ],
)
def test_a_wrong_command_ends_in_one_line_and_leaves_nothing(words, message, place):
    Path("wrong-key.yaml").write_text("model: {encodr: {class_path: LSTMEncoder}}\n")
    Path("wrong-yaml.yaml").write_text("model: {encoder: [}\n")
    Path("null.yaml").write_text("data: null\n")
    Path("latin1.yaml").write_bytes(b"run: \xe9t\xe9\n")
    Path("resumes.yaml").write_text("ckpt_path: x.ckpt\n")
    torch.save({"state_dict": {}}, "other.pt")
    before = set(Path().iterdir())
    assert message in error_of(*words)
    assert set(Path().iterdir()) == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"data": {"block_size": None}}, "data.block_size: expected int, got null"),
        ({"model": {"tie_weights": None}}, "model.tie_weights: expected bool, got null"),
        (
            {"model": {"encoder": {"init_args": {"hidden_size": None}}}},
            "model.encoder.hidden_size: expected int, got null",
        ),
        (
            {
                "model": {
                    "lr_scheduler": {"class_path": "WarmupDecay", "init_args": {"shape": None}}
                }
            },
            "model.lr_scheduler.shape: expected Literal['cosine', 'linear'], got null",
        ),
        (
            {"trainer": {"accumulate_grad_batches": None}},
            "trainer.accumulate_grad_batches: expected int, got null",
        ),
        (
            {
                "trainer": {
                    "callbacks": [
                        {"class_path": "StepTimeMonitor", "init_args": {"warmup_steps": None}}
                    ]
                }
            },
            "trainer.callbacks.warmup_steps: expected int, got null",
        ),
    ],
)
def test_null_is_refused_where_it_means_nothing(options, message, place):
    Path("nulls.yaml").write_text(yaml.safe_dump(options))
    assert error_of(*FIT, "-c", "nulls.yaml") == message
    assert not Path("refused").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--data.path=nowhere"], "nowhere"),
        (["--data.path=no-test"], "validation"),
        (["--data.path=empty"], "empty"),
        (["--data.path=latin1"], "UTF-8"),
        (["--data.path=table", "--data.text_column=txt"], "txt"),
        (["--data.batch_size=0"], "batch_size=0"),
        (["--data.max_vocab_size=1"], "max_vocab_size=1"),
        (["--model.head.cutoffs=[7,5]"], "strictly increasing inside (0, 15), got [7, 5]"),
        (["--model.head.cutoffs=[0,5]"], "strictly increasing inside (0, 15), got [0, 5]"),
        (["--model.head.cutoffs=[5,99]"], "strictly increasing inside (0, 15), got [5, 99]"),
        (["--model.head.min_tail_size=0", "--model.head.div_value=9"], "must be at least 1"),
        (
            [f"--model.encoder.hidden_size={10**30}"],
            f"hidden_size must be below 2**63, got {10**30}",
        ),
        (["--model.encoder.num_layers=2147483648"], "num_layers must be at most 10,000, got"),
        (["--trainer.accumulate_grad_batches=0"], "accumulate_grad_batches must be at least 1: 0"),
        ([f"--model.encoder.embedding_size={10**30}"], "embedding_size must be below 2**63, got"),
        (["--model.encoder.output_dropout=2"], "output_dropout is a probability in [0, 1), got 2"),
        (
            ["--model.tie_weights=true", "--model.encoder.embedding_size=5"],
            "AdaptiveSoftmax",
        ),
    ],
)
def test_wrong_data_or_structure_ends_in_one_line_and_leaves_nothing(words, message, place):
    for name in ("no-test", "empty", "latin1", "table"):
        Path(name).mkdir(exist_ok=True)
        for split in ("train", "validation", "test"):
            shutil.copy(f"corpus/{split}.txt", f"{name}/{split}.txt")
    Path("no-test/validation.txt").unlink(missing_ok=True)
    for split in ("train", "validation", "test"):
        Path(f"empty/{split}.txt").write_text("")
        Path(f"table/{split}.txt").unlink()
        Path(f"table/{split}.csv").write_text("text\na b c\n")
    Path("latin1/train.txt").write_bytes("été\n".encode("latin-1") * 50)
    assert message in error_of(*FIT, *words)
    assert not Path("refused").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--model.head=FullSoftmax"], "head is AdaptiveSoftmax there, FullSoftmax here"),
        (["--model.encoder.hidden_size=6"], "encoder.hidden_size is 8 there, 6 here"),
        (["--model.head.cutoffs=[3]"], "there, [3] here"),
        (["--model.head.div_value=1"], "head.div_value is None there, 1.0 here"),
        (["--data.tokenizer=whitespace"], "whose vocabulary was made with words"),
        (["--data.max_vocab_size=9"], "whose vocabulary was made with None"),
    ],
)
def test_a_checkpoint_of_another_structure_is_refused(words, message, trained):
    path = trained[0] / "checkpoints" / "last.ckpt"
    limits = ("--trainer.max_epochs=2", "--ckpt_path", path)
    line = error_of(*FIT, *limits, *words)
    assert str(path) in line
    assert message in line
    assert not Path("refused").exists()


def test_an_existing_run_is_left_alone(trained):
    run, _ = trained
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    line = error_of("fit", "-c", "tiny.yaml", "--run", run)
    assert line.startswith(f"run folder {run} exists: give another --run, or go on with --run")
    Path("elsewhere").mkdir()
    shutil.copy(run / "checkpoints" / "last.ckpt", "elsewhere")
    line = error_of("fit", "-c", "tiny.yaml", "--run", run, "--ckpt_path", "elsewhere/last.ckpt")
    assert line.startswith(f"run folder {run} exists")
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before


@pytest.mark.filterwarnings("ignore:The dirpath has changed")  # it is a copy of another run
def test_a_refused_command_changes_nothing_in_a_run_that_is_gone_on_with(trained, tmp_path):
    run = shutil.copytree(trained[0], tmp_path / "run")
    (run / "summary.json").write_text('{"status": "running"}')  # of a run that was killed
    with (run / "metrics.csv").open("a") as file:  # after the checkpoint
        csv.DictWriter(file, list(rows(run)[0])).writerow({"epoch": 0, "step": 99})

    def files():
        found = [path for path in run.rglob("*") if path.is_file()]
        return {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in found}

    fit = ("fit", "--run", run, "--ckpt_path", "last")
    before = files()
    for words, message in (
        ([EPOCHS.format(2), "--trainer.accumulate_grad_batches=0"], "must be at least 1: 0"),
        ([EPOCHS.format(2), "--model.optimizer.init_args.lr=1e39"], "cannot step by lr=1e+39"),
        ([EPOCHS.format(2), "--data.streaming=true"], "set trainer.max_steps"),
        (["--data.streaming=true"], "set trainer.max_steps"),  # where nothing is left to do
    ):
        said = call(*fit, *words)
        assert said.code == 2
        assert message in said.err.splitlines()[-1]
        assert files() == before
    done(*fit, EPOCHS.format(2))
    steps = [int(row["step"]) for row in rows(run)]
    assert 10 < steps[-1] < 99
    assert steps == sorted(steps)
    assert not before.items() <= files().items()


@pytest.mark.parametrize("path", ["os.system", "this.Thing", "this"])
@pytest.mark.parametrize("part", ["encoder", "head", "optimizer"])
def test_a_checkpoint_cannot_name_foreign_code(part, path, trained, tmp_path, monkeypatch):
    monkeypatch.setattr("os.system", lambda command: pytest.fail("it ran"))
    sys.modules.pop("this", None)
    content = checkpoint(trained[0])
    spec = {"class_path": path, "init_args": {"command": "touch proof"}}
    content["hyper_parameters"][part] = content["hyper_parameters"]["requested"][part] = spec
    torch.save(content, tmp_path / "a.ckpt")
    said = call("validate", "--ckpt_path", tmp_path / "a.ckpt")
    assert "this" not in sys.modules
    if part != "optimizer":  # which an evaluation has no use for
        assert said.code == 2
        assert f"model.{part}: " in said.err
        assert said.err.count("\n") == 1


class Stop(pl.Callback):
    """Presses Ctrl-C, or fails, after some steps."""

    def __init__(self, step: int, fails: bool = False) -> None:
        self.step, self.fails = step, fails

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == self.step:
            raise RuntimeError("a bug") if self.fails else KeyboardInterrupt


@pytest.fixture
def _ctrl_c():
    handler = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, handler)


def stopped(step, fails=False):
    callback = {"class_path": "test_cli.Stop", "init_args": {"step": step, "fails": fails}}
    Path("stop.yaml").write_text(yaml.safe_dump({"trainer": {"callbacks": [callback]}}))
    text = Path("stop.yaml").read_text().replace("callbacks:", "callbacks+:")
    Path("stop.yaml").write_text(text)
    return ("fit", "-c", "tiny.yaml", "-c", "stop.yaml", "--trainer.max_epochs=2")


@pytest.mark.usefixtures("_ctrl_c")
def test_ctrl_c_says_what_to_go_on_from(place):
    said = call(*stopped(14), "--run", "stopped")
    assert said.code == 130
    assert said.err.splitlines()[-1] == (
        "interrupted; stopped/checkpoints/last.ckpt goes on with: "
        "fit --run stopped --ckpt_path last"
    )
    assert json.loads(Path("stopped/summary.json").read_text())["status"] == "interrupted"
    assert rows(Path("stopped"))[-1]["step"] == "13"
    done(*FIT[:3], "--run", "stopped", "--ckpt_path", "last", "--trainer.max_epochs=2")
    steps = [int(row["step"]) for row in rows(Path("stopped")) if row["train/loss"]]
    assert steps == list(range(1, 20, 2))  # none of those after the checkpoint twice
    said = call(*stopped(0), "--run", "never")
    assert said.code == 130
    assert said.err.splitlines()[-1] == "interrupted before the first checkpoint"
    assert not Path("never").exists()


def test_a_diverging_run_ends_in_its_last_state_and_keeps_its_best(place):
    done("fit", "-c", "tiny.yaml", "--run", "worse", "--model.optimizer.lr=0.3", EPOCHS.format(3))
    assert checkpoint(Path("worse"))["global_step"] == 30
    assert checkpoint(Path("worse"), "best")["global_step"] < 30
    summary = json.loads(Path("worse/summary.json").read_text())
    assert summary["steps"] == 30
    assert list(summary["checkpoints"].items()) == [
        ("best", "checkpoints/best.ckpt"),
        ("last", "checkpoints/last.ckpt"),
    ]


def test_a_training_of_no_step_leaves_its_config(place):
    done("fit", "-c", "tiny.yaml", "--run", "no-step", "--trainer.max_steps=0")
    found = {path.name for path in Path("no-step").iterdir()}
    assert {"config.yaml", "summary.json"} <= found
    assert json.loads(Path("no-step", "summary.json").read_text())["status"] == "finished"


def test_a_prediction_that_is_refused_leaves_no_folder(trained):
    asked = ("predict", "--ckpt_path", trained[0] / "checkpoints/last.ckpt", "--run", "refused")
    assert "num_tokens must be below 2**63" in error_of(*asked, f"--num_tokens={2**63}")
    assert not Path("refused").exists()


@pytest.mark.parametrize(
    ("stream", "code", "said"),
    [
        (">&-", 2, "error: standard output is closed\n"),  # before any work
        (">/dev/full", 2, "error: No space left on device\n"),
        ("| sleep 0", 141, ""),
    ],
)
def test_a_standard_output_that_takes_nothing(stream, code, said):
    command = "from lm_softmax import cli; cli.TrainCLI = lambda args: print('x' * 2**20)"
    words = [sys.executable, "-c", f"{command}; cli.main([])"]
    script = f'{{ "$@"; echo $? >&3; }} {stream}'
    ended = subprocess.run(
        ["sh", "-c", f"exec 3>&1; {script}", "sh", *words], capture_output=True, text=True
    )
    assert (ended.stdout, ended.stderr) == (f"{code}\n", said)


def test_max_steps_between_validations_ends_with_one(place):
    options = ("--trainer.max_steps=7", "--trainer.val_check_interval=5")
    said = done("fit", "-c", "tiny.yaml", "--run", "between", *options)
    assert "(best, step " in said.out
    assert [row["step"] for row in rows(Path("between")) if row["val/ppl"]] == ["4", "6"]
    assert checkpoint(Path("between"))["global_step"] == 7


@pytest.mark.usefixtures("_ctrl_c")
def test_ctrl_c_in_an_epoch_loses_no_step(place):
    done("fit", "-c", "tiny.yaml", "--run", "not-stopped", EPOCHS.format(2))
    for step in (3, 14):
        run = Path(f"stopped-{step}")
        said = call(*stopped(step), "--run", run)
        assert said.code == 130
        assert f"interrupted; {run}/checkpoints/last.ckpt goes on with: " in said.err
        assert checkpoint(run)["global_step"] == step
        done("fit", "--run", run, "--ckpt_path", "last", "-c", "tiny.yaml", EPOCHS.format(2))
        assert_same_weights(Path("not-stopped"), run)


@pytest.mark.usefixtures("_ctrl_c")
@pytest.mark.parametrize("command", ["validate", "test", "predict"])
def test_ctrl_c_in_an_evaluation(command, trained, tmp_path):
    path = tmp_path / "stop.yaml"
    callbacks = [{"class_path": "test_cli.StopEvaluation"}]
    path.write_text(yaml.safe_dump({"trainer": {"callbacks": callbacks}}))
    options = ("--ckpt_path", trained[0] / "checkpoints/last.ckpt", "--run", tmp_path / "run")
    said = call(command, "-c", path, *options)
    assert (said.code, said.err.splitlines()[-1]) == (130, "interrupted")
    assert not (tmp_path / "run").exists()


class StopEvaluation(pl.Callback):
    """Presses Ctrl-C at once."""

    def on_validation_start(self, trainer, pl_module):
        raise KeyboardInterrupt

    on_test_start = on_predict_start = on_validation_start


def test_runs_of_the_same_second_get_folders_of_their_own(tmp_path, monkeypatch):
    monkeypatch.setenv(FOLDER_OF_RUN, "of an earlier run")
    path = tmp_path / "runs" / "a"
    folders = [RunFolder(path, numbered=True) for _ in range(3)]
    assert [folder.path.name for folder in folders] == ["a", "a-2", "a-3"]
    assert all(folder.path.is_dir() for folder in folders)
    with pytest.raises(ValueError, match="exists: give another --run"):
        RunFolder(path)
    monkeypatch.setattr(rank_zero_only, "rank", 1)  # a process that the first one has started
    assert RunFolder(path.with_name("a-second-later"), numbered=True).path == folders[2].path
    monkeypatch.setattr(rank_zero_only, "rank", 0)
    folders[1].remove()
    assert sorted(folder.name for folder in path.parent.iterdir()) == ["a", "a-3"]
    RunFolder(path, resumes=True).remove()
    assert path.is_dir()
    folders[2].remove()
    folders[0].remove(only_empty=True)
    assert path.parent.is_dir() is False or not any(path.parent.iterdir())


@pytest.mark.parametrize(
    ("summary", "closed"),
    [
        ('{"status": "finished", "steps": 9, "best": {}}', True),
        ('{"status": "finished", "steps": 8}', False),
        ('{"status": "running", "steps": 9}', False),
        ('{"status": "finished"', False),
        ("[]", False),
        (None, False),
    ],
)
def test_a_run_is_closed_by_the_summary_of_the_end_it_came_to(summary, closed, tmp_path):
    if summary is not None:
        (tmp_path / "summary.json").write_text(summary)
    assert RunFolder(tmp_path, resumes=True).is_closed(9) is closed


def test_a_run_goes_on_from_the_newest_of_its_checkpoints(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    names = ["checkpoints/last.ckpt", "hpc_ckpt_1.ckpt", "checkpoints/previous.ckpt"]
    for age, name in enumerate([*names, "checkpoints/best.ckpt"]):
        (tmp_path / name).touch()
        os.utime(tmp_path / name, ns=(0, 10**9 - age))
    for count in (3, 2, 1, 0):  # with and without those that are newer
        expected = [tmp_path / name for name in names[3 - count :]]
        assert RunCheckpoint.candidates(tmp_path) == expected
        if expected:
            expected[0].unlink()


@pytest.mark.parametrize(("whole", "ended"), [(True, True), (False, False)])
def test_an_epoch_that_is_under_way_is_not_done(whole, ended, trained):
    checkpoint = RunCheckpoint("last", str(trained[0]))
    loops = checkpoint.content["loops"]["fit_loop"]
    loops["epoch_progress"]["current"] |= {"started": 1, "processed": 0}
    loops["epoch_loop.batch_progress"]["is_last_batch"] = whole
    trainer = pl.Trainer(max_epochs=1, logger=False, accelerator="cpu", enable_checkpointing=False)
    assert bool(checkpoint.end(trainer)) is ended


@pytest.mark.parametrize(
    ("least", "ended"),
    [
        ({}, True),
        ({"min_steps": 10, "min_epochs": 1}, True),
        ({"min_steps": 11}, False),
        ({"min_epochs": 2}, False),
    ],
)
def test_early_stopping_ends_no_run_before_its_least_length(least, ended, trained):
    checkpoint = RunCheckpoint("last", str(trained[0]))
    assert checkpoint.step == 10
    stopping = EarlyStopping("val/ppl")
    stopping.stopping_reason = EarlyStoppingReason.PATIENCE_EXHAUSTED
    checkpoint.content["callbacks"][stopping.state_key] = stopping.state_dict()
    options = {"logger": False, "accelerator": "cpu", "enable_checkpointing": False}
    trainer = pl.Trainer(max_epochs=9, callbacks=[EarlyStopping("val/ppl")], **options, **least)
    end = checkpoint.end(trainer)
    assert end == (
        "has done 10 steps, after which early stopping ended the run: leave EarlyStopping of"
        " val/ppl out"
        if ended
        else None
    )


@pytest.mark.parametrize(("num_rows", "kept"), [(3, [1, 2, 3]), (None, [1, 2])])
def test_figures_from_the_resumed_step_on_are_those_before_its_checkpoint(num_rows, kept, tmp_path):
    """The rows that a checkpoint of step 3 knows of, 3 itself among them, and no others."""
    folder = RunFolder(tmp_path, resumes=True)
    for first, steps, loss in ((0, [1, 2, 3, 4, 5], 2.0), (3, [4], 1.0)):
        loggers = folder.loggers(first)
        if first:
            folder.keep_rows(loggers, num_rows, first)
        for logger in loggers:
            for step in steps:
                logger.log_metrics({"train/loss": loss}, step)
            logger.finalize("failed")
        for file in tmp_path.glob("events.*"):
            file.rename(file.with_name(f"{file.name}.{first}"))
    expected = [(step, 2.0) for step in kept] + [(4, 1.0)]
    board = EventAccumulator(str(tmp_path)).Reload()
    assert [(event.step, event.value) for event in board.Scalars("train/loss")] == expected
    found = [(int(row["step"]), float(row["train/loss"])) for row in rows(tmp_path)]
    assert found == expected


def test_a_run_without_a_step_left_goes_back_to_the_rows_of_its_checkpoint(tmp_path):
    (tmp_path / "metrics.csv").write_text("step,train/loss\n1,2.0\n2,2.0\n4,2.0\n")
    folder = RunFolder(tmp_path, resumes=True)
    start = RunStart(None, None, folder=folder, vocab_path=None, step=3, num_rows=2)
    start.on_fit_end(SimpleNamespace(loggers=folder.loggers(3)), None)
    assert [row["step"] for row in rows(tmp_path)] == ["1", "2"]


def test_a_configuration_that_cannot_be_written_leaves_the_one_before(tmp_path):
    class Parser:
        def save(self, config, path, **options):
            Path(path).write_text("half")
            raise OSError("disk full")

    (tmp_path / "config.yaml").write_text("whole")
    config = Namespace(run="x", data=Namespace(vocab_path=None))
    folder = RunFolder(tmp_path, resumes=True)
    start = RunStart(Parser(), config, folder=folder, vocab_path=None, step=0, num_rows=None)
    with pytest.raises(OSError, match="disk full"):
        start.save_config(None, None, "fit")
    assert [path.name for path in tmp_path.iterdir()] == ["config.yaml"]
    assert (tmp_path / "config.yaml").read_text() == "whole"


def test_metrics_that_a_kill_cut_off_are_read(tmp_path):
    whole, cut = "epoch,step,train/loss\n0,0,2.5\n0,1,2.25\n0,5,2.125\n0,12,2.0\n", "0,2"
    file = tmp_path / "metrics.csv"
    for num_rows, kept in ((None, ["0", "1"]), (3, ["0", "1", "5"]), (9, ["0", "1", "5", "12"])):
        file.write_text(whole + cut)
        folder = RunFolder(tmp_path, resumes=True)
        loggers = folder.loggers(5)
        folder.keep_rows(loggers, num_rows, 5)
        assert [row["step"] for row in rows(tmp_path)] == kept
        loggers[1].log_metrics({"train/loss": 1.5, "val/ppl": 7.0}, 6)  # a new column
        assert [row["step"] for row in rows(tmp_path)] == [*kept, "6"]
        assert rows(tmp_path)[1]["train/loss"] == "2.25"
        assert [path.name for path in tmp_path.glob("metrics*")] == ["metrics.csv"]


def test_a_path_into_the_run_brings_its_config(place):
    done("fit", "-c", "tiny.yaml", "--run", "by-path", "--trainer.log_every_n_steps=5")
    path = Path("by-path/checkpoints/last.ckpt")
    done("fit", "--run", "by-path", "--ckpt_path", path, EPOCHS.format(2))
    options = yaml.safe_load(Path("by-path/config.yaml").read_text())
    assert options["trainer"]["log_every_n_steps"] == 5


def test_a_damaged_checkpoint_is_named(trained, tmp_path):
    whole, path = (trained[0] / "checkpoints" / "last.ckpt").read_bytes(), tmp_path / "a.ckpt"
    weights = checkpoint(trained[0])["state_dict"]["head.weight"].numpy().tobytes()
    flipped = bytearray(whole)
    flipped[whole.index(weights) + 2] ^= 16
    for content in (b"", whole[:2], whole[: len(whole) // 2], whole[:-1], bytes(flipped)):
        path.write_bytes(content)
        line = error_of("validate", "--ckpt_path", path)
        assert line == f"{path} is damaged or incomplete"


@pytest.mark.parametrize(
    ("limit", "message"),
    [
        ("--trainer.max_epochs=1", "done 1 epochs of trainer.max_epochs=1 already: raise trainer."),
        ("--trainer.max_steps=10", "done 10 steps of trainer.max_steps=10 already: raise trainer."),
    ],
)
def test_a_complete_run_is_left_as_it_is(limit, message, trained):
    """A script that starts a run again until its exit code is 0 comes to an end."""
    run, _ = trained
    last = run / "checkpoints/last.ckpt"
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    said = done("fit", "--run", run, "--ckpt_path", "last", limit)
    assert said.out.startswith(f"nothing is left to do: {last} has {message}")
    assert said.out.count("\n") == 1
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before
    line = error_of(*FIT, "--ckpt_path", last, limit)
    assert line.startswith(f"{last} has {message}")
    assert not Path("refused").exists()


def test_weights_alone_are_no_run_to_go_on_with(trained, tmp_path):
    content = checkpoint(trained[0])
    del content["loops"]
    torch.save(content, tmp_path / "weights.ckpt")
    line = error_of(*FIT, "--ckpt_path", tmp_path / "weights.ckpt", EPOCHS.format(2))
    assert line.endswith("weights.ckpt holds weights alone, no training to go on with")
    assert not Path("refused").exists()


def test_a_training_of_an_earlier_version_is_refused(trained, tmp_path):
    content = checkpoint(trained[0])
    for each in content["moments"]:
        del each["replica"]
    torch.save(content, tmp_path / "old.ckpt")
    line = error_of(*FIT, "--ckpt_path", tmp_path / "old.ckpt", EPOCHS.format(2))
    assert "old.ckpt is of an earlier version" in line
    assert not Path("refused").exists()


def test_a_bug_keeps_its_traceback(place, monkeypatch):
    with pytest.raises(RuntimeError, match="a bug"):
        call(*stopped(3, fails=True), "--run", "failed")
    assert json.loads(Path("failed/summary.json").read_text())["status"] == "failed"

    # a ValueError that this package did not raise itself, in the midst of a step
    monkeypatch.setattr("torch.lstm", lambda *args: json.loads("a bug"))
    with pytest.raises(ValueError, match="Expecting value"):
        call(*FIT)
    assert not Path("refused").exists()


def test_train_py_without_arguments_runs_the_quickstart(monkeypatch, tmp_path):
    calls = []
    monkeypatch.setattr(cli, "main", calls.append)
    monkeypatch.chdir(tmp_path)
    for argv in (["train.py"], ["train.py", "test", "--ckpt_path=x"]):
        monkeypatch.setattr(sys, "argv", argv)
        runpy.run_path(str(TRAIN_PY), run_name="__main__")
    quickstart = TRAIN_PY.parent / "configs" / "quickstart.yaml"
    assert calls == [["fit", f"--config={quickstart}"], ["test", "--ckpt_path=x"]]
    assert quickstart.is_file()


def test_train_py_without_the_extra_says_what_to_install(tmp_path):
    (tmp_path / "lightning").mkdir()
    missing = "raise ModuleNotFoundError(\"No module named 'lightning'\", name='lightning')\n"
    (tmp_path / "lightning" / "__init__.py").write_text(missing)
    said = subprocess.run(
        [sys.executable, str(TRAIN_PY)],
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert said.returncode == 2
    assert said.stderr == 'error: lightning is missing: pip install "lm_softmax[train]"\n'


def test_a_process_of_its_own_says_nothing_but_the_error(place):
    said = subprocess.run(
        [sys.executable, str(TRAIN_PY), *FIT, "--model.head.cutoffs=[7,5]"],
        capture_output=True,
        text=True,
    )
    assert said.returncode == 2
    assert said.stdout == ""
    assert said.stderr == (
        "error: cutoffs must be strictly increasing inside (0, 15), got [7, 5]\n"
    )


def test_help_of_a_command_needs_nothing():
    said = call("validate", "--help")
    assert said.code == 0
    assert "--run" in said.out
