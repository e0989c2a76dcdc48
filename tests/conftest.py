"""What every test starts from: a seed, torch's defaults, no hub, caches of its own."""

import atexit
import os
import shutil
import sys
import tempfile

os.environ["HF_HUB_OFFLINE"] = "1"  # before anything imports the hub's client
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
if "PYTEST_XDIST_WORKER" in os.environ:  # several workers share the cores
    os.environ.setdefault("OMP_NUM_THREADS", "1")
CACHES = tempfile.mkdtemp(prefix="lm_softmax_tests_")  # the datasets library reads it at import
atexit.register(shutil.rmtree, CACHES, ignore_errors=True)
os.environ["HF_DATASETS_CACHE"] = os.path.join(CACHES, "datasets")
os.environ["LM_SOFTMAX_CACHE"] = os.path.join(CACHES, "tokens")

import pytest
import torch

import lm_softmax.kernels  # noqa: F401 its import makes the first large vector calls right

if not torch.cuda.is_available():  # Triton reads it once, at its import: kernels run in Python
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture(autouse=True)
def _fresh_torch():
    torch.manual_seed(0)
    if "torch._dynamo" in sys.modules:  # one function is compiled for few heads in a process
        torch.compiler.reset()
    yield
    assert torch.get_default_dtype() == torch.float32
    assert torch.is_grad_enabled()
