"""A base model's weights read one matrix at a time, from safetensors files in a folder or on the Hub, without loading
the model: what a plan needs of a model that would not fit into memory."""

import json
import math
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch
import transformers
from huggingface_hub import HfFileSystem
from torch import nn
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from .arguments import SaraArguments
from .planning import Plan, count_base, plan_sites
from .sites import Site, find_sites
from .storage import NETWORK_ERRORS, check_fields, hub_id

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
# Room for a quarter of a million tensors, in the header of a file or in the index of all files.
MAX_HEADER_BYTES = 32 * 2**20
ENTRY_FIELDS = {"dtype": str, "shape": list[int], "data_offsets": list[int]}


@dataclass(frozen=True)
class Entry:
    """Where a tensor is: its file, and the dtype, shape and byte range that the file's header gives."""

    file: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


class Checkpoint:
    """
    A model's configuration, its modules without values, and its weights on demand.

    Args:
        name_or_folder (`str`): Folder or Hub id of a model in safetensors files. From the Hub, only the headers of the
            files and the matrices that are asked for are transferred.
        revision (`str`, *optional*): Branch, tag or commit on the Hub.
        token (`str`, *optional*): For private repositories.

    Raises:
        `FileNotFoundError`: If there is no such model, or it has no safetensors files.
        `ValueError`: If a file is damaged, or the model is of an unknown kind.
    """

    def __init__(self, name_or_folder: str, revision: str | None = None, token: str | None = None):
        self.folder = Path(name_or_folder) if Path(name_or_folder).is_dir() else None
        if self.folder is None and hub_id(name_or_folder) is None:
            raise FileNotFoundError(f"There is no model folder {name_or_folder!r}, and it cannot be a Hub id.")
        self._remote = "" if self.folder else f"{name_or_folder}@{revision or 'main'}"
        self._files = None if self.folder else HfFileSystem(token=token)
        try:
            config = AutoConfig.from_pretrained(name_or_folder, revision=revision or "main", token=token)
            self.model = empty_model(_architecture(config), config)
            entries = [entry for file in self._shards() for entry in self._entries(file)]
        except NETWORK_ERRORS as error:
            raise FileNotFoundError(f"The model {name_or_folder!r} cannot be read: {error}") from error
        names = names_in_model(self.model, [key for key, _ in entries])
        self._by_name = {names[key]: entry for key, entry in entries if key in names}

    def plan(self, args: SaraArguments) -> Plan:
        """What [`~hf_sara.plan`] gives for the loaded model."""
        return plan_sites(find_sites(self.model, args), args, count_base(self.model), self.weight)

    def weight(self, site: Site) -> torch.Tensor:
        """The weight W of a site, of shape (d_in, d_out)."""
        module = self.model.get_submodule(site.module)
        entry = self._by_name.get(f"{site.module}.weight")
        if entry is None:
            raise ValueError(f"{site.name}: the checkpoint has no tensor for it. Load the model, and plan on that.")
        if entry.dtype not in DTYPES or entry.shape != tuple(module.weight.shape):
            raise ValueError(
                f"{site.name}: the file has {entry.dtype} of shape {entry.shape}, and the configuration asks for a "
                f"floating-point weight of shape {tuple(module.weight.shape)}."
            )
        with self._open(entry.file) as file:
            file.seek(entry.start)
            content = bytearray(file.read(entry.stop - entry.start))
        if len(content) != entry.stop - entry.start:
            raise ValueError(f"{entry.file} is damaged: it ends before {site.name} does.")
        return site.orient(torch.frombuffer(content, dtype=DTYPES[entry.dtype]).view(entry.shape), module)

    def _shards(self) -> list[str]:
        if self._exists(SAFE_WEIGHTS_NAME):
            return [SAFE_WEIGHTS_NAME]
        if not self._exists(SAFE_WEIGHTS_INDEX_NAME):
            raise FileNotFoundError(f"it has neither {SAFE_WEIGHTS_NAME} nor {SAFE_WEIGHTS_INDEX_NAME}.")
        with self._open(SAFE_WEIGHTS_INDEX_NAME) as file:
            index = _parse(file.read(MAX_HEADER_BYTES), SAFE_WEIGHTS_INDEX_NAME).get("weight_map")
        if type(index) is not dict or not all(type(name) is str for name in index.values()):
            raise ValueError(f"{SAFE_WEIGHTS_INDEX_NAME} is damaged: it has no map of weights files.")
        names = sorted(set(index.values()))
        if any("/" in name or "\\" in name for name in names):
            raise ValueError(f"{SAFE_WEIGHTS_INDEX_NAME} names files outside of the model.")
        return names

    def _entries(self, name: str) -> Iterator[tuple[str, Entry]]:
        """The tensors of one file: eight bytes with the header's length, the header as JSON, then the bytes."""
        with self._open(name) as file:
            (length,) = struct.unpack("<Q", file.read(8).ljust(8, b"\0"))
            if not 2 <= length <= MAX_HEADER_BYTES:
                raise ValueError(f"{name} is damaged: it is not a safetensors file.")
            header = _parse(file.read(length), name)
        for key, record in header.items():
            if key == "__metadata__":
                continue
            check_fields(f"{key!r} of {name}", record, ENTRY_FIELDS)
            start, stop = record["data_offsets"]
            entry = Entry(name, record["dtype"], tuple(record["shape"]), 8 + length + start, 8 + length + stop)
            size = DTYPES[entry.dtype].itemsize * math.prod(entry.shape) if entry.dtype in DTYPES else None
            if size is not None and (start < 0 or stop - start != size):
                raise ValueError(f"{name} is damaged: {key} has {stop - start} bytes, its shape asks for {size}.")
            yield key, entry

    def _exists(self, name: str) -> bool:
        return (self.folder / name).is_file() if self.folder else self._files.exists(f"{self._remote}/{name}")

    @contextmanager
    def _open(self, name: str) -> Iterator[IO[bytes]]:
        if self.folder:
            if not (self.folder / name).is_file():
                raise FileNotFoundError(f"it has no {name}.")
            with open(self.folder / name, "rb") as file:
                yield file
        else:
            # Reads what is asked for by range requests, with no read-ahead.
            with self._files.open(f"{self._remote}/{name}", "rb", cache_type="none") as file:
                yield file


