"""Repositories on the Hub: their names, their commits, and the errors of reaching them."""

import os
import re
from pathlib import Path
from typing import cast

from huggingface_hub import constants
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from huggingface_hub.file_download import repo_folder_name
from huggingface_hub.utils import validate_repo_id

# These are OSError and the errors of the HTTP library that huggingface_hub uses, which depends on its version.
NETWORK_ERRORS = cast(tuple[type[Exception], ...], HfHubHTTPError.__bases__)


def hub_id(name: str | None) -> str | None:
    """The name if it can be a Hub id, and is not a file or folder of this machine; else `None`."""
    if not name or os.path.exists(name):
        return None
    return name if is_hub_name(name) else None


def is_hub_name(name: str) -> bool:
    """Whether the Hub accepts the name for a repository."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def is_commit(text: str) -> bool:
    """Whether a revision is the full hash of a commit, which names one state of a repository for all time."""
    return re.fullmatch(r"[0-9a-f]{40}", text) is not None


def cached_commit(repo_id: str) -> str | None:
    """
    The commit of a model in huggingface_hub's cache, if the cache has exactly one. transformers 5.24 no longer keeps
    the commit that it loaded, and if the cache has several, nothing tells which of them was loaded.
    """
    snapshots = Path(constants.HF_HUB_CACHE, repo_folder_name(repo_id=repo_id, repo_type="model"), "snapshots")
    commits = [path.name for path in snapshots.iterdir()] if snapshots.is_dir() else []
    return commits[0] if len(commits) == 1 else None


def refuse_missing(name: str, kind: str) -> None:
    """Raise an error if a name is neither a folder here nor can be a Hub id. `kind` says what it would be of."""
    if not os.path.isdir(name) and hub_id(name) is None:
        raise FileNotFoundError(f"There is no {kind} folder {name!r}, and it cannot be a Hub id.")
