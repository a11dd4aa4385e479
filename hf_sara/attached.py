"""Updates on a model: child modules of the linears that they adapt, and one forward hook per linear.

Nothing here knows of files or of the Hub.
"""

import contextlib
import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor

from .arguments import SaraArguments
from .factors import Factors
from .merging import MergedWeights
from .methods import Delta
from .methods.products import is_plain
from .planning import AdapterSpec
from .sites import PlannedSite, is_of_update
from .tensor_files import check_tensors


def add_deltas(module: Any, args: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor:
    """
    The forward hook of a linear, which adds the enabled updates to its output. It captures no state, so that a copy of
    the model uses its own updates.
    """
    # This is true if the output is that of the frozen linear itself, which no other hook can have seen or changed.
    own = is_plain(module) and len(module._forward_hooks) == 1 and type(output) is torch.Tensor
    linear = module if own else None
    for delta in module.sara.values():
        if delta.enabled:
            output = delta(args[0], output, linear)
            linear = None
    return output


def insert_delta(module: Any, key: str, delta: Delta) -> None:
    """Put an update on a linear, beside the updates that it already has."""
    if not hasattr(module, "sara"):
        module.sara = nn.ModuleDict()
        module.register_forward_hook(add_deltas)
    module.sara[key] = delta.train(module.training)


def remove_delta(module: Any, key: str) -> None:
    """Take an update off a linear. The hook is removed together with the last update."""
    del module.sara[key]
    if not len(module.sara):
        del module.sara
        for handle in [handle for handle, hook in module._forward_hooks.items() if hook is add_deltas]:
            del module._forward_hooks[handle]


def unwrap(model: Any) -> Any:
    """The model inside of `torch.compile`'s wrapper."""
    return getattr(model, "_orig_mod", model)


class AttachedUpdates:
    """
    The updates of one adapter on a model, under one name. They can be read, switched off, merged and removed.

    Args:
        model ([`~transformers.PreTrainedModel`]): The base model. Its parameters are frozen.
        spec ([`AdapterSpec`]): The arguments and the sites of the adapter.
        factors (`Mapping[str, Factors]`): The frozen factors by site, for a method that has some.
        name (`str`): The adapter's name on this model, which can carry several adapters.

    Raises:
        `ValueError`: If the model already carries an adapter of that name, or the name has other characters than
            allowed. The model is then left as it was.
    """

    def __init__(self, model: nn.Module, spec: AdapterSpec, factors: Mapping[str, Factors], name: str = "default"):
        check_name(model, name)
        self.model = model
        self.spec = spec
        self.name = name
        self._merged: MergedWeights | None = None
        self._unfrozen: list[str] = []
        for parameter_name, parameter in self.model.named_parameters():
            if parameter.requires_grad and not is_of_update(parameter_name):
                self._unfrozen.append(parameter_name)
                parameter.requires_grad_(False)
        method = self.spec.method
        for site in self.sites:
            module = site.linear(self.model)
            delta = method.make_delta(site, self.model, factors.get(site.name))
            if site.name in factors:
                delta.follow_weight(module)
            insert_delta(module, self._key(site), delta)
        _set_adapters(self.model, {**adapters_on(self.model), self.name: self})

    @property
    def args(self) -> SaraArguments:
        """The adapter's arguments."""
        return self.spec.args

    @property
    def threshold(self) -> float:
        """The threshold in force."""
        return self.spec.threshold

    @property
    def sites(self) -> list[PlannedSite]:
        """The adapted weights, each with `.name`, `.shape` (d_in, d_out) and `.k`."""
        return self.spec.sites

    def _key(self, site: PlannedSite) -> str:
        return f"{self.name}:{site.label}" if site.label else self.name

    # ---- contents ----

    def delta(self, site: PlannedSite) -> Delta:
        """The update's module at one site."""
        module: Any = self.model.get_submodule(site.module)
        return module.sara[self._key(site)]

    def deltas(self) -> Iterator[tuple[PlannedSite, Delta]]:
        """All sites with their updates' modules."""
        return ((site, self.delta(site)) for site in self.sites)

    def trained(self) -> dict[str, nn.Parameter]:
        """The trained tensors, named `"<site>.<tensor>"`."""
        return {f"{s.name}.{name}": tensor for s, delta in self.deltas() for name, tensor in delta.trained().items()}

    def state_dict(self) -> dict[str, torch.Tensor]:
        """
        Copies of the trained tensors on the CPU, named as in [`SaraAdapter.trained`]. If FSDP shards the
        model, the copies are whole tensors all the same, and every process has to call this.
        """
        return {name: _whole_copy(tensor) for name, tensor in self.trained().items()}

    def frozen_factors(self) -> dict[str, torch.Tensor]:
        """
        Copies of the frozen factors, named `"<site>.U"` and `"<site>.Vh"`, for a method that has some. For a sharded
        model, see [`SaraAdapter.state_dict`].
        """
        return {
            f"{site.name}.{name}": _whole_copy(delta.get_parameter(name))
            for site, delta in self.deltas()
            for name in self.spec.method.frozen_shapes(site.shape, site.k)
        }

    def saved_factors(self) -> dict[str, torch.Tensor]:
        """The frozen factors that are saved with the adapter. There are none if seeds are saved instead."""
        return self.frozen_factors() if self.spec.method.saves_factors else {}

    @torch.no_grad()
    def load_state_dict(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Copy tensors into the trained ones. Their names and shapes have to be exactly those of the adapter."""
        check_tensors(tensors, self.spec.trained_shapes())
        for name, tensor in self.trained().items():
            value = tensors[name].to(tensor.device)
            if isinstance(tensor, DTensor):
                # This process holds a shard of the tensor, see `state_dict`.
                value = distribute_tensor(value, tensor.device_mesh, tensor.placements)
            tensor.copy_(value)

    def num_parameters(self) -> int:
        """Number of trained parameters."""
        return sum(tensor.numel() for tensor in self.trained().values())

    # ---- switching ----

    def enable(self) -> None:
        """Switch the updates on."""
        self._refuse_merged("enable")
        self._set_enabled(True)

    def disable(self) -> None:
        """Switch the updates off. The model then computes exactly what the base computes."""
        self._refuse_merged("disable")
        self._set_enabled(False)

    @contextlib.contextmanager
    def disabled(self) -> Iterator[None]:
        """Switch the updates off within a `with` block."""
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
        return self._merged is not None

    def merge(self) -> None:
        """
        Add the updates to the base weights. The sums are computed in float32 and rounded once to the weights' dtype.
        The weights' own bits are kept, so that [`SaraAdapter.unmerge`] can restore them.

        Raises:
            `ValueError`: For Mo-SARA with more than one head (its update depends on the token), weights that are
                quantized or tied to another module's, or a sum that the dtype cannot hold. The weights are then
                left as they were.
        """
        self._refuse_merged("merge")
        self.spec.method.refuse_merge()
        self._merged = MergedWeights(self.model, list(self.deltas()))
        self._set_enabled(False)

    def unmerge(self) -> None:
        """Restore the exact bits that the base weights had before [`SaraAdapter.merge`]."""
        if self._merged is None:
            raise ValueError(f"The adapter {self.name!r} is not merged.")
        order = self._merged.order
        later = [a.name for a in adapters_on(self.model).values() if a._merged and a._merged.order > order]
        if later:
            raise ValueError(f"Unmerge {later} first: they were merged after {self.name!r}, on top of it.")
        self._merged.restore()
        self._merged = None
        self._set_enabled(True)

    def detach(self, keep_merged: bool = False) -> None:
        """
        Remove the adapter from the model, with its modules, its hooks and its attributes. After the last adapter is
        removed, the parameters that were trainable before are trainable again.

        Args:
            keep_merged (`bool`, *optional*, defaults to `False`):
                Whether the updates of a merged adapter stay in the weights for good. By default, a merged adapter is
                unmerged first.
        """
        if self.merged and not keep_merged:
            self.unmerge()
        for site in self.sites:
            remove_delta(self.model.get_submodule(site.module), self._key(site))
        others = {name: other for name, other in adapters_on(self.model).items() if other is not self}
        _set_adapters(self.model, others)
        if others:
            next(reversed(others.values()))._unfrozen += self._unfrozen
        else:
            for name in self._unfrozen:
                self.model.get_parameter(name).requires_grad_(True)


def _whole_copy(tensor: torch.Tensor) -> torch.Tensor:
    whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return whole.detach().cpu().clone().contiguous()


def adapters_on(model: nn.Module) -> dict[str, AttachedUpdates]:
    """The adapters that a model carries, by name, in the order in which they were attached."""
    return getattr(unwrap(model), "sara_adapters", {})


def _set_adapters(model: Any, adapters: dict[str, AttachedUpdates]) -> None:
    """Record on the model which adapters it carries. `model.sara_adapter` is the one that was attached last."""
    if adapters:
        model.sara_adapters = adapters
        model.sara_adapter = next(reversed(adapters.values()))
    else:
        del model.sara_adapters, model.sara_adapter


def check_name(model: nn.Module, name: str) -> None:
    """Raise a `ValueError` unless a new adapter of the model can have the name."""
    if not re.fullmatch(r"[A-Za-z0-9_-]+", name):
        raise ValueError(f"The adapter name {name!r} may have letters, digits, '_' and '-' only.")
    if name in adapters_on(model):
        raise ValueError(f"The model already carries an adapter {name!r}. Detach it, or choose another name.")
