"""The choice of a model's sites by an adapter's arguments."""

import logging
from collections.abc import Sequence
from typing import Any

from torch import nn

from .arguments import ALL_LINEAR, SaraArguments, parse_layers
from .default_targets import default_sites, place, role_of
from .heads import task_heads
from .linears import is_packed, why_not
from .patterns import PLAIN_NAME, is_of_update, is_within, matches
from .sites import Site, all_sites

logger = logging.getLogger(__name__)


def find_sites(model: nn.Module, args: SaraArguments) -> list[Site]:
    """
    The sites that an adapter's arguments choose.

    Args:
        model ([`~transformers.PreTrainedModel`]): The base model.
        args ([`SaraArguments`]): The arguments. Only `target_modules`, `exclude_modules` and `layers` are read.

    Returns:
        `list[Site]`: At least one site, in the order of the model's modules.

    Raises:
        `ValueError`: If a name or a layer matches nothing, or a module that is chosen cannot hold an update. The
            message says what the model has, or why.
    """
    offered = all_sites(model)
    everything = args.target_modules == [ALL_LINEAR]
    if args.target_modules is None or everything:
        chosen = _general_choice(model, offered, everything)
    else:
        chosen = _named(model, offered, args.target_modules)
    if args.exclude_modules is not None:
        chosen = _without(chosen, offered, args.exclude_modules)
    if args.layers is not None:
        layers = parse_layers(args.layers)
        present = {site.layer for site in chosen if site.layer is not None}
        if layers - present:
            raise ValueError(
                f"layers={args.layers!r} names {sorted(layers - present)}, but the chosen modules are in the layers "
                f"{sorted(present)}."
            )
        chosen = [site for site in chosen if site.layer in layers]
    return _useful(model, chosen, lenient=everything)


def _named(model: nn.Module, offered: Sequence[Site], targets: Sequence[str]) -> list[Site]:
    for target in targets:
        if not any(_is_target(site, [target]) for site in offered):
            raise ValueError(f"target_modules={target!r} matches no linear module. {_what_else(model, target)}")
    experts = {name: shape for name, shape in _fused_experts(model).items() if _names_experts(name, targets)}
    if experts:
        logger.warning("%s.", _says_experts(experts))
    return [site for site in offered if _is_target(site, targets)]


def _general_choice(model: nn.Module, offered: Sequence[Site], everything: bool) -> list[Site]:
    """All sites but those of heads, or query and value among them."""
    heads = _heads(model)
    inner = [site for site in offered if not is_within(site.module, heads)]
    packed = {name: kind for name, kind in _packed(model).items() if everything or role_of(place(model, name)[1])}
    if packed:
        name, kind = next(iter(packed.items()))
        raise ValueError(f"{name} {_says_packed(kind)}")
    chosen = inner if everything else default_sites(model, inner)
    if not chosen:
        raise ValueError(
            f"This {type(model).__name__} has no query and value projections that are linear modules, so there is no "
            f"default choice. Set target_modules to names, a regular expression, or '{ALL_LINEAR}'. {_offer(offered)}"
        )
    experts = _fused_experts(model) if everything else {}
    if experts:
        logger.warning("%s.", _says_experts(experts))
    return chosen


def _useful(model: nn.Module, chosen: Sequence[Site], lenient: bool) -> list[Site]:
    """The sites that can hold updates. If the choice is lenient, the others are left out, and otherwise an error."""
    reasons = {}
    for name in dict.fromkeys(site.module for site in chosen):
        parent, _, leaf = name.rpartition(".")
        reason = why_not(model.get_submodule(name), model.get_submodule(parent), leaf)
        if reason is not None:
            reasons[name] = reason
    useful = [site for site in chosen if site.module not in reasons]
    if reasons:
        name, reason = next(iter(reasons.items()))
        if not lenient or not useful:
            raise ValueError(
                f"{name} cannot be adapted: {reason}. Name it in exclude_modules, or choose other target_modules. "
                f"{_offer(all_sites(model))}"
            )
        logger.warning("%d linears are not adapted, such as %s: %s.", len(reasons), name, reason)
    return useful


