"""Exact resuming for any `transformers.Trainer`: an interrupted run ends with the same bits and the same log.

Trainer restores the optimizer, the schedule and the random numbers. This module also restores the loss between two log
lines, the order of batches that are grouped by length, the place in streamed data, and the time of the whole training.
A finished run that is resumed trains no further step.
"""

import contextlib
import json
import logging
import os
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers.trainer as transformers_trainer
from safetensors import SafetensorError
from transformers import Trainer, TrainerCallback
from transformers.trainer_pt_utils import LengthGroupedSampler, nested_gather
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..checkpoints import RUNNING_LOSS_FILE, complete, has_optimizer, last_complete_checkpoint, refuse_incomplete
from ..files import naming, write_file
from .interrupts import Interrupt
from .streaming import DataPlaceMixin

logger = logging.getLogger(__name__)


class EpochSeededSampler(LengthGroupedSampler):
    """[`~transformers.trainer_pt_utils.LengthGroupedSampler`] with an order that follows from seed and epoch alone."""

    def __init__(self, batch_size: int, lengths: list[int], seed: int):
        super().__init__(batch_size, lengths=lengths, generator=torch.Generator())
        self.seed = seed
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        """Set the order of an epoch. Trainer calls this before each epoch."""
        self.generator.manual_seed(self.seed + epoch)


