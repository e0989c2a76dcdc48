"""The Hugging Face Hub, asked once and briefly whether it is there."""

import re

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError

TIMEOUT = 5.0  # seconds


def is_hub_id(name: str) -> bool:
    """Whether a name has the form `repository` or `owner/repository`."""
    return re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", name) is not None


def hub_reachable(repo_id: str, repo_type: str) -> bool:
    """Whether the hub answers and has a repository.

    The libraries on top of it retry for half a minute where there is no network; asking first
    keeps that to `TIMEOUT`. Callers then look into the local cache alone.

    Args:
        repo_id: `owner/repository`.
        repo_type: "dataset" or "model".

    Raises:
        ValueError: If the hub answers that there is no such repository, or refuses it.
    """
    try:
        HfApi().repo_info(repo_id, repo_type=repo_type, timeout=TIMEOUT)
    except RepositoryNotFoundError as error:
        raise ValueError(
            f"no {repo_type} {repo_id!r} on the Hugging Face Hub, or it needs a login"
            " (`hf auth login`)"
        ) from error
    except HfHubHTTPError as error:
        if error.response.status_code >= 500:
            return False
        raise ValueError(
            f"the Hugging Face Hub refused {repo_type} {repo_id!r}: {one_line(error)}"
        ) from error
    except Exception:  # each HTTP library has its own errors for "no network"
        return False
    return True


def one_line(error: BaseException) -> str:
    """What an error says, on one line of bounded length."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else text[:297] + "..."
