"""A causal body of the `transformers` library as encoder."""

import difflib
import inspect
import json
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from lm_softmax.encoders.base import Cache, Encoder, State

SPECIAL_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


class HuggingFaceEncoder(Encoder):
    """A causal `transformers.AutoModel`, with new weights or with those of a local folder.

    Returns the body's last hidden vectors, `(batch, time, hidden_size)`, and no state. Exactly one
    of `path` and `config` is given. Nothing is downloaded, no code of a folder is run, and weights
    are read from safetensors alone, in torch's default dtype.

    Pretrained weights expect the ids of their own tokenizer. A vocabulary that ranks those ids
    hands over the original ones through `permute_embedding`, which `forward` insists on:
    afterwards row r of the embedding is the pretrained row of `original_ids[r]`, and the hidden
    vectors are those that transformers computes on the original ids.

    Args:
        vocab_size: Number of token ids.
        counts: Not needed here.
        path: Folder with `config.json` and safetensors, as `save_pretrained` writes it.
        config: Options of the body, for new weights: `model_type` and whatever options that type
            has, such as `{"model_type": "gpt2", "n_layer": 2, "n_embd": 128, "n_head": 4}`.

    Raises:
        ImportError: If transformers is not installed; names the extra.
        ValueError: If the body cannot be built from the options or the folder, or lets a
            position see its future.
    """

    def __init__(
        self,
        vocab_size: int,
        counts: Tensor | None = None,
        *,
        path: str | None = None,
        config: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(vocab_size, counts)
        if (path is None) == (config is None):
            raise ValueError(
                "give path (a folder with pretrained weights) or config (options with model_type),"
                f" one of the two; got path={path!r} and config={config!r}"
            )
        self.body = _pretrained(path) if path is not None else _fresh(config or {}, vocab_size)
        if self.body.config.is_encoder_decoder or not isinstance(self.embedding, nn.Embedding):
            raise ValueError(
                f"{type(self.body).__name__} is not a causal body over tokens: choose the type of a"
                " decoder-only language model"
            )
        self.path = path
        self.awaits_permutation = path is not None
        self.max_positions = getattr(self.body.config, "max_position_embeddings", None)
        self.hidden_size = self._probe()
        self.body.train()

    @property
    def embedding(self) -> nn.Embedding:  # type: ignore[override]
        """The body's input embedding."""
        return self.body.get_input_embeddings()

    def forward(
        self, tokens: Int[Tensor, "batch time"], state: State = None
    ) -> tuple[Float[Tensor, "batch time hidden"], State]:
        """Hidden vectors and `None`; see `Encoder.forward`.

        Raises:
            ValueError: Also if pretrained weights still wait for `permute_embedding`.
        """
        self.check_input(tokens, state)
        self._check_permutation()
        return self.body(input_ids=tokens).last_hidden_state, None

    def _continue(
        self, window: Int[Tensor, "batch time"], num_new: int, memory: Any
    ) -> tuple[Float[Tensor, "batch hidden"], Any]:
        """The last hidden vector; the memory is the cache of transformers, changed in place.

        A body that does not speak of `past_key_values` computes the whole window each time.
        """
        self.check_input(window, None)
        self._check_permutation()
        if not self._keeps_cache:
            return super()._continue(window, num_new, memory)
        tokens = window[:, -num_new:]
        output = self.body(input_ids=tokens, past_key_values=memory, use_cache=True)
        return output.last_hidden_state[:, -1], output.past_key_values

    def select_rows(self, cache: Cache, rows: Int[Tensor, "new"]) -> Cache:
        """See `Encoder.select_rows`; the cache of transformers is changed in place."""
        window, memory = cache
        if memory is not None:
            memory.reorder_cache(rows)
        return window.index_select(0, rows), memory

    @property
    def _keeps_cache(self) -> bool:
        return "past_key_values" in inspect.signature(self.body.forward).parameters

    def _check_permutation(self) -> None:
        if self.awaits_permutation:
            raise ValueError(
                f"the weights in {self.path} expect the ids of their own tokenizer, and this"
                " vocabulary does not know them: choose that tokenizer for the data"
            )

    @torch.no_grad()
    def permute_embedding(self, original_ids: Int[Tensor, "vocab"]) -> None:
        """Give pretrained embeddings the vocabulary's order; new weights have nothing to reorder.

        Args:
            original_ids: The tokenizer's own id of each id of the vocabulary, `(vocab_size,)`;
                negative where the tokenizer has no such token, whose row then starts as the mean
                of all pretrained ones.

        Raises:
            ValueError: If there is not one for each id, or one has no pretrained row.
        """
        if not self.awaits_permutation:
            return
        weight = self.embedding.weight
        if original_ids.shape != (self.vocab_size,):
            raise ValueError(
                f"original_ids must have shape ({self.vocab_size},), one for each of"
                f" vocab_size={self.vocab_size} ids, got {tuple(original_ids.shape)}"
            )
        if (highest := int(original_ids.max())) >= len(weight):
            raise ValueError(
                f"original id {highest} of the vocabulary exceeds the {len(weight)} ids of the"
                f" weights in {self.path}: build the vocabulary with the tokenizer of that folder"
            )
        rows = weight[original_ids.to(weight.device).clamp(min=0)]
        rows[original_ids < 0] = weight.mean(0)
        self.embedding.weight = nn.Parameter(rows)
        self.embedding.num_embeddings = self.body.config.vocab_size = self.vocab_size
        self.embedding.padding_idx = None  # original ids mean nothing from here on
        for special in SPECIAL_IDS:
            setattr(self.body.config, special, None)
        self.awaits_permutation = False

    def structure(self) -> dict[str, Any]:
        """The body's whole configuration, so that a checkpoint does not need the folder."""
        known = _transformers().AutoConfig.for_model(self.body.config.model_type)
        config = {  # a folder's config.json may hold more than the body has options
            name: value
            for name, value in self.body.config.to_diff_dict().items()
            if hasattr(known, name)
            and name not in ("dtype", "transformers_version")
            and not name.startswith("_")
        }
        return {"path": None, "config": config | {"vocab_size": self.vocab_size}}

    def _probe(self) -> int:
        """The width of the hidden vectors, after a check that the first does not see the second."""
        embedded = self.embedding(torch.arange(2) % self.vocab_size).detach()[None]
        embedded.requires_grad_()
        with torch.enable_grad():
            hidden = self.body.eval()(inputs_embeds=embedded).last_hidden_state
            # no norm at the end has this direction among its invariants
            uneven = torch.arange(1, hidden.shape[-1] + 1, dtype=hidden.dtype)
            (gradient,) = torch.autograd.grad(hidden[0, 0] @ uneven, embedded)
        if gradient[0, 1].any():
            raise ValueError(
                f"a {self.body.config.model_type} body is not causal: its first position sees the"
                ' second; some types become causal by {"is_decoder": true}'
            )
        return hidden.shape[-1]


def _transformers() -> Any:
    """The library, which only this encoder needs and which takes seconds to import."""
    try:
        import transformers
    except ImportError:
        raise ImportError(
            'HuggingFaceEncoder needs the package transformers: pip install "lm_softmax[hf]"'
        ) from None
    return transformers


def _pretrained(path: str) -> Any:
    transformers = _transformers()
    if not Path(path, "config.json").is_file():
        raise ValueError(f"path={path!r} is not a folder with a config.json; nothing is downloaded")
    try:
        _refuse_kernels(json.loads(Path(path, "config.json").read_text("utf-8")))
        body, report = transformers.AutoModel.from_pretrained(
            path,
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
            use_cache=False,
            dtype=torch.get_default_dtype(),
            output_loading_info=True,
        )
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise ValueError(f"cannot load a body from {path}: {_first_line(error)}") from None
    if report["missing_keys"]:
        raise ValueError(
            f"the weights in {path} lack {len(report['missing_keys'])} of the body's parameters,"
            f" such as {min(report['missing_keys'])}"
        )
    return body


def _fresh(options: dict[str, Any], vocab_size: int) -> Any:
    transformers = _transformers()
    options = dict(options)
    _refuse_kernels(options)
    model_type = str(options.pop("model_type", "")) or "no model_type"
    try:
        known = transformers.AutoConfig.for_model(model_type)
    except ValueError:
        raise ValueError(
            f"config names {model_type}, but needs the model_type of a body that transformers"
            f" knows, such as {_nearest(model_type, list(transformers.CONFIG_MAPPING.keys()))}"
        ) from None
    if (theirs := options.setdefault("vocab_size", vocab_size)) != vocab_size:
        raise ValueError(
            f"config has vocab_size={theirs}, the data has {vocab_size} ids: leave it out"
        )
    for name in options:
        if name.startswith("_") or not hasattr(known, name):
            raise ValueError(
                f"config has {name!r}, which is no option of a {model_type} body;"
                f" nearest: {_nearest(name, [*known.to_dict(), *known.attribute_map])}"
            )
    for special in SPECIAL_IDS:  # the defaults are ids of another vocabulary
        options.setdefault(special, None)
    try:
        config = transformers.AutoConfig.for_model(model_type, **{"use_cache": False} | options)
        return transformers.AutoModel.from_config(config, dtype=torch.get_default_dtype())
    except Exception as error:  # each type of body checks its options in its own way
        raise ValueError(f"config makes no {model_type} body: {_first_line(error)}") from None


def _refuse_kernels(options: Any) -> None:
    """Refuses implementations, at any depth, that transformers would fetch from the hub."""
    for name, value in options.items() if isinstance(options, dict) else ():
        if "_implementation" in str(name) and "/" in str(value):
            raise ValueError(
                f"config has {name}={value!r}, which is code on the hub, and nothing is"
                " downloaded: leave it out"
            )
        _refuse_kernels(value)


def _nearest(name: str, known: list[str]) -> str:
    return ", ".join(difflib.get_close_matches(name, known, n=3, cutoff=0.0))


def _first_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
