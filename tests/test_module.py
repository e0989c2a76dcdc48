"""LanguageModel against plain loops: gradients, perplexity, carried state, checkpoints."""

import copy
import itertools
import math
import random
import re
from contextlib import nullcontext
from functools import partial
from typing import NamedTuple

import lightning.pytorch as pl
import numpy as np
import pyarrow as pa
import pytest
import torch
from lightning.pytorch.loggers import Logger
from lightning.pytorch.plugins.precision import Precision
from tiny import LOGITS_ALONE, NO_TAILS
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lm_softmax import divergence, moment
from lm_softmax.encoders import AdaptiveEmbedding, Encoder, LSTMEncoder, TransformerEncoder
from lm_softmax.heads import (
    AdaptiveSoftmax,
    FullSoftmax,
    HierarchicalSoftmax,
    ProductQuantizedSoftmax,
    SampledSoftmax,
)
from lm_softmax.heads.cost_model import COST_MODELS
from lm_softmax.module import LanguageModel
from lm_softmax.parallel import Replica
from lm_softmax.schedule import WarmupDecay
from lm_softmax.vocab import Vocab, load_tokenizer

V = 30
COUNTS = torch.arange(V, 0, -1)
SMALL_LSTM = partial(LSTMEncoder, embedding_size=8, hidden_size=8)
SMALL_TRANSFORMER = partial(
    TransformerEncoder, hidden_size=16, num_heads=2, num_layers=1, dropout=0.0
)
ADAPTIVE = partial(AdaptiveSoftmax, cutoffs=[5, 12], min_tail_size=3)
SGD = partial(torch.optim.SGD, lr=0.5)

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*have no `val_dataloader`"),
    pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec"),
]


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    """Steps this small are slower on two."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Batch(NamedTuple):
    tokens: Tensor
    target: Tensor
    carry: bool


def batches(*ignored, rows=4, time=6, carry=False):
    """One batch for each share of ignored targets."""
    made = []
    for share in ignored:
        target = torch.randint(V, (rows, time))
        target[torch.rand(rows, time) < share] = -100
        made.append(Batch(torch.randint(V, (rows, time)), target, carry and bool(made)))
    return made


class Rows(Logger):
    """A logger that keeps what it is given."""

    name = version = "rows"

    def __init__(self):
        super().__init__()
        self.rows = []

    def log_metrics(self, metrics, step=None):
        self.rows.append((step, metrics))

    def log_hyperparams(self, *args, **kwargs):
        raise AssertionError("the vocabulary is nothing for a logger")

    def column(self, name):
        return {step: row[name] for step, row in self.rows if name in row}


def trainer(**options):
    defaults = {
        "max_epochs": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
        "accelerator": "cpu",
    }
    return pl.Trainer(**defaults | options)


def fit(model, train, validation=None, **options):
    loaders = [DataLoader(rows, batch_size=None) for rows in (train, validation) if rows]
    made = trainer(**options)
    made.fit(model, *loaders)
    return made


def mean_nats(model, rows):
    """The objective of a window of batches, from full log-probabilities."""
    nats, targets = 0.0, 0
    for batch in rows:
        log_probs = model.head.log_prob(model.encoder(batch.tokens)[0])
        picked = log_probs.gather(-1, batch.target.clamp(min=0).unsqueeze(-1)).squeeze(-1)
        kept = batch.target != -100
        nats, targets = nats - picked[kept].sum(), targets + int(kept.sum())
    return nats / max(targets, 1)


@pytest.mark.parametrize("accumulate", [1, 2, 3])
@pytest.mark.parametrize("clip", [None, 0.01])
def test_steps_are_those_of_the_joined_window(accumulate, clip):
    rows = batches(0.0, 0.9, 0.5, 0.2, 0.95)
    model = LanguageModel(SMALL_LSTM, ADAPTIVE, COUNTS, optimizer=SGD).double()
    expected = copy.deepcopy(model)
    optimizer = torch.optim.SGD(expected.parameters(), lr=0.5)
    for begin in range(0, len(rows), accumulate):
        optimizer.zero_grad()
        mean_nats(expected, rows[begin : begin + accumulate]).backward()
        if clip is not None:
            nn.utils.clip_grad_norm_(expected.parameters(), clip)
        optimizer.step()
    fit(
        model,
        rows,
        precision="64-true",
        accumulate_grad_batches=accumulate,
        gradient_clip_val=clip,
    )
    for name, value in model.state_dict().items():
        torch.testing.assert_close(
            value, expected.state_dict()[name], rtol=1e-10, atol=1e-10, msg=name
        )


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_window_without_targets_changes_nothing(accumulate):
    model = LanguageModel(SMALL_LSTM, ADAPTIVE, COUNTS, optimizer=SGD)
    before = copy.deepcopy(model.state_dict())
    logger = Rows()
    fit(
        model,
        batches(1.0, 1.0),
        accumulate_grad_batches=accumulate,
        logger=logger,
        log_every_n_steps=1,
    )
    assert set(logger.column("train/loss").values()) == {0.0}
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=0, msg=name)


def test_logs_the_mean_over_the_window_on_log_steps_only():
    rows = batches(*[0.3, 0.8] * 5)
    model = LanguageModel(
        SMALL_LSTM, ADAPTIVE, COUNTS, optimizer=partial(torch.optim.SGD, lr=1e-30)
    )
    expected = [mean_nats(model, rows[begin : begin + 2]).item() for begin in range(0, 10, 2)]
    logger = Rows()
    fit(model, rows, logger=logger, log_every_n_steps=2, accumulate_grad_batches=2)
    logged = logger.column("train/loss")
    assert logged == pytest.approx({1: expected[1], 3: expected[3]}, rel=1e-5)


def test_perplexity_is_exact_and_not_the_loss():
    validation = batches(0.1, 0.9, 0.5)
    model = LanguageModel(
        SMALL_LSTM, partial(FullSoftmax, label_smoothing=0.3), COUNTS, optimizer=SGD
    )
    loader = DataLoader(validation, batch_size=None)
    (logged,) = trainer().validate(model, loader, verbose=False)
    with torch.no_grad():
        nats = mean_nats(model, validation).item()
    assert logged["val/nll"] == pytest.approx(nats, rel=1e-5)
    assert logged["val/ppl"] == pytest.approx(math.exp(nats), rel=1e-5)
    (tested,) = trainer().test(model, loader, verbose=False)
    assert tested["test/nll"] == pytest.approx(nats, rel=1e-5)
    assert tested["test/ppl"] == pytest.approx(math.exp(nats), rel=1e-5)


def test_predicts_a_log_probability_a_target():
    rows = batches(0.0, 0.5)
    model = LanguageModel(SMALL_LSTM, ADAPTIVE, COUNTS)
    predicted = trainer().predict(model, DataLoader(rows, batch_size=None))
    for found, batch in zip(predicted, rows, strict=True):
        log_probs = model.head.log_prob(model.encoder(batch.tokens)[0]).detach()
        expected = log_probs.gather(-1, batch.target.clamp(min=0).unsqueeze(-1)).squeeze(-1)
        torch.testing.assert_close(found, expected.masked_fill(batch.target == -100, 0.0))


class Recorder(Encoder):
    """Carries the last token of each row, and notes the state it is given."""

    carries_state = True

    def __init__(self, vocab_size, counts=None, *, hidden_size=4):
        super().__init__(vocab_size, counts)
        self.hidden_size = hidden_size
        self.embedding = nn.Embedding(vocab_size, hidden_size)
        self.given = []

    def forward(self, tokens, state=None):
        assert state is None or not state[0][0].requires_grad
        given = None if state is None else state[1].tolist()
        self.given.append(("train" if self.training else "evaluate", given))
        hidden = self.embedding(tokens)
        return hidden, ((hidden.sum(), None), tokens[:, -1])


def test_state_is_carried_within_a_pass_and_nowhere_else():
    train = [batch._replace(carry=True) for batch in batches(0, 0, 0)]  # from the first one on
    train.append(batches(0, rows=2)[0]._replace(carry=True))  # other rows
    train.append(batches(0)[0])  # a new text
    validation = [batch._replace(carry=True) for batch in batches(0, 0)]
    model = LanguageModel(Recorder, FullSoftmax, COUNTS, optimizer=SGD)
    fit(model, train, validation, max_epochs=2, val_check_interval=2, num_sanity_val_steps=1)
    last = [batch.tokens[:, -1].tolist() for batch in train]
    after = [("evaluate", None), ("evaluate", validation[0].tokens[:, -1].tolist())]
    epoch = [
        ("train", None),
        ("train", last[0]),
        *after,
        ("train", last[1]),
        ("train", None),
        *after,
        ("train", None),
    ]
    assert model.encoder.given == [("evaluate", None), *epoch, *epoch]


class HalfOnCpu(Precision):
    """Autocast and a constant loss scale, which Lightning offers on a GPU alone."""

    def __init__(self, dtype, scale):
        self.dtype, self.scale, self.losses = dtype, scale, []

    def forward_context(self):
        return torch.autocast("cpu", dtype=self.dtype) if self.dtype else nullcontext()

    def pre_backward(self, tensor, module):
        self.losses.append(tensor.detach())
        return super().pre_backward(tensor * self.scale, module)

    def _after_closure(self, model, optimizer):
        for parameter in model.parameters():
            parameter.grad /= self.scale
        super()._after_closure(model, optimizer)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("head", [FullSoftmax, ADAPTIVE])
def test_mixed_precision_steps_close_to_float32(dtype, head):
    rows = batches(0.2, 0.6)
    reference = LanguageModel(SMALL_TRANSFORMER, head, COUNTS, optimizer=SGD)
    steps = {}
    for kind, scale in ((None, 1.0), (dtype, 2.0**14)):
        model = copy.deepcopy(reference)
        plugin = HalfOnCpu(kind, scale)
        fit(model, rows, plugins=[plugin], accumulate_grad_batches=2, gradient_clip_val=10.0)
        assert all(loss.dtype == torch.float32 for loss in plugin.losses)
        steps[kind] = torch.cat(
            [
                (after - before).flatten()
                for after, before in zip(model.parameters(), reference.parameters(), strict=True)
            ]
        )
    error = (steps[dtype] - steps[None]).norm() / steps[None].norm()
    assert error < 4 * torch.finfo(dtype).eps


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_learns_under_precision(precision):
    rows = batches(0.0) * 30
    model = LanguageModel(
        SMALL_LSTM,
        ADAPTIVE,
        COUNTS,
        optimizer=partial(torch.optim.AdamW, lr=0.03, fused=True),
        lr_scheduler=partial(WarmupDecay, warmup=0.1),
    )
    logger = Rows()
    made = fit(model, rows, precision=precision, logger=logger, log_every_n_steps=1)
    losses = list(logger.column("train/loss").values())
    assert losses[-1] < 0.7 * losses[0]
    assert made.lr_scheduler_configs[0].scheduler.last_epoch == 30
    assert made.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.0, abs=1e-12)


@pytest.mark.parametrize("head", [FullSoftmax, ADAPTIVE])
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_compiled_steps_are_the_same(head):
    rows = batches(0.0, 0.5)
    eager = LanguageModel(SMALL_TRANSFORMER, head, COUNTS, optimizer=SGD)
    compiled = copy.deepcopy(eager)
    compiled.encoder.compile(backend="aot_eager")
    compiled.head.loss = torch.compile(compiled.head.loss, backend="aot_eager", fullgraph=True)
    for model in (eager, compiled):
        fit(model, rows)
    for name, value in eager.state_dict().items():
        torch.testing.assert_close(compiled.state_dict()[name], value, msg=name)


def vocabulary(words=V, original_ids=None):
    tokens = [f"w{i:02}" for i in range(words - 2)] + ["<eos>", "<unk>"]
    names = pa.array(tokens, pa.large_string())
    return Vocab(names, COUNTS[:words], words - 1, words - 2, load_tokenizer("words"), original_ids)


def saved(model, path, rows=None):
    """A checkpoint as a trainer writes it, read back without pickled code."""
    made = fit(model, rows or batches(0.0))
    made.save_checkpoint(path)
    return torch.load(path, weights_only=True)


def test_checkpoint_is_self_contained(tmp_path, monkeypatch):
    monkeypatch.setitem(COST_MODELS, "cpu", LOGITS_ALONE)
    model = LanguageModel(
        partial(SMALL_LSTM, embedding=partial(AdaptiveEmbedding, min_tail_size=2)),
        partial(AdaptiveSoftmax, min_tail_size=2),
        COUNTS,
        vocab=vocabulary(),
        tie_weights=True,
        optimizer=partial(torch.optim.AdamW, lr=0.01, betas=(0.8, 0.9)),
        lr_scheduler=partial(WarmupDecay, final=0.5),
    )
    cutoffs = model.head.cutoffs
    assert cutoffs
    hparams = saved(model, tmp_path / "a.ckpt")["hyper_parameters"]
    assert hparams["head"]["class_path"] == "lm_softmax.heads.AdaptiveSoftmax"
    assert hparams["head"]["init_args"]["cutoffs"] == cutoffs
    assert hparams["requested"]["head"]["init_args"] == {"min_tail_size": 2}

    monkeypatch.setitem(COST_MODELS, "cpu", NO_TAILS)  # another rule for "auto"
    assert LanguageModel(SMALL_LSTM, AdaptiveSoftmax, COUNTS).head.cutoffs != cutoffs
    again = LanguageModel.load_from_checkpoint(tmp_path / "a.ckpt")
    assert again.head.cutoffs == again.encoder.embedding.cutoffs == cutoffs
    assert again.head.weight is again.encoder.embedding.weight
    assert again.vocab == model.vocab
    for name, value in model.state_dict().items():
        torch.testing.assert_close(again.state_dict()[name], value, rtol=0, atol=0, msg=name)
    again.trainer = trainer(max_steps=10, max_epochs=-1)
    made = again.configure_optimizers()
    assert tuple(made["optimizer"].defaults["betas"]) == (0.8, 0.9)
    assert made["lr_scheduler"]["interval"] == "step"
    saved(again, tmp_path / "b.ckpt")


@pytest.mark.parametrize("part", ["encoder", "head", "optimizer"])
@pytest.mark.parametrize("path", ["os.system", "this.Thing"])
def test_a_checkpoint_cannot_name_foreign_code(part, path, tmp_path, monkeypatch):
    monkeypatch.setattr("os.system", lambda command: pytest.fail("it ran"))
    model = LanguageModel(SMALL_LSTM, ADAPTIVE, COUNTS)
    checkpoint = saved(model, tmp_path / "a.ckpt")
    checkpoint["hyper_parameters"][part] = {"class_path": path, "init_args": {}}
    torch.save(checkpoint, tmp_path / "b.ckpt")
    with pytest.raises(ValueError, match=f"{part}: .*{re.escape(path)}"):
        LanguageModel.load_from_checkpoint(tmp_path / "b.ckpt").configure_optimizers()


class Permuted(Recorder):
    """Notes the order of a pretrained vocabulary."""

    def permute_embedding(self, original_ids):
        self.order = original_ids


def test_pretrained_embedding_is_permuted_once(tmp_path):
    order = torch.arange(V).flip(0)
    model = LanguageModel(Permuted, FullSoftmax, COUNTS, vocab=vocabulary(V, order))
    assert torch.equal(model.encoder.order, order)
    saved(model, tmp_path / "a.ckpt")
    again = LanguageModel.load_from_checkpoint(tmp_path / "a.ckpt")
    assert not hasattr(again.encoder, "order")
    assert torch.equal(again.vocab.original_ids, order)


@pytest.mark.parametrize(
    ("encoder", "head", "words", "message"),
    [
        (partial(SMALL_LSTM, hidden_size=6), ADAPTIVE, V, "encoder.hidden_size is 8 there, 6 here"),
        (SMALL_LSTM, FullSoftmax, V, "head is AdaptiveSoftmax there, FullSoftmax here"),
        (
            SMALL_LSTM,
            partial(AdaptiveSoftmax, cutoffs=[5], min_tail_size=3),
            V,
            "head.cutoffs is [5, 12] there, [5] here",
        ),
        (
            partial(SMALL_LSTM, embedding=partial(AdaptiveEmbedding, cutoffs=[7])),
            ADAPTIVE,
            V,
            "encoder.embedding is WordEmbedding there, AdaptiveEmbedding here",
        ),
        (SMALL_LSTM, ADAPTIVE, V - 1, "another vocabulary: 30 tokens there, 29 here"),
    ],
)
def test_weights_of_another_model_are_refused_in_one_line(encoder, head, words, message, tmp_path):
    first = LanguageModel(SMALL_LSTM, ADAPTIVE, COUNTS, vocab=vocabulary())
    saved(first, tmp_path / "a.ckpt")
    second = LanguageModel(encoder, head, COUNTS[:words], vocab=vocabulary(words))
    loader = DataLoader(batches(0.0), batch_size=None)
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        trainer().fit(second, loader, ckpt_path=tmp_path / "a.ckpt")
    assert "\n" not in str(caught.value)


def test_other_dropout_may_go_on_from_a_checkpoint(tmp_path):
    saved(LanguageModel(SMALL_LSTM, ADAPTIVE, COUNTS), tmp_path / "a.ckpt")
    second = LanguageModel(partial(SMALL_LSTM, output_dropout=0.5), ADAPTIVE, COUNTS)
    loader = DataLoader(batches(0.0, 0.0), batch_size=None)
    made = trainer(max_epochs=2)
    made.fit(second, loader, ckpt_path=tmp_path / "a.ckpt")
    assert made.current_epoch == 2


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
@pytest.mark.parametrize("stop", [2, 4])  # in the midst of an epoch, and at its end
def test_goes_on_from_the_moment_of_the_checkpoint(stop, tmp_path):
    """Dropout and carried state are those of a training that was never stopped."""
    rows = batches(0, 0, 0, 0, carry=True)
    encoder = partial(SMALL_LSTM, output_dropout=0.5)
    whole = LanguageModel(encoder, ADAPTIVE, COUNTS, optimizer=SGD)
    resumed = copy.deepcopy(whole)
    keep = pl.callbacks.ModelCheckpoint(
        tmp_path, "{step}", every_n_train_steps=2, save_top_k=-1, save_on_train_epoch_end=False
    )

    def loader():
        return Resumable(rows, batch_size=None, generator=torch.Generator())

    torch.manual_seed(7)
    trainer(max_epochs=2, callbacks=[keep], enable_checkpointing=True).fit(whole, loader())
    trainer(max_epochs=2).fit(resumed, loader(), ckpt_path=tmp_path / f"step={stop}.ckpt")
    for name, value in whole.state_dict().items():
        torch.testing.assert_close(resumed.state_dict()[name], value, rtol=0, atol=0, msg=name)


class Resumable(DataLoader):
    """Leaves out the batches that were given before the checkpoint."""

    given = skip = 0

    def __iter__(self):
        self.given, first, self.skip = self.skip, self.skip, 0
        for number, batch in enumerate(super().__iter__()):
            if number >= first:
                self.given = number + 1
                yield batch

    def state_dict(self):
        return {"given": self.given}

    def load_state_dict(self, state):
        self.skip = state["given"] % len(self)


def test_a_fresh_fit_of_loaded_weights_starts_afresh(tmp_path):
    rows = batches(0, 0, carry=True)
    model = LanguageModel(Recorder, FullSoftmax, COUNTS, optimizer=SGD)
    fit(model, rows).save_checkpoint(tmp_path / "a.ckpt")
    again = LanguageModel.load_from_checkpoint(tmp_path / "a.ckpt")
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    again.trainer = trainer()
    again.on_train_start()
    assert torch.equal(torch.rand(3), expected)
    fit(again, rows)
    assert again.encoder.given[0] == ("train", None)


def test_fused_optimizer_cannot_clip_scaled_gradients():
    class Scaling:
        scaler, gradient_clip_val = object(), 1.0

    model = LanguageModel(
        SMALL_LSTM, ADAPTIVE, COUNTS, optimizer=partial(torch.optim.AdamW, fused=True)
    )
    model._trainer = Scaling()
    with pytest.raises(ValueError, match="fused optimizer cannot clip gradients under 16-mixed"):
        model.configure_optimizers()
    Scaling.gradient_clip_val = None
    assert isinstance(model.configure_optimizers(), torch.optim.AdamW)


def test_refuses_what_is_no_language_model(tmp_path):
    torch.save({"state_dict": {}, "hyper_parameters": {"a": 1}}, tmp_path / "a.ckpt")
    model = LanguageModel(SMALL_LSTM, ADAPTIVE, COUNTS)
    with pytest.raises(ValueError, match="not the checkpoint of a LanguageModel"):
        model.check_checkpoint(torch.load(tmp_path / "a.ckpt"))


def test_a_nan_stops_the_training_and_says_so():
    model = LanguageModel(SMALL_LSTM, ADAPTIVE, COUNTS, optimizer=SGD)
    nn.init.constant_(model.encoder.lstm.weight_ih_l0, torch.nan)
    with pytest.raises(
        ValueError,
        match=r"train/loss is nan at step 0 \(batch 0 of epoch 0, learning rate 0.5\): training d",
    ):
        fit(model, batches(0.0, 0.0), log_every_n_steps=1, logger=Rows())


class NanOnce(FullSoftmax):
    """Its fourth training loss is no number, as that of a wild target on a GPU."""

    calls, value = 0, torch.nan

    def loss(self, hidden, target, *, reduction="mean"):
        self.calls += 1
        loss = super().loss(hidden, target, reduction=reduction)
        return loss + (self.value if self.calls == 4 else 0.0)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize(
    ("rows", "every"),
    [(8, 6), (5, 100), (8, 2)],  # at the next step that is logged, at the end of the epoch
)
@pytest.mark.filterwarnings("ignore:The number of training batches")
def test_a_nan_of_one_step_is_seen_later(rows, every, value, monkeypatch):
    monkeypatch.setattr(NanOnce, "value", value)
    model = LanguageModel(SMALL_LSTM, NanOnce, COUNTS, optimizer=SGD)
    message = f"train/loss is {value} at step 3 (batch 3 of epoch 0, learning rate 0.5): training"
    with pytest.raises(ValueError, match=re.escape(message)):
        fit(model, batches(*[0.0] * rows), log_every_n_steps=every, logger=Rows())
    assert all(torch.isfinite(value).all() for value in model.state_dict().values())


@pytest.mark.filterwarnings("ignore:The number of training batches")
def test_a_nan_is_seen_without_logs_as_well(monkeypatch):
    monkeypatch.setattr(divergence, "MOST", 2)
    model = LanguageModel(SMALL_LSTM, NanOnce, COUNTS, optimizer=SGD)
    with pytest.raises(ValueError, match="at step 3"):
        fit(model, batches(*[0.0] * 8), log_every_n_steps=0)
    assert model.head.calls == 4


def keep_each_second_step(folder):
    keep = pl.callbacks.ModelCheckpoint(
        folder, "{step}", every_n_train_steps=2, save_top_k=-1, save_on_train_epoch_end=False
    )
    return {"callbacks": [keep], "enable_checkpointing": True, "log_every_n_steps": 100}


def test_no_checkpoint_is_written_after_a_nan(tmp_path):
    model = LanguageModel(SMALL_LSTM, NanOnce, COUNTS, optimizer=SGD)
    with pytest.raises(ValueError, match="train/loss is nan at step 3"):
        fit(model, batches(*[0.0] * 8), **keep_each_second_step(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["step=2.ckpt"]
    fit(model, batches(0.0))  # another training starts anew


class NanGradientOnce(FullSoftmax):
    """Its fourth step makes its weights nan, with a loss that is a number."""

    calls = 0

    def after_optimizer_step(self):
        self.calls += 1
        if self.calls == 4:
            nn.init.constant_(self.weight[1], torch.nan)


def test_weights_that_are_nan_are_not_kept(tmp_path):
    model = LanguageModel(SMALL_LSTM, NanGradientOnce, COUNTS, optimizer=SGD)
    message = r"not finite after 4 steps \(learning rate 0.5\): head.weight; training diverged"
    with pytest.raises(ValueError, match=message):
        fit(model, batches(*[0.0] * 8), **keep_each_second_step(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["step=2.ckpt"]


def test_an_interrupted_evaluation_leaves_nothing_behind():
    rows = batches(0.0, 0.5)
    model = LanguageModel(SMALL_LSTM, ADAPTIVE, COUNTS)
    loader = DataLoader(rows, batch_size=None)
    for stage in ("validate", "test"):
        (whole,) = getattr(trainer(), stage)(model, loader, verbose=False)
        wild = [rows[0], rows[1]._replace(target=rows[1].target + V)]
        with pytest.raises(ValueError, match="target"):
            getattr(trainer(), stage)(model, DataLoader(wild, batch_size=None), verbose=False)
        (again,) = getattr(trainer(), stage)(model, loader, verbose=False)
        assert again == whole


@pytest.mark.parametrize("sharing", [1, 2])
def test_another_number_of_processes_deals_the_rows_anew(sharing):
    """Each keeps the random numbers of its rank; no row of the state is lost or repeated."""
    device = torch.device("cpu")
    whole = torch.randn(2, 12, 3)
    moments = [
        {
            "replica": (rank, 3),
            "random": moment.random_numbers(device) | {"rank": rank},
            "state": (4, (part, (part + 1,))),
            "window": [torch.ones(3)],
            "gradients": {"a": torch.full((1,), process)},
        }
        for rank, part in enumerate(whole.split(4, moment.ROW_DIM))
        for process in range(sharing)  # those that share the words of a head
    ]
    for size, sharing_now in itertools.product((1, 2, 3, 4, 6), (1, 2)):
        num_processes, same = size * sharing_now, (size, sharing_now) == (3, sharing)
        for process in range(sharing_now):
            shares = [
                moment.own(moments, num_processes, number, Replica(number // sharing_now, size))
                for number in range(process, num_processes, sharing_now)
            ]
            assert [share["state"][0] for share in shares] == [12 // size] * size
            for part, expected in ((0, whole), (1, whole + 1)):
                found = [share["state"][1][part] for share in shares]
                found = [each[0] if part else each for each in found]
                assert torch.equal(torch.cat(found, moment.ROW_DIM), expected)
            for rank, share in enumerate(shares):
                assert (share["random"] or {}).get("rank") == (rank if rank < 3 else None)
                assert bool(share["window"]) is same
                gradients = {"a": torch.full((1,), process)} if same else {}
                assert share["gradients"] == gradients


def test_all_generators_go_on():
    def numbers():
        return torch.rand(2).tolist(), np.random.rand(2).tolist(), random.random()  # noqa: NPY002

    state = moment.random_numbers(torch.device("cpu"))
    expected = numbers()
    assert numbers() != expected
    moment.set_random_numbers(state, torch.device("cpu"))
    assert numbers() == expected


def test_an_accumulated_window_may_begin_without_targets():
    """The loss that goes into the backward pass stays that of a target, not of a batch."""
    plugin = HalfOnCpu(None, 1.0)
    model = LanguageModel(SMALL_LSTM, FullSoftmax, COUNTS, optimizer=SGD)
    fit(model, batches(1.0, 0.0), plugins=[plugin], accumulate_grad_batches=2)
    first, second = plugin.losses
    assert first == 0
    assert 0 < second < math.log(V)  # half of a loss near log(V): Lightning divides by two


def test_a_checkpoint_cannot_choose_what_makes_the_model(tmp_path, monkeypatch):
    ran = []
    monkeypatch.setattr("lightning.pytorch.cli.instantiate_module", lambda *args: ran.append(args))
    model = LanguageModel(SMALL_LSTM, ADAPTIVE, COUNTS)
    checkpoint = saved(model, tmp_path / "a.ckpt")
    checkpoint["hyper_parameters"] |= {
        "_instantiator": "lightning.pytorch.cli.instantiate_module",  # which Lightning trusts
        "_class_path": "os.system",
    }
    torch.save(checkpoint, tmp_path / "b.ckpt")
    again = LanguageModel.load_from_checkpoint(tmp_path / "b.ckpt")
    assert not ran
    assert type(again) is LanguageModel


class Lookup(nn.Module):
    def __init__(self, rows):
        super().__init__()
        self.rows = rows

    def forward(self, tokens):
        return self.rows[tokens]


def table(embedding):
    """All rows of an adaptive embedding, dense."""
    tails = zip(embedding.tail_weights, embedding.projections, strict=True)
    return torch.cat([embedding.weight, *(weight @ projection for weight, projection in tails)])


def test_tied_adaptive_gradients_are_those_of_one_dense_table():
    embedding = partial(AdaptiveEmbedding, cutoffs=[5, 12], min_tail_size=3)
    encoder = partial(SMALL_LSTM, embedding=embedding)
    model = LanguageModel(encoder, ADAPTIVE, COUNTS, tie_weights=True).double()
    naive = copy.deepcopy(model)
    (batch,) = batches(0.2)
    hidden, _ = model.encoder(batch.tokens)
    loss = model.head.loss(hidden, batch.target, reduction="mean")
    loss.backward()

    shared, head = naive.encoder.embedding, naive.head
    rows = table(shared)
    naive.encoder.embedding = Lookup(rows)
    hidden = naive.encoder(batch.tokens)[0].flatten(0, 1)
    short_list = torch.cat([rows[:5], head.cluster_weight])
    first = torch.log_softmax(hidden @ short_list.T + head.bias, -1)
    parts = [first[:, :5]]
    for i, (begin, end) in enumerate([(5, 12), (12, V)]):
        logits = hidden @ rows[begin:end].T + head.tail_biases[i]
        parts.append(first[:, 5 + i, None] + torch.log_softmax(logits, -1))
    expected = nn.functional.nll_loss(torch.cat(parts, -1), batch.target.flatten())
    expected.backward()

    torch.testing.assert_close(loss, expected, rtol=1e-10, atol=1e-10)
    found = dict(model.encoder.embedding.named_parameters())
    for name, parameter in shared.named_parameters():
        assert parameter.grad.any()
        torch.testing.assert_close(
            found[name].grad, parameter.grad, rtol=1e-10, atol=1e-10, msg=name
        )


class AdaptiveByDefault(LSTMEncoder):
    """Its embedding derives cutoffs from the data unless another is asked for."""

    def __init__(self, vocab_size, counts=None, *, embedding=AdaptiveEmbedding):
        sizes = {"embedding_size": 8, "hidden_size": 8}
        super().__init__(vocab_size, counts, embedding=embedding, **sizes)


def test_choices_of_a_default_embedding_are_saved(tmp_path, monkeypatch):
    monkeypatch.setitem(COST_MODELS, "cpu", LOGITS_ALONE)
    model = LanguageModel(AdaptiveByDefault, ADAPTIVE, COUNTS)
    cutoffs = model.encoder.embedding.cutoffs
    assert cutoffs
    saved(model, tmp_path / "a.ckpt")
    monkeypatch.setitem(COST_MODELS, "cpu", NO_TAILS)  # another rule for "auto"
    assert LanguageModel.load_from_checkpoint(tmp_path / "a.ckpt").encoder.embedding.cutoffs == (
        cutoffs
    )


def test_a_head_without_its_latent_matrix_is_saved_as_what_it_is(tmp_path):
    head = partial(ProductQuantizedSoftmax, codebook_size=4)
    model = LanguageModel(SMALL_LSTM, head, COUNTS)
    model.head = model.head.export()
    saved(model, tmp_path / "a.ckpt")
    loaded = LanguageModel.load_from_checkpoint(tmp_path / "a.ckpt")
    hidden = torch.randn(3, 8)
    assert torch.equal(loaded.head.log_prob(hidden), model.head.log_prob(hidden))
    assert loaded.head.output.latent is None
    model.head = FullSoftmax(8, V)
    with pytest.raises(ValueError, match=r"a FullSoftmax now, but the model was made with .*Prod"):
        saved(model, tmp_path / "b.ckpt")
    assert not (tmp_path / "b.ckpt").exists()


def test_processes_do_not_send_each_other_what_never_changes():
    def ignored(head):
        return LanguageModel(SMALL_LSTM, head, COUNTS)._ddp_params_and_buffers_to_ignore

    assert ignored(SampledSoftmax) == ["head.noise.cumulative", "head.noise.borders"]
    assert "head.tree" in ignored(HierarchicalSoftmax)
    codes = LanguageModel(SMALL_LSTM, partial(ProductQuantizedSoftmax, codebook_size=4), COUNTS)
    assert not hasattr(codes, "_ddp_params_and_buffers_to_ignore")  # these do change


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"head": lambda h, v, c: FullSoftmax(h, v)}, "head: <function"),
        ({"optimizer": lambda parameters: None}, "optimizer: <function"),
        ({"vocab": vocabulary(V - 1)}, "30 counts for a vocabulary of 29 tokens"),
        (
            {
                "tie_weights": True,
                "head": FullSoftmax,
                "encoder": partial(SMALL_LSTM, hidden_size=5),
            },
            "(30, 5)",
        ),
    ],
)
def test_refuses_what_cannot_be_saved_or_built(options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        LanguageModel(**{"encoder": SMALL_LSTM, "head": ADAPTIVE, "counts": COUNTS} | options)
