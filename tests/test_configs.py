"""Every configuration that is shipped parses, builds its model and takes steps on a tiny text."""

import csv
import os
import socket
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml

from lm_softmax import cli, factory
from lm_softmax.cli.command import FIT_CALLBACKS
from lm_softmax.heads import OutputHead
from lm_softmax.module import LanguageModel

CONFIGS = Path(__file__).parent.parent / "configs"
EXPERIMENTS = sorted(CONFIGS.glob("*.yaml"))
PUBLIC = {  # what the hub has of a corpus: folder, README, and files by split
    "wikitext103": (
        "wikitext",
        "wikitext-103-v1",
        {"train": 1, "validation": 1, "test": 1},
    ),
    "one_billion_word": ("lm1b", "data", {"train": 2, "test": 1}),
    "wikipedia": ("wikipedia", "20231101.en", {"train": 41}),
}
OVERLAYS = sorted((CONFIGS / "head").glob("*.yaml"))
PARALLEL = {  # overlay: what makes it one for two processes
    "ddp": [],
    "fsdp2": ["--trainer.strategy.data_parallel_size=2"],
    "vocab_parallel": [],
}


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """Options that point an experiment at a text of a few lines and stop it after two steps."""
    monkeypatch.chdir(tmp_path)
    words = "".join(f"w{number}\n" for number in range(12_000))  # past every cutoff
    for split, text in (("train", words), ("validation", words[:500]), ("test", words[:500])):
        Path(f"{split}.txt").write_text(text)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield [
        *(f"--data.path={tmp_path}", "--data.name=null"),
        *("--data.batch_size=4", "--data.eval_batch_size=4"),
        *("--trainer.max_steps=2", "--trainer.log_every_n_steps=1", "--trainer.accelerator=cpu"),
        *("--trainer.limit_val_batches=1", "--trainer.val_check_interval=2"),
        *("--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false"),
        *("--run", "run"),
    ]
    torch.set_num_threads(threads)


def test_there_are_configurations():
    assert [path.stem for path in EXPERIMENTS] == [
        "one_billion_word",
        "quickstart",
        "sparse",
        "wikipedia",
        "wikitext103",
        "wikitext2",
    ]
    assert [path.stem for path in OVERLAYS] == [
        "adaptive",
        "full",
        "hierarchical",
        "low_rank",
        "mixture",
        "nce",
        "product_quantized",
        "sampled_softmax",
    ]


