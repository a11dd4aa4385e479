"""The weight matrices that a model offers to be adapted, and views of them.

A *site* is one weight matrix W of shape (d_in, d_out), so that y = x W + b. `nn.Linear` stores its transpose, GPT-2's
`Conv1D` stores it as is, and a fused projection holds several sites, each a set of its output columns.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar, cast

import torch
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from .layouts import OutputSlice, fused_slices
from .linears import is_linear, linear_shape, read_weight
from .patterns import is_of_update
from .spread import whole

# A part of a module's name that is a number. Nothing has more than a billion layers.
FIRST_NUMBER = re.compile(r"(^|\.)([0-9]{1,9})(?=\.|$)")
# The name of a kind has at most so many parts, or it is a whole name.
MOST_PARTS = 16


@dataclass(frozen=True)
class Site:
    """
    One adapted weight matrix.

    Args:
        name (`str`): Name of the module in the model, followed by the label for a projection of a fused module.
        module (`str`): Name of the module.
        shape (`tuple[int, int]`): (d_in, d_out).
        slice (`OutputSlice`, *optional*): The projection's columns in a fused module; `None` for a whole output.
    """

    name: str
    module: str
    shape: tuple[int, int]
    slice: OutputSlice | None = None

    @property
    def label(self) -> str:
        """The end of the name that tells the sites of a module apart: `"q"` of `"h.0.attn.c_attn.q"`, or empty."""
        return self.name[len(self.module) + 1 :]

    @property
    def layer(self) -> int | None:
        """Index of the layer, which is the first number in the module's name; `None` if it has none."""
        found = FIRST_NUMBER.search(self.module)
        return int(found[2]) if found else None

    def linear(self, model: nn.Module) -> nn.Linear:
        """The site's module: an `nn.Linear`, or another module that has a weight."""
        return cast(nn.Linear, model.get_submodule(self.module))

    def weight(self, model: nn.Module) -> torch.Tensor:
        """The weight W, of shape (d_in, d_out), without gradient. It is a view if the way of storage allows it."""
        return self.read(self.linear(model))

    def read(self, module: nn.Linear) -> torch.Tensor:
        """The weight W of the site in its module."""
        return self.orient(read_weight(module, self.name), module)

    def orient(self, stored: torch.Tensor, module: nn.Module) -> torch.Tensor:
        """The weight W of the site, taken from a weight that is stored as this kind of module stores it."""
        weight = stored if isinstance(module, Conv1D) else stored.t()
        if self.slice is None:
            return weight
        return self.slice.view(weight, dim=1).flatten(1)

    @torch.no_grad()
    def write(self, module: nn.Linear, value: torch.Tensor) -> None:
        """
        Write W, of shape (d_in, d_out), into the module's stored weight. Only merging does this. A process of tensor
        parallelism writes its part, and all of them have to call this.
        """
        weight = module.weight.data
        stored = whole(weight)
        oriented = stored if isinstance(module, Conv1D) else stored.t()
        if self.slice is None:
            oriented.copy_(value)
        else:
            target = self.slice.view(oriented, dim=1)
            target.copy_(value.reshape(target.shape))
        if isinstance(weight, DTensor):
            weight.copy_(distribute_tensor(stored, weight.device_mesh, weight.placements, src_data_rank=None))


@dataclass(frozen=True)
class PlannedSite(Site):
    """
    A site whose rank is known.

    Args:
        k (`int`): Rank of the site's update, 1 <= k <= min(d_in, d_out).
    """

    k: int = field(kw_only=True)

    @classmethod
    def of(cls, site: Site, k: int) -> "PlannedSite":
        """A site with its rank."""
        return cls(site.name, site.module, site.shape, site.slice, k=k)


AnySite = TypeVar("AnySite", bound=Site)


def all_sites(model: nn.Module) -> list[Site]:
    """Every site that the model offers, in the order of its modules."""
    sites = []
    for module_name, module, config in _linears(model):
        d_in, d_out = linear_shape(module)
        slices = fused_slices(config, module_name.rsplit(".", 1)[-1], d_out)
        if not slices:
            sites.append(whole_site(module_name, module))
        for label, output_slice in slices.items():
            sites.append(Site(f"{module_name}.{label}", module_name, (d_in, output_slice.size), output_slice))
    return sites


def whole_site(name: str, module: nn.Module) -> Site:
    """The site that is the whole output of a linear, whether it is a fused one or not."""
    return Site(name, name, linear_shape(module))


def _linears(model: nn.Module) -> Iterator[tuple[str, nn.Module, Any]]:
    """The linears of a model by name, each with the configuration of the innermost model that it belongs to."""
    configs: dict[str, Any] = {"": getattr(model, "config", None)}
    for name, module in model.named_modules():
        outer = configs[name.rpartition(".")[0]] if name else configs[""]
        configs[name] = module.config if isinstance(module, PreTrainedModel) else outer
        if name and is_linear(module) and not is_of_update(name):
            yield name, module, outer


def sites_by_kind(sites: Sequence[AnySite]) -> dict[str, list[AnySite]]:
    """
    Group sites by kind, such as all query projections and all value projections.

    Args:
        sites (`Sequence[Site]`): Sites of a model.

    Returns:
        `dict[str, list[Site]]`: The sites of each kind, in the order of their layers. The name of a kind is the
        shortest end of its sites' names that no other kind has: `"q_proj"`, `"c_attn.q"`, or `"EncDecAttention.q"`
        beside `"encoder.block.*.layer.0.SelfAttention.q"`.
    """
    kinds: dict[str, list[AnySite]] = defaultdict(list)
    for site in sorted(sites, key=lambda site: -1 if site.layer is None else site.layer):
        kinds[FIRST_NUMBER.sub(r"\1*", site.name, count=1)].append(site)
    known = Counter(end for name in kinds for end in _ends(name))
    return {_shortest_end(name, known, found[0]): found for name, found in kinds.items()}


def _ends(name: str) -> list[str]:
    """The ends of a name that begin after a dot, from the shortest to the name itself."""
    last = name.rsplit(".", MOST_PARTS)[1:]
    return [".".join(last[-count:]) for count in range(1, len(last) + 1)] + [name]


def _shortest_end(name: str, known: Mapping[str, int], site: Site) -> str:
    # The name of a fused module's projection always includes the name of the module, as in target_modules.
    ends = _ends(name)[1:] if site.label else _ends(name)
    return next((end for end in ends if known[end] == 1), name)
