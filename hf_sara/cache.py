"""
The cache of spectra and factors: one small file per spectrum and one per set of factors, named by the digest of the
weight that they belong to. The cache only saves time: an entry that cannot be read or written is computed again.
"""

import contextlib
import logging
import os
import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch
from huggingface_hub.constants import HF_HOME
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from .tensor_files import tensors_digest

logger = logging.getLogger(__name__)

Tensors = dict[str, torch.Tensor]
Entry = TypeVar("Entry")
TEMPORARY = "hf_sara-"
# The ends of the paths of the cache's own files.
OWN_FILE = re.compile(
    rf"/v\d+/([0-9a-f]{{2}})/(\1[0-9a-f]{{62}}\.(spectrum|k\d+)\.safetensors|(tmp|{TEMPORARY})\w{{8}}\.tmp)$"
)
# This number is raised when the package begins to compute other values than those in the cache.
CACHE_VERSION = 3


def cache_folder() -> Path:
    """The folder of the cache: `$HF_SARA_CACHE`, or else `hf_sara` in Hugging Face's own cache folder."""
    return Path(os.environ.get("HF_SARA_CACHE") or Path(HF_HOME) / "hf_sara").expanduser()


def read_entry(name: str, check: Callable[[Tensors, dict[str, str]], Entry]) -> Entry | None:
    """
    An entry of the cache, or `None` where the cache does not have it. An entry that cannot be read, or that is not
    what it should be, is passed over with a warning.

    Args:
        name (`str`): The name of the entry.
        check (`Callable`): Makes the entry of its tensors and metadata. It raises any error if these are wrong.
    """
    path = _path(name)
    try:
        if not path.is_file():
            return None
        with safe_open(path, framework="pt") as file:
            # The tensors are copies, because a view would keep the file open, and Windows would not let it be replaced
            # or deleted.
            tensors = {key: file.get_tensor(key).clone() for key in list(file.keys())}
            metadata = file.metadata() or {}
        if metadata.get("digest") != tensors_digest(tensors):
            raise ValueError("its tensors are not those that were written")
        return check(tensors, metadata)
    except (OSError, SafetensorError, ValueError, KeyError, TypeError, RuntimeError) as error:
        logger.warning("The cached file %s is wrong or cannot be read (%s); it is computed again.", path, error)
        return None


def write_entry(name: str, tensors: Tensors, metadata: dict[str, str]) -> None:
    """Write an entry. If the folder cannot be written to, only a warning is logged, since nothing is lost."""
    path = _path(name)
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=TEMPORARY, suffix=".tmp")
        os.close(handle)
        save_file(tensors, temporary, metadata={**metadata, "digest": tensors_digest(tensors)})
        os.replace(temporary, path)
    except (OSError, SafetensorError) as error:
        logger.warning("Could not keep %s in the cache (%s). Set HF_SARA_CACHE to a writable folder.", path, error)
        if temporary is not None:
            with contextlib.suppress(OSError):
                os.unlink(temporary)


def cache_files() -> list[Path]:
    """The files of the cache, of this version and of earlier ones, and what writes that were cut off have left."""
    found = (path for path in sorted(cache_folder().glob("v*/*/*")) if OWN_FILE.search(path.as_posix()))
    return [path for path in found if path.is_file() and not path.is_symlink()]


def clear_cache() -> list[Path]:
    """Delete the files of the cache. Returns those that stay, because Windows has them open for another program."""
    kept = []
    for path in cache_files():
        try:
            path.unlink(missing_ok=True)
        except PermissionError:
            kept.append(path)
    return kept


def _path(name: str) -> Path:
    return cache_folder() / f"v{CACHE_VERSION}" / name[:2] / f"{name}.safetensors"
