"""The folder of a run: its settings, its log, and whether it can be resumed or is finished."""

import json
import logging
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainingArguments

from hf_sara.files import write_file

from .options import RecipeError

logger = logging.getLogger(__name__)

SETTINGS_FILE = "settings.json"
LOG_FILE = "run.log"

# These TrainingArguments do not change what a run computes, so a run may be resumed with other values of them.
HARMLESS = ("logging_", "save_", "report_to", "disable_tqdm", "run_name", "project", "trackio", "hub_", "push_to_hub")
HARMLESS += ("output_dir", "log_level", "dataloader_", "per_device_eval", "eval_accumulation", "resume", "skip_memory")
HARMLESS += ("local_rank", "do_", "torch_empty_cache", "enable_jit_checkpoint", "debug", "restore_callback")
# These options say how much is decoded and scored, and how much of it at once. They do not define a run, since more of
# it can be scored later without training again.
SCORING = ("max_test_", "test_sets", "generation_batch_size")
# With a plan or without, the ranks are the same.
SAME_RESULT = ("plan",)
# A folder that holds nothing else has no work in it that could be lost. The demo's data are the same every time.
BEFORE_WORK = (SETTINGS_FILE, LOG_FILE, "data")


def open_run(training: TrainingArguments, **others: Any) -> Path:
    """
    Make the folder of a run, or return to it. The settings are written into it. Once there is work in the folder, a
    later call has to have the same settings.

    Args:
        training ([`~transformers.TrainingArguments`]): Its `output_dir` is the folder.
        others: Instances of dataclasses by name. Their fields also define the run, except for those that say how much
            is scored.

    Returns:
        `Path`: The folder. From now on, its file run.log receives all that is logged.

    Raises:
        [`RecipeError`]: If the folder holds a run with other settings; the message names them. Nothing is changed
            then.
    """
    folder = Path(training.output_dir)
    settings = {
        name: {key: value for key, value in asdict(instance).items() if not key.startswith((*SCORING, *SAME_RESULT))}
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
    Read the metrics of a finished run, if as much of it was scored as is asked for now.

    Args:
        path (`Path`): The metrics.json of the run.
        asked (`Mapping[str, Any]`): How much is to be scored. The metrics hold the same entries.

    Returns:
        `dict[str, Any]`, *optional*: The metrics; `None` if the run is not finished, or if more or less was scored.
    """
    metrics = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
    if metrics is None or any(metrics.get(name) != value for name, value in asked.items()):
        return None
    logger.warning("%s is complete; its metrics are there. Delete the file to score again.", path)
    return metrics


def _log_to(path: Path) -> None:
    """From now on, log to this file, and no longer to that of an earlier run in this process."""
    handler = logging.FileHandler(path, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    handler.set_name(LOG_FILE)
    for name in ("hf_sara", "harness", "transformers"):
        log = logging.getLogger(name)
        for old in [old for old in log.handlers if old.get_name() == LOG_FILE]:
            log.removeHandler(old)
            old.close()
        log.addHandler(handler)
    for name in ("hf_sara", "harness"):
        logging.getLogger(name).setLevel(logging.INFO)


class LogMetrics(TrainerCallback):
    """Trainer only shows its losses and scores on the terminal; this callback logs them too."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        if state.is_world_process_zero:
            logger.info("step %d: %s", state.global_step, json.dumps(logs))


def write_json(path: Path, content: Any) -> None:
    """Write JSON atomically, in a form that people can read."""
    write_file(path, (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode())
