"""Factories survive being written down, and reading one runs nothing but the class it names."""

import re
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from jsonargparse import ArgumentParser
from torch import nn

from lm_softmax import factory
from lm_softmax.encoders import AdaptiveEmbedding, Encoder, LSTMEncoder
from lm_softmax.heads import AdaptiveSoftmax, FullSoftmax, OutputHead
from lm_softmax.module import HeadFactory

ADAPTIVE = {
    "class_path": "lm_softmax.heads.AdaptiveSoftmax",
    "init_args": {"cutoffs": [2, 5], "min_tail_size": 2},
}


class HereEncoder(LSTMEncoder):
    """An encoder of somebody else's module."""


@pytest.mark.parametrize(
    "made",
    [
        partial(AdaptiveSoftmax, cutoffs=(2, 5), min_tail_size=2),
        partial(partial(AdaptiveSoftmax, min_tail_size=2), cutoffs=[2, 5]),
        ADAPTIVE,
    ],
)
def test_same_description_however_it_was_given(made):
    assert factory.describe(made, "head") == ADAPTIVE


def test_describes_what_jsonargparse_makes():
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--head", type=HeadFactory)
    config = parser.parse_args(["--head=AdaptiveSoftmax", "--head.cutoffs=[2,5]"])
    made = parser.instantiate(config).head
    spec = factory.describe(made, "head")
    assert spec["class_path"] == "lm_softmax.heads.AdaptiveSoftmax"
    assert spec["init_args"]["cutoffs"] == [2, 5]
    assert factory.complete(spec, OutputHead, "head") == factory.complete(
        {**ADAPTIVE, "init_args": {"cutoffs": [2, 5]}}, OutputHead, "head"
    )


def test_nested_factories_and_odd_values():
    made = partial(
        LSTMEncoder,
        embedding=partial(AdaptiveEmbedding, cutoffs=[3]),
        hidden_size=4,
        extra={"path": Path("a/b"), "weight": torch.ones(2)},
    )
    spec = factory.describe(made, "encoder")
    assert spec["init_args"]["embedding"] == {
        "class_path": "lm_softmax.encoders.AdaptiveEmbedding",
        "init_args": {"cutoffs": [3]},
    }
    assert spec["init_args"]["extra"]["path"] == "a/b"
    assert torch.equal(spec["init_args"]["extra"]["weight"], torch.ones(2))


def test_paths_are_the_shortest_that_lead_there():
    assert factory.describe(torch.optim.AdamW, "o")["class_path"] == "torch.optim.AdamW"
    assert factory.describe(HereEncoder, "e")["class_path"] == f"{__name__}.HereEncoder"


def test_builds_with_nested_factories():
    spec = factory.describe(
        partial(LSTMEncoder, embedding_size=8, embedding=partial(AdaptiveEmbedding, cutoffs=[3])),
        "encoder",
    )
    encoder = factory.build(spec, Encoder, 10, None, name="encoder")
    assert isinstance(encoder.embedding, AdaptiveEmbedding)
    assert encoder.embedding.cutoffs == [3]


def test_complete_fills_every_option():
    spec = factory.complete(
        {"class_path": "lm_softmax.heads.full.FullSoftmax", "init_args": {}}, OutputHead, "head"
    )
    assert spec["class_path"] == "lm_softmax.heads.FullSoftmax"
    built = factory.build(spec, OutputHead, 4, 9, None, name="head")
    assert spec["init_args"]["bias"] is True
    assert isinstance(built, FullSoftmax)
    encoder = {"class_path": "lm_softmax.encoders.LSTMEncoder", "init_args": {}}
    nested = factory.complete(encoder, Encoder, "encoder")["init_args"]["embedding"]
    assert nested == {
        "class_path": "lm_softmax.encoders.WordEmbedding",
        "init_args": {"sparse": False},
    }


@pytest.mark.parametrize(
    "damaged", [{"init_args": [1]}, {"init_args": None}, {}, {"init_args": {}, "class_path": 3}, 7]
)
@pytest.mark.parametrize(
    "read",
    [
        lambda spec: factory.build(spec, OutputHead, 4, 9, None, name="head"),
        lambda spec: factory.complete(spec, OutputHead, "head"),
    ],
)
def test_a_damaged_written_form_is_one_line(read, damaged):
    if isinstance(damaged, dict):
        damaged = {"class_path": "lm_softmax.heads.FullSoftmax"} | damaged
    with pytest.raises(ValueError, match="head: expected class_path and init_args") as caught:
        read(damaged)
    assert "\n" not in str(caught.value)


def test_a_module_that_is_barred_from_import_holds_no_class(monkeypatch):
    monkeypatch.setitem(sys.modules, "barred", None)
    with pytest.raises(ValueError, match=r"hold no class barred\.Thing"):
        factory.find_class("barred.Thing", Encoder, "encoder")


