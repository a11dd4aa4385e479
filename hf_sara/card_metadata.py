"""The metadata of a model card: reading what people wrote, and writing only what the Hub accepts.

A value that the Hub would refuse stops a push, so it must not get into the metadata of a card.
"""

import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import yaml
from huggingface_hub import ModelCardData

from .repos import is_hub_name

# YAML is read slowly: this much takes up to a second. The metadata of nearly all cards are far smaller.
MAX_CHARACTERS = 2**15
MAX_DEPTH = 20
# The licenses that the Hub knows, as its check of model cards names them. Others have the license "other" and a name.
LICENSE_NAMES = """
afl-3.0 agpl-3.0 apache-2.0 apple-amlr apple-ascl artistic-2.0 bigcode-openrail-m bigscience-bloom-rail-1.0
bigscience-openrail-m bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear bsl-1.0 c-uda cc cc-by-2.0 cc-by-2.5 cc-by-3.0
cc-by-4.0 cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nc-nd-3.0 cc-by-nc-nd-4.0 cc-by-nc-sa-2.0 cc-by-nc-sa-3.0
cc-by-nc-sa-4.0 cc-by-nd-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc0-1.0 cdla-permissive-1.0 cdla-permissive-2.0 cdla-sharing-1.0
creativeml-openrail-m deepfloyd-if-license ecl-2.0 epl-1.0 epl-2.0 etalab-2.0 eupl-1.1 eupl-1.2
fair-noncommercial-research-license gemma gfdl gpl gpl-2.0 gpl-3.0 grok2-community h-research intel-research isc lgpl
lgpl-2.1 lgpl-3.0 lgpl-lr llama2 llama3 llama3.1 llama3.2 llama3.3 llama4 lppl-1.3c mit mpl-2.0 ms-pl ncsa odbl odc-by
ofl-1.1 openmdw-1.0 openrail openrail++ osl-3.0 other pddl postgresql unknown unlicense wtfpl zlib
"""
LICENSES = frozenset(LICENSE_NAMES.split())
RELATIONS = ("adapter", "merge", "quantized", "finetune")
# Texts that some readers of YAML take for numbers, dates or more, if they stand without quotes.
AMBIGUOUS = re.compile(r"[-+]?\.?([0-9][-+.:0-9a-fA-FoOxXtTzZ_ ]*|nan|NaN|NAN|inf|Inf|INF)|=|<<")
SURROGATES = re.compile("[\ud800-\udfff]")


def is_repo(name: Any) -> bool:
    """Whether a value can be the name of a model or of a data set on the Hub."""
    return isinstance(name, str) and is_hub_name(name) and name.isascii() and name[0].isalnum()


def is_language(code: str) -> bool:
    """Whether a text has the form of a language code."""
    return re.fullmatch("[a-z]{2,3}|code|multilingual", code) is not None


def is_text(text: str) -> bool:
    """Any text is accepted."""
    return True


# Which values the Hub accepts in its known fields: one text, one text or a list of texts, or a list of texts.
ONE: dict[str, Callable[[str], bool]] = {
    "base_model_relation": RELATIONS.__contains__,
    **dict.fromkeys(("library_name", "license_link", "license_name", "model_name", "pipeline_tag"), is_text),
}
ONE_OR_MORE: dict[str, Callable[[str], bool]] = {
    "base_model": is_repo,
    "datasets": is_repo,
    "language": is_language,
    "license": LICENSES.__contains__,
}
LISTS = ("tags", "metrics")
KNOWN = (*ONE, *ONE_OR_MORE, *LISTS, "model-index")
# What reported results must have. A type here stands for any value of it that is not empty.
MODEL_INDEX = [
    {
        "name": str,
        "results": [
            {
                "task": {"type": str},
                "dataset": {"type": str, "name": str},
                "metrics": [{"type": str, "value": (str, int, float)}],
            }
        ],
    }
]
# ModelCard of huggingface_hub cannot load a card with one of these fields, nor with one of the name of a method.
RESERVED = ("self", "ignore_metadata_errors", "eval_results")


# ---- values ----


def accepted(key: str, value: Any) -> bool:
    """Whether the Hub accepts a value in a field, and reading the card gives the same value back."""
    if key in RESERVED or hasattr(ModelCardData, key) or not _is_plain({key: value}, MAX_DEPTH):
        return False
    if key == "model-index":
        return _fits(value, MODEL_INDEX) and _is_loadable(value)
    if key in LISTS:
        return isinstance(value, list) and all(isinstance(item, str) for item in value)
    if key in ONE:
        return isinstance(value, str) and ONE[key](value)
    if key in ONE_OR_MORE:
        values = value if isinstance(value, list) else [value]
        return all(isinstance(item, str) and ONE_OR_MORE[key](item) for item in values)
    return True


def normalized(key: str, value: Any) -> dict[str, Any]:
    """The fields for a field that people gave: one text becomes a list where the Hub wants one."""
    if key in LISTS and isinstance(value, str):
        return {key: [value]}
    if key == "license" and isinstance(value, str) and value not in LICENSES:
        if value.lower() in LICENSES:
            return {key: value.lower()}
        return {key: "other", "license_name": value}
    return {key: value}


def _is_plain(value: Any, depth: int) -> bool:
    """Whether a value is of texts, numbers, lists and mappings only, none of which is too deep, large or odd."""
    if depth == 0:
        return False
    kind = type(value)
    if kind is dict:
        return all(type(key) is str and _is_plain(key, depth) and _is_plain(value[key], depth - 1) for key in value)
    if kind is list:
        return all(_is_plain(item, depth - 1) for item in value)
    if kind is str:
        return len(value) <= MAX_CHARACTERS and not SURROGATES.search(value)
    if kind is int:
        return abs(value) < 2**63
    return kind is bool or value is None or (kind is float and math.isfinite(value))


