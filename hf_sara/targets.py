"""The choice of a model's sites by an adapter's arguments."""

import logging
from collections.abc import Sequence
from typing import Any

from torch import nn

from .arguments import ALL_LINEAR, SaraArguments, parse_layers
from .default_targets import default_sites, place, role_of
from .heads import task_heads
from .linears import is_packed, is_strange, why_not_on
from .patterns import PLAIN_NAME, is_of_update, is_within, matches
from .sites import Site, all_sites
from .spread import why_not_spread

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
    if args.exclude_modules is not None:
        _refuse_unknown(model, offered, args.exclude_modules, "exclude_modules")
    excluded = args.exclude_modules or []
    if args.target_modules is None or everything:
        chosen = _general_choice(model, offered, excluded, everything)
    else:
        chosen = _named(model, offered, args.target_modules)
    left = [site for site in chosen if not _is_target(site, excluded, "exclude_modules")]
    if not left:
        raise ValueError(f"exclude_modules={excluded} excludes all of the chosen modules. {_offer(chosen)}")
    chosen = left
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
    experts = {name: shape for name, shape in fused_experts(model).items() if _names_experts(name, targets)}
    if experts:
        logger.warning("%s.", _says_experts(experts))
    return [site for site in offered if _is_target(site, targets)]


def _general_choice(
    model: nn.Module, offered: Sequence[Site], excluded: Sequence[str], everything: bool
) -> list[Site]:
    """All sites but those of heads, or query and value among them."""
    heads = _heads(model)
    inner = [site for site in offered if not is_within(site.module, heads)]
    for name, (reason, packed) in _others(model).items():
        wanted = everything or role_of(place(model, name)[1]) is not None
        if wanted and not is_within(name, heads) and not any(matches(name, e, "exclude_modules") for e in excluded):
            if packed or not everything:
                raise ValueError(f"{name} {reason} Name it in exclude_modules to leave it out.")
            logger.warning("%s %s", name, reason)
    chosen = inner if everything else default_sites(model, inner)
    if not chosen:
        raise ValueError(
            f"This {type(model).__name__} has no query and value projections that are linear modules, so there is no "
            f"default choice. Set target_modules to names, a regular expression, or '{ALL_LINEAR}'. {_offer(offered)}"
        )
    experts = fused_experts(model) if everything else {}
    if experts:
        logger.warning("%s.", _says_experts(experts))
    return chosen


def _useful(model: nn.Module, chosen: Sequence[Site], lenient: bool) -> list[Site]:
    """The sites that can hold updates. If the choice is lenient, the others are left out, and otherwise an error."""
    reasons = {}
    for name, part in dict.fromkeys((site.module, site.slice) for site in chosen):
        reason = why_not_spread(model, name, part.groups if part else None) or why_not_on(model, name)
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


def _refuse_unknown(model: nn.Module, offered: Sequence[Site], names: Sequence[str], argument: str) -> None:
    """Raise a `ValueError` if a name matches no linear, and nothing that looks like one."""
    others = _others(model)
    for name in names:
        known = any(_is_target(site, [name], argument) for site in offered)
        if not known and not any(matches(other, name, argument) for other in others):
            raise ValueError(f"{argument}={name!r} matches no linear module. {_offer(offered)}")


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
    for name, (reason, _) in _others(model).items():
        if matches(name, target, "target_modules"):
            return f"{name} {reason}"
    experts = fused_experts(model)
    meant = {name: shape for name, shape in experts.items() if _names_experts(name, [target])}
    found = [] if meant else [_offer(all_sites(model))]
    return " ".join([*found, *([f"{_says_experts(meant or experts)}."] if experts else [])])


def _others(model: nn.Module) -> dict[str, tuple[str, bool]]:
    """The modules that look like linears and cannot be adapted, each with the reason, and whether it is packed."""
    found = {}
    for name, module in model.named_modules():
        kind, packed = type(module).__name__, is_packed(module)
        if not name or is_of_update(name) or not (packed or is_strange(module)):
            continue
        if packed:
            reason = (
                f"is a {kind}, which stores its weight in a form of its own, so that its singular values cannot be "
                "read. Load the base in a floating-point dtype, or with bitsandbytes quantization."
            )
        else:
            reason = f"is a {kind}, which is no kind of linear that hf_sara knows, so it is not adapted."
        found[name] = reason, packed
    return found


def fused_experts(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """The parameters that hold the matrices of several experts in one tensor, and their shapes."""
    found: dict[str, tuple[int, ...]] = {}
    for name, module in model.named_modules():
        expert = "expert" in f"{name}.{type(module).__name__}".lower() and not is_of_update(name)
        own = {} if isinstance(module, nn.Linear) or not expert else dict(module.named_parameters(recurse=False))
        # In some models they stand one below the other, in a module that is named after them.
        dims = (2, 3) if "expert" in type(module).__name__.lower() else (3,)
        found |= {f"{name}.{key}": tuple(tensor.shape) for key, tensor in own.items() if tensor.dim() in dims}
    return found


def _names_experts(name: str, targets: Sequence[str]) -> bool:
    names = (name, name.rpartition(".")[0])
    return any(matches(one, target, "target_modules") for one in names for target in targets)


def _says_experts(experts: dict[str, tuple[int, ...]]) -> str:
    name, shape = next(iter(experts.items()))
    beside = f" and {len(experts) - 1} more" if len(experts) > 1 else ""
    return (
        f"{name}{beside} are fused parameters of experts, several matrices in one tensor of shape {shape}, which "
        "hf_sara does not adapt"
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
