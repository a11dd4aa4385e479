"""On a GPU: ranks and factors of a weight, steps, memory and decoding, with the base and the peers in one run.

The shapes are those of LLaMA-7B, of which 8 layers stand for all, in bfloat16, and those of a Llama of 135M parameters
in float32, whose step is bound by the start of kernels. All weights are random. All contenders take turns, in random
order, and their activations have gradients down to the first layer. It takes about five minutes on an H100, and 30 GiB
of its memory. A part that fails leaves the others. Without a GPU it checks itself at tiny sizes.

    python benchmarks/gpu.py [--rounds 10] [--only init small steps decode compiled]
"""

import argparse
import os
import statistics
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from typing import Any

import torch
import transformers
from _common import WIDTH, interleave, sharing, table
from peft import LoraConfig, VeraConfig, get_peft_model
from transformers import CompileConfig, LlamaConfig, LlamaForCausalLM

from hf_sara import SaraAdapter, SaraArguments
from hf_sara.factors import Factors, find_factors
from hf_sara.planning import AdapterSpec
from hf_sara.sites import PlannedSite
from hf_sara.spectrum import find_rank, weight_digest
from hf_sara.targets import find_sites

TINY = not torch.cuda.is_available()
DEVICE = torch.device("cpu" if TINY else "cuda")


def finished(run: Callable[[], Any]) -> Callable[[], None]:
    """A function that returns when the GPU has done what it was told."""

    def call() -> None:
        run()
        if not TINY:
            torch.cuda.synchronize()

    return call


def attach(model: Any, args: SaraArguments, k: int) -> Any:
    """An adapter of a given rank with random factors, since the ranks of random weights say nothing."""
    sites = [PlannedSite.of(site, min(k, *site.shape)) for site in find_sites(model, args)]
    factors = {}
    if args.resolved_method().has_factors:
        for site in sites:
            left, right = (torch.linalg.qr(torch.randn(size, site.k, device=DEVICE))[0] for size in site.shape)
            factors[site.name] = Factors(left.cpu(), right.t().cpu().contiguous(), [])
    SaraAdapter(model, AdapterSpec(args, args.resolved_threshold(), sites, []), factors)
    return model


def contenders(base: Any, dropout: float, ranks: dict[str, int], heads: int) -> dict[str, Any]:
    """Models that share the weights of the base."""

    def lora(dora: bool = False) -> Any:
        settings = {"r": ranks["lora"], "lora_dropout": dropout, "target_modules": ["q_proj", "v_proj"]}
        return get_peft_model(sharing(base), LoraConfig(task_type="CAUSAL_LM", use_dora=dora, **settings))

    vera = VeraConfig(
        task_type="CAUSAL_LM", r=ranks["vera"], vera_dropout=dropout, target_modules=["q_proj", "v_proj"]
    )
    mo_sara = SaraArguments(method="mo_sara", num_heads=heads, dropout=dropout)
    return {
        "base": sharing(base),
        "SARA": attach(sharing(base), SaraArguments(dropout=dropout), ranks["sara"]),
        "LoRA": lora(),
        "Mo-SARA": attach(sharing(base), mo_sara, ranks["mo_sara"]),
        "VeRA": get_peft_model(sharing(base), vera),
        "DoRA": lora(dora=True),
    }


def init(rounds: int) -> None:
    n = 256 if TINY else 4096
    torch.manual_seed(0)
    # As a linear has it: stored as (d_out, d_in), and used as (d_in, d_out).
    weights = {"GPU": 0.02 * torch.randn(n, n, device=DEVICE).t()}
    weights["CPU"] = weights["GPU"].cpu()
    digest = weight_digest(weights["CPU"])

    def rank(weight: torch.Tensor) -> None:
        with tempfile.TemporaryDirectory() as folder:
            os.environ["HF_SARA_CACHE"] = folder
            find_rank(weight, 0.01, digest=digest)

    # An adapter computes the digest of a weight on the CPU, while the GPU works on the weight before.
    runs = {
        "torch.linalg.svd": lambda: torch.linalg.svd(weights["GPU"], full_matrices=False),
        "digest, CPU": lambda: weight_digest(weights["GPU"]),
    }
    for place, weight in weights.items():
        runs[f"rank, {place}"] = lambda weight=weight: rank(weight)
        runs[f"factors, {place}"] = lambda weight=weight: find_factors(
            weight, threshold=0.35, digest=digest, use_cache=False
        )
    found = interleave({name: finished(run) for name, run in runs.items()}, min(rounds, 3), warmup=1)
    show(f"One weight of {n} x {n}, float32", table(found, "torch.linalg.svd"))


def show(title: str, text: str) -> None:
    # What comes later may take minutes.
    print(f"\n{title}:\n\n{text}", flush=True)


def make_base(config: LlamaConfig, dtype: torch.dtype) -> Any:
    with DEVICE:
        torch.set_default_dtype(dtype)
        try:
            return LlamaForCausalLM(config).requires_grad_(False)
        finally:
            torch.set_default_dtype(torch.float32)


