"""Callbacks: what they log, to the digit, with time and the GPU replaced."""

import json
import math
import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
import torch.multiprocessing as mp
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from tiny import Recorder, TinyData, TinyModel, trainer
from torch.nn import functional as F

from lm_softmax.callbacks import (
    MemoryMonitor,
    PerplexityMonitor,
    RunSummary,
    SampleText,
    StepTimeMonitor,
)
from lm_softmax.callbacks import memory as memory_module
from lm_softmax.callbacks import run_summary as run_summary_module
from lm_softmax.callbacks import step_time as step_time_module
from lm_softmax.callbacks.closing import closing_lines
from lm_softmax.callbacks.sample_text import as_code_block
from lm_softmax.callbacks.step_time import StepClock, Timing
from lm_softmax.heads import FullSoftmax

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning"),  # lightning against torch
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:The number of training batches"),
]


class FakeTime:
    """A clock that moves when told."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now

    def advance(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> FakeTime:
    fake = FakeTime()
    monkeypatch.setattr(step_time_module, "perf_counter", fake)
    monkeypatch.setattr(run_summary_module, "perf_counter", fake)
    return fake


def perf_rows(recorder: Recorder) -> list[tuple[int | None, dict[str, float]]]:
    rows = [
        (step, {name: value for name, value in row.items() if name.startswith("perf/")})
        for step, row in recorder.rows
    ]
    return [(step, row) for step, row in rows if row]


# Step time


def test_step_times_by_the_fake_clock(clock: FakeTime, tmp_path: Path) -> None:
    """6 steps of 6 targets compute 1, 2, 3, ... s after loading for 0.5 s; the first is warm-up."""
    model = TinyModel(
        on_train=lambda index: clock.advance(1.0 + index), on_val=lambda _: clock.advance(100)
    )
    data = TinyData(num_batches=6, on_load=lambda _: clock.advance(0.5))
    run = trainer(tmp_path, StepTimeMonitor(warmup_steps=1))
    run.fit(model, datamodule=data)
    assert perf_rows(run.logger) == [
        (
            1,
            {
                "perf/step_time_ms": 2000.0,
                "perf/step_time_p90_ms": 2000.0,
                "perf/tokens_per_s": 6 / 2.5,
                "perf/train_time_s": 3 + 2 * 0.5,
            },
        ),
        (
            3,
            {
                "perf/step_time_ms": 3500.0,
                "perf/step_time_p90_ms": pytest.approx(3900.0),
                "perf/tokens_per_s": 12 / (3 + 4 + 2 * 0.5),
                "perf/train_time_s": 10 + 4 * 0.5,
            },
        ),
        (
            5,
            {
                "perf/step_time_ms": 5500.0,
                "perf/step_time_p90_ms": pytest.approx(5900.0),
                "perf/tokens_per_s": 12 / (5 + 6 + 2 * 0.5),
                "perf/train_time_s": 21 + 6 * 0.5,
            },
        ),
        (5, {"perf/train_time_s": 24.0}),  # the validation's 200 s are left out
    ]


def test_validation_in_the_middle_and_checkpoints_are_left_out(
    clock: FakeTime, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save = pl.Trainer.save_checkpoint

    def slow_save(self: pl.Trainer, *args: Any, **kwargs: Any) -> None:
        save(self, *args, **kwargs)
        clock.advance(1000)

    monkeypatch.setattr(pl.Trainer, "save_checkpoint", slow_save)
    model = TinyModel(on_train=lambda _: clock.advance(2.0), on_val=lambda _: clock.advance(100))
    monitor = StepTimeMonitor(warmup_steps=0)
    run = trainer(
        tmp_path,
        monitor,
        ModelCheckpoint(tmp_path / "steps", every_n_train_steps=1),
        ModelCheckpoint(tmp_path / "best", monitor="val/nll"),
        val_check_interval=2,
        enable_checkpointing=True,
    )
    run.fit(model, datamodule=TinyData(num_batches=4))
    assert run.logger.column("perf/tokens_per_s") == [3.0, 3.0]
    assert monitor.train_time_s == 8.0
    assert monitor.tokens_seen == 24
    assert monitor.timing == Timing(step_ms=[2000.0] * 4, tokens=24, wall_s=8.0)


def test_a_step_is_all_its_accumulated_batches(clock: FakeTime, tmp_path: Path) -> None:
    model = TinyModel(on_train=lambda index: clock.advance(1.0 + index))
    run = trainer(tmp_path, StepTimeMonitor(0), accumulate_grad_batches=2, log_every_n_steps=1)
    run.fit(model, datamodule=TinyData(num_batches=4))
    assert run.logger.column("perf/step_time_ms") == [3000.0, 7000.0]
    assert run.logger.column("perf/tokens_per_s") == [12 / 3, 12 / 7]


def test_steps_after_the_last_log_count_for_the_run(clock: FakeTime, tmp_path: Path) -> None:
    monitor = StepTimeMonitor(warmup_steps=1)
    run = trainer(tmp_path, monitor, log_every_n_steps=50)
    run.fit(TinyModel(on_train=lambda _: clock.advance(2.0)), datamodule=TinyData(4))
    assert run.logger.column("perf/tokens_per_s") == []
    assert monitor.timing.metrics() == {
        "perf/step_time_ms": 2000.0,
        "perf/step_time_p90_ms": 2000.0,
        "perf/tokens_per_s": 3.0,
    }


@pytest.mark.parametrize("warmup_steps", [0, 1, 3])
def test_without_logs_few_steps_wait_to_be_read(
    clock: FakeTime, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, warmup_steps: int
) -> None:
    waiting = []
    monkeypatch.setattr(step_time_module, "MAX_UNREAD_STEPS", 2)

    def on_train(index: int) -> None:
        waiting.append(len(monitor._clock._steps))
        clock.advance(1.0 + index)

    monitor = StepTimeMonitor(warmup_steps)
    run = trainer(tmp_path, monitor, log_every_n_steps=0)
    run.fit(TinyModel(on_train=on_train), datamodule=TinyData(8))
    assert max(waiting[warmup_steps:]) < 2
    assert monitor.timing.step_ms == [1000.0 * (1 + index) for index in range(warmup_steps, 8)]
    assert monitor.timing.tokens == 6 * (8 - warmup_steps)


def test_shorter_than_warm_up_measures_nothing(clock: FakeTime, tmp_path: Path) -> None:
    monitor = StepTimeMonitor(warmup_steps=4)
    run = trainer(tmp_path, monitor)
    run.fit(TinyModel(on_train=lambda _: clock.advance(2.0)), datamodule=TinyData(4))
    assert perf_rows(run.logger) == [(3, {"perf/train_time_s": 8.0})]
    assert monitor.timing.metrics() == {}


def test_time_and_tokens_go_on_in_a_resumed_fit(clock: FakeTime, tmp_path: Path) -> None:
    model = TinyModel(on_train=lambda _: clock.advance(2.0))
    first = trainer(tmp_path, StepTimeMonitor(0), max_epochs=1)
    first.fit(model, datamodule=TinyData(4))
    first.save_checkpoint(tmp_path / "a.ckpt")
    clock.advance(10_000)
    monitor = StepTimeMonitor(0)
    second = trainer(tmp_path, monitor, max_epochs=2)
    second.fit(model, datamodule=TinyData(4), ckpt_path=tmp_path / "a.ckpt", weights_only=True)
    assert (monitor.train_time_s, monitor.tokens_seen) == (16.0, 48)
    assert monitor.timing.wall_s == 8.0


def test_the_clock_stands_after_an_error(clock: FakeTime, tmp_path: Path) -> None:
    def fail(index: int) -> None:
        clock.advance(2.0)
        if index == 2:
            raise RuntimeError

    monitor = StepTimeMonitor(0)
    run = trainer(tmp_path, monitor)
    with pytest.raises(RuntimeError):
        run.fit(TinyModel(on_train=fail), datamodule=TinyData())
    clock.advance(1000)
    assert monitor.train_time_s == 6.0
    run.validate(TinyModel(), datamodule=TinyData(), verbose=False)
    assert run.logger.column("perf/train_time_s") == [4.0]


def test_evaluation_alone_logs_no_time(tmp_path: Path) -> None:
    run = trainer(tmp_path, StepTimeMonitor())
    run.validate(TinyModel(), datamodule=TinyData(), verbose=False)
    assert perf_rows(run.logger) == []


def test_tokens_per_second_are_in_the_progress_bar(clock: FakeTime, tmp_path: Path) -> None:
    run = trainer(tmp_path, StepTimeMonitor(0))
    run.fit(TinyModel(on_train=lambda _: clock.advance(2.0)), datamodule=TinyData(4))
    assert run.progress_bar_metrics["perf/tokens_per_s"] == 3.0


def test_what_is_logged_at_a_step_stays_off_the_device(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A number would be put on the device and read back, waiting for it, at each step."""
    logged: dict[str, Any] = {}
    log = TinyModel.log

    def spy(self: TinyModel, name: str, value: Any, *args: Any, **kwargs: Any) -> None:
        if self.trainer.training:
            logged[name] = value
        log(self, name, value, *args, **kwargs)

    monkeypatch.setattr(TinyModel, "log", spy)
    run = trainer(tmp_path, StepTimeMonitor(0), MemoryMonitor(), PerplexityMonitor())
    run.fit(TinyModel(), datamodule=TinyData())
    del logged["train/loss"]
    assert {"perf/tokens_per_s", "train/ppl", "mem/host_rss_gib"} <= logged.keys()
    for value in logged.values():
        assert (value.device.type, value.dtype) == ("cpu", torch.float64)


