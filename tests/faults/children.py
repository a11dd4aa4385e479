"""Children of this process that are killed, at a moment or at a file operation, as a power cut would."""

import contextlib
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

# The events of Python's audit hook that change files.
CHANGES = ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.link", "os.symlink", "os.truncate")


def run(action: Callable[[], object], kill_after: float | None = None) -> int:
    """
    Run a function in a child, and return the child's exit status: 0 after the function, 1 after an error, and -9 after
    it was killed.

    Args:
        action (`Callable`): The function.
        kill_after (`float`, *optional*): The seconds after which the child is killed.
    """
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            action()
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    if kill_after is not None:
        end = time.monotonic() + kill_after
        while time.monotonic() < end:
            done, status = os.waitpid(child, os.WNOHANG)
            if done:
                return os.waitstatus_to_exitcode(status)
            time.sleep(0.001)
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def killed_at(action: Callable[[], object], folder: Path, moment: int) -> int:
    """
    Run a function in a child that is killed just before its `moment`-th change of a file below a folder. What it has
    written to files without `fsync` is cut to half, as after a power cut. Returns the exit status, see `run`.
    """

    def watched() -> None:
        place, count = os.path.realpath(folder), 0
        # The time of the last change that is on the disk, by the number of the file.
        synced: dict[int, int] = {}
        fsync, start = os.fsync, time.time_ns()
        time.sleep(0.01)

        def noted(file) -> None:
            fsync(file)
            found = os.fstat(file if isinstance(file, int) else file.fileno())
            synced[found.st_ino] = found.st_mtime_ns

        def die() -> None:
            for parent, _, names in os.walk(place):
                for path in (os.path.join(parent, name) for name in names):
                    found = os.lstat(path)
                    if found.st_mtime_ns > start and synced.get(found.st_ino) != found.st_mtime_ns:
                        os.truncate(path, found.st_size // 2)
            os.kill(os.getpid(), signal.SIGKILL)

        def hook(event: str, arguments: tuple) -> None:
            nonlocal count
            if event not in CHANGES or (event == "open" and not _writes(*arguments[1:])):
                return
            paths = [os.fsdecode(one) for one in arguments if isinstance(one, (str, bytes, os.PathLike))]
            if any(os.path.realpath(path).startswith(place) for path in paths):
                count += 1
                if count == moment:
                    die()

        os.fsync = noted
        sys.addaudithook(hook)
        action()

    return run(watched)


def _writes(mode: str | None, flags: int | None) -> bool:
    """Whether a file is opened for writing."""
    return bool(set(mode or "") & set("wax+")) or bool((flags or 0) & (os.O_WRONLY | os.O_RDWR))
