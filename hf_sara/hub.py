"""To the Hub and back: `push_to_hub`, and `from_hub` that loads base and adapter in one line.

One push is one commit of the files of an allow-list, so nothing that lies in a folder by chance leaves the machine.
The files are complete on disk before anything is sent, so a push that fails can be tried again from there.
"""

import os
import tempfile
from collections.abc import Callable, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi, get_token, snapshot_download
from huggingface_hub.errors import EntryNotFoundError, HFValidationError, RevisionNotFoundError
from huggingface_hub.utils import filter_repo_objects, validate_repo_id
from transformers import AutoModelForCausalLM, PreTrainedModel

from . import export, model_card, storage
from .adapter import SaraAdapter, adapter_of
from .checkpoint import model_class
from .storage import AdapterError

# A masked, readable stand-in for training_args.bin, which is a pickle that holds the Hub token in clear.
TRAINING_ARGS_FILE = "training_args.json"
TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json"),
    *("vocab.txt", "merges.txt", "tokenizer.model", "spiece.model", "chat_template.jinja"),
)
# What may leave the machine.
UPLOAD_FILES = (
    *storage.ADAPTER_FILES,
    TRAINING_ARGS_FILE,
    model_card.CARD_FILE,
    model_card.PLOT_FILE,
    *TOKENIZER_FILES,
)


def push_to_hub(
    model_or_adapter: PreTrainedModel | SaraAdapter,
    repo_id: str,
    *,
    commit_message: str = "Upload adapter",
    private: bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    token: str | None = None,
    **card: Any,
) -> CommitInfo:
    """
    Push an adapter and its model card to the Hub, in one commit. The repository is made if it does not exist.

    Args:
        model_or_adapter ([`~transformers.PreTrainedModel`] or [`SaraAdapter`]):
            An adapter, or a model that carries exactly one.
        repo_id (`str`): Where to: `"user/name"`.
        commit_message (`str`, *optional*, defaults to `"Upload adapter"`): Message of the commit.
        private (`bool`, *optional*): Whether a new repository is private.
        revision (`str`, *optional*): Branch to push to; made if it does not exist. Defaults to the main branch.
        create_pr (`bool`, *optional*, defaults to `False`): Open a pull request instead of pushing to the branch.
        token (`str`, *optional*): Token with write access; defaults to the one of `hf auth login`.
        card: Passed on to [`~hf_sara.model_card.make_card`]: `language`, `license`, `tags`, `datasets`, `results`, ...

    Returns:
        [`~huggingface_hub.CommitInfo`]: The commit, with `pr_url` for a pull request.

    Raises:
        `OSError`: If the push failed. The adapter then lies in a folder that the message names, to be pushed later.
        `ValueError`: If the model carries no adapter or several, or `repo_id` is not one.
    """
    adapter = adapter_of(model_or_adapter)
    check_repo_id(repo_id)
    folder = Path(tempfile.mkdtemp(prefix="hf_sara-"))
    adapter.save_pretrained(folder)
    text = model_card.make_card(adapter, folder=folder, repo_id=repo_id, **card)
    storage.write_file(folder / model_card.CARD_FILE, text.encode())
    info = push_folder(
        folder,
        repo_id,
        commit_message=commit_message,
        private=private,
        revision=revision,
        create_pr=create_pr,
        token=token,
    )
    for file in folder.iterdir():
        file.unlink()
    folder.rmdir()
    return info


def push_folder(
    folder: str | PathLike,
    repo_id: str,
    *,
    commit_message: str = "Upload adapter",
    private: bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    token: str | None = None,
) -> CommitInfo:
    """
    Push the adapter that lies in a folder: its own files, its card, and a tokenizer that training changed; nothing
    else. What people wrote on the card that is on the Hub is kept. The other arguments are those of [`push_to_hub`].

    Args:
        folder (`str` or `os.PathLike`): A folder that [`SaraAdapter.save_pretrained`] or a trainer made.
        repo_id (`str`): Where to: `"user/name"`.

    Returns:
        [`~huggingface_hub.CommitInfo`]: The commit.
    """
    folder = Path(folder)
    storage.read(folder)
    return _commit(
        folder,
        repo_id,
        lambda api, repo_id: _operations(api, folder, repo_id, revision),
        commit_message=commit_message,
        private=private,
        revision=revision,
        create_pr=create_pr,
        token=token,
    )


