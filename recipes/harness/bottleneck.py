"""Four kinds of bottleneck adapters, baselines of the paper that PEFT does not have.

Series and parallel adapters are those of LLM-Adapters: `up(tanh(down(dropout(x))))` without biases. Adapter-H (Houlsby
et al., 2019) stands behind the attention and behind the feed-forward block, and Adapter-L (Lin et al., 2020) behind
the latter alone, with a layer norm of its own in front: `up(relu(down(dropout(norm(x)))))` with biases. Like an update
of SARA, an adapter is a child module of the linear that it adapts, and a hook adds it, so the model stays the
`PreTrainedModel` that it was. (The library `adapters` has these kinds, but requires transformers 4.57.)
"""

import json
from collections.abc import Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from safetensors.torch import save as safetensors_bytes
from torch import nn

from hf_sara.arguments import SaraArguments
from hf_sara.errors import AdapterError
from hf_sara.files import write_file
from hf_sara.sites import Site, all_sites
from hf_sara.targets import find_sites
from hf_sara.tensor_files import check_tensors

CONFIG_FILE = "bottleneck_config.json"
TENSORS_FILE = "bottleneck_adapter.safetensors"

GATED = ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "granite", "olmo", "stablelm")
# The linears that each kind adapts by model type, if `target_modules` is left open.
DEFAULT_TARGETS = {
    "series_adapter": {
        **dict.fromkeys(GATED, ("gate_proj", "up_proj", "down_proj")),
        "gptj": ("fc_in", "fc_out"),
        "gpt2": ("mlp.c_fc", "mlp.c_proj"),
    },
    "parallel_adapter": {
        **dict.fromkeys((*GATED, "gptj"), ("q_proj", "k_proj", "v_proj")),
        "gpt2": ("c_attn.q", "c_attn.k", "c_attn.v"),
    },
    "adapter_l": {**dict.fromkeys(GATED, ("down_proj",)), "gptj": ("fc_out",), "gpt2": ("mlp.c_proj",)},
    "adapter_h": {
        **dict.fromkeys(GATED, ("o_proj", "down_proj")),
        "gptj": ("attn.out_proj", "fc_out"),
        "gpt2": ("attn.c_proj", "mlp.c_proj"),
    },
}
# These change the whole output of a linear.
BEHIND = ("adapter_l", "adapter_h")


class Bottleneck(nn.Module):
    """
    One adapter, in float32. A series or parallel one has (d_in + d_out) size parameters, which are drawn from a normal
    distribution with a standard deviation of 0.02 at the start. Adapter-H and Adapter-L have size + d_out biases too,
    which start at zero, and weights with a standard deviation of 0.01, cut off at twice that. Adapter-L has a layer
    norm of 2 d_in parameters.

    Args:
        method (`str`): The kind of adapter.
        site ([`Site`]): The weight matrix that it adapts.
        shape (`tuple[int, int]`): (d_in, d_out) of the adapter.
        size (`int`): Width of the bottleneck.
        dropout (`float`): Dropout on its input.
        device (`torch.device`): Where the base weight is.
    """

    def __init__(
        self, method: str, site: Site, shape: tuple[int, int], size: int, dropout: float, device: torch.device
    ):
        super().__init__()
        self.slice = site.slice
        self.dropout = nn.Dropout(dropout)
        own = {"device": device, "dtype": torch.float32}
        behind = method in BEHIND
        self.norm = nn.LayerNorm(shape[0], **own) if method == "adapter_l" else nn.Identity()
        self.down = nn.Linear(shape[0], size, bias=behind, **own)
        self.up = nn.Linear(size, shape[1], bias=behind, **own)
        self.activation = nn.ReLU() if behind else nn.Tanh()
        for linear in (self.down, self.up):
            if behind:
                nn.init.trunc_normal_(linear.weight, std=0.01, a=-0.02, b=0.02)
                nn.init.zeros_(linear.bias)
            else:
                nn.init.normal_(linear.weight, std=0.02)

    def forward(self, x: torch.Tensor, base: torch.Tensor) -> torch.Tensor:
        """`base` plus the adapter of x, on the site's columns of `base`, in the dtype of `base`."""
        x = self.dropout(self.norm(x.to(self.down.weight.dtype)))
        update = self.up(self.activation(self.down(x))).to(base.dtype)
        if self.slice is None:
            return base + update
        result = base.clone()
        columns = self.slice.view(result)
        columns += update.view(columns.shape)
        return result


