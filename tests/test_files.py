"""Files and folders are written whole or not at all, and what a kill leaves behind goes."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from hf_sara import files

# A process that is killed within a write, with half of a file and half of a folder under temporary names.
KILLED = """
import os, signal, sys
from pathlib import Path
from hf_sara import files

where = Path(sys.argv[1])
def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)
if sys.argv[2] == "file":
    files.os.fsync = die
    files.write_file(where / "a", b"new")
else:
    with files.new_folder(where / "b") as new:
        (new / "half").write_bytes(b"half")
        die()
"""


ON_UNIX = pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such signals, names or permissions")


def content(folder: Path) -> dict[str, str]:
    return {p.relative_to(folder).as_posix(): p.read_text() for p in sorted(folder.rglob("*")) if p.is_file()}


def killed(folder: Path, what: str) -> None:
    child = subprocess.run([sys.executable, "-c", KILLED, str(folder), what], check=False)
    assert child.returncode == -9


@ON_UNIX
def test_the_next_write_deletes_what_a_killed_one_left(tmp_path):
    (tmp_path / "a").write_text("old")
    killed(tmp_path, "file")
    assert len(list(tmp_path.iterdir())) == 2
    files.write_file(tmp_path / "other", b"1")
    assert content(tmp_path) == {"a": "old", "other": "1"}


@ON_UNIX
def test_the_next_folder_deletes_what_a_killed_one_left(tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "old").write_text("old")
    killed(tmp_path, "folder")
    assert len(list(tmp_path.iterdir())) == 2
    with files.new_folder(tmp_path / "b") as new:
        (new / "half").write_text("whole")
    assert content(tmp_path) == {"b/half": "whole", "b/old": "old"}


def test_what_another_process_is_writing_stays(tmp_path):
    name = f".hf_sara-{files._machine()}-{os.getppid()}-{'0' * 16}.tmp"
    elsewhere = f".hf_sara-{'f' * 8}-1-{'0' * 16}.tmp"
    for path in (name, elsewhere, ".a.1-2.tmp", ".a.tmp"):
        (tmp_path / path).write_text("theirs")
    files.write_file(tmp_path / "a", b"mine")
    assert set(content(tmp_path)) == {name, elsewhere, ".a.1-2.tmp", ".a.tmp", "a"}


@pytest.fixture(params=["in one step", "file by file"])
def way(request, monkeypatch):
    """The two ways of a folder into its place: the second one is for systems that cannot exchange two folders."""
    if request.param == "file by file":
        monkeypatch.setattr(files, "_exchange", lambda *_: False)
    return request.param


def test_a_folder_takes_the_place_of_another_and_keeps_its_other_files(way, tmp_path):
    old = tmp_path / "a"
    (old / "deep").mkdir(parents=True)
    for name in ("one", "two", "three", "deep/four"):
        (old / name).write_text(f"old {name}")
    (old / "link").symlink_to("two")
    with files.new_folder(old, replaced=["three", "five"]) as new:
        (new / "one").write_text("new one")
        assert (old / "one").read_text() == "old one"
        # Another process writes there meanwhile.
        (old / "six").write_text("theirs")
    assert content(old) == {
        "deep/four": "old deep/four",
        "link": "old two",
        "one": "new one",
        "six": "theirs",
        "two": "old two",
    }
    assert (old / "link").is_symlink()
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_after_an_error_a_folder_is_what_it_was(way, tmp_path):
    def fail(name: str) -> None:
        with files.new_folder(tmp_path / name) as new:
            (new / "one").write_text("new")
            raise ZeroDivisionError

    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "one").write_text("old")
    for name in "ab":
        with pytest.raises(ZeroDivisionError):
            fail(name)
        assert content(tmp_path) == {"a/one": "old"}
        assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_a_folder_is_exchanged_in_one_step(tmp_path):
    for name in "ab":
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text(name)
    if not files._exchange(tmp_path / "a", tmp_path / "b"):
        pytest.skip("This system cannot exchange two folders.")
    assert content(tmp_path) == {"a/file": "b", "b/file": "a"}


def test_a_folder_that_is_a_link_or_in_a_folder_that_is_read_only(tmp_path, monkeypatch):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    with files.new_folder(tmp_path / "link") as new:
        (new / "one").write_text("1")
    assert (tmp_path / "link").is_symlink()
    # Root may write everywhere, so the answer of the system is replaced.
    monkeypatch.setattr(files.os, "access", lambda path, mode: False)
    with files.new_folder(tmp_path / "real") as new:
        assert new.parent == tmp_path / "real"
        (new / "two").write_text("2")
    assert content(tmp_path / "real") == {"one": "1", "two": "2"}


def test_a_file_in_the_place_of_the_folder_is_an_error_and_stays(tmp_path):
    (tmp_path / "a").write_text("mine")
    with pytest.raises(NotADirectoryError, match="is a file"), files.new_folder(tmp_path / "a"):
        pass
    assert content(tmp_path) == {"a": "mine"}


@ON_UNIX
def test_the_error_of_a_full_disk_names_the_file(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    with (
        pytest.raises(OSError, match=rf"No space left on device: '{tmp_path}/b/one'"),
        files.new_folder(tmp_path / "b") as new,
        files.naming(new / "one"),
    ):
        full()
    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(OSError, match=rf"No space left on device: '{tmp_path}/a'"):
        files.write_file(tmp_path / "a", b"1")
    assert content(tmp_path) == {}


@ON_UNIX
@pytest.mark.parametrize(
    ("source", "target", "expected"),
    [
        ("/x", "{new}/one", "'/x' -> '{folder}/one'"),
        ("{new}/one", "{folder}/one", "'{folder}/one'"),
        ("/x", "/y", "'/x' -> '/y'"),
    ],
)
def test_the_error_of_a_copy_names_the_new_file_as_a_person_knows_it(source, target, expected, tmp_path):
    folder = tmp_path / "b"

    def copy(new):
        names = [name.format(new=new, folder=folder) for name in (source, target)]
        raise OSError(28, "No space left on device", names[0], None, names[1])

    with pytest.raises(OSError, match="No space left on device") as caught, files.new_folder(folder) as new:
        copy(new)
    assert str(caught.value).endswith(f"device: {expected.format(folder=folder)}")
    assert content(tmp_path) == {}


def test_new_folders_are_written_to_the_disk(tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr(files, "sync_folder", synced.append)
    files.make_folder(tmp_path / "a" / "b")
    assert set(synced) == {tmp_path, tmp_path / "a"}
    shutil.rmtree(tmp_path / "a")


def test_the_folder_in_which_a_process_works_stays_that_folder(tmp_path, monkeypatch):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "one").write_text("old")
    monkeypatch.chdir(tmp_path / "a")
    with files.new_folder(Path(".")) as new:
        (new / "one").write_text("new")
    assert Path("one").read_text() == "new"
    assert Path.cwd() == tmp_path / "a"


@ON_UNIX
def test_a_name_as_long_as_a_name_can_be(tmp_path):
    name = "x" * 250
    files.write_file(tmp_path / name, b"1")
    with files.new_folder(tmp_path / ("y" * 250)) as new:
        (new / name).write_text("2")
    assert content(tmp_path) == {name: "1", f"{'y' * 250}/{name}": "2"}


@ON_UNIX
def test_a_file_that_may_only_be_read_is_written_to_the_disk(tmp_path):
    with files.new_folder(tmp_path / "a") as new:
        (new / "one").write_text("1")
        (new / "one").chmod(0o444)
    assert content(tmp_path) == {"a/one": "1"}


def test_the_next_write_finishes_a_move_that_was_killed(tmp_path, monkeypatch):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "mine").write_text("mine")
    replace = files.os.replace

    def kill(source, target):
        if str(target).endswith("config.json"):
            raise SystemExit
        replace(source, target)

    def write() -> None:
        with files.new_folder(tmp_path / "a") as new:
            for name in ("config.json", "weights"):
                (new / name).write_text("new")

    with monkeypatch.context() as patch:
        patch.setattr(files.os, "replace", kill)
        patch.setattr(files.shutil, "rmtree", lambda *_, **__: None)
        with pytest.raises(SystemExit):
            write()
    assert set(content(tmp_path / "a")) == {"mine", "weights"}
    monkeypatch.setattr(files, "_is_running", lambda process: False)
    files.write_file(tmp_path / "other", b"1")
    assert content(tmp_path) == {"a/config.json": "new", "a/mine": "mine", "a/weights": "new", "other": "1"}


def test_what_waits_to_be_moved_gets_no_further_than_its_folder(tmp_path):
    left = tmp_path / "home" / f".hf_sara-{files._machine()}-{2**22 + 1}-{'0' * 16}.tmp"
    left.mkdir(parents=True)
    (left / "evil").write_text("evil")
    (left / files.READY_FILE).write_text('["../../outside", []]')
    files.write_file(tmp_path / "home" / "a", b"1")
    assert content(tmp_path) == {"home/a": "1", "home/outside/evil": "evil"}


@ON_UNIX
def test_a_file_that_cannot_be_replaced_is_named_by_its_own_name(tmp_path):
    (tmp_path / "a" / "full").mkdir(parents=True)
    with pytest.raises(OSError, match=rf"'{tmp_path}/a'$"):
        files.write_file(tmp_path / "a", b"1")
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


# ---- Windows and macOS ----


@pytest.fixture
def windows(monkeypatch):
    """What the module does on Windows. The pauses are noted and not waited for."""
    pauses = []
    monkeypatch.setattr(files, "WINDOWS", True)
    monkeypatch.setattr(files.time, "sleep", pauses.append)
    return pauses


def refusing(function, times: int):
    """A function of the system that Windows refuses a few times, because another program has the file open."""
    left = [times]

    def call(*paths):
        if left[0]:
            left[0] -= 1
            raise PermissionError(13, "it is used by another process", str(paths[0]))
        function(*paths)

    return call


def test_a_file_that_is_open_for_a_moment_is_replaced_after_it(tmp_path, windows, monkeypatch):
    (tmp_path / "a").write_text("old")
    monkeypatch.setattr(files.os, "replace", refusing(os.replace, 3))
    files.write_file(tmp_path / "a", b"new")
    assert content(tmp_path) == {"a": "new"}
    assert windows == [0.05, 0.1, 0.2]


def test_a_file_that_stays_open_stays_and_so_does_all_else(tmp_path, windows, monkeypatch):
    for name in ("model.safetensors", "config.json", "more.json", "mine"):
        (tmp_path / "a").mkdir(exist_ok=True)
        (tmp_path / "a" / name).write_text("old")
    before = content(tmp_path)
    replace = os.replace

    def in_use(source, target):
        if str(target).endswith(".safetensors"):
            raise PermissionError(13, "it is used by another process", str(source))
        replace(source, target)

    monkeypatch.setattr(files.os, "replace", in_use)

    def write() -> None:
        with files.new_folder(tmp_path / "a") as new:
            for name in ("model.safetensors", "config.json", "more.json"):
                (new / name).write_text("new")

    with pytest.raises(PermissionError, match="used by another") as caught:
        write()
    assert caught.value.filename == str(tmp_path / "a" / "model.safetensors")
    assert content(tmp_path) == before
    assert sum(windows) > 3


def test_elsewhere_a_refusal_is_final(tmp_path, monkeypatch):
    monkeypatch.setattr(files.os, "replace", refusing(os.replace, 1))
    with pytest.raises(PermissionError):
        files.write_file(tmp_path / "a", b"new")
    assert content(tmp_path) == {}


def test_a_folder_that_cannot_be_opened_is_written_nevertheless(tmp_path, windows, monkeypatch):
    """Windows cannot open a folder, and so not write its names to the disk."""
    opened = os.open

    def refuse(path, *arguments, **more):
        # Deleting a folder opens it too, which Windows does in another way.
        if os.path.isdir(path) and "dir_fd" not in more:
            raise PermissionError(13, "Permission denied", str(path))
        return opened(path, *arguments, **more)

    monkeypatch.setattr(files.os, "open", refuse)
    monkeypatch.setattr(files.ctypes, "CDLL", None)
    for text in ("1", "2"):
        with files.new_folder(tmp_path / "a") as new:
            (new / "one").write_text(text)
    files.write_file(tmp_path / "b", b"3")
    assert content(tmp_path) == {"a/one": "2", "b": "3"}


def test_a_system_without_the_exchange_of_folders_moves_the_files(tmp_path, monkeypatch):
    # The library of macOS has no function of this name.
    monkeypatch.setattr(files.ctypes, "CDLL", lambda *_, **__: object())
    for text in ("1", "2"):
        with files.new_folder(tmp_path / "a") as new:
            (new / "one").write_text(text)
    assert content(tmp_path) == {"a/one": "2"}


def test_a_process_that_has_ended_is_known_to_have_ended():
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    assert files._is_running(child.pid)
    child.communicate(b"\n")
    assert not files._is_running(child.pid)
    assert files._is_running(os.getpid())
    assert not files._is_running(10**30)
