"""The query and value projections of a model, which are adapted if the arguments name no modules.

They are found by the names that models give to the linears of an attention, and not by a list of models.
"""

import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from .heads import input_embedding
from .linears import is_linear
from .patterns import is_within
from .sites import Site

# The words of a name that have a role, the longest first: `q_proj`, `query`, `to_q`, `Wqkv`, `kv_b_proj`, ...
ROLES = {
    "qkv": ("query_key_value", "qkv[a-z]?", "c_attn", "att_proj"),
    "kv": ("key_value", "kv"),
    "q": ("query", "queries", "q"),
    "k": ("keys?", "k"),
    "v": ("values?", "v"),
}
PATTERNS = {
    role: re.compile(rf"(?P<before>(?:.*_)?)w?(?:{'|'.join(words)})(?P<after>(?:proj|_.*)?)")
    for role, words in ROLES.items()
}
# In a state space layer and in a gated convolution, this linear makes what stands for query, key and value there.
WITHOUT_ATTENTION = "in_proj"
# Inner models of a model with two configurations of texts, and their sub-configurations.
TEXT_CONFIGS = {"encoder", "decoder"}
TEXT_INPUTS = {"input_ids", "decoder_input_ids", "inputs_embeds"}

Named = tuple[str, Site]


def default_sites(model: nn.Module, offered: Sequence[Site]) -> list[Site]:
    """
    The query and value projections among the sites that a model offers. Of a multi-modal model, these are those of
    its text model.

    Args:
        model ([`~transformers.PreTrainedModel`]): The model.
        offered (`Sequence[Site]`): Its sites. Those of fused modules with a known layout are projections.
    """
    families: dict[str, list[Named]] = defaultdict(list)
    names_of = defaultdict(list)
    for name, module in model.named_modules(remove_duplicate=False):
        names_of[module].append(name)
    for site in offered:
        # A module that two layers share belongs to the attention of both.
        for name in names_of[site.linear(model)]:
            parent, leaf = place(model, name)
            families[parent].append((site.label or leaf, site))
    # The attention of a model is in its layers, and what stands beside them is a head.
    families = {parent: family for parent, family in families.items() if parent} or families
    for lenient in (False, True):
        names = {site.name for family in families.values() for site in _query_and_value(family, lenient)}
        if names:
            break
    found = [site for site in offered if site.name in names]
    text = _text_model(model)
    return beside_towers(model, [site for site in found if text and is_within(site.name, [text])] or found)


def place(model: nn.Module, name: str) -> tuple[str, str]:
    """
    The module that a linear belongs to, and its name there. If it is the only linear of a wrapper whose name has a
    role, its name is that of the wrapper.
    """
    parent, _, leaf = name.rpartition(".")
    outer, _, wrapper = parent.rpartition(".")
    if role_of(leaf) is None and role_of(wrapper) is not None:
        inside = (module for module in model.get_submodule(parent).modules() if is_linear(module))
        if len(list(inside)) == 1:
            return outer, wrapper
    return parent, leaf


def role_of(leaf: str) -> tuple[str, str] | None:
    """The role that a name says, `"q"`, `"k"`, `"v"`, `"kv"` or `"qkv"`, and the rest of the name; `None` if none."""
    words = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", leaf).lower()
    for role, pattern in PATTERNS.items():
        match = pattern.fullmatch(words)
        if match is not None:
            return role, f"{match['before']} {match['after']}"
    return None


def _query_and_value(family: Sequence[Named], lenient: bool) -> list[Site]:
    """
    The query and the value among the linears of one parent, or a fused projection of both.

    Args:
        family (`Sequence[tuple[str, Site]]`): The sites of the parent by name.
        lenient (`bool`): Whether one of the two is enough, for models whose other one is no linear, and whether a
            layer without attention has something in their place.
    """
    by_role: dict[str, dict[str, list[Named]]] = defaultdict(lambda: defaultdict(list))
    for name, site in family:
        role = role_of(name)
        if role is not None:
            by_role[role[0]][role[1]].append((name, site))
    # A fused module of unknown layout is adapted as a whole.
    fused = [site for _, site in _flat(by_role["qkv"])]
    queries, values = by_role["q"], by_role["v"] or by_role["kv"]
    if queries and values:
        # `q_b_proj` belongs to `kv_b_proj`, and `query_global` to `value_global`.
        both = queries.keys() & values.keys()
        return fused + _shortest(queries, both) + _shortest(values, both)
    if lenient:
        fused += [site for _, site in _flat(values)]
        fused += [site for _, site in _flat(queries) if by_role["k"]]
        fused += [site for name, site in family if name == WITHOUT_ATTENTION]
    return fused


def _flat(side: dict[str, list[Named]]) -> list[Named]:
    return [named for found in side.values() for named in found]


def _shortest(side: dict[str, list[Named]], both: Iterable[str]) -> list[Site]:
    found = _flat({rest: side[rest] for rest in both}) or _flat(side)
    least = min(len(name) for name, _ in found)
    return [site for name, site in found if len(name) == least]


def _inner_configs(model: Any) -> dict[str, PreTrainedConfig]:
    config = getattr(model, "config", None)
    return {} if config is None else {k: v for k, v in vars(config).items() if isinstance(v, PreTrainedConfig)}


def _text_model(model: Any) -> str | None:
    """The name of the text model in a multi-modal model, or `None` for a model of texts alone, or of images alone."""
    inner = set(_inner_configs(model))
    if not inner or (inner <= TEXT_CONFIGS and _takes_text(model)) or not hasattr(model, "get_decoder"):
        return None
    decoder = model.get_decoder()
    return next((name for name, module in model.named_modules() if module is decoder), None)


def beside_towers(model: nn.Module, sites: Sequence[Site]) -> list[Site]:
    """
    The sites that are in no tower, if the model itself takes texts, and else all sites. A tower is an inner model that
    takes no texts, or a module that has the configuration of one.
    """
    if not _takes_text(model) or input_embedding(model) is None:
        return list(sites)
    texts = {type(config) for key, config in _inner_configs(model).items() if key in TEXT_CONFIGS or "text" in key}
    others = {type(config) for config in _inner_configs(model).values()} - texts
    towers = [
        name
        for name, module in model.named_modules()
        if name
        and (
            (isinstance(module, PreTrainedModel) and not _takes_text(module))
            or type(getattr(module, "config", None)) in others
        )
    ]
    return [site for site in sites if not is_within(site.module, towers)] or list(sites)


def _takes_text(model: Any) -> bool:
    return getattr(model, "main_input_name", "input_ids") in TEXT_INPUTS
