"""The steps of the command: read, compress, fine-tune, measure, write."""

import argparse
import copy
import inspect
import sys
from dataclasses import asdict
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.optim import Optimizer

import lm_softmax.schedule  # noqa: F401  a class is known by its name once it is imported
from lm_softmax import __version__, factory
from lm_softmax.checkpoint import Checkpoint
from lm_softmax.compress.convert import compress, content, file_bytes, save
from lm_softmax.compress.figures import (
    MB,
    MOST,
    Figures,
    Finder,
    megabytes,
    ms_per_token,
    num_parameters,
)
from lm_softmax.compress.training import finetune, perplexity
from lm_softmax.data import TextDataModule
from lm_softmax.heads import SVDPreview, TopK, agreement
from lm_softmax.module import LanguageModel
from lm_softmax.specs import Spec
from lm_softmax.validation import hidden_vectors, validation_text

FORMAT = 1  # of the JSON file: raise it when what a key means changes
NUM_HIDDEN = 1024  # positions of the validation split that speed and agreement are measured on
SEED = 1  # of fine-tuning
SHARE_OF_LR = 0.1  # of the run's learning rate, for fine-tuning


class Study:
    """What one call of the command does.

    Args:
        options: Those of the command, checked as far as they say themselves.

    Raises:
        ValueError: If the checkpoint or its data cannot be read.
    """

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.checkpoint = Checkpoint(options.checkpoint)
        self.source = self.checkpoint.model()
        self.source.to(options.device).eval()
        self.finetunes = {options.finetune_minutes, options.finetune_steps} != {None}
        self.data = None if options.no_eval else self._data()
        self.rows: list[Figures] = []
        self.notes: list[str] = []
        self.finders: dict[str, tuple[Finder, Tensor]] = {}
        self.exact: TopK | None = None

    def run(self) -> dict[str, Any]:
        """Everything, and writes the checkpoint; what is returned is plain data for JSON."""
        options, model = self.options, None
        if options.head is not None:  # first, because it finds what is wrong with the options
            say(f"{options.head} from {type(self.source.head).__name__}")
            model = compress(self.source, options.head).to(options.device)
        previews = [(spec, self._preview(spec)) for spec in options.preview]
        self._look_at("source", self.source)
        for spec, preview in previews:
            self._look_at_preview(str(spec), preview)
        if model is not None:
            self._note_ties()
            self._look_at("compressed", model)
            if self.finetunes:
                self._finetune(model)
                self._look_at("fine-tuned", model)
        if self.finders:
            say("timing topk")
            times = ms_per_token(self.finders, self.source.head.vocab_size)
            for row in self.rows:
                row.ms_per_token = times[row.name]
        if model is not None:
            save(content(self.checkpoint, self.source, model), options.output)
        return self._report(model)

    def _data(self) -> TextDataModule:
        """The data of the run, their vocabulary that of the checkpoint; raises if out of reach."""
        try:
            data = validation_text(self.checkpoint, self.options.data_path)
            if self.finetunes:
                data.train_dataloader()
        except (ValueError, OSError) as error:
            hint = "" if self.finetunes else "; --no-eval does without"
            raise ValueError(f"{error}{hint}") from error
        return data

    def _preview(self, spec: Spec) -> SVDPreview:
        say(f"{spec} of {type(self.source.head).__name__}")
        return SVDPreview(self.source.head, **spec.options)

    def _look_at(self, name: str, model: LanguageModel) -> None:
        """A row for a model as it is now."""
        say(f"{name}: perplexity")
        row = Figures(name, megabytes(model.head))
        row.file_mb = file_bytes(content(self.checkpoint, self.source, model)) / MB
        row.num_parameters = num_parameters(model)
        self.rows.append(row)
        if self.data is None:
            return
        options = self.options
        row.val_ppl = perplexity(model, self.data, options.device, options.eval_batches)
        model.to(options.device).eval()
        head = model.head if model is self.source else copy.deepcopy(model.head)
        self._find(row, head.topk, hidden_vectors(model, self.data, NUM_HIDDEN))

    def _look_at_preview(self, name: str, preview: SVDPreview) -> None:
        """A row for an approximate top k of the source."""
        row = Figures(name, megabytes(preview))
        self.rows.append(row)
        self._find(row, preview.topk, self.finders["source"][1])

    def _find(self, row: Figures, topk: Finder, hidden: Tensor) -> None:
        """Notes whose time is to be taken, and compares what it finds with the source."""
        self.finders[row.name] = topk, hidden
        found = topk(hidden, min(MOST, self.source.head.vocab_size))
        if self.exact is None:
            self.exact = found
        else:
            row.top_1, row.top_10 = agreement(self.exact, found)

    def _finetune(self, model: LanguageModel) -> None:
        assert self.data is not None
        options, spec = self.options, self.source.hparams["optimizer"]
        cls = factory.find_class(spec["class_path"], Optimizer, "optimizer")
        lr = options.lr
        if lr is None:
            default = inspect.signature(cls).parameters["lr"].default
            lr = SHARE_OF_LR * float(spec["init_args"].get("lr", default))
        say(f"fine-tuning with lr {lr:g}")
        pl.seed_everything(SEED if options.seed is None else options.seed, verbose=False)
        steps = finetune(
            model,
            self.data,
            options.device,
            minutes=options.finetune_minutes,
            num_steps=options.finetune_steps,
            lr=lr,
        )
        model.to(options.device)
        self.notes.append(f"fine-tuned: {steps:,} steps of {cls.__name__} with lr {lr:g}")

    def _note_ties(self) -> None:
        if self.source.hparams["tie_weights"]:
            self.notes.append(
                f"untied: the output matrix was the embedding too, which keeps it"
                f" ({megabytes(self.source.encoder.embedding):,.2f} MB); the new head is its own"
            )

    def _report(self, model: LanguageModel | None) -> dict[str, Any]:
        size = self.checkpoint.path.stat().st_size / MB
        self.notes.append(f"{self.checkpoint.path} itself has {size:,.2f} MB")
        return {
            "format": FORMAT,
            "command": "",
            "source": str(self.checkpoint.path),
            "source_file_mb": size,
            "head": None if model is None else model.hparams["head"],
            "rows": [asdict(row) for row in self.rows],
            "notes": self.notes,
            "device": self.options.device,
            "threads": torch.get_num_threads(),
            "versions": {"lm_softmax": __version__, "torch": torch.__version__},
        }


def say(line: str) -> None:
    """Tells someone who watches how far it is."""
    if sys.stderr.isatty():
        sys.stderr.write(f"\r\x1b[K{line}")
        sys.stderr.flush()


def hush() -> None:
    """Takes the last line back."""
    say("")
