"""Ctrl-C in a training: it ends after the current step, with a checkpoint and one line that says how to go on."""

import contextlib
import logging
import signal
import sys
import threading
from collections.abc import Iterator
from typing import Any

from transformers.trainer_utils import SaveStrategy

logger = logging.getLogger(__name__)


class TrainingInterrupted(KeyboardInterrupt):
    """A training was interrupted by Ctrl-C, and ended after a whole step. The message says how to go on."""


class Interrupt:
    """Whether a person has asked a training to end."""

    def __init__(self) -> None:
        self.pressed = False

    @contextlib.contextmanager
    def watched(self, trainer: Any) -> Iterator[None]:
        """
        Let the first Ctrl-C end the training after a step, and the second one at once. Several processes could not
        agree on a step, and another handler of the signal has its own reasons, so nothing is changed for these.
        """
        self.pressed = False
        is_main = threading.current_thread() is threading.main_thread()
        if not is_main or trainer.args.world_size > 1 or signal.getsignal(signal.SIGINT) != signal.default_int_handler:
            yield
            return

        def note(number: int, frame: Any) -> None:
            if self.pressed:
                raise KeyboardInterrupt
            self.pressed = True
            logger.warning("The training ends after this step. Press Ctrl-C again to end it at once.")

        signal.signal(signal.SIGINT, note)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, signal.default_int_handler)

    def after_step(self, trainer: Any, control: Any) -> None:
        """End the training with a checkpoint, if a person has asked for that."""
        if self.pressed:
            control.should_training_stop = True
            control.should_save = trainer.args.save_strategy != SaveStrategy.NO

    def report(self, trainer: Any, folder: str) -> None:
        """Raise a [`TrainingInterrupted`] if the training was interrupted."""
        if not self.pressed:
            return
        done = f"The training was interrupted after step {trainer.state.global_step} of {trainer.state.max_steps}."
        if trainer.args.save_strategy == SaveStrategy.NO:
            how = "No checkpoint was written, because save_strategy is 'no'."
        else:
            how = f"Go on from its checkpoint in {folder} with trainer.train(resume_from_checkpoint=True)."
        if sys.excepthook is sys.__excepthook__:
            # A trace of a training that somebody stopped tells nothing.
            sys.excepthook = _print_one_line
        raise TrainingInterrupted(f"{done} {how}")


def _print_one_line(kind: type[BaseException], error: BaseException, trace: Any) -> None:
    if issubclass(kind, TrainingInterrupted):
        sys.stderr.write(f"{error}\n")
    else:
        sys.__excepthook__(kind, error, trace)
