"""Tensor operations of a step and of a decoding step, per site: how many kernels a GPU would have to start.

A small random Llama is profiled on the CPU with an adapter and without, on the path that a GPU takes for outputs of
such a size. The difference is printed, divided by the number of sites. Views count nothing, and an operation that
calls others counts as those. At the sizes at which a step is bound by the start of its kernels, this number is what an
adapter costs.

    python benchmarks/operations.py [--by_name] [--as_on_cpu]
"""

import argparse
import copy
from collections import Counter

import torch
import transformers
from peft import LoraConfig, VeraConfig, get_peft_model
from torch.profiler import ProfilerActivity, profile

from hf_sara import SaraAdapter, SaraArguments
from hf_sara.methods import mo_sara, sara

VIEWS = {
    *("view", "_unsafe_view", "reshape", "t", "transpose", "permute", "expand", "unsqueeze", "squeeze", "as_strided"),
    *("slice", "select", "detach", "alias", "narrow", "unbind", "split", "split_with_sizes", "flatten", "unflatten"),
    *("chunk", "tensor_split", "view_as", "expand_as", "lift_fresh", "_reshape_alias", "numpy_T", "mT", "movedim"),
    *("empty", "empty_like", "empty_strided", "resize_", "result_type", "is_nonzero", "item", "_local_scalar_dense"),
    *("promote_types", "contiguous", "to", "type_as", "conj", "resolve_conj", "resolve_neg", "set_", "requires_grad_"),
}


def count(run) -> Counter:
    """The operations of a call, and of what it calls, that do something."""
    run()
    with profile(activities=[ProfilerActivity.CPU]) as found:
        run()
    names: Counter[str] = Counter()
    for event in found.events():
        name = event.name.removeprefix("aten::")
        inner = [child for child in event.cpu_children if child.name.startswith("aten::")]
        inner = [child for child in inner if child.name.removeprefix("aten::") not in VIEWS]
        if event.name.startswith("aten::") and name not in VIEWS and not inner:
            names[name] += 1
    return names


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--by_name", action="store_true", help="print which operations they are")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--as_on_cpu", action="store_true", help="the path of the CPU, with gradients of our own")
    options = parser.parse_args()
    if not options.as_on_cpu:
        for module in (sara, mo_sara):
            module.own_gradients_pay = lambda output: False
    transformers.logging.set_verbosity_error()
    torch.manual_seed(0)
    width = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = transformers.LlamaConfig(vocab_size=64, num_hidden_layers=4, **width)
    base = transformers.LlamaForCausalLM(config).to(getattr(torch, options.dtype)).requires_grad_(False)
    ids = torch.randint(0, 64, (4, 12))
    sites = 2 * config.num_hidden_layers

    def ours(**arguments):
        def attach(model, dropout):
            SaraAdapter.attach(model, SaraArguments(dropout=dropout, **arguments))
            return model

        return attach

    def lora(model, dropout):
        settings = {"r": 4, "lora_dropout": dropout, "target_modules": ["q_proj", "v_proj"]}
        return get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **settings))

    def vera(model, dropout):
        settings = {"r": 16, "vera_dropout": dropout, "target_modules": ["q_proj", "v_proj"]}
        return get_peft_model(model, VeraConfig(task_type="CAUSAL_LM", **settings))

    makers = {
        "SARA": ours(threshold=0.1),
        "Mo-SARA, 5 heads": ours(method="mo_sara", num_heads=5),
        "Mo-SARA, 1 head": ours(method="mo_sara", num_heads=1),
        "LoRA": lora,
        "VeRA": vera,
    }

    def step(model):
        model.train()
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        for parameter in model.parameters():
            parameter.grad = None

    def decode(model):
        model.eval()
        with torch.no_grad():
            model(input_ids=ids[:, :1], use_cache=False)

    def plain():
        model = copy.deepcopy(base)
        model.enable_input_require_grads()
        return model

    rows = []
    for title, make in makers.items():
        cells = [title]
        for run, dropout in ((step, 0.05), (step, 0.0), (decode, 0.0)):
            model = make(copy.deepcopy(base), dropout)
            without = plain()
            extra = count(lambda run=run, model=model: run(model))
            extra.subtract(count(lambda run=run, without=without: run(without)))
            cells.append(f"{sum(extra.values()) / sites:.1f}")
            if options.by_name:
                named = ", ".join(f"{name} {n / sites:.2g}" for name, n in extra.most_common() if n)
                print(f"{title}, {run.__name__}, dropout {dropout}: {named}")
        rows.append(cells)
    print("| operations per site | step, dropout 0.05 | step | decoding |\n|---|---|---|---|")
    for cells in rows:
        print(f"| {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
