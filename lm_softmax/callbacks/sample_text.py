"""Text from the model at each validation."""

from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from lightning.pytorch.utilities import rank_zero_warn

from lm_softmax.decoding import generate


class SampleText(pl.Callback):
    """Writes text that the model generates to TensorBoard (`val/sample`), at every n-th validation.

    Only rank zero generates, from the module's own `encoder`, `head` and `vocab` and without a
    collective; where parameters are sharded (FSDP, tensor parallel) that is impossible and there is
    no text, with a warning. The random numbers come from a generator of the callback's own with the
    same seed each time: training is the same with and without it.

    Args:
        prompt: Text to continue; without one the text begins where a document does.
        num_tokens: Number of tokens to generate.
        temperature: Divides the log-probabilities of the words; 0 takes the likeliest.
        top_k: Sample among this many likeliest words only.
        top_p: Sample among the likeliest words that together have this probability only.
        every_n_validations: 1 generates at each validation.
        seed: Seed of the random numbers.

    Attributes:
        last_text: The text generated last, prompt included; empty before the first and on ranks
            other than zero.

    Raises:
        ValueError: If `num_tokens` or `every_n_validations` is not positive, or, when a trainer
            starts, if the module has no vocabulary.
    """

    def __init__(
        self,
        prompt: str | None = None,
        num_tokens: int = 64,
        *,
        temperature: float = 0.8,
        top_k: int | None = None,
        top_p: float | None = None,
        every_n_validations: int = 1,
        seed: int = 0,
    ) -> None:
        for name, value in (
            ("num_tokens", num_tokens),
            ("every_n_validations", every_n_validations),
        ):
            if value < 1:
                raise ValueError(f"{name} is {value}: it must be at least 1")
        self.prompt = prompt
        self.num_tokens = num_tokens
        self.temperature = temperature
        self.top_k = top_k
        self.top_p = top_p
        self.every_n_validations = every_n_validations
        self.seed = seed
        self.last_text = ""
        self._num_validations = 0

    def state_dict(self) -> dict[str, Any]:
        """The validations so far, and the text of the last one that had one."""
        return {"num_validations": self._num_validations, "last_text": self.last_text}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes on counting from a checkpoint."""
        self._num_validations = state_dict["num_validations"]
        self.last_text = state_dict["last_text"]

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Refuses a module that cannot turn text into tokens."""
        if getattr(pl_module, "vocab", None) is None:
            raise ValueError("SampleText needs a model with a vocabulary: give it `vocab`")

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Generates and writes the text."""
        if trainer.sanity_checking or not trainer.is_global_zero:
            return
        self._num_validations += 1
        if self._num_validations % self.every_n_validations:
            return
        if not isinstance(trainer.strategy, SingleDeviceStrategy | DDPStrategy):
            rank_zero_warn(
                f"no sample text: {type(trainer.strategy).__name__} may hold parts of the model on"
                " other ranks"
            )
            return
        self.last_text = self._generate(pl_module)
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                text = as_code_block(self.last_text)
                logger.experiment.add_text("val/sample", text, trainer.global_step)

    def _generate(self, pl_module: Any) -> str:
        device, vocab = pl_module.device, pl_module.vocab
        prompt = [vocab.eos_id, *vocab.encode(self.prompt or "")]
        # A compiled encoder would be compiled again for each length of the text.
        with torch.compiler.set_stance("force_eager"):
            tokens = generate(
                pl_module.encoder,
                pl_module.head,
                torch.tensor([prompt], device=device),
                self.num_tokens,
                temperature=self.temperature,
                top_k=self.top_k,
                top_p=self.top_p,
                generator=torch.Generator(device).manual_seed(self.seed),
            )
        return str(vocab.decode(tokens[0, 1:].tolist()))


def as_code_block(text: str) -> str:
    """Returns Markdown that shows the text as it is, whatever it contains."""
    return "".join(f"    {line}\n" for line in text.splitlines() or [""])