class ExactResumeMixin(DataPlaceMixin):
    """A mixin that makes a [`~transformers.Trainer`] resume exactly: `class MyTrainer(ExactResumeMixin, Trainer)`."""

    _tr_loss: torch.Tensor

    def __init__(self, *args, **kwargs):
        self._sara_resumed_loss: dict[str, Any] | None = None
        self._sara_started: float | None = None
        self._sara_seconds = 0.0
        # The step at which this call began.
        self._sara_first_step = 0
        self._sara_interrupt = Interrupt()
        super().__init__(*args, **kwargs)
        self.add_callback(_Events(self))

    def train(self, resume_from_checkpoint=None, *args, **kwargs):
        """
        Train as Trainer does. `resume_from_checkpoint=True` takes the last *complete* checkpoint. One that a crash cut
        off, or that was damaged later, is passed over with a warning that names the file. If its path is given, it is
        refused. The first Ctrl-C ends the training after the current step, with a checkpoint.

        Raises:
            `ValueError`: If there is no complete checkpoint to resume from.
            [`~hf_sara.trainer.interrupts.TrainingInterrupted`]: After Ctrl-C, a `KeyboardInterrupt` that says how to
                go on.
        """
        if resume_from_checkpoint is True:
            resume_from_checkpoint = last_complete_checkpoint(output_dir_of(self))
            if resume_from_checkpoint is None:
                raise ValueError(f"There is no complete checkpoint in {self.args.output_dir!r} to resume from.")
        elif resume_from_checkpoint:
            refuse_incomplete(resume_from_checkpoint)
        self._sara_resumed_loss = None
        if resume_from_checkpoint:
            if not has_optimizer(resume_from_checkpoint):
                logger.warning(
                    "%s was written without the state of the optimizer (save_only_model), which starts anew. So the "
                    "training does not end as one without a break.",
                    resume_from_checkpoint,
                )
            # The loss is not read together with the tensors, because DeepSpeed loads those in its own way.
            path = Path(resume_from_checkpoint, RUNNING_LOSS_FILE)
            self._sara_resumed_loss = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
        self._sara_saved_place = (self._sara_resumed_loss or {}).get("data")
        try:
            with self._sara_interrupt.watched(self):
                result = super().train(resume_from_checkpoint, *args, **kwargs)
        finally:
            self._sara_seconds, self._sara_started = self.training_seconds, None
        self._sara_interrupt.report(self, output_dir_of(self))
        return result

    @property
    def training_seconds(self) -> float:
        """How long the training took so far, summed over the first call and those that resumed it."""
        return self._sara_seconds + (0.0 if self._sara_started is None else time.monotonic() - self._sara_started)

    def _on_train_begin(self) -> None:
        """Prepare the first step, after Trainer has made the model and reset its own state."""
        self._restore_running_loss()
        self._sara_first_step = self.state.global_step
        self._sara_started = time.monotonic()

    def _run_epoch(self, *args, **kwargs):
        if self.state.global_step >= self.state.max_steps:
            # A finished run is resumed. Trainer looks for the end only after a step, so it would train one step more.
            self.control.should_training_stop = True
            if self.state.global_step == self._sara_first_step:
                # Nothing is trained, so the time of the training stays what it was.
                self._sara_started = None
            return
        super()._run_epoch(*args, **kwargs)

    def _get_train_sampler(self, train_dataset=None):
        sampler = super()._get_train_sampler(train_dataset)
        if isinstance(sampler, LengthGroupedSampler):
            # Trainer groups by length with the global random numbers. Methods use up different amounts of them, and a
            # run that is resumed in a later epoch has others.
            seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
            return EpochSeededSampler(sampler.batch_size, lengths=sampler.lengths, seed=seed)
        return sampler

    def _init_training_state(self, *args, **kwargs):
        place = super()._init_training_state(*args, **kwargs)
        best = Path(output_dir_of(self), f"{PREFIX_CHECKPOINT_DIR}-{self.state.best_global_step}")
        if self.state.best_model_checkpoint is None and best.is_dir():
            # A state from the Hub does not name the folder, and after a move it names another one.
            self.state.best_model_checkpoint = str(best)
        return place

    def _save_checkpoint(self, model, trial):
        # Older checkpoints go only when the new one is complete on the disk.
        rotate = transformers_trainer.rotate_checkpoints

        def complete_first(output_dir, *args, **kwargs):
            complete(Path(output_dir, f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"))
            rotate(output_dir, *args, **kwargs)

        transformers_trainer.rotate_checkpoints = complete_first
        folder = Path(self._get_output_dir(trial=trial), f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}")
        try:
            with _naming_checkpoint(folder):
                return super()._save_checkpoint(model, trial)
        finally:
            transformers_trainer.rotate_checkpoints = rotate

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        # Every process writes a file of its own, and one of them says when the checkpoint is complete.
        self.accelerator.wait_for_everyone()

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        self._save_running_loss(output_dir)
        super()._save_optimizer_and_scheduler(output_dir)

    # Trainer keeps the loss between two log lines in memory only. Here it is saved with each checkpoint, so that the
    # log of a resumed run equals that of an uninterrupted one, also if a checkpoint falls between two log lines.

    def _save_running_loss(self, output_dir: str) -> None:
        # The loss of each process is saved, since their mean would be rounded.
        losses = nested_gather(self._tr_loss, self.args.parallel_mode).view(-1).tolist()
        if self.args.should_save:
            os.makedirs(output_dir, exist_ok=True)
            state = {
                "since_last_log": losses,
                "logged": self._total_loss_scalar,
                "last_logged_step": self._globalstep_last_logged,
                "seconds": self.training_seconds,
                "data": self._sara_place_to_save(),
            }
            write_file(Path(output_dir, RUNNING_LOSS_FILE), json.dumps(state).encode())

    def _restore_running_loss(self) -> None:
        self._sara_seconds = 0.0
        if self._sara_resumed_loss is not None:
            self._sara_seconds = self._sara_resumed_loss["seconds"]
            losses = self._sara_resumed_loss["since_last_log"]
            same = len(losses) == self.args.world_size
            self._tr_loss = self._tr_loss + (losses[self.args.process_index] if same else sum(losses) / len(losses))
            self._total_loss_scalar = self._sara_resumed_loss["logged"]
            self._globalstep_last_logged = self._sara_resumed_loss["last_logged_step"]

    def _finalize_training(self, trial, num_train_samples, start_time):
        if self._sara_resumed_loss is not None:
            # Since transformers 5.19, Trainer divides by the steps of this call only, and ever since by its time. Here
            # they become those of the whole run, because the sum of the losses is that of the whole run.
            self._initial_global_step = 0
            start_time -= self._sara_seconds
            logger.warning("train_runtime and the speeds are those of the whole training, and not of this call alone.")
            self._sara_resumed_loss = None
        return super()._finalize_training(trial, num_train_samples, start_time)


def output_dir_of(trainer: Trainer) -> str:
    """The folder of a training. TrainingArguments sets one if none is given."""
    return str(trainer.args.output_dir)


# What the errors of torch.save say if a file cannot be written. They name neither the file nor the reason.
WRITING_FAILED = re.compile("inline_container|iostream")


@contextlib.contextmanager
def _naming_checkpoint(folder: Path) -> Iterator[None]:
    """Let the errors of a disk that is full be an `OSError` that names the checkpoint."""
    try:
        with naming(folder):
            yield
    except (RuntimeError, SafetensorError) as error:
        if isinstance(error, RuntimeError) and not WRITING_FAILED.search(str(error)):
            raise
        raise OSError(
            f"The checkpoint {folder} cannot be written. The disk may be full. When there is room, the training goes "
            "on from the last complete checkpoint with resume_from_checkpoint=True."
        ) from error


class _Events(TrainerCallback):
    """Calls the trainer's own methods at moments for which Trainer has no method to override, but an event."""

    def __init__(self, trainer: ExactResumeMixin):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        self.trainer._on_train_begin()

    def on_step_end(self, args, state, control, **kwargs):
        self.trainer._sara_interrupt.after_step(self.trainer, control)

    def on_epoch_end(self, args, state, control, **kwargs):
        self.trainer._on_epoch_end()
