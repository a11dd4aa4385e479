"""`SaraAdapter`: attach updates to a model, switch them, merge them, take them off again."""

import contextlib
import itertools
import logging
import re
from collections.abc import Iterator
from dataclasses import replace
from os import PathLike
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from . import storage
from .arguments import SaraArguments
from .deltas import DELTAS, Delta, frozen_shapes, is_plain, trained_shapes
from .planning import Plan, count_base, plan, solve_threshold
from .sites import Site, find_sites
from .spectrum import Factors, find_factors, for_each

if TYPE_CHECKING:
    from huggingface_hub import CommitInfo

logger = logging.getLogger(__name__)

_merge_counter = itertools.count(1)


def add_deltas(module: nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor:
    """The one forward hook: adds the enabled updates of a linear to its output. It captures no state."""
    # Whether this is the output of the frozen linear itself, which no other hook has seen or changed.
    own = is_plain(module) and len(module._forward_hooks) == 1 and type(output) is torch.Tensor
    linear = module if own else None
    for delta in module.sara.values():
        if delta.enabled:
            output = delta(args[0], output, linear)
            linear = None
    return output


class SaraAdapter:
    """
    A SARA or Mo-SARA adapter on a model. The model stays the object that it was: every update is a child module `sara`
    of the linear that it adapts, and one forward hook per linear adds it. The handle is also `model.sara_adapter`.

    Use [`SaraAdapter.attach`] for a new adapter and [`SaraAdapter.load`] for a saved one.

    Attributes:
        model ([`~transformers.PreTrainedModel`]): The adapted model.
        args ([`SaraArguments`]): The adapter's arguments.
        name (`str`): Its name on this model.
        threshold (`float`): The threshold in force.
        sites (`list[Site]`): What is adapted; each with `.name`, `.shape` (d_in, d_out) and `.k`.
        seeds (`dict[str, storage.Seed]`): Mo-SARA: what identifies each site's frozen factors.
    """

    def __init__(
        self,
        model: nn.Module,
        args: SaraArguments,
        sites: list[Site],
        threshold: float,
        factors: dict[str, Factors] | None = None,
        seeds: dict[str, storage.Seed] | None = None,
        name: str = "default",
    ):
        self.model = model
        self.args = args
        self.name = name
        self.threshold = threshold
        self.sites = sites
        self.seeds = seeds or {}
        self._originals: dict[str, torch.Tensor] = {}
        self._merge_order = 0
        self._unfrozen: list[str] = []
        self._insert(factors or {})

    # ---- making one ----

    @classmethod
    def attach(cls, model: nn.Module, args: SaraArguments | None = None, name: str = "default") -> "SaraAdapter":
        """
        Attach a new adapter and freeze the base.

        Args:
            model ([`~transformers.PreTrainedModel`]): The base model, with its weights loaded.
            args ([`SaraArguments`], *optional*): The adapter's arguments; defaults to SARA at threshold 0.01.
            name (`str`, *optional*, defaults to `"default"`): Name on this model, where it carries several.

        Returns:
            [`SaraAdapter`]: The handle; the model itself is changed in place and keeps its class.

        Raises:
            `ValueError`: If the name is taken, a module does not exist, or a weight has no rank. The model is then as
                it was.
        """
        args = SaraArguments() if args is None else args
        model = unwrap(model)
        _check_name(model, name)
        if args.method == "sara":
            planned = plan(model, args)
            return cls(model, args, planned.sites, planned.threshold, name=name)
        sites = find_sites(model, args)
        threshold = args.resolved_threshold()
        if args.parameter_budget is not None:
            threshold = solve_threshold(sites, args, count_base(model), lambda site: site.weight(model))

        def factorise(site: Site) -> tuple[Factors, storage.Seed]:
            weight = site.weight(model)
            seed = storage.Seed.of_weight(weight)
            found = find_factors(weight, threshold=threshold, site=site.name, digest=seed.sha256)
            return found, seed.with_factors(found)

        results = for_each(factorise, sites, "Singular vectors")
        sites = [replace(site, k=found.k) for site, (found, _) in zip(sites, results, strict=True)]
        factors = {site.name: found for site, (found, _) in zip(sites, results, strict=True)}
        seeds = {site.name: seed for site, (_, seed) in zip(sites, results, strict=True)}
        return cls(model, args, sites, threshold, factors, seeds, name)

    @classmethod
    def load(
        cls, model: nn.Module, folder_or_repo_id: str | PathLike, name: str = "default", **access: Any
    ) -> "SaraAdapter":
        """
        Attach a saved adapter to a base that is already in memory. Everything is checked before the model is touched.

        Args:
            model ([`~transformers.PreTrainedModel`]): The base model that the adapter was trained on.
            folder_or_repo_id (`str` or `os.PathLike`): Folder that [`SaraAdapter.save_pretrained`] wrote, or a Hub id.
            name (`str`, *optional*, defaults to `"default"`): Name on this model.
            access: `revision`, `token`, `cache_dir` and `local_files_only`, as in [`~hf_sara.storage.locate`].

        Returns:
            [`SaraAdapter`]: The handle. Its tensors can be trained further.

        Raises:
            `FileNotFoundError`: If the folder, the repository or one of its files is missing.
            `OSError`: If the download failed.
            [`storage.AdapterError`]: If a file is damaged, a tensor is missing, unexpected, misshaped, empty or not
                finite, or the base is not the one of the training.
        """
        model = unwrap(model)
        _check_name(model, name)
        saved = storage.read(storage.locate(folder_or_repo_id, **access))
        sites = saved.sites_on(model)
        tensors = saved.tensors
        factors = saved.factors_on(model, sites)
        adapter = cls(model, saved.args, sites, saved.threshold, factors, saved.seeds, name)
        adapter.load_state_dict(tensors)
        return adapter

    @classmethod
    def of(cls, model: nn.Module, name: str | None = None) -> "SaraAdapter | None":
        """The adapter of that name on a model (the first one, if no name is given), or `None`."""
        adapters = getattr(unwrap(model), "sara_adapters", {})
        return next(iter(adapters.values()), None) if name is None else adapters.get(name)

    def _insert(self, factors: dict[str, Factors]) -> None:
        self._unfrozen = [
            parameter_name
            for parameter_name, parameter in self.model.named_parameters()
            if parameter.requires_grad and ".sara." not in parameter_name
        ]
        for parameter_name in self._unfrozen:
            self.model.get_parameter(parameter_name).requires_grad_(False)
        for site in self.sites:
            module = self.model.get_submodule(site.module)
            dtype = module.weight.dtype if module.weight.is_floating_point() else self.model.dtype
            delta = DELTAS[self.args.method](self.args, site, site.k, dtype, module.weight.device)
            if site.name in factors:
                delta.set_factors(factors[site.name].U, factors[site.name].Vh)
                delta.follow_weight(module)
            if not hasattr(module, "sara"):
                module.sara = nn.ModuleDict()
                module.register_forward_hook(add_deltas)
            module.sara[self._key(site)] = delta.train(module.training)
        adapters = getattr(self.model, "sara_adapters", {})
        self.model.sara_adapters = {**adapters, self.name: self}
        self.model.sara_adapter = self
        logger.info("Attached %s", Plan(self.args, self.threshold, self.sites, count_base(self.model)))

    def _key(self, site: Site) -> str:
        return f"{self.name}:{site.label}" if site.label else self.name

    # ---- what it holds ----

    def delta(self, site: Site) -> Delta:
        """The update's module at one site."""
        return self.model.get_submodule(site.module).sara[self._key(site)]

    def deltas(self) -> Iterator[tuple[Site, Delta]]:
        """All sites with their updates' modules."""
        return ((site, self.delta(site)) for site in self.sites)

    def trained(self) -> dict[str, nn.Parameter]:
        """The trained tensors, named `"<site>.<tensor>"`."""
        return {f"{s.name}.{name}": tensor for s, delta in self.deltas() for name, tensor in delta.trained().items()}

    def state_dict(self) -> dict[str, torch.Tensor]:
        """
        Copies of the trained tensors on the CPU, named as in [`SaraAdapter.trained`]. Of a model that FSDP shards they
        are whole, and every process has to call this.
        """
        return {name: _whole_copy(tensor) for name, tensor in self.trained().items()}

    def frozen_factors(self) -> dict[str, torch.Tensor]:
        """Copies of Mo-SARA's frozen factors, named `"<site>.U"` and `"<site>.Vh"`; the rest as of `state_dict`."""
        return {
            f"{site.name}.{name}": _whole_copy(getattr(delta, name))
            for site, delta in self.deltas()
            for name in frozen_shapes(self.args, site.shape, site.k)
        }

    @torch.no_grad()
    def load_state_dict(self, tensors: dict[str, torch.Tensor]) -> None:
        """Put trained tensors in place. The names and shapes have to be exactly the adapter's own."""
        storage.check_tensors(tensors, storage.shapes_at(trained_shapes, self.args, self.sites))
        for name, tensor in self.trained().items():
            value = tensors[name].to(tensor.device)
            if hasattr(tensor, "full_tensor"):
                # A shard, see `state_dict`.
                from torch.distributed.tensor import distribute_tensor

                value = distribute_tensor(value, tensor.device_mesh, tensor.placements)
            tensor.copy_(value)

    def num_parameters(self) -> int:
        """Number of trained parameters."""
        return sum(tensor.numel() for tensor in self.trained().values())

    def plan(self) -> Plan:
        """Sites, ranks and counts of this adapter."""
        return Plan(self.args, self.threshold, self.sites, count_base(self.model))

    def summary(self) -> str:
        """A table of the sites with their shapes, ranks and parameters, and one line that sums them up."""
        width = max(len(site.name) for site in self.sites)
        lines = [f"{'site':<{width}}  {'d_in':>6} {'d_out':>6} {'k':>5} {'trained':>10}"]
        for site, delta in self.deltas():
            count = sum(tensor.numel() for tensor in delta.trained().values())
            lines.append(f"{site.name:<{width}}  {site.shape[0]:>6} {site.shape[1]:>6} {site.k:>5} {count:>10,}")
        return "\n".join([*lines, str(self.plan())])

    def __repr__(self) -> str:
        return f"SaraAdapter(name={self.name!r}, {self.plan()})"

    def save_pretrained(self, folder: str | PathLike) -> None:
        """
        Write the adapter's files, atomically and without pickle: a crash leaves the old adapter or the new one.

        Args:
            folder (`str` or `os.PathLike`): Made if it does not exist.

        Raises:
            [`storage.AdapterError`]: If a trained tensor is empty or not finite. Nothing is written then.
        """
        storage.write(self, folder)

    def push_to_hub(self, repo_id: str, **kwargs: Any) -> "CommitInfo":
        """Push the adapter and its model card to the Hub, in one commit: see [`~hf_sara.push_to_hub`]."""
        from .hub import push_to_hub

        return push_to_hub(self, repo_id, **kwargs)

    # ---- switching ----

    def enable(self) -> None:
        """Let the updates count."""
        self._refuse_merged("enable")
        self._set_enabled(True)

    def disable(self) -> None:
        """Let the updates not count: the model computes exactly what the base computes."""
        self._refuse_merged("disable")
        self._set_enabled(False)

    @contextlib.contextmanager
    def disabled(self) -> Iterator[None]:
        """Within the context the model is the base."""
        before = {site.name: delta.enabled for site, delta in self.deltas()}
        self.disable()
        try:
            yield
        finally:
            for site, delta in self.deltas():
                delta.enabled = before[site.name]

    def _set_enabled(self, enabled: bool) -> None:
        for _, delta in self.deltas():
            delta.enabled = enabled

    def _refuse_merged(self, action: str) -> None:
        if self.merged:
            raise ValueError(
                f"Cannot {action} the adapter {self.name!r}: it is merged into the weights. Unmerge first."
            )

    # ---- merging ----

    @property
    def merged(self) -> bool:
        """Whether the updates are part of the base weights now."""
        return self._merge_order > 0

    @torch.no_grad()
    def merge(self) -> None:
        """
        Add the updates to the base weights, computed in float32, rounded once to the weights' dtype. The weights' own
        bits are kept, so that [`SaraAdapter.unmerge`] restores them.

        Raises:
            `ValueError`: For Mo-SARA with more than one head (its update depends on the token), weights that are
                quantized or tied to another module's, or a sum that the dtype cannot hold. The weights are then as
                they were.
        """
        self._refuse_merged("merge")
        refuse_tied(self.model, self.sites)
        merged: dict[str, torch.Tensor] = {}
        for site, delta in self.deltas():
            merged[site.name] = merged_weight(site, self.model.get_submodule(site.module), delta)
        for site in self.sites:
            module = self.model.get_submodule(site.module)
            self._originals[site.name] = site.read(module).clone()
            self._write(site, merged.pop(site.name))
        self._set_enabled(False)
        self._merge_order = next(_merge_counter)

    @torch.no_grad()
    def unmerge(self) -> None:
        """Restore the very bits that the base weights had before [`SaraAdapter.merge`]."""
        if not self.merged:
            raise ValueError(f"The adapter {self.name!r} is not merged.")
        later = [a.name for a in self.model.sara_adapters.values() if a._merge_order > self._merge_order]
        if later:
            raise ValueError(f"Unmerge {later} first: they were merged after {self.name!r}, on top of it.")
        for site in self.sites:
            module = self.model.get_submodule(site.module)
            self._write(site, self._originals.pop(site.name).to(module.weight.device))
        self._merge_order = 0
        self._set_enabled(True)

    def _write(self, site: Site, weight: torch.Tensor) -> None:
        module = self.model.get_submodule(site.module)
        site.write(module, weight)
        for delta in module.sara.values():
            delta.follow_weight(module)

    def _keep_merged(self) -> None:
        """Forget the base's own bits: the merged weights are the base from now on."""
        self._originals.clear()
        self._merge_order = 0

    def detach(self) -> None:
        """
        Take the adapter off the model: its modules, its hooks and its attributes. With the last adapter the parameters
        that could be trained before can be trained again. A merged adapter is unmerged first.
        """
        if self.merged:
            self.unmerge()
        for site in self.sites:
            module = self.model.get_submodule(site.module)
            del module.sara[self._key(site)]
            if not len(module.sara):
                del module.sara
                for key in [key for key, hook in module._forward_hooks.items() if hook is add_deltas]:
                    del module._forward_hooks[key]
        others = {name: other for name, other in self.model.sara_adapters.items() if other is not self}
        if others:
            self.model.sara_adapters = others
            self.model.sara_adapter = heir = next(reversed(others.values()))
            heir._unfrozen += self._unfrozen
        else:
            del self.model.sara_adapters, self.model.sara_adapter
            for name in self._unfrozen:
                self.model.get_parameter(name).requires_grad_(True)


def _whole_copy(tensor: torch.Tensor) -> torch.Tensor:
    whole = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return whole.detach().cpu().clone().contiguous()


def merged_weight(site: Site, module: nn.Module, delta: Delta) -> torch.Tensor:
    """A site's weight plus its update, of shape (d_in, d_out): computed in at least float32, rounded once."""
    if not module.weight.is_floating_point() or getattr(module.weight, "quant_state", None) is not None:
        raise ValueError(f"{site.name}: a quantized weight cannot be merged into. Load the base unquantized.")
    weight = site.read(module)
    update = delta.merged()
    merged = (weight.to(update.dtype) + update).to(weight.dtype)
    if not torch.isfinite(merged).all():
        raise ValueError(f"{site.name}: weight plus update leaves the range of {weight.dtype}. Use a wider dtype.")
    return merged


def refuse_tied(model: nn.Module, sites: list[Site]) -> None:
    """Raise a `ValueError` if a site's weight is another module's too, as an output layer's often is the embedding."""
    owners: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        for parameter in module.parameters(recurse=False):
            owners.setdefault(id(parameter), []).append(name)
    for site in sites:
        others = [n for n in owners[id(model.get_submodule(site.module).weight)] if n != site.module]
        if others:
            raise ValueError(
                f"{site.name}: its weight is tied to {', '.join(others)}, which merging would change as well. "
                "Load the base with tie_word_embeddings=False, or leave the adapter unmerged."
            )


def adapter_of(model_or_adapter: nn.Module | SaraAdapter) -> SaraAdapter:
    """The adapter itself, or the only one that a model carries; a `ValueError` if it carries none or several."""
    if isinstance(model_or_adapter, SaraAdapter):
        return model_or_adapter
    adapters = getattr(unwrap(model_or_adapter), "sara_adapters", {})
    if not adapters:
        raise ValueError(f"This {type(model_or_adapter).__name__} carries no SARA adapter. Attach or load one first.")
    if len(adapters) > 1:
        raise ValueError(
            f"The model carries the adapters {', '.join(adapters)}. Pass the one that is meant: "
            "SaraAdapter.of(model, name)."
        )
    return next(iter(adapters.values()))


def unwrap(model: nn.Module) -> nn.Module:
    """The model inside of `torch.compile`'s wrapper."""
    return getattr(model, "_orig_mod", model)


def _check_name(model: nn.Module, name: str) -> None:
    if not re.fullmatch(r"[A-Za-z0-9_-]+", name):
        raise ValueError(f"The adapter name {name!r} may have letters, digits, '_' and '-' only.")
    if name in getattr(model, "sara_adapters", {}):
        raise ValueError(f"The model already carries an adapter {name!r}. Detach it, or choose another name.")