class FakeEvent:
    """A CUDA event: the device runs 3 s behind the host; the log shows each wait."""

    clock: FakeTime
    waits: list[float]

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None:
        self.time = self.clock.now

    def synchronize(self) -> None:
        self.waits.append(self.time)
        self.clock.now = max(self.clock.now, self.time + 3)

    def elapsed_time(self, end: "FakeEvent") -> float:
        return (end.time - self.time) * 1000


@pytest.fixture
def cuda_events(clock: FakeTime, monkeypatch: pytest.MonkeyPatch) -> list[float]:
    waits: list[float] = []
    monkeypatch.setattr(FakeEvent, "clock", clock, raising=False)
    monkeypatch.setattr(FakeEvent, "waits", waits, raising=False)
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    return waits


def test_cuda_events_are_waited_for_only_to_read_and_to_pause(
    clock: FakeTime, cuda_events: list[float]
) -> None:
    steps = StepClock(use_cuda_events=True)
    steps.resume()
    for _ in range(5):
        steps.start_batch()
        clock.advance(1)
        steps.end_batch(10, ends_step=True)
    assert cuda_events == []
    assert steps.read() == Timing([1000.0] * 5, tokens=50, wall_s=5 + 3)
    assert cuda_events == [1005.0]  # the last one alone
    steps.start_batch()
    clock.advance(1)
    steps.end_batch(10, ends_step=False)
    steps.pause()
    assert cuda_events == [1005.0, 1009.0]
    clock.advance(50)
    assert steps.wall_s == 5 + 3 + 1 + 3
    assert steps.read().step_ms == []


