"""Every configuration that is shipped parses, builds its model and takes steps on a tiny text."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml

from lm_softmax import cli, factory
from lm_softmax.cli.command import FIT_CALLBACKS
from lm_softmax.heads import OutputHead

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


def test_every_callback_is_there_by_default():
    names = [callback["class_path"].rpartition(".")[2] for callback in FIT_CALLBACKS]
    assert names == [
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
