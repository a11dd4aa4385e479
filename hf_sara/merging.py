"""Merging an adapter into the base weights, and restoring the exact bits of the weights."""

import itertools
from collections.abc import Sequence

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from .copies import ModuleCopy, TokenRows
from .linears import is_offloaded, is_quantized
from .methods import Delta, deltas_of
from .sites import PlannedSite
from .spread import is_partitioned

_counter = itertools.count(1)


class MergedWeights:
    """
    Weights into which an adapter's updates are merged. The weights' own bits are kept, so that they can be restored.

    Args:
        model ([`~transformers.PreTrainedModel`]): The model; its weights are changed.
        deltas (`Sequence[tuple[PlannedSite, Delta]]`): The updates and where they belong.
        copies (`Sequence[tuple[nn.Module, ModuleCopy or TokenRows]]`): The parts, and the modules that they belong to.

    Attributes:
        order (`int`): A number that grows from merge to merge. The merge with the largest one is restored first.

    Raises:
        `ValueError`: If a weight cannot be merged into, see [`refuse_unwritable`], [`refuse_tied`] and
            [`merged_weight`]. The weights are then left as they were.
    """

    @torch.no_grad()
    def __init__(
        self,
        model: nn.Module,
        deltas: Sequence[tuple[PlannedSite, Delta]],
        copies: Sequence[tuple[nn.Module, ModuleCopy | TokenRows]],
    ):
        self.model = model
        self._sites = [site for site, _ in deltas]
        for site in self._sites:
            refuse_unwritable(site, site.linear(model))
        refuse_tied(model, self._sites)
        for site, delta in deltas:
            # This may be an error. The sums are computed again, because all of them would take much memory.
            merged_weight(site, site.linear(model), delta)
        values = [copy.merged(host) for host, copy in copies]
        self._originals: dict[str, torch.Tensor] = {}
        for site, delta in deltas:
            module = site.linear(model)
            weight = module.weight
            self._originals[site.name] = (
                weight.to_local() if isinstance(weight, DTensor) else site.read(module)
            ).clone()
            self._write(site, merged_weight(site, module, delta))
        self._parts = [copy.write(host, value) for (host, copy), value in zip(copies, values, strict=True)]
        self.order = next(_counter)

    @torch.no_grad()
    def restore(self, copies: Sequence[tuple[nn.Module, ModuleCopy | TokenRows]]) -> None:
        """
        Restore the exact bits that the weights had before.

        Raises:
            `ValueError`: If a weight was quantized or offloaded meanwhile, see [`refuse_unwritable`].
        """
        for site in self._sites:
            refuse_unwritable(site, site.linear(self.model))
        # Parts may share a tensor of the base, so the first to be written is the last to be restored.
        for (host, copy), before in reversed(list(zip(copies, self._parts, strict=True))):
            copy.write(host, before)
        # The projections of a fused module share a part of it under tensor parallelism, so the order is reversed.
        for site in reversed(self._sites):
            weight, original = site.linear(self.model).weight, self._originals.pop(site.name)
            if isinstance(weight, DTensor):
                weight.to_local().copy_(original)
            else:
                self._write(site, original.to(weight.device))

    def _write(self, site: PlannedSite, weight: torch.Tensor) -> None:
        module = site.linear(self.model)
        site.write(module, weight)
        for delta in deltas_of(module):
            delta.follow_weight(module)


def merged_weight(site: PlannedSite, module: nn.Linear, delta: Delta) -> torch.Tensor:
    """
    A site's weight plus its update, of shape (d_in, d_out). The sum is computed in at least float32 and rounded once.

    Raises:
        `ValueError`: If no single matrix equals the update, or the dtype of the weight cannot hold the sum.
    """
    weight = site.read(module)
    update = delta.merged()
    merged = (weight.to(update.dtype) + update).to(weight.dtype)
    if not torch.isfinite(merged).all():
        raise ValueError(f"{site.name}: weight plus update leaves the range of {weight.dtype}. Use a wider dtype.")
    return merged


def refuse_unwritable(site: PlannedSite, module: nn.Module) -> None:
    """Raise a `ValueError` if no sum can be written into a weight, because it is quantized or offloaded."""
    if "weight" not in dict(module.named_parameters(recurse=False)) and not is_quantized(module):
        raise ValueError(
            f"{site.name}: the weight of this {type(module).__name__} is parametrized, so it is computed from others, "
            "and nothing can be written into it. Remove the parametrization before the adapter is attached."
        )
    if is_quantized(module):
        raise ValueError(
            f"{site.name}: the weight of this {type(module).__name__} is quantized, so it cannot be merged into. Load "
            "the base unquantized, and the adapter on it."
        )
    weight = module.get_parameter("weight")
    if is_partitioned(weight) or (isinstance(weight, DTensor) and weight.device_mesh.mesh_dim_names != ("tp",)):
        raise ValueError(
            f"{site.name}: FSDP or DeepSpeed spreads this weight over the processes, so it cannot be merged into. "
            "Save the adapter, and merge it into the files of the base: hf-sara merge."
        )
    if is_offloaded(module) or weight.is_meta:
        raise ValueError(
            f"{site.name}: accelerate has offloaded the weight, and what is merged into it would be lost. Load the "
            "base and the adapter without offloading, or bring the weights back with "
            "accelerate.hooks.remove_hook_from_submodules(model)."
        )


def refuse_tied(model: nn.Module, sites: Sequence[PlannedSite]) -> None:
    """Raise a `ValueError` if another module shares a site's weight, as embedding and output layer often do."""
    owners: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        for parameter in module.parameters(recurse=False):
            owners.setdefault(id(parameter), []).append(name)
    for site in sites:
        others = [n for n in owners[id(site.linear(model).weight)] if n != site.module]
        if others:
            raise ValueError(
                f"{site.name}: its weight is tied to {', '.join(others)}, which merging would change as well. "
                "Load the base with tie_word_embeddings=False, or leave the adapter unmerged."
            )