def test_pausing_twice_and_resuming_twice_counts_once(clock: FakeTime) -> None:
    steps = StepClock()
    steps.pause()
    assert steps.wall_s == 0
    steps.resume()
    clock.advance(1)
    steps.resume()
    clock.advance(1)
    steps.pause()
    clock.advance(1)
    steps.pause()
    assert steps.wall_s == 2


def test_warmup_steps_must_not_be_negative() -> None:
    with pytest.raises(ValueError, match="warmup_steps is -1"):
        StepTimeMonitor(warmup_steps=-1)


# Memory


def test_host_memory_is_in_gib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = iter([3 * 2**30, 2**29, 2**28])
    monkeypatch.setattr(memory_module, "host_rss_bytes", lambda: next(sizes))
    monitor = MemoryMonitor()
    run = trainer(tmp_path, monitor)
    run.fit(TinyModel(), datamodule=TinyData())
    assert run.logger.column("mem/host_rss_gib") == [3.0, 0.5]
    assert monitor.peaks == {"mem/host_rss_gib": 3.0}
    assert "mem/peak_allocated_gib" not in run.logger.rows[0][1]


def test_host_memory_of_this_process_is_true() -> None:
    before = memory_module.host_rss_bytes()
    block = np.ones(2**26)  # 512 MiB: others of this process may be paged out meanwhile
    after = memory_module.host_rss_bytes()
    assert before is not None
    assert after is not None
    assert after - before == pytest.approx(block.nbytes, rel=0.1)


@pytest.mark.parametrize(("platform", "unit"), [("darwin", 1), ("freebsd14", 1024)])
def test_host_memory_without_proc(
    platform: str, unit: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    import resource

    monkeypatch.setattr(Path, "exists", lambda self: False)
    monkeypatch.setattr(memory_module.sys, "platform", platform)
    monkeypatch.setattr(resource, "getrusage", lambda who: SimpleNamespace(ru_maxrss=7))
    assert memory_module.host_rss_bytes() == 7 * unit


def test_host_memory_is_left_out_where_it_is_unknown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Path, "exists", lambda self: False)
    monkeypatch.setitem(memory_module.sys.modules, "resource", None)
    assert memory_module.host_rss_bytes() is None
    assert MemoryMonitor()._measure(torch.device("cpu")) == {}


