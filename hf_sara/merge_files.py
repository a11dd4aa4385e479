"""Merging a saved adapter into a saved model file by file, without loading the model."""

import contextlib
import json
import logging
import math
import shutil
import struct
from collections.abc import Collection, Iterator, Mapping
from os import PathLike
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import GenerationConfig, PreTrainedModel
from transformers.utils import CONFIG_NAME, GENERATION_CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME
from transformers.utils.logging import tqdm

from . import storage
from .base_files import base_config, loading
from .base_model import empty_model, model_class, names_in_model, shard_names
from .errors import AdapterError
from .files import naming, new_folder
from .merging import merged_weight, refuse_tied
from .own_tokenizer import TOKENIZER_FILES, VOCABULARY_FILES, has_own_tokenizer
from .parts import ModulePart, TokenPart, input_embedding, weight_owners
from .plain_model import refuse_weights
from .tensor_files import BUFFER_DTYPES, SAFETENSORS_DTYPES

logger = logging.getLogger(__name__)

# A merged model needs these files of the base folder too, besides the weights.
COMPANION_FILES = ("*.json", "*.txt", "*.model", "*.jinja", "*.tiktoken", "LICENSE*", *TOKENIZER_FILES)
COPIED_AT_ONCE = 16 * 2**20


def merge_shards(base_folder: str | PathLike, adapter_folder: str | PathLike, folder: str | PathLike) -> None:
    """
    Merge a saved adapter into a saved model file by file, without loading the model. At any time, memory holds only
    the matrices of one weights file that the adapter adapts. The bits are the same as those of [`merge`].

    Args:
        base_folder (`str` or `os.PathLike`): A model in safetensors files, as `save_pretrained` or a download from
            the Hub leaves it.
        adapter_folder (`str` or `os.PathLike`): The folder that [`SaraAdapter.save_pretrained`] wrote.
        folder (`str` or `os.PathLike`): Where to save the merged model. It gets the base's configuration with what
            the training set in it, and the adapter's tokenizer if it has one of its own, or else the base's. It must
            not hold weights yet.

    Raises:
        `FileNotFoundError`: If a file of the base or of the adapter is missing.
        `FileExistsError`: If the folder holds weights already.
        `ValueError`: If the adapter cannot be merged, a file is damaged, or the base is not the adapter's. Nothing is
            left in the folder then.
    """
    refuse_weights(folder)
    base_folder = Path(base_folder)
    saved = storage.read(adapter_folder)
    saved.method.refuse_merge()
    model, as_it_was = _empty_model(base_folder, saved)
    saved = saved.named_for(model)
    embedding = input_embedding(model)
    rows = None if embedding is None else embedding.num_embeddings
    saved.fit_vocabulary(model, str(base_folder))
    sites = saved.sites_on(model)
    saved.parts_on(model)
    refuse_tied(model, sites)
    merger = _Merger(model, saved, rows, as_it_was.get("architectures"))
    shards = merger.names_by_file(base_folder)
    with new_folder(Path(folder)) as new:
        _copy_companions(base_folder, Path(adapter_folder), saved, new)
        # The model may be of another class, or have other labels or tokens, than the base.
        model.config.architectures = [saved.base.class_name]
        if model.config.to_dict() != as_it_was:
            model.config.to_json_file(new / CONFIG_NAME)
        _restore_generation(new, saved)
        sizes: dict[str, dict[str, int]] = {}
        last = list(shards)[-1]
        for shard, names in tqdm(shards.items(), desc="Merging", unit="file", delay=1.0):
            source = base_folder / shard
            values = merger.merge(source, names)
            if shard == last:
                # Heads that the base does not have go to the last file.
                values |= merger.left()
            sizes[shard] = rewrite(source, new / shard, values, merger.stray(names))
        if (new / SAFE_WEIGHTS_INDEX_NAME).is_file():
            _write_index(new / SAFE_WEIGHTS_INDEX_NAME, sizes, model.num_parameters())
    logger.info("Merged %d weight matrices in %d files into %s", len(sites), len(shards), folder)


