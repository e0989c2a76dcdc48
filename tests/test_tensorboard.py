"""The real TensorBoard server over the folders of two runs, read through its HTTP interface."""

import html
import json
import random
import re
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from lightning.pytorch.loggers import TensorBoardLogger
from tiny import Recorder, trainer

from lm_softmax.callbacks import (
    MemoryMonitor,
    PerplexityMonitor,
    RunSummary,
    SampleText,
    StepTimeMonitor,
)
from lm_softmax.data import TextDataModule
from lm_softmax.encoders import LSTMEncoder
from lm_softmax.heads import AdaptiveSoftmax, FullSoftmax
from lm_softmax.module import LanguageModel

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning"),  # lightning against torch
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
]

PATIENCE_S = 60


class Finished(NamedTuple):
    rows: list[tuple[int | None, dict[str, float]]]
    summary: dict[str, Any]
    text: str


@pytest.fixture(scope="module")
def logdir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> TextDataModule:
    folder = tmp_path_factory.mktemp("text")
    draw = random.Random(0)
    words = [f"word{number}" for number in range(60)]
    weights = [1 / (number + 1) for number in range(60)]
    files = {}
    for split, num_lines in (("train", 120), ("validation", 30)):
        files[split] = str(folder / f"{split}.txt")
        lines = [" ".join(draw.choices(words, weights, k=9)) + "\n" for _ in range(num_lines)]
        Path(files[split]).write_text("".join(lines))
    return TextDataModule(
        data_files=files,
        tokenizer="whitespace",
        max_vocab_size=50,
        batch_size=8,
        eval_batch_size=2,
        block_size=10,
        cache_dir=str(folder / "cache"),
    )


@pytest.fixture(scope="module")
def runs(logdir: Path, data: TextDataModule) -> dict[str, Finished]:
    """What two runs logged, one with each head."""
    finished = {}
    for name, head in (("adaptive", partial(AdaptiveSoftmax, cutoffs=[10])), ("full", FullSoftmax)):
        board = TensorBoardLogger(logdir, name="", version=name, default_hp_metric=False)
        sample, summary = SampleText("word1 word2"), RunSummary()
        run = trainer(
            logdir / name,
            StepTimeMonitor(warmup_steps=1),
            MemoryMonitor(),
            PerplexityMonitor(),
            sample,
            summary,
            logger=[board, recorder := Recorder()],
            max_epochs=2,
        )
        encoder = partial(LSTMEncoder, embedding_size=8, hidden_size=8)
        model = LanguageModel(encoder, head, data.vocab.counts, vocab=data.vocab)
        run.fit(model, datamodule=data)
        finished[name] = Finished(recorder.rows, summary.summary, sample.last_text)
    return finished


class Board:
    """A TensorBoard server's HTTP interface."""

    def __init__(self, url: str) -> None:
        self.url = url
        self._opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))

    def get(self, route: str, body: dict[str, Any] | None = None, **query: str) -> Any:
        url = f"{self.url}data/plugin/{route}?{urllib.parse.urlencode(query)}"
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
        with self._opener.open(request, timeout=10) as answer:
            return json.load(answer)

    def wait_for(self, condition: Callable[["Board"], Any], what: str) -> Any:
        """Asks until the server, which reads the files in the background, knows."""
        deadline = time.monotonic() + PATIENCE_S
        while True:
            try:
                if result := condition(self):
                    return result
                error = None
            except (urllib.error.URLError, ConnectionError) as caught:
                error = caught
            if time.monotonic() > deadline:
                pytest.fail(f"TensorBoard shows no {what} after {PATIENCE_S} s ({error})")
            time.sleep(0.2)


@pytest.fixture(scope="module")
def board(
    logdir: Path, runs: dict[str, Finished], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Board]:
    log = tmp_path_factory.mktemp("server") / "log"
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", str(logdir)]
    command += ["--host", "127.0.0.1", "--port", "0", "--reload_interval", "1"]
    with log.open("w") as output:
        server = subprocess.Popen(command, stdout=output, stderr=output)
    try:
        deadline = time.monotonic() + PATIENCE_S
        while not (address := re.search(r"at (http://127\.0\.0\.1:\d+/)", log.read_text())):
            if server.poll() is not None or time.monotonic() > deadline:
                pytest.fail(f"TensorBoard did not start:\n{log.read_text()}")
            time.sleep(0.1)
        board = Board(address[1])
        board.wait_for(
            lambda board: all(
                "final/ppl" in board.get("scalars/tags").get(name, {}) for name in runs
            ),
            "final metrics of both runs",
        )
        yield board
    finally:
        server.terminate()
        server.wait(timeout=20)