class FakeCudaMemory:
    """What the allocator says, one value for each log."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: list[str] = []
        self.peak = 0
        self.stats = {"num_alloc_retries": 4, "num_ooms": 0}
        monkeypatch.setattr(torch.cuda, "max_memory_allocated", self._peak("allocated", 1))
        monkeypatch.setattr(torch.cuda, "max_memory_reserved", self._peak("reserved", 2))
        monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", self._peak("reset", 0))
        monkeypatch.setattr(torch.cuda, "memory_stats", lambda device: dict(self.stats))

    def _peak(self, name: str, factor: int) -> Any:
        def call(device: torch.device) -> int:
            assert device.type == "cuda"
            self.calls.append(name)
            return self.peak * factor

        return call


def test_gpu_memory_peaks_start_anew_after_each_log(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda, device, monitor = FakeCudaMemory(monkeypatch), torch.device("cuda"), MemoryMonitor()
    monkeypatch.setattr(memory_module, "host_rss_bytes", lambda: 2**30)
    monitor.on_train_start(SimpleNamespace(global_step=0), SimpleNamespace(device=device))
    assert cuda.calls == ["reset"]
    cuda.peak = 2**31
    assert monitor._measure(device) == {
        "mem/host_rss_gib": 1.0,
        "mem/peak_allocated_gib": 2.0,
        "mem/peak_reserved_gib": 4.0,
    }
    assert cuda.calls == ["reset", "allocated", "reserved", "reset"]
    cuda.peak = 2**30
    assert monitor._measure(device)["mem/peak_allocated_gib"] == 1.0
    assert monitor.peaks["mem/peak_reserved_gib"] == 4.0


def test_new_allocator_failures_warn_once(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda, device, monitor = FakeCudaMemory(monkeypatch), torch.device("cuda"), MemoryMonitor()
    monitor.on_train_start(SimpleNamespace(global_step=0), SimpleNamespace(device=device))
    monitor._measure(device)  # the 4 retries before the fit are not its own
    cuda.stats = {"num_alloc_retries": 7, "num_ooms": 1}
    with pytest.warns(UserWarning, match="tried again 3 times and failed 1 times"):
        monitor._measure(device)
    monitor._measure(device)


# Perplexity


def nats_of(model: TinyModel, batches: list[Any]) -> tuple[float, int]:
    """Summed NLL and number of targets, from torch's own cross entropy over all logits."""
    nats, count = 0.0, 0
    for batch in batches:
        logits = model.head.log_prob(model.encoder(batch.tokens)[0]).double()
        nats += F.cross_entropy(
            logits.flatten(0, 1), batch.target.flatten(), reduction="sum"
        ).item()
        count += int((batch.target >= 0).sum())
    return nats, count


@pytest.mark.parametrize("accumulated", [1, 2])
def test_train_ppl_is_over_all_targets_since_the_last_log(tmp_path: Path, accumulated: int) -> None:
    model, data = TinyModel(), TinyData(num_batches=8)
    model.configure_optimizers = lambda: torch.optim.SGD(model.parameters(), lr=0.0)
    run = trainer(tmp_path, PerplexityMonitor(), accumulate_grad_batches=accumulated)
    run.fit(model, datamodule=data)
    width = 2 * accumulated
    windows = [data.train[start : start + width] for start in range(0, 8, width)]
    expected = [math.exp(nats / count) for nats, count in (nats_of(model, w) for w in windows)]
    assert run.logger.column("train/ppl") == pytest.approx(expected, rel=1e-6)
    assert run.progress_bar_metrics["train/ppl"] == pytest.approx(expected[-1], rel=1e-6)


def test_a_surrogate_loss_is_never_exponentiated(tmp_path: Path) -> None:
    head = FullSoftmax(4, 12, label_smoothing=0.1)
    run = trainer(tmp_path, PerplexityMonitor())
    run.fit(TinyModel(head), datamodule=TinyData())
    assert run.logger.column("train/ppl") == []
    assert len(run.logger.column("val/bits_per_byte")) == 1


def test_without_logs_no_nats_are_collected(tmp_path: Path) -> None:
    monitor = PerplexityMonitor()
    run = trainer(tmp_path, monitor, log_every_n_steps=0)
    run.fit(TinyModel(), datamodule=TinyData())
    assert run.logger.column("train/ppl") == []
    assert monitor._window == []


def test_overflowing_train_ppl_is_infinite(tmp_path: Path) -> None:
    class Diverged(TinyModel):
        def training_step(self, batch: Any, batch_idx: int) -> dict[str, torch.Tensor]:
            return {**super().training_step(batch, batch_idx), "nats": torch.tensor(1e6)}

    run = trainer(tmp_path, PerplexityMonitor())
    run.fit(Diverged(), datamodule=TinyData())
    assert run.logger.column("train/ppl") == [math.inf, math.inf]


