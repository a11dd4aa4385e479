"""Reading adapters of the first format, which hf_sara 0.1.0 wrote. Nothing writes it any more.

sara_config.json          the config
sara_adapter.safetensors  the trained tensors
sara_factors.safetensors  methods with frozen factors and factors="save" only: U and Vh of every site
"""

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from .errors import AdapterError
from .files import file_digest
from .manifest import MAX_CONFIG_BYTES, Config, parse_config
from .records import read_json
from .tensor_files import SAFETENSORS_DTYPES, Shapes, TensorFile

FORMAT_VERSION = 1
CONFIG_FILE = "sara_config.json"
TENSORS_FILE = "sara_adapter.safetensors"
FACTORS_FILE = "sara_factors.safetensors"
# The files of a save that was not finished. They count as soon as the tensors that this config describes are in place.
PENDING_CONFIG_FILE = "sara_config.json.new"
PENDING_FACTORS_FILE = "sara_factors.safetensors.new"
# A tensor takes about 150 bytes in the header of its file, so this is more than enough.
MAX_HEADER_BYTES_PER_TENSOR = 1024


@dataclass(frozen=True)
class Files:
    """The files of an adapter in which its tensors lie."""

    tensors: Path
    factors: Path

    def read_state(self, config: Config) -> dict[str, torch.Tensor]:
        """Read and check the trained tensors."""
        return _read(self.tensors, config.trained_shapes(), {config.dtype}, config.tensors_sha256)

    def read_factors(self, config: Config) -> dict[str, torch.Tensor]:
        """Read and check the frozen factors."""
        assert config.factors_sha256 is not None
        return _read(self.factors, config.saved_factor_shapes(), set(SAFETENSORS_DTYPES), config.factors_sha256)


def read(folder: Path) -> tuple[Config, Files]:
    """
    Find and read the config that belongs to the tensors in a folder.

    Raises:
        `FileNotFoundError`: If a file is missing.
        [`AdapterError`]: If the config is damaged, or of a later format.
    """
    files = Files(folder / TENSORS_FILE, folder / FACTORS_FILE)
    config_file, pending = folder / CONFIG_FILE, folder / PENDING_CONFIG_FILE
    if pending.is_file():
        # A save was interrupted. If it had put the tensors in place, they belong to the pending config.
        newer = _read_config(pending)
        limit = _most_bytes(newer.trained_shapes(), {newer.dtype})
        if files.tensors.stat().st_size <= limit and file_digest(files.tensors) == newer.tensors_sha256:
            has_moved = not (folder / PENDING_FACTORS_FILE).is_file()
            return newer, files if has_moved else replace(files, factors=folder / PENDING_FACTORS_FILE)
    if not config_file.is_file():
        raise FileNotFoundError(f"{str(folder)!r} is not a hf_sara adapter: it has no {CONFIG_FILE}.")
    return _read_config(config_file), files


def _read_config(path: Path) -> Config:
    try:
        config = read_json(path, MAX_CONFIG_BYTES)
        refuse_later_format(config, FORMAT_VERSION + 1, path)
        found = parse_config(config, FORMAT_VERSION)
    except AdapterError:
        raise
    except ValueError as error:
        raise AdapterError(f"{path} is damaged: {error}.") from error
    # The first format had no parts, so arguments that leave them open do not ask for the default ones.
    return replace(found, args=replace(found.args, modules_to_save=[]))


def refuse_later_format(config: dict[str, Any], known: int, path: Path) -> None:
    """Raise an [`AdapterError`] if a config is of a later format than the known ones."""
    version = config.get("format_version")
    if type(version) is int and version > known:
        raise AdapterError(
            f"{path} has format version {version}; this hf_sara reads versions up to {known}. "
            "Update hf_sara: pip install -U hf_sara."
        )


def _read(path: Path, shapes: Shapes, dtypes: set[str], sha256: str) -> dict[str, torch.Tensor]:
    if not path.is_file():
        raise FileNotFoundError(f"The adapter is incomplete: {path} is missing.")
    size, limit = path.stat().st_size, _most_bytes(shapes, dtypes)
    if size > limit:
        raise AdapterError(f"{path} is damaged: it has {size:,} bytes, the tensors of the config {limit:,} at most.")
    file = TensorFile(path)
    file.check(shapes, dict.fromkeys(shapes, dtypes))
    if file_digest(path) != sha256:
        raise AdapterError(
            f"{path} is damaged: its SHA-256 is not the one that sara_config.json gives. One of the two was changed, "
            "or belongs to another adapter."
        )
    return file.read(shapes)


def _most_bytes(shapes: Shapes, dtypes: set[str]) -> int:
    """
    An upper bound on the bytes of a file with these tensors. A larger file is neither opened nor digested, because its
    header may claim to be gigabytes long, and a file without content may be as long as a disk.
    """
    widest = max(getattr(torch, dtype).itemsize for dtype in dtypes)
    return widest * sum(map(math.prod, shapes.values())) + MAX_HEADER_BYTES_PER_TENSOR * (1 + len(shapes))
