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


def content(folder: Path) -> dict[str, str]:
    return {str(p.relative_to(folder)): p.read_text() for p in sorted(folder.rglob("*")) if p.is_file()}


def killed(folder: Path, what: str) -> None:
    child = subprocess.run([sys.executable, "-c", KILLED, str(folder), what], check=False)
    assert child.returncode == -9


def test_the_next_write_deletes_what_a_killed_one_left(tmp_path):
    (tmp_path / "a").write_text("old")
    killed(tmp_path, "file")
    assert len(list(tmp_path.iterdir())) == 2
    files.write_file(tmp_path / "other", b"1")
    assert content(tmp_path) == {"a": "old", "other": "1"}


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


def test_a_name_as_long_as_a_name_can_be(tmp_path):
    name = "x" * 250
    files.write_file(tmp_path / name, b"1")
    with files.new_folder(tmp_path / ("y" * 250)) as new:
        (new / name).write_text("2")
    assert content(tmp_path) == {name: "1", f"{'y' * 250}/{name}": "2"}


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


def test_a_file_that_cannot_be_replaced_is_named_by_its_own_name(tmp_path):
    (tmp_path / "a" / "full").mkdir(parents=True)
    with pytest.raises(OSError, match=rf"'{tmp_path}/a'$"):
        files.write_file(tmp_path / "a", b"1")
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