@pytest.mark.parametrize("stage", ["val", "test"])
def test_figures_that_compare_across_vocabularies(tmp_path: Path, stage: str) -> None:
    model, data = TinyModel(), TinyData()
    run = trainer(tmp_path, PerplexityMonitor())
    evaluate = {"val": run.validate, "test": run.test}[stage]
    (logged,) = evaluate(model, datamodule=data, verbose=False)
    nats, count = nats_of(model, data.train[:2])
    stats = data.statistics
    bits = nats / count / math.log(2) * stats.num_tokens / stats.num_bytes
    assert logged == pytest.approx(
        {
            f"{stage}/nll": nats / count,
            f"{stage}/ppl": math.exp(nats / count),
            f"{stage}/bits_per_byte": bits,
            f"{stage}/unk_rate": 3 / 12,
            f"{stage}/ppl_unigram": math.exp(24 / 12),
        },
        rel=1e-6,
    )


@pytest.mark.parametrize("stage", ["val", "test"])
def test_a_part_of_a_split_is_not_compared_with_the_whole(
    tmp_path: Path, stage: str, caplog: pytest.LogCaptureFixture
) -> None:
    whole = {f"{stage}/{name}" for name in ("nll", "ppl", "unk_rate")}
    compared = {f"{stage}/bits_per_byte", f"{stage}/ppl_unigram"}
    options = {f"limit_{stage}_batches": 1}
    run = trainer(tmp_path, PerplexityMonitor(), **options)
    evaluate = {"val": run.validate, "test": run.test}[stage]
    for _ in range(2):
        (logged,) = evaluate(TinyModel(), datamodule=TinyData(), verbose=False)
        assert logged.keys() == whole
    (warning,) = [text for text in caplog.messages if "targets of the split" in text]
    assert "6 targets of the split's 12 were evaluated" in warning

    data = TinyData()
    data.statistics = data.statistics._replace(num_tokens=11)
    run = trainer(tmp_path, PerplexityMonitor(), **{f"limit_{stage}_batches": 9})
    evaluate = {"val": run.validate, "test": run.test}[stage]
    (logged,) = evaluate(TinyModel(), datamodule=data, verbose=False)
    assert logged.keys() == whole | compared


def test_loaders_without_statistics_leave_perplexity_alone(tmp_path: Path) -> None:
    run = trainer(tmp_path, PerplexityMonitor())
    (logged,) = run.validate(TinyModel(), TinyData().val_dataloader(), verbose=False)
    assert logged.keys() == {"val/nll", "val/ppl"}


# Sample text


def global_random_states() -> tuple[Any, ...]:
    return (
        torch.get_rng_state().tolist(),
        random.getstate(),
        np.random.get_state()[1].tolist(),  # noqa: NPY002
    )


def test_sampling_leaves_global_randomness_and_modes_alone(tmp_path: Path) -> None:
    model, sample = TinyModel(), SampleText("ab", num_tokens=9)
    run = trainer(tmp_path)
    run.validate(model, datamodule=TinyData(), verbose=False)
    before = global_random_states()
    sample.on_validation_epoch_end(run, model)
    assert global_random_states() == before
    assert sample.last_text.startswith("ab")
    assert len(sample.last_text) == 2 + 9


def test_the_same_seed_gives_the_same_text(tmp_path: Path) -> None:
    model = TinyModel()
    texts = []
    for seed in (1, 1, 2):
        sample = SampleText(num_tokens=30, temperature=1.0, seed=seed)
        trainer(tmp_path, sample).validate(model, datamodule=TinyData(), verbose=False)
        texts.append(sample.last_text)
    assert texts[0] == texts[1] != texts[2]
    assert len(texts[0]) == 30  # the <eos> before a text is not part of it


def test_training_is_the_same_with_and_without_samples(tmp_path: Path) -> None:
    weights = []
    for callbacks in ([], [SampleText()]):
        torch.manual_seed(3)
        model = TinyModel()
        run = trainer(tmp_path, *callbacks, max_epochs=2)
        run.fit(model, datamodule=TinyData())
        weights.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert torch.equal(*weights)


def test_samples_every_second_validation_and_not_in_the_sanity_check(tmp_path: Path) -> None:
    texts = []

    class Spy(SampleText):
        def _generate(self, pl_module: Any) -> str:
            texts.append(pl_module.trainer.global_step)
            return super()._generate(pl_module)

    run = trainer(tmp_path, Spy(every_n_validations=2), max_epochs=5, num_sanity_val_steps=2)
    run.fit(TinyModel(), datamodule=TinyData())
    assert texts == [8, 16]