def _heads(model: Any) -> list[str]:
    """The heads of a model: what its task makes anew, and its output embedding."""
    try:
        output = model.get_output_embeddings()
    except (AttributeError, NotImplementedError):
        output = None
    return [*task_heads(model), *(name for name, module in model.named_modules() if module is output)]


def _without(chosen: Sequence[Site], offered: Sequence[Site], excluded: Sequence[str]) -> list[Site]:
    for name in excluded:
        if not any(_is_target(site, [name], "exclude_modules") for site in offered):
            raise ValueError(f"exclude_modules={name!r} matches no linear module. {_offer(offered)}")
    left = [site for site in chosen if not _is_target(site, excluded, "exclude_modules")]
    if not left:
        raise ValueError(f"exclude_modules={list(excluded)} excludes all of the chosen modules. {_offer(chosen)}")
    return left


def _is_target(site: Site, targets: Sequence[str], argument: str = "target_modules") -> bool:
    # A plain name may also be that of a fused module, which then stands for all of its projections.
    return any(
        matches(site.name, target, argument)
        or (PLAIN_NAME.fullmatch(target) is not None and matches(site.module, target, argument))
        for target in targets
    )


# ---- what a model has instead ----


def _what_else(model: nn.Module, target: str) -> str:
    """A sentence on what a name stands for that is no linear."""
    packed = {name: kind for name, kind in _packed(model).items() if matches(name, target, "target_modules")}
    if packed:
        name, kind = next(iter(packed.items()))
        return f"{name} {_says_packed(kind)}"
    experts = {name: shape for name, shape in _fused_experts(model).items() if _names_experts(name, [target])}
    return f"{_says_experts(experts)}." if experts else _offer(all_sites(model))


def _packed(model: nn.Module) -> dict[str, str]:
    """The modules that look like linears whose packed weights cannot be read, and the names of their classes."""
    return {
        name: type(module).__name__
        for name, module in model.named_modules()
        if name and is_packed(module) and not is_of_update(name)
    }


def _says_packed(kind: str) -> str:
    return (
        f"is a {kind}, which stores its weight in a form of its own, so that its singular values cannot be read. Load "
        "the base in a floating-point dtype, or with bitsandbytes quantization."
    )


def _fused_experts(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """The parameters that hold the matrices of several experts in one tensor, and their shapes."""
    return {
        name: tuple(parameter.shape)
        for name, parameter in model.named_parameters()
        if parameter.dim() == 3 and "expert" in name and not is_of_update(name)
    }


def _names_experts(name: str, targets: Sequence[str]) -> bool:
    names = (name, name.rpartition(".")[0])
    return any(matches(one, target, "target_modules") for one in names for target in targets)


def _says_experts(experts: dict[str, tuple[int, ...]]) -> str:
    name, shape = next(iter(experts.items()))
    return (
        f"{name} and {len(experts) - 1} more are fused parameters of experts, {shape[0]} matrices in one tensor of "
        f"shape {shape}, which hf_sara does not adapt"
    )


def _offer(sites: Sequence[Site]) -> str:
    """The linear modules that a model has, in one line: `q_proj (4096 x 4096, 32 times)`."""
    counts: dict[tuple[str, tuple[int, int]], int] = {}
    for site in sites:
        leaf = site.module.rsplit(".", 1)[-1] + (f".{site.label}" if site.label else "")
        counts[leaf, site.shape] = counts.get((leaf, site.shape), 0) + 1
    if not counts:
        return "The model has no nn.Linear or Conv1D module at all."
    found = [f"{leaf} ({d_in} x {d_out}, {count} times)" for (leaf, (d_in, d_out)), count in counts.items()]
    return "It has: " + ", ".join(found) + "."
