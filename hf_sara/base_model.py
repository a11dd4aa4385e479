"""A base model: its record in an adapter's config, its class, its modules without values, and its weights.

The weights are read one matrix at a time from safetensors files, in a folder or on the Hub, so that the model does not
have to be loaded.
"""

import os
import re
import reprlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch
import transformers
from huggingface_hub import HfFileSystem
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    rename_source_key,
    revert_weight_conversion,
)
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from .base_files import base_config, loading, parse_object
from .parts import input_embedding
from .records import check_fields
from .repos import NETWORK_ERRORS, cached_commit, hub_id, is_commit, is_hub_name, refuse_missing
from .sites import Site
from .tensor_files import MAX_HEADER_BYTES, Entry, read_header
from .weights import Weights

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
# The fields of a base in an adapter's config, and the types of their values.
BASE_FIELDS = {
    "model_id": str | None,
    "revision": str | None,
    "class": str,
    "model_type": str | None,
    "dtype": str,
    "pad_token_id": int | None,
    "eos_token_id": int | list[int] | None,
    "id2label": dict[str, str] | None,
    "problem_type": str | None,
    "vocab_size": int | None,
    "generation_eos_token_id": int | list[int] | None,
}
# The first format's records do not have these.
LATER_FIELDS = ("problem_type", "vocab_size", "generation_eos_token_id")


# ---- the record ----


