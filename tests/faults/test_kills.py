"""Trainings and saves that are killed: what was whole before stays whole, and a training ends with the same bits."""

import contextlib
import gc
import os
import random
import shutil
import signal
from pathlib import Path

import pytest
import torch
from children import killed_at, run
from conftest import attach_trained, logits, make_model, same_bits
from training import log_of, make_trainer

from hf_sara import SaraAdapter, export_lora, merge, storage
from hf_sara.trainer import last_complete_checkpoint

pytestmark = pytest.mark.slow
KILLS = 60


def train(folder: Path, method: str) -> None:
    """Train to the end, from the last complete checkpoint on, and note the result beside it."""
    trainer = make_trainer(folder / "run", method, max_steps=9, save_total_limit=2)
    trainer.train(resume_from_checkpoint=last_complete_checkpoint(folder / "run") is not None)
    trainer.save_model()
    torch.save((trainer.sara_adapter.state_dict(), log_of(trainer)), folder / "result.pt")


def uninterrupted(folder: Path, method: str):
    assert run(lambda: train(folder, method)) == 0
    return torch.load(folder / "result.pt")


def differences(folder: Path, expected) -> int:
    state, log = torch.load(folder / "result.pt")
    return int(not same_bits(state, expected[0])) + int(log != expected[1])


@pytest.mark.parametrize("method", ["sara", pytest.param("mo_sara", marks=pytest.mark.long)])
def test_a_training_that_is_killed_again_and_again_ends_with_the_same_bits(method, tmp_path, tried):
    expected = uninterrupted(tmp_path / "whole", method)
    chance, kills, wrong, lost = random.Random(method), 0, 0, 0
    attempt = 0
    while kills < KILLS // 2:
        folder = tmp_path / f"run {attempt}"
        attempt += 1
        for _ in range(6):
            status = run(lambda folder=folder: train(folder, method), kill_after=chance.uniform(0.05, 1.5))
            kills += status == -9
            if status == 0:
                break
            lost += status != -9
        else:
            lost += run(lambda folder=folder: train(folder, method)) != 0
        wrong += differences(folder, expected)
        shutil.rmtree(folder)
    tried("a training killed at a random moment", kills, lost=lost, wrong=wrong)


@pytest.mark.long
@pytest.mark.parametrize("method", ["sara", "mo_sara"])
def test_a_training_that_is_killed_at_a_change_of_a_file_ends_with_the_same_bits(method, tmp_path, tried):
    expected = uninterrupted(tmp_path / "whole", method)
    chance, kills, wrong, lost = random.Random(method), 0, 0, 0
    for moment in [*range(1, 40, 6), *chance.sample(range(40, 120), 7)]:
        folder = tmp_path / str(moment)
        for again in (moment, chance.randrange(1, 30)):
            kills += killed_at(lambda folder=folder: train(folder, method), folder, again) == -9
        lost += run(lambda folder=folder: train(folder, method)) != 0
        wrong += differences(folder, expected)
        shutil.rmtree(folder)
    tried("a training killed at a change of a file, unwritten data cut to half", kills, lost=lost, wrong=wrong)


# ---- saves ----


@pytest.fixture(scope="module")
def pair():
    """Two adapters of other ranks, with their outputs."""
    found = []
    for method, seed in (("sara", 3), ("mo_sara", 17)):
        adapter = attach_trained(make_model(), method, seed=seed)
        found.append((adapter, adapter.state_dict()))
    return found


def is_one_of(folder: Path, states) -> bool:
    tensors = storage.read(folder).tensors
    return any(tensors.keys() == state.keys() and same_bits(tensors, state) for state in states)


