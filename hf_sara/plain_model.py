"""Merging adapters into a plain model, which can be loaded without hf_sara: in memory, or file by file."""

import contextlib
import json
import logging
import os
import shutil
import struct
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import AutoConfig, PreTrainedModel
from transformers.utils import CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME
from transformers.utils.logging import tqdm

from . import storage
from .adapter import SaraAdapter, adapter_of
from .attached import adapters_on
from .base_model import empty_model, model_class, names_in_model, shard_names
from .errors import AdapterError
from .merging import merged_weight, refuse_tied
from .sites import PlannedSite, is_of_update
from .tensor_files import SAFETENSORS_DTYPES

logger = logging.getLogger(__name__)

# A merged model needs these files of the base folder too, besides the weights.
COMPANION_FILES = ("*.json", "*.txt", "*.model", "*.jinja", "*.tiktoken", "LICENSE*")


def merge(
    model_or_adapter: nn.Module | SaraAdapter,
    folder: str | PathLike | None = None,
    *,
    max_shard_size: int | str = "50GB",
) -> nn.Module:
    """
    Merge an adapter into a plain model. Without a folder, the model in memory is changed for good. With a folder, the
    merged model is saved there, and the model in memory is left as it was. For models that do not fit into memory, see
    [`merge_shards`].

    Args:
        model_or_adapter ([`~transformers.PreTrainedModel`] or [`SaraAdapter`]): The adapted model, or its adapter.
        folder (`str` or `os.PathLike`, *optional*): Where to save the merged model, with its configuration but
            without a tokenizer. It must not hold weights yet.
        max_shard_size (`int` or `str`, *optional*, defaults to `"50GB"`): Largest size of a weights file.

    Returns:
        [`~transformers.PreTrainedModel`]: Without a folder, the model with the update in its weights and no adapter;
        with a folder, the model as it was.

    Raises:
        `ValueError`: In the cases of [`SaraAdapter.merge`], and for a model that carries several adapters.
        `FileExistsError`: If the folder holds weights already.
    """
    adapter = adapter_of(model_or_adapter)
    model = adapter.model
    if len(adapters_on(model)) > 1:
        raise ValueError(
            f"The model carries the adapters {list(adapters_on(model))}, and a plain model carries none. Detach "
            "those that are not to be merged: adapter.detach()."
        )
    if folder is None:
        adapter.merge()
        adapter.detach(keep_merged=True)
        return model
    with _new_folder(folder) as new:
        adapter.merge()
        try:
            plain = {name: tensor for name, tensor in model.state_dict().items() if not is_of_update(name)}
            cast(PreTrainedModel, model).save_pretrained(new, state_dict=plain, max_shard_size=max_shard_size)
        finally:
            adapter.unmerge()
    return model


def merge_shards(base_folder: str | PathLike, adapter_folder: str | PathLike, folder: str | PathLike) -> None:
    """
    Merge a saved adapter into a saved model file by file, without loading the model. At any time, memory holds only
    the matrices of one weights file that the adapter adapts. The bits are the same as those of [`merge`].

    Args:
        base_folder (`str` or `os.PathLike`): A model in safetensors files, as `save_pretrained` or a download from
            the Hub leaves it.
        adapter_folder (`str` or `os.PathLike`): The folder that [`SaraAdapter.save_pretrained`] wrote.
        folder (`str` or `os.PathLike`): Where to save the merged model, with the base's configuration and tokenizer.
            It must not hold weights yet.

    Raises:
        `FileNotFoundError`: If a file of the base or of the adapter is missing.
        `FileExistsError`: If the folder holds weights already.
        `ValueError`: If the adapter cannot be merged, a file is damaged, or the base is not the adapter's. Nothing is
            left in the folder then.
    """
    base_folder = Path(base_folder)
    saved = storage.read(adapter_folder)
    saved.method.refuse_merge()
    model = _empty_model(base_folder, saved)
    sites = saved.sites_on(model)
    refuse_tied(model, sites)
    trained = saved.read_tensors()
    shards = _weights_by_file(base_folder, model, sites)
    with _new_folder(folder) as new:
        for path in sorted(path for pattern in COMPANION_FILES for path in base_folder.glob(pattern)):
            # An index of files in another format is left out, because the merged model does not have these files.
            if path.name == SAFE_WEIGHTS_INDEX_NAME or not path.name.endswith(".index.json"):
                shutil.copyfile(path, new / path.name)
        for shard, weights in tqdm(shards.items(), desc="Merging", unit="file", delay=1.0):
            _merge_shard(base_folder / shard, new / shard, model, saved, trained, weights)
    logger.info("Merged %d weight matrices in %d files into %s", len(sites), len(shards), folder)


