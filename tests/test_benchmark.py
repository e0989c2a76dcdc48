"""The benchmark: who takes part, what is refused, what is counted, and what is written."""

import csv
import json
import math
import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from lm_softmax import heads
from lm_softmax.benchmark import main, memory, peers
from lm_softmax.benchmark import text as text_pipelines
from lm_softmax.benchmark.agreement import is_wrong, true_loss
from lm_softmax.benchmark.command import make_parser
from lm_softmax.benchmark.contestants import Contestant, Loss, Workshop
from lm_softmax.benchmark.line_up import default_specs, head_classes, line_up, make_head
from lm_softmax.benchmark.memory import Memory
from lm_softmax.benchmark.plot import draw
from lm_softmax.benchmark.problem import Problem
from lm_softmax.benchmark.report import as_csv, table
from lm_softmax.benchmark.results import Result, Spread, compare
from lm_softmax.benchmark.steps import Apart, Here, optimizer_factory
from lm_softmax.benchmark.timing import FORWARD, FORWARD_BACKWARD, OPTIMIZER, time_rounds
from lm_softmax.benchmark.train import check
from lm_softmax.heads import AdaptiveSoftmax, FullSoftmax
from lm_softmax.specs import Spec, parse_spec

TINY = Problem(vocab_size=60, num_tokens=40, hidden_size=32, dtype="float64")
ADAPTIVE = "AdaptiveSoftmax(cutoffs=[10, 30])"
TORCH_ADAPTIVE = "torch adaptive [10, 30]"
CHUNKED = pytest.mark.skipif(
    not hasattr(F, "linear_cross_entropy"), reason="torch has no linear_cross_entropy"
)


def specs(*texts: str) -> list[Spec]:
    return [parse_spec(text) for text in texts]


def entry_of(name: str, problem: Problem = TINY, *texts: str) -> Any:
    entries, _ = line_up(problem, specs(*(texts or ("FullSoftmax", ADAPTIVE))))
    return next(entry for entry in entries if entry.name == name)


# Heads by name and options


def test_spec_is_a_name_or_a_call_of_literals() -> None:
    assert parse_spec("FullSoftmax") == Spec("FullSoftmax")
    spec = parse_spec(" AdaptiveSoftmax( cutoffs=[2_000, 10_000], div_value=2.0)")
    assert spec.name == "AdaptiveSoftmax"
    assert spec.options == {"cutoffs": [2000, 10000], "div_value": 2.0}
    assert str(spec) == "AdaptiveSoftmax(cutoffs=[2000, 10000], div_value=2.0)"


@pytest.mark.parametrize(
    "text",
    [
        "",
        "Full Softmax",
        "FullSoftmax(",
        "FullSoftmax(3)",
        "FullSoftmax(**{})",
        "FullSoftmax(bias=open('x'))",
        "__import__('os').system('true')",
        "lm_softmax.FullSoftmax",
        "[FullSoftmax]",
    ],
)
def test_other_text_is_no_spec_and_runs_nothing(text: str) -> None:
    with pytest.raises(ValueError, match="expected Name or Name"):
        parse_spec(text)


def test_every_exported_head_takes_part_by_its_class_name() -> None:
    exported = [getattr(heads, name) for name in heads.__all__]
    concrete = [
        cls.__name__
        for cls in exported
        if isinstance(cls, type)
        and issubclass(cls, heads.OutputHead)
        and cls is not heads.OutputHead
    ]
    assert [str(spec) for spec in default_specs()] == concrete
    entries, _ = line_up(Problem(3000, 4, 16), default_specs())
    assert [entry.name for entry in entries if entry.kind == "head"] == concrete


def test_a_new_head_appears_without_a_change_here(monkeypatch: pytest.MonkeyPatch) -> None:
    class NewSoftmax(FullSoftmax):
        """Another head."""

    monkeypatch.setattr(heads, "NewSoftmax", NewSoftmax, raising=False)
    monkeypatch.setattr(heads, "__all__", [*heads.__all__, "NewSoftmax"])
    results, contestants = check(TINY, line_up(TINY, specs("NewSoftmax"))[0])
    assert "NewSoftmax" in contestants
    assert next(result for result in results if result.name == "NewSoftmax").truth is None


