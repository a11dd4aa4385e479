"""Adapters as files that need no hf_sara: a plain PEFT LoRA folder, or a plain model with the update in its weights.

A SARA update and a Mo-SARA update of one head are low-rank products, so both exports are exact. A Mo-SARA update of
several heads depends on the token and has neither form.
"""

import contextlib
import json
import logging
import os
import shutil
import struct
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as safetensors_bytes
from torch import nn
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
)
from transformers.pytorch_utils import Conv1D
from transformers.utils import CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME
from transformers.utils.logging import tqdm

from . import storage
from .adapter import SaraAdapter, adapter_of, merged_weight, refuse_tied
from .checkpoint import empty_model, model_class, names_in_model
from .deltas import DELTAS, refuse_heads
from .sites import Site, linear_shape

logger = logging.getLogger(__name__)

LORA_CONFIG_FILE = "adapter_config.json"
LORA_TENSORS_FILE = "adapter_model.safetensors"
# What a base folder has beside its weights that a merged model needs too.
COMPANION_FILES = ("*.json", "*.txt", "*.model", "*.jinja", "*.tiktoken", "LICENSE*")


@dataclass(frozen=True)
class ExportReport:
    """
    What [`export_lora`] wrote.

    Args:
        ranks (`dict[str, int]`): The LoRA rank of each module.
        errors (`dict[str, float]`): What `max_rank` cut off each module's update, as the Frobenius norm of the
            difference divided by that of the update. Zero where nothing was cut.
        size (`int`): Bytes of the two files.
    """

    ranks: dict[str, int]
    errors: dict[str, float]
    size: int

    @property
    def largest_error(self) -> float:
        """The largest of the relative errors."""
        return max(self.errors.values())

    def __str__(self) -> str:
        ranks = self.ranks.values()
        text = f"{len(ranks)} modules, rank {min(ranks)} to {max(ranks)}, {self.size:,} bytes"
        if self.largest_error == 0.0:
            return f"{text}, exact"
        worst = max(self.errors, key=self.errors.__getitem__)
        cut = sum(error > 0.0 for error in self.errors.values())
        return f"{text}, {cut} modules cut, relative error up to {self.largest_error:.3g} ({worst})"


# ---- to LoRA ----


def export_lora(
    model_or_adapter: nn.Module | SaraAdapter,
    folder: str | PathLike,
    *,
    max_rank: int | None = None,
    base_model_name_or_path: str | None = None,
) -> ExportReport:
    """
    Write an adapter as a plain LoRA folder, that `PeftModel.from_pretrained`, `model.load_adapter`, vLLM and others
    read. PEFT itself is not needed for it.

    Args:
        model_or_adapter ([`~transformers.PreTrainedModel`] or [`SaraAdapter`]): The adapted model, or its adapter.
        folder (`str` or `os.PathLike`): Made if it does not exist.
        max_rank (`int`, *optional*): Cut each module's update to this rank, with the least possible error. Left out,
            the export is exact. The rank of a fused module is the sum of those of its projections.
        base_model_name_or_path (`str`, *optional*): What the LoRA names as its base. Left out: the base's Hub id,
            or nothing where it has none.

    Returns:
        [`ExportReport`]: Ranks, errors and size.

    Raises:
        `ValueError`: For Mo-SARA with more than one head (its update depends on the token), for a tensor that is not
            finite, and where it is open which adapter is meant. Nothing is written then.
    """
    adapter = adapter_of(model_or_adapter)
    if max_rank is not None and max_rank < 1:
        raise ValueError(f"max_rank={max_rank} has to be at least 1. Leave it out for an exact export.")
    pairs = {name: _lora_pair(adapter, name) for name in dict.fromkeys(site.module for site in adapter.sites)}
    # Before anything is cut: a decomposition of what is not finite fails without a name.
    exact = _lora_tensors(pairs)
    storage.check_tensors(exact, {key: tuple(tensor.shape) for key, tensor in exact.items()})
    errors = dict.fromkeys(pairs, 0.0)
    for name, (A, B) in pairs.items():
        if max_rank is not None and A.shape[0] > max_rank:
            *pair, errors[name] = truncate(A, B, max_rank)
            pairs[name] = tuple(pair)
    ranks = {name: A.shape[0] for name, (A, _) in pairs.items()}
    payload = safetensors_bytes(_lora_tensors(pairs), metadata={"format": "pt"})
    config = json.dumps(_lora_config(adapter, ranks, base_model_name_or_path), indent=2).encode() + b"\n"
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    storage.write_file(folder / LORA_TENSORS_FILE, payload)
    storage.write_file(folder / LORA_CONFIG_FILE, config)
    report = ExportReport(ranks, errors, len(payload) + len(config))
    logger.info("Exported a LoRA: %s", report)
    return report