@dataclass(frozen=True)
class BaseRecord:
    """
    The facts about the base model that loading an adapter needs. They never contain a path of the local machine.

    Args:
        model_id (`str`, *optional*): Hub id.
        revision (`str`, *optional*): Commit.
        class_name (`str`): Name of the model's class in transformers.
        model_type (`str`, *optional*): The `model_type` of its configuration.
        dtype (`str`): The dtype of its weights.
        pad_token_id (`int`, *optional*): The `pad_token_id` of its configuration. Training changes it to that of the
            tokenizer, and an adapter has no config.json that could keep it.
        eos_token_id (`int` or `list[int]`, *optional*): The same for `eos_token_id`.
        id2label (`dict[str, str]`, *optional*): The names of a classifier's labels.
        problem_type (`str`, *optional*): The kind of a classifier's loss.
        vocab_size (`int`, *optional*): Rows of the input embedding of tokens.
        generation_eos_token_id (`int` or `list[int]`, *optional*): The tokens that end a generated text.
    """

    model_id: str | None
    revision: str | None
    class_name: str
    model_type: str | None
    dtype: str
    pad_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    id2label: dict[str, str] | None = None
    problem_type: str | None = None
    vocab_size: int | None = None
    generation_eos_token_id: int | list[int] | None = None

    @classmethod
    def of(cls, model: nn.Module, dtype: torch.dtype | None = None) -> "BaseRecord":
        """The record of a model in memory, whose dtype may be another one while trained copies are in it."""
        config = getattr(model, "config", None)
        model_id = hub_id(getattr(config, "_name_or_path", None))
        commit = getattr(config, "_commit_hash", None) or (cached_commit(model_id) if model_id else None)
        kind = class_of(model)
        labels = getattr(config, "id2label", None)
        if "Classification" not in kind.__name__ and labels == PreTrainedConfig().id2label:
            # Every configuration has these two names, whatever the model is for.
            labels = None
        embedding = input_embedding(model)
        return cls(
            model_id=model_id,
            revision=commit if commit and is_commit(commit) else None,
            class_name=kind.__name__,
            model_type=getattr(config, "model_type", None),
            dtype=str(dtype or getattr(model, "dtype", torch.float32)).removeprefix("torch."),
            pad_token_id=getattr(config, "pad_token_id", None),
            eos_token_id=getattr(config, "eos_token_id", None),
            id2label=None if labels is None else {str(key): str(label) for key, label in labels.items()},
            problem_type=getattr(config, "problem_type", None),
            vocab_size=None if embedding is None else embedding.num_embeddings,
            generation_eos_token_id=getattr(getattr(model, "generation_config", None), "eos_token_id", None),
        )

    def is_other_than(self, other: "BaseRecord") -> bool:
        """Whether both are known to be models of the Hub, and not the same one, or not at the same commit."""
        if self.model_id is None or other.model_id is None:
            return False
        known = self.revision is not None and other.revision is not None
        return self.model_id != other.model_id or (known and self.revision != other.revision)

    def to_json(self) -> dict[str, Any]:
        """The record as it stands in an adapter's config."""
        values = vars(self)
        return {key: values["class_name" if key == "class" else key] for key in BASE_FIELDS}

    @classmethod
    def from_json(cls, record: Any) -> "BaseRecord":
        """
        Read a record.

        Raises:
            `ValueError`: If a field is wrong. In particular, the base has to be a Hub id and never a path or a URL, so
                that it is harmless to look for it.
        """
        check_fields("its base", record, BASE_FIELDS, optional=LATER_FIELDS)
        model_id, revision, class_name = record["model_id"], record["revision"], record["class"]
        if model_id is not None and not is_hub_name(model_id):
            raise ValueError(f"its base {model_id!r} is not a Hub id")
        if revision is not None and not is_commit(revision):
            raise ValueError(f"its base's revision {revision!r} is not a commit")
        if record.get("vocab_size") is not None and record["vocab_size"] < 1:
            raise ValueError(f"its base's vocab_size {record['vocab_size']} is not a number of tokens")
        if not class_name.isidentifier():
            raise ValueError(f"its base's class {class_name!r} is not the name of a class")
        if not all(re.fullmatch(r"[0-9]{1,9}", key) for key in record["id2label"] or {}):
            raise ValueError(f"its base's labels {reprlib.repr(record['id2label'])} are not numbered")
        dtype = getattr(torch, record["dtype"], None)
        if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
            raise ValueError(f"its base's dtype {record['dtype']!r} is not one that a base can have")
        return cls(**{"class_name" if key == "class" else key: value for key, value in record.items()})

    def labels(self) -> dict[str, Any]:
        """A classifier's labels as the two fields of a model's configuration, or nothing for another model."""
        if self.id2label is None:
            return {}
        names = {int(key): label for key, label in self.id2label.items()}
        return {"id2label": names, "label2id": {name: index for index, name in names.items()}}

    def restore(self, config: Any) -> None:
        """Give a configuration what the training had set in it: labels, kind of loss, pad and eos tokens."""
        for key, value in self.labels().items():
            setattr(config, key, value)
        for key in ("problem_type", "pad_token_id", "eos_token_id"):
            if getattr(self, key) is not None and hasattr(config, key):
                setattr(config, key, getattr(self, key))

    def restore_generation(self, config: Any) -> None:
        """Give a generation configuration the pad and eos tokens of the training."""
        for key, value in (("pad_token_id", self.pad_token_id), ("eos_token_id", self.generation_eos_token_id)):
            if value is not None:
                setattr(config, key, value)

    def __str__(self) -> str:
        name = self.model_id or f"a {self.class_name} without a Hub id"
        return f"{name} at revision {self.revision}" if self.revision else name


def class_of(model: nn.Module) -> type[nn.Module]:
    """The model's class as its author wrote it. A model that FSDP2 shards has a subclass that FSDP2 makes."""
    return next(kind for kind in type(model).__mro__ if not kind.__module__.startswith("torch.distributed."))


# ---- models of which only the name or the configuration is known ----


def model_class(name: Any) -> type[PreTrainedModel] | None:
    """The model class of that name in transformers, or `None`. No code from a repository is run to find it."""
    found = getattr(transformers, str(name), None)
    is_model = isinstance(found, type) and issubclass(found, PreTrainedModel) and found is not PreTrainedModel
    return found if is_model else None


