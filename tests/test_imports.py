"""Who imports what: a head costs torch alone."""

import subprocess
import sys

import pytest

HEAVY = ["lightning", "datasets", "tokenizers", "torchmetrics", "jsonargparse", "tensorboard"]
HEAVY += ["triton"]  # a softmax on a GPU alone needs it


def loaded(statement):
    """Which of the heavy packages a fresh interpreter has loaded after `statement`."""
    code = f"{statement}\nimport sys\nprint([m for m in {HEAVY} if m in sys.modules])"
    output = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True
    ).stdout
    return eval(output)


@pytest.mark.parametrize("module", ["lm_softmax", "lm_softmax.heads", "lm_softmax.encoders"])
def test_heads_and_encoders_load_torch_alone(module):
    found = loaded(f"import {module}")
    if module == "lm_softmax.encoders":  # torch's compiler, which is named there, loads Triton
        found = [name for name in found if name != "triton"]
    assert found == []


def test_the_check_can_fail():
    assert "torchmetrics" in loaded("import lm_softmax.heads, torchmetrics")