def test_options_reach_the_head_and_biases_can_be_left_out() -> None:
    spec = parse_spec("AdaptiveSoftmax(cutoffs=[5], min_tail_size=3)")
    head = make_head(spec, TINY, TINY.counts(), bias=False)
    assert isinstance(head, AdaptiveSoftmax)
    assert (head.cutoffs, head.bias) == ([5], None)
    assert head.weight.dtype == torch.float64
    given = make_head(parse_spec("FullSoftmax(bias=True)"), TINY, TINY.counts(), bias=False)
    assert isinstance(given, FullSoftmax)
    assert given.bias is not None


# Problem


def test_zipf_targets_follow_the_law_and_the_seed() -> None:
    problem = Problem(vocab_size=50, num_tokens=200_000, hidden_size=1)
    hidden, target = problem.inputs()
    assert hidden.requires_grad
    shares = torch.bincount(target, minlength=50).double() / len(target)
    expected = 1 / torch.arange(1, 51, dtype=torch.float64)
    torch.testing.assert_close(shares, expected / expected.sum(), atol=4e-3, rtol=0)
    again = problem.inputs()
    assert torch.equal(again[0], hidden)
    assert torch.equal(again[1], target)
    assert not torch.equal(Problem(50, 200_000, 1, seed=1).inputs()[1], target)


def test_targets_of_a_corpus_are_its_first_ids_below_the_vocabulary(tmp_path: Path) -> None:
    np.save(tmp_path / "ids.npy", np.array([0, 9, 0, 1, 2, 0, 1], dtype=np.uint16))
    problem = Problem(3, 4, 2, targets=str(tmp_path / "ids.npy"))
    assert problem.inputs()[1].tolist() == [0, 0, 1, 2]
    assert problem.counts().tolist() == [3, 2, 1]
    with pytest.raises(ValueError, match="holds 6 tokens below id 3, 7 are asked for"):
        Problem(3, 7, 2, targets=str(tmp_path / "ids.npy")).inputs()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (np.zeros(3), "whole numbers in one dimension, got float64"),
        (np.zeros((2, 2), dtype=int), r"got int64 \(2, 2\)"),
        (np.array([1, -1]), "must be at least 0"),
        (np.array([], dtype=int), "there must be some"),
    ],
)
def test_file_of_something_else_is_refused(tmp_path: Path, content: Any, message: str) -> None:
    np.save(tmp_path / "ids.npy", content)
    with pytest.raises(ValueError, match=message):
        Problem(3, 1, 2, targets=str(tmp_path / "ids.npy")).counts()


# Agreement


def test_truth_is_torchs_in_float64() -> None:
    workshop = Workshop(TINY)
    hidden, target = workshop.inputs
    full = workshop.head(entry_of("FullSoftmax"))
    assert isinstance(full, FullSoftmax)
    expected = F.cross_entropy(F.linear(hidden, full.weight, full.bias), target).item()
    assert true_loss(full, hidden, target) == pytest.approx(expected, rel=1e-12)
    entry = entry_of(TORCH_ADAPTIVE)
    adaptive = workshop.head(entry)
    loss = workshop.build(entry).forward()
    assert loss is not None
    assert true_loss(adaptive, hidden, target) == pytest.approx(loss.item(), rel=1e-12)


@pytest.mark.parametrize("option", ["softcap=5.0", "z_loss=0.1", "label_smoothing=0.1"])
def test_other_objectives_have_no_truth_and_no_peers(option: str) -> None:
    name = f"FullSoftmax({option})"
    results, contestants = check(TINY, line_up(TINY, specs(name))[0])
    (result,) = (result for result in results if result.name == name)
    assert result.truth is None
    assert result.name in contestants
    assert result.group == name


@pytest.mark.parametrize(
    ("dtype", "error", "wrong"),
    [
        (torch.float64, 1e-8, True),
        (torch.float32, 1e-6, False),
        (torch.float32, 1e-3, True),
        (torch.bfloat16, 1e-2, False),
        (torch.bfloat16, 5.5e-2, True),
    ],
)
def test_tolerance_goes_with_the_dtype(dtype: torch.dtype, error: float, wrong: bool) -> None:
    assert is_wrong(9.0 * (1 + error), 9.0, dtype) is wrong
    assert is_wrong(math.nan, 9.0, dtype)
    assert is_wrong(math.inf, None, dtype)
    assert not is_wrong(3.0, None, dtype)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_all_contestants_agree(dtype: str) -> None:
    problem = Problem(60, 40, 32, dtype=dtype)
    entries, absent = line_up(problem, specs("FullSoftmax", ADAPTIVE))
    results, contestants = check(problem, entries)
    assert [result.problem for result in results] == [""] * len(results)
    assert {"plain full softmax", "FullSoftmax", ADAPTIVE, TORCH_ADAPTIVE} <= set(contestants)
    assert {"products alone, full", "products alone [10, 30]"} <= set(contestants)
    assert absent["Liger"] == "needs CUDA"
    assert absent["Cut Cross-Entropy"] == "needs CUDA"
    for result in results:
        assert (result.loss is None) == (result.kind == "floor")


