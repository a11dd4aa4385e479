"""The weight matrices that a model offers to be adapted, and views of them.

A *site* is one weight matrix W of shape (d_in, d_out), so that y = x W + b. `nn.Linear` stores its transpose, GPT-2's
`Conv1D` stores it as is, and a fused projection holds several sites, each a set of its output columns.
"""

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar, cast

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D


@dataclass(frozen=True)
class OutputSlice:
    """
    The output columns of one projection inside a fused module. The outputs stand in `groups` equal blocks, and the
    projection owns the columns `start` to `stop` of every block. With one group, they are a plain range. If q, k and v
    are interleaved per head, there is one group per head.

    Args:
        groups (`int`): Number of blocks.
        start (`int`): First column of the projection within a block.
        stop (`int`): First column after the projection within a block.
    """

    groups: int
    start: int
    stop: int

    @property
    def size(self) -> int:
        """Number of output columns of the projection, d_out."""
        return self.groups * (self.stop - self.start)

    def view(self, tensor: torch.Tensor, dim: int = -1) -> torch.Tensor:
        """A view of the projection's part, in which `dim` becomes the two dimensions (groups, stop - start)."""
        dim = dim % tensor.dim()
        blocks = tensor.unflatten(dim, (self.groups, -1))
        return blocks.narrow(dim + 1, self.start, self.stop - self.start)


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
        return next((int(part) for part in self.module.split(".") if part.isdigit()), None)

    def linear(self, model: nn.Module) -> nn.Linear:
        """The site's module: an `nn.Linear`, or another module that has a weight."""
        return cast(nn.Linear, model.get_submodule(self.module))

    def weight(self, model: nn.Module) -> torch.Tensor:
        """The weight W, of shape (d_in, d_out), without gradient. It is a view if the way of storage allows it."""
        return self.read(self.linear(model))

    def read(self, module: nn.Linear) -> torch.Tensor:
        """The weight W of the site in its module."""
        return self.orient(plain_weight(module, self.name), module)

    def orient(self, stored: torch.Tensor, module: nn.Module) -> torch.Tensor:
        """The weight W of the site, taken from a weight that is stored as this kind of module stores it."""
        weight = stored if isinstance(module, Conv1D) else stored.t()
        if self.slice is None:
            return weight
        return self.slice.view(weight, dim=1).flatten(1)

    @torch.no_grad()
    def write(self, module: nn.Linear, value: torch.Tensor) -> None:
        """Write W, of shape (d_in, d_out), into the module's stored weight. Only merging does this."""
        weight = module.weight.data if isinstance(module, Conv1D) else module.weight.data.t()
        if self.slice is None:
            weight.copy_(value)
        else:
            target = self.slice.view(weight, dim=1)
            target.copy_(value.reshape(target.shape))


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


def plain_weight(module: Any, name: str) -> torch.Tensor:
    """The stored weight of a linear as a floating-point tensor. A quantized weight is dequantized."""
    weight = module.weight.detach()
    if hasattr(module.weight, "ds_id") and not weight.numel():
        raise ValueError(
            f"{name}: DeepSpeed has spread this weight over the processes while the model was loaded. Load the model, "
            "and attach the adapter, before TrainingArguments with ZeRO stage 3 are made."
        )
    if weight.is_meta:
        raise ValueError(f"{name}: the weight is on the meta device, it has no values yet. Load the model first.")
    quant_state = getattr(module.weight, "quant_state", None)
    if quant_state is not None or weight.dtype == torch.int8:
        from transformers.integrations.bitsandbytes import dequantize_bnb_weight

        return dequantize_bnb_weight(module.weight, state=getattr(module, "state", None))
    if not weight.is_floating_point():
        raise ValueError(
            f"{name}: the weight is stored as {weight.dtype}, and its values cannot be read. Load the base in a "
            "floating-point dtype, or with bitsandbytes quantization."
        )
    return weight


def is_of_update(name: str) -> bool:
    """Whether the full name of a module or a parameter is that of an update, and not of the base model."""
    return ".sara." in f"{name}."


def is_linear(module: nn.Module) -> bool:
    """Whether a module is a kind of linear that can hold sites."""
    return isinstance(module, (nn.Linear, Conv1D))


def linear_shape(module: nn.Module) -> tuple[int, int]:
    """(d_in, d_out) of a linear. It is not read from the weight, because a quantized one has another shape."""
    if isinstance(module, Conv1D):
        return module.nx, module.nf
    linear = cast(nn.Linear, module)
    return linear.in_features, linear.out_features


def fused_slices(model: nn.Module, leaf: str, d_out: int) -> dict[str, OutputSlice]:
    """The projections of a fused module by label (`"q"`, `"k"`, `"v"`), or nothing for a plain module."""
    config: Any = getattr(model, "config", None)
    if hasattr(config, "get_text_config"):
        config = config.get_text_config()
    kind = (getattr(config, "model_type", None), leaf)
    if kind == ("gpt2", "c_attn"):
        third = d_out // 3
        # The c_attn of a cross-attention holds k and v only, because its q is a module of its own.
        if d_out == 3 * config.hidden_size:
            return _consecutive(q=third, k=third, v=third)
        return _consecutive(k=d_out // 2, v=d_out // 2)
    if kind == ("phi3", "qkv_proj"):
        head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        key_value = config.num_key_value_heads * head
        return _consecutive(q=config.num_attention_heads * head, k=key_value, v=key_value)
    if kind in (("gpt_neox", "query_key_value"), ("bloom", "query_key_value")):
        return _per_head(config.num_attention_heads, d_out)
    if kind == ("falcon", "query_key_value"):
        heads = config.num_attention_heads
        head = config.hidden_size // heads
        if config.new_decoder_architecture:
            queries = heads // config.num_kv_heads * head
            return _consecutive(groups=config.num_kv_heads, q=queries, k=head, v=head)
        if config.multi_query:
            return _consecutive(q=heads * head, k=head, v=head)
        return _per_head(heads, d_out)
    return {}


def _consecutive(groups: int = 1, **widths: int) -> dict[str, OutputSlice]:
    slices, start = {}, 0
    for label, width in widths.items():
        slices[label] = OutputSlice(groups, start, start + width)
        start += width
    return slices


def _per_head(heads: int, d_out: int) -> dict[str, OutputSlice]:
    width = d_out // heads // 3
    return _consecutive(groups=heads, q=width, k=width, v=width)


def all_sites(model: nn.Module) -> list[Site]:
    """Every site that the model offers, in the order of its modules."""
    sites = []
    for module_name, module in model.named_modules():
        if not is_linear(module) or not module_name or is_of_update(module_name):
            continue
        d_in, d_out = linear_shape(module)
        slices = fused_slices(model, module_name.rsplit(".", 1)[-1], d_out)
        if not slices:
            sites.append(Site(module_name, module_name, (d_in, d_out)))
        for label, output_slice in slices.items():
            sites.append(Site(f"{module_name}.{label}", module_name, (d_in, output_slice.size), output_slice))
    return sites


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
        kinds[re.sub(r"(^|\.)\d+(?=\.|$)", r"\1*", site.name, count=1)].append(site)
    return {_shortest_end(name, kinds, found[0]): found for name, found in kinds.items()}


def _shortest_end(name: str, others: Mapping[str, Any], site: Site) -> str:
    parts = name.split(".")
    # The name of a fused module's projection always includes the name of the module, as in target_modules.
    ends = (".".join(parts[-count:]) for count in range(2 if site.label else 1, len(parts)))
    return next((end for end in ends if sum(f".{other}".endswith(f".{end}") for other in others) == 1), name)