def push_checkpoint(
    folder: str | PathLike,
    repo_id: str,
    *,
    state_in_repo: str | None = None,
    state_files: Sequence[str] = (),
    **kwargs: Any,
) -> CommitInfo:
    """
    Push a training's checkpoint: its adapter to the top of the repository, and, in the same commit, what resuming
    needs to a folder there. The other arguments are those of [`push_folder`].

    Args:
        state_in_repo (`str`, *optional*):
            Folder in the repository for the whole checkpoint. Left out: the adapter only.
        state_files (`Sequence[str]`, *optional*):
            Names, or patterns of names, of the files besides the adapter's.
    """
    folder = Path(folder)

    def operations(api: HfApi, repo_id: str) -> list[CommitOperationAdd | CommitOperationDelete]:
        found = _operations(api, folder, repo_id, kwargs.get("revision"))
        if state_in_repo is not None:
            names = [path.name for path in folder.iterdir() if path.is_file()]
            chosen = filter_repo_objects(names, allow_patterns=[*UPLOAD_FILES, *state_files])
            found += [CommitOperationAdd(f"{state_in_repo}/{name}", folder / name) for name in sorted(chosen)]
        return found

    return _commit(folder, repo_id, operations, **kwargs)


def _operations(
    api: HfApi, folder: Path, repo_id: str, revision: str | None
) -> list[CommitOperationAdd | CommitOperationDelete]:
    """What brings the adapter of a folder to the top of a repository."""
    merge_cards(api, folder, repo_id, revision)
    names = [name for name in UPLOAD_FILES if (folder / name).is_file()]
    operations: list[CommitOperationAdd | CommitOperationDelete] = [
        CommitOperationAdd(name, folder / name) for name in names
    ]
    if storage.FACTORS_FILE not in names and api.file_exists(repo_id, storage.FACTORS_FILE, revision=revision):
        # Frozen factors of an earlier version are not this adapter's.
        operations.append(CommitOperationDelete(storage.FACTORS_FILE))
    return operations


def _commit(
    folder: Path,
    repo_id: str,
    operations: Callable[[HfApi, str], list[CommitOperationAdd | CommitOperationDelete]],
    *,
    commit_message: str,
    private: bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    token: str | None = None,
) -> CommitInfo:
    """Make the repository and the branch if they do not exist, and one commit."""
    check_repo_id(repo_id)
    refuse_secrets(folder, token)
    api = HfApi(token=token)
    try:
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if revision is not None:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        return api.create_commit(
            repo_id,
            operations(api, repo_id),
            commit_message=commit_message,
            revision=revision,
            create_pr=create_pr,
        )
    except storage.NETWORK_ERRORS as error:
        raise OSError(push_failed(folder, repo_id, error)) from error


def push_failed(folder: str | PathLike, repo_id: str, error: BaseException) -> str:
    """What to tell somebody whose push failed."""
    return (
        f"The push to {repo_id} failed: {error}. Nothing is lost: the adapter is in {folder}. "
        f"Push it later with: hf-sara push {folder} {repo_id}"
    )


def merge_cards(api: HfApi, folder: Path, repo_id: str, revision: str | None) -> None:
    """Take what people wrote on the Hub's card over into the folder's, where that has nothing of its own."""
    path = folder / model_card.CARD_FILE
    if not path.is_file():
        return
    try:
        remote = api.hf_hub_download(repo_id, model_card.CARD_FILE, revision=revision)
    except (EntryNotFoundError, RevisionNotFoundError):
        return
    merged = model_card.take_over(path.read_text(encoding="utf-8"), Path(remote).read_text(encoding="utf-8"))
    storage.write_file(path, merged.encode())


def check_repo_id(repo_id: str) -> None:
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise ValueError(f"repo_id={repo_id!r} is not a name that the Hub accepts: {error}") from error