def _copy_companions(base_folder: Path, adapter_folder: Path, saved: storage.SavedAdapter, folder: Path) -> None:
    """Copy the files of the base beside its weights, with the adapter's tokenizer in the place of the base's."""
    own = has_own_tokenizer(adapter_folder, saved.base)
    for path in sorted({path for pattern in COMPANION_FILES for path in base_folder.glob(pattern)}):
        # An index of files in another format is left out, because the merged model does not have these files.
        of_other_weights = path.name.endswith(".index.json") and path.name != SAFE_WEIGHTS_INDEX_NAME
        if not of_other_weights and not (own and path.name in VOCABULARY_FILES):
            shutil.copyfile(path, folder / path.name)
    for name in TOKENIZER_FILES:
        if own and (adapter_folder / name).is_file():
            shutil.copyfile(adapter_folder / name, folder / name)


def _restore_generation(folder: Path, saved: storage.SavedAdapter) -> None:
    """Give the generation config, where there is one, what the training had set in it."""
    path = folder / GENERATION_CONFIG_NAME
    if path.is_file():
        with loading(f"{GENERATION_CONFIG_NAME} of the base"):
            config = GenerationConfig.from_pretrained(folder)
            before = config.to_dict()
            saved.base.restore_generation(config)
            if config.to_dict() != before:
                config.to_json_file(path)


def _empty_model(base_folder: Path, saved: storage.SavedAdapter) -> tuple[PreTrainedModel, dict[str, Any]]:
    """
    The base without values, from which names, kinds and shapes of modules and tied weights can be read, and its
    configuration before the adapter's was restored.
    """
    if not base_folder.is_dir():
        raise FileNotFoundError(f"There is no base folder {str(base_folder)!r}. Download the base first.")
    kind = model_class(saved.base.class_name)
    if kind is None:
        raise ValueError(
            f"The adapter was trained on a {saved.base.class_name}, which is not a model class of transformers. "
            "Load the base yourself, and use SaraAdapter.load and merge."
        )
    with loading(f"The base in {base_folder}"):
        config = base_config(base_folder)
        if config.model_type != saved.base.model_type:
            raise AdapterError(
                f"The adapter was trained on a model of type {saved.base.model_type!r}, and {base_folder} holds "
                f"one of type {config.model_type!r}."
            )
        before = config.to_dict()
        saved.base.restore(config)
        return empty_model(kind, config), before


