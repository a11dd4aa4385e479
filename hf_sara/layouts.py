"""The layouts of fused projections: which output columns of one linear are query, key and value.

Each layout is what the model's own code does with the output of the linear.
"""

from dataclasses import dataclass
from typing import Any

import torch


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


Slices = dict[str, OutputSlice]


def fused_slices(config: Any, leaf: str, d_out: int) -> Slices:
    """
    The projections of a fused module by label (`"q"`, `"k"`, `"v"`), or nothing for a module of no known layout.

    Args:
        config ([`~transformers.PreTrainedConfig`]): The configuration of the model that the module belongs to. This is
            the inner one of a model that consists of several.
        leaf (`str`): The name of the module in its parent.
        d_out (`int`): Number of its outputs.
    """
    layout = LAYOUTS.get((getattr(config, "model_type", None), leaf))
    slices = {} if layout is None else layout(config, d_out)
    # Remote code may use the name of a model for something else.
    return slices if sum(part.size for part in slices.values()) == d_out else {}


def _consecutive(groups: int = 1, **widths: int) -> Slices:
    slices, start = {}, 0
    for label, width in widths.items():
        slices[label] = OutputSlice(groups, start, start + width)
        start += width
    return slices


def _thirds(config: Any, d_out: int) -> Slices:
    third = d_out // 3
    return _consecutive(q=third, k=third, v=third)


def _per_head(config: Any, d_out: int) -> Slices:
    heads = config.num_attention_heads
    width = d_out // heads // 3
    return _consecutive(groups=heads, q=width, k=width, v=width)


def _gpt2(config: Any, d_out: int) -> Slices:
    # The c_attn of a cross-attention holds k and v only, because its q is a module of its own.
    if d_out == 2 * config.hidden_size:
        return _consecutive(k=d_out // 2, v=d_out // 2)
    return _thirds(config, d_out)


def _phi3(config: Any, d_out: int) -> Slices:
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    key_value = config.num_key_value_heads * head
    return _consecutive(q=config.num_attention_heads * head, k=key_value, v=key_value)


def _falcon(config: Any, d_out: int) -> Slices:
    heads = config.num_attention_heads
    head = config.hidden_size // heads
    if config.new_decoder_architecture:
        queries = heads // config.num_kv_heads * head
        return _consecutive(groups=config.num_kv_heads, q=queries, k=head, v=head)
    if config.multi_query:
        return _consecutive(q=heads * head, k=head, v=head)
    return _per_head(config, d_out)


# By the type of a model and the name of a fused module.
LAYOUTS = {
    ("gpt2", "c_attn"): _gpt2,
    ("phi3", "qkv_proj"): _phi3,
    ("gpt_neox", "query_key_value"): _per_head,
    ("bloom", "query_key_value"): _per_head,
    ("falcon", "query_key_value"): _falcon,
}