def refuse_secrets(folder: Path, token: str | None) -> None:
    """Raise a `ValueError` if a file of the folder contains the token in use: it might be uploaded."""
    secrets = {secret.encode() for secret in (token, get_token()) if isinstance(secret, str) and len(secret) > 7}
    for path in (path for path in folder.iterdir() if path.is_file()):
        content = path.read_bytes()
        if any(secret in content for secret in secrets):
            raise ValueError(f"{path} contains your Hub token. Nothing was uploaded; take it out first.")


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
    Load an adapter together with its base model: the recorded one at the recorded commit, as the recorded class.

    Args:
        repo_id_or_folder (`str` or `os.PathLike`): Hub id or folder of the adapter.
        base_model (`str`, `os.PathLike` or [`~transformers.PreTrainedModel`], *optional*): A base to use instead of
            the recorded one.
        revision (`str`, *optional*): Branch, tag or commit of the adapter.
        dtype (`torch.dtype` or `str`, *optional*): Defaults to the one that the adapter was trained on.
        device_map (`str` or `dict`, *optional*): Passed on to the base's `from_pretrained`.
        token (`str` or `bool`, *optional*): For private repositories.
        cache_dir (`str` or `os.PathLike`, *optional*): Cache of downloads.
        local_files_only (`bool`, *optional*, defaults to `False`): Take what the cache has, without a network.
        trust_remote_code (`bool`, *optional*, defaults to `False`): Let a base run code of its repository.
        merge (`bool`, *optional*, defaults to `False`): Merge the adapter into the weights and return a plain model.
        kwargs: Passed on to the base's `from_pretrained`.

    Returns:
        [`~transformers.PreTrainedModel`]: In eval mode; `model.sara_adapter` is the handle, unless merged.

    Raises:
        `FileNotFoundError`: If the adapter or the base cannot be found.
        [`AdapterError`]: If the adapter is damaged, or does not belong to the base.
    """
    access = {"token": token, "cache_dir": cache_dir, "local_files_only": local_files_only}
    folder = storage.locate(repo_id_or_folder, revision=revision, **access)
    base = storage.read(folder).base
    if isinstance(base_model, PreTrainedModel):
        model = base_model
    else:
        name, commit = (str(base_model), None) if base_model is not None else recorded_base(base, folder)
        kind = base_class(base["class"], trust_remote_code)
        try:
            model = kind.from_pretrained(
                name,
                revision=commit or "main",
                dtype=dtype or getattr(torch, base["dtype"]),
                device_map=device_map,
                trust_remote_code=trust_remote_code,
                **access,
                **kwargs,
            )
        except OSError as error:
            raise FileNotFoundError(f"The base {name!r} of the adapter in {folder} cannot be had: {error}") from error
        if commit is not None:
            # What transformers does not keep, for the next save.
            model.config._commit_hash = commit
        for key in ("pad_token_id", "eos_token_id"):
            if base[key] is not None and hasattr(model.config, key):
                setattr(model.config, key, base[key])
    adapter = SaraAdapter.load(model, folder)
    return (export.merge(adapter) if merge else model).eval()


def locate_base(saved: storage.SavedAdapter, given: str | None = None) -> Path:
    """The folder of a base in safetensors files: the given one, or the recorded one, downloaded where needed."""
    name, commit = (given, None) if given is not None else recorded_base(saved.base, saved.folder)
    if Path(name).is_dir():
        return Path(name)
    wanted = ["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja"]
    return Path(snapshot_download(name, revision=commit, allow_patterns=wanted))


def recorded_base(base: dict[str, Any], folder: Path) -> tuple[str, str | None]:
    """Hub id and commit of the base that an adapter names."""
    name = base["model_id"]
    if name is None:
        raise AdapterError(
            f"The adapter in {folder} was trained on a {base['class']} that is not on the Hub. "
            "Give it as base_model: a folder, a Hub id or a loaded model."
        )
    if os.path.exists(name):
        # `from_pretrained` would load what lies there.
        raise AdapterError(
            f"The adapter in {folder} names the base {name!r}, and there is a file or folder of that name here. "
            "Give base_model, or go to another folder."
        )
    return name, base["revision"]


def base_class(name: str, trust_remote_code: bool) -> type:
    """The class of the base: one of transformers' own, or an Auto class where remote code may run."""
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
