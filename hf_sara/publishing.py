"""What may be published of a training: its settings, its log and its state, without secrets and paths of this machine.

The card, training_args.json and the published trainer_state.json take what they show from here, and from nowhere else.
What is left out is counted and not named, because a name may tell something too.
"""

import json
import logging
import math
import os
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

from transformers import TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME

from .records import read_json

logger = logging.getLogger(__name__)

# This readable file replaces training_args.bin, which is a pickle with the Hub token in clear text.
TRAINING_ARGS_FILE = "training_args.json"
LEFT_OUT = "fields_left_out"
MOST_BYTES_OF_ARGUMENTS = 2**20

# The fields of transformers' own training arguments that hold neither a path nor a secret. One that a later version
# adds is left out until it stands here.
ARGUMENTS = """
accelerator_config activation_checkpointing activation_checkpointing_kwargs adam_beta1 adam_beta2 adam_epsilon
auto_find_batch_size average_tokens_across_devices batch_eval_metrics bf16 bf16_full_eval data_seed
dataloader_drop_last dataloader_in_order dataloader_num_workers dataloader_persistent_workers dataloader_pin_memory
dataloader_prefetch_factor ddp_find_unused_parameters disable_tqdm eval_accumulation_steps eval_delay
eval_do_concat_batches eval_on_start eval_steps eval_strategy eval_use_gather_object fp16 fp16_full_eval
full_determinism generation_max_length generation_num_beams gradient_accumulation_steps gradient_checkpointing
gradient_checkpointing_kwargs greater_is_better group_by_length hub_strategy ignore_data_skip include_for_metrics
include_num_input_tokens_seen label_names label_smoothing_factor learning_rate length_column_name
liger_kernel_config load_best_model_at_end logging_first_step logging_nan_inf_filter logging_steps logging_strategy
lr_scheduler_kwargs lr_scheduler_type max_grad_norm max_steps metric_for_best_model neftune_noise_alpha
num_train_epochs optim optim_target_modules per_device_eval_batch_size per_device_train_batch_size
predict_with_generate prediction_loss_only remove_unused_columns restore_callback_states_from_checkpoint
save_only_model save_steps save_strategy save_total_limit seed skip_memory_metrics sortish_sampler tf32
torch_compile torch_compile_backend torch_compile_mode torch_empty_cache_steps train_sampling_strategy use_cache
use_cpu use_liger_kernel warmup_ratio warmup_steps weight_decay
"""
KNOWN_ARGUMENTS = frozenset(ARGUMENTS.split())
# What people ask first of a training.
MAIN_ARGUMENTS = """
learning_rate lr_scheduler_type warmup_steps warmup_ratio max_steps num_train_epochs per_device_train_batch_size
gradient_accumulation_steps weight_decay max_grad_norm optim seed
"""
# The fields of a trainer's state, which is needed to resume. Those of callbacks are treated apart.
STATE = """
best_global_step best_metric epoch eval_steps global_step is_hyper_param_search is_local_process_zero
is_world_process_zero logging_steps max_steps num_input_tokens_seen num_train_epochs save_steps total_flos
train_batch_size
"""
KNOWN_STATE = frozenset(STATE.split())
KNOWN_CALLBACKS = ("TrainerControl", "EarlyStoppingCallback")

