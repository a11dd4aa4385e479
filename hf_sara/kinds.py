"""What adapters of one bank have in common, and what cannot be in a bank."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from typing import Any

import torch
from torch import nn

from . import hub, storage
from .arguments import SaraArguments
from .base_model import BaseRecord
from .default_targets import beside_towers
from .errors import AdapterError
from .manifest import Manifest
from .parts import Part
from .sites import PlannedSite
from .spread import works_together

# The adapters of one bank are alike in these arguments.
ALIKE = ("method", "num_heads", "singular_values", "v_position")


@dataclass(frozen=True)
class Kind:
    """
    What adapters have to have in common to be in one bank.

    Args:
        choices (`dict[str, Any]`): Their arguments that decide what an update computes.
        base ([`BaseRecord`]): Their base.
        sites (`list[PlannedSite]`): Their sites with the ranks.
        factors (`Any`): What their frozen factors are known by.
    """

    choices: dict[str, Any]
    base: BaseRecord
    sites: list[PlannedSite]
    factors: Any

    @classmethod
    def of(cls, saved: Manifest, factors_sha256: str | None) -> "Kind":
        """The kind of an adapter, with the digest of its frozen factors if they are saved with it."""
        seeds = {name: (seed.sha256, seed.clusters, seed.to_json()["sketch"]) for name, seed in saved.seeds.items()}
        choices = {name: getattr(saved.args, name) for name in ALIKE}
        return cls(choices, saved.base, saved.sites, (factors_sha256, seeds))

    def refuse_other(self, other: "Kind", name: str, first: str) -> None:
        """Raise an [`AdapterError`] unless the adapter `name`, of another kind, can be in a bank with `first`."""
        found = [f"{k}={v!r} and not {self.choices[k]!r}" for k, v in other.choices.items() if v != self.choices[k]]
        if other.base.is_other_than(self.base):
            found.append(f"the base {other.base} and not {self.base}")
        if not found and other.sites != self.sites:
            there, here = ({site.name: site for site in kind.sites} for kind in (other, self))
            site = next(key for key in (*there, *here) if there.get(key) != here.get(key))
            ranks = [getattr(sites.get(site), "k", None) for sites in (there, here)]
            found.append(f"at {site} the rank {ranks[0]} and not {ranks[1]}")
        if not found and other.factors != self.factors:
            found.append("the frozen factors of another weight")
        if found:
            raise AdapterError(
                f"The adapter {name!r} cannot be in a bank with {first!r}: it has {'; '.join(found)}. Load it into a "
                "bank of its own: AdapterBank.load(model, {name: folder})."
            )


@dataclass(frozen=True)
class Entry:
    """
    An adapter that was read, without its files, of which a process can have a limited number open.

    Args:
        kind ([`Kind`]): Its kind.
        args ([`SaraArguments`]): Its arguments.
        threshold (`float`): Its threshold.
        tensors (`dict[str, torch.Tensor]`): Its trained tensors.
        untrained (`list[PlannedSite]`): The sites whose tensors are those of their start.
    """

    kind: Kind
    args: SaraArguments
    threshold: float
    tensors: dict[str, torch.Tensor]
    untrained: list[PlannedSite]


def read_entry(model: nn.Module, name: str, folder_or_repo_id: str | PathLike, access: Mapping[str, Any]) -> Entry:
    """Read an adapter and check its files."""
    saved = storage.read(hub.fetch_adapter(folder_or_repo_id, **access)).named_for(model)
    refuse_parts(saved.parts, f"The adapter {name!r}")
    kind = Kind.of(saved, saved.factors_sha256)
    return Entry(kind, saved.args, saved.threshold, saved.tensors, saved.untrained_sites())


def refuse_parts(parts: Sequence[Part], whose: str) -> None:
    """Raise an [`AdapterError`] if an adapter trains more than its updates."""
    if parts:
        raise AdapterError(
            f"{whose} trains {', '.join(part.name for part in parts)} in addition, which cannot be another one in "
            "each row of a batch. Use SaraAdapter on a model of its own, or make new adapters with modules_to_save=[] "
            "and without trainable_token_indices."
        )


@torch.no_grad()
def refuse_time_first(model: Any, sites: Sequence[PlannedSite]) -> None:
    """
    Raise a `ValueError` if a linear of a model of texts gets the places of a text before the rows of the batch, as in
    XLNet. With as many places as rows, nobody could tell. This runs the model on six tokens.
    """
    if getattr(model, "main_input_name", None) != "input_ids" or works_together(model):
        return
    found: list[str] = []

    def look(module: nn.Module, args: tuple[Any, ...], name: str) -> None:
        if args and isinstance(args[0], torch.Tensor) and args[0].shape[:-1] == (3, 2):
            found.append(name)

    handles = [
        site.linear(model).register_forward_pre_hook(lambda module, args, name=site.name: look(module, args, name))
        for site in sites
    ]
    tokens = torch.zeros(2, 3, dtype=torch.long, device=next(model.parameters()).device)
    inputs = {"input_ids": tokens, **({"decoder_input_ids": tokens} if model.config.is_encoder_decoder else {})}
    training = model.training
    model.eval()
    try:
        with torch.random.fork_rng():
            model(**inputs)
    except Exception:
        # What a model needs besides is not known here, and its first batch shows more.
        return
    finally:
        model.train(training)
        for handle in handles:
            handle.remove()
    if found:
        raise ValueError(
            f"{found[0]} cannot have another adapter in each row of a batch, because {type(model).__name__} puts the "
            "places of a text before the rows. Load the adapter with SaraAdapter.load."
        )


def refuse_sites(model: nn.Module, sites: Sequence[PlannedSite]) -> None:
    """Raise a `ValueError` if the input of a linear does not have the rows of the batch in their order."""
    inside = {site.name for site in beside_towers(model, sites)}
    for site in sites:
        if re.search(r"(^|\.)\w*experts?(\.|$)", site.module):
            why = "an expert gets tokens of any rows"
        elif site.name not in inside:
            why = "it is in a tower for images or sounds, of which a row may have several"
        else:
            continue
        raise ValueError(
            f"{site.name} cannot have another adapter in each row of a batch, because {why}. Load the adapter with "
            "SaraAdapter.load, or train it without this module (exclude_modules)."
        )
