"""`benchmark cutoffs`: the fit against constants that are known, and the command on tiny sizes."""

import numpy as np
import pyarrow as pa
import pytest
import torch
import yaml

from lm_softmax.benchmark import constants, cutoffs
from lm_softmax.benchmark.command import main
from lm_softmax.heads import AdaptiveSoftmax
from lm_softmax.heads.cost_model import COST_MODELS
from lm_softmax.heads.cutoffs import zipf_counts
from lm_softmax.vocab import Counts, SymbolCounter, Vocab, load_tokenizer

SHAPES = [(512, 64, 4000), (2000, 256, 100), (64, 16, 8000), (16, 8000, 32), (300, 300, 300)]


def seconds(multiply, move, rows, inner, outer):
    entries = rows * inner + rows * outer + inner * outer
    return multiply * rows * inner * outer + move * entries


@pytest.mark.parametrize(("multiply", "move"), [(2e-11, 4e-10), (5e-15, 1e-12), (1e-9, 1e-9)])
def test_fit_finds_the_constants(multiply, move):
    times = [(*shape, seconds(multiply, move, *shape)) for shape in SHAPES]
    assert constants.fit_products(times) == pytest.approx((multiply, move), rel=1e-6)


def test_an_interrupted_measurement_counts_little():
    times = [(*shape, seconds(2e-11, 4e-10, *shape)) for shape in SHAPES]
    times[2] = (*times[2][:3], 30 * times[2][3])
    assert constants.fit_products(times) == pytest.approx((2e-11, 4e-10), rel=1e-3)


def test_constants_of_a_known_machine_are_recovered(monkeypatch):
    """A clock that tells what the model predicts."""
    truth = COST_MODELS["cpu"]

    class Told(constants.Clock):
        def median(self, call):
            return call

    def of_step(clock, hidden_size, counts, tokens, ids, sizes):
        model = constants.replace(truth, tokens=tokens)
        return constants.predicted_time(model, hidden_size, counts, ids, sizes)

    def of_softmax(clock, rows, width, words):
        whole = constants._softmax_time(truth, rows, width, words)
        return whole - truth.parameter * words * (width + 1)  # no optimizer

    def of_product(clock, *shape):
        return max(truth.product, seconds(truth.multiply, truth.move, *shape))

    monkeypatch.setattr(constants, "Step", of_step)
    monkeypatch.setattr(constants, "_softmax", of_softmax)
    monkeypatch.setattr(constants, "_product", of_product)
    found = constants.measure(Told("cpu", torch.float32, 1), 256, truth.tokens)
    assert vars(found) == pytest.approx(vars(truth), rel=1e-4)


def test_targets_of_a_step_follow_the_counts():
    counts = torch.tensor([500, 300, 150, 50, 0])
    step = constants.Step(constants.Clock("cpu", torch.float32, 1), 8, counts, 20_000, [2], [4])
    shares = torch.bincount(step.target, minlength=5) / 20_000
    torch.testing.assert_close(shares, counts / 1000, atol=0.02, rtol=0)
    before = [parameter.clone() for parameter in step.head.parameters()]
    step()
    after = list(step.head.parameters())
    assert all(not torch.equal(old, new) for old, new in zip(before, after, strict=True))
    assert all(parameter.grad is None for parameter in after)


def test_hand_written_rules_fit_the_vocabulary():
    assert list(cutoffs.hand_written(zipf_counts(300_000))) == [
        "no clusters",
        "10 % and 25 % of the words",
        "thirds of the words",
        "80 % and 95 % of the text",
        "2000, 10000",
        "20000, 40000, 200000",
    ]
    few = cutoffs.hand_written(zipf_counts(40))
    assert few["10 % and 25 % of the words"] == [4, 14]
    assert few["thirds of the words"] == [13, 26]
    assert "2000, 10000" not in few
    assert list(cutoffs.hand_written(torch.ones(1))) == ["no clusters"]
    counts = torch.tensor([80, 10, 6, 4])
    assert cutoffs.hand_written(counts)["80 % and 95 % of the text"] == [1, 3]