# A path that begins at the root, at a home or at a folder above, with a variable, or on a drive. What stands before it
# must not make it a part of something else: a fraction, a URL, the end of an HTML tag.
WINDOWS_ROOT = r"(?:[A-Za-z]:|~|\.{1,2}|%\w+%|\$env:\w+|\$\{env:\w+\})[/\\]|\\\\"
ROOT = rf"(?:file://|~[\w.-]*|\.{{1,2}}|\$\w+|\$\{{\w+\}}|%\w+%)?/|{WINDOWS_ROOT}"
# The folders of people often have a blank in their name on Windows, so a blank does not end a path of it that has a
# backslash further on. The lengths are bounded here too.
FOLDERS = r"""(?:[^\\/:*?"'`<>|,;\r\n]{0,100}\\){0,30}"""
PATH = re.compile(rf"""(?<![\w./\\<~$%{{}}])(?:(?:{WINDOWS_ROOT}){FOLDERS}|{ROOT})[^\s"'`,;)\]}}>|]+""")
WHOLE_PATH = re.compile(rf"(?:{ROOT}).+", re.DOTALL)
# A single letter before the colon is a drive.
URL = re.compile(r"\b([A-Za-z][A-Za-z0-9+.-]{1,20}://)([^/?#\s]*)(\S*)")
# A name and a password before a host. All lengths are bounded, so that a long text takes no long time.
CREDENTIALS = re.compile(r"(?<![^\s/@:])[^\s/@:]{1,100}:[^\s/@]{1,100}@(?=[\w.-])")


@dataclass(frozen=True)
class Published:
    """
    What may be published of some values.

    Args:
        values (`dict[str, Any]`): Names and plain JSON values.
        left_out (`int`): How many others there were.
    """

    values: dict[str, Any]
    left_out: int

    def to_json(self) -> str:
        """The values as the text of training_args.json."""
        return json.dumps({**self.values, LEFT_OUT: self.left_out}, indent=2) + "\n"


def published_arguments(args: TrainingArguments, chosen: Collection[str] = ()) -> Published:
    """
    The training arguments that may be published.

    Args:
        args ([`~transformers.TrainingArguments`]): The arguments, of any subclass.
        chosen (`Collection[str]`, *optional*): Names of a subclass's own fields that may be published too.

    Raises:
        `ValueError`: If there is no field of a chosen name.
    """
    values = args.to_dict()
    chosen = [chosen] if isinstance(chosen, str) else chosen
    unknown = sorted(set(chosen) - set(values))
    if unknown:
        raise ValueError(f"published_arguments names {unknown[0]!r}, and {type(args).__name__} has no such field.")
    found = _published(values, KNOWN_ARGUMENTS | set(chosen))
    refused = sorted(set(chosen) - set(found.values))
    if refused:
        logger.warning("%s is not published, because its value has a path or a secret, or is no plain value.", refused)
    return found


def _published(values: Mapping[str, Any], names: Collection[str]) -> Published:
    kept = {name: plain(value) for name, value in values.items() if name in names}
    kept = {
        name: value
        for name, value in kept.items()
        # Options of other libraries may be texts of any kind.
        if is_harmless(value) and not (isinstance(value, dict) and any(isinstance(v, str) for v in value.values()))
    }
    return Published(kept, len(values) - len(kept))


def published_file(name: str, content: bytes) -> bytes | None:
    """
    The content of a file as it may be published, or `None` if nothing of it may. Files that an earlier version wrote,
    and those that have to be whole for resuming, hold more than that.
    """
    base = os.path.basename(name)
    if base not in (TRAINING_ARGS_FILE, TRAINER_STATE_NAME):
        return content
    try:
        # Trainer writes numbers like NaN, which are not JSON.
        record = json.loads(content.decode())
        if type(record) is not dict:
            raise ValueError("it is not a JSON object")
    except (ValueError, RecursionError) as error:
        logger.warning("%s is not published, because it is damaged: %s", name, error)
        return None
    if base == TRAINER_STATE_NAME:
        return (json.dumps(published_state(record), indent=2, sort_keys=True) + "\n").encode()
    left_out = record.pop(LEFT_OUT, None)
    # Without the count, the file is of an earlier version, which wrote every field.
    found = _published(record, KNOWN_ARGUMENTS if left_out is None else record)
    return Published(found.values, found.left_out + (left_out if type(left_out) is int else 0)).to_json().encode()


