"""The commonsense task (paper, tables 2 and 6): eight data sets of questions with a choice of answers."""

import logging
import re
from collections.abc import Sequence
from os import PathLike
from pathlib import Path

from datasets import DatasetDict, concatenate_datasets

from . import instruct

logger = logging.getLogger(__name__)

DATA_URL = f"{instruct.REPOSITORY_URL}/main"
TRAINING_FILE = "commonsense_170k.json"
# The pattern of an answer, by data set.
ANSWERS = {
    "boolq": "true|false",
    "piqa": "solution[12]",
    "social_i_qa": "answer[1-5]",
    "hellaswag": "ending[1-4]",
    "winogrande": "option[12]",
    "ARC-Easy": "answer[1-5]",
    "ARC-Challenge": "answer[1-5]",
    "openbookqa": "answer[1-5]",
}
TEST_SETS = tuple(ANSWERS)


def load_commonsense(data_dir: str | PathLike | None = None, test_sets: Sequence[str] = TEST_SETS) -> DatasetDict:
    """
    Load the task's data.

    Args:
        data_dir (`str` or `os.PathLike`, *optional*): Folder that holds commonsense/NAME/test.json, and for training
            commonsense/commonsense_170k.json. If the latter is missing, the folder needs a commonsense/NAME/train.json
            of some of the eight data sets. These are joined and shuffled, so that the first records are a mix too. The
            address of a folder has to have commonsense_170k.json. Defaults to the public address of the data.
        test_sets (`Sequence[str]`, *optional*, defaults to all eight): Names of the test sets to load.

    Returns:
        [`~datasets.DatasetDict`]: The records of `train` and of each test set by name, see [`instruct.load_records`].

    Raises:
        `FileNotFoundError`: If a file is missing, or cannot be reached.
        `ValueError`: If a file has another form, or a test set is not one of the eight.
    """
    for name in test_sets:
        _check_name(name)
    if data_dir is None:
        training = {"train": f"{DATA_URL}/ft-training_set/{TRAINING_FILE}"}
        testing = {name: f"{DATA_URL}/dataset/{name}/test.json" for name in test_sets}
    else:
        root = f"{str(data_dir).rstrip('/')}/commonsense"
        training = _training_files(root)
        testing = {name: f"{root}/{name}/test.json" for name in test_sets}
    tests = instruct.load_records(testing)
    parts = list(instruct.load_records(training).values())
    train = parts[0] if len(parts) == 1 else concatenate_datasets(parts).shuffle(seed=0)
    return DatasetDict({"train": train, **tests})


def _training_files(root: str) -> dict[str, str]:
    whole = f"{root}/{TRAINING_FILE}"
    if "://" in root or Path(whole).is_file():
        return {"train": whole}
    parts = {name: f"{root}/{name}/train.json" for name in TEST_SETS}
    there = {name: file for name, file in parts.items() if Path(file).is_file()}
    if not there:
        raise FileNotFoundError(f"There is neither {whole} nor a train.json in {root}/NAME, so nothing to train on.")
    logger.warning(
        "There is no %s. Training on the training files of %s; missing are those of %s.",
        whole,
        ", ".join(there),
        ", ".join(name for name in parts if name not in there) or "none",
    )
    return there


def _check_name(dataset: str) -> None:
    if dataset not in ANSWERS:
        raise ValueError(f"There is no commonsense data set {dataset!r}. Choose from {', '.join(ANSWERS)}.")


def extract_answer(dataset: str, text: str) -> str:
    """
    Find the first answer in a response. Upper and lower case differ.

    Args:
        dataset (`str`): The name of the data set. Answers of `"boolq"` are true or false, those of `"piqa"` solution1
            or solution2, those of `"hellaswag"` ending1 to ending4, those of `"winogrande"` option1 or option2, and
            those of the others answer1 to answer5.
        text (`str`): The response.

    Returns:
        `str`: The answer, or an empty text if there is none.

    Raises:
        `ValueError`: If there is no such data set.
    """
    _check_name(dataset)
    found = re.search(ANSWERS[dataset], text)
    return found.group() if found else ""


def judge(test_set: str, response: str, answer: str) -> tuple[str, bool]:
    """Find the answer in a response, see [`extract_answer`]; returns it, and whether it is the right one."""
    prediction = extract_answer(test_set, response)
    return prediction, prediction == answer
