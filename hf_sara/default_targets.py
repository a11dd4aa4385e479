"""The query and value projections of a model, which are adapted if the arguments name no modules.

They are found by the names that models give to the linears of an attention, and not by a list of models.
"""

import re
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from torch import nn
from transformers import PreTrainedConfig

from .patterns import is_within
from .sites import Site

# A name of one of these forms has a role: `q_proj`, `query`, `to_q`, `Wqkv`, `kv_b_proj`, `c_attn`, ...
ROLES = {"query": "q", "key": "k", "value": "v", "key_value": "kv", "query_key_value": "qkv"}
NAME_WITH_A_ROLE = re.compile(
    r"(?P<before>(?:.*_)?)w?(?P<role>query_key_value|key_value|query|key|value|qkv|kv|q|k|v)(?P<after>(?:_.*)?)"
)
FUSED_NAMES = ("c_attn", "att_proj")
# The sub-configurations of a model of texts alone.
TEXT_CONFIGS = {"encoder", "decoder"}


def default_sites(model: nn.Module, offered: Sequence[Site]) -> list[Site]:
    """
    The query and value projections among the sites that a model offers. Of a multi-modal model, these are those of
    its text model.

    Args:
        model ([`~transformers.PreTrainedModel`]): The model.
        offered (`Sequence[Site]`): Its sites. Those of fused modules with a known layout are projections.
    """
    families: dict[str, list[tuple[str, Site]]] = defaultdict(list)
    for site in offered:
        parent, leaf = place(model, site.module)
        families[parent].append((site.label or leaf, site))
    found = {site.name for family in families.values() for site in _pair(family)}
    text = _text_model(model)
    inside = {name for name in found if text and is_within(name, [text])}
    return [site for site in offered if site.name in (inside or found)]


def place(model: nn.Module, name: str) -> tuple[str, str]:
    """
    The module that a linear belongs to, and its name there. If it is alone in a wrapper whose name has a role, its
    name is that of the wrapper.
    """
    parent, _, leaf = name.rpartition(".")
    if role_of(leaf) is None and parent:
        outer, _, wrapper = parent.rpartition(".")
        if role_of(wrapper) is not None and len(list(model.get_submodule(parent).children())) == 1:
            return outer, wrapper
    return parent, leaf


def role_of(leaf: str) -> tuple[str, str] | None:
    """The role that a name says, `"q"`, `"k"`, `"v"`, `"kv"` or `"qkv"`, and the rest of the name; `None` if none."""
    if leaf in FUSED_NAMES:
        return "qkv", ""
    match = NAME_WITH_A_ROLE.fullmatch(leaf.lower())
    if match is None:
        return None
    return ROLES.get(match["role"], match["role"]), f"{match['before']} {match['after']}"


def _pair(family: Sequence[tuple[str, Site]]) -> list[Site]:
    """The query and the value among the sites of one parent, or a fused projection of both."""
    by_role: dict[str, dict[str, list[tuple[str, Site]]]] = defaultdict(lambda: defaultdict(list))
    for name, site in family:
        role = role_of(name)
        if role is not None:
            by_role[role[0]][role[1]].append((name, site))
    # A fused module of unknown layout is adapted as a whole.
    fused = [site for rest in by_role["qkv"].values() for _, site in rest]
    queries, values = by_role["q"], by_role["v"] or by_role["kv"]
    if not queries or not values:
        return fused
    # `q_b_proj` belongs to `kv_b_proj`, and `query_global` to `value_global`.
    both = queries.keys() & values.keys()
    return fused + [site for side in (queries, values) for site in _shortest(side, both)]


def _shortest(side: dict[str, list[tuple[str, Site]]], both: Any) -> list[Site]:
    named = [pair for rest, pairs in side.items() if rest in both or not both for pair in pairs]
    least = min(len(name) for name, _ in named)
    return [site for name, site in named if len(name) == least]


def _text_model(model: Any) -> str | None:
    """The name of the text model in a multi-modal model, or `None` for a model of texts alone, or of images alone."""
    config = getattr(model, "config", None)
    inner = set() if config is None else {k for k, v in vars(config).items() if isinstance(v, PreTrainedConfig)}
    takes_text = getattr(model, "main_input_name", "input_ids") == "input_ids"
    if not inner or (inner <= TEXT_CONFIGS and takes_text) or not hasattr(model, "get_decoder"):
        return None
    decoder = model.get_decoder()
    return next((name for name, module in model.named_modules() if module is decoder), None)