def test_no_sample_where_the_model_may_be_in_parts() -> None:
    class ShardedStrategy:
        pass

    sample = SampleText()
    run = SimpleNamespace(sanity_checking=False, is_global_zero=True, strategy=ShardedStrategy())
    with pytest.warns(UserWarning, match="no sample text: ShardedStrategy may hold parts"):
        sample.on_validation_epoch_end(run, TinyModel())
    assert sample.last_text == ""


def test_a_model_without_a_vocabulary_is_refused(tmp_path: Path) -> None:
    model = TinyModel()
    model.vocab = None
    run = trainer(tmp_path, SampleText())
    with pytest.raises(ValueError, match="SampleText needs a model with a vocabulary"):
        run.fit(model, datamodule=TinyData())


@pytest.mark.parametrize("name", ["num_tokens", "every_n_validations"])
def test_sample_options_must_be_positive(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} is 0: it must be at least 1"):
        SampleText(**{name: 0})


def test_sample_is_markdown_that_shows_the_text_as_it_is() -> None:
    import markdown

    text = "# no heading\n<b>*no* `emphasis`</b>\n\n    - no list\n```\n\x0b_x_"
    html = markdown.markdown(as_code_block(text))
    assert html.startswith("<pre><code>")
    assert html.count("<") == 4  # pre, code and their ends
    assert "# no heading\n&lt;b&gt;*no* `emphasis`&lt;/b&gt;\n" in html
    assert as_code_block("") == "    \n"


# Summary of the run


def read_summary(folder: Path) -> dict[str, Any]:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    return json.loads((folder / "summary.json").read_text(), parse_constant=refuse)


def all_callbacks() -> list[pl.Callback]:
    return [StepTimeMonitor(1), MemoryMonitor(), PerplexityMonitor(), SampleText(), RunSummary()]


def test_summary_of_a_finished_run(
    clock: FakeTime, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory_module, "host_rss_bytes", lambda: 2**29)
    model = TinyModel(on_train=lambda _: clock.advance(2.0), on_val=lambda _: clock.advance(1.0))
    callbacks = all_callbacks()
    checkpoint = ModelCheckpoint(
        tmp_path / "checkpoints", "best", monitor="val/nll", save_last=True
    )
    run = trainer(tmp_path, *callbacks, checkpoint, max_epochs=2, enable_checkpointing=True)
    run.fit(model, datamodule=TinyData())
    summary = read_summary(tmp_path)
    assert summary == json.loads(json.dumps(callbacks[-1].summary))
    nll = run.logger.column("val/nll")
    for kind, value in (("best", min(nll)), ("last", nll[-1])):
        assert summary[kind]["val/nll"] == value
        assert summary[kind]["val/ppl"] == pytest.approx(math.exp(value))
        assert summary[kind]["val/unk_rate"] == 0.25
        assert {"val/bits_per_byte", "val/ppl_unigram", "step"} <= summary[kind].keys()
    assert summary["last"]["perf/train_time_s"] == 16.0
    expected = {
        "status": "finished",
        "head": "AdaptiveSoftmax",
        "head_options": {"cutoffs": [4], "tail_sizes": [2]},
        "encoder": "TinyEncoder",
        "vocab_size": 12,
        "vocab_fingerprint": "f1",
        # short-list 4 + cluster row, 4 wide with biases; projection; tail of 8, 2 wide with biases
        "num_parameters": {"head": 25 + 8 + 24, "encoder": 48, "total": 57 + 48},
        "perf": {
            "perf/step_time_ms": 2000.0,
            "perf/step_time_p90_ms": 2000.0,
            "perf/tokens_per_s": 3.0,
        },
        "mem": {"mem/host_rss_gib": 0.5},
        "steps": 8,
        "tokens_seen": 48,
        "train_time_s": 16.0,
        "wall_time_s": 16.0 + 2 * 2 * 1.0,
        "checkpoints": {"best": "checkpoints/best.ckpt", "last": "checkpoints/last.ckpt"},
        "device": "cpu",
        "sample_text": callbacks[-2].last_text,
    }
    assert {name: summary[name] for name in expected} == expected
    assert summary["versions"].keys() == {"lm_softmax", "lightning", "torch", "python"}
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_shared_parameters_count_once_in_the_total(tmp_path: Path) -> None:
    model = TinyModel(FullSoftmax(4, 12))
    model.head.tie_weight(model.encoder.embedding)
    trainer(tmp_path, RunSummary()).fit(model, datamodule=TinyData())
    assert read_summary(tmp_path)["num_parameters"] == {"total": 60, "head": 60, "encoder": 48}


