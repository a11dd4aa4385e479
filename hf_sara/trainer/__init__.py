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

    Set `learning_rate`. The default of [`~transformers.TrainingArguments`], 5e-5, is far too small here. The first
    training warns once if the learning rate is that default, or far below the values of this table:

    | learning rate | SARA | Mo-SARA |
    |---|---|---|
    | up to a few hundred steps | start at 0.02; try 0.008 and 0.05 | start at 0.2; try 0.1 and 0.3 |
    | thousands of steps | 0.001 to 0.01 | 0.03 to 0.07 |

    Example:

    ```python
    trainer = SaraTrainer(
        model=model,
        args=TrainingArguments("my-adapter", learning_rate=2e-2),
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
