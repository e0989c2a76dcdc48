"""`benchmark loop`: what is trained, where, and what is written."""

import csv
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from lm_softmax.benchmark import main
from lm_softmax.benchmark.loops import EncoderSizes, Text
from lm_softmax.benchmark.plain_loop import PlainLoop
from lm_softmax.benchmark.processes import KILLED, OwnProcess
from lm_softmax.data.batching import StreamBatches

LOOP = ["loop", "--vocab-size", "50", "--batch-size", "2", "--block-size", "3", "--steps", "3"]
LOOP += ["--warmups", "1", "--rounds", "2", "--embedding-size", "4", "--hidden-size", "16"]


def test_loop_prints_a_table_and_writes_two_files(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "model.yaml").write_text(
        "model:\n"
        "  encoder: {class_path: LSTMEncoder, init_args: {embedding_size: 4, hidden_size: 8}}\n"
        "  head: {class_path: FullSoftmax}\n"
        "  optimizer: {class_path: torch.optim.SGD, init_args: {lr: 0.1}}\n"
        "trainer: {gradient_clip_val: 0.5}\n"
    )
    config = str(tmp_path / "model.yaml")
    words = [*LOOP, "--heads", "AdaptiveSoftmax(cutoffs=[20])", "FullSoftmax@30"]
    words += ["--configs", config, "--torch", "adaptive", "full@40", "--torch-cutoffs", "10", "99"]
    assert main([*words, "--output", str(tmp_path / "out")]) == 0
    out, _ = capsys.readouterr()
    assert "ratio is tokens/s over those of torch adaptive" in out
    found = json.loads((tmp_path / "out" / "loop.json").read_text())
    assert found["reference"] == "torch adaptive"
    assert [(loop["name"], loop["vocab_size"]) for loop in found["loops"]] == [
        ("AdaptiveSoftmax(cutoffs=[20])", 50),
        ("FullSoftmax @30", 30),
        (config, 50),
        ("torch adaptive", 50),
        ("torch full @40", 40),
    ]
    for loop in found["loops"]:
        assert loop["tokens_per_s"]["min"] > 0
        assert len(loop["rounds_tokens_per_s"]) == 2
        assert abs(loop["last_loss"] - math.log(loop["vocab_size"])) < 1.5
    assert found["loops"][3]["ratio"] == {"min": 1.0, "median": 1.0, "max": 1.0}
    assert "cutoffs [10]" in found["loops"][3]["what"]
    assert "cutoffs=[20]" in found["loops"][0]["what"]
    assert "SGD(lr=0.1)" in found["loops"][2]["what"]
    with (tmp_path / "out" / "loop.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["loop", "vocab_size", "measure", "unit", "min", "median", "max"]
    assert len(rows) == 10


def test_loop_trains_what_it_says(tmp_path: Path) -> None:
    text = Text(50, "zipf", 2, 3, 1, 4, 0)
    loop = PlainLoop(text, "cpu", 0.25, "adaptive", EncoderSizes(4, 16, 1), [10], 0.05)
    stream = StreamBatches(text.ids().numpy(), 0, batch_size=2, block_size=3)  # type: ignore[arg-type]
    batches = [stream[i] for i in range(len(stream))]
    assert torch.equal(torch.cat([batch.tokens for batch in batches], 1), loop._inputs)
    assert torch.equal(torch.cat([batch.target for batch in batches], 1), loop._targets)
    first = loop.run().loss
    for _ in range(4):
        loop.run()
    assert loop.run().loss < first


def test_as_used_a_loop_has_a_process_of_its_own(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [*LOOP, "--heads", "--torch", "full@40", "--as-used", "--output", str(tmp_path)]
    assert main(words) == 0
    assert "a process each, pages kept as train.py keeps them" in capsys.readouterr().out
    (loop,) = json.loads((tmp_path / "loop.json").read_text())["loops"]
    assert loop["what"] == ("nn.Embedding, nn.LSTM, nn.Linear and F.cross_entropy, AdamW(lr=0.001)")
    assert len(loop["rounds_tokens_per_s"]) == 2
    assert abs(loop["last_loss"] - math.log(40)) < 1.5


def test_as_used_only_our_loops_keep_pages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept: dict[str, bool] = {}

    class Here(OwnProcess):
        def __init__(self, make: Any, arguments: Any, **how: Any) -> None:
            kept[make.__name__] = how["keeps_pages"]
            self.made = make(*arguments)

        def call(self, method: str) -> Any:
            return getattr(self.made, method)()

        def close(self) -> None:
            kept["closed"] = True

    monkeypatch.setattr("lm_softmax.benchmark.loop_command.OwnProcess", Here)
    assert (
        main(
            [
                *LOOP,
                "--heads",
                "FullSoftmax",
                "--torch",
                "full",
                "--as-used",
                "--output",
                str(tmp_path),
            ]
        )
        == 0
    )
    assert kept == {"LightningLoop": True, "PlainLoop": False, "closed": True}


def test_a_loop_whose_process_is_killed_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def killed(self: OwnProcess, method: str) -> Any:
        raise RuntimeError(KILLED)

    monkeypatch.setattr(OwnProcess, "call", killed)
    output = tmp_path / "none"
    words = [*LOOP, "--heads", "--torch", "full@40", "--as-used", "--output", str(output)]
    with pytest.raises(SystemExit, match="2"):
        main(words)
    assert capsys.readouterr().err == f"error: torch full @40: {KILLED}\n"
    assert not output.exists()
