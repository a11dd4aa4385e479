"""
Disks that are full: a command writes all, or it says in one line which file the disk had no room for, and everything
is as it was.

Each command gets 22 disks, from one without room to one with just enough. The disk is a small file system of its own.
Where nothing can be mounted, a limit on the size of a file takes its place.
"""

import gc
import json
import logging
import os
import shutil
import subprocess
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from children import run
from conftest import attach_trained, make_model, make_tokenizer, same_bits
from hub_server import HubServer, online
from huggingface_hub import constants
from training import log_of, make_trainer
from transformers import TrainerCallback
from typer.testing import CliRunner

from hf_sara import SaraAdapter
from hf_sara.cli import app
from hf_sara.trainer import last_complete_checkpoint

logger = logging.getLogger(__name__)
resource = pytest.importorskip("resource", reason="the limits of Unix")
pytestmark = pytest.mark.slow
SIZES = 22
STEPS = 3
PLENTY = 2**26
PAGE = resource.getpagesize()
TOKEN = "hf_alicealicealicealice"


class Disk:
    """A small disk in a folder, whose room can be changed."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.limit = PLENTY
        folder.mkdir()
        self.is_mounted = self._mount("-t", "tmpfs", "-o", f"size={PLENTY}", "tmpfs")

    def _mount(self, *options: str) -> bool:
        return subprocess.run(["mount", *options, str(self.folder)], capture_output=True).returncode == 0

    def close(self) -> None:
        if self.is_mounted:
            subprocess.run(["umount", "--lazy", str(self.folder)], check=True)

    def needed(self, contents: dict[str, bytes]) -> int:
        """How much room files need."""
        sizes = [len(content) for content in contents.values()]
        return sum(-(-size // PAGE) * PAGE for size in sizes) if self.is_mounted else max(sizes)

    def leave(self, room: int) -> None:
        """Let the disk have so much room beside what it holds."""
        self.limit = room
        if self.is_mounted:
            found = os.statvfs(self.folder)
            used = (found.f_blocks - found.f_bfree) * found.f_bsize
            # A size of zero would be no limit.
            assert self._mount("-o", f"remount,size={max(used + room, PAGE)}")

    def enter(self) -> None:
        """Let this process, which is a child, have no more room than that."""
        if not self.is_mounted:
            resource.setrlimit(resource.RLIMIT_FSIZE, (self.limit, self.limit))

    def outcome(self, action: Callable[[], tuple[int, str]]) -> tuple[int, str]:
        """The exit code and the errors of an action that runs in a child."""
        reader, writer = os.pipe()

        def inside() -> None:
            self.enter()
            os.write(writer, json.dumps(action()).encode()[:PAGE])

        status = run(inside)
        os.close(writer)
        with open(reader, "rb") as file:
            text = file.read()
        return tuple(json.loads(text)) if status == 0 else (status, "Traceback: the child ended with an error")


@pytest.fixture
def disk(tmp_path):
    made = Disk(tmp_path / "disk")
    yield made
    made.close()


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def command(*arguments: object) -> tuple[int, str]:
    """Run a command, and return its exit code and what it printed as an error."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    is_bug = result.exception is not None and not isinstance(result.exception, SystemExit)
    return result.exit_code, f"Traceback: {result.exception!r}" if is_bug else result.stderr


def function(action: Callable[[], object]) -> tuple[int, str]:
    """The same of a function of Python, whose error is the line that a command would print."""
    try:
        action()
    except OSError as error:
        return 1, f"hf-sara: {error}\n"
    except Exception as error:
        return 1, f"Traceback: {error!r}"
    return 0, ""


def fill(disk: Disk, what: str, old: Path, action: Callable[[Path, int], tuple[int, str]], tried) -> None:
    """
    Let an action write to a folder on disks of all sizes.

    Args:
        disk (`Disk`): The disk.
        what (`str`): The command, as the table names it.
        old (`Path`): A folder with what the target holds before.
        action (`Callable`): Takes the target and the number of the try, and returns the exit code and the errors.
    """
    target = disk.folder / "out"

    def attempt(room: int, number: int) -> tuple[int, str]:
        disk.leave(PLENTY)
        shutil.rmtree(target, ignore_errors=True)
        shutil.copytree(old, target)
        disk.leave(room)
        return disk.outcome(lambda: action(target, number))

    before = files_of(old)
    assert attempt(PLENTY, 0) == (0, "")
    after = files_of(target)
    assert before != after
    new = {name: content for name, content in after.items() if content != before.get(name)}
    found, failures, complaints = Counter(), 0, []
    for number, room in enumerate(np.linspace(0, disk.needed(new), SIZES).astype(int), start=1):
        code, errors = attempt(int(room), number)
        failures += code != 0
        if code == 0:
            bad = {"wrong": files_of(target) != after or errors != ""}
        else:
            is_clear = code == 1 and errors.startswith("hf-sara: ") and errors.count("\n") == 1
            names_target = str(target) in errors and ".tmp" not in errors
            bad = {
                "wrong": not (is_clear and names_target),
                "lost": files_of(target) != before,
                "traces": "Traceback" in errors,
            }
        bad["wrong"] |= os.listdir(disk.folder) != [target.name] or any(".tmp" in name for name in files_of(target))
        found.update({name: int(is_bad) for name, is_bad in bad.items()})
        complaints += [f"{room}: {code} {errors}"] if any(bad.values()) else []
    logger.warning("\n".join(complaints))
    # The last disk has just enough room, and the others have not.
    assert failures >= SIZES - 2
    tried(f"a full disk, {SIZES} sizes of {what}", SIZES, **found)


