"""Files: atomic writes and digests."""

import hashlib
import os
import re
from pathlib import Path


def write_file(path: Path, content: bytes) -> None:
    """Write under a temporary name in the same folder, then rename, so that a crash leaves the old file or the new."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def file_digest(path: Path) -> str:
    """SHA-256 (hexadecimal) of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_digest(what: str, digest: str) -> None:
    """Raise a `ValueError` unless a text is a SHA-256 in hexadecimal."""
    if not re.fullmatch(r"[0-9a-f]{64}", digest):
        raise ValueError(f"{what} {digest!r} is not a SHA-256")