def hub_layout(name, folder):
    """A corpus of three-word lines in the layout of the hub."""
    corpus, part, splits = PUBLIC[name]
    place = folder / corpus / part
    place.mkdir(parents=True)
    for split, number in splits.items():
        for file in range(number):
            lines = [f"w{file} w{line % 3} ." for line in range(max(40, 500 // number))]
            path = place / f"{split}-{file:05}-of-{number:05}.parquet"
            pq.write_table(pa.table({"text": lines}), path, row_group_size=10)
    if part.startswith(corpus):
        files = "".join(f"  - {{split: {s}, path: {part}/{s}-*}}\n" for s in splits)
        config = f"- config_name: {part}\n  data_files:\n{files}"
        (folder / corpus / "README.md").write_text(f"---\nconfigs:\n{config}---\n")


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.parametrize("config", EXPERIMENTS, ids=lambda path: path.stem)
def test_experiment_trains(config, tiny, tmp_path, monkeypatch):
    if config.stem in PUBLIC:
        monkeypatch.setenv("LM_SOFTMAX_DATA", str(tmp_path / "hub"))
        hub_layout(config.stem, tmp_path / "hub")
        tiny = tiny[2:]
    cli.main(["fit", "-c", str(config), *tiny])
    saved = torch.load("run/checkpoints/best.ckpt", weights_only=True)
    assert saved["global_step"] == 2
    asked = yaml.safe_load(config.read_text())["model"]
    for part in ("encoder", "head", "optimizer", "lr_scheduler"):
        found = saved["hyper_parameters"][part]
        assert found["class_path"].endswith(asked[part]["class_path"])
        if part not in ("encoder", "head"):
            assert asked[part]["init_args"].items() <= found["init_args"].items()


@pytest.mark.parametrize("overlay", OVERLAYS, ids=lambda path: path.stem)
def test_head_overlay_trains(overlay, tiny):
    cli.main(["fit", "-c", str(CONFIGS / "quickstart.yaml"), "-c", str(overlay), *tiny])
    saved = torch.load("run/checkpoints/last.ckpt", weights_only=True)["hyper_parameters"]
    asked = yaml.safe_load(overlay.read_text())["model"]["head"]
    assert saved["requested"]["head"]["class_path"] == f"lm_softmax.heads.{asked['class_path']}"
    assert saved["requested"]["head"]["init_args"].items() >= asked["init_args"].items()


@pytest.mark.parametrize("overlay", OVERLAYS, ids=lambda path: path.stem)
def test_head_overlay_is_complete(overlay):
    """Overlays of one class merge, so each names every option, with its default."""
    asked = yaml.safe_load(overlay.read_text())
    assert list(asked) == ["model"]
    assert list(asked["model"]) == ["head"]
    head = asked["model"]["head"]
    bare = {"class_path": f"lm_softmax.heads.{head['class_path']}", "init_args": {}}
    defaults = factory.complete(bare, OutputHead, "head")["init_args"]
    ours = {"ignore_index", "label_smoothing"} - set(head["init_args"])  # no choice of a run
    assert head["init_args"] == {key: value for key, value in defaults.items() if key not in ours}


@pytest.mark.skipif(sys.platform == "win32", reason="gloo needs POSIX")
@pytest.mark.slow
def test_parallel_overlays_train_on_two_processes(tiny):
    assert sorted(path.stem for path in (CONFIGS / "parallel").glob("*.yaml")) == sorted(PARALLEL)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    commands = []
    for overlay, options in PARALLEL.items():
        configs = [CONFIGS / "quickstart.yaml", CONFIGS / "parallel" / f"{overlay}.yaml"]
        words = [word for config in configs for word in ("-c", str(config))]
        words += [*tiny[:-1], overlay, *options, "--trainer.devices=2"]
        words += [f"--model.encoder.{kind}_dropout=0" for kind in ("input", "output")]
        commands.append(["fit", *words])
    program = f"from lm_softmax.cli import main\nfor words in {commands}: main(words)"
    environment = os.environ | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    running = [
        subprocess.Popen(
            [sys.executable, "-c", program],
            env=environment | {"NODE_RANK": "0", "LOCAL_RANK": str(rank), "OMP_NUM_THREADS": "1"},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    errors = [process.communicate()[1] for process in running]
    assert [process.returncode for process in running] == [0, 0], errors
    perplexities = []
    for overlay in PARALLEL:
        found = LanguageModel.load_from_checkpoint(f"{overlay}/checkpoints/last.ckpt")
        assert found.head.sample(torch.zeros(1, found.head.hidden_size)).shape == (1, 1)
        rows = csv.DictReader(Path(overlay, "metrics.csv").read_text().splitlines())
        perplexities += [float(row["val/ppl"]) for row in rows if row["val/ppl"]]
    # the same steps, however the model is dealt
    assert perplexities == pytest.approx([perplexities[0]] * len(PARALLEL), rel=1e-4)


def test_every_callback_is_there_by_default():
    names = [callback["class_path"].rpartition(".")[2] for callback in FIT_CALLBACKS]
    assert names == [
        "BetweenSteps",
        "StepTimeMonitor",
        "MemoryMonitor",
        "PerplexityMonitor",
        "SampleText",
        "RunSummary",
        "ModelCheckpoint",
        "LastCheckpoint",
        "FinalValidation",
        "LearningRateMonitor",
        "TQDMProgressBar",
    ]