def steps(models: dict[str, Any], batch: int, length: int, rounds: int, title: str, **how: Any) -> None:
    """Time and memory of a step."""
    ids = torch.randint(0, models["base"].config.vocab_size, (batch, length), device=DEVICE)
    runs, memory = {}, {}
    for name, model in models.items():
        model.train()
        inner = inner_of(model)
        if how.get("checkpointing"):
            inner.gradient_checkpointing_enable()
        else:
            inner.gradient_checkpointing_disable()
        inner.enable_input_require_grads()
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(parameters, lr=1e-5, fused=True) if parameters else None

        def step(model: Any = model, optimizer: Any = optimizer) -> None:
            with torch.autocast(DEVICE.type, dtype=torch.bfloat16, enabled=bool(how.get("autocast"))):
                loss = model(input_ids=ids, labels=ids, use_cache=False).loss
            loss.backward()
            if optimizer is not None:
                optimizer.step()
                optimizer.zero_grad()

        runs[name] = finished(step)
    for name, run in runs.items():
        run()
        run()
        if not TINY:
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            run()
            memory[name] = f"{(torch.cuda.max_memory_allocated() - before) / 2**30:.2f} GiB at most above the weights"
    show(f"{title}, batch {batch} x {length}", table(interleave(runs, rounds), "base", memory))
    for model in models.values():
        inner_of(model).gradient_checkpointing_disable()
        inner_of(model).disable_input_require_grads()


def inner_of(model: Any) -> Any:
    """The model of transformers in one of PEFT."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def decode(models: dict[str, Any], rows: int, tokens: int, rounds: int, compiled: bool) -> None:
    ids = torch.randint(0, models["base"].config.vocab_size, (rows, 16), device=DEVICE)
    values: dict[str, Any] = {
        "max_new_tokens": tokens,
        "min_new_tokens": tokens,
        "do_sample": False,
        "pad_token_id": 0,
    }
    values["attention_mask"] = torch.ones_like(ids)
    if compiled:
        values |= {"cache_implementation": "static", "compile_config": CompileConfig(fullgraph=True)}
    runs = {}
    for name, model in models.items():
        model.eval()
        runs[name] = finished(lambda model=model: model.generate(input_ids=ids, **values))
    with torch.no_grad():
        seconds = interleave(runs, rounds, warmup=2)
    title = f"Decoding {tokens} tokens, {rows} row{'s' * (rows > 1)}{', compiled' * compiled}"
    speeds = {name: f"{rows * tokens / statistics.median(times):.0f} tokens/s" for name, times in seconds.items()}
    show(title, table(seconds, "base", speeds))


def small(rounds: int) -> None:
    config = LlamaConfig(num_hidden_layers=2 if TINY else 30, vocab_size=128 if TINY else 49152, **WIDTH)
    ranks = {"sara": 2, "lora": 2, "mo_sara": 20 if TINY else 808, "vera": 256}
    models = contenders(make_base(config, torch.float32), 0.05, ranks, 3)
    # Its steps are short, and the contenders are close to each other.
    steps(models, *((2, 8) if TINY else (16, 64)), 3 * rounds, "A step of a Llama of 135M, float32, dropout 0.05")


def large() -> dict[str, Any]:
    """Contenders of LLaMA-7B's shapes."""
    width = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4} if TINY else {}
    config = LlamaConfig(num_hidden_layers=2 if TINY else 8, vocab_size=128 if TINY else 32000, **width)
    ranks = {"sara": 9, "mo_sara": 20 if TINY else 808, "lora": 9, "vera": 1024}
    return contenders(make_base(config, torch.bfloat16), 0.05, ranks, 5)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=2 if TINY else 10)
    parts = ["init", "small", "steps", "decode", "compiled"]
    parser.add_argument("--only", nargs="*", choices=parts, default=parts)
    options = parser.parse_args()
    transformers.logging.set_verbosity_error()
    torch.manual_seed(0)
    start = time.perf_counter()
    print("a CPU, at tiny sizes" if TINY else torch.cuda.get_device_name(), f"torch {torch.__version__}", sep=", ")
    models: dict[str, Any] = {}

    def run_steps() -> None:
        size = (2, 8) if TINY else (16, 256)
        steps(models, *size, options.rounds, "A step in bfloat16, dropout 0.05")
        steps(models, *size, options.rounds, "The same with activation checkpointing", checkpointing=True)
        steps(models, *size, options.rounds, "The same with autocast", autocast=True)

    def run_decode() -> None:
        for rows in (1, 4 if TINY else 32):
            decode(models, rows, 4 if TINY else 64, options.rounds, compiled=False)

    def run_compiled() -> None:
        few = {name: models[name] for name in ("base", "SARA", "LoRA", "Mo-SARA")}
        decode(few, 1, 4 if TINY else 64, options.rounds, compiled=True)

    runs = {
        "init": lambda: init(options.rounds),
        "small": lambda: small(options.rounds),
        "steps": run_steps,
        "decode": run_decode,
        "compiled": run_compiled,
    }
    failed = []
    for name in parts:
        if name in options.only:
            try:
                if name in ("steps", "decode", "compiled") and not models:
                    models |= large()
                runs[name]()
            except Exception:
                traceback.print_exc()
                failed.append(name)
    print(f"\n{time.perf_counter() - start:.0f} s in all")
    if failed:
        sys.exit(f"Failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
