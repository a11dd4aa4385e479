"""
The cache of spectra and factors: one small file per spectrum and one per set of factors, named by the digest of the
weight that they belong to. The cache only saves time: an entry that cannot be read or written is computed again.
"""

import logging
import os
import tempfile
from pathlib import Path

import torch
from huggingface_hub.constants import HF_HOME
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

logger = logging.getLogger(__name__)

# This number is raised when the package begins to compute other values than those in the cache.
CACHE_VERSION = 2


def cache_folder() -> Path:
    """The folder of the cache: `$HF_SARA_CACHE`, or else `hf_sara` in Hugging Face's own cache folder."""
    return Path(os.environ.get("HF_SARA_CACHE") or Path(HF_HOME) / "hf_sara").expanduser()


def read_entry(name: str) -> tuple[dict[str, torch.Tensor], dict[str, str]] | None:
    """The tensors and the metadata of an entry, or `None` where the cache does not have it or cannot read it."""
    path = _path(name)
    if not path.is_file():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            return {key: file.get_tensor(key) for key in list(file.keys())}, file.metadata()
    except (OSError, SafetensorError) as error:
        logger.warning("The cached file %s cannot be read (%s); it is computed again.", path, error)
        return None


def write_entry(name: str, tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> None:
    """Write an entry. If the folder cannot be written to, only a warning is logged, since nothing is lost."""
    path = _path(name)
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, suffix=".tmp")
        os.close(handle)
        save_file(tensors, temporary, metadata=metadata)
        os.replace(temporary, path)
    except (OSError, SafetensorError) as error:
        logger.warning("Could not keep %s in the cache (%s). Set HF_SARA_CACHE to a writable folder.", path, error)
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)


def _path(name: str) -> Path:
    return cache_folder() / f"v{CACHE_VERSION}" / name[:2] / f"{name}.safetensors"