def add_to_input(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Forward pre-hook that puts a series adapter in front of a linear."""
    return (module.bottleneck["series"](args[0], args[0]), *args[1:])


def add_to_output(module: nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor:
    """Forward hook that puts a series adapter behind a linear."""
    return module.bottleneck["series"](output, output)


def add_beside(module: nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor:
    """Forward hook that adds parallel adapters of a linear's input; a fused linear may have several."""
    for adapter in module.bottleneck.values():
        output = adapter(args[0], output)
    return output


def find_bottleneck_sites(
    model: nn.Module, method: str, target_modules: list[str] | None = None, layers: str | None = None
) -> list[Site]:
    """
    Find the weight matrices that bottleneck adapters adapt.

    Args:
        model ([`~transformers.PreTrainedModel`]): The base model.
        method (`str`): `"series_adapter"`, `"parallel_adapter"`, `"adapter_l"` or `"adapter_h"`.
        target_modules (`list[str]`, *optional*): As in [`SaraArguments`]. If they are left out, series adapters adapt
            the linears of the feed-forward block, parallel ones query, key and value, and the others the linears that
            lead out of a block.
        layers (`str`, *optional*): As in [`SaraArguments`].

    Returns:
        `list[Site]`: At least one.

    Raises:
        `ValueError`: If nothing is chosen, if no default is known for the model's type, or if a series adapter would
            adapt one projection of a fused module.
    """
    if target_modules is None:
        known = DEFAULT_TARGETS[method]
        model_type = model.config.get_text_config().model_type
        if model_type not in known:
            raise ValueError(
                f"No default target modules of method={method!r} are known for the model type {model_type!r}, only "
                f"for {', '.join(known)}. Set target_modules."
            )
        target_modules = list(known[model_type])
    sites = find_sites(model, SaraArguments(target_modules=target_modules, layers=layers))
    fused = [site.name for site in sites if site.slice is not None]
    if method != "parallel_adapter" and fused:
        raise ValueError(f"This adapter changes a linear's whole input or output; {fused[0]} is a part of one.")
    return sites


def attach_bottleneck(model: nn.Module, method: str, sites: Sequence[Site], size: int, dropout: float = 0.0) -> None:
    """
    Freeze the base and attach an adapter at each site.

    A series adapter is on the narrow side of its linear: it changes the input of the linear that leads into the
    feed-forward block, and the output of the one that leads out of it. A parallel adapter leads from the input of its
    linear to the output. Adapter-L and Adapter-H change the output of their linear.

    Args:
        model ([`~transformers.PreTrainedModel`]): The base model. It is changed in place.
        method (`str`): See [`find_bottleneck_sites`].
        sites (`Sequence[Site]`): See [`find_bottleneck_sites`].
        size (`int`): Width of the bottleneck; the paper's is 256.
        dropout (`float`, *optional*, defaults to 0.0): Dropout on the adapters' input.
    """
    model.requires_grad_(False)
    for site in sites:
        module = model.get_submodule(site.module)
        d_in, d_out = shape = site.shape
        key, hook = site.label or "whole", add_beside
        if method == "series_adapter":
            key, shape = "series", (min(shape), min(shape))
            hook = add_to_input if d_in <= d_out else add_to_output
        elif method in BEHIND:
            key, shape, hook = "series", (d_out, d_out), add_to_output
        adapter = Bottleneck(method, site, shape, size, dropout, module.weight.device).train(module.training)
        if hasattr(module, "bottleneck"):
            module.bottleneck[key] = adapter
            continue
        module.bottleneck = nn.ModuleDict({key: adapter})
        if hook is add_to_input:
            module.register_forward_pre_hook(hook)
        else:
            module.register_forward_hook(hook)
    model.bottleneck_config = {
        "method": method,
        "bottleneck_size": size,
        "dropout": dropout,
        "sites": [site.name for site in sites],
    }


def save_bottleneck(model: nn.Module, folder: str | PathLike) -> None:
    """
    Write the model's bottleneck adapter: its config, and the trained tensors as safetensors.

    Args:
        model ([`~transformers.PreTrainedModel`]): See [`attach_bottleneck`].
        folder (`str` or `os.PathLike`): The folder. It is made if it does not exist.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: p.detach().cpu().contiguous() for name, p in model.named_parameters() if ".bottleneck." in name}
    write_file(folder / CONFIG_FILE, (json.dumps(model.bottleneck_config, indent=2) + "\n").encode())
    write_file(folder / TENSORS_FILE, safetensors_bytes(tensors))


@torch.no_grad()
def load_bottleneck(model: nn.Module, folder: str | PathLike) -> None:
    """
    Attach a saved bottleneck adapter to a base.

    Args:
        model ([`~transformers.PreTrainedModel`]): The base that the adapter was trained on. It is changed in place.
        folder (`str` or `os.PathLike`): The folder that [`save_bottleneck`] wrote.

    Raises:
        `FileNotFoundError`: If a file is missing.
        [`~hf_sara.AdapterError`]: If the model lacks a site, or a tensor is missing, unexpected, misshaped or
            not finite.
    """
    config = json.loads(Path(folder, CONFIG_FILE).read_text(encoding="utf-8"))
    tensors = load_file(Path(folder, TENSORS_FILE))
    offered = {site.name: site for site in all_sites(model)}
    missing = [name for name in config["sites"] if name not in offered]
    if missing:
        raise AdapterError(f"The adapter in {folder} stands at {missing[0]!r}, which this model does not have.")
    sites = [offered[name] for name in config["sites"]]
    attach_bottleneck(model, config["method"], sites, config["bottleneck_size"], config["dropout"])
    own = {name: p for name, p in model.named_parameters() if ".bottleneck." in name}
    check_tensors(tensors, {name: tuple(p.shape) for name, p in own.items()})
    for name, parameter in own.items():
        parameter.copy_(tensors[name])