@CHUNKED
def test_torchs_chunked_form_takes_part() -> None:
    entries, absent = line_up(TINY, specs("FullSoftmax"))
    assert peers.CHUNKED in [entry.name for entry in entries]
    assert peers.CHUNKED not in absent


def test_low_precision_adds_the_plain_softmax_with_wide_logits() -> None:
    problem = Problem(60, 40, 32, dtype="bfloat16")
    names = [entry.name for entry in line_up(problem, specs("FullSoftmax"))[0]]
    assert peers.PLAIN_FLOAT in names


@pytest.mark.parametrize("without_gradients", [True, False])
def test_a_peer_with_another_loss_is_not_timed(
    monkeypatch: pytest.MonkeyPatch, without_gradients: bool
) -> None:
    def wrong(hidden: Any, target: Any, weight: Any, bias: Any) -> Any:
        loss = peers.plain(hidden, target, weight, bias)
        return loss * 1.001 if torch.is_grad_enabled() != without_gradients else loss

    monkeypatch.setattr(peers, "_chunked", lambda: wrong)
    results, contestants = check(TINY, line_up(TINY, specs("FullSoftmax"))[0])
    assert peers.CHUNKED not in contestants
    (result,) = (result for result in results if result.name == peers.CHUNKED)
    assert result.problem.startswith("wrong loss with")
    assert ("without" in result.problem) is without_gradients
    assert f"not timed: {peers.CHUNKED}: wrong loss" in table(results, [])


def test_a_peer_that_fails_is_named_and_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*tensors: Any) -> Any:
        raise AssertionError("unsupported\nshape")

    monkeypatch.setattr(peers, "_chunked", lambda: fail)
    results, contestants = check(TINY, line_up(TINY, specs("FullSoftmax"))[0])
    assert peers.CHUNKED not in contestants
    assert "FullSoftmax" in contestants
    (result,) = (result for result in results if result.name == peers.CHUNKED)
    assert result.problem == "failed: unsupported"


def test_peers_that_are_not_installed_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for package in ("liger_kernel", "cut_cross_entropy"):
        monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.delattr(F, "linear_cross_entropy", raising=False)
    problem = Problem(60, 40, 32, device="cuda")
    found, absent = peers.full_peers(problem, lambda: FullSoftmax(32, 60), bias=True)
    assert set(absent) == {peers.LIGER, peers.CCE, peers.CHUNKED}
    assert "2.13" in absent[peers.CHUNKED]
    assert "import" in absent[peers.LIGER]
    assert [entry.name for entry in found] == [peers.PLAIN, peers.COMPILED]


def test_gradients_of_torchs_adaptive_softmax_are_the_heads() -> None:
    workshop = Workshop(TINY)
    gradients = []
    for name in (ADAPTIVE, TORCH_ADAPTIVE):
        contestant = workshop.build(entry_of(name))
        contestant.forward_backward()
        assert isinstance(contestant, Loss)
        gradients.append(contestant.hidden.grad)
        contestant.clear()
        assert contestant.hidden.grad is None
    torch.testing.assert_close(*gradients)


# Floors


