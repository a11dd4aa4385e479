"""The E2E task as a recipe runs it: fine-tune on restaurant descriptions, decode them into a file, score them."""

import itertools
from collections.abc import Callable, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import PreTrainedModel
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from hf_sara.model_card import Sample
from hf_sara.tasks import e2e, e2e_metrics
from hf_sara.tasks.e2e import beam_search, decode_text, encode_prompts, eos_tokens

from .arguments import RunArguments
from .demo_data import make_demo_data
from .predictions import decode_to_file, first_row
from .run_folder import write_json
from .task import Splits, Task

PREDICTIONS_FILE = "predictions.jsonl"


class E2ETrainerMixin:
    """This makes a Trainer's evaluation loss the plain cross-entropy also where training smooths its labels."""

    def prediction_step(self, *args, **kwargs):
        smoothing = self.label_smoother, self.compute_loss_func
        self.label_smoother = self.compute_loss_func = None
        try:
            return super().prediction_step(*args, **kwargs)
        finally:
            self.label_smoother, self.compute_loss_func = smoothing


class E2ETask(Task):
    """Descriptions of restaurants from meaning representations; its options are those of recipes/run_e2e.py."""

    title = "E2E NLG"
    demo_title = "restaurant data made by hf_sara"
    dataset_id = "e2e_nlg"
    without_dropout = True
    trainer_mixin = E2ETrainerMixin

    def asked(self, options: RunArguments) -> dict[str, Any]:
        return {"max_test_mrs": options.max_test_mrs}

    def check_scoring(self, options: RunArguments) -> None:
        if options.max_test_mrs != 0:
            e2e_metrics.E2EMetrics()

    def make_demo_data(self, folder: str | PathLike) -> Path:
        return make_demo_data(folder)

    def load(self, options: RunArguments, data_dir: str | PathLike | None, seed: int) -> Splits:
        data = e2e.load_e2e(data_dir)
        validation = data["validation"]
        if options.max_eval_samples is not None:
            validation = validation.select(range(min(options.max_eval_samples, len(validation))))
        groups = e2e.group_by_mr(data["test"])
        return Splits(data["train"], validation, dict(itertools.islice(groups.items(), options.max_test_mrs)))

    def encode(self, records: Dataset, tokenizer: PreTrainedTokenizerBase, options: RunArguments) -> Dataset:
        return e2e.encode_dataset(records, tokenizer, max_length=options.max_length)

    def make_collator(self, tokenizer: PreTrainedTokenizerBase) -> Callable[[list[dict[str, Any]]], Mapping[str, Any]]:
        return e2e.make_collator(tokenizer)

    def score(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        test: Mapping[str, Any],
        options: RunArguments,
        folder: Path,
    ) -> dict[str, float]:
        predictions = generate_predictions(
            model,
            tokenizer,
            list(test),
            folder / PREDICTIONS_FILE,
            batch_size=options.generation_batch_size,
            num_beams=options.num_beams,
            length_penalty=options.length_penalty,
            no_repeat_ngram_size=options.no_repeat_ngram_size,
            max_new_tokens=options.max_new_tokens,
        )
        references = list(test.values())
        write_json(folder / "references.json", references)
        return e2e_metrics.E2EMetrics().compute(predictions=predictions, references=references)

    def sample(self, tokenizer: PreTrainedTokenizerBase, options: RunArguments, folder: Path) -> Sample:
        first = first_row(folder / PREDICTIONS_FILE)
        # As in `encode_prompts`, the end token stands between an input and its text.
        return Sample(first["mr"] + str(tokenizer.eos_token), first["prediction"])

    def sizes(self, splits: Splits) -> dict[str, Any]:
        return {"test_mrs": len(splits.test)}

    def describe_test(self, test: Mapping[str, Any]) -> str:
        return f"test, {len(test)} meaning representations"

    def first_prompts(
        self, options: RunArguments, data_dir: str | PathLike | None, tokenizer: PreTrainedTokenizerBase
    ) -> dict[str, list[int]]:
        first = e2e.load_e2e(data_dir)["test"][0]
        return {"E2E": encode_prompts(tokenizer, [first["mr"]])[0]}


def generate_predictions(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    mrs: Sequence[str],
    path: str | PathLike,
    batch_size: int = 16,
    **search: Any,
) -> list[str]:
    """
    Decode a text for each meaning representation, into a file from which an interrupted call goes on.

    Args:
        model ([`~transformers.PreTrainedModel`]): The model, with its adapter.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): Its tokenizer.
        mrs (`Sequence[str]`): Distinct meaning representations.
        path (`str` or `os.PathLike`): JSON lines with `mr` and `prediction`. In the end they are in the order of
            `mrs`.
        batch_size (`int`, *optional*, defaults to 16): How many prompts are decoded together.
        search: Arguments of [`~hf_sara.tasks.e2e.beam_search`].

    Returns:
        `list[str]`: The texts, in the order of `mrs`.
    """
    prompts = encode_prompts(tokenizer, mrs)

    def decode(batch: list[int]) -> list[dict[str, str]]:
        outputs = beam_search(
            model, [prompts[index] for index in batch], eos_token_ids=eos_tokens(tokenizer), **search
        )
        return [
            {"mr": mrs[index], "prediction": decode_text(tokenizer, output)}
            for index, output in zip(batch, outputs, strict=True)
        ]

    rows = decode_to_file(path, "mr", mrs, [len(prompt) for prompt in prompts], decode, batch_size)
    return [row["prediction"] for row in rows]
