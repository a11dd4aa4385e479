"""The mixin that lets a hyperparameter search of Trainer try the fields of an adapter's arguments."""

from dataclasses import fields
from typing import Any

from transformers.trainer_utils import HPSearchBackend

from ..arguments import SaraArguments
from .frozen_base import FrozenBaseMixin


class SearchMixin(FrozenBaseMixin):
    """
    A mixin that finds the fields of [`SaraArguments`] among what a trial of a hyperparameter search tries. The adapter
    of each trial is made with them.
    """

    hp_space: Any

    def _sara_fields_of(self, trial: Any) -> dict[str, Any]:
        """The fields of SaraArguments that a hyperparameter search tries."""
        if trial is None or self.hp_search_backend is None:
            return {}
        values = self.hp_space(trial) if self.hp_search_backend == HPSearchBackend.OPTUNA else trial
        return {field.name: values[field.name] for field in fields(SaraArguments) if field.name in values}

    def _hp_search_setup(self, trial):
        space: Any = self.hp_space if self.hp_search_backend is not None else None
        ours = {field.name for field in fields(SaraArguments)}
        if space is not None and trial is not None and self.hp_search_backend == HPSearchBackend.OPTUNA:
            # The adapter's own fields were used when the model was made. Trainer would warn that they are unknown.
            self.hp_space = lambda trial: {name: value for name, value in space(trial).items() if name not in ours}
        try:
            super()._hp_search_setup(trial)
        finally:
            if space is not None:
                self.hp_space = space
