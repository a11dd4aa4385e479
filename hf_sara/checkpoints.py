"""The checkpoints of a training: which are complete, so that a training can go on from them with the same bits.

When a checkpoint is written, all of its files are written to the disk, then a list of them. So a checkpoint with a
list is complete if every file is there and is what the list says. Without a list, which earlier versions did not
write, the files that resuming needs have to be there and readable.
"""

import json
import logging
import os
import zipfile
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO

from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME, TRAINER_STATE_NAME
from transformers.trainer_utils import sort_checkpoints

from . import storage
from .files import TEMPORARY_NAME, sync_file, sync_folder, write_file
from .records import parse_json, read_json
from .tensor_files import TensorFile

logger = logging.getLogger(__name__)

LIST_FILE = "checkpoint_files.json"
RUNNING_LOSS_FILE = "running_loss.json"
# DeepSpeed and FSDP keep the optimizer in files of their own, and DeepSpeed the schedule too.
OPTIMIZER_FILES = (OPTIMIZER_NAME, "latest", "optimizer_*/*")
SCHEDULER_FILES = (SCHEDULER_NAME, "latest")
RANDOM_FILES = ("rng_state*.pth",)
WEIGHTS_FILES = (storage.TENSORS_FILE, "*.safetensors", "pytorch_model*", "latest")
READ_AT_ONCE = 2**20


def complete(folder: str | os.PathLike) -> None:
    """Write the files of a new checkpoint to the disk, and after them the list that makes it complete."""
    folder = Path(folder)
    names = _names(folder)
    for name in names:
        sync_file(folder / name)
    for path in (path for path in folder.rglob("*") if path.is_dir()):
        sync_folder(path)
    records = {}
    for name in names:
        with open(folder / name, "rb") as file:
            records[name] = _record(file)
    write_file(folder / LIST_FILE, _text(records))
    sync_folder(folder.parent)


def list_of(contents: Mapping[str, bytes]) -> bytes:
    """The list of files whose contents are given."""
    return _text({name: {"bytes": len(content), "crc32": zlib.crc32(content)} for name, content in contents.items()})


def _text(records: Mapping[str, Mapping[str, int]]) -> bytes:
    return (json.dumps(records, indent=2, sort_keys=True) + "\n").encode()


def _names(folder: Path) -> list[str]:
    found = (path for path in folder.rglob("*") if path.is_file() and not TEMPORARY_NAME.fullmatch(path.name))
    return sorted({path.relative_to(folder).as_posix() for path in found} - {LIST_FILE})


def _record(file: IO[bytes]) -> dict[str, int]:
    size, digest = 0, 0
    while piece := file.read(READ_AT_ONCE):
        size, digest = size + len(piece), zlib.crc32(piece, digest)
    return {"bytes": size, "crc32": digest}


def is_complete(folder: str | os.PathLike) -> bool:
    """Whether a folder has a list of its files, and each of them is what was written."""
    try:
        _compare(Path(folder))
    except (OSError, ValueError):
        return False
    return True


def why_incomplete(folder: str | os.PathLike) -> str | None:
    """
    Why a training cannot go on from a checkpoint as if it had not been interrupted.

    Args:
        folder (`str` or `os.PathLike`): A checkpoint.

    Returns:
        `str`, *optional*: The file at fault and what is wrong with it; `None` if nothing is wrong.
    """
    folder = Path(folder)
    try:
        if (folder / LIST_FILE).is_file():
            _compare(folder)
        _check_state(folder)
        for patterns in (WEIGHTS_FILES, OPTIMIZER_FILES, SCHEDULER_FILES, RANDOM_FILES):
            if not any(True for pattern in patterns for _ in folder.glob(pattern)):
                raise ValueError(f"{patterns[0]} is missing")
        if not (folder / LIST_FILE).is_file():
            for name in _names(folder):
                _check_readable(folder / name)
    except (OSError, ValueError) as error:
        return str(error)
    return None


def _compare(folder: Path) -> None:
    """Compare the files of a checkpoint with its list."""
    try:
        records = read_json(folder / LIST_FILE, 2**24)
    except ValueError as error:
        raise ValueError(f"{LIST_FILE} is damaged: {error}") from error
    for name, expected in records.items():
        path = folder / name
        if not path.is_file():
            raise ValueError(f"{name} is missing")
        with open(path, "rb") as file:
            found = _record(file)
        if found == expected:
            continue
        if path.suffix != ".json" and path.name != storage.TENSORS_FILE:
            raise ValueError(f"{name} is not what was written: it has {found}, and {expected} was written")
        # People edit these files, and they tell themselves whether they are whole.
        _check_readable(path)
        logger.warning("%s was changed after the checkpoint was written.", path)


def _check_state(folder: Path) -> None:
    path = folder / TRAINER_STATE_NAME
    if not path.is_file():
        raise ValueError(f"{TRAINER_STATE_NAME} is missing")
    try:
        step = json.loads(path.read_bytes().decode())["global_step"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{TRAINER_STATE_NAME} is damaged ({error})") from error
    if type(step) is not int:
        raise ValueError(f"{TRAINER_STATE_NAME} is damaged (its step is {step!r})")


def _check_readable(path: Path) -> None:
    """Raise a `ValueError` if a file of a checkpoint is damaged, as far as its own content tells that."""
    check = CHECKS.get(path.name) or CHECKS.get(path.suffix)
    try:
        if check is not None:
            check(path)
    except (ValueError, OSError, zipfile.BadZipFile, EOFError, NotImplementedError) as error:
        raise ValueError(f"{path.name} is damaged ({error})") from error


def _check_adapter(path: Path) -> None:
    saved = storage.read(path.parent)
    assert saved.files is not None
    saved.files.read_state(saved)


def _check_archive(path: Path) -> None:
    """torch saves archives, which hold a checksum of each of their files."""
    with zipfile.ZipFile(path) as archive:
        damaged = archive.testzip()
    if damaged is not None:
        raise ValueError(f"the checksum of its part {damaged} is wrong")


def _check_json(path: Path) -> None:
    parse_json(content := path.read_bytes(), len(content))


# What earlier versions wrote is checked by the names and the endings of the files.
CHECKS: dict[str, Callable[[Path], object]] = {
    storage.TENSORS_FILE: _check_adapter,
    ".json": _check_json,
    ".safetensors": TensorFile,
    ".pt": _check_archive,
    ".pth": _check_archive,
}


def refuse_incomplete(folder: str | os.PathLike) -> None:
    """Raise an error if a training cannot go on from a checkpoint as if it had not been interrupted."""
    if not Path(folder).is_dir():
        raise FileNotFoundError(f"There is no checkpoint {str(folder)!r} to resume from.")
    reason = why_incomplete(folder)
    if reason is not None:
        raise ValueError(
            f"The checkpoint {str(folder)!r} is not complete: {reason}. A training that goes on from it would not end "
            "as it would have ended. Take an earlier checkpoint: resume_from_checkpoint=True takes the newest that "
            "is complete."
        )


def last_complete_checkpoint(folder: str | os.PathLike) -> str | None:
    """
    The newest checkpoint in a folder that is complete. Those that are not are passed over with a warning.

    Args:
        folder (`str` or `os.PathLike`): A training's `output_dir`.

    Returns:
        `str`, *optional*: Its path; `None` if there is none.
    """
    if not os.path.isdir(folder):
        return None
    for path in reversed(sort_checkpoints(output_dir=str(folder))):
        reason = why_incomplete(path)
        if reason is None:
            return path
        logger.warning("Passing over the checkpoint %s, which is not complete: %s.", path, reason)
    return None
