"""The run that all recipes share: load, train, decode, score. A call that is repeated goes on where it stopped."""

import json
import logging
import time
from typing import Any

from transformers import TrainingArguments, set_seed

from hf_sara.trainer import last_complete_checkpoint

from .arguments import OURS, MethodArguments, RunArguments
from .base_models import load_base
from .baselines import DyLoraTrainer, make_trainer, report
from .card import write_card
from .run_folder import LogMetrics, finished_metrics, open_run, write_json
from .task import Task

logger = logging.getLogger(__name__)

METRICS_FILE = "metrics.json"


def run(task: Task, options: RunArguments, method: MethodArguments, training: TrainingArguments) -> dict[str, Any]:
    """
    Fine-tune a model on a task, and score it.

    Args:
        task ([`~harness.task.Task`]): The task.
        options ([`~harness.arguments.RunArguments`]): Its own options.
        method ([`~harness.arguments.MethodArguments`]): What is trained.
        training ([`~transformers.TrainingArguments`]): How it is trained; `output_dir` is the folder of the run.

    Returns:
        `dict[str, Any]`: What metrics.json holds. It is empty on all processes but the first.
    """
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    folder = open_run(training, recipe=options, method=method)
    asked = task.asked(options)
    finished = finished_metrics(folder / METRICS_FILE, asked)
    if finished is not None:
        return finished
    task.check_scoring(options)
    started = time.monotonic()

    # ---- data and model ----
    set_seed(training.seed)
    data_dir = task.make_demo_data(folder / "data") if options.demo and not options.data_dir else options.data_dir
    splits = task.load(options, data_dir, training.seed)
    model, tokenizer = load_base(options.model_name_or_path, options.gguf_file, options.dtype, task.without_dropout)

    # ---- training ----
    trainer = make_trainer(
        method,
        mixin=task.trainer_mixin,
        plan=options.plan,
        model=model,
        args=training,
        train_dataset=task.encode(splits.train, tokenizer, options),
        eval_dataset=None if splits.validation is None else task.encode(splits.validation, tokenizer, options),
        processing_class=tokenizer,
        data_collator=task.make_collator(tokenizer),
    )
    trainer.add_callback(LogMetrics())
    if method.method in OURS:
        logger.info("%s", trainer.sara_adapter.plan())
    # A finished training is resumed too: its last checkpoint leaves nothing to do.
    start = last_complete_checkpoint(folder) or training.resume_from_checkpoint
    trained = trainer.train(resume_from_checkpoint=start)
    trainer.save_model()
    losses = {"train_loss": trained.training_loss}
    if splits.validation is not None:
        losses["eval_loss"] = trainer.evaluate()["eval_loss"]
        if isinstance(trainer, DyLoraTrainer):
            losses |= trainer.evaluate_ranks()
    if not trainer.is_world_process_zero():
        return {}
    # This is measured before the decoding, whose beams take memory of their own.
    costs = report(trainer)
    logger.info("Report: %s", json.dumps(costs))

    # ---- decoding and scores ----
    scores = task.score(trainer.model, tokenizer, splits.test, options, folder) if splits.test else {}
    metrics = {
        **scores,
        **losses,
        **costs,
        **asked,
        **task.sizes(splits),
        "seconds": time.monotonic() - started,
    }
    if method.method in OURS:
        write_card(
            trainer,
            options.model_name_or_path,
            scores,
            dataset=task.demo_title if options.demo else task.title,
            dataset_id=None if options.demo else task.dataset_id,
            split=task.describe_test(splits.test),
            sample=task.sample(tokenizer, options, folder) if splits.test else None,
        )
    write_json(folder / METRICS_FILE, metrics)
    logger.info("Metrics: %s", json.dumps(metrics))
    return metrics
