"""Modules that transformers has renamed since an adapter was saved: their names in the model of today."""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from .base_model import names_in_model
from .manifest import Manifest


def renamed_modules(model: nn.Module, names: Iterable[str]) -> dict[str, str]:
    """
    By name of a module that a model does not have, the name that it has there. transformers knows it, because it loads
    old checkpoints into the model. If the model lacks it under any name, it is left out.
    """
    modules = dict(model.named_modules())
    gone = sorted({name for name in names if name not in modules})
    if not gone or not isinstance(model, PreTrainedModel):
        return {}
    found = names_in_model(model, [f"{name}.weight" for name in gone])
    there = {old.removesuffix(".weight"): new.removesuffix(".weight") for old, new in found.items()}
    return {old: new for old, new in there.items() if old != new and new in modules}


def rename(name: str, renames: Mapping[str, str]) -> str:
    """The name of today of a module, or of what lies inside of it, as a tensor or a projection."""
    stem = name
    while stem and stem not in renames:
        stem = stem.rpartition(".")[0]
    return renames[stem] + name.removeprefix(stem) if stem else name


def renamed_fields(manifest: Manifest, renames: Mapping[str, str]) -> dict[str, Any]:
    """The fields of a description that name modules, with the names of today."""

    def new(name: str) -> str:
        return rename(name, renames)

    return {
        "sites": [replace(site, name=new(site.name), module=new(site.module)) for site in manifest.sites],
        "parts": [replace(part, name=new(part.name)) for part in manifest.parts],
        "seeds": {new(name): seed for name, seed in manifest.seeds.items()},
        "untrained": frozenset(map(new, manifest.untrained)),
    }
