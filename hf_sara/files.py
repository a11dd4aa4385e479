"""Files and folders that are written whole or not at all, and the form of digests.

What is not ready yet has a temporary name, in which its writer is named. A writer that was killed leaves such a name
behind, and the next write in the same folder deletes it.
"""

import contextlib
import ctypes
import functools
import hashlib
import json
import os
import platform
import re
import secrets
import shutil
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path

TEMPORARY_NAME = re.compile(r"\.hf_sara-([0-9a-f]{8})-(\d+)-[0-9a-f]{16}\.tmp")
# A folder of a temporary name with this file waits to be moved. The file has the name of the place.
READY_FILE = ".hf_sara-ready"
WINDOWS = os.name == "nt"
# The seconds between the tries to change a file that another program has open.
PAUSES = (0.05, 0.1, 0.2, 0.4, 0.8, 1.6)


def write_file(path: Path, content: bytes) -> None:
    """Write under a temporary name in the same folder, then rename, so that a crash leaves the old file or the new."""
    write_files({path: content})


def write_files(contents: Mapping[Path, bytes]) -> None:
    """
    Write several files under temporary names, then rename them in their order. A disk that is full, or a crash before
    the first rename, leaves all of the old files. The names are on the disk when this returns.
    """
    temporary = {path: path.with_name(f".hf_sara-{_writer()}.tmp") for path in contents}
    try:
        for path, content in contents.items():
            with naming(path, temporary[path]), open(temporary[path], "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
        for path in contents:
            with naming(path, temporary[path]):
                _when_free(os.replace, temporary[path], path)
    except BaseException:
        for path in temporary.values():
            with contextlib.suppress(OSError):
                path.unlink()
        raise
    for folder in {path.parent for path in contents}:
        sync_folder(folder)
        delete_leftovers(folder)


def make_folder(folder: Path) -> None:
    """Make a folder and those that it lies in, unless they exist, and write their names to the disk."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for path in missing:
        sync_folder(path.parent)


@contextlib.contextmanager
def new_folder(folder: Path, replaced: Collection[str] = ()) -> Iterator[Path]:
    """
    A new folder with a temporary name, whose files get to `folder` when all of them are written. If nothing else lies
    in `folder`, the new one takes its place in one step. Otherwise the files are moved one by one, and the next write
    finishes what a crash in between has left. After an error, or an earlier crash, `folder` is what it was.

    Args:
        folder (`Path`): The folder to make or to change.
        replaced (`Collection[str]`, *optional*): Names of files that go, also if the new folder does not have them.
    """
    folder = Path(os.path.realpath(folder))
    # A folder may be writable, or be another disk, within one that is not.
    inside = folder.is_dir() and (os.path.ismount(folder) or not os.access(folder.parent, os.W_OK))
    home = folder if inside else folder.parent
    make_folder(home)
    for place in {home, folder} if folder.is_dir() else {home}:
        delete_leftovers(place)
    new = home / f".hf_sara-{_writer()}.tmp"
    try:
        new.mkdir()
        yield new
        for path in sorted(new.rglob("*")):
            sync_folder(path) if path.is_dir() else sync_file(path)
        sync_folder(new)
        if not _take_place(new, folder, replaced):
            # What is ready to be moved is moved by the next write, if this one is killed.
            name = "." if inside else folder.name
            write_file(new / READY_FILE, json.dumps([name, sorted(replaced)]).encode())
            _move(new)
        sync_folder(folder.parent)
    except OSError as error:
        # The error of a copy has two names: of the file that is read, and of the one that is written.
        names = [Path(os.fsdecode(name)) for name in (error.filename, error.filename2) if name is not None] or [new]
        if error.errno is None or not any(name.is_relative_to(new) for name in names):
            raise
        # A person knows the folder by its own name only.
        known = [str(folder / name.relative_to(new) if name.is_relative_to(new) else name) for name in names]
        first, second = known[0], known[-1] if known[-1] != known[0] else None
        raise OSError(error.errno, error.strerror, first, None, second) from error
    finally:
        shutil.rmtree(new, ignore_errors=True)


def _take_place(new: Path, folder: Path, replaced: Collection[str]) -> bool:
    """Put a folder into the place of another in one step, if that loses nothing else. Returns whether it was done."""
    if not folder.exists():
        try:
            _when_free(os.rename, new, folder)
        except OSError:
            # Another process has just made it, or the system refuses.
            if not folder.is_dir():
                raise
            return False
        return True
    if not folder.is_dir():
        raise NotADirectoryError(f"{folder} is a file. Choose another folder, or delete it.")
    going = {path.name for path in new.iterdir()} | set(replaced)
    old = list(folder.iterdir())
    if not all(path.name in going and path.is_file() and not path.is_symlink() for path in old):
        return False
    if Path.cwd().is_relative_to(folder) or os.path.ismount(folder) or new.stat().st_uid != folder.stat().st_uid:
        return False
    shutil.copymode(folder, new)
    if not _exchange(new, folder):
        return False
    for path in old:
        (new / path.name).unlink(missing_ok=True)
    for path in new.iterdir():
        # Another process has just written it.
        os.replace(path, folder / path.name)
    return True


def _move(new: Path) -> None:
    """Move the files of a folder, in which all is written, one by one to where they belong."""
    name, replaced = json.loads((new / READY_FILE).read_bytes())
    folder = new.parent / Path(name).name
    folder.mkdir(exist_ok=True)
    made = {path.name for path in new.iterdir()} - {READY_FILE}
    for gone in set(replaced) - made:
        if not (folder / gone).is_dir():
            with contextlib.suppress(FileNotFoundError):
                _when_free(os.unlink, folder / gone)
    for name in sorted(made, key=_turn):
        _when_free(os.replace, new / name, folder / name)
    sync_folder(folder)


def _turn(name: str) -> tuple[bool, bool, str]:
    """
    The place of a file in the order of moving. The configuration is the last, since without it no program takes a
    folder for a model or an adapter. Weights are the first, since they alone stay open in programs that have loaded
    them, and where Windows refuses to replace them, the other files are not yet replaced either.
    """
    return name in ("config.json", "adapter_config.json"), not name.endswith(".safetensors"), name


def _when_free(change: Callable[..., None], *paths: Path) -> None:
    """
    Move or delete a file. Windows refuses this while a program has the file open, as virus scanners do for a moment
    with every new file. So there it is tried again for a few seconds.
    """
    for pause in PAUSES if WINDOWS else ():
        try:
            return change(*paths)
        except PermissionError:
            time.sleep(pause)
    return change(*paths)


def _exchange(one: Path, other: Path) -> bool:
    """Exchange two folders in one step. Returns whether the system can do that: Linux can, on most file systems."""
    # Windows has no library of this name, and that of macOS has no such function.
    rename = None if WINDOWS else getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if rename is None:
        return False
    here, exchange = -100, 2  # AT_FDCWD and RENAME_EXCHANGE
    return rename(here, os.fsencode(one), here, os.fsencode(other), exchange) == 0


@contextlib.contextmanager
def naming(path: Path, temporary: Path | None = None) -> Iterator[None]:
    """
    Let the errors of the system name a file: that of a full disk, which does not name any by itself, and those that
    name the file by its temporary name.
    """
    try:
        yield
    except OSError as error:
        if error.errno is not None and (error.filename is None or (temporary and error.filename == str(temporary))):
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise


def sync_file(path: Path) -> None:
    """Write the content of a file to the disk."""
    # Windows wants a file that may be changed, and elsewhere a file may be one that may only be read.
    with naming(path), open(path, "rb+" if WINDOWS else "rb") as file:
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Write the names of a folder's files to the disk. Some systems cannot do this, and need no help with it."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


# ---- temporary names ----


@functools.cache
def _machine() -> str:
    """A name for this machine since it was started, and for the processes on it that can see one another."""
    facts = [platform.node()]
    with contextlib.suppress(OSError):
        facts.append(Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii"))
        facts.append(os.readlink("/proc/self/ns/pid"))
    return hashlib.sha256(" ".join(facts).encode()).hexdigest()[:8]


def _writer() -> str:
    """A name for one write, which no other one has: of two threads, and of two machines that share a disk."""
    return f"{_machine()}-{os.getpid()}-{secrets.token_hex(8)}"


def delete_leftovers(folder: Path) -> None:
    """
    Delete what processes of this machine left under temporary names in a folder when they were killed. What was
    written as a whole, and waits to be moved, is moved.
    """
    with contextlib.suppress(OSError, ValueError):
        for path in folder.iterdir():
            found = TEMPORARY_NAME.fullmatch(path.name)
            if not found or found[1] != _machine() or _is_running(int(found[2])):
                continue
            if not path.is_dir() or path.is_symlink():
                path.unlink()
                continue
            # Somebody else could have made a folder of this name, so that his files get to a place of ours. Windows
            # has no numbers of users.
            if (path / READY_FILE).is_file() and (WINDOWS or path.stat().st_uid == os.getuid()):
                _move(path)
            shutil.rmtree(path)


def _is_running(process: int) -> bool:
    # accelerate requires this package. Python's own way to ask, os.kill, would end the process on Windows.
    import psutil

    try:
        return psutil.pid_exists(process)
    except OverflowError:
        return False


def check_digest(what: str, digest: str) -> None:
    """Raise a `ValueError` unless a text is a SHA-256 in hexadecimal."""
    if not re.fullmatch(r"[0-9a-f]{64}", digest):
        raise ValueError(f"{what} {digest!r} is not a SHA-256")
