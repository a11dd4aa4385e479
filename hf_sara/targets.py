"""The choice of a model's sites by an adapter's arguments."""

import re
from typing import Any

from torch import nn

from .arguments import SaraArguments, parse_layers
from .sites import Site, all_sites

# The query and value projections of model families. As in the paper, they are adapted if `target_modules` is left out.
QV_PROJ = ("q_proj", "v_proj")
DEFAULT_TARGETS = {
    **dict.fromkeys(("llama", "mistral", "mixtral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text"), QV_PROJ),
    **dict.fromkeys(("gptj", "opt", "vit", "olmo", "olmo2", "stablelm", "phi", "granite", "smollm3"), QV_PROJ),
    "phi3": ("qkv_proj.q", "qkv_proj.v"),
    "gpt2": ("c_attn.q", "c_attn.v"),
    **dict.fromkeys(("gpt_neox", "bloom", "falcon"), ("query_key_value.q", "query_key_value.v")),
    **dict.fromkeys(("bert", "roberta", "xlm-roberta", "electra"), ("query", "value")),
    **dict.fromkeys(("t5", "mt5", "umt5"), ("q", "v")),
}

PLAIN_NAME = re.compile(r"[\w.]+")


def find_sites(model: nn.Module, args: SaraArguments) -> list[Site]:
    """
    The sites that an adapter's arguments choose.

    Args:
        model ([`~transformers.PreTrainedModel`]): The base model.
        args ([`SaraArguments`]): The arguments. Only `target_modules` and `layers` are read.

    Returns:
        `list[Site]`: At least one site, in the order of the model's modules.

    Raises:
        `ValueError`: If a name or a layer matches nothing. The message lists what the model has.
    """
    offered = all_sites(model)
    targets = args.target_modules
    if targets is None:
        model_type = _model_type(model)
        if model_type not in DEFAULT_TARGETS:
            raise ValueError(
                f"No default target modules are known for the model type {model_type!r}. Set target_modules to names "
                f"or a regular expression. {_offer(offered)}"
            )
        targets = list(DEFAULT_TARGETS[model_type])
    chosen = [site for site in offered if _is_target(site, targets)]
    if args.target_modules is not None:
        for target in targets:
            if not any(_is_target(site, [target]) for site in offered):
                raise ValueError(f"target_modules={target!r} matches no linear module. {_offer(offered)}")
    if not chosen:
        raise ValueError(f"The model has none of the modules {', '.join(targets)}. {_offer(offered)}")
    if args.layers is not None:
        layers = parse_layers(args.layers)
        present = {site.layer for site in chosen if site.layer is not None}
        if layers - present:
            raise ValueError(
                f"layers={args.layers!r} names {sorted(layers - present)}, but the chosen modules are in the layers "
                f"{sorted(present)}."
            )
        chosen = [site for site in chosen if site.layer in layers]
    return chosen


def _model_type(model: nn.Module) -> str:
    config: Any = getattr(model, "config", None)
    model_type = getattr(config, "model_type", "") or type(model).__name__
    if model_type not in DEFAULT_TARGETS and hasattr(config, "get_text_config"):
        text_type = getattr(config.get_text_config(), "model_type", model_type)
        return text_type if text_type in DEFAULT_TARGETS else model_type
    return model_type


def _is_target(site: Site, targets: list[str]) -> bool:
    # A plain name may also be that of a fused module, which then stands for all of its projections.
    return any(
        matches(site.name, target, "target_modules")
        or (PLAIN_NAME.fullmatch(target) is not None and matches(site.module, target, "target_modules"))
        for target in targets
    )


def matches(name: str, pattern: str, argument: str) -> bool:
    """
    Whether a choice of modules includes a full name. A plain name has to be the end of the full name, and begin there
    after a dot. Anything else is a regular expression for the whole name. An error names the argument that it is of.
    """
    if PLAIN_NAME.fullmatch(pattern):
        return f".{name}".endswith(f".{pattern}")
    try:
        return re.fullmatch(pattern, name) is not None
    except re.error as error:
        raise ValueError(f"{argument}={pattern!r} is not a valid regular expression: {error}.") from error


def _offer(sites: list[Site]) -> str:
    """The linear modules that a model has, in one line: `q_proj (4096 x 4096, 32 times)`."""
    counts: dict[tuple[str, tuple[int, int]], int] = {}
    for site in sites:
        leaf = site.module.rsplit(".", 1)[-1] + (f".{site.label}" if site.label else "")
        counts[leaf, site.shape] = counts.get((leaf, site.shape), 0) + 1
    if not counts:
        return "The model has no nn.Linear or Conv1D module at all."
    found = [f"{leaf} ({d_in} x {d_out}, {count} times)" for (leaf, (d_in, d_out)), count in counts.items()]
    return "It has: " + ", ".join(found) + "."
