"""Pushing adapter folders to the Hub, and downloading them.

One push is one commit. It has only files whose names are on a list, and no links, so nothing that lies in a folder by
chance leaves the machine. The files are complete on disk before anything is sent, so a failed push can be tried again
from there. They are read before the push is queued, so it does not matter what becomes of them afterwards.
"""

import contextlib
import logging
import os
import tempfile
from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path

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
from .card_text import decode, loading_from, repaired, take_over
from .checkpoints import LIST_FILE, list_of
from .files import write_file
from .own_tokenizer import TOKENIZER_FILES, has_own_tokenizer
from .publishing import TRAINING_ARGS_FILE, published_file
from .repos import NETWORK_ERRORS, hub_id

logger = logging.getLogger(__name__)

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
    beside: Sequence[str] = (),
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
        beside (`Sequence[str]`, *optional*): Names of other files to fetch, where the repository has them.

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
            allow_patterns=[*storage.ADAPTER_FILES, *beside],
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
    Push the adapter in a folder: its own files, its card, a tokenizer that is not the base's, and nothing else. A save
    that was cut off is finished first. The text that people wrote on the card on the Hub is kept. The other arguments
    are those of [`SaraAdapter.push_to_hub`].

    Args:
        folder (`str` or `os.PathLike`): A folder that [`SaraAdapter.save_pretrained`] or a trainer made.
        repo_id (`str`): The repository to push to: `"user/name"`.

    Returns:
        [`~huggingface_hub.CommitInfo`]: The commit.
    """
    return push_files(
        files_to_push(folder),
        folder,
        repo_id,
        commit_message=commit_message,
        private=private,
        revision=revision,
        create_pr=create_pr,
        token=token,
    )


def files_to_push(
    folder: str | PathLike, state_in_repo: str | None = None, state_files: Sequence[str] = ()
) -> dict[str, bytes]:
    """
    Read what a push of a folder publishes. Nothing that happens to the folder afterwards changes that.

    Args:
        folder (`str` or `os.PathLike`): The folder of an adapter, or a checkpoint.
        state_in_repo (`str`, *optional*):
            Folder in the repository for the whole checkpoint. If it is left out, only the adapter is pushed.
        state_files (`Sequence[str]`, *optional*):
            Names, or patterns of names, of the files that go to this folder besides the adapter's.

    Returns:
        `dict[str, bytes]`: Contents by their names in the repository.

    Raises:
        `FileNotFoundError`: If the folder holds no adapter.
        `ValueError`: If a file of the adapter is damaged, or a link to another place.
    """
    folder = Path(folder)
    for name in storage.ADAPTER_FILES:
        if (folder / name).is_symlink():
            raise ValueError(
                f"{folder / name} is a symbolic link, and a push does not follow links. Copy the adapter to a folder "
                f"of its own first: hf-sara pull {folder} --to FOLDER."
            )
    adapter = storage.settle(folder)
    there = {path.name: path for path in folder.iterdir() if path.is_file()}
    links = [name for name in there if there[name].is_symlink() and name in UPLOAD_FILES]
    if links:
        logger.warning("A push does not follow symbolic links, so %s stays here.", ", ".join(links))
    own = {name: path.read_bytes() for name, path in there.items() if not path.is_symlink() and name in UPLOAD_FILES}
    found = {**{name: own[name] for name in own if name not in storage.ADAPTER_FILES}, **adapter}
    if state_in_repo is None:
        return _published(found)
    names = [name for name, path in there.items() if not path.is_symlink() and name not in found]
    state = {name: there[name].read_bytes() for name in filter_repo_objects(names, allow_patterns=list(state_files))}
    whole = _published({**found, **state})
    whole[LIST_FILE] = list_of(whole)
    return {**_published(found), **{f"{state_in_repo}/{name}": content for name, content in whole.items()}}


def _published(files: Mapping[str, bytes]) -> dict[str, bytes]:
    contents = {name: published_file(name, content) for name, content in files.items()}
    return {name: content for name, content in contents.items() if content is not None}


def push_files(
    files: Mapping[str, bytes],
    folder: str | PathLike,
    repo_id: str,
    *,
    commit_message: str,
    private: bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    token: str | None = None,
) -> CommitInfo:
    """
    Make the repository and the branch if they do not exist, and commit files to it. The other arguments are those of
    [`push_folder`].

    Args:
        files (`Mapping[str, bytes]`): What [`files_to_push`] read.
        folder (`str` or `os.PathLike`): Where it was read. A card that is there gets the text of the Hub's card too.
    """
    if storage.TENSORS_FILE not in files:
        raise ValueError(f"There is no adapter among the files to push, so {repo_id} was not changed.")
    check_repo_id(repo_id)
    refuse_secrets(files, folder, token)
    files = dict(files)
    api = HfApi(token=token)
    try:
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if revision is not None:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        if model_card.CARD_FILE in files:
            card = keep_remote_text(api, files[model_card.CARD_FILE], repo_id, revision)
            card = loading_from(card.decode(), repo_id).encode()
            if card != files[model_card.CARD_FILE] and (path := Path(folder, model_card.CARD_FILE)).is_file():
                write_file(path, card)
            files[model_card.CARD_FILE] = card
        if not _with_own_tokenizer(files):
            files = {name: files[name] for name in files if name not in TOKENIZER_FILES}
        operations: list[CommitOperationAdd | CommitOperationDelete] = [
            CommitOperationAdd(name, content) for name, content in files.items()
        ]
        if storage.FACTORS_FILE not in files and api.file_exists(repo_id, storage.FACTORS_FILE, revision=revision):
            # The frozen factors of an earlier version do not belong to this adapter.
            operations.append(CommitOperationDelete(storage.FACTORS_FILE))
        return api.create_commit(
            repo_id, operations, commit_message=commit_message, revision=revision, create_pr=create_pr
        )
    except NETWORK_ERRORS as error:
        raise OSError(failure_text(folder, repo_id, error)) from error
    except RuntimeError as error:
        # The client raises it if the upload of a large file fails, from the error that says why.
        raise OSError(failure_text(folder, repo_id, error.__cause__ or error)) from error


def _with_own_tokenizer(files: Mapping[str, bytes]) -> bool:
    """Whether the tokenizer among an adapter's files is one of its own."""
    if not any(name in files for name in TOKENIZER_FILES):
        return False
    with tempfile.TemporaryDirectory(prefix="hf_sara-", ignore_cleanup_errors=True) as temporary:
        for name in (*storage.ADAPTER_FILES, *TOKENIZER_FILES):
            if name in files:
                Path(temporary, name).write_bytes(files[name])
        return has_own_tokenizer(temporary, storage.read(temporary).base)