def test_scalars_are_what_was_logged(board: Board, runs: dict[str, Finished]) -> None:
    tags = board.get("scalars/tags")
    assert tags.keys() == runs.keys()
    for name, run in runs.items():
        logged = {tag for _, row in run.rows for tag in row}
        assert logged <= tags[name].keys()
        assert {"train/loss", "train/ppl", "val/nll", "val/ppl", "val/bits_per_byte"} <= logged
        for tag in ("train/ppl", "val/ppl", "perf/tokens_per_s", "perf/train_time_s"):
            points = board.get("scalars/scalars", run=name, tag=tag)
            # Of two values at one step (the time, when a validation follows) it keeps the later.
            expected = {step: row[tag] for step, row in run.rows if tag in row}
            assert {step: value for _, step, value in points} == pytest.approx(expected, rel=1e-6)


def test_hparams_tab_compares_the_runs(
    board: Board, runs: dict[str, Finished], data: TextDataModule
) -> None:
    def groups(board: Board) -> Any:
        wanted = {"startIndex": 0, "sliceSize": 10, "colParams": []}
        wanted["allowedStatuses"] = ["STATUS_SUCCESS", "STATUS_UNKNOWN", "STATUS_RUNNING"]
        found = board.get("hparams/session_groups", body=wanted).get("sessionGroups", [])
        return found if len(found) == len(runs) else None

    by_head = {}
    for group in board.wait_for(groups, "HParams of both runs"):
        values = {entry["name"]["tag"]: entry["value"] for entry in group["metricValues"]}
        by_head[group["hparams"]["head"]] = (group["hparams"], values)
    assert by_head.keys() == {"AdaptiveSoftmax", "FullSoftmax"}
    for run in runs.values():
        hparams, metrics = by_head[run.summary["head"]]
        assert hparams["vocab_size"] == 50
        assert hparams["vocab_fingerprint"] == data.vocab.fingerprint
        assert hparams["num_parameters"] == run.summary["num_parameters"]["total"]
        assert metrics["final/ppl"] == pytest.approx(run.summary["last"]["val/ppl"], rel=1e-6)
        speed = run.summary["perf"]["perf/tokens_per_s"]
        assert metrics["final/tokens_per_s"] == pytest.approx(speed, rel=1e-6)
        memory = run.summary["mem"]["mem/host_rss_gib"]
        assert metrics["final/host_rss_gib"] == pytest.approx(memory, rel=1e-6)
    assert json.loads(by_head["AdaptiveSoftmax"][0]["head_options"])["cutoffs"] == [10]


def test_hparams_tab_has_one_column_for_each_metric(board: Board) -> None:
    experiment = board.get("hparams/experiment", body={"experimentName": ""})
    tags = [info["name"]["tag"] for info in experiment["metricInfos"]]
    assert len(tags) == len(set(tags))
    assert "final/ppl" in tags
    assert "hp_metric" not in tags


def test_custom_scalars_draw_what_the_runs_log(board: Board) -> None:
    layout = board.wait_for(lambda board: board.get("custom_scalars/layout"), "layout")
    charts = {
        f"{category['title']}: {chart['title']}": chart["multiline"]["tag"]
        for category in layout["category"]
        for chart in category["chart"]
    }
    assert charts.keys() == {
        "Perplexity: perplexity",
        "Perplexity: bits per byte",
        "Loss: nats per token",
        "Speed: tokens per second",
        "Speed: step time (ms)",
        "Memory: memory (GiB)",
    }
    tags = board.get("scalars/tags")["full"]
    for patterns in charts.values():
        for pattern in patterns:
            assert [tag for tag in tags if re.match(pattern, tag)], pattern
    drawn = board.get("custom_scalars/scalars", run="full", tag=charts["Loss: nats per token"][1])
    assert len(drawn["tag_to_events"]["val/nll"]) == 2


def test_sample_text_is_shown_as_it_is(board: Board, runs: dict[str, Finished]) -> None:
    def texts(board: Board) -> Any:
        return board.get("text/text", run="full", tag="val/sample/text_summary")

    entries = board.wait_for(texts, "sample text")
    steps = [step for step, row in runs["full"].rows if "val/ppl" in row]
    assert [entry["step"] for entry in entries] == [step + 1 for step in steps]
    assert "<pre><code>" in entries[-1]["text"]
    shown = html.unescape(re.sub("<[^>]*>", "", entries[-1]["text"]))
    assert shown.strip() == runs["full"].text.strip()
    assert shown.strip().startswith("word1 word2 ")
