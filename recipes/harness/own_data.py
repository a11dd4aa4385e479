"""One's own data for a recipe: files, folders and data sets of the Hub, their splits and labels, and the results."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from datasets import ClassLabel, DatasetDict, Value, load_dataset
from datasets.exceptions import DatasetGenerationError
from transformers import EvalPrediction, PreTrainedModel, Trainer, TrainingArguments
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from hf_sara.model_card import Sample, pipeline_of
from hf_sara.tasks.data import data_pattern

from .card import card_arguments
from .options import RecipeError
from .own_data_settings import OwnDataArguments
from .run_folder import write_json

READERS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}
EVAL_SPLITS = ("validation", "test")
LABELS = "labels"
METRICS_FILE = "metrics.json"


# ---- data ----


def load_data(options: OwnDataArguments) -> DatasetDict:
    """
    Load the data.

    Args:
        options ([`~harness.own_data_settings.OwnDataArguments`]): Which data, and which splits of them.

    Returns:
        [`~datasets.DatasetDict`]: The split `train`, and the split `eval` if the data have one to evaluate on.

    Raises:
        [`~harness.options.RecipeError`]: If there is no such file, no such split, or the data cannot be read.
    """
    name = str(options.dataset)
    path = Path(name)
    is_file = path.is_file() or "://" in name
    if (is_file or path.suffix in READERS) and not path.is_dir():
        if not is_file:
            raise RecipeError(f"--dataset {name}: there is no such file.")
        if path.suffix not in READERS:
            raise RecipeError(f"--dataset {name}: cannot be read. It has to end with {', '.join(READERS)}.")
        source: dict[str, Any] = {"path": READERS[path.suffix], "data_files": data_pattern(name)}
    else:
        source = {"path": name, "name": options.dataset_config}
    try:
        data = load_dataset(**source)
    except DatasetGenerationError as error:
        raise RecipeError(f"--dataset {name}: cannot be read ({error.__cause__ or error}).") from error
    evaluation = options.eval_split or next(
        (split for split in EVAL_SPLITS if split in data and split != options.train_split), None
    )
    wanted = {"train": options.train_split, **({"eval": evaluation} if evaluation else {})}
    for split in wanted.values():
        if split not in data:
            raise RecipeError(f"--dataset {name}: there is no split {split!r}. The data have {', '.join(data)}.")
        if not len(data[split]):
            raise RecipeError(f"--dataset {name}: the split {split!r} is empty.")
    return DatasetDict({part: data[split] for part, split in wanted.items()})


def hold_out(data: DatasetDict, options: OwnDataArguments, seed: int) -> DatasetDict:
    """
    Hold out a share of the training data if there are no others to evaluate on, and leave only as many records as the
    options allow.

    Args:
        data ([`~datasets.DatasetDict`]): What [`load_data`] returned.
        options ([`~harness.own_data_settings.OwnDataArguments`]): The share and the numbers.
        seed (`int`): Which records are held out, and which are left, follows from it.

    Returns:
        [`~datasets.DatasetDict`]: The splits `train` and `eval`.
    """
    if "eval" not in data:
        parts = data["train"].train_test_split(test_size=options.eval_share, seed=seed)
        data = DatasetDict({"train": parts["train"], "eval": parts["test"]})
    most = {"train": options.max_train_samples, "eval": options.max_eval_samples}
    return DatasetDict(
        {
            split: rows
            if most[split] is None
            # Data are often sorted, so the first records could all have the same label.
            else rows.shuffle(seed=seed).select(range(min(most[split], len(rows))))
            for split, rows in data.items()
        }
    )


def require_columns(data: DatasetDict, *forms: Sequence[str]) -> None:
    """
    Refuse data that have the columns of none of these forms, or in which such a column is empty somewhere.

    Args:
        data ([`~datasets.DatasetDict`]): The data.
        forms (`Sequence[str]`): The columns of each form. The first form that the training data have is the one that
            all splits need to have.

    Raises:
        [`~harness.options.RecipeError`]: The message names the columns that the data have.
    """
    known = " or ".join("+".join(form) for form in forms)
    form = next((form for form in forms if set(form) <= set(data["train"].column_names)), forms[0])
    for split, rows in data.items():
        if not set(form) <= set(rows.column_names):
            raise RecipeError(
                f"The {split} data have the columns {', '.join(rows.column_names)}, and need {known}. "
                "Rename yours, or name them with an option if --help lists one."
            )
        for column in form:
            empty = rows.data.column(column).null_count
            if empty:
                raise RecipeError(f"The column {column!r} of the {split} data is empty in {empty} records.")
            if column == "messages" and isinstance(rows.features[column], Value):
                raise RecipeError(
                    "The column 'messages' holds text, and not a list of messages with their role and content. "
                    "A CSV file cannot hold such lists; write the data as JSON lines."
                )


def encode_labels(data: DatasetDict, column: str) -> tuple[DatasetDict, list[str]]:
    """
    Number the labels of the data.

    Args:
        data ([`~datasets.DatasetDict`]): What [`load_data`] returned.
        column (`str`): The column of the labels: class labels, texts, or whole numbers.

    Returns:
        `tuple[DatasetDict, list[str]]`: The data with the numbers in the column `labels`, and the names of the labels:
            those of the column's own type, or the sorted distinct ones of the training data.

    Raises:
        [`~harness.options.RecipeError`]: If a record has no label, or one that the training data do not have.
    """
    feature = data["train"].features[column]
    if isinstance(feature, ClassLabel):
        names = list(feature.names)
    elif getattr(feature, "dtype", "").startswith(("string", "large_string", "int", "uint", "bool")):
        names = [str(value) for value in sorted(set(data["train"][column]) - {None})]
    else:
        raise RecipeError(f"The column {column!r} holds {feature}. Labels are class labels, texts or whole numbers.")
    numbers = {name: number for number, name in enumerate(names)}
    encoded = {}
    for split, rows in data.items():
        shown = [_name_of(value, rows.features[column]) for value in rows[column]]
        missing = sum(name is None for name in shown)
        if missing:
            raise RecipeError(
                f"{missing} of the {len(shown)} records of the {split} data have no label in {column!r}."
            )
        unknown = sorted(set(shown) - set(names))
        if unknown:
            raise RecipeError(
                f"The {split} data have the labels {', '.join(unknown[:5])}, which the training data do not have "
                f"in {column!r}. Those are {', '.join(names[:20])}."
            )
        rows = rows.remove_columns([name for name in rows.column_names if name in (column, LABELS)])
        encoded[split] = rows.add_column(LABELS, [numbers[name] for name in shown], feature=ClassLabel(names=names))
    return DatasetDict(encoded), names


def _name_of(value: Any, feature: Any) -> str | None:
    """The name of a label; `None` if there is none, for which class labels have the number -1."""
    if value is None or not isinstance(feature, ClassLabel):
        return None if value is None else str(value)
    return feature.names[value] if value >= 0 else None


# ---- results ----


def checkpoint(training: TrainingArguments) -> str | bool | None:
    """`True`, for the last checkpoint, if `--resume_from_checkpoint` is the word true; else the path that it is."""
    given = training.resume_from_checkpoint
    return True if str(given).lower() == "true" else given


def evaluate(trainer: Trainer, names: Sequence[str]) -> dict[str, float]:
    """The scores of these names on the evaluation data."""
    found = trainer.evaluate()
    return {name: found[f"eval_{name}"] for name in names}


def accuracy_and_f1(output: EvalPrediction) -> dict[str, float]:
    """What `compute_metrics` of a Trainer is for a classifier: the accuracy, and the mean of the labels' F1 scores."""
    # Some models return more than the logits.
    logits = output.predictions[0] if isinstance(output.predictions, tuple) else output.predictions
    guessed, right = np.asarray(logits).argmax(-1), np.asarray(output.label_ids)
    return {"accuracy": float((guessed == right).mean()), "macro_f1": macro_f1(guessed, right)}