def failure_text(folder: str | PathLike, repo_id: str, error: BaseException) -> str:
    """The message of the error for a push that failed."""
    if not Path(folder).is_dir():
        # The training has deleted an older checkpoint meanwhile.
        return f"The push to {repo_id} failed: {error}. The next one brings a newer adapter."
    return (
        f"The push to {repo_id} failed: {error}. Nothing is lost: the adapter is in {folder}. "
        f"Push it later with: hf-sara push {folder} {repo_id}"
    )


def keep_remote_text(api: HfApi, card: bytes, repo_id: str, revision: str | None) -> bytes:
    """
    Download the card on the Hub, and add the text that people wrote on it to a card, unless people wrote on that one
    too.
    """
    mine = decode(card)
    with contextlib.suppress(EntryNotFoundError, RevisionNotFoundError):
        remote = api.hf_hub_download(repo_id, model_card.CARD_FILE, revision=revision)
        mine = take_over(mine, decode(Path(remote).read_bytes()))
    return repaired(mine).encode()


def check_repo_id(repo_id: str) -> None:
    """Raise a `ValueError` unless the Hub accepts the name for a repository."""
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise ValueError(f"repo_id={repo_id!r} is not a name that the Hub accepts: {error}") from error


def refuse_secrets(files: Mapping[str, bytes], folder: str | PathLike, token: str | None) -> None:
    """Raise a `ValueError` if a file to push contains the token in use."""
    secrets = {secret.encode() for secret in (token, get_token()) if isinstance(secret, str) and len(secret) > 7}
    for name, content in files.items():
        if any(secret in content for secret in secrets):
            raise ValueError(
                f"{Path(folder, Path(name).name)} contains your Hub token. Nothing was uploaded; take it out first."
            )