class OddEncoder(LSTMEncoder):
    """Its default activation cannot be written down."""

    def __init__(self, vocab_size, counts=None, *, activation=torch.tanh, width=4):
        super().__init__(vocab_size, counts, embedding_size=width, hidden_size=width)


def test_complete_leaves_out_what_cannot_be_written():
    spec = factory.complete(factory.describe(OddEncoder, "encoder"), Encoder, "encoder")
    assert spec["init_args"] == {"width": 4}


def local_class():
    class Local(LSTMEncoder):
        pass

    return Local


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (lambda size: nn.Linear(size, size), "cannot be written into a checkpoint; give a class"),
        (partial(lambda size: nn.Linear(size, size)), "cannot be written into a checkpoint"),
        (partial(LSTMEncoder, 7), "cannot be written into a checkpoint; give a class"),
        (partial(LSTMEncoder, embedding=nn.Linear(2, 2)), "encoder.embedding: Linear("),
        (partial(LSTMEncoder, embedding=lambda v, e, c: nn.Embedding(v, e)), "encoder.embedding: "),
        (local_class(), "define the class at the top level of a module"),
        ({"init_args": {}}, "got {'init_args': 'dict'}"),
        ({"class_path": "a.b", "init_args": [1]}, "got {'class_path': 'str', 'init_args': 'list'}"),
        ({"class_path": "a.b", "options": {}}, "expected class_path and init_args"),
    ],
)
def test_refuses_what_cannot_be_written_down(made, message):
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        factory.describe(made, "encoder")
    assert str(caught.value).startswith("encoder")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("os.system", "os.system is not a concrete subclass of Encoder"),
        ("builtins.eval", "builtins.eval is not a concrete subclass of Encoder"),
        ("subprocess.Popen", "subprocess.Popen is not a concrete subclass of Encoder"),
        ("torch.nn.Linear", "torch.nn.Linear is not a concrete subclass of Encoder"),
        ("lm_softmax.encoders.Encoder", "is not a concrete subclass of Encoder"),
        ("lm_softmax.encoders.Nothing", "hold no class lm_softmax.encoders.Nothing"),
        ("this.Thing", "hold no class this.Thing; import its module first"),
        ("Thing", "hold no class Thing"),
    ],
)
def test_foreign_paths_run_and_import_nothing(path, message, tmp_path):
    proof = tmp_path / "proof"
    spec = {"class_path": path, "init_args": {"command": f"touch {proof}", "args": ["touch"]}}
    sys.modules.pop("this", None)
    with pytest.raises(ValueError, match=re.escape(message)):
        factory.build(spec, Encoder, f"touch {proof}", name="encoder")
    assert not proof.exists()
    assert "this" not in sys.modules


def test_foreign_nested_paths_are_refused():
    spec = factory.describe(LSTMEncoder, "encoder")
    spec["init_args"]["embedding"] = {"class_path": "os.system", "init_args": {}}
    with pytest.raises(ValueError, match=r"encoder.embedding: os.system is not a concrete"):
        factory.build(spec, Encoder, 10, None, name="encoder")


def test_a_type_that_torch_does_not_check_is_one_line():
    spec = {"class_path": "torch.optim.AdamW", "init_args": {"betas": None}}
    parameters = [torch.nn.Parameter(torch.zeros(1))]
    with pytest.raises(ValueError, match=r"^optimizer: torch.optim.AdamW refuses .*betas"):
        factory.build(spec, torch.optim.Optimizer, parameters, name="optimizer")


def test_a_value_that_torch_does_not_check_is_one_line():
    spec = {"class_path": "torch.optim.lr_scheduler.StepLR", "init_args": {"last_epoch": 3}}
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))])
    with pytest.raises(ValueError, match=r"StepLR refuses .*'initial_lr' is not") as caught:
        factory.build(spec, torch.optim.lr_scheduler.LRScheduler, optimizer, 9, name="schedule")
    assert "\n" not in str(caught.value)


class Sized(nn.Module):
    """Fails in torch for a size of 10**30, and in Python for one of 10**400."""

    def __init__(self, *, size):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1) * (size / 2) * torch.empty(size))


@pytest.mark.parametrize("size", [10**30, 10**400, None])
def test_a_number_that_is_too_large_is_one_line(size):
    spec = {"class_path": f"{__name__}.Sized", "init_args": {"size": size}}
    refused = (TypeError, "unsupported|must be") if size is None else (ValueError, "head: .* refus")
    with pytest.raises(refused[0], match=refused[1]) as caught:
        factory.build(spec, nn.Module, name="head")
    assert size is None or "\n" not in str(caught.value)


def test_an_unknown_option_names_the_class():
    with pytest.raises(ValueError, match=r"head: lm_softmax.heads.FullSoftmax .*'cutoffs'"):
        factory.build(
            {"class_path": "lm_softmax.heads.FullSoftmax", "init_args": {"cutoffs": [1]}},
            OutputHead,
            4,
            9,
            None,
            name="head",
        )
