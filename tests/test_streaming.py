"""Runs on streamed data that are resumed: they end as the uninterrupted run, or say at the start that they cannot."""

import gc
import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import same_bits
from torch.utils.data import DataLoader, IterableDataset
from training import TWO_PROCESSES, At, dataset, log_of, make_trainer, run_script
from transformers import Trainer, TrainerCallback

from hf_sara.trainer import RUNNING_LOSS_FILE

# Four batches make an epoch, the last of them smaller: the fourth epoch begins after step 12.
ROWS, BATCH, STEPS = 14, 4, 13
BETWEEN, END, SECOND, THIRD = 2, 4, 7, 10


class Plain(IterableDataset):
    """Rows in the same order each time, and nothing that says so."""

    def __init__(self, rows: int = ROWS):
        self.rows = list(dataset(rows))

    def __iter__(self):
        return iter(self.rows)


class Reordered(Plain):
    """Rows in an order that follows from the epoch."""

    epoch = 0

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __iter__(self):
        order = torch.randperm(len(self.rows), generator=torch.Generator().manual_seed(self.epoch))
        return (self.rows[index] for index in order.tolist())


class Sized(Reordered):
    """The same with a length, from which Trainer counts the steps of an epoch."""

    def __len__(self):
        return len(self.rows)


class Once(Plain):
    """Rows that can be read once, as those of a pipe."""

    def __init__(self, rows: int = ROWS):
        super().__init__(rows)
        self.left = iter(self.rows)

    def __iter__(self):
        return self.left


def sharded():
    return dataset(ROWS).to_iterable_dataset(num_shards=4)


def shuffled():
    return sharded().shuffle(seed=3, buffer_size=5)


def streaming_trainer(folder, data, stop_at=0, **changes):
    options = {"max_steps": STEPS, "per_device_train_batch_size": BATCH, "save_steps": 1, **changes}
    trainer = make_trainer(folder, **options)
    trainer.train_dataset = data

    def stop(control):
        control.should_training_stop = True

    trainer.add_callback(At(stop_at, stop))
    return trainer


def train(folder, data, resume=None, stop_at=0, **changes):
    trainer = streaming_trainer(folder, data, stop_at, **changes)
    # Other random numbers than those with which the run before began.
    torch.rand(3)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def check_same_end(found, expected):
    assert same_bits(found.sara_adapter.state_dict(), expected.sara_adapter.state_dict())
    assert log_of(found) == log_of(expected)


@pytest.fixture(scope="module", autouse=True)
def _quick():
    """Each training collects garbage, and so would look at all that was imported each time."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An uninterrupted run with a checkpoint after each step."""
    return train(tmp_path_factory.mktemp("whole"), shuffled())


def checkpoint(trainer, step: int) -> Path:
    return Path(trainer.args.output_dir, f"checkpoint-{step}")


def edited(path: Path, folder: Path, edit) -> Path:
    """A copy of a checkpoint with another running loss."""
    shutil.copytree(path, folder / path.name)
    file = folder / path.name / RUNNING_LOSS_FILE
    state = json.loads(file.read_text())
    edit(state)
    file.write_text(json.dumps(state))
    return file.parent


@pytest.mark.parametrize("step", [BETWEEN, END, SECOND, THIRD])
def test_a_run_that_is_resumed_in_any_epoch_equals_the_uninterrupted_one(step, whole, tmp_path):
    check_same_end(train(tmp_path, shuffled(), checkpoint(whole, step)), whole)