@pytest.mark.parametrize("name", ["full", "[10, 30]"])
@pytest.mark.parametrize("most_logits", [None, 60 * 8 * 7])
def test_floor_does_the_products_of_its_peer(
    name: str, most_logits: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    if most_logits is not None:  # several chunks
        monkeypatch.setattr("lm_softmax.benchmark.floors.MOST_LOGITS", most_logits)
    workshop = Workshop(TINY)
    peer, floor = (
        ("plain full softmax", "products alone, full")
        if name == "full"
        else (TORCH_ADAPTIVE, "products alone [10, 30]")
    )
    flops = []
    for contestant in (workshop.build(entry_of(peer)), workshop.build(entry_of(floor))):
        for step in (contestant.forward, contestant.forward_backward):
            with FlopCounterMode(display=False) as counter:
                step()
            flops.append(counter.get_total_flops())
    assert flops[0] > 0
    assert flops[:2] == flops[2:]


# Times


class Counting(Contestant):
    def __init__(self, name: str, log: list[str], parameter: Any = None, fail: int = 10**9) -> None:
        self.name, self.log, self.fail = name, log, fail
        self._parameters = [] if parameter is None else [parameter]

    def forward(self) -> None:
        self.log.append(f"{self.name} forward")

    def forward_backward(self) -> None:
        self.log.append(f"{self.name} both")
        if self.log.count(f"{self.name} both") > self.fail:
            raise RuntimeError("out of memory\nby much")
        for parameter in self._parameters:
            parameter.sum().backward()

    def parameters(self) -> list[nn.Parameter]:
        return self._parameters

    def after_step(self) -> None:
        self.log.append(f"{self.name} after step")


def test_contestants_take_turns_and_warm_ups_do_not_count() -> None:
    log: list[str] = []
    contestants = {name: Here(Counting(name, log)) for name in "abc"}
    times, failures = time_rounds(contestants, 2, num_warmups=1)
    order = "".join(line[0] for line in log if line.endswith("both"))
    assert order == "cab" + "abc" + "bca"
    assert failures == {}
    for rounds in times.values():
        assert set(rounds) == {FORWARD, FORWARD_BACKWARD}
        assert all(len(values) == 2 and min(values) >= 0 for values in rounds.values())


def test_the_optimizer_is_timed_and_changes_no_weight() -> None:
    log: list[str] = []
    parameter = nn.Parameter(torch.ones(3))
    make = optimizer_factory(parse_spec("AdamW(weight_decay=0.5)"))
    times, _ = time_rounds({"a": Here(Counting("a", log, parameter), make)}, 3)
    assert len(times["a"][OPTIMIZER]) == 3
    assert log.count("a after step") == 4
    assert parameter.tolist() == [1, 1, 1]
    assert parameter.grad is None


def test_an_optimizer_that_takes_no_sparse_gradients_is_left_out() -> None:
    class Sparse(Counting):
        def forward_backward(self) -> None:
            (parameter,) = self._parameters
            F.embedding(torch.tensor([0]), parameter, sparse=True).sum().backward()

    sparse = Sparse("a", [], nn.Parameter(torch.ones(3, 2)))
    times, failures = time_rounds({"a": Here(sparse, optimizer_factory(Spec("AdamW")))}, 2)
    assert failures == {}
    assert set(times["a"]) == {FORWARD, FORWARD_BACKWARD}


def test_who_fails_in_a_round_is_out() -> None:
    log: list[str] = []
    contestants = {"a": Here(Counting("a", log, fail=2)), "b": Here(Counting("b", log))}
    times, failures = time_rounds(contestants, 3)
    assert failures == {"a": "out of memory"}
    assert list(times) == ["b"]
    assert len(times["b"][FORWARD]) == 3


def test_a_process_of_its_own_times_the_same_parts() -> None:
    problem = Problem(vocab_size=50, num_tokens=8, hidden_size=4)
    entry = entry_of(peers.PLAIN, problem)
    asked = problem, entry.name, entry.spec
    how: dict[str, Any] = {"bias": True, "optimizer": Spec("AdamW"), "num_threads": 1}
    plain, killed = Apart(*asked, **how, keeps_pages=False), Apart(*asked, **how, keeps_pages=True)
    steps = {"plain": plain, "killed": killed}
    killed.step()
    assert killed._process.pid is not None
    os.kill(killed._process.pid, signal.SIGKILL)
    times, failures = time_rounds(steps, 2)
    assert set(times) == {"plain"}
    assert {part: len(values) for part, values in times["plain"].items()} == {
        FORWARD: 2,
        FORWARD_BACKWARD: 2,
        OPTIMIZER: 2,
    }
    assert failures == {"killed": "the process was killed, perhaps for its memory"}
    assert not any(Path(f"/proc/{one._process.pid}").exists() for one in steps.values())


# Memory


def test_memory_is_the_high_water_mark_of_one_step_in_another_process() -> None:
    problem = Problem(vocab_size=20_000, num_tokens=128, hidden_size=8)
    found = memory.measure(problem, entry_of(peers.PLAIN, problem), bias=True, num_threads=1)
    logits = 128 * 20_000 * 4 / 2**20
    gradients = (20_000 * 9 + 128 * 8) * 4 / 2**20
    assert found.gradients_mib == pytest.approx(gradients)
    assert 2 * logits < found.extra_mib < 4 * logits + gradients + 8
    assert found.peak_mib > found.extra_mib


EARLIER_PEAK = """
import torch
from lm_softmax.benchmark.memory import high_water

torch.ones(2**26)
before, peak = high_water(lambda: torch.ones(2**24), "cpu")  # 64 MiB, freed at once
print((peak - before) / 2**20)
"""


def test_an_earlier_peak_does_not_count() -> None:
    done = subprocess.run(
        [sys.executable, "-c", EARLIER_PEAK], capture_output=True, text=True, check=True
    )
    assert float(done.stdout) == pytest.approx(64, abs=4)


def test_without_a_high_water_mark_there_is_no_figure(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(memory, "CLEAR_REFS", tmp_path / "no" / "clear_refs")
    with pytest.raises(RuntimeError, match="no high-water mark that can be reset"):
        memory.high_water(lambda: None, "cpu")
    result = Result(10, "a", "head", "a", "", memory_problem="no such mark")
    result.add_rounds({FORWARD: [1.0], FORWARD_BACKWARD: [3.0]})
    text = table([result], [])
    assert "no memory: a: no such mark" in text
    assert text.splitlines()[3].split()[-3:] == ["-", "-", "-"]
    assert "memory" not in as_csv([result], [])


# Results


def example() -> list[Result]:
    results = []
    for name, kind, together, extra in (
        ("plain full softmax", "standard", [40.0, 20.0, 30.0], 100.0),
        ("FullSoftmax", "head", [20.0, 5.0, 10.0], 25.0),
        ("NCE", "head", [10.0, 10.0, 10.0], None),
        ("products alone, full", "floor", [10.0, 5.0, 5.0], None),
    ):
        group = "NCE" if name == "NCE" else "full"
        result = Result(1000, name, kind, group, "what")  # type: ignore[arg-type]
        result.add_rounds({FORWARD: [2.0, 1.0, 3.0], FORWARD_BACKWARD: together})
        if extra is not None:
            result.memory = Memory(extra, 1.0, 500.0)
        result.speed_up = [b / a for a, b in zip(together, [40.0, 20.0, 30.0], strict=True)]
        results.append(result)
    return results


def test_backward_is_both_less_forward_round_by_round() -> None:
    result = example()[1]
    assert result.rounds["backward"] == [18.0, 4.0, 7.0]
    assert result.spread("backward") == Spread(4.0, 7.0, 18.0)


def test_heads_are_compared_in_the_same_round() -> None:
    pairs = list(compare(example()))
    assert [(pair.head, pair.other) for pair in pairs] == [
        ("FullSoftmax", "plain full softmax"),
        ("FullSoftmax", "products alone, full"),
    ]
    assert pairs[0].times_faster == Spread(2.0, 3.0, 4.0)
    assert pairs[0].memory_ratio == 0.25
    assert pairs[1].time_ratio == Spread(1.0, 2.0, 2.0)
    assert pairs[1].memory_ratio is None
    more = list(compare(example(), ["FullSoftmax"]))
    assert ("NCE", "FullSoftmax") in [(pair.head, pair.other) for pair in more]


def test_picture_has_four_panels_of_what_was_measured() -> None:
    figure = draw(example(), ["how"])
    titles = [axes.get_title() for axes in figure.axes]
    assert titles == ["forward", "backward", "memory of a step", "speed-up over the plain softmax"]
    drawn = [
        {
            str(bars.get_label()): bars.lines[0].get_ydata().tolist()  # type: ignore[union-attr]
            for bars in axes.containers
        }
        for axes in figure.axes
    ]
    assert drawn[0]["FullSoftmax"] == [2.0]
    assert drawn[1]["FullSoftmax"] == [7.0]
    assert drawn[2] == {"plain full softmax": [100.0], "FullSoftmax": [25.0]}
    assert drawn[3]["FullSoftmax"] == [3.0]
    assert all(axes.get_xlabel() == "vocabulary size (words)" for axes in figure.axes)
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert labels == ["plain full softmax", "FullSoftmax", "NCE", "products alone, full"]
    assert [text.get_text() for text in figure.texts] == ["how"]


# Commands

TRAIN = ["train", "--tokens", "24", "--hidden-size", "16", "--rounds", "2", "--threads", "1"]


def test_train_prints_a_table_and_writes_three_files(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = [peers.PLAIN, "FullSoftmax", ADAPTIVE, TORCH_ADAPTIVE]
    floors = ["products alone, full", "products alone [10, 30]"]
    words = [*TRAIN, "--vocab-sizes", "60", "40", "--heads", "FullSoftmax", ADAPTIVE]
    words += ["--without", "linear_cross_entropy", "--no-memory", "--output", str(tmp_path)]
    assert main([*words, "--against", TORCH_ADAPTIVE]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert out.index("vocabulary 40") < out.index("vocabulary 60")
    assert "absent: Liger: needs CUDA" in out
    assert "linear_cross_entropy:" not in out

    found = json.loads((tmp_path / "train.json").read_text())
    assert set(found) == {
        *("format", "command", "machine", "versions", "options"),
        *("contestants", "comparisons", "absent"),
    }
    assert found["command"].startswith("python -m lm_softmax.benchmark train --tokens 24")
    assert found["machine"]["threads"] == 1
    assert (
        found["versions"]["torch"] == torch.__version__.partition("+")[0]
        or "+" in (found["versions"]["torch"])
    )
    assert found["options"]["keep_pages"] is False
    listed = [(row["vocab_size"], row["name"]) for row in found["contestants"]]
    assert listed == [(size, name) for size in (40, 60) for name in [*names, *floors]]
    for row in found["contestants"]:
        assert row["problem"] == ""
        assert row["memory"] is None
        for part in ("forward", "forward_backward", "backward"):
            spread = row[f"{part}_ms"]
            assert spread["min"] <= spread["median"] <= spread["max"]
        assert ("optimizer_ms" in row) == (row["kind"] != "floor")
        assert len(row["rounds_ms"]["forward"]) == 2
        if row["kind"] != "floor":
            assert row["loss"] == pytest.approx(row["loss_float64"], rel=1e-4)
    pairs = [(pair["head"], pair["other"]) for pair in found["comparisons"][:5]]
    assert pairs == [
        ("FullSoftmax", peers.PLAIN),
        ("FullSoftmax", TORCH_ADAPTIVE),
        ("FullSoftmax", floors[0]),
        (ADAPTIVE, TORCH_ADAPTIVE),
        (ADAPTIVE, floors[1]),
    ]

    with (tmp_path / "train.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == [
        *("vocab_size", "contestant", "kind", "group", "measure", "unit", "min", "median", "max"),
    ]
    measures = {row["measure"] for row in rows if row["contestant"] == ADAPTIVE}
    assert {"forward", "forward_backward", "backward", "optimizer", "speed_up"} <= measures
    assert f"times faster than {TORCH_ADAPTIVE}" in measures
    with Image.open(tmp_path / "softmax_comparison.png") as picture:
        assert picture.format == "PNG"
        assert min(picture.size) > 1000
    assert len(list(tmp_path.iterdir())) == 3


def test_train_weighs_each_contestant_in_a_process_of_its_own(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [*TRAIN, "--vocab-sizes", "5000", "--heads", "FullSoftmax", "--no-optimizer"]
    words += ["--without", "linear_cross_entropy", "--output", str(tmp_path)]
    assert main(words) == 0
    found = json.loads((tmp_path / "train.json").read_text())
    for row in found["contestants"]:
        assert "optimizer_ms" not in row
        assert (row["memory"] is None) == (row["kind"] == "floor")
        if row["memory"] is not None:
            assert 0 < row["memory"]["gradients_mib"] < row["memory"]["extra_mib"]
    (pair,) = (pair for pair in found["comparisons"] if pair["other"] == peers.PLAIN)
    assert pair["memory_ratio"] > 0
    measures = [line.split(",")[4] for line in (tmp_path / "train.csv").read_text().splitlines()]
    assert measures.count("memory_extra") == 2


def refused(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as caught:
        main(words)
    out, err = capsys.readouterr()
    assert caught.value.code == 2
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    return err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "COMMAND"),
        (["fly"], "invalid choice: 'fly'"),
        (["train", "--tokens", "0"], "must be at least 1, got 0"),
        (["train", "--vocab-sizes", "many"], "'many' is not a whole number"),
        (["train", "--dtype", "int8"], "invalid choice: 'int8'"),
        (["train", "--device", "tpu"], "--device must be cpu, cuda or cuda:N, got tpu"),
        (["train", "--device", "cuda:99"], "--device cuda:99: torch sees"),
        (["train", "--heads", "Full("], "expected Name or Name"),
        (["train", "--heads", "Unknown"], "no Unknown among "),
        (["train", "--heads", "FullSoftmax(colour=1)"], "FullSoftmax has no option colour"),
        (["train", "--heads", "AdaptiveSoftmax(cutoffs=[90])"], "with 40 words: cutoffs must be"),
        (["train", "--optimizer", "Adamant"], "no Adamant among"),
        (["train", "--optimizer", "SGD(momentum=-1)"], "SGD(momentum=-1): Invalid momentum"),
        (["train", "--targets", "nowhere.npy"], "no file nowhere.npy"),
        (["loop", "--heads", "Unknown"], "no Unknown among"),
        (["loop", "--heads", "FullSoftmax@many"], "after @ comes a number of words"),
        (["loop", "--configs", "nowhere.yaml"], "nowhere.yaml: cannot be read"),
        (["loop", "--torch", "sampled"], "--torch must be adaptive or full, got sampled"),
        (["loop", "--torch-cutoffs", "99"], "--torch-cutoffs: none below the 40 words"),
        (["loop", "--heads", "--torch"], "nothing to train"),
        (["loop", "--as-used", "--keep-pages"], "--keep-pages is for all alike"),
        (["loop", "--torch-cutoffs", "9", "--reference", "mine"], "--reference: no loop mine, but"),
    ],
)
def test_wrong_options_are_one_line(
    words: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if words and words[0] == "train" and "--vocab-sizes" not in words:
        words = [*words, "--vocab-sizes", "40", "400"]
    if words and words[0] == "loop":
        words = [*words, "--vocab-size", "40"]
    if words and words[0] != "fly":
        words += ["--output", str(tmp_path / "out")]
    assert message in refused(words, capsys)
    assert not (tmp_path / "out").exists()


def test_output_that_is_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "out").write_text("")
    message = refused([*TRAIN, "--output", str(tmp_path / "out")], capsys)
    assert "is a file, it must be a folder" in message


def test_a_contestant_that_is_not_there_cannot_be_compared_with(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [*TRAIN, "--vocab-sizes", "40", "--heads", "FullSoftmax", "--no-memory"]
    words += ["--against", "nobody", "--output", str(tmp_path / "out")]
    assert "no contestant nobody to compare with, but plain full" in refused(words, capsys)


def test_keeping_pages_is_refused_where_it_cannot_be_and_recorded_where_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [*TRAIN, "--vocab-sizes", "40", "--heads", "FullSoftmax", "--no-memory", "--keep-pages"]
    words += ["--without", "linear", "--output", str(tmp_path)]
    monkeypatch.setattr("lm_softmax.benchmark.command.keep_pages", lambda: False)
    assert "--keep-pages: the allocator did not take it" in refused(words, capsys)
    monkeypatch.setattr("lm_softmax.benchmark.command.keep_pages", lambda: True)
    assert main(words) == 0
    assert "pages kept" in capsys.readouterr().out
    assert json.loads((tmp_path / "train.json").read_text())["options"]["keep_pages"] is True


def test_each_contestant_is_timed_in_a_process_of_its_own_where_that_is_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[tuple[str, dict[str, Any]]] = []

    class Noted(Apart):
        def __init__(self, problem: Problem, name: str, spec: Spec, **how: Any) -> None:
            asked.append((name, how))
            super().__init__(problem, name, spec, **how)

    monkeypatch.setattr("lm_softmax.benchmark.train.Apart", Noted)
    words = [*TRAIN, "--vocab-sizes", "40", "--heads", "FullSoftmax", "--no-memory", "--apart"]
    words += ["--without", "linear", "products", "Full", "--no-bias", "--output", str(tmp_path)]
    assert main(words) == 0
    assert "a process each" in capsys.readouterr().out
    found = json.loads((tmp_path / "train.json").read_text())
    assert found["options"]["apart"] is True
    names = [contestant["name"] for contestant in found["contestants"]]
    assert [name for name, _ in asked] == names == [peers.PLAIN]
    for contestant, (_, how) in zip(found["contestants"], asked, strict=True):
        assert [len(contestant["rounds_ms"][part]) for part in (FORWARD, OPTIMIZER)] == [2, 2]
        assert how == {
            "bias": False,
            "optimizer": parse_spec("AdamW(fused=True)"),
            "num_threads": 1,
            "keeps_pages": False,
        }


def test_a_file_is_there_whole_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(self: Any, file: Any, **options: Any) -> None:
        Path(file).write_bytes(b"half")
        raise OSError("disk full")

    (tmp_path / "softmax_comparison.png").write_bytes(b"old")
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", fail)
    words = [*TRAIN, "--vocab-sizes", "40", "--heads", "FullSoftmax", "--no-memory"]
    assert "disk full" in refused([*words, "--output", str(tmp_path)], capsys)
    assert (tmp_path / "softmax_comparison.png").read_bytes() == b"old"
    assert not list(tmp_path.glob(".*"))


def documented() -> list[str]:
    root = Path(__file__).parent.parent
    texts = [path.read_text() for path in (root / "README.md", root / "docs" / "performance.md")]
    lines = "\n".join(texts).replace("\\\n", " ").splitlines()
    commands = [line.split(" # ")[0] for line in lines if line.startswith("python -m")]
    return [line for line in commands if line.split()[2] == "lm_softmax.benchmark"]


@pytest.mark.parametrize("line", documented())
def test_documented_commands_are_understood(line: str) -> None:
    options = make_parser().parse_args(shlex.split(line)[3:])
    for spec in getattr(options, "heads", None) or ():
        spec = spec if isinstance(spec, Spec) else parse_spec(spec.partition("@")[0])
        spec.find(head_classes())


def test_there_are_documented_commands() -> None:
    assert len(documented()) > 3


@pytest.mark.parametrize("command", ["train", "loop"])
def test_help_names_the_files(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main([command, "--help"])
    assert caught.value.code == 0
    out = capsys.readouterr().out
    assert f"{command}.json" in out
    assert max(map(len, out.splitlines())) <= 100


def test_without_the_train_extra_the_command_says_what_to_install() -> None:
    code = (
        "import runpy, sys; sys.modules['matplotlib'] = None;"
        "runpy.run_module('lm_softmax.benchmark', run_name='__main__')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    assert 'pip install "lm_softmax[train]"' in done.stderr


# From text to token ids


@pytest.fixture
def small_corpus(tmp_path: Path) -> str:
    folder = tmp_path / "corpus"
    folder.mkdir()
    lines = [" ".join(f"w{i * j % 31}" for j in range(i % 20)) for i in range(300)]
    (folder / "train.txt").write_text("".join(f"{line}\n" for line in lines))
    return str(folder)


def test_data_command(
    small_corpus: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["data", "--path", small_corpus, "--rounds", "2", "--output", str(tmp_path / "out")]
    assert main(words) == 0
    shown = capsys.readouterr().out
    found = json.loads((tmp_path / "out" / "data.json").read_text())
    text = Path(small_corpus, "train.txt").read_text().split()
    assert (found["num_tokens"], found["num_types"]) == (len(text), len({*text}))
    assert found["peak_memory_mib"] is None
    ours, peer = found["pipelines"]
    assert (ours["name"], peer["name"]) == ("lm_softmax", "tokenizers")
    assert peer["ratio"] == {"min": 1, "median": 1, "max": 1}
    pairs = zip(peer["rounds_s"]["both"], ours["rounds_s"]["both"], strict=True)
    assert ours["ratio"]["median"] == pytest.approx(sum(a / b for a, b in pairs) / 2)
    assert len(ours["rounds_s"]["counting"]) == 2
    for line in (f"{len(text):,} tokens of 31 types", "lm_softmax  ", "tokenizers  ", "pyarrow "):
        assert line in shown
    with (tmp_path / "out" / "data.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {row["measure"] for row in rows} == {"counting", "encoding", "both", "ratio"}
    assert len(rows) == 8


def test_counts_that_differ_are_an_error(
    small_corpus: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts = text_pipelines.Peer.counts
    wrong = {"w1": 0, "new": 2}
    monkeypatch.setattr(text_pipelines.Peer, "counts", lambda self: counts(self) | wrong)
    with pytest.raises(SystemExit) as caught:
        main(["data", "--path", small_corpus, "--output", str(tmp_path / "out")])
    assert caught.value.code == 2
    assert not (tmp_path / "out").exists()
    assert text_pipelines.difference({"a": 1, "b": 2}, {"a": 1, "b": 3, "c": 1}) == (
        "2 of 3 tokens are counted differently: 'b' 2 and 3, 'c' 0 and 1"
    )
    assert text_pipelines.difference({"a": 1}, {"a": 1}) == ""