class _Merger:
    """
    The values of a merged model's tensors that differ from the base's.

    Args:
        model ([`~transformers.PreTrainedModel`]): The base without values, with the labels and tokens of the training.
        saved ([`~hf_sara.storage.SavedAdapter`]): The adapter.
        base_rows (`int`, *optional*): How many tokens the base has.
        base_classes (`list[str]`, *optional*): The class of the base, as its configuration has it.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        saved: storage.SavedAdapter,
        base_rows: int | None,
        base_classes: list[str] | None,
    ):
        self.model, self.saved = model, saved
        self.trained = saved.tensors
        self.own = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
        self.resized = (base_rows, saved.base.vocab_size)
        # The model is of the class of the adapter, and the files may be those of another class.
        self.may_differ = bool(saved.parts) or base_classes != [saved.base.class_name]
        self.modules = {f"{site.module}.weight": site.module for site in saved.sites}
        self.whole: dict[str, torch.Tensor] = {}
        self.rows: dict[str, TokenPart] = {}
        tied: dict[str, str] = {}
        for part in saved.parts:
            if isinstance(part, ModulePart):
                self.whole |= {name: self.trained[name] for name in (*part.trained_shapes(), *part.buffer_shapes())}
                tied |= {f"{part.name}.{name}": other for name, other in part.ties.items()}
            else:
                self.rows[f"{part.name}.weight"] = part
        self.tied = {name: self.whole[other] for name, other in tied.items()}
        # A file may have a tied weight under several names.
        self.rows_of = {
            name: self.rows[other]
            for names in weight_owners(model).values()
            for other in self.rows.keys() & names
            for name in names
        }
        self.missing = set(self.whole)

    def names_by_file(self, base_folder: Path) -> dict[str, dict[str, str]]:
        """The base's weights files, each with the names in the model of its tensors."""
        shards = {}
        for shard in _shards(base_folder):
            with _open_shard(base_folder / shard) as file:
                shards[shard] = names_in_model(self.model, list(file.keys()))
        found = {name for names in shards.values() for name in names.values()}
        lacking = [name for name in (*self.modules, *self.rows) if name not in found]
        if self.may_differ:
            brought = {*self.whole, *self.tied, *getattr(self.model, "all_tied_weights_keys", {})}
            lacking += sorted(set(self.own) - found - brought)
        if lacking:
            raise ValueError(
                f"The files in {base_folder} have no tensor for {lacking[0]}. If the base loads nevertheless, from "
                "parts that are put together then, load it and use SaraAdapter.load and merge."
            )
        self.missing -= found
        return shards

    def stray(self, names: Mapping[str, str]) -> list[str]:
        """The tensors of a file that are not the model's, such as the head of another task."""
        return [key for key, name in names.items() if name not in self.own] if self.may_differ else []

    def left(self) -> dict[str, torch.Tensor]:
        """The tensors that the base has in no file."""
        dtype = getattr(torch, self.saved.base.dtype)
        values = {name: self.whole[name] for name in self.model.state_dict() if name in self.missing}
        return {name: value.to(dtype) if value.is_floating_point() else value for name, value in values.items()}

    def merge(self, path: Path, names: Mapping[str, str]) -> dict[str, torch.Tensor]:
        """The new values of a file's tensors, by their names in the file."""
        values: dict[str, torch.Tensor] = {}
        modules: dict[str, str] = {}
        with _open_shard(path) as file:
            for key, name in names.items():
                if name in self.modules:
                    modules[self.modules[name]] = key
                    module = self._linear(self.modules[name])
                    module.weight = nn.Parameter(self._read_weight(file, key, name), requires_grad=False)
                elif name in self.whole or name in self.tied:
                    values[key] = _rounded(key, (self.whole | self.tied)[name], file.get_slice(key).get_dtype())
                elif name in self.rows_of:
                    part = self.rows_of[name]
                    values[key] = self._fitted(file, key, name)
                    rows = _rounded(key, self.trained[part.key], file.get_slice(key).get_dtype())
                    values[key][list(part.indices)] = rows
                elif name in self.own and tuple(file.get_slice(key).get_shape()) != self.own[name]:
                    values[key] = self._fitted(file, key, name)
        sites = [site for site in self.saved.sites if site.module in modules]
        factors = self.saved.factors_on(self.model, sites)
        for site in sites:
            module = self._linear(site.module)
            delta = self.saved.method.make_delta(site, self.model, factors.get(site.name))
            for name, tensor in delta.trained().items():
                tensor.data.copy_(self.trained[f"{site.name}.{name}"])
            if site.name in self.saved.untrained:
                delta.rest()
            site.write(module, merged_weight(site, module, delta))
        for module_name, key in modules.items():
            module = self._linear(module_name)
            values[key] = module.weight.data
            module.weight = nn.Parameter(module.weight.to("meta"), requires_grad=False)
        return values

    def _read_weight(self, file: Any, key: str, name: str) -> torch.Tensor:
        dtype = file.get_slice(key).get_dtype()
        if dtype not in SAFETENSORS_DTYPES.values():
            raise ValueError(f"{key}: a weight stored as {dtype} is quantized, and cannot be merged into.")
        return self._fitted(file, key, name)

    def _fitted(self, file: Any, key: str, name: str) -> torch.Tensor:
        """A copy of a file's tensor, cut or padded with zeros where the model has other tokens than the base."""
        found, shape = tuple(file.get_slice(key).get_shape()), self.own[name]
        changes = {(old, new) for old, new in zip(found, shape, strict=False) if old != new}
        if len(found) != len(shape) or changes - {self.resized}:
            raise ValueError(f"{key}: the file has the shape {found}, and the base's configuration asks for {shape}.")
        # The file's tensor is copied, because it may be a view of the base's own file.
        tensor = file.get_tensor(key)
        fitted = tensor.new_zeros(shape)
        both = tuple(slice(min(sizes)) for sizes in zip(found, shape, strict=True))
        fitted[both] = tensor[both]
        return fitted

    def _linear(self, name: str) -> nn.Linear:
        return cast(nn.Linear, self.model.get_submodule(name))