def test_the_best_is_kept_when_the_last_is_worse_or_nan(tmp_path: Path) -> None:
    values = iter([2.0, math.nan, 1.0, 3.0, math.nan])

    class Scripted(TinyModel):
        def _log_split(self, stage: str, perplexity: Any) -> None:
            self.log("val/nll", next(values))

    callback = RunSummary()
    run = trainer(tmp_path, callback, max_epochs=5)
    run.fit(Scripted(), datamodule=TinyData())
    summary = read_summary(tmp_path)
    assert (summary["best"]["val/nll"], summary["best"]["step"]) == (1.0, 12)
    assert (summary["last"]["val/nll"], summary["last"]["step"]) == ("nan", 20)


def test_a_first_validation_of_nan_gives_way(tmp_path: Path) -> None:
    values = iter([math.nan, 5.0])

    class Scripted(TinyModel):
        def _log_split(self, stage: str, perplexity: Any) -> None:
            self.log("val/nll", next(values))

    trainer(tmp_path, RunSummary(), max_epochs=2).fit(Scripted(), datamodule=TinyData())
    assert read_summary(tmp_path)["best"]["val/nll"] == 5.0


@pytest.mark.parametrize(
    ("error", "caught", "status"),
    [
        (KeyboardInterrupt(), SystemExit, "interrupted"),
        (RuntimeError("lost"), RuntimeError, "failed"),
    ],
)
def test_summary_of_a_run_that_is_cut_short(
    tmp_path: Path, error: BaseException, caught: type[BaseException], status: str
) -> None:
    def stop(index: int) -> None:
        if run.current_epoch == 1 and index == 2:
            raise error

    run = trainer(tmp_path, *all_callbacks(), max_epochs=3)
    with pytest.raises(caught):
        run.fit(TinyModel(on_train=stop), datamodule=TinyData())
    summary = read_summary(tmp_path)
    assert (summary["status"], summary["steps"]) == (status, 6)
    assert summary["best"]["step"] == 4
    assert summary["tokens_seen"] == 6 * 6


def test_a_killed_run_leaves_the_summary_of_its_last_validation(tmp_path: Path) -> None:
    seen = []

    def look(index: int) -> None:
        if index == 0 and run.current_epoch:
            seen.append(read_summary(tmp_path))

    run = trainer(tmp_path, RunSummary(), max_epochs=2)
    run.fit(TinyModel(on_train=look), datamodule=TinyData())
    assert [(summary["status"], summary["best"]["step"]) for summary in seen] == [("running", 4)]


def test_a_resumed_run_keeps_its_best_and_its_time(clock: FakeTime, tmp_path: Path) -> None:
    values = iter([1.0, 2.0])

    class Scripted(TinyModel):
        def _log_split(self, stage: str, perplexity: Any) -> None:
            self.log("val/nll", next(values))

    model = Scripted(on_train=lambda _: clock.advance(2.0))
    first = trainer(tmp_path, RunSummary(), max_epochs=1)
    first.fit(model, datamodule=TinyData())
    first.save_checkpoint(tmp_path / "a.ckpt")
    clock.advance(10_000)
    second = trainer(tmp_path, RunSummary(), max_epochs=2)
    second.fit(model, datamodule=TinyData(), ckpt_path=tmp_path / "a.ckpt", weights_only=True)
    summary = read_summary(tmp_path)
    assert (summary["best"]["step"], summary["last"]["step"]) == (4, 8)
    assert summary["wall_time_s"] == 16.0


def test_a_run_is_finished_when_all_else_is_written_and_failed_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []

    def note(*_: Any) -> None:
        seen.append(read_summary(tmp_path)["status"])

    monkeypatch.setattr(TensorBoardLogger, "log_hyperparams", note)
    board = TensorBoardLogger(tmp_path, name="", version="", default_hp_metric=False)
    trainer(tmp_path, RunSummary(), logger=board).fit(TinyModel(), datamodule=TinyData())
    assert (seen[-1], read_summary(tmp_path)["status"]) == ("running", "finished")

    def fail(_: int) -> None:
        raise RuntimeError("no")

    with pytest.raises(RuntimeError, match="no"):
        trainer(tmp_path, RunSummary(), logger=board).fit(
            TinyModel(on_train=fail), datamodule=TinyData()
        )
    assert seen[-1] == "failed"


