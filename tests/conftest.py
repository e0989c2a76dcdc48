"""What every test starts from: a seed, torch's defaults, no hub, a cache of its own."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before anything imports the hub's client
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import pytest
import torch

import lm_softmax.kernels  # noqa: F401  its import makes the first large vector calls right


@pytest.fixture(autouse=True)
def _fresh_torch():
    torch.manual_seed(0)
    yield
    assert torch.get_default_dtype() == torch.float32
    assert torch.is_grad_enabled()


@pytest.fixture(autouse=True)
def _own_caches(tmp_path_factory, monkeypatch):
    cache = tmp_path_factory.getbasetemp() / "caches"
    monkeypatch.setenv("LM_SOFTMAX_CACHE", str(cache / "tokens"))
    monkeypatch.setenv("HF_DATASETS_CACHE", str(cache / "datasets"))