def _rounded(key: str, value: torch.Tensor, dtype: str) -> torch.Tensor:
    names = [name for name, short in BUFFER_DTYPES.items() if short == dtype]
    if not names or (value.is_floating_point() and dtype not in SAFETENSORS_DTYPES.values()):
        raise ValueError(f"{key}: a tensor stored as {dtype} is quantized, and cannot be merged into.")
    rounded = value.to(getattr(torch, names[0]))
    if not torch.isfinite(rounded).all():
        raise ValueError(f"{key}: the trained values leave the range of {names[0]}. Use a base of a wider dtype.")
    return rounded


def _shards(base_folder: Path) -> list[str]:
    """The files that `from_pretrained` would read."""
    try:
        return shard_names(lambda name: (base_folder / name).is_file(), lambda name: (base_folder / name).read_bytes())
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"The base in {base_folder} cannot be merged into: {error} If its weights are in another format, load the "
            "base and use SaraAdapter.load and merge."
        ) from error


@contextlib.contextmanager
def _open_shard(path: Path) -> Iterator[Any]:
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged: {error}.") from error


# ---- weights files ----


def rewrite(
    source: Path, target: Path, values: Mapping[str, torch.Tensor], dropped: Collection[str]
) -> dict[str, int]:
    """
    Copy a safetensors file with some tensors replaced, added or dropped. All other tensors keep their bytes, which are
    never in memory as a whole. Returns the bytes of each tensor.
    """
    with naming(target), open(source, "rb") as old, open(target, "wb") as new:
        # The file has the header's length in eight bytes, the header as JSON, then the tensors' bytes.
        (length,) = struct.unpack("<Q", old.read(8))
        header = json.loads(old.read(length))
        metadata = header.pop("__metadata__", None)
        entries: dict[str, dict[str, Any]] = {}
        for key, entry in header.items():
            if key not in values and key not in dropped:
                start, stop = entry["data_offsets"]
                entries[key] = {"dtype": entry["dtype"], "shape": entry["shape"], "bytes": stop - start, "at": start}
        for key, value in values.items():
            dtype = BUFFER_DTYPES[str(value.dtype).removeprefix("torch.")]
            at = header[key]["data_offsets"][0] if key in header else math.inf
            entries[key] = {"dtype": dtype, "shape": list(value.shape), "bytes": value.nbytes, "at": at}
        # As in any safetensors file, wider numbers come first, so that each tensor begins at a multiple of its width.
        order = sorted(entries, key=lambda key: (-_width(entries[key]), entries[key]["at"]))
        offset = 0
        table: dict[str, Any] = {} if metadata is None else {"__metadata__": metadata}
        for key in order:
            entry = entries[key]
            end = offset + entry["bytes"]
            table[key] = {"dtype": entry["dtype"], "shape": entry["shape"], "data_offsets": [offset, end]}
            offset = end
        text = json.dumps(table, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-len(text) % 8)
        new.write(struct.pack("<Q", len(text)) + text)
        for key in order:
            if key in values:
                new.write(values[key].contiguous().view(-1).view(torch.uint8).numpy().data)
            else:
                old.seek(8 + length + entries[key]["at"])
                _copy(old, new, entries[key]["bytes"])
    return {key: entry["bytes"] for key, entry in entries.items()}


def _width(entry: Mapping[str, Any]) -> float:
    return entry["bytes"] / max(math.prod(entry["shape"]), 1)


def _copy(old: Any, new: Any, count: int) -> None:
    while count:
        piece = old.read(min(count, COPIED_AT_ONCE))
        new.write(piece)
        count -= len(piece)


def _write_index(path: Path, sizes: Mapping[str, Mapping[str, int]], parameters: int) -> None:
    """Bring a copied index of weights files up to date. Without changes, it keeps its bytes."""
    index = json.loads(path.read_text(encoding="utf-8"))
    metadata = {**(index.get("metadata") or {}), "total_size": sum(sum(keys.values()) for keys in sizes.values())}
    if "total_parameters" in metadata:
        metadata["total_parameters"] = parameters
    weight_map = {key: shard for shard, keys in sizes.items() for key in keys}
    new = {**index, "metadata": metadata, "weight_map": weight_map}
    if new != index:
        path.write_text(json.dumps(new, indent=2, sort_keys=True) + "\n", encoding="utf-8", newline="\n")