def _lora_pair(adapter: SaraAdapter, module_name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """lora_A (k, d_in) and lora_B (d_out, k) of a module; the projections of a fused one stand one after another."""
    d_in, d_out = linear_shape(adapter.model.get_submodule(module_name))
    sites = [site for site in adapter.sites if site.module == module_name]
    # A fused module has its input once: A is stacked, and in B each projection fills its own rows and columns.
    A = torch.zeros(sum(site.k for site in sites), d_in)
    B = torch.zeros(d_out, len(A))
    start = 0
    for site in sites:
        U, S, Vh = (factor.detach().cpu() for factor in adapter.delta(site).low_rank())
        # Half of S on either side; the sign can only be on one.
        root = S.abs().sqrt()
        A[start : start + site.k] = (U * root).t()
        rows = B[:, start : start + site.k]
        rows = rows if site.slice is None else site.slice.view(rows, dim=0)
        rows.copy_(((S.sign() * root)[:, None] * Vh).t().reshape(rows.shape))
        start += site.k
    return A, B


def truncate(A: torch.Tensor, B: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor, float]:
    """
    The best approximation of the product B A at a lower rank, found without forming the product.

    Args:
        A (`torch.Tensor` of shape `(k, d_in)`): Right factor.
        B (`torch.Tensor` of shape `(d_out, k)`): Left factor.
        rank (`int`): At most this rank is kept.

    Returns:
        `tuple[torch.Tensor, torch.Tensor, float]`: The new A and B, and the relative error in the Frobenius norm.
    """
    left, small_left = torch.linalg.qr(B.double())
    right, small_right = torch.linalg.qr(A.double().t())
    P, S, Qh = torch.linalg.svd(small_left @ small_right.t(), full_matrices=False)
    root = S[:rank].sqrt()
    new_A = (root[:, None] * Qh[:rank] @ right.t()).to(A.dtype)
    new_B = (left @ P[:, :rank] * root).to(B.dtype)
    whole = float(torch.linalg.vector_norm(S))
    return new_A, new_B, float(torch.linalg.vector_norm(S[rank:])) / whole if whole > 0.0 else 0.0


def _lora_tensors(pairs: Mapping[str, tuple[torch.Tensor, torch.Tensor]]) -> dict[str, torch.Tensor]:
    return {
        f"base_model.model.{name}.{key}.weight": tensor.contiguous()
        for name, pair in pairs.items()
        for key, tensor in zip(("lora_A", "lora_B"), pair, strict=True)
    }


def _lora_config(adapter: SaraAdapter, ranks: dict[str, int], base_name: str | None) -> dict[str, Any]:
    model = adapter.model
    base = storage.describe_base(model)
    task = _task_type(storage.class_of(model).__name__)
    # PEFT takes the first pattern that ends like the module's name: a longer name must come before its own end.
    patterns = {name: ranks[name] for name in sorted(ranks, key=len, reverse=True)}
    largest = max(ranks.values())
    return {
        "peft_type": "LORA",
        "task_type": task,
        # Without a task this is what lets PEFT find the class of the base.
        "auto_mapping": None
        if task
        else {"base_model_class": base["class"], "parent_library": storage.class_of(model).__module__},
        "base_model_name_or_path": base_name or base["model_id"],
        "revision": None if base_name else base["revision"],
        "inference_mode": True,
        # Rank and alpha are equal everywhere, so that every scaling is 1.
        "r": largest,
        "lora_alpha": largest,
        "rank_pattern": patterns,
        "alpha_pattern": patterns,
        "lora_dropout": adapter.args.dropout,
        "target_modules": _target_modules(model, ranks),
        "fan_in_fan_out": any(isinstance(model.get_submodule(name), Conv1D) for name in ranks),
        "bias": "none",
        "modules_to_save": None,
    }


def _task_type(class_name: str) -> str | None:
    # Not PEFT's classification tasks: for them PEFT looks for the model's head in the adapter, and fails without.
    if class_name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values():
        return "CAUSAL_LM"
    return "SEQ_2_SEQ_LM" if class_name in MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES.values() else None


def _target_modules(model: nn.Module, names: Mapping[str, int]) -> list[str] | str:
    """The modules' full names. PEFT also adapts what ends like one of them; where that would be more, a pattern."""
    ends = tuple(f".{name}" for name in names)
    others = (name for name, _ in model.named_modules() if name not in names and ".sara" not in name)
    if any(name.endswith(ends) for name in others):
        return "|".join(name.replace(".", r"\.") for name in names)
    return list(names)


# ---- to a plain model ----


def merge(
    model_or_adapter: nn.Module | SaraAdapter,
    folder: str | PathLike | None = None,
    *,
    max_shard_size: int | str = "50GB",
) -> nn.Module:
    """
    Merge an adapter into a plain model: without a folder in memory and for good, with a folder into files, after which
    the model in memory is what it was. See [`merge_shards`] for models that do not fit into memory.

    Args:
        model_or_adapter ([`~transformers.PreTrainedModel`] or [`SaraAdapter`]): The adapted model, or its adapter.
        folder (`str` or `os.PathLike`, *optional*): Where to save the merged model, with its configuration but
            without a tokenizer. It must not hold weights yet.
        max_shard_size (`int` or `str`, *optional*, defaults to `"50GB"`): Largest size of a weights file.

    Returns:
        [`~transformers.PreTrainedModel`]: Without a folder, the model with the update in its weights and no adapter;
        with a folder, the model as it was.

    Raises:
        `ValueError`: Where [`SaraAdapter.merge`] has one, and for a model that carries several adapters.
        `FileExistsError`: If the folder holds weights already.
    """
    adapter = adapter_of(model_or_adapter)
    model = adapter.model
    if len(model.sara_adapters) > 1:
        raise ValueError(
            f"The model carries the adapters {list(model.sara_adapters)}, and a plain model carries none. Detach "
            "those that are not to be merged: adapter.detach()."
        )
    if folder is None:
        adapter.merge()
        adapter._keep_merged()
        adapter.detach()
        return model
    with _new_folder(folder) as new:
        adapter.merge()
        try:
            plain = {name: tensor for name, tensor in model.state_dict().items() if ".sara." not in name}
            model.save_pretrained(new, state_dict=plain, max_shard_size=max_shard_size)
        finally:
            adapter.unmerge()
    return model


def merge_shards(base_folder: str | PathLike, adapter_folder: str | PathLike, folder: str | PathLike) -> None:
    """
    Merge a saved adapter into a saved model file by file, without ever loading the model: in memory are only the
    matrices that one weights file of the base and the adapter have in common. The bits are those of [`merge`].

    Args:
        base_folder (`str` or `os.PathLike`): A model in safetensors files, as `save_pretrained` or a download from
            the Hub leaves it.
        adapter_folder (`str` or `os.PathLike`): What [`SaraAdapter.save_pretrained`] wrote.
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
    if saved.args.method == "mo_sara":
        refuse_heads(saved.args.num_heads)
    model = _empty_model(base_folder, saved)
    sites = saved.sites_on(model)
    refuse_tied(model, sites)
    trained = saved.tensors
    shards = _locate(base_folder, model, sites)
    with _new_folder(folder) as new:
        for path in sorted(path for pattern in COMPANION_FILES for path in base_folder.glob(pattern)):
            # An index of files in another format would point at nothing.
            if path.name == SAFE_WEIGHTS_INDEX_NAME or not path.name.endswith(".index.json"):
                shutil.copyfile(path, new / path.name)
        for shard, weights in tqdm(shards.items(), desc="Merging", unit="file", delay=1.0):
            _merge_shard(base_folder / shard, new / shard, model, saved, trained, weights)
    logger.info("Merged %d weight matrices in %d files into %s", len(sites), len(shards), folder)


def _empty_model(base_folder: Path, saved: storage.SavedAdapter) -> nn.Module:
    """The base without values: what its modules are called, of what kind and shape they are, and what is tied."""
    if not base_folder.is_dir():
        raise FileNotFoundError(f"There is no base folder {str(base_folder)!r}. Download the base first.")
    kind = model_class(saved.base.get("class"))
    if kind is None:
        raise ValueError(
            f"The adapter was trained on a {saved.base.get('class')}, which is not a model class of transformers. "
            "Load the base yourself, and use SaraAdapter.load and merge."
        )
    config = transformers.AutoConfig.from_pretrained(base_folder)
    if config.model_type != saved.base.get("model_type"):
        raise storage.AdapterError(
            f"The adapter was trained on a model of type {saved.base.get('model_type')!r}, and {base_folder} holds "
            f"one of type {config.model_type!r}."
        )
    return empty_model(kind, config)


def _locate(base_folder: Path, model: nn.Module, sites: list[Site]) -> dict[str, dict[str, str]]:
    """The base's weights files, each with the names that the adapted modules' weights have in it, by module."""
    wanted = {f"{site.module}.weight": site.module for site in sites}
    shards: dict[str, dict[str, str]] = {}
    for shard in _shard_names(base_folder):
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


def _shard_names(base_folder: Path) -> list[str]:
    """The files that `from_pretrained` would read."""
    if (base_folder / SAFE_WEIGHTS_NAME).is_file():
        return [SAFE_WEIGHTS_NAME]
    index = base_folder / SAFE_WEIGHTS_INDEX_NAME
    if not index.is_file():
        raise FileNotFoundError(
            f"{base_folder} has neither {SAFE_WEIGHTS_NAME} nor {SAFE_WEIGHTS_INDEX_NAME}. If its weights are in "
            "another format, load the base and use SaraAdapter.load and merge."
        )
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{index} is damaged: it is not an index of weights files ({error!r}).") from error
    outside = [name for name in names if Path(name).name != name]
    if outside:
        raise ValueError(f"{index} names {outside[0]!r}, which is not a file of this folder.")
    return names


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
    """Copy a weights file, and write the merged matrices over the base's: all else stays as it is, byte by byte."""
    shutil.copyfile(source, target)
    modules = {key: model.get_submodule(name) for name, key in weights.items()}
    with _open_shard(source) as file:
        for key, module in modules.items():
            module.weight = nn.Parameter(_read_weight(file, key, module), requires_grad=False)
    sites = [site for site in saved.sites if site.module in weights]
    factors = saved.factors_on(model, sites)
    for site in sites:
        module = modules[weights[site.module]]
        delta = DELTAS[saved.args.method](saved.args, site, site.k, module.weight.dtype, module.weight.device)
        if site.name in factors:
            delta.set_factors(factors[site.name].U, factors[site.name].Vh)
        for name, tensor in delta.trained().items():
            tensor.data.copy_(trained[f"{site.name}.{name}"])
        site.write(module, merged_weight(site, module, delta))
    _overwrite(target, {key: module.weight.data for key, module in modules.items()})
    for module in modules.values():
        module.weight = nn.Parameter(module.weight.to("meta"), requires_grad=False)


def _read_weight(file: Any, key: str, module: nn.Module) -> torch.Tensor:
    part = file.get_slice(key)
    if part.get_dtype() not in storage.SAFETENSORS_DTYPES.values():
        raise ValueError(f"{key}: a weight stored as {part.get_dtype()} is quantized, and cannot be merged into.")
    if tuple(part.get_shape()) != tuple(module.weight.shape):
        raise ValueError(
            f"{key}: the file has the shape {tuple(part.get_shape())}, and the base's configuration asks for "
            f"{tuple(module.weight.shape)}."
        )
    # A copy, because the tensor may be a view of the base's own file.
    return file.get_tensor(key).clone()


def _overwrite(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Write tensors over those of the same name, shape and dtype in a safetensors file."""
    with open(path, "r+b") as file:
        # The format: the header's length in eight bytes, the header as JSON, then the tensors' bytes.
        (length,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(length))
        for key, tensor in tensors.items():
            file.seek(8 + length + header[key]["data_offsets"][0])
            file.write(tensor.contiguous().view(torch.uint8).numpy())


@contextlib.contextmanager
def _new_folder(folder: str | PathLike) -> Iterator[Path]:
    """A folder to write to, whose files move to `folder` when all of them are there. After an error they vanish."""
    folder = Path(folder)
    taken = sorted(path.name for path in folder.glob("*.safetensors"))
    if taken:
        raise FileExistsError(f"{folder} holds {taken[0]} already. Choose another folder, or delete its weights.")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as temporary:
        yield Path(temporary)
        folder.mkdir(exist_ok=True)
        # The configuration comes last: without it, nothing takes the folder for a model.
        for path in sorted(Path(temporary).iterdir(), key=lambda path: path.name == CONFIG_NAME):
            os.replace(path, folder / path.name)