@pytest.fixture
def tiny(monkeypatch):
    """Measurements of milliseconds, with constants that split small vocabularies."""
    monkeypatch.setattr(constants, "PRODUCTS", [(16, 8, 40), (32, 4, 20)])
    monkeypatch.setattr(constants, "SOFTMAXES", [(16, 8, 40)])
    monkeypatch.setattr(constants, "PARAMETERS", (200, 8))
    monkeypatch.setattr(cutoffs, "measure", measured)


def measured(clock, hidden_size, tokens):
    found = constants.measure(clock, hidden_size, tokens)
    assert all(value >= 0 for value in vars(found).values())
    assert found.tokens == tokens
    return COST_MODELS["cpu"]


def command(*arguments):
    return main(["cutoffs", *(str(argument) for argument in arguments)])


SMALL = ["--hidden-size=16", "--tokens=20", "--rounds=2"]


def test_command_prints_a_table_and_an_overlay(tiny, tmp_path, capsys):
    output = f"--output={tmp_path / 'made'}"
    assert command("--vocab-size=12000", *SMALL, "--measure", "--longest=0.08", output) == 0
    out = capsys.readouterr().out
    lines = {line.split("  ")[0]: line for line in out.splitlines()}
    ids = AdaptiveSoftmax(16, 12_000).cutoffs
    assert str(ids) in lines["auto"]
    assert lines["auto"].split()[-1] == "1.00"
    assert "predicted ms" in lines["rule"]
    assert "measured ms" in lines["rule"]
    assert len(lines["no clusters"].split()) < len(lines["2000, 10000"].split())  # too long
    start, end = out.index("# Clusters for 12,000 words"), out.index("\n\n", out.index("model:"))
    overlay = yaml.safe_load(out[start:end])
    assert overlay == yaml.safe_load((tmp_path / "made" / "cutoffs.yaml").read_text())
    assert overlay["model"]["head"]["init_args"]["cutoffs"] == ids


def test_command_writes_an_overlay_that_builds_the_head(tiny, tmp_path, capsys):
    (tmp_path / "counts.txt").write_text("\n".join(str(9000 // rank) for rank in range(1, 9001)))
    assert command(f"--counts={tmp_path / 'counts.txt'}", *SMALL, f"--output={tmp_path}") == 0
    head = yaml.safe_load((tmp_path / "cutoffs.yaml").read_text())["model"]["head"]
    assert head["class_path"] == "AdaptiveSoftmax"
    made = AdaptiveSoftmax(16, 9000, **head["init_args"])
    assert made.cutoffs == head["init_args"]["cutoffs"] != []
    assert "measured ms" in capsys.readouterr().out


def test_counts_come_from_a_vocabulary(tmp_path):
    counter = SymbolCounter()
    counter.update(Counts(pa.array(["a", "b", "c"], pa.large_string()), np.array([3, 9, 4])))
    vocab = Vocab.build(load_tokenizer("whitespace"), counter)
    vocab.save(tmp_path / "vocab.pt")
    assert cutoffs.read_counts(str(tmp_path / "vocab.pt")).tolist() == [9, 4, 3, 0, 0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--vocab-size=0"], "--vocab-size: must be at least 1, got 0"),
        (["--vocab-size=9", "--tokens=0"], "--tokens: must be at least 1, got 0"),
        (["--vocab-size=9", "--div-value=0.5"], "div_value must be at least 1, got 0.5"),
        (["--vocab-size=9", "--hidden-size=8", "--min-tail-size=0", "--div-value=9"], "[0]"),
        (["--counts=none.txt"], "No such file"),
        (["--counts=none.pt"], "no vocabulary or checkpoint file 'none.pt'"),
        (["--vocab-size=9", "--device=tpu9"], "tpu9"),
    ],
)
def test_wrong_options_are_one_line(arguments, message, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        command(*arguments, f"--output={tmp_path}")
    assert stop.value.code == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    assert message in said
    assert said.count("\n") == 1


@pytest.mark.parametrize("text", ["", "3\n5\n", "3\n-1\n", "3\nmany\n"])
def test_counts_that_are_not_ranked_are_refused(text, tmp_path):
    (tmp_path / "counts.txt").write_text(text)
    with pytest.raises(ValueError, match=r"counts.txt: "):
        cutoffs.read_counts(str(tmp_path / "counts.txt"))
