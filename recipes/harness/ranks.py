"""Other ranks than those of the rule, for the study that asks whether the rule helps."""

from collections import defaultdict
from dataclasses import replace
from typing import Any

from torch import nn

from hf_sara.arguments import SaraArguments
from hf_sara.planning import Plan, plan
from hf_sara.sites import PlannedSite


def ranks_for(model: nn.Module, args: SaraArguments, kind: str) -> Plan:
    """
    A plan with as many trained parameters as the rank rule gives, or nearly, and with its ranks or others.

    Args:
        model ([`~transformers.PreTrainedModel`]): The base.
        args ([`SaraArguments`]): The arguments of the rule.
        kind (`str`): `"sara"`: the rule's ranks. `"equal"`: one rank for all sites, the one whose number of parameters
            is nearest. `"reversed"`: among sites of the same shape, the one that the rule gives most gets least, and
            so on, so that the number of parameters is the same.

    Returns:
        [`Plan`]: The plan, which an adapter can be made with.
    """
    found = plan(model, args)
    if kind == "sara":
        return found
    if kind == "equal":
        wanted = found.trained_parameters

        def cost(k: int) -> int:
            return sum(found.count(replace(site, k=min(k, *site.shape))) for site in found.sites)

        k = min(range(1, max(site.k for site in found.sites) + 1), key=lambda k: abs(cost(k) - wanted))
        return replace(found, sites=[replace(site, k=min(k, *site.shape)) for site in found.sites])
    groups: dict[Any, list[PlannedSite]] = defaultdict(list)
    for site in found.sites:
        groups[site.shape].append(site)
    turned = {}
    for sites in groups.values():
        # The sort is stable, so that sites of one rank keep their order.
        ordered = sorted(sites, key=lambda site: site.k)
        turned.update(zip((site.name for site in ordered), (site.k for site in reversed(ordered)), strict=True))
    return replace(found, sites=[replace(site, k=turned[site.name]) for site in found.sites])
