"""The math task (paper, tables 1 and 5): word problems, answered with a rationale."""

import math
import re
from collections.abc import Sequence
from os import PathLike

from datasets import DatasetDict

from . import instruct

# The paper trains and tests on the split of an early commit. Later commits have other test sets.
DATA_URL = f"{instruct.REPOSITORY_URL}/bffe56c"
TEST_SETS = ("SVAMP", "AQuA", "AddSub", "MultiArith", "SingleEq", "gsm8k")
# The answers of this test set are letters. Those of the others are numbers.
LETTERS = "AQuA"
TOLERANCE = 0.001


def load_math(data_dir: str | PathLike | None = None, test_sets: Sequence[str] = TEST_SETS) -> DatasetDict:
    """
    Load the task's data.

    Args:
        data_dir (`str` or `os.PathLike`, *optional*): Folder, or address of one, that holds math/train.json and
            math/test/NAME.json. Defaults to the public address of the data.
        test_sets (`Sequence[str]`, *optional*, defaults to all six): Names of the test sets to load.

    Returns:
        [`~datasets.DatasetDict`]: The records of `train` and of each test set by name, see [`instruct.load_records`].

    Raises:
        `FileNotFoundError`: If a file is missing, or cannot be reached.
        `ValueError`: If a file has another form, or an answer is no number although it has to be one.
    """
    if data_dir is None:
        files = {"train": f"{DATA_URL}/math_data.json"}
        files |= {name: f"{DATA_URL}/dataset/{name}/test.json" for name in test_sets}
    else:
        root = str(data_dir).rstrip("/")
        files = {"train": f"{root}/math/train.json"}
        files |= {name: f"{root}/math/test/{name}.json" for name in test_sets}
    data = instruct.load_records(files)
    for name in test_sets:
        for number, answer in enumerate(data[name]["answer"], start=1):
            if name != LETTERS and not _is_number(answer):
                raise ValueError(f"{files[name]}, record {number}: the answer {answer!r} is not a number.")
    return data


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


def extract_number(text: str) -> float:
    """The last number of a text, or infinity if there is none. Commas between digits are ignored."""
    numbers = re.findall(r"-?\d+\.?\d*", text.replace(",", ""))
    return float(numbers[-1]) if numbers else math.inf


def extract_letter(text: str) -> str:
    """The first of the letters A to E anywhere in a text, as in the original, or an empty text if there is none."""
    letter = re.search("[A-E]", text)
    return letter.group() if letter else ""


def judge(test_set: str, response: str, answer: str) -> tuple[str | float | None, bool]:
    """
    Compare a response with the right answer.

    Args:
        test_set (`str`): The name of the test set. The answers of AQuA are letters, those of the others numbers.
        response (`str`): The model's response.
        answer (`str`): The right answer.

    Returns:
        `tuple[str | float | None, bool]`: What was extracted from the response (`None` if it has no number), and
        whether that is right. A number is right if it differs by at most 0.001.
    """
    if test_set == LETTERS:
        letter = extract_letter(response)
        return letter, letter == answer
    number = extract_number(response)
    return (None if math.isinf(number) else number), abs(float(answer) - number) <= TOLERANCE