@pytest.mark.one_in(3)
@pytest.mark.parametrize(
    ("data", "steps", "changes"),
    [
        (sharded, [SECOND], {}),
        (Reordered, [SECOND], {}),
        (Sized, [END, SECOND], {}),
        (Plain, [BETWEEN, END], {}),
        (shuffled, [3], {"gradient_accumulation_steps": 2}),
        (Sized, [2, 3], {"gradient_accumulation_steps": 3}),
        # Three batches make a step. The fourth one of each epoch waits, and its gradients belong to the next one's.
        (shuffled, [1, 3], {"gradient_accumulation_steps": 3}),
        (shuffled, [SECOND], {"accelerator_config": {"dispatch_batches": False}}),
        (shuffled, [SECOND], {"dataloader_num_workers": 2}),
    ],
)
def test_other_data_and_settings_are_resumed_exactly_too(data, steps, changes, tmp_path):
    changes = {"max_steps": max(steps) + 3, **changes}
    whole = train(tmp_path / "whole", data(), **changes)
    for step in steps:
        check_same_end(train(tmp_path / str(step), data(), checkpoint(whole, step), **changes), whole)


def test_a_run_that_is_resumed_twice_equals_the_uninterrupted_one(whole, tmp_path):
    # Some steps fall between two checkpoints, and some checkpoints between two log lines.
    train(tmp_path, shuffled(), stop_at=6, save_steps=5)
    for stop_at in (11, 0):
        last = train(tmp_path, shuffled(), True, stop_at=stop_at, save_steps=5)
    check_same_end(last, whole)


def test_a_run_with_checkpoints_and_evaluations_at_the_ends_of_epochs_equals_the_uninterrupted_one(tmp_path):
    strategies = {"save_strategy": "epoch", "eval_strategy": "epoch", "logging_strategy": "epoch"}
    whole = train(tmp_path / "whole", shuffled(), **strategies)
    for step in (END, 2 * END):
        check_same_end(train(tmp_path / str(step), shuffled(), checkpoint(whole, step), **strategies), whole)


def test_a_run_that_was_stopped_within_an_epoch_goes_on_within_it(whole, tmp_path):
    # Trainer saves at the stop as at the end of an epoch.
    train(tmp_path, shuffled(), stop_at=SECOND, save_strategy="epoch")
    check_same_end(train(tmp_path, shuffled(), True), whole)


