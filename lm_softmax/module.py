"""LanguageModel: an encoder and an output head, trained and evaluated by Lightning."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol, Self, TypeAlias, cast

import torch
from lightning.pytorch import LightningModule
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from lm_softmax import divergence, factory, gradients, moment, parallel, replicas
from lm_softmax.encoders import Encoder
from lm_softmax.heads import OutputHead
from lm_softmax.log_steps import logs_step
from lm_softmax.metrics import Perplexity
from lm_softmax.vocab import Vocab

EncoderFactory: TypeAlias = Callable[[int, Tensor | None], Encoder]
HeadFactory: TypeAlias = Callable[[int, int, Tensor | None], OutputHead]
OptimizerFactory: TypeAlias = Callable[[Iterable[Any]], Optimizer]
SchedulerFactory: TypeAlias = Callable[[Optimizer, int], LRScheduler]


class Batch(Protocol):
    """What a step needs of a batch: ids, targets, and whether rows continue the batch before."""

    tokens: Tensor
    target: Tensor
    carry: bool


class LanguageModel(LightningModule):
    """p(next token | tokens before) as an encoder and an exchangeable output head.

    The loss of an optimizer step is the mean over all targets that are not ignored, of all ranks
    and of all accumulated batches: it equals one process on the joined batch. Evaluation goes
    through `head.log_prob(hidden, target)`, never through the loss, which may be a surrogate.

    A factory is a class, `functools.partial` of a class, or `{"class_path", "init_args"}`. A
    checkpoint holds the factories as plain data, with every choice that was derived from the data,
    beside vocabulary, counts and weights: `LanguageModel.load_from_checkpoint(path)` needs
    nothing else, and the file loads with `torch.load(path, weights_only=True)`. A training that
    resumes goes on with the random numbers, the carried state and the accumulated gradients of
    each process; among another number of processes the rows of the state are dealt anew.

    A loss that was nan or infinite at any step stops the training: at the next step that is logged,
    at the end of the epoch, and before a checkpoint is written; so do weights that are not finite
    when a checkpoint is to be written.

    Logs `train/loss` (nats a target, over all ranks and accumulated batches), `val/nll` and
    `test/nll` (nats a token), `val/ppl` and `test/ppl`.

    Args:
        encoder: Makes the encoder from `(vocab_size, counts)`.
        head: Makes the output head from `(encoder.hidden_size, vocab_size, counts)`.
        counts: Training-set frequency of each id, `(vocab_size,)`; its length is `vocab_size`.
        vocab: The vocabulary of the ids; kept in the checkpoint. Where it ranks the ids of a
            pretrained tokenizer, the encoder's pretrained embedding is reordered to its ids.
        tie_weights: Share the encoder's embedding with the head.
        optimizer: Makes the optimizer from the trainable parameters.
        lr_scheduler: Makes a schedule from `(optimizer, total_steps)`, stepped once per optimizer
            step; `None` for a constant learning rate.

    Raises:
        ValueError: If a factory cannot be written into a checkpoint, `counts` and `vocab` differ
            in length, or a part refuses its options.
    """

    def __init__(
        self,
        encoder: EncoderFactory,
        head: HeadFactory,
        counts: Tensor,
        *,
        vocab: Vocab | None = None,
        tie_weights: bool = False,
        optimizer: OptimizerFactory = torch.optim.AdamW,
        lr_scheduler: SchedulerFactory | None = None,
    ) -> None:
        super().__init__()
        saved = isinstance(vocab, Mapping)  # a checkpoint hands over the written form
        self.vocab = Vocab.from_state_dict(dict(vocab)) if isinstance(vocab, Mapping) else vocab
        if self.vocab is not None and len(self.vocab) != len(counts):
            raise ValueError(f"{len(counts)} counts for a vocabulary of {len(self.vocab)} tokens")
        encoder_spec = factory.describe(encoder, "encoder")
        head_spec = factory.describe(head, "head")

        self.encoder: Encoder = factory.build(
            encoder_spec, Encoder, len(counts), counts, name="encoder"
        )
        if self.vocab is not None and self.vocab.original_ids is not None and not saved:
            self.encoder.permute_embedding(self.vocab.original_ids)
        sizes = self.encoder.hidden_size, len(counts)
        self.head: OutputHead = factory.build(head_spec, OutputHead, *sizes, counts, name="head")
        if tie_weights:
            self.head.tie_weight(self.encoder.embedding)
        if type(self.head).after_optimizer_step is OutputHead.after_optimizer_step:
            # trees and noise: every process has made the same, and each step would send them all
            constant = [f"head.{name}" for name, _ in self.head.named_buffers()]
            DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(  # type: ignore[no-untyped-call]
                self, constant
            )
        self.val_perplexity = Perplexity()
        self.test_perplexity = Perplexity()
        self._states: dict[str, tuple[int, Any]] = {}  # stage: (batch size, encoder state)
        self._moments: list[dict[str, Any]] = []  # of the checkpoint to go on from, by rank
        # [nats, targets, positions] over all ranks, a tensor a micro-batch
        self._window: list[Tensor] = []
        hint = f"or a target on the GPU is not in [0, {len(counts)})"
        self._watch = divergence.LossWatch(hint)

        self.save_hyperparameters(
            {
                "encoder": factory.pinned(encoder_spec, self.encoder, Encoder, "encoder"),
                "head": factory.pinned(head_spec, self.head, OutputHead, "head"),
                "requested": {"encoder": encoder_spec, "head": head_spec},
                "counts": counts,
                "vocab": None if self.vocab is None else self.vocab.state_dict(),
                "tie_weights": tie_weights,
                "optimizer": factory.describe(optimizer, "optimizer"),
                "lr_scheduler": lr_scheduler and factory.describe(lr_scheduler, "lr_scheduler"),
            },
            logger=False,
        )

    @classmethod
    def load_from_checkpoint(cls, checkpoint_path: Any, *args: Any, **kwargs: Any) -> Self:
        """The model of a checkpoint; see `LightningModule.load_from_checkpoint`.

        A file cannot choose what makes the model, which Lightning would let it do by name, and is
        never unpickled.
        """
        return super().load_from_checkpoint(
            checkpoint_path, *args, **kwargs | {"_instantiator": None, "weights_only": True}
        )

    def setup(self, stage: str) -> None:
        """Makes the strategy expect sparse gradients, before it wraps the model.

        Raises:
            ValueError: If the strategy cannot train this model, or not a single batch is a step.
        """
        parallel.check(self.head, self.encoder, self.trainer)
        if stage != "fit":
            return
        if (accumulated := self.trainer.accumulate_grad_batches) < 1:
            raise ValueError(f"trainer.accumulate_grad_batches must be at least 1: {accumulated}")
        replicas.prepare(self, self.trainer.strategy)

    def configure_model(self) -> None:
        """Deals the parameters to the devices of a `ModelParallelStrategy`."""
        if self.device_mesh is not None:
            parallel.shard(self, self.device_mesh)

    def on_fit_start(self) -> None:
        """Random numbers of its own for each replica of several."""
        parallel.seed(self.trainer)

    def configure_optimizers(self) -> Any:
        """The optimizer over the trainable parameters, and its schedule for each step."""
        parameters = [parameter for parameter in self.parameters() if parameter.requires_grad]
        spec = self.hparams["optimizer"]
        optimizer = factory.build(spec, Optimizer, parameters, name="optimizer")
        gradients.check_scaling(optimizer, self.trainer)
        gradients.check_optimizer(optimizer, gradients.sparse_parameters(self))
        if (spec := self.hparams["lr_scheduler"]) is None:
            return optimizer
        steps = self.trainer.estimated_stepping_batches
        schedule = factory.build(spec, LRScheduler, optimizer, steps, name="lr_scheduler")
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": schedule, "interval": "step"},
        }

    def training_step(self, batch: Batch, batch_idx: int) -> dict[str, Tensor]:
        """The summed loss over the number of targets of all ranks.

        Where batches are accumulated, it is over the number of positions of the window's first one
        instead, which is never as small as the number of its targets may be. Lightning divides the
        loss by the number of accumulated batches and DDP the gradients by the number of ranks; what
        is then missing to the mean over all targets of the window is known only at its end, and
        made good in `on_before_optimizer_step`.

        Returns:
            `loss`, and of this micro-batch over all ranks its summed loss `nats` and its number of
            `targets`.
        """
        loss = self.head.loss(self._encode(batch, "train"), batch.target, reduction="sum")
        targets = (batch.target != self.head.ignore_index).sum()
        positions = loss.new_full((), batch.target.numel())
        total = torch.stack([loss.detach(), targets.to(loss.dtype), positions])
        total = parallel.summed(total, self.trainer)
        self._window.append(total)
        rate = divergence.learning_rate(self.trainer.optimizers)
        place = divergence.Position(self.global_step, self.current_epoch, batch_idx, rate)
        self._watch.add(total[0], place)
        self._log_loss()
        divisor = self._window[0][2 if self.trainer.accumulate_grad_batches > 1 else 1]
        scale = parallel.Replica.of(self.trainer).size / divisor.clamp(min=1)
        return {"loss": loss * scale, "nats": total[0], "targets": total[1]}

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Turn accumulated gradients into those of the mean over all targets; before clipping."""
        if (accumulated := self.trainer.accumulate_grad_batches) > 1:
            divisor = self._window[0][2].clamp(min=1)
            targets = torch.stack(self._window).sum(0)[1].clamp(min=1)
            scale = divisor * accumulated / targets
            for parameter in self.parameters():
                if parameter.grad is not None:
                    gradients.local(parameter.grad).mul_(scale)
        self._window.clear()

    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clips sparse and sharded gradients as well, which Lightning does not."""
        parameters = list(self.trainer.precision_plugin.main_params(optimizer))
        if not gradients.any_unusual(parameters):
            super().configure_gradient_clipping(
                optimizer, gradient_clip_val, gradient_clip_algorithm
            )
        elif not (limit := gradient_clip_val or 0.0) <= 0:  # which Lightning takes for no limit
            gradients.check_scaling(optimizer, self.trainer)
            gradients.clip_gradients(parameters, limit, gradient_clip_algorithm or "norm")

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Lets the head learn what it learns without gradients."""
        super().optimizer_step(*args, **kwargs)
        self.head.after_optimizer_step()

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Adds a batch to the exact perplexity."""
        self._evaluate(batch, "val", self.val_perplexity)

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """Adds a batch to the exact perplexity."""
        self._evaluate(batch, "test", self.test_perplexity)

    def predict_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Log-probability of each target in nats, `(batch, time)`; 0 where it is ignored."""
        return self.head.log_prob(self._encode(batch, "predict"), batch.target)

    def on_train_epoch_start(self) -> None:
        """A new pass over the text: no state, and no half window of a stopped epoch."""
        self._states.pop("train", None)
        self._window.clear()

    def on_train_epoch_end(self) -> None:
        """Stops a training whose loss was nan since the last step that was logged."""
        self._watch.check()

    def on_validation_epoch_start(self) -> None:
        """A new pass over the text, and no sums of an interrupted one."""
        self._states.pop("val", None)
        self.val_perplexity.reset()

    def on_test_epoch_start(self) -> None:
        """A new pass over the text, and no sums of an interrupted one."""
        self._states.pop("test", None)
        self.test_perplexity.reset()

    def on_predict_epoch_start(self) -> None:
        """A new pass over the text."""
        self._states.pop("predict", None)

    def on_validation_epoch_end(self) -> None:
        """Logs the perplexity of the whole split."""
        self._log_perplexity("val", self.val_perplexity)

    def on_test_epoch_end(self) -> None:
        """Logs the perplexity of the whole split."""
        self._log_perplexity("test", self.test_perplexity)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Adds what the next step depends on beside the weights, of each process.

        Raises:
            ValueError: If the loss or a weight was nan or infinite, or the head was replaced by one
                of another class, which the file could not be loaded with.
        """
        self._watch.check()
        self._check_weights()
        spec = self.hparams["requested"]["head"]
        expected = cast(type, factory.find_class(spec["class_path"], OutputHead, "head"))
        if not isinstance(self.head, expected):  # sharded heads are of a subclass
            raise ValueError(
                f"the head is a {type(self.head).__name__} now, but the model was made with"
                f" {spec['class_path']}: make a LanguageModel with the head it is to have"
            )
        # anew: a head without its latent matrix has another structure than the one it came from
        pinned = factory.pinned(spec, self.head, OutputHead, "head")
        checkpoint[self.CHECKPOINT_HYPER_PARAMS_KEY]["head"] = pinned
        rows, state = self._states.get("train", (0, None))
        mine = {
            "replica": tuple(parallel.Replica.of(self.trainer)),
            "random": moment.random_numbers(self.device),
            "state": (rows, moment.detached(state, "cpu")),
            "window": [part.cpu() for part in self._window],
            "gradients": moment.accumulated(self) if self._window else {},
        }
        ranks = self.trainer.world_size, self.trainer.global_rank
        checkpoint["moments"] = moment.gathered(mine, *ranks)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuses the weights of another structure or vocabulary in one line."""
        self.check_checkpoint(checkpoint)
        self._moments = checkpoint.get("moments", [])

    def on_train_start(self) -> None:
        """Goes on from the moment of the checkpoint that the training resumes from."""
        moments, self._moments = self._moments, []
        self._watch.clear()
        if not moments or self.trainer.ckpt_path is None:
            return
        # A schedule that asks for the number of steps has Lightning make the loaders before it
        # knows of the checkpoint, and forget their positions.
        self.trainer.fit_loop._load_combined_loader_states()
        ranks = self.trainer.world_size, self.trainer.global_rank
        mine = moment.own(moments, *ranks, parallel.Replica.of(self.trainer))
        if mine["random"] is not None:
            moment.set_random_numbers(mine["random"], self.device)
        rows, state = mine["state"]
        self._states["train"] = (rows, moment.detached(state, self.device))
        self._window = [part.to(self.device) for part in mine["window"]]
        moment.set_accumulated(self, mine["gradients"])

    def check_checkpoint(self, checkpoint: Mapping[str, Any]) -> None:
        """Compares structure and vocabulary of a checkpoint with this model's.

        Raises:
            ValueError: If the weights do not fit; names the options that differ.
        """
        theirs = checkpoint.get("hyper_parameters", {})
        if not {"encoder", "head", "counts", "vocab"} <= set(theirs):
            raise ValueError("not the checkpoint of a LanguageModel: it holds no encoder and head")
        if self.vocab is not None and theirs["vocab"] is not None:
            vocab = Vocab.from_state_dict(theirs["vocab"])
            if vocab.fingerprint != self.vocab.fingerprint:
                raise ValueError(
                    f"the checkpoint was trained with another vocabulary: "
                    f"{len(vocab)} tokens there, {len(self.vocab)} here, or in another order"
                )
        here = {name: tuple(value.shape) for name, value in self.state_dict().items()}
        if "state_dict" not in checkpoint:  # a `ModelParallelStrategy` has loaded it already
            return
        there = {name: tuple(value.shape) for name, value in checkpoint["state_dict"].items()}
        if here != there:
            options = factory.differences(_options(theirs), _options(self.hparams))
            differences = options or factory.differences(there, here)
            raise ValueError(f"the checkpoint holds another model: {'; '.join(differences[:4])}")

    def _encode(self, batch: Batch, stage: str) -> Tensor:
        """Hidden vectors; each stage carries a state of its own from batch to batch."""
        size = len(batch.tokens)
        before, state = self._states.get(stage, (size, None))
        if not batch.carry or before != size:
            state = None
        hidden, state = self.encoder(batch.tokens, state)
        self._states[stage] = (size, moment.detached(state, hidden.device))
        return hidden

    def _log_loss(self) -> None:
        """Logs nats a target over the window so far, where the trainer logs this step."""
        if not logs_step(self.trainer, self.global_step + 1):
            return
        self._watch.check()
        # On the host, or the progress bar waits for the device each time it is drawn.
        nats, targets, _ = torch.stack(self._window).sum(0).cpu()
        self.log("train/loss", nats / targets.clamp(min=1), prog_bar=True, batch_size=1)

    def _check_weights(self) -> None:
        """Raises a ValueError if a weight is nan or infinite, in any process."""
        bad, fine = divergence.not_finite(self), True
        if self.trainer.world_size > 1:
            fine = self.trainer.strategy.reduce_boolean_decision(not bad)
        if bad or not fine:
            rate = divergence.learning_rate(self.trainer.optimizers)
            raise ValueError(
                f"weights are not finite after {self.global_step} steps (learning rate {rate}):"
                f" {', '.join(bad[:3]) or 'those of another process'}; {divergence.ADVICE}"
            )

    def _evaluate(self, batch: Batch, stage: str, perplexity: Perplexity) -> None:
        log_prob = self.head.log_prob(self._encode(batch, stage), batch.target)
        perplexity.update(log_prob, batch.target, self.head.ignore_index)

    def _log_perplexity(self, stage: str, perplexity: Perplexity) -> None:
        self.log(f"{stage}/nll", perplexity.nll(), sync_dist=True)  # equal on all ranks already
        self.log(f"{stage}/ppl", perplexity.compute(), prog_bar=True, sync_dist=True)
        perplexity.reset()


def _options(hparams: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a model as `{"head": "AdaptiveSoftmax", "head.cutoffs": [...], ...}`."""
    parts = {
        name: factory.complete(hparams[name], base, name)
        for name, base in (("encoder", Encoder), ("head", OutputHead))
    }
    return factory.flatten(parts) | {"tie_weights": hparams["tie_weights"]}
