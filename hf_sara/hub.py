"""Pushing adapter folders to the Hub, and downloading them.

One push is one commit. It has only files whose names are on a list, so nothing that lies in a folder by chance leaves
the machine. The files are complete on disk before anything is sent, so a failed push can be tried again from there.
"""

import os
from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

from huggingface_hub import (
    CommitInfo,
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    get_token,
    snapshot_download,
)
from huggingface_hub.errors import (
    EntryNotFoundError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import filter_repo_objects, validate_repo_id

from . import model_card, storage
from .card_text import take_over
from .files import write_file
from .own_tokenizer import TOKENIZER_FILES, has_own_tokenizer
from .repos import NETWORK_ERRORS, hub_id

# This readable file with masked tokens replaces training_args.bin, which is a pickle with the Hub token in clear text.
TRAINING_ARGS_FILE = "training_args.json"
# Only files of these names may leave the machine.
UPLOAD_FILES = (
    *storage.ADAPTER_FILES,
    TRAINING_ARGS_FILE,
    model_card.CARD_FILE,
    model_card.RANKS_FILE,
    model_card.LOSS_FILE,
    *TOKENIZER_FILES,
)


# ---- from the Hub ----


def fetch_adapter(
    folder_or_repo_id: str | PathLike,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | PathLike | None = None,
    local_files_only: bool = False,
    tokenizer: bool = False,
) -> Path:
    """
    Find the folder of an adapter: the given one, or that of a Hub repository in the cache. Files that the cache lacks
    are downloaded, but only an adapter's own ones.

    Args:
        folder_or_repo_id (`str` or `os.PathLike`): A folder, or a Hub id.
        revision (`str`, *optional*): Branch, tag or commit on the Hub.
        token (`str` or `bool`, *optional*): Access token for private repositories; defaults to the one of
            `hf auth login`.
        cache_dir (`str` or `os.PathLike`, *optional*): Cache of downloads; defaults to huggingface_hub's.
        local_files_only (`bool`, *optional*, defaults to `False`): Whether to use the cache only, and no network.
        tokenizer (`bool`, *optional*, defaults to `False`): Whether to fetch the files of a tokenizer too.

    Returns:
        `Path`: A folder for [`~hf_sara.storage.read`].

    Raises:
        `FileNotFoundError`: If there is no such folder, repository or revision, or the cache does not have it.
        `OSError`: If the download failed. Another call continues it.
    """
    if os.path.isdir(folder_or_repo_id):
        return Path(folder_or_repo_id)
    name = str(folder_or_repo_id)
    if hub_id(name) is None:
        raise FileNotFoundError(f"There is no adapter folder {name!r}, and it cannot be a Hub id.")
    try:
        found = snapshot_download(
            name,
            revision=revision,
            token=token,
            cache_dir=None if cache_dir is None else Path(cache_dir),
            local_files_only=local_files_only,
            allow_patterns=[*storage.ADAPTER_FILES, *(TOKENIZER_FILES if tokenizer else ())],
        )
    except (RepositoryNotFoundError, RevisionNotFoundError, LocalEntryNotFoundError, HFValidationError) as error:
        raise FileNotFoundError(
            f"There is no folder {name!r}, and no adapter can be had from the Hub: {error}"
        ) from error
    except NETWORK_ERRORS as error:
        raise OSError(
            f"The adapter {name!r} could not be downloaded: {error}. Try again; it goes on from here."
        ) from error
    return Path(found)


# ---- to the Hub ----


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
    Push the adapter in a folder: its own files, its card, a tokenizer that is not the base's, and nothing else. The
    text that people wrote on the card on the Hub is kept. The other arguments are those of
    [`SaraAdapter.push_to_hub`].

    Args:
        folder (`str` or `os.PathLike`): A folder that [`SaraAdapter.save_pretrained`] or a trainer made.
        repo_id (`str`): The repository to push to: `"user/name"`.

    Returns:
        [`~huggingface_hub.CommitInfo`]: The commit.
    """
    storage.read(folder)
    return _commit(
        Path(folder),
        repo_id,
        {},
        commit_message=commit_message,
        private=private,
        revision=revision,
        create_pr=create_pr,
        token=token,
    )


def push_training(
    folder: str | PathLike,
    repo_id: str,
    *,
    state_in_repo: str | None = None,
    state_files: Sequence[str] = (),
    **kwargs: Any,
) -> CommitInfo:
    """
    Push a training's checkpoint in one commit. Its adapter goes to the top of the repository, and the files that
    resuming needs go to a folder in it. The other arguments are those of [`push_folder`].

    Args:
        state_in_repo (`str`, *optional*):
            Folder in the repository for the whole checkpoint. If it is left out, only the adapter is pushed.
        state_files (`Sequence[str]`, *optional*):
            Names, or patterns of names, of the files that go to this folder besides the adapter's.
    """
    folder = Path(folder)
    state = {}
    if state_in_repo is not None:
        names = [path.name for path in folder.iterdir() if path.is_file()]
        chosen = filter_repo_objects(names, allow_patterns=[*UPLOAD_FILES, *state_files])
        state = {f"{state_in_repo}/{name}": folder / name for name in sorted(chosen)}
    return _commit(folder, repo_id, state, **kwargs)


def _commit(
    folder: Path,
    repo_id: str,
    state: Mapping[str, Path],
    *,
    commit_message: str,
    private: bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    token: str | None = None,
) -> CommitInfo:
    """
    Make the repository and the branch if they do not exist, and commit the folder's adapter together with the files of
    `state`, which maps names in the repository to files.
    """
    check_repo_id(repo_id)
    refuse_secrets(folder, token)
    api = HfApi(token=token)
    try:
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if revision is not None:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        keep_remote_text(api, folder, repo_id, revision)
        with_tokenizer = has_own_tokenizer(folder, storage.read(folder).base)
        names = [name for name in UPLOAD_FILES if with_tokenizer or name not in TOKENIZER_FILES]
        present = {name: folder / name for name in names if (folder / name).is_file()}
        operations: list[CommitOperationAdd | CommitOperationDelete] = [
            CommitOperationAdd(name, path) for name, path in {**present, **state}.items()
        ]
        if storage.FACTORS_FILE not in present and api.file_exists(repo_id, storage.FACTORS_FILE, revision=revision):
            # The frozen factors of an earlier version do not belong to this adapter.
            operations.append(CommitOperationDelete(storage.FACTORS_FILE))
        return api.create_commit(
            repo_id, operations, commit_message=commit_message, revision=revision, create_pr=create_pr
        )
    except NETWORK_ERRORS as error:
        raise OSError(failure_text(folder, repo_id, error)) from error


def failure_text(folder: str | PathLike, repo_id: str, error: BaseException) -> str:
    """The message of the error for a push that failed."""
    return (
        f"The push to {repo_id} failed: {error}. Nothing is lost: the adapter is in {folder}. "
        f"Push it later with: hf-sara push {folder} {repo_id}"
    )


def keep_remote_text(api: HfApi, folder: Path, repo_id: str, revision: str | None) -> None:
    """
    Download the card on the Hub, and add the text that people wrote on it to the folder's card, unless people wrote on
    that card too. The folder's file is rewritten.
    """
    path = folder / model_card.CARD_FILE
    if not path.is_file():
        return
    try:
        remote = api.hf_hub_download(repo_id, model_card.CARD_FILE, revision=revision)
    except (EntryNotFoundError, RevisionNotFoundError):
        return
    merged = take_over(path.read_text(encoding="utf-8"), Path(remote).read_text(encoding="utf-8"))
    write_file(path, merged.encode())


def check_repo_id(repo_id: str) -> None:
    """Raise a `ValueError` unless the Hub accepts the name for a repository."""
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise ValueError(f"repo_id={repo_id!r} is not a name that the Hub accepts: {error}") from error


def refuse_secrets(folder: Path, token: str | None) -> None:
    """Raise a `ValueError` if a file of the folder contains the token in use, since the file might be uploaded."""
    secrets = {secret.encode() for secret in (token, get_token()) if isinstance(secret, str) and len(secret) > 7}
    for path in (path for path in folder.iterdir() if path.is_file()):
        content = path.read_bytes()
        if any(secret in content for secret in secrets):
            raise ValueError(f"{path} contains your Hub token. Nothing was uploaded; take it out first.")
