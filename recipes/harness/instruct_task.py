"""The math and the commonsense task as recipes run them: fine-tune on instructions, answer test sets, count."""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict
from transformers import GenerationConfig, PreTrainedModel
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from hf_sara.model_card import Sample
from hf_sara.tasks import instruct
from hf_sara.tasks.e2e import evaluating
from hf_sara.tasks.instruct import PAD_ID, RESPONSE, make_prompt, pad_left

from .instruct_settings import InstructArguments
from .predictions import decode_to_file, first_row
from .task import Splits, Task

logger = logging.getLogger(__name__)

PREDICTIONS_FOLDER = "predictions"


@dataclass(frozen=True)
class InstructTask(Task):
    """
    A task of instruction records, whose answers are judged right or wrong.

    Args:
        name (`str`): The name of the task.
        title (`str`): What a model card calls the data.
        load_records (`Callable`): Gets the data's folder and the names of test sets; returns the records, as
            [`~hf_sara.tasks.math.load_math`] does.
        judge (`Callable`): See [`answer_test_sets`].
        test_sets (`Sequence[str]`): The names of all test sets.
        fill_demo_folder (`Callable`): Gets a folder and writes the demo's data into it; returns the folder.
    """

    name: str
    title: str
    load_records: Callable[[str | PathLike | None, Sequence[str]], DatasetDict]
    judge: Callable[[str, str, str], tuple[Any, bool]]
    test_sets: Sequence[str]
    fill_demo_folder: Callable[[str | PathLike], Path]

    @property
    def demo_title(self) -> str:
        return f"{self.name} questions made by hf_sara"

    def asked(self, options: InstructArguments) -> dict[str, Any]:
        return {"max_test_samples": options.max_test_samples, "test_sets": options.test_sets}

    def check_scoring(self, options: InstructArguments) -> None:
        """Check nothing, because counting right answers needs no package that could be missing."""

    def make_demo_data(self, folder: str | PathLike) -> Path:
        return self.fill_demo_folder(folder)

    def load(self, options: InstructArguments, data_dir: str | PathLike | None, seed: int) -> Splits:
        data = self._load(options, data_dir)
        train, validation = _first(data.pop("train"), options.max_train_samples), None
        if options.val_set_size:
            parts = train.train_test_split(test_size=options.val_set_size, shuffle=True, seed=seed)
            train, validation = parts["train"], parts["test"]
        tests = {name: _first(part, options.max_test_samples) for name, part in data.items()}
        return Splits(train, validation, {} if options.max_test_samples == 0 else tests)

    def _load(self, options: InstructArguments, data_dir: str | PathLike | None) -> DatasetDict:
        return self.load_records(data_dir, options.test_sets or self.test_sets)

    def encode(self, records: Dataset, tokenizer: PreTrainedTokenizerBase, options: InstructArguments) -> Dataset:
        return instruct.encode_dataset(
            records, tokenizer, max_length=options.max_length, with_input=options.with_input
        )

    def make_collator(self, tokenizer: PreTrainedTokenizerBase) -> Callable[[list[dict[str, Any]]], Mapping[str, Any]]:
        return instruct.make_collator(tokenizer)

    def score(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        test: Mapping[str, Dataset],
        options: InstructArguments,
        folder: Path,
    ) -> dict[str, float]:
        accuracies = answer_test_sets(
            model,
            tokenizer,
            test,
            folder / PREDICTIONS_FOLDER,
            self.judge,
            batch_size=options.generation_batch_size,
            num_beams=options.num_beams,
            max_new_tokens=options.max_new_tokens,
            with_input=options.with_input,
        )
        return {f"accuracy_{name}": value for name, value in accuracies.items()}

    def sample(self, tokenizer: PreTrainedTokenizerBase, options: InstructArguments, folder: Path) -> Sample:
        first = first_row(folder / PREDICTIONS_FOLDER / f"{(options.test_sets or self.test_sets)[0]}.jsonl")
        return Sample(make_prompt(first["instruction"], with_input=options.with_input), first["response"])

    def sizes(self, splits: Splits) -> dict[str, Any]:
        tests = {name: len(part) for name, part in splits.test.items()}
        return {"train_records": len(splits.train), "test_records": tests}

    def describe_test(self, test: Mapping[str, Dataset]) -> str:
        return f"test, {sum(map(len, test.values()))} questions"

    def first_prompts(
        self, options: InstructArguments, data_dir: str | PathLike | None, tokenizer: PreTrainedTokenizerBase
    ) -> dict[str, list[int]]:
        data = self._load(options, data_dir)
        first = {name: records[0] for name, records in data.items() if name != "train"}
        prompts = {
            name: make_prompt(record["instruction"], record["input"], with_input=options.with_input)
            for name, record in first.items()
        }
        return {name: tokenizer(prompt)["input_ids"] for name, prompt in prompts.items()}