def macro_f1(guessed: np.ndarray, right: np.ndarray) -> float:
    """The mean of the F1 scores of all labels that occur among the guesses or the right answers."""
    hits = [((guessed == label) & (right == label)).sum() for label in np.union1d(guessed, right)]
    sizes = [(guessed == label).sum() + (right == label).sum() for label in np.union1d(guessed, right)]
    return float(np.mean(2 * np.array(hits) / np.array(sizes)))


def card_of(
    trainer: Any, options: OwnDataArguments, scores: Mapping[str, float], sample: Sample | None = None
) -> dict[str, Any]:
    """
    What `create_model_card` and `push_to_hub` of a trainer take.

    Args:
        trainer ([`SaraTrainerMixin`]): The trainer, after its training.
        options ([`~harness.own_data_settings.OwnDataArguments`]): They say what the data are called.
        scores (`Mapping[str, float]`): The values of the scores by their names.
        sample ([`~hf_sara.model_card.Sample`], *optional*): An input of the task, and the output of the model.

    Returns:
        `dict[str, Any]`: The arguments.
    """
    split = f"evaluation, {len(trainer.eval_dataset)} records"
    task = pipeline_of(type(trainer.sara_adapter.model).__name__) or "other"
    return card_arguments(scores, **options.data_names(), split=split, sample=sample, task=task)


def write_metrics(
    trainer: Any, before: Mapping[str, float], after: Mapping[str, float], train_loss: float
) -> dict[str, Any]:
    """
    Write metrics.json into the folder of the run.

    Args:
        trainer ([`SaraTrainerMixin`]): The trainer, after its training.
        before (`Mapping[str, float]`): The scores before the training.
        after (`Mapping[str, float]`): The scores after the training.
        train_loss (`float`): The mean loss of the training.

    Returns:
        `dict[str, Any]`: What metrics.json holds.
    """
    metrics = {
        **{f"eval_{name}": value for name, value in after.items()},
        **{f"eval_{name}_before": value for name, value in before.items()},
        "train_loss": train_loss,
        "trained_parameters": trainer.sara_adapter.num_parameters(),
        "train_records": len(trainer.train_dataset),
        "eval_records": len(trainer.eval_dataset),
        "seconds": trainer.training_seconds,
    }
    if trainer.is_world_process_zero():
        write_json(Path(trainer.args.output_dir, METRICS_FILE), metrics)
    return metrics


def first_answer(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, record: Mapping[str, Any], max_new_tokens: int = 64
) -> Sample | None:
    """
    The input of a record, and what the model says to it: for the model card.

    Args:
        model ([`~transformers.PreTrainedModel`]): The trained model.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): Its tokenizer.
        record (`Mapping[str, Any]`): A record of the data. Its input is the `prompt`, or the `messages` before the
            last one.
        max_new_tokens (`int`, *optional*, defaults to 64): The longest output in tokens.

    Returns:
        [`~hf_sara.model_card.Sample`], *optional*: `None` if the record has no input, but only a text.
    """
    prompt = record.get("prompt") or record.get("messages", [])[:-1]
    if not prompt:
        return None
    if not isinstance(prompt, str):
        prompt = tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
    inputs = tokenizer(prompt, return_tensors="pt").to(model.device)
    output = model.eval().generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
    new = output[0, inputs["input_ids"].shape[1] :]
    return Sample(str(prompt), str(tokenizer.decode(new, skip_special_tokens=True)))