def _fits(value: Any, shape: Any) -> bool:
    """Whether a value has the form of `shape`."""
    if isinstance(shape, list):
        return isinstance(value, list) and all(_fits(item, shape[0]) for item in value)
    if isinstance(shape, dict):
        return isinstance(value, dict) and all(_fits(value.get(key), inner) for key, inner in shape.items())
    return isinstance(value, shape) and value != ""


def _is_loadable(index: list) -> bool:
    """Whether huggingface_hub can read and write the results."""
    try:
        fields: Any = {"model-index": index}
        ModelCardData(**fields).to_dict()
    except Exception:
        # It is not written for odd values, and lets out errors of many kinds.
        return False
    return True


# ---- reading ----


@dataclass
class Metadata:
    """
    What people wrote as the metadata of a card.

    Args:
        fields (`dict[str, Any]`): The fields that the Hub accepts.
        comments (`list[str]`): The comments.
        rest (`list[str]`): The text of all else.
        is_sound (`bool`): Whether the Hub accepts the text as it is.
    """

    fields: dict[str, Any] = field(default_factory=dict)
    comments: list[str] = field(default_factory=list)
    rest: list[str] = field(default_factory=list)
    is_sound: bool = True


class _Loader(yaml.SafeLoader):
    """
    Reads texts, numbers, lists and mappings, and keeps the comments. A date is a text, and so is `no`, which is a
    language on the Hub. Aliases and deep nesting are errors, because a few lines of them can stand for gigabytes.
    """

    yaml_implicit_resolvers: dict = {}  # noqa: RUF012

    def __init__(self, text: str):
        super().__init__(text)
        self.depth = 0
        self.is_ambiguous = False
        self.comments: list[str] = []

    def scan_to_next_token(self) -> None:
        start = self.pointer
        super().scan_to_next_token()
        lines = map(str.strip, self.buffer[start : self.pointer].splitlines())
        self.comments += [line for line in lines if line.startswith("#")]

    def resolve(self, kind: Any, value: Any, implicit: Any) -> Any:
        tag = super().resolve(kind, value, implicit)
        if kind is yaml.ScalarNode and implicit[0] and tag.endswith(":str") and AMBIGUOUS.fullmatch(value):
            self.is_ambiguous = True
        return tag

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.peek_event().anchor is not None:
            raise yaml.YAMLError("there is an anchor or an alias")
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise yaml.YAMLError("it is nested too deeply")
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        found = super().construct_mapping(node, deep)
        if len(found) < len(node.value):
            raise yaml.YAMLError("there is a key twice")
        return found


for tag, pattern, first in (
    ("null", r"(~|null|Null|NULL|)\Z", ["~", "n", "N", ""]),
    ("bool", r"(true|True|TRUE|false|False|FALSE)\Z", list("tTfF")),
    ("int", r"[-+]?(0|[1-9][0-9]*)\Z", list("-+0123456789")),
    ("float", r"[-+]?[0-9]+\.[0-9]*([eE][-+][0-9]+)?\Z", list("-+0123456789")),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{tag}", re.compile(pattern), first)


def read_metadata(text: str) -> Metadata:
    """Read the text between the two lines `---` of a card. There is no error: what cannot be read is in `rest`."""
    unread = Metadata(rest=[text.strip()], is_sound=False)
    if len(text) > MAX_CHARACTERS:
        return unread
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
    except Exception:
        # Besides its own errors, PyYAML lets out those of Python for odd values, like a ValueError.
        return unread
    found = Metadata(comments=loader.comments, is_sound=not loader.is_ambiguous)
    if node is None:
        found.is_sound = not text.strip()
        return found
    if node.tag != "tag:yaml.org,2002:map" or not isinstance(node, yaml.MappingNode):
        return unread
    for source, key, value in _fields(loader, node, text):
        fields = normalized(key, value) if isinstance(key, str) else {}
        if value is None and key in KNOWN:
            # An empty field says nothing, and the Hub refuses it.
            found.is_sound = False
        elif fields and all(name not in found.fields and accepted(name, fields[name]) for name in fields):
            found.fields.update(fields)
            found.is_sound &= fields == {key: value}
        else:
            found.rest.append(source)
            found.is_sound = False
    return found


def _fields(loader: _Loader, node: yaml.MappingNode, text: str) -> Iterator[tuple[str, Any, Any]]:
    """The source, the key and the value of each field. The key of a field with an error is `None`."""
    pairs = list(node.value)
    starts = [key.start_mark.index for key, _ in pairs]
    for (key_node, value_node), start, end in zip(pairs, starts, [*starts, len(text)][1:], strict=True):
        try:
            key, value = (loader.construct_object(part, deep=True) for part in (key_node, value_node))
        except Exception:
            key = value = None
        yield text[start:end].strip(), key, value


# ---- writing ----


class _Dumper(yaml.SafeDumper):
    def ignore_aliases(self, data: Any) -> bool:
        return True


def _quoted(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    """Quote the texts that readers of YAML understand in different ways, and whose line breaks PyYAML would change."""
    odd = AMBIGUOUS.fullmatch(text) or re.search("[\x85\u2028\u2029\ufeff]", text)
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style='"' if odd else None)


_Dumper.add_representer(str, _quoted)


def field_text(key: str, value: Any) -> str:
    """A field as YAML."""
    return yaml.dump({key: value}, Dumper=_Dumper, allow_unicode=True, sort_keys=False, width=math.inf)