def _parse(content: bytes, name: str) -> dict[str, Any]:
    try:
        parsed = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{name} is damaged: it is not JSON ({error}).") from error
    if type(parsed) is not dict:
        raise ValueError(f"{name} is damaged: it is not a JSON object.")
    return parsed


# ---- models of which only the name or the configuration is known ----


def model_class(name: Any) -> type[PreTrainedModel] | None:
    """The model class of transformers of that name, or `None`. No code of a repository is run to find it."""
    found = getattr(transformers, str(name), None)
    is_model = isinstance(found, type) and issubclass(found, PreTrainedModel) and found is not PreTrainedModel
    return found if is_model else None


def _architecture(config: PreTrainedConfig) -> type[PreTrainedModel]:
    kinds = [kind for kind in map(model_class, config.architectures or []) if kind is not None]
    if not kinds:
        raise ValueError(f"The model's architecture {config.architectures} is not one of transformers.")
    return kinds[0]


def empty_model(kind: type[PreTrainedModel], config: PreTrainedConfig) -> PreTrainedModel:
    """A model's modules on the meta device: names, kinds and shapes, no values."""
    with torch.device("meta"):
        return kind(config)


def names_in_model(model: nn.Module, keys: list[str]) -> dict[str, str]:
    """
    The model's names of a checkpoint's tensors: transformers renames them as it loads them, and adds or removes the
    prefix of the base model. Tensors that it also changes are left out.
    """
    transforms = get_model_conversion_mapping(model)
    renamings = [transform for transform in transforms if isinstance(transform, WeightRenaming)]
    converters = [transform for transform in transforms if isinstance(transform, WeightConverter)]
    own = model.state_dict()
    found = {key: rename_source_key(key, renamings, converters, model.base_model_prefix, own) for key in keys}
    return {key: name for key, (name, converted) in found.items() if converted is None}
