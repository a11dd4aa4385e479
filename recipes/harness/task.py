"""What a task has to provide for [`~harness.run.run`], which trains a model on it and scores what that decodes."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import PreTrainedModel
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from hf_sara.model_card import Sample

from .arguments import RunArguments


@dataclass(frozen=True)
class Splits:
    """
    The data of a run, not encoded yet.

    Args:
        train ([`~datasets.Dataset`]): The data that the model is trained on.
        validation ([`~datasets.Dataset`], *optional*): The data that the evaluation loss is measured on. If they are
            left out, there is no evaluation loss.
        test (`Mapping[str, Any]`): The data that are decoded and scored, in the task's own form. They are empty if
            nothing is to be decoded.
    """

    train: Dataset
    validation: Dataset | None
    test: Mapping[str, Any]


class Task(ABC):
    """
    A task of the paper: its data, their encoding, the decoding and the scores.

    Attributes:
        title (`str`): What a model card calls the data.
        demo_title (`str`): What a model card calls the data of the demo.
        dataset_id (`str`, *optional*): The id of the data on the Hub.
        without_dropout (`bool`): Whether the base is trained without its own dropout.
        trainer_mixin (`type`, *optional*): Methods of Trainer that the task overrides.
    """

    title: str
    demo_title: str
    dataset_id: str | None = None
    without_dropout: bool = False
    trainer_mixin: type | None = None

    @abstractmethod
    def asked(self, options: RunArguments) -> dict[str, Any]:
        """The options that say how much is scored. metrics.json repeats them, so that a later call can compare."""

    @abstractmethod
    def check_scoring(self, options: RunArguments) -> None:
        """Raise an error if the scores need something that is not installed, before hours of training."""

    @abstractmethod
    def make_demo_data(self, folder: str | PathLike) -> Path:
        """Write small data of our own into a folder, for the demo; returns the folder."""

    @abstractmethod
    def load(self, options: RunArguments, data_dir: str | PathLike | None, seed: int) -> Splits:
        """
        Load the data.

        Args:
            options ([`~harness.arguments.RunArguments`]): The task's own options.
            data_dir (`str` or `os.PathLike`, *optional*): The folder of the data. Defaults to their public address.
            seed (`int`): The seed of the run, for a split that is drawn at random.
        """

    @abstractmethod
    def encode(self, records: Dataset, tokenizer: PreTrainedTokenizerBase, options: RunArguments) -> Dataset:
        """The records as token ids and labels."""

    @abstractmethod
    def make_collator(self, tokenizer: PreTrainedTokenizerBase) -> Callable[[list[dict[str, Any]]], Mapping[str, Any]]:
        """What makes a padded batch of encoded records."""

    @abstractmethod
    def score(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        test: Mapping[str, Any],
        options: RunArguments,
        folder: Path,
    ) -> dict[str, float]:
        """
        Decode the test data into files of the run's folder, from which an interrupted call goes on, and score them.

        Args:
            model ([`~transformers.PreTrainedModel`]): The trained model, or a `PeftModel`.
            tokenizer ([`~transformers.PreTrainedTokenizerBase`]): Its tokenizer.
            test (`Mapping[str, Any]`): What [`Task.load`] returned; not empty.
            options ([`~harness.arguments.RunArguments`]): The task's own options.
            folder (`Path`): The run's folder.
        """

    @abstractmethod
    def sample(self, tokenizer: PreTrainedTokenizerBase, options: RunArguments, folder: Path) -> Sample:
        """The first test input, as the model gets it, and what was decoded for it: for the model card."""

    @abstractmethod
    def sizes(self, splits: Splits) -> dict[str, Any]:
        """How many records there are, for metrics.json."""

    @abstractmethod
    def describe_test(self, test: Mapping[str, Any]) -> str:
        """What was scored, for the model card: `"questions"` and their number."""

    @abstractmethod
    def first_prompts(
        self, options: RunArguments, data_dir: str | PathLike | None, tokenizer: PreTrainedTokenizerBase
    ) -> dict[str, list[int]]:
        """The token ids of the first prompt of each test set, by the set's name."""
