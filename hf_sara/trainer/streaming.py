"""The place in streamed data where a training stands, so that a resumed run goes on at the same place.

Trainer computes the place from the number of steps in an epoch. Streamed data have no length, so it takes `max_steps`
for that number, and is wrong in each epoch but the first. Here the place is counted and saved with each checkpoint.
"""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch.utils.data import IterableDataset
from transformers import Trainer

if TYPE_CHECKING:
    # The mixins stand before a subclass of Trainer, and a type checker has to know what `super()` offers them.
    TrainerBase = Trainer
else:
    TrainerBase = object


@dataclass
class DataPlace:
    """
    A place in the data.

    Args:
        epoch (`int`): The epoch's index.
        batches (`int`): How many batches of this epoch each process has taken.
        over (`bool`): Whether the epoch has no further batch.
    """

    epoch: int = 0
    batches: int = 0
    over: bool = False


class DataPlaceMixin(TrainerBase):
    """The part of [`ExactResumeMixin`] that counts the batches of streamed data, and goes on after a checkpoint's."""

    def __init__(self, *args, **kwargs):
        self._sara_place = DataPlace()
        self._sara_saved_place: dict[str, Any] | None = None
        # A resumed run has to get a batch in this epoch, or there is nothing left to train on.
        self._sara_batch_due_in = math.inf
        super().__init__(*args, **kwargs)

    # ---- counting ----

    def _run_epoch(self, *args, **kwargs):
        first = kwargs["epoch"] == kwargs["epochs_trained"]
        self._sara_place = DataPlace(kwargs["epoch"], kwargs["steps_trained_in_current_epoch"] if first else 0)
        super()._run_epoch(*args, **kwargs)

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        place = self._sara_place
        try:
            batches, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        except ValueError as error:
            if self._sara_batch_due_in < math.inf and "does not contain any data" in str(error):
                # accelerate raises this for an epoch without any batch.
                raise self._sara_no_batch_left() from error
            raise
        if batches:
            self._sara_batch_due_in = math.inf
        elif place.epoch >= self._sara_batch_due_in:
            raise self._sara_no_batch_left()
        place.batches += len(batches)
        # accelerate reads one batch ahead, so it knows the last one.
        place.over = len(batches) < num_batches or self.accelerator.gradient_state.end_of_dataloader
        return batches, num_items

    def _sara_no_batch_left(self) -> ValueError:
        place = self._sara_place
        return ValueError(
            f"The training data have no batch after the first {place.batches} of epoch {place.epoch}, counted from 0, "
            "where the resumed run goes on. They are shorter than those of the checkpoint, or can be read only once "
            "and were read before. Resume with the dataset of the checkpoint, made anew."
        )

    def _on_epoch_end(self) -> None:
        """Note that the next epoch follows. A run that a callback stops within an epoch stays where it is."""
        if self._sara_place.over:
            self._sara_place = DataPlace(self._sara_place.epoch + 1)

    # ---- saving and restoring ----

    def _sara_place_to_save(self) -> dict[str, Any]:
        place = self._sara_place
        if self.control.should_epoch_stop and place.batches:
            # A callback ends the epoch here.
            place = DataPlace(place.epoch + 1)
        # After the last batches of an epoch, their gradients may wait for the first step of the next one.
        waiting = not self.accelerator.sync_gradients
        persistent = self.args.dataloader_persistent_workers
        layout = self._sara_data_layout()
        return {**vars(place), "waiting": waiting, "persistent": persistent, "layout": layout}

    def _sara_data_layout(self) -> dict[str, int]:
        """What decides which examples are in a batch, and which batches are in a step."""
        return {
            "batch size of a process": self._train_batch_size,
            "gradient_accumulation_steps": self.args.gradient_accumulation_steps,
            "number of processes": self.args.world_size,
            "dataloader_num_workers": self.args.dataloader_num_workers,
        }

    def _init_training_state(self, max_steps, num_update_steps_per_epoch, *args, **kwargs):
        epochs, batches = super()._init_training_state(max_steps, num_update_steps_per_epoch, *args, **kwargs)
        self._sara_batch_due_in = math.inf
        # A checkpoint is loaded by now. A finished run takes no batch.
        goes_on = 0 < self.state.global_step < max_steps
        if not goes_on or not isinstance(self.train_dataset, IterableDataset) or self.args.ignore_data_skip:
            return epochs, batches
        saved = self._sara_saved_place
        if saved is None:
            # Another trainer wrote the checkpoint, or an earlier version. What Trainer computes is right in the first
            # epoch, which is over or not.
            saved = {"epoch": int(self.state.epoch or 0), "batches": batches, "over": True}
        why_not = self._sara_why_not_exactly(saved)
        if why_not:
            raise ValueError(
                f"The run cannot go on at the checkpoint's place in the streamed training data: {why_not}. "
                "With ignore_data_skip=True it starts at the first batch again, which is not what a run without a "
                "break would do."
            )
        if saved["batches"] // self.args.gradient_accumulation_steps >= num_update_steps_per_epoch:
            # The data have a length, and this is the end of an epoch. Trainer would not ask for another batch in it,
            # and it restores the random numbers only after it has asked for one.
            saved = {"epoch": saved["epoch"] + 1, "batches": 0, "over": False}
        self._sara_batch_due_in = saved["epoch"] + saved["over"]
        return saved["epoch"], saved["batches"]

    def _sara_why_not_exactly(self, saved: dict[str, Any]) -> str | None:
        """Why a run cannot go on with the same batches as one without a break, and what to do; `None` if it can."""
        if saved["epoch"] and "layout" not in saved:
            return "the checkpoint does not say where that is, and is not of the first epoch"
        there, here = saved.get("layout", {}), self._sara_data_layout()
        differences = [
            f"{name}: {there[name]} there, {here[name]} here" for name in there if there[name] != here[name]
        ]
        if differences:
            return f"they are batched in another way ({'; '.join(differences)}). Use the values of the checkpoint"
        if saved.get("waiting"):
            return (
                "it was written at the end of an epoch, whose last gradients were kept for the next step and are not "
                "in it. Take a checkpoint that was written after a step (save_strategy='steps')"
            )
        if saved.get("persistent") or self.args.dataloader_persistent_workers:
            return (
                "persistent workers live on from epoch to epoch, and new ones have not read and drawn what they had. "
                "Train with dataloader_persistent_workers=False from the start"
            )
        if saved["epoch"] and not hasattr(self.train_dataset, "set_epoch"):
            return (
                f"that is in epoch {saved['epoch']}, counted from 0, and {type(self.train_dataset).__name__} does not "
                "say in which order it yields that epoch. Give it a method set_epoch(epoch) that sets the order of an "
                "epoch; if the order is always the same, the method may do nothing"
            )
        return None