def _architecture(config: PreTrainedConfig) -> type[PreTrainedModel]:
    kinds = [kind for kind in map(model_class, config.architectures or []) if kind is not None]
    if not kinds:
        raise ValueError(f"The model's architecture {config.architectures} is not one of transformers.")
    return kinds[0]


def empty_model(kind: type[PreTrainedModel], config: PreTrainedConfig) -> PreTrainedModel:
    """A model's modules on the meta device, where they have names, kinds and shapes, but no values."""
    with torch.device("meta"):
        return kind(config)


def names_in_model(model: PreTrainedModel, keys: list[str]) -> dict[str, str]:
    """
    The names in the model of a checkpoint's tensors. transformers renames tensors when it loads them, and adds or
    removes the prefix of the base model. Tensors that it changes in another way too are left out.
    """
    transforms = get_model_conversion_mapping(model)
    renamings = [transform for transform in transforms if isinstance(transform, WeightRenaming)]
    converters = [transform for transform in transforms if isinstance(transform, WeightConverter)]
    own = model.state_dict()
    found = {key: rename_source_key(key, renamings, converters, model.base_model_prefix, own) for key in keys}
    return {key: name for key, (name, converted) in found.items() if converted is None}


def names_in_checkpoint(model: nn.Module, names: list[str]) -> dict[str, str]:
    """
    By name of a tensor in the model, a name that transformers renames to it when it loads the tensor. This is the name
    itself, except for models whose own names look like older ones that are renamed.
    """
    if not isinstance(model, PreTrainedModel):
        return {name: name for name in names}
    there = names_in_model(model, names)
    return {name: name if there.get(name, name) == name else _older_name(model, name) for name in names}


def _older_name(model: PreTrainedModel, name: str) -> str:
    (older,) = revert_weight_conversion(model, {name: torch.empty(0)})
    if names_in_model(model, [older]).get(older) != name:
        raise ValueError(
            f"transformers renames {name} to {names_in_model(model, [name])[name]} when it loads tensors for this "
            f"{type(model).__name__}, so a LoRA for it would not be found."
        )
    return older


# ---- weights from files ----


def shard_names(exists: Callable[[str], bool], read: Callable[[str], bytes]) -> list[str]:
    """
    The weights files of a model that `from_pretrained` would read.

    Args:
        exists (`Callable`): Tells whether the model has a file of a given name.
        read (`Callable`): Returns the content of a file, or its first `MAX_HEADER_BYTES` bytes if it is longer.

    Raises:
        `FileNotFoundError`: If the model has no safetensors files.
        `ValueError`: If the index of the files is damaged, or names a file in another folder.
    """
    if exists(SAFE_WEIGHTS_NAME):
        return [SAFE_WEIGHTS_NAME]
    if not exists(SAFE_WEIGHTS_INDEX_NAME):
        raise FileNotFoundError(f"it has neither {SAFE_WEIGHTS_NAME} nor {SAFE_WEIGHTS_INDEX_NAME}.")
    index = parse_object(read(SAFE_WEIGHTS_INDEX_NAME), SAFE_WEIGHTS_INDEX_NAME).get("weight_map")
    if type(index) is not dict or not all(type(name) is str for name in index.values()):
        raise ValueError(
            f"{SAFE_WEIGHTS_INDEX_NAME} is damaged: it has no map of weights files, so it is not an index of weights "
            "files."
        )
    names = sorted(set(index.values()))
    # A colon stands behind the name of a drive.
    outside = [name for name in names if re.search(r"[/\\:]", name)]
    if outside:
        raise ValueError(
            f"{SAFE_WEIGHTS_INDEX_NAME} names files outside of the model: {outside[0]!r} is not a file of this folder."
        )
    return names