def test_an_adapter_is_saved_whole_or_not_at_all(pair, tmp_path, tried):
    """A kill at every change of a file, after a kill at every change of a file."""
    (old, old_state), (new, new_state) = pair
    kills = wrong = lost = left = 0
    moments = next(
        moment
        for moment in range(1, 40)
        if killed_at(lambda: new.save_pretrained(tmp_path / "a"), tmp_path, moment) == 0
    )
    for first in range(1, moments):
        for second in range(moments):
            folder = tmp_path / f"{first} {second}"
            old.save_pretrained(folder)
            status = killed_at(lambda folder=folder: new.save_pretrained(folder), folder, first)
            kills += status == -9
            wrong += not is_one_of(folder, (old_state, new_state))
            if second:
                kills += killed_at(lambda folder=folder: old.save_pretrained(folder), folder, second) == -9
                wrong += not is_one_of(folder, (old_state, new_state))
            new.save_pretrained(folder)
            lost += not is_one_of(folder, (new_state,))
            left += {path.name for path in folder.iterdir()} != {storage.TENSORS_FILE, storage.CONFIG_FILE}
            shutil.rmtree(folder)
    assert left == 0
    tried("a save killed at a change of a file, alone and in pairs", kills, lost=lost, wrong=wrong)
    assert kills > 100


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("what", ["export", "merge"])
def test_a_folder_is_exported_whole_or_not_at_all(what, tmp_path, tried):
    write = {"export": export_lora, "merge": lambda model, folder: merge(model, folder)}[what]
    contents = []
    models = []
    for seed in (3, 17):
        model = make_model()
        attach_trained(model, threshold=0.3 if seed == 3 else 0.6, seed=seed)
        write(model, tmp_path / f"right {seed}")
        contents.append(files_of(tmp_path / f"right {seed}"))
        models.append(model)
    gc.collect()
    kills = wrong = lost = 0
    for moment in range(1, 40):
        place = tmp_path / "place"
        folder = place / "out"
        if what == "export":
            write(models[0], folder)
        else:
            # A merge does not replace a model, but other files may be there.
            folder.mkdir(parents=True)
            (folder / "notes.txt").write_bytes(b"mine")
        before = files_of(folder)
        after = {**contents[1], **({"notes.txt": b"mine"} if what == "merge" else {})}
        status = killed_at(lambda folder=folder: write(models[1], folder), place, moment)
        kills += status == -9
        found = files_of(folder)
        # Without its configuration, no program takes a half of a model for a model.
        waits = what == "merge" and found.get("notes.txt") == b"mine" and "config.json" not in found
        wrong += found not in (before, after) and not waits
        # A merge that was about to move its files is finished first. So there is a model then, which is not replaced.
        with contextlib.suppress(FileExistsError):
            write(models[1], folder)
        lost += files_of(folder) != after
        wrong += [path.name for path in place.iterdir()] != ["out"]
        shutil.rmtree(place)
        if status == 0:
            break
    tried(f"{what} killed at a change of a file", kills, lost=lost, wrong=wrong)


def test_a_reader_beside_writers_gets_the_old_or_the_new(pair, tmp_path, tried):
    """Processes save without a pause, and others read without a pause."""
    states = [state for _, state in pair]
    folder = tmp_path / "adapter"
    pair[0][0].save_pretrained(folder)
    wrong = reads = 0

    def write_for_ever() -> None:
        while True:
            for adapter, _ in pair:
                adapter.save_pretrained(folder)

    writers = []
    for _ in range(2):
        child = os.fork()
        if child == 0:
            try:
                write_for_ever()
            finally:
                os._exit(1)
        writers.append(child)
    try:
        while reads < 2000:
            reads += 1
            try:
                wrong += not is_one_of(folder, states)
            except Exception:
                wrong += 1
    finally:
        for child in writers:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
    tried("an adapter read while two processes save", reads, wrong=wrong)


def test_a_loaded_adapter_computes_what_was_saved(pair, tmp_path):
    adapter = pair[0][0]
    adapter.save_pretrained(tmp_path)
    model = make_model()
    SaraAdapter.load(model, tmp_path)
    assert torch.allclose(logits(model), logits(adapter.model), atol=1e-6)