def main_settings(folder: Path) -> dict[str, Any]:
    """The main settings in the training_args.json of a folder. There are none if the file is missing or damaged."""
    try:
        record = read_json(folder / TRAINING_ARGS_FILE, MOST_BYTES_OF_ARGUMENTS)
    except (OSError, ValueError):
        return {}
    # max_steps is -1 where it does not count, and the number of epochs does not where it is given.
    idle = "num_train_epochs" if record.get("max_steps", -1) != -1 else None
    found = {name: record[name] for name in MAIN_ARGUMENTS.split() if record.get(name, -1) != -1 and name != idle}
    return {name: value for name, value in found.items() if type(value) in (int, float, str)}


def published_state(record: Mapping[str, Any]) -> dict[str, Any]:
    """The state of a trainer as it may be published. A training can be resumed with it."""
    state = {name: value for name, value in record.items() if name in KNOWN_STATE and is_harmless(value)}
    callbacks = record.get("stateful_callbacks")
    return {
        **state,
        "log_history": published_log(record.get("log_history") or ()),
        # The trainer that resumes finds this folder by the step.
        "best_model_checkpoint": None,
        "trial_name": None,
        "trial_params": None,
        "stateful_callbacks": {
            name: value
            for name, value in (callbacks if isinstance(callbacks, dict) else {}).items()
            if name in KNOWN_CALLBACKS and is_harmless(value)
        },
    }


def published_log(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The rows of a trainer's log, which hold numbers. What else a callback may have logged is left out."""
    return [
        {name: value for name, value in row.items() if isinstance(value, (int, float)) and is_harmless(str(name))}
        for row in rows
        if isinstance(row, Mapping)
    ]


# ---- values and texts ----


def plain(value: Any) -> Any:
    """A value as plain JSON. A URL loses its user, its password and its query."""
    if isinstance(value, Enum):
        return plain(value.value)
    if isinstance(value, str) and URL.fullmatch(value) and not value.lower().startswith("file://"):
        return published_text(value)
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [plain(item) for item in value]
    return value


def is_harmless(value: Any) -> bool:
    """Whether a plain JSON value is made of numbers, and of texts that hold neither a path nor a secret."""
    if isinstance(value, str):
        return published_text(value) == value
    if isinstance(value, Mapping):
        return all(is_harmless(item) for pair in value.items() for item in pair)
    if isinstance(value, list):
        return all(map(is_harmless, value))
    return value is None or isinstance(value, (bool, int, float))


def published(value: Any) -> Any:
    """A value whose texts are without paths and secrets, see [`published_text`]."""
    if isinstance(value, str):
        return published_text(value)
    if isinstance(value, Mapping):
        return {published(key): published(item) for key, item in value.items()}
    return [published(item) for item in value] if isinstance(value, list) else value


def published_text(text: str) -> str:
    """
    A text without paths and secrets: of each path its last name is left, and of each URL its host and its path,
    without user, password and query.
    """
    if WHOLE_PATH.fullmatch(text) or (re.search(r"[/\\]", text) and os.path.exists(text)):
        # A path may have blanks in it.
        return _last_name(text)
    urls: list[str] = []

    def keep(match: re.Match) -> str:
        host, rest = match[2], match[3]
        if ":" in host and "@" not in host and "@" in rest and not host.rsplit(":", 1)[1].isdigit():
            # A password may have a slash in it, and is followed by an @.
            host, rest = rest.rsplit("@", 1)[1], ""
        urls.append(match[1] + host.rsplit("@", 1)[-1] + re.split("[?#;]", rest, maxsplit=1)[0])
        return f"\0{len(urls) - 1}\0"

    without = URL.sub(lambda match: match[0] if match[1].lower() == "file://" else keep(match), text.replace("\0", ""))
    without = PATH.sub(lambda match: _last_name(match[0]), CREDENTIALS.sub("", without))
    return re.sub(r"\0(\d+)\0", lambda match: urls[int(match[1])], without)


def _last_name(path: str) -> str:
    return re.split(r"[/\\]", path.rstrip("/\\"))[-1]