class BaseWeights:
    """
    A model's configuration, its modules without values, and its weights on demand.

    Args:
        name_or_folder (`str`): Folder or Hub id of a model in safetensors files. From the Hub, only the headers of the
            files and the matrices that are asked for are transferred.
        revision (`str`, *optional*): Branch, tag or commit on the Hub.
        token (`str`, *optional*): Access token for private repositories.

    Raises:
        `FileNotFoundError`: If there is no such model, or it has no safetensors files.
        `ValueError`: If a file is damaged, or the model is of an unknown kind.
    """

    def __init__(self, name_or_folder: str, revision: str | None = None, token: str | None = None):
        self.folder = Path(name_or_folder) if os.path.isdir(name_or_folder) else None
        refuse_missing(name_or_folder, "model")
        self._remote = f"{name_or_folder}@{revision or 'main'}"
        self._files = HfFileSystem(token=token)
        try:
            with loading(f"The model {name_or_folder!r}"):
                config = base_config(name_or_folder, revision=revision or "main", token=token)
                self.model = empty_model(_architecture(config), config)
                entries = [entry for file in shard_names(self._exists, self._head) for entry in self._entries(file)]
                names = names_in_model(self.model, [key for key, _ in entries])
        except NETWORK_ERRORS as error:
            raise FileNotFoundError(f"The model {name_or_folder!r} cannot be read: {error}") from error
        self._by_name = {names[key]: entry for key, entry in entries if key in names}

    def weight(self, site: Site) -> torch.Tensor:
        """The weight W of a site, of shape (d_in, d_out)."""
        module = site.linear(self.model)
        name, entry = self._by_name.get(f"{site.module}.weight", (None, None))
        if name is None or entry is None:
            raise ValueError(f"{site.name}: the checkpoint has no tensor for it. Load the model, and plan on that.")
        if entry.dtype not in DTYPES or entry.shape != tuple(module.weight.shape):
            raise ValueError(
                f"{site.name}: the file has {entry.dtype} of shape {entry.shape}, and the configuration asks for a "
                f"floating-point weight of shape {tuple(module.weight.shape)}."
            )
        with self._open(name) as file:
            file.seek(entry.start)
            content = bytearray(file.read(entry.stop - entry.start))
        if len(content) != entry.stop - entry.start:
            raise ValueError(f"{name} is damaged: it ends before {site.name} does.")
        return site.orient(torch.frombuffer(content, dtype=DTYPES[entry.dtype]).view(entry.shape), module)

    def _entries(self, name: str) -> Iterator[tuple[str, tuple[str, Entry]]]:
        """The tensors of one file, each with the name of the file."""
        with self._open(name) as file:
            entries, _ = read_header(file, name)
            size = file.seek(0, os.SEEK_END)
        if any(entry.stop > size for entry in entries.values()):
            raise ValueError(f"{name} is damaged: it has {size:,} bytes, and its header describes more.")
        return ((key, (name, entry)) for key, entry in entries.items())

    def _exists(self, name: str) -> bool:
        return (self.folder / name).is_file() if self.folder else self._files.exists(f"{self._remote}/{name}")

    def _head(self, name: str) -> bytes:
        with self._open(name) as file:
            return file.read(MAX_HEADER_BYTES)

    @contextmanager
    def _open(self, name: str) -> Iterator[IO[bytes]]:
        if self.folder:
            if not (self.folder / name).is_file():
                raise FileNotFoundError(f"it has no {name}.")
            with open(self.folder / name, "rb") as file:
                yield file
        else:
            # Only the bytes that are asked for are transferred, by range requests without read-ahead.
            with self._files.open(f"{self._remote}/{name}", "rb", cache_type="none") as file:
                yield file


def open_model(
    model: nn.Module | str | os.PathLike,
    revision: str | None = None,
    token: str | None = None,
    device: torch.device | str | None = None,
) -> tuple[nn.Module, Weights]:
    """
    A model, and the weights of its sites. A folder or a Hub id gives the modules without values, and each weight is
    read when it is asked for, see [`BaseWeights`]. See [`~hf_sara.plan`] for the device.
    """
    if isinstance(model, nn.Module):
        return model, Weights.of(model, device)
    files = BaseWeights(os.fspath(model), revision=revision, token=token)
    return files.model, Weights(files.weight, device=device)
