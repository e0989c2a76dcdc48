"""From an option or a saved state to a tokenizer."""

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError

from lm_softmax.vocab.hub import hub_reachable, is_hub_id, one_line
from lm_softmax.vocab.huggingface import HuggingFaceTokenizer
from lm_softmax.vocab.tokenizer import Tokenizer
from lm_softmax.vocab.words import WordTokenizer


def from_state_dict(state: dict[str, Any]) -> Tokenizer:
    """The tokenizer whose `state_dict` this is."""
    if state["kind"] == "huggingface":
        return HuggingFaceTokenizer(state["definition"], state["eos"])
    return WordTokenizer(state["kind"])


def load_tokenizer(name: str) -> Tokenizer:
    """The tokenizer of an option.

    Args:
        name: "whitespace", "words", the path of a `tokenizer.json` or of a folder that holds one,
            or the id of a repository on the Hugging Face Hub. Its end-of-sequence token is that
            of the `tokenizer_config.json` beside it, if any.

    Raises:
        ValueError: If there is no such tokenizer, or the hub cannot be reached.
    """
    if name in ("whitespace", "words"):
        return WordTokenizer(name)
    path = Path(name).expanduser()
    file = path / "tokenizer.json" if path.is_dir() else path
    if not file.is_file():
        if path.is_dir() or not is_hub_id(name):
            raise ValueError(f"no tokenizer {name!r}: there is no file {str(file)!r}")
        file = _from_hub(name)
    config = file.with_name("tokenizer_config.json")
    try:
        eos = _configured_eos(config) if config.is_file() else None
        return HuggingFaceTokenizer(file.read_text("utf-8"), eos)
    except (ValueError, OSError) as error:
        raise ValueError(f"cannot read tokenizer {str(file)!r}: {one_line(error)}") from error


def _configured_eos(file: Path) -> str | None:
    """The end-of-sequence token of a `tokenizer_config.json`."""
    config = json.loads(file.read_text("utf-8"))
    if not isinstance(config, dict):
        raise ValueError(f"{file.name} holds a {type(config).__name__}, not an object")
    eos = config.get("eos_token")
    name = eos.get("content") if isinstance(eos, dict) else eos
    if not isinstance(name, str) and eos is not None:
        raise ValueError(f"eos_token {json.dumps(eos)} of {file.name} names no token")
    return name


def _from_hub(repo_id: str) -> Path:
    """Fetch `tokenizer.json`, and `tokenizer_config.json` beside it, or find them in the cache."""
    local = not hub_reachable(repo_id, "model")
    try:
        file = hf_hub_download(repo_id, "tokenizer.json", local_files_only=local)
        with suppress(EntryNotFoundError):  # it is optional
            hf_hub_download(repo_id, "tokenizer_config.json", local_files_only=local)
    except EntryNotFoundError as error:
        where = "could not be reached and its cache has none" if local else "has no tokenizer.json"
        raise ValueError(
            f"no tokenizer {repo_id!r}: neither 'whitespace' nor 'words' nor a local path, and the"
            f" Hugging Face Hub {where}"
        ) from error
    except OSError as error:  # errors of the hub are of this kind too
        hint = "; if it needs a login: hf auth login" if isinstance(error, HfHubHTTPError) else ""
        raise ValueError(
            f"cannot fetch tokenizer {repo_id!r} from the Hugging Face Hub: {one_line(error)}{hint}"
        ) from error
    return Path(file)
