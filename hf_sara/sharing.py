"""Functions that push an adapter, or load it with its base, in one line: `push_to_hub` and `from_hub`."""

import os
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import CommitInfo, snapshot_download
from transformers import AutoModelForCausalLM, PreTrainedModel

from . import hub, storage
from .adapter import SaraAdapter, adapter_of
from .base_files import check_config, loading
from .base_model import BaseRecord, model_class
from .errors import AdapterError
from .own_tokenizer import TOKENIZER_FILES
from .plain_model import merge as merge_into_base
from .repos import NETWORK_ERRORS, refuse_missing


def push_to_hub(model_or_adapter: PreTrainedModel | SaraAdapter, repo_id: str, **kwargs: Any) -> CommitInfo:
    """
    Push an adapter and its model card to the Hub, in one commit. The repository is made if it does not exist.

    Args:
        model_or_adapter ([`~transformers.PreTrainedModel`] or [`SaraAdapter`]):
            An adapter, or a model that carries exactly one.
        repo_id (`str`): The repository to push to: `"user/name"`.
        kwargs: The other arguments of [`SaraAdapter.push_to_hub`]: `commit_message`, `private`, `revision`,
            `create_pr`, `token`, and those of the model card.

    Returns:
        [`~huggingface_hub.CommitInfo`]: The commit, with `pr_url` for a pull request.

    Raises:
        `OSError`: If the push failed. The adapter then lies in a folder that the message names, to be pushed later.
        `ValueError`: If the model carries no adapter or several, or `repo_id` is not the name of a repository.
    """
    return adapter_of(model_or_adapter).push_to_hub(repo_id, **kwargs)


def from_hub(
    repo_id_or_folder: str | PathLike,
    *,
    base_model: str | PathLike | PreTrainedModel | None = None,
    revision: str | None = None,
    dtype: torch.dtype | str | None = None,
    device_map: str | dict[str, Any] | None = None,
    token: str | bool | None = None,
    cache_dir: str | PathLike | None = None,
    local_files_only: bool = False,
    trust_remote_code: bool = False,
    merge: bool = False,
    **kwargs: Any,
) -> PreTrainedModel:
    """
    Load an adapter together with its base model. The adapter records the base's name, its commit and its class.

    Args:
        repo_id_or_folder (`str` or `os.PathLike`): Hub id or folder of the adapter.
        base_model (`str`, `os.PathLike` or [`~transformers.PreTrainedModel`], *optional*): A base to use instead of
            the recorded one.
        revision (`str`, *optional*): Branch, tag or commit of the adapter.
        dtype (`torch.dtype` or `str`, *optional*): Dtype of the base; defaults to that of the training.
        device_map (`str` or `dict`, *optional*): Passed on to the base's `from_pretrained`.
        token (`str` or `bool`, *optional*): Access token for private repositories.
        cache_dir (`str` or `os.PathLike`, *optional*): Cache of downloads.
        local_files_only (`bool`, *optional*, defaults to `False`): Whether to use the cache only, and no network.
        trust_remote_code (`bool`, *optional*, defaults to `False`): Whether a base may run code of its repository.
        merge (`bool`, *optional*, defaults to `False`): Whether to merge the adapter and return a plain model.
        kwargs: Passed on to the base's `from_pretrained`.

    Returns:
        [`~transformers.PreTrainedModel`]: The model in evaluation mode. `model.sara_adapter` is the adapter, unless it
            is merged.

    Raises:
        `FileNotFoundError`: If the adapter or the base cannot be found.
        [`AdapterError`]: If the adapter is damaged, does not belong to the base, or lacks what the base lacks too: a
            head, or rows of new tokens.
    """
    folder = hub.fetch_adapter(
        repo_id_or_folder, revision=revision, token=token, cache_dir=cache_dir, local_files_only=local_files_only
    )
    saved = storage.read(folder)
    base = saved.base
    if isinstance(base_model, PreTrainedModel):
        model = base_model
    else:
        name, commit = (str(base_model), None) if base_model is not None else recorded_base(base, folder)
        refuse_missing(name, "base")
        kind = base_class(base.class_name, trust_remote_code)
        if "config" not in kwargs:
            # A head is made with as many outputs as there are labels.
            kwargs = {**base.labels(), **kwargs}
        access: dict[str, Any] = {"revision": commit or "main", "token": token, "cache_dir": cache_dir}
        access["local_files_only"] = local_files_only
        try:
            with loading(f"The base {name!r} of the adapter in {folder}", AdapterError):
                check_config(name, **access)
                model, loaded = kind.from_pretrained(
                    name,
                    dtype=dtype or getattr(torch, base.dtype),
                    device_map=device_map,
                    trust_remote_code=trust_remote_code,
                    # The base's own head may be of another task. It has to be one that the adapter brings, see below.
                    ignore_mismatched_sizes=True,
                    output_loading_info=True,
                    **access,
                    **kwargs,
                )
                saved = saved.named_for(model)
                _refuse_random(name, saved, loaded)
        except OSError as error:
            raise FileNotFoundError(f"The base {name!r} of the adapter in {folder} cannot be had: {error}") from error
        if commit is not None:
            # The next save records the commit of the base, and transformers does not keep the commit that it loaded.
            model.config._commit_hash = commit
        saved.fit_vocabulary(model, name)
    base.restore(model.config)
    if getattr(model, "generation_config", None) is not None:
        base.restore_generation(model.generation_config)
    adapter = SaraAdapter.from_saved(model, saved)
    if merge:
        merge_into_base(adapter)
    return model.eval()