def _empty_model(base_folder: Path, saved: storage.SavedAdapter) -> PreTrainedModel:
    """The base without values, from which names, kinds and shapes of modules and tied weights can be read."""
    if not base_folder.is_dir():
        raise FileNotFoundError(f"There is no base folder {str(base_folder)!r}. Download the base first.")
    kind = model_class(saved.base.class_name)
    if kind is None:
        raise ValueError(
            f"The adapter was trained on a {saved.base.class_name}, which is not a model class of transformers. "
            "Load the base yourself, and use SaraAdapter.load and merge."
        )
    config = AutoConfig.from_pretrained(base_folder)
    if config.model_type != saved.base.model_type:
        raise AdapterError(
            f"The adapter was trained on a model of type {saved.base.model_type!r}, and {base_folder} holds "
            f"one of type {config.model_type!r}."
        )
    return empty_model(kind, config)


def _weights_by_file(
    base_folder: Path, model: PreTrainedModel, sites: Sequence[PlannedSite]
) -> dict[str, dict[str, str]]:
    """The base's weights files, each with the names that the adapted modules' weights have in it, by module."""
    wanted = {f"{site.module}.weight": site.module for site in sites}
    shards: dict[str, dict[str, str]] = {}
    for shard in _shards(base_folder):
        with _open_shard(base_folder / shard) as file:
            names = names_in_model(model, file.keys())
        shards[shard] = {wanted[name]: key for key, name in names.items() if name in wanted}
    found = {module for weights in shards.values() for module in weights}
    missing = [name for name, module in wanted.items() if module not in found]
    if missing:
        raise ValueError(
            f"The files in {base_folder} have no tensor for {missing[0]}. If the base loads nevertheless, from parts "
            "that are put together then, load it and use SaraAdapter.load and merge."
        )
    return shards


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


def _merge_shard(
    source: Path,
    target: Path,
    model: nn.Module,
    saved: storage.SavedAdapter,
    trained: Mapping[str, torch.Tensor],
    weights: Mapping[str, str],
) -> None:
    """Copy a weights file, and write the merged matrices over the base's. All other bytes stay as they are."""
    shutil.copyfile(source, target)
    modules = {key: cast(nn.Linear, model.get_submodule(name)) for name, key in weights.items()}
    with _open_shard(source) as file:
        for key, module in modules.items():
            module.weight = nn.Parameter(_read_weight(file, key, module), requires_grad=False)
    sites = [site for site in saved.sites if site.module in weights]
    factors = saved.factors_on(model, sites)
    for site in sites:
        module = modules[weights[site.module]]
        delta = saved.method.make_delta(site, model, factors.get(site.name))
        for name, tensor in delta.trained().items():
            tensor.data.copy_(trained[f"{site.name}.{name}"])
        site.write(module, merged_weight(site, module, delta))
    _overwrite(target, {key: module.weight.data for key, module in modules.items()})
    for module in modules.values():
        module.weight = nn.Parameter(module.weight.to("meta"), requires_grad=False)


def _read_weight(file: Any, key: str, module: nn.Linear) -> torch.Tensor:
    part = file.get_slice(key)
    if part.get_dtype() not in SAFETENSORS_DTYPES.values():
        raise ValueError(f"{key}: a weight stored as {part.get_dtype()} is quantized, and cannot be merged into.")
    if tuple(part.get_shape()) != tuple(module.weight.shape):
        raise ValueError(
            f"{key}: the file has the shape {tuple(part.get_shape())}, and the base's configuration asks for "
            f"{tuple(module.weight.shape)}."
        )
    # The tensor is copied, because it may be a view of the base's own file.
    return file.get_tensor(key).clone()


def _overwrite(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Write tensors over those of the same name, shape and dtype in a safetensors file."""
    with open(path, "r+b") as file:
        # The file has the header's length in eight bytes, the header as JSON, then the tensors' bytes.
        (length,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(length))
        for key, tensor in tensors.items():
            file.seek(8 + length + header[key]["data_offsets"][0])
            file.write(tensor.contiguous().view(torch.uint8).numpy().data)


@contextlib.contextmanager
def _new_folder(folder: str | PathLike) -> Iterator[Path]:
    """A temporary folder. Its files are moved to `folder` when all are written, and deleted after an error."""
    folder = Path(folder)
    taken = sorted(path.name for path in folder.glob("*.safetensors"))
    if taken:
        raise FileExistsError(f"{folder} holds {taken[0]} already. Choose another folder, or delete its weights.")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as temporary:
        yield Path(temporary)
        folder.mkdir(exist_ok=True)
        # The configuration is moved last, because without it no program takes the folder for a model.
        for path in sorted(Path(temporary).iterdir(), key=lambda path: path.name == CONFIG_NAME):
            os.replace(path, folder / path.name)
