"""Peak memory and time of `hf-sara plan` on a checkpoint with the shapes of LLaMA-7B, beside `torch.linalg.svd`.

The checkpoint is made for the occasion: an index and four files of bf16 tensors, in which the query and value
projections of the chosen layers have values. The rest is a hole in the file, since a plan does not read it. The
command runs in a process of its own with an empty cache, and the memory of this process is measured. Then, in this
process, for the first of these layers, the plan of a layer and the SVD of its two matrices take turns.

    python benchmarks/plan.py [--layers 0-31] [--rounds 4] [--method sara] [--threshold 0.012]
"""

import argparse
import json
import os
import struct
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from _common import interleave, keep_memory, table
from spectrum import make_matrix
from transformers import LlamaConfig, LlamaForCausalLM

import hf_sara
from hf_sara import SaraArguments
from hf_sara.arguments import parse_layers
from hf_sara.base_model import BaseWeights
from hf_sara.spectrum import rank_for_threshold
from hf_sara.targets import find_sites

SHARDS = 4
LIMIT = 1.5e9


def make_checkpoint(folder: Path, layers: list[int]) -> None:
    """Write the checkpoint. Its files are 13.5 GB long, but take only 67 MB on disk for each layer with values."""
    # The defaults are LLaMA-7B's.
    config = LlamaConfig(architectures=["LlamaForCausalLM"], dtype="bfloat16")
    config.save_pretrained(folder)
    with torch.device("meta"):
        shapes = {name: tuple(tensor.shape) for name, tensor in LlamaForCausalLM(config).state_dict().items()}
    names = list(shapes)
    chosen = [f"model.layers.{layer}.self_attn.{kind}_proj.weight" for layer in layers for kind in "qv"]
    weight_map = {}
    for index in range(SHARDS):
        file = f"model-{index + 1:05}-of-{SHARDS:05}.safetensors"
        part = names[len(names) * index // SHARDS : len(names) * (index + 1) // SHARDS]
        weight_map.update(dict.fromkeys(part, file))
        header, end = {}, 0
        for name in part:
            start, end = end, end + 2 * torch.Size(shapes[name]).numel()
            header[name] = {"dtype": "BF16", "shape": shapes[name], "data_offsets": [start, end]}
        text = json.dumps(header).encode()
        with open(folder / file, "wb") as stream:
            stream.write(struct.pack("<Q", len(text)) + text)
            for name in set(part) & set(chosen):
                stream.seek(8 + len(text) + header[name]["data_offsets"][0])
                matrix = make_matrix(shapes[name][0], seed=chosen.index(name))
                stream.write(matrix.view(torch.uint8).numpy())
            stream.truncate(8 + len(text) + end)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def run_command(folder: Path, cache: str, options: argparse.Namespace) -> tuple[list[int], float, float]:
    """Ranks, peak memory in bytes, and seconds of the command in a process of its own."""
    command = [sys.executable, "-m", "hf_sara.cli", "plan", str(folder), "--json"]
    for name in ("layers", "method", "threshold"):
        command += [f"--{name}", str(getattr(options, name))]
    environment = {**os.environ, "HF_SARA_CACHE": cache, "HF_HUB_OFFLINE": "1"}
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, env=environment)
    output = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    assert status == 0
    # Linux counts in kilobytes, macOS in bytes.
    peak = usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return [site["k"] for site in json.loads(output)["sites"]], peak, time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", default="0-31")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--method", default="sara")
    parser.add_argument("--threshold", type=float, default=0.012)
    options = parser.parse_args()
    keep_memory()
    layers = sorted(parse_layers(options.layers))
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryDirectory() as cache:
        make_checkpoint(Path(folder), layers)
        ranks, peak, total = run_command(Path(folder), f"{cache}/command", options)
        checkpoint = BaseWeights(folder)
        os.environ["HF_SARA_CACHE"] = f"{cache}/turns"
        rounds = min(options.rounds, len(layers))
        turns = {name: iter(layers) for name in ("svd", "plan")}
        by_svd = []

        def plan() -> None:
            hf_sara.plan(folder, SaraArguments(threshold=options.threshold, layers=str(next(turns["plan"]))))

        def svd() -> None:
            for site in find_sites(checkpoint.model, SaraArguments(layers=str(next(turns["svd"])))):
                _, values, _ = torch.linalg.svd(checkpoint.weight(site).float(), full_matrices=False)
                by_svd.append(rank_for_threshold(values, options.threshold))

        seconds = interleave({"torch.linalg.svd": svd, "hf-sara plan": plan}, rounds, warmup=0)
    print(f"hf-sara plan of {len(ranks)} matrices of 4096 x 4096: peak memory {peak / 1e6:,.0f} MB, {total:.1f} s")
    print("\nSeconds for the two matrices of a layer, read from the files:\n")
    print(table(seconds, "torch.linalg.svd"))
    print(f"\nranks: {ranks}, the first by the SVD: {by_svd}")
    # The SVD is in float32, so its rank may be one off if a sum of singular values is close to the threshold.
    assert all(abs(one - other) <= 1 for one, other in zip(ranks[: len(by_svd)], by_svd, strict=True))
    assert peak < LIMIT


if __name__ == "__main__":
    main()