# ---- what is written ----


def wide_model():
    """A model whose files have enough pages for disks of many sizes."""
    return make_model(hidden_size=96, vocab_size=len(make_tokenizer()), eos_token_id=0)


@pytest.fixture(scope="module")
def there(tmp_path_factory):
    """A base, two adapters for it, and exports of both."""
    folder = tmp_path_factory.mktemp("there")
    wide_model().save_pretrained(folder / "base")
    make_tokenizer().save_pretrained(folder / "base")
    attach_trained(wide_model()).save_pretrained(folder / "old")
    attach_trained(wide_model(), factors="save", threshold=0.6).save_pretrained(folder / "new")
    (folder / "new" / "README.md").write_text("A card.\n")
    for name in ("old", "new"):
        (folder / name / "notes.txt").write_text("mine")
    assert command("export", folder / "old", folder / "exported", "--base", folder / "base")[0] == 0
    (folder / "notes").mkdir()
    (folder / "notes" / "notes.txt").write_text("mine")
    return folder


def test_pull_to_a_full_disk(there, disk, tried):
    fill(disk, "pull", there / "old", lambda out, _: command("pull", there / "new", "--to", out), tried)


def test_export_to_a_full_disk(there, disk, tried):
    options = ("--base", there / "base", "--overwrite")
    fill(disk, "export", there / "exported", lambda out, _: command("export", there / "new", out, *options), tried)


def test_merge_to_a_full_disk(there, disk, tried):
    options = ("--base", there / "base")
    fill(disk, "merge", there / "notes", lambda out, _: command("merge", there / "new", out, *options), tried)


def test_a_save_to_a_full_disk(there, disk, tried):
    model = wide_model()
    adapter = SaraAdapter.load(model, there / "new")
    fill(disk, "a save", there / "old", lambda out, _: function(lambda: adapter.save_pretrained(out)), tried)


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A Hub that this process's client takes for the real one."""
    with online(), HubServer(tokens={TOKEN: "alice"}) as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.endpoint)
        template = server.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub cache"))
        monkeypatch.setattr(time, "sleep", lambda seconds: None)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield server


def test_push_from_a_full_disk(there, disk, hub, tried, tmp_path, monkeypatch):
    # Each try has a repository of its own, whose name would be in the card.
    monkeypatch.setattr("hf_sara.hub.loading_from", lambda card, repo_id: card)
    old = tmp_path / "old"
    shutil.copytree(there / "new", old)
    words = "".join(f"This is line {number}, which a person wrote on the Hub.\n" for number in range(2500)).encode()
    for number in range(SIZES + 1):
        hub.add_repo(f"alice/adapter{number}", files={"README.md": words})
    (old / "README.md").unlink()
    SaraAdapter.load(wide_model(), old).write_card(old)
    fill(disk, "push", old, lambda out, number: command("push", out, f"alice/adapter{number}"), tried)


# ---- a training ----


class Notes(TrainerCallback):
    """Remembers the last checkpoint that was complete."""

    def __init__(self):
        self.step = 0

    def on_save(self, args, state, control, **kwargs):
        self.step = state.global_step


def train(folder: Path) -> tuple[int, str]:
    """
    Train to the end, from the last complete checkpoint on. Returns the last step that was saved, and the error, if
    there was one.
    """
    notes = Notes()
    trainer = make_trainer(folder, max_steps=STEPS, save_steps=1, save_total_limit=2)
    trainer.add_callback(notes)
    try:
        trainer.train(resume_from_checkpoint=last_complete_checkpoint(folder) is not None)
        trainer.save_model()
    except OSError as error:
        return notes.step, str(error)
    torch.save((trainer.sara_adapter.state_dict(), log_of(trainer)), folder / "result.pt")
    return notes.step, ""


@pytest.fixture
def _frozen():
    """A training collects garbage. Its child need not look at what the tests have made so far."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.mark.usefixtures("_frozen")
def test_a_training_on_a_full_disk_goes_on_when_there_is_room(disk, tried):
    folder = disk.folder / "run"
    assert disk.outcome(lambda: train(folder)) == (STEPS, "")
    expected = torch.load(folder / "result.pt")
    # The older checkpoints have been deleted, when the next one was complete.
    needed = disk.needed(files_of(folder)) * 3 // 2
    lost = wrong = failures = 0
    for room in np.linspace(0, needed, SIZES).astype(int):
        disk.leave(PLENTY)
        shutil.rmtree(folder)
        folder.mkdir()
        disk.leave(int(room))
        step, error = disk.outcome(lambda: train(folder))
        failures += error != ""
        wrong += error != "" and not (str(folder) in error and error.count("\n") == 0 and ".tmp" not in error)
        last = last_complete_checkpoint(folder)
        lost += int(last.rsplit("-")[-1] if last else 0) < step
        disk.leave(PLENTY)
        disk.limit = PLENTY
        lost += disk.outcome(lambda: train(folder))[1] != ""
        state, log = torch.load(folder / "result.pt")
        wrong += not same_bits(state, expected[0]) or log != expected[1]
    assert failures > SIZES // 2
    tried(f"a full disk, {SIZES} sizes of a training with checkpoints", SIZES, lost=lost, wrong=wrong)