def _first(records: Dataset, size: int | None) -> Dataset:
    return records if size is None else records.select(range(min(size, len(records))))


def answer(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    records: Dataset,
    path: str | PathLike,
    judge: Callable[[str, str], tuple[Any, bool]],
    batch_size: int = 8,
    num_beams: int = 4,
    max_new_tokens: int = 256,
    with_input: bool = False,
) -> list[dict[str, Any]]:
    """
    Answer questions into a file, from which an interrupted call goes on. This is beam search without sampling. The
    original sets a temperature, which has no effect there.

    Args:
        model ([`~transformers.PreTrainedModel`]): The model with its adapter, or a `PeftModel`.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): Its tokenizer.
        records ([`~datasets.Dataset`]): Questions and their answers, see [`~hf_sara.tasks.instruct.load_records`].
        path (`str` or `os.PathLike`): JSON lines with the question, the response, what was extracted from it, the
            right answer, and whether they agree.
        judge (`Callable`): Gets a response and the right answer; returns what it extracts, and whether that is right.
        batch_size (`int`, *optional*, defaults to 8): How many questions are answered together.
        num_beams (`int`, *optional*, defaults to 4): The number of beams.
        max_new_tokens (`int`, *optional*, defaults to 256): The length of the longest response in tokens. It is 32 in
            the paper's commonsense runs.
        with_input (`bool`, *optional*, defaults to `False`): See [`~hf_sara.tasks.instruct.make_prompt`].

    Returns:
        `list[dict]`: The rows of the file, in the order of the questions.
    """
    pad_left(tokenizer)
    rows = list(records)
    prompts = [make_prompt(row["instruction"], row["input"], with_input=with_input) for row in rows]
    settings = GenerationConfig(
        num_beams=num_beams,
        do_sample=False,
        max_new_tokens=max_new_tokens,
        pad_token_id=PAD_ID,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )

    def decode(batch: list[int]) -> list[dict[str, Any]]:
        inputs = tokenizer([prompts[index] for index in batch], padding=True, return_tensors="pt").to(model.device)
        tokens = model.generate(**inputs, generation_config=settings)[:, inputs["input_ids"].shape[1] :]
        responses = tokenizer.batch_decode(tokens, skip_special_tokens=True)
        return [_row(index, rows[index], text, judge) for index, text in zip(batch, responses, strict=True)]

    lengths = [len(ids) for ids in tokenizer(prompts)["input_ids"]]
    with evaluating(model):
        return decode_to_file(path, "index", range(len(rows)), lengths, decode, batch_size)


def _row(
    index: int, record: dict[str, str], text: str, judge: Callable[[str, str], tuple[Any, bool]]
) -> dict[str, Any]:
    # A model that does not end its response may go on with another prompt.
    response = text.split(RESPONSE)[0].strip()
    prediction, correct = judge(response, record["answer"])
    return {
        "index": index,
        "instruction": record["instruction"],
        "response": response,
        "prediction": prediction,
        "answer": record["answer"],
        "correct": correct,
    }


def answer_test_sets(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    test_sets: Mapping[str, Dataset],
    folder: str | PathLike,
    judge: Callable[[str, str, str], tuple[Any, bool]],
    **generation,
) -> dict[str, float]:
    """
    Answer test sets and count what is right.

    Args:
        model ([`~transformers.PreTrainedModel`]): See [`answer`].
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): See [`answer`].
        test_sets (`Mapping[str, Dataset]`): The records of each test set, by its name.
        folder (`str` or `os.PathLike`): The folder that receives NAME.jsonl for each test set.
        judge (`Callable`): Gets the name of the test set, a response and the right answer; see [`answer`].
        generation: Further arguments of [`answer`].

    Returns:
        `dict[str, float]`: The accuracy of each test set in [0, 1], by name, and their unweighted mean as `average`.
    """
    Path(folder).mkdir(parents=True, exist_ok=True)
    accuracies = {}
    for name, records in test_sets.items():
        rows = answer(
            model,
            tokenizer,
            records,
            Path(folder, f"{name}.jsonl"),
            lambda response, right, name=name: judge(name, response, right),
            **generation,
        )
        accuracies[name] = sum(row["correct"] for row in rows) / len(rows)
        logger.info("%s: %.4f of %d right", name, accuracies[name], len(rows))
    return {**accuracies, "average": sum(accuracies.values()) / len(accuracies)}