@pytest.mark.parametrize("strategy", ["steps", "epoch"])
def test_an_epoch_that_a_callback_ended_is_over_for_the_resumed_run_too(strategy, tmp_path):
    class EndEpoch(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_epoch_stop = state.global_step % 3 == 0

    def ended_early(folder, resume=None):
        trainer = streaming_trainer(folder, shuffled(), save_strategy=strategy, max_steps=7)
        trainer.add_callback(EndEpoch())
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    whole = ended_early(tmp_path / "whole")
    check_same_end(ended_early(tmp_path / "parts", str(checkpoint(whole, 3))), whole)


def test_a_finished_run_that_is_resumed_needs_no_place_in_the_data(whole, tmp_path):
    again = train(tmp_path, Plain(), checkpoint(whole, STEPS), per_device_train_batch_size=2)
    assert again.state.global_step == STEPS
    assert same_bits(again.sara_adapter.state_dict(), whole.sara_adapter.state_dict())


def test_data_are_started_anew_where_they_shall_not_be_skipped(whole, tmp_path):
    changes = {"ignore_data_skip": True, "per_device_train_batch_size": 2}
    seen = []
    resumed = streaming_trainer(tmp_path, Plain(), **changes)
    resumed.add_callback(At(SECOND + 1, lambda control: seen.append(resumed.state.epoch)))
    resumed.train(resume_from_checkpoint=str(checkpoint(whole, SECOND)))
    assert seen == [1 / STEPS]
    assert resumed.state.global_step == STEPS


# ---- what cannot go on exactly ----


def refused(message: str, *args, **changes) -> None:
    """Check the error, and that it comes before the optimizer is loaded and a step is trained."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "_load_optimizer_and_scheduler", lambda *_: pytest.fail("too late"))
        with pytest.raises(ValueError, match=message) as raised:
            train(*args, **changes)
    assert "ignore_data_skip=True" in str(raised.value)


@pytest.mark.parametrize(
    ("data", "changes", "message"),
    [
        (Plain, {}, r"epoch 1, counted from 0, and Plain does not say .* set_epoch\(epoch\)"),
        (shuffled, {"per_device_train_batch_size": 2}, "batch size of a process: 4 there, 2 here"),
        (shuffled, {"gradient_accumulation_steps": 2}, "gradient_accumulation_steps: 1 there, 2 here"),
        (shuffled, {"dataloader_num_workers": 2}, "dataloader_num_workers: 0 there, 2 here"),
        (shuffled, {"dataloader_persistent_workers": True}, "dataloader_persistent_workers=False"),
    ],
)
def test_a_run_that_cannot_go_on_exactly_says_so_before_it_trains(
    data, changes, message, whole, tmp_path, monkeypatch
):
    # DataLoader wants workers that could persist. The run ends before it starts any.
    monkeypatch.setattr(Trainer, "get_train_dataloader", lambda trainer: DataLoader(trainer.train_dataset))
    refused(message, tmp_path, data(), checkpoint(whole, SECOND), **changes)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda data: data["layout"].update({"number of processes": 2}), "number of processes: 2 there, 1 here"),
        (lambda data: data.update(persistent=True), "dataloader_persistent_workers=False"),
    ],
)
def test_a_checkpoint_of_other_processes_or_workers_is_refused(edit, message, whole, tmp_path):
    path = edited(checkpoint(whole, SECOND), tmp_path, lambda state: edit(state["data"]))
    refused(message, tmp_path, shuffled(), path)


def test_gradients_that_a_checkpoint_does_not_have_are_not_left_out(tmp_path):
    changes = {"gradient_accumulation_steps": 3, "save_strategy": "epoch", "max_steps": 3}
    whole = train(tmp_path, shuffled(), **changes)
    refused("last gradients .*save_strategy='steps'", tmp_path, shuffled(), checkpoint(whole, 2), **changes)


@pytest.mark.parametrize(
    ("step", "read"), [(BETWEEN, ROWS), (BETWEEN, ROWS - BATCH), (END, ROWS)], ids=["all", "some", "all, at the end"]
)
def test_data_that_were_read_before_are_an_error_and_not_a_run_without_a_step(
    step, read, whole, tmp_path, monkeypatch
):
    data = Once()
    for _ in range(read):
        next(data.left)
    monkeypatch.setattr(Trainer, "training_step", lambda *_: pytest.fail("too late"))
    with pytest.raises(ValueError, match=r"no batch after .* made anew"):
        train(tmp_path, data, checkpoint(whole, step))


@pytest.mark.parametrize("step", [BETWEEN, END, SECOND])
def test_a_checkpoint_without_its_place_in_the_data_is_resumed_in_its_first_epoch_only(step, whole, tmp_path):
    # Earlier versions wrote such checkpoints, and other trainers write no running loss at all.
    path = edited(checkpoint(whole, step), tmp_path, lambda state: state.pop("data"))
    if step == SECOND:
        refused("does not say where that is", tmp_path, shuffled(), path)
    else:
        check_same_end(train(tmp_path, shuffled(), path), whole)


# ---- several processes ----


@pytest.mark.one_in(3)
@pytest.mark.slow
@pytest.mark.parametrize("accelerator", [{}, {"dispatch_batches": False}, {"split_batches": True}], ids=str)
def test_two_processes_resume_in_a_later_epoch_as_if_they_had_not_stopped(accelerator, tmp_path):
    arguments = {"streamed": True, "max_steps": 9, "accelerator_config": accelerator}

    def run(folder, **changes):
        found = run_script(str(folder), "sara", "0", json.dumps(arguments | changes), launcher=TWO_PROCESSES)
        assert found.returncode == 0, found.stderr
        return torch.load(folder / "rank0.pt"), json.loads((folder / "log0.json").read_text())

    whole = run(tmp_path / "whole")
    shutil.copytree(tmp_path / "whole" / "checkpoint-6", tmp_path / "parts" / "checkpoint-6")
    parts = run(tmp_path / "parts", resume_from_checkpoint=True)
    assert same_bits(parts[0], whole[0])
    assert parts[1] == whole[1]