def _refuse_random(name: str, saved: storage.SavedAdapter, loaded: Mapping[str, Any]) -> None:
    """Raise an error if loading the base made up parameters that the adapter does not bring."""
    held = {tensor for part in saved.parts for tensor in part.held()}
    mismatched = {str(entry[0]) if isinstance(entry, tuple) else str(entry) for entry in loaded["mismatched_keys"]}
    random = sorted((set(loaded["missing_keys"]) | mismatched) - held)
    if random:
        raise AdapterError(
            f"The base {name!r} has no {', '.join(random[:5])} of the right shape for a {saved.base.class_name}, and "
            f"the adapter in {saved.folder} does not bring it, so it would be random. Train the adapter with "
            "modules_to_save naming its module, or give a base_model that has it."
        )


def fetch_base(saved: storage.SavedAdapter, given: str | None = None) -> Path:
    """The folder of a base in safetensors files: the given one, or the recorded one, which may be downloaded."""
    name, commit = (given, None) if given is not None else recorded_base(saved.base, saved.folder)
    refuse_missing(name, "base")
    if os.path.isdir(name):
        return Path(name)
    wanted = ["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja", *TOKENIZER_FILES]
    try:
        return Path(snapshot_download(name, revision=commit, allow_patterns=wanted))
    except NETWORK_ERRORS as error:
        raise FileNotFoundError(
            f"The base {name!r} of the adapter in {saved.folder} cannot be had: {error}"
        ) from error


def recorded_base(base: BaseRecord, folder: Path) -> tuple[str, str | None]:
    """Hub id and commit of the base that an adapter names."""
    name = base.model_id
    if name is None:
        raise AdapterError(
            f"The adapter in {folder} was trained on a {base.class_name} that is not on the Hub. "
            "Give its folder or Hub id as base_model."
        )
    if os.path.exists(name):
        # `from_pretrained` would load this file or folder, and not the model on the Hub.
        raise AdapterError(
            f"The adapter in {folder} names the base {name!r}, and there is a file or folder of that name here. "
            "Give base_model, or go to another folder."
        )
    return name, base.revision


def base_class(name: str, trust_remote_code: bool) -> Any:
    """The class of the base: one of transformers' own, or an Auto class if remote code may run."""
    found = model_class(name)
    if found is not None:
        return found
    if trust_remote_code:
        return AutoModelForCausalLM
    raise AdapterError(
        f"The adapter was trained on a model of the class {name!r}, which is not one of transformers. If you trust "
        "the code in its repository, say trust_remote_code=True; otherwise load the model yourself and give it as "
        "base_model."
    )
