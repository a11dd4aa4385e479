"""Reading adapters of the first format, which hf_sara 0.1.0 wrote. Nothing writes it any more.

sara_config.json          the config
sara_adapter.safetensors  the trained tensors
sara_factors.safetensors  methods with frozen factors and factors="save" only: U and Vh of every site
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from .errors import AdapterError
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


@dataclass(frozen=True)
class Files:
    """The files of an adapter in which its tensors lie."""

    tensors: TensorFile
    factors: Path
    config: Path

    def contents(self) -> dict[str, bytes]:
        """The content of every file of the adapter, by the name that the file has after a save that was finished."""
        factors = {FACTORS_FILE: self.factors.read_bytes()} if self.factors.is_file() else {}
        return {TENSORS_FILE: self.tensors.content(), CONFIG_FILE: self.config.read_bytes(), **factors}

    def check(self, config: Config) -> None:
        """Compare the names, shapes and dtypes of the trained tensors with the config, without reading them."""
        shapes = config.trained_shapes()
        self.tensors.check(shapes, {name: {config.dtype} for name in shapes})

    def read_state(self, config: Config) -> dict[str, torch.Tensor]:
        """Read and check the trained tensors."""
        return _read(self.tensors, config.trained_shapes(), {config.dtype}, config.tensors_sha256)

    def read_factors(self, config: Config) -> dict[str, torch.Tensor]:
        """Read and check the frozen factors."""
        if not self.factors.is_file():
            raise FileNotFoundError(f"The adapter is incomplete: {self.factors} is missing.")
        file, dtypes = TensorFile(self.factors), set(SAFETENSORS_DTYPES)
        return _read(file, config.saved_factor_shapes(), dtypes, str(config.factors_sha256))


def read(tensors: TensorFile) -> tuple[Config, Files]:
    """
    Find and read the config that belongs to a file of tensors, beside it.

    Raises:
        `FileNotFoundError`: If there is no config.
        [`AdapterError`]: If the config is damaged, or of a later format.
    """
    folder = tensors.path.parent
    files = Files(tensors, folder / FACTORS_FILE, folder / CONFIG_FILE)
    config_file, pending = folder / CONFIG_FILE, folder / PENDING_CONFIG_FILE
    if pending.is_file():
        # A save was interrupted. If it had put the tensors in place, they belong to the pending config.
        newer = _read_config(pending)
        shapes = {name: entry.shape for name, entry in tensors.entries.items()}
        # The shapes are compared first, because a file that claims to be as long as a disk takes long to digest.
        if shapes == newer.trained_shapes() and tensors.digest() == newer.tensors_sha256:
            has_moved = not (folder / PENDING_FACTORS_FILE).is_file()
            factors = files.factors if has_moved else folder / PENDING_FACTORS_FILE
            return newer, replace(files, factors=factors, config=pending)
    if not config_file.is_file():
        raise FileNotFoundError(f"{str(folder)!r} is not a hf_sara adapter: it has no {CONFIG_FILE}.")
    return _read_config(config_file), files


def _read_config(path: Path) -> Config:
    try:
        config = read_json(path, MAX_CONFIG_BYTES)
        refuse_later_format(config, FORMAT_VERSION + 1, path)
        if config.get("format_version") == FORMAT_VERSION + 1:
            raise AdapterError(
                f"{path.with_name(TENSORS_FILE)} is damaged: it has no config in its header, which {path.name} is a "
                "copy of. Another program wrote the file. Take it from where it came once more."
            )
        for field in ("modules", "tokens"):
            if field in config:
                raise ValueError(f"it has {field}, which the first format does not know")
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


def _read(file: TensorFile, shapes: Shapes, dtypes: set[str], sha256: str) -> dict[str, torch.Tensor]:
    file.check(shapes, dict.fromkeys(shapes, dtypes))
    if file.digest() != sha256:
        raise AdapterError(
            f"{file.path} is damaged: its SHA-256 is not the one that sara_config.json gives. One of the two was "
            "changed, or belongs to another adapter."
        )
    return file.read(shapes)
