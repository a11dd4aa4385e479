"""The checkpoints of a training: which are complete, so that a training can go on from them with the same bits.

When a checkpoint is written, all of its files are written to the disk, then a list of them. So a checkpoint with a
list is complete if the files that resuming reads are what the list says. Without a list, which earlier versions and
other trainers do not write, these files have to be there and readable.
"""

import json
import logging
import os
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from transformers.trainer import OPTIMIZER_NAME, SCALER_NAME, SCHEDULER_NAME, TRAINER_STATE_NAME
from transformers.trainer_utils import sort_checkpoints

from . import storage
from .files import TEMPORARY_NAME, sync_file, sync_folder, write_file

logger = logging.getLogger(__name__)

LIST_FILE = "checkpoint_files.json"
RUNNING_LOSS_FILE = "running_loss.json"
# Of each kind of file that resuming reads, the names that it can have. DeepSpeed and FSDP have names of their own.
WEIGHTS_FILES = (storage.TENSORS_FILE, f"*/{storage.TENSORS_FILE}", "*.safetensors", "pytorch_model*", "latest")
OPTIMIZER_FILES = (OPTIMIZER_NAME, "optimizer_*/*", "latest")
SCHEDULER_FILES = (SCHEDULER_NAME, "latest")
RANDOM_FILES = ("rng_state*.pth",)
STATE_FILES = (TRAINER_STATE_NAME,)
KINDS = (WEIGHTS_FILES, OPTIMIZER_FILES, SCHEDULER_FILES, RANDOM_FILES, STATE_FILES)
# These are read too, if they are there.
MORE_FILES = (RUNNING_LOSS_FILE, SCALER_NAME, "global_step*/*", "pytorch_model*/*")
# Reading every byte of a file takes long if it is large, so only the size of such a file is noted.
MOST_BYTES_TO_READ = 2**28
READ_AT_ONCE = 2**20


def complete(folder: str | os.PathLike) -> None:
    """Write the files of a new checkpoint to the disk, and after them the list that makes it complete."""
    folder = Path(folder)
    records = {}
    for path in sorted(_files(folder)):
        sync_file(path)
        records[path.relative_to(folder).as_posix()] = _record_of(path)
    for path in (path for path in folder.rglob("*") if path.is_dir()):
        sync_folder(path)
    write_file(folder / LIST_FILE, _text(records))
    sync_folder(folder.parent)


def list_of(contents: Mapping[str, bytes]) -> bytes:
    """The list of files whose contents are given."""
    return _text({name: _record(len(content), iter((content,))) for name, content in contents.items()})


def _text(records: Mapping[str, Mapping[str, int]]) -> bytes:
    return (json.dumps(records, indent=2, sort_keys=True) + "\n").encode()


def _files(folder: Path) -> Iterator[Path]:
    for path in folder.rglob("*"):
        temporary = TEMPORARY_NAME.fullmatch(path.name) or path.name == LIST_FILE
        if not temporary and path.is_file() and not path.is_symlink():
            yield path


def _record_of(path: Path) -> dict[str, int]:
    with open(path, "rb") as file:
        return _record(path.stat().st_size, _pieces(file))


def _pieces(file: IO[bytes]) -> Iterator[bytes]:
    while piece := file.read(READ_AT_ONCE):
        yield piece


def _record(size: int, pieces: Iterator[bytes]) -> dict[str, int]:
    """What the list says of a file."""
    if size > MOST_BYTES_TO_READ:
        return {"bytes": size}
    digest = 0
    for piece in pieces:
        digest = zlib.crc32(piece, digest)
    return {"bytes": size, "crc32": digest}


def is_unchanged(folder: str | os.PathLike) -> bool:
    """Whether a folder has a list of its files, and each of them is what was written."""
    try:
        records = _read_json(Path(folder, LIST_FILE))
        return all(_record_of(Path(folder, name)) == record for name, record in records.items())
    except (OSError, ValueError):
        return False


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
        listed = _read_json(folder / LIST_FILE) if (folder / LIST_FILE).is_file() else None
        needed = [path for kind in KINDS for path in _of_kind(folder, kind, listed)]
        needed += [path for pattern in MORE_FILES for path in _found(folder, pattern, listed)]
        for path in dict.fromkeys(needed):
            name = path.relative_to(folder).as_posix()
            if not path.is_file():
                raise ValueError(f"{name} is missing")
            _check(path, None if listed is None else listed.get(name))
    except (OSError, ValueError) as error:
        return str(error)
    return None


def _of_kind(folder: Path, patterns: tuple[str, ...], listed: Mapping[str, Any] | None) -> list[Path]:
    """The files of a kind that resuming reads. A checkpoint with a list may have been written without an optimizer."""
    found = [path for pattern in patterns for path in _found(folder, pattern, listed)]
    if not found and (listed is None or patterns in (WEIGHTS_FILES, STATE_FILES)):
        raise ValueError(f"{patterns[0]} is missing")
    return found


def _found(folder: Path, pattern: str, listed: Mapping[str, Any] | None) -> list[Path]:
    if listed is None:
        return sorted(folder.glob(pattern))
    return [folder / name for name in listed if Path(name).match(pattern) and name.count("/") == pattern.count("/")]


def _check(path: Path, expected: Any) -> None:
    """Raise a `ValueError` if a file is not what was written, or, if nobody noted that, cannot be read."""
    if expected is not None and _record_of(path) == expected:
        return
    try:
        if path.name == storage.TENSORS_FILE:
            _check_adapter(path)
        elif path.suffix == ".json":
            _read_json(path)
        elif expected is not None:
            raise ValueError("it is not what was written")
        elif path.name in (OPTIMIZER_NAME, SCHEDULER_NAME, SCALER_NAME) or path.suffix == ".pth":
            _check_archive(path)
    except (ValueError, OSError, zipfile.BadZipFile, EOFError, NotImplementedError) as error:
        raise ValueError(f"{path.name} is damaged ({error})") from error
    if expected is not None:
        # People edit these files, and they tell themselves whether they are whole.
        logger.warning("%s was changed after the checkpoint was written.", path)


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


def _read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file that Trainer may have written, with numbers like NaN."""
    try:
        found = json.loads(path.read_bytes().decode())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path.name} is damaged ({error})") from error
    if type(found) is not dict:
        raise ValueError(f"{path.name} is damaged (it is not a JSON object)")
    return found


def has_optimizer(folder: str | os.PathLike) -> bool:
    """Whether a checkpoint has the state of the optimizer."""
    return any(True for pattern in OPTIMIZER_FILES for _ in Path(folder).glob(pattern))


def refuse_incomplete(folder: str | os.PathLike) -> None:
    """Raise an error if a training cannot go on from a checkpoint as if it had not been interrupted."""
    if not Path(folder).is_dir():
        raise FileNotFoundError(f"There is no checkpoint {str(folder)!r} to resume from.")
    reason = why_incomplete(folder)
    if reason is not None:
        raise ValueError(
            f"The training cannot be resumed exactly from the checkpoint {str(folder)!r}, because it is not complete: "
            f"{reason}. Take an earlier checkpoint: resume_from_checkpoint=True takes the newest that is complete."
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
