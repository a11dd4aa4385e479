"""Trainers for SARA and Mo-SARA adapters."""

from transformers import Seq2SeqTrainer, Trainer

from ..checkpoints import RUNNING_LOSS_FILE, last_complete_checkpoint
from .cards import SaraTrainerMixin
from .frozen_base import FrozenBaseMixin
from .resuming import ExactResumeMixin

__all__ = [
    "RUNNING_LOSS_FILE",
    "ExactResumeMixin",
    "FrozenBaseMixin",
    "SaraSeq2SeqTrainer",
    "SaraTrainer",
    "SaraTrainerMixin",
    "last_complete_checkpoint",
]


class SaraTrainer(SaraTrainerMixin, Trainer):
    """
    [`~transformers.Trainer`] for SARA and Mo-SARA adapters.

    Example:

    ```python
    trainer = SaraTrainer(
        model=model,
        args=TrainingArguments("my-adapter", learning_rate=8e-3),
        sara_args=SaraArguments(threshold=0.012),
        train_dataset=dataset,
        processing_class=tokenizer,
    )
    trainer.train()
    trainer.save_model()
    ```
    """


class SaraSeq2SeqTrainer(SaraTrainerMixin, Seq2SeqTrainer):
    """[`~transformers.Seq2SeqTrainer`] for SARA and Mo-SARA adapters."""