def test_evaluation_alone_writes_no_summary(tmp_path: Path) -> None:
    run = trainer(tmp_path, callback := RunSummary())
    run.validate(TinyModel(), datamodule=TinyData(), verbose=False)
    assert not (tmp_path / "summary.json").exists()
    assert callback.lines() == []


@pytest.mark.parametrize("loggers", [False, "csv", "both"])
def test_any_loggers_will_do(tmp_path: Path, loggers: Any) -> None:
    csv = CSVLogger(tmp_path, name="", version="")
    board = TensorBoardLogger(tmp_path, name="", version="", default_hp_metric=False)
    logger = {"csv": csv, "both": [board, csv], False: False}[loggers]
    with (
        pytest.warns(UserWarning, match="exists and is not empty")
        if loggers == "both"
        else pytest.MonkeyPatch.context()
    ):
        run = trainer(tmp_path, *all_callbacks(), logger=logger)
        run.fit(TinyModel(), datamodule=TinyData())
    assert read_summary(tmp_path)["status"] == "finished"


def test_closing_lines(tmp_path: Path) -> None:
    summary = {
        "run_dir": "runs/my run",
        "best": {
            "step": 1234,
            "val/ppl": 181.26,
            "val/ppl_unigram": 912.34,
            "val/unk_rate": 0.01234,
            "val/bits_per_byte": 1.23456,
        },
        "sample_text": "def f ( x ) :\n" + "word " * 40 + "\nthird\nfourth\nfifth",
        "checkpoints": {"best": "checkpoints/best.ckpt"},
    }
    lines = closing_lines(summary)
    assert lines == [
        "val/ppl 181.3 (best, step 1,234), unigram model on the same split 912.3",
        "val/unk_rate 0.0123, val/bits_per_byte 1.2346",
        "generated text:",
        "    def f ( x ) :",
        "    " + "word " * 18 + "word",
        "    " + "word " * 18 + "word",
        "    word word",
        "best checkpoint: runs/my run/checkpoints/best.ckpt",
        "TensorBoard: tensorboard --logdir 'runs/my run'",
    ]


def test_closing_lines_without_a_validation() -> None:
    summary = {"run_dir": "r", "best": {}, "checkpoints": {}}
    assert closing_lines(summary) == [
        "no validation has run",
        "TensorBoard: tensorboard --logdir r",
    ]


# Two processes


def _rank(rank: int, folder: str) -> None:
    """A DDP run; rank one holds other data than rank zero."""
    import os
    import warnings

    warnings.filterwarnings("ignore", message=".*LeafSpec", category=FutureWarning)
    os.environ |= {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": (Path(folder) / "port").read_text(),
        "NODE_RANK": str(rank),
        "WORLD_SIZE": "2",
        "LOCAL_RANK": "0",
    }
    torch.manual_seed(0)
    recorder, callbacks = Recorder(), all_callbacks()
    run = trainer(
        Path(folder),
        *callbacks,
        logger=recorder if rank == 0 else False,
        strategy="ddp",
        num_nodes=2,
        use_distributed_sampler=False,
    )
    data = TinyData()
    data.train = data.train[2 * rank : 2 * rank + 2]
    model = TinyModel()
    with torch.no_grad():
        before = nats_of(model, data.train[:2])
    model.configure_optimizers = lambda: torch.optim.SGD(model.parameters(), lr=0.0)
    run.fit(model, datamodule=data)
    torch.save(
        {
            "rows": recorder.rows,
            "nats": before,
            "text": callbacks[-2].last_text,
            "lines": callbacks[-1].lines(),
            "tokens": callbacks[0].tokens_seen,
        },
        Path(folder) / f"rank{rank}.pt",
    )


def test_two_processes_log_the_figures_of_both(tmp_path: Path) -> None:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        (tmp_path / "port").write_text(str(probe.getsockname()[1]))
    mp.spawn(_rank, args=(str(tmp_path),), nprocs=2)
    zero, one = (torch.load(tmp_path / f"rank{rank}.pt", weights_only=False) for rank in (0, 1))
    nats, count = (sum(parts) for parts in zip(zero["nats"], one["nats"], strict=True))
    rows = {name: value for _, row in zero["rows"] for name, value in row.items()}
    stats = TinyData.statistics
    assert rows["val/bits_per_byte"] == pytest.approx(
        nats / count / math.log(2) * stats.num_tokens / stats.num_bytes, rel=1e-6
    )
    assert rows["val/unk_rate"] == 0.25
    assert zero["tokens"] == 2 * 2 * 6
    assert len(zero["text"]) == 64
    assert one["text"] == ""
    assert zero["lines"]
    assert one["lines"] == []
    assert read_summary(tmp_path)["world_size"] == 2
