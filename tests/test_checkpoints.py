"""Only a checkpoint of which every file is there and unchanged is resumed from."""

import json
import logging
import shutil
import struct
import zipfile
from pathlib import Path

import pytest
from conftest import same_bits
from training import make_trainer

from hf_sara import checkpoints
from hf_sara.checkpoints import LIST_FILE, last_complete_checkpoint, list_of, why_incomplete

FILES = (
    *("optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json", "running_loss.json"),
    *("sara_adapter.safetensors", "sara_config.json", "training_args.json"),
)
# What resuming needs, also from a checkpoint of an earlier version, which has no list.
NEEDED = FILES[:4]
CHECKED = tuple(name for name in FILES if name not in ("training_args.json", "sara_config.json"))
IDLE = ("training_args.json", "sara_config.json")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder of a training with checkpoints at the steps 2, 4, 6 and 7, and the trained tensors."""
    folder = tmp_path_factory.mktemp("run")
    trainer = make_trainer(folder)
    trainer.train()
    return folder, trainer.sara_adapter.state_dict()


@pytest.fixture
def folder(run, tmp_path):
    return Path(shutil.copytree(run[0], tmp_path / "run"))


def missing(path: Path) -> None:
    path.unlink()


def empty(path: Path) -> None:
    path.write_bytes(b"")


def cut_off(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-9])


def flipped(path: Path) -> None:
    content, place = bytearray(path.read_bytes()), -1
    if zipfile.is_zipfile(path):
        # Between the files of an archive are bytes that mean nothing.
        with zipfile.ZipFile(path) as archive:
            first = archive.infolist()[0]
        name, extra = struct.unpack("<HH", content[first.header_offset + 26 : first.header_offset + 30])
        place = first.header_offset + 30 + name + extra
    content[place] ^= 1
    path.write_bytes(content)


def a_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


# The damages that the quick tests try, and all others.
DAMAGES = [missing, flipped, *(pytest.param(damage, marks=pytest.mark.slow) for damage in (empty, cut_off, a_folder))]


def test_a_checkpoint_lists_all_of_its_files(run):
    for step in (2, 4, 6, 7):
        checkpoint = run[0] / f"checkpoint-{step}"
        listed = json.loads((checkpoint / LIST_FILE).read_text())
        assert sorted(listed) == sorted(FILES)
        contents = {path.name: path.read_bytes() for path in checkpoint.iterdir() if path.name != LIST_FILE}
        assert list_of(contents) == (checkpoint / LIST_FILE).read_bytes()
        assert why_incomplete(checkpoint) is None
    assert last_complete_checkpoint(run[0]) == str(run[0] / "checkpoint-7")


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
@pytest.mark.parametrize("name", CHECKED)
def test_a_damaged_file_is_named_and_its_checkpoint_passed_over(name, damage, folder, caplog):
    damage(folder / "checkpoint-7" / name)
    assert last_complete_checkpoint(folder) == str(folder / "checkpoint-6")
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert f"checkpoint-7, which is not complete: {name} is " in record.message


@pytest.mark.parametrize("name", IDLE)
def test_a_file_that_resuming_does_not_read_may_be_anything(name, folder):
    for damage in (cut_off, missing):
        damage(folder / "checkpoint-7" / name)
        assert last_complete_checkpoint(folder) == str(folder / "checkpoint-7")


def test_a_checkpoint_of_another_trainer_is_taken_as_it_is(folder):
    checkpoint = folder / "checkpoint-7"
    (checkpoint / LIST_FILE).unlink()
    # Trainer writes numbers like these, and callbacks and tokenizers files of their own.
    state = json.loads((checkpoint / "trainer_state.json").read_text())
    state["log_history"].append({"eval_loss": float("nan"), "step": 7})
    (checkpoint / "trainer_state.json").write_text(json.dumps(state))
    (checkpoint / "tokenizer_config.json").write_text('{"model_max_length": 1000000000000000019884624838656}')
    (checkpoint / "notes.json").write_text("[1]")
    (checkpoint / "custom.pt").write_bytes(b"mine")
    assert why_incomplete(checkpoint) is None
    resumed = make_trainer(folder)
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert resumed.state.global_step == 7


@pytest.mark.parametrize(
    "damage",
    [cut_off, *(pytest.param(damage, marks=pytest.mark.slow) for damage in (missing, empty, flipped))],
    ids=lambda damage: damage.__name__,
)
@pytest.mark.parametrize("name", CHECKED)
def test_a_checkpoint_of_an_earlier_version_is_checked_by_its_own_files(name, damage, folder):
    checkpoint = folder / "checkpoint-7"
    (checkpoint / LIST_FILE).unlink()
    assert why_incomplete(checkpoint) is None
    damage(checkpoint / name)
    reason = why_incomplete(checkpoint)
    if damage is missing and name not in (*NEEDED, "sara_adapter.safetensors"):
        # Trainer alone does not write it.
        assert reason is None
    elif damage is flipped and name.endswith(".json"):
        # Nothing in the file tells that a digit is another one.
        assert reason is None or name in reason
    else:
        assert reason is not None
        assert (name if damage is not missing else name[:9]) in reason


def test_a_file_that_somebody_edited_is_taken_with_a_warning(folder, caplog):
    path = folder / "checkpoint-7" / "trainer_state.json"
    path.write_text(path.read_text().replace('"save_steps": 2', '"save_steps": 3'))
    assert last_complete_checkpoint(folder) == str(folder / "checkpoint-7")
    assert "trainer_state.json was changed after the checkpoint was written" in caplog.text


@pytest.mark.parametrize("name", ["optimizer.pt", "trainer_state.json"])
def test_a_run_goes_on_from_the_last_whole_checkpoint_with_the_same_bits(name, run, folder):
    missing(folder / "checkpoint-7" / name)
    cut_off(folder / "checkpoint-6" / name)
    resumed = make_trainer(folder)
    resumed.train(resume_from_checkpoint=True)
    assert same_bits(resumed.sara_adapter.state_dict(), run[1])
    # The damaged ones were written anew.
    assert last_complete_checkpoint(folder) == str(folder / "checkpoint-7")


def test_a_damaged_checkpoint_that_is_asked_for_is_refused(folder):
    missing(folder / "checkpoint-4" / "optimizer.pt")
    trainer = make_trainer(folder)
    with pytest.raises(ValueError, match=r"checkpoint-4', because it is not complete: optimizer.pt is missing"):
        trainer.train(resume_from_checkpoint=str(folder / "checkpoint-4"))
    with pytest.raises(FileNotFoundError, match="There is no checkpoint"):
        trainer.train(resume_from_checkpoint=str(folder / "checkpoint-5"))


def test_a_checkpoint_that_was_written_without_the_optimizer_starts_it_anew_with_a_warning(tmp_path, caplog):
    make_trainer(tmp_path, save_only_model=True, max_steps=4).train()
    make_trainer(tmp_path, save_only_model=True).train(resume_from_checkpoint=True)
    assert "checkpoint-4 was written without the state of the optimizer" in caplog.text


def test_a_deletion_that_was_cut_off_is_seen(folder):
    # The order in which a folder's files are deleted is open.
    for gone in range(1, len(FILES) + 1):
        checkpoint = Path(shutil.copytree(folder / "checkpoint-7", folder / "checkpoint-9", dirs_exist_ok=True))
        for name in (LIST_FILE, *FILES)[:gone]:
            (checkpoint / name).unlink(missing_ok=True)
        whole = not {*NEEDED, "sara_adapter.safetensors"} & set((LIST_FILE, *FILES)[:gone])
        assert (why_incomplete(checkpoint) is None) == whole


def test_older_checkpoints_go_only_when_the_new_one_is_complete(tmp_path, monkeypatch):
    class Killed(BaseException):
        pass

    complete, calls = checkpoints.complete, []

    def die(folder):
        calls.append(folder)
        if len(calls) == 3:
            raise Killed
        complete(folder)

    monkeypatch.setattr("hf_sara.trainer.resuming.complete", die)
    with pytest.raises(Killed):
        make_trainer(tmp_path, save_total_limit=1).train()
    assert {path.name for path in tmp_path.glob("checkpoint-*")} == {"checkpoint-4", "checkpoint-6"}
    assert why_incomplete(tmp_path / "checkpoint-4") is None


def test_everything_is_on_the_disk_before_the_list_that_says_so(tmp_path, monkeypatch):
    events = []
    for name in ("sync_file", "write_file", "sync_folder"):
        real = getattr(checkpoints, name)

        def log(path, *rest, real=real, name=name):
            events.append((name, Path(path).name))
            real(path, *rest)

        monkeypatch.setattr(checkpoints, name, log)
    for name in ("a", "b"):
        (tmp_path / "checkpoint-1" / "deep").mkdir(parents=True, exist_ok=True)
        (tmp_path / "checkpoint-1" / "deep" / name).write_text(name)
    checkpoints.complete(tmp_path / "checkpoint-1")
    assert events == [
        ("sync_file", "a"),
        ("sync_file", "b"),
        ("sync_folder", "deep"),
        ("write_file", LIST_FILE),
        ("sync_folder", tmp_path.name),
    ]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs the device that is always full")
@pytest.mark.parametrize("name", ["optimizer.pt", "rng_state.pth", "trainer_state.json"])
def test_a_full_disk_is_an_error_that_names_the_checkpoint(name, tmp_path):
    folder = tmp_path / "checkpoint-2"
    folder.mkdir()
    (folder / name).symlink_to("/dev/full")
    with pytest.raises(OSError, match=r"disk may be full|No space left on device") as caught:
        make_trainer(tmp_path).train()
    assert str(folder) in str(caught.value)
    assert caught.value.__cause__ is not None


def test_another_error_of_a_checkpoint_stays_what_it_is(tmp_path, monkeypatch):
    def fail(*_):
        raise RuntimeError("out of memory")

    monkeypatch.setattr("torch.save", fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        make_trainer(tmp_path).train()


def test_a_folder_that_was_moved_keeps_its_best_checkpoint(tmp_path):
    best = {"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 2, "max_steps": 6}
    make_trainer(tmp_path / "old", **best).train()
    shutil.move(tmp_path / "old", tmp_path / "new")
    trainer = make_trainer(tmp_path / "new", **best)
    trainer.train(resume_from_checkpoint=True)
    assert Path(trainer.state.best_model_checkpoint).parent == tmp_path / "new"
