"""The parts that the math and the commonsense task share (paper, tables 1 and 2): records, prompt, encoding, answers.

All of it follows LLM-Adapters, as the paper does, including the white space of the prompts, which differs between
training and evaluation.
"""

from collections.abc import Mapping
from pathlib import Path

from datasets import Dataset, DatasetDict, Value, load_dataset
from datasets.exceptions import DatasetGenerationError
from transformers import DataCollatorForSeq2Seq
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from .data import IGNORED, data_pattern

REPOSITORY_URL = "https://raw.githubusercontent.com/AGI-Edgerunners/LLM-Adapters"
COLUMNS = ("instruction", "input", "output", "answer")
# The original pads with id 0, whatever the tokenizer's pad token is. LLaMA's id 0 is <unk>.
PAD_ID = 0
RESPONSE = "### Response:"

TASK = "Below is an instruction that describes a task"
WITH_INPUT = ", paired with an input that provides further context"
REQUEST = ". Write a response that appropriately completes the request."
INDENT = " " * 16


# ---- data ----


def load_records(files: Mapping[str, str]) -> DatasetDict:
    """
    Load files of instruction records.

    Args:
        files (`Mapping[str, str]`): The path or the address of each data set's file, by the name of the set. A file is
            a JSON list (or JSON lines) of records with the strings `instruction`, `input`, `output` and `answer`.

    Returns:
        [`~datasets.DatasetDict`]: The records by name.

    Raises:
        `FileNotFoundError`: If a file is missing, or cannot be reached.
        `ValueError`: If a file has another form.
    """
    missing = [file for file in files.values() if "://" not in file and not Path(file).is_file()]
    if missing:
        raise FileNotFoundError(f"The data are incomplete: there is no {', '.join(missing)}.")
    return DatasetDict({name: _load(file) for name, file in files.items()})


def _load(file: str) -> Dataset:
    try:
        records = load_dataset("json", data_files=data_pattern(file), split="train")
    except OSError as error:
        raise FileNotFoundError(
            f"The data cannot be had from {file} ({error}). Download them, and give their folder as data_dir."
        ) from error
    except (DatasetGenerationError, StopIteration, ValueError) as error:
        raise ValueError(f"{file} is not a JSON list of records: {error.__cause__ or error}.") from error
    for column in COLUMNS:
        if column not in records.column_names or records.features[column] != Value("string"):
            raise ValueError(f"{file}: {column!r} has to be a string in every record, and is not.")
        for number, value in enumerate(records[column], start=1):
            if value is None:
                raise ValueError(f"{file}, record {number} has no {column!r}.")
    return records.select_columns(list(COLUMNS))


# ---- prompt and encoding ----


def make_prompt(instruction: str, input: str = "", training: bool = False, with_input: bool = False) -> str:
    """
    Make the prompt of LLM-Adapters, which is the same to the character.

    Args:
        instruction (`str`): The question.
        input (`str`, *optional*, defaults to `""`): Further context, which has a section of its own.
        training (`bool`, *optional*, defaults to `False`): Make the prompt for training, to which the output is
            appended. Its white space differs from that of the prompt for evaluation.
        with_input (`bool`, *optional*, defaults to `False`): Take the form with an input even if the input is empty.
            The paper quotes the header of this form, but the original code takes the other one for the records of both
            tasks, whose inputs are all empty.

    Returns:
        `str`: The prompt, up to where the response begins.
    """
    with_input = with_input or bool(input)
    header = TASK + (WITH_INPUT if with_input else "") + REQUEST + " " * (int(training) + int(not with_input))
    sections = [f"{INDENT}### Instruction:\n{INDENT}{instruction}"]
    if with_input:
        sections.append(f"{INDENT}### Input:\n{INDENT}{input}")
    sections.append(f"{INDENT}{RESPONSE}\n{INDENT}")
    return f"{header}\n\n" + (f"\n{INDENT}\n" if training else "\n\n").join(sections)


def encode_dataset(
    records: Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int = 256, with_input: bool = False
) -> Dataset:
    """
    Encode records as one text of prompt and output. The loss counts all of it.

    As in the original, the first token of an output may contain the prompt's last space if the output follows it
    directly, as in the commonsense data. In decoding, the model begins behind that space. Outputs of the math data
    begin with a line break, so this does not happen there.

    Args:
        records ([`~datasets.Dataset`]): The records, see [`load_records`].
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): A tokenizer with an EOS token, which ends every example
            that is shorter than `max_length`. It also adds what it adds to any text, as LLaMA's adds a BOS.
        max_length (`int`, *optional*, defaults to 256): The end of a longer example is cut off, and it has no EOS.
        with_input (`bool`, *optional*, defaults to `False`): See [`make_prompt`].

    Returns:
        [`~datasets.Dataset`]: The examples with the columns `input_ids`, `attention_mask`, `labels` and `length`.

    Raises:
        `ValueError`: If the tokenizer has no EOS token.
    """
    eos = tokenizer.eos_token_id
    if eos is None:
        raise ValueError("The tokenizer has no EOS token, which ends every response. Set tokenizer.eos_token.")

    def encode(batch: dict[str, list[str]]) -> dict[str, list]:
        texts = [
            make_prompt(instruction, input, training=True, with_input=with_input) + output
            for instruction, input, output in zip(batch["instruction"], batch["input"], batch["output"], strict=True)
        ]
        rows = tokenizer(texts, truncation=True, max_length=max_length)["input_ids"]
        rows = [[*ids, eos] if len(ids) < max_length and ids[-1] != eos else ids for ids in rows]
        return {
            "input_ids": rows,
            "attention_mask": [[1] * len(ids) for ids in rows],
            "labels": rows,
            "length": [len(ids) for ids in rows],
        }

    return records.map(encode, batched=True, remove_columns=records.column_names, desc="Encoding")


def pad_left(tokenizer: PreTrainedTokenizerBase) -> None:
    """Let the tokenizer pad on the left, with id 0."""
    tokenizer.padding_side = "left"
    tokenizer.pad_token_id = PAD_ID


def make_collator(tokenizer: PreTrainedTokenizerBase) -> DataCollatorForSeq2Seq:
    """Make a collator that, as the original, pads on the left to a multiple of 8, with id 0 and labels of -100."""
    pad_left(tokenizer)
    return DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=IGNORED, pad_to_multiple_of=8)
