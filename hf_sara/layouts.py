"""The layouts of fused projections: which output columns of one linear are query, key and value.

Each layout is what the model's own code does with the output of the linear.
"""

from collections.abc import Callable
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
Layout = Callable[[Any, int], Slices]


def fused_slices(config: Any, leaf: str, d_out: int) -> Slices:
    """
    The projections of a fused module by label (`"q"`, `"k"`, `"v"`; a gate has a label too), or nothing for a module
    of no known layout.

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


def _halves(config: Any, d_out: int) -> Slices:
    # The query has a module of its own.
    return _consecutive(k=d_out // 2, v=d_out // 2)


def _per_head(config: Any, d_out: int) -> Slices:
    heads = config.num_attention_heads
    width = d_out // heads // 3
    return _consecutive(groups=heads, q=width, k=width, v=width)


def _head(config: Any) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def _fewer_heads(config: Any, d_out: int, key_value_heads: int | None = None) -> Slices:
    # There are fewer heads of keys and values than of queries.
    key_value = (key_value_heads or config.num_key_value_heads) * _head(config)
    return _consecutive(q=config.num_attention_heads * _head(config), k=key_value, v=key_value)


def _gpt2(config: Any, d_out: int) -> Slices:
    # The c_attn of a cross-attention has no query.
    return (_halves if d_out == 2 * config.hidden_size else _thirds)(config, d_out)


def _gpt_bigcode(config: Any, d_out: int) -> Slices:
    if config.multi_query:
        return _fewer_heads(config, d_out, key_value_heads=1)
    # The c_attn of a cross-attention is smaller. It stays whole, because the model's code for it fails.
    return _per_head(config, d_out) if d_out == 3 * config.hidden_size else {}


def _falcon(config: Any, d_out: int) -> Slices:
    if config.new_decoder_architecture:
        groups, head = config.num_kv_heads, _head(config)
        return _consecutive(groups, q=config.num_attention_heads // groups * head, k=head, v=head)
    return _fewer_heads(config, d_out, key_value_heads=1) if config.multi_query else _per_head(config, d_out)


def _codegen(config: Any, d_out: int) -> Slices:
    # CodeGen was trained on four devices, and each of them had one of the blocks. The value stands before the key.
    width = d_out // 4 // 3
    return _consecutive(4, q=width, v=width, k=width)


def _delta_net(config: Any, d_out: int) -> Slices:
    key = config.linear_num_key_heads * config.linear_key_head_dim
    return _consecutive(q=key, k=key, v=config.linear_num_value_heads * config.linear_value_head_dim)


def _delta_net_with_gate(config: Any, d_out: int) -> Slices:
    # A group is a key head and its value heads. The gate z has as many columns as the value.
    groups, key = config.linear_num_key_heads, config.linear_key_head_dim
    value = config.linear_num_value_heads // groups * config.linear_value_head_dim
    return _consecutive(groups, q=key, k=key, v=value, z=value)


# By layout: the names of fused modules, and the types of the models that have them.
_ROWS: dict[Layout, dict[str, str]] = {
    _thirds: {
        "Wqkv": "modernbert mpt",
        "att_proj": "semantic coarse_acoustics fine_acoustics",
        "c_attn": "openai-gpt",
        "qkv": """
            blip_2_vision_model blip_vision_model cohere_compass_vision deepseek_ocr2_sam_vision_model
            dots3_note_vision_encoder ernie4_5_vl_moe_vision florence_vision glm4v_moe_vision glm4v_vision
            glm5_next_vision glm_image_vision glm_ocr_vision got_ocr2_vision hiera instructblip_vision_model
            instructblipvideo_vision_model mgp-str pp_formulanet_vision pp_ocrv5_mobile_rec pp_ocrv5_server_rec
            pp_ocrv6_small_rec qwen2_5_vl_vision qwen2_vl_vision qwen3_5_moe_vision qwen3_5_vision
            qwen3_omni_moe_vision_encoder qwen3_vl_moe_vision qwen3_vl_vision qwen4_exp_vision
            sam2_hiera_det_model sam_hq_vision_model sam_vision_model seggpt slanext_vision timesformer
            unlimited_ocr_sam_vision_model vitdet
        """,
        "qkv_linear": "layoutlmv2",
    },
    _halves: {
        "kv_proj": "jetmoe",
        "to_kv": "evolla granite_speech_encoder granite_speech_plus_encoder",
    },
    _per_head: {
        "in_proj": "deberta",
        "qkv_proj": "minimax",
        "query_key_value": "bloom gpt_neox gpt_neox_japanese persimmon",
    },
    _fewer_heads: {
        "Wqkv": "dbrx",
        "qkv": "exaone4_5_vision",
        "qkv_proj": "phi3 phi4_multimodal",
    },
    _gpt2: {"c_attn": "decision_transformer gpt2 imagegpt"},
    _gpt_bigcode: {"c_attn": "gpt_bigcode"},
    _falcon: {"query_key_value": "falcon"},
    _codegen: {"qkv_proj": "codegen"},
    _delta_net: {"in_proj_qkv": "lara_mini qwen3_5_moe_text qwen3_5_text qwen4_exp_text"},
    _delta_net_with_gate: {"in_proj_qkvz": "qwen3_next"},
}

# By the type of a model and the name of a fused module.
LAYOUTS: dict[tuple[str | None, str], Layout] = {
    (model_type, leaf): layout
    for layout, names in _ROWS.items()
    for leaf, model_types in names.items()
    for model_type in model_types.split()
}
