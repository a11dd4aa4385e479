"""Files: atomic writes, and the form of digests."""

import contextlib
import os
import re
import secrets
from collections.abc import Mapping
from pathlib import Path


def write_file(path: Path, content: bytes) -> None:
    """Write under a temporary name in the same folder, then rename, so that a crash leaves the old file or the new."""
    write_files({path: content})


def write_files(contents: Mapping[Path, bytes]) -> None:
    """
    Write several files under temporary names, then rename them in their order. A disk that is full, or a crash before
    the first rename, leaves all of the old files.
    """
    # Two writers of one file have different temporary files: two threads, and two machines that share a disk.
    writer = f"{os.getpid()}-{secrets.token_hex(8)}"
    temporary = {path: path.with_name(f".{path.name}.{writer}.tmp") for path in contents}
    try:
        for path, content in contents.items():
            with open(temporary[path], "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
        for path in contents:
            os.replace(temporary[path], path)
    except BaseException:
        for path in temporary.values():
            path.unlink(missing_ok=True)
        raise
    for folder in {path.parent for path in contents}:
        _sync_folder(folder)


def _sync_folder(folder: Path) -> None:
    """Write the names of a folder's files to the disk. Some systems cannot do this, and need no help with it."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def check_digest(what: str, digest: str) -> None:
    """Raise a `ValueError` unless a text is a SHA-256 in hexadecimal."""
    if not re.fullmatch(r"[0-9a-f]{64}", digest):
        raise ValueError(f"{what} {digest!r} is not a SHA-256")
