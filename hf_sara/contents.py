"""The tensors of an adapter on a model: updates as child modules of linears, one forward hook per linear, and parts.

Nothing here knows of files or of the Hub.
"""

import inspect
import logging
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, cast

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor

from .arguments import SaraArguments
from .carrier import adapters_on, check_name, drop_hooks, set_adapters
from .copies import ModuleCopy, TokenRows, attach_parts, is_attached, part_on, refuse_copy, remove_parts
from .factors import Factors
from .freezing import freeze_base, let_others_rest, let_train, refuse_others, thaw, thaw_base, trainable
from .frozen_buffers import hold_buffers, hold_packing
from .input_gradients import hold_input_gradients
from .linears import refuse_outer_hooks, take_back
from .methods import Delta
from .methods.base import Usage
from .methods.products import is_plain
from .methods.shards import Shards
from .parts import ModulePart, Part, TokenPart, parts_collide, random_parameters, refuse_overlap, widened
from .planning import AdapterSpec
from .sites import PlannedSite
from .spread import is_partitioned, is_spread, partition, send_to_all, whole, works_together
from .tensor_files import check_tensors

logger = logging.getLogger(__name__)


def add_deltas(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: torch.Tensor) -> torch.Tensor:
    """
    The forward hook of a linear, which adds the enabled updates to its output. It captures no state, so that a copy of
    the model uses its own updates.
    """
    # This is true if the output is that of the frozen linear itself, which no other hook can have seen or changed.
    own = is_plain(module) and len(module._forward_hooks) == 1 and type(output) is torch.Tensor
    linear = module if own else None
    x = args[0] if args else kwargs[module.sara.argument]
    shards = None if own else Shards.of(module, x, output)
    for delta in module.sara.values():
        if delta.enabled and not delta.usage.rests(delta.training):
            delta.usage.note(delta.training)
            output = delta(x, output, linear, shards)
            linear = None
    return output


def insert_delta(module: Any, key: str, delta: Delta) -> None:
    """Put an update on a linear, beside the updates that it already has."""
    if not hasattr(module, "sara"):
        module.sara = nn.ModuleDict()
        # Under this name the input comes if it is given by keyword.
        module.sara.argument = next(iter(inspect.signature(module.forward).parameters))
        module.register_forward_hook(add_deltas, with_kwargs=True)
    module.sara[key] = delta.train(module.training)


def remove_delta(module: Any, key: str) -> None:
    """Take an update off a linear. The hook is removed together with the last update."""
    del module.sara[key]
    if not len(module.sara):
        del module.sara
        drop_hooks(module, (add_deltas,))


class AdapterContents:
    """
    The tensors of one adapter on a model, under one name: updates of linears, and parts.

    Args:
        model ([`~transformers.PreTrainedModel`]): The base model. Its parameters are frozen.
        spec ([`AdapterSpec`]): The arguments and the sites of the adapter.
        factors (`dict[str, Factors]`): The frozen factors by site, for a method that has some. They move into the
            updates, so that the dictionary is empty in the end.
        name (`str`): The adapter's name on this model, which can carry several adapters.

    Raises:
        `ValueError`: If the model already carries an adapter of that name, or the name has other characters than
            allowed. The model is then left as it was.
    """

    def __init__(self, model: nn.Module, spec: AdapterSpec, factors: dict[str, Factors], name: str = "default"):
        check_name(model, name)
        self.model = model
        self.spec = spec
        self.name = name
        self._resting = False
        self._usage = Usage()
        _refuse_mixture(model, spec)
        others, current = dict(adapters_on(model)), getattr(model, "sara_adapter", None)
        unfrozen = trainable(model)
        try:
            freeze_base(model)
            self._insert(factors)
            if works_together(model):
                send_to_all(self.trained().values())
            self._initial = self._fingerprints()
            set_adapters(model, {**others, name: self})
            hold_base(model)
        except BaseException:
            set_adapters(model, others)
            if others:
                cast(Any, model).sara_adapter = current
            self._remove()
            hold_base(model)
            thaw(model, unfrozen)
            thaw_base(model)
            raise

    def _insert(self, factors: dict[str, Factors]) -> None:
        for site in self.sites:
            module = site.linear(self.model)
            own = factors.pop(site.name, None)
            delta = self.spec.method.make_delta(site, self.model, own)
            delta.usage = Usage(self._usage)
            weight = getattr(module, "weight", None)
            if own is not None and not is_spread(weight):
                delta.follow_weight(module)
            _spread_like(weight, delta)
            insert_delta(module, self._key(site), delta)
        attach_parts(self.model, self.parts, self.name)

    def _remove(self) -> None:
        """Take off the model what is attached, which after an error may be a part of the adapter."""
        for site in self.sites:
            module: Any = self.model.get_submodule(site.module)
            if self._key(site) in getattr(module, "sara", {}):
                remove_delta(module, self._key(site))
        attached = [part for part in self.parts if is_attached(self.model, part, self.name)]
        remove_parts(self.model, attached, self.name)

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

    @property
    def parts(self) -> list[Part]:
        """What is trained beside the updates: modules in full, and rows of embeddings."""
        return self.spec.parts

    def _key(self, site: PlannedSite) -> str:
        return f"{self.name}:{site.label}" if site.label else self.name

    # ---- contents ----

    def delta(self, site: PlannedSite) -> Delta:
        """The update's module at one site."""
        module: Any = self.model.get_submodule(site.module)
        delta = module.sara[self._key(site)]
        if "_hf_hook" in vars(delta):
            take_back(delta)
        if any(tensor.is_meta for tensor in delta.parameters()):
            refuse_outer_hooks(self.model, site.name)
        return delta

    def deltas(self) -> Iterator[tuple[PlannedSite, Delta]]:
        """All sites with their updates' modules."""
        return ((site, self.delta(site)) for site in self.sites)

    def copies(self) -> list[tuple[nn.Module, ModuleCopy | TokenRows]]:
        """The parts on the model, each with the module that it belongs to."""
        return [part_on(self.model, part, self.name) for part in self.parts]

    def trained(self) -> dict[str, nn.Parameter]:
        """The trained tensors, named `"<site>.<tensor>"`, and those of the parts by their own full names."""
        found = {f"{s.name}.{name}": tensor for s, delta in self.deltas() for name, tensor in delta.trained().items()}
        return {
            **found,
            **{name: tensor for host, copy in self.copies() for name, tensor in copy.trained(host).items()},
        }

    def tensors(self) -> dict[str, torch.Tensor]:
        """The trained tensors, and what else of the parts is saved, by name."""
        buffers = {name: buffer for host, copy in self.copies() for name, buffer in copy.buffers_of(host).items()}
        return {**self.trained(), **buffers}

    def state_dict(self) -> dict[str, torch.Tensor]:
        """
        Copies of the trained tensors on the CPU, named as in [`SaraAdapter.trained`], and of the buffers of modules
        that are trained in full. If FSDP shards the model, the copies are whole tensors all the same, and every
        process has to call this.
        """
        reshard(self.model)
        self.mirror_rows()
        found = {name: _whole_copy(tensor) for name, tensor in self.tensors().items()}
        # The model may have another dtype than when the adapter was attached, as after `model.half()`.
        dtypes = {
            f"{part.name}.{name}": getattr(torch, dtype)
            for part in self.parts
            if isinstance(part, ModulePart)
            for name, dtype in part.dtypes.items()
        }
        return {name: tensor.to(dtypes.get(name, widened(tensor.dtype))) for name, tensor in found.items()}

    def mirror_rows(self) -> None:
        """Write the trained rows of embeddings into the weights, where a user may look for them after a training."""
        for host, copy in self.copies():
            if isinstance(copy, TokenRows):
                copy.mirror(host)

    def frozen_factors(self) -> dict[str, torch.Tensor]:
        """
        Copies of the frozen factors, named `"<site>.U"` and `"<site>.Vh"`, for a method that has some. For a sharded
        model, see [`SaraAdapter.state_dict`].
        """
        return factors_of(self.spec, self.deltas())

    def saved_factors(self) -> dict[str, torch.Tensor]:
        """The frozen factors that are saved with the adapter. There are none if seeds are saved instead."""
        return self.frozen_factors() if self.spec.method.saves_factors else {}

    @torch.no_grad()
    def load_state_dict(self, tensors: Mapping[str, torch.Tensor], untrained: Collection[str] = ()) -> None:
        """
        Copy tensors into the trained ones. Their names and shapes have to be exactly those of the adapter.

        Args:
            tensors (`Mapping[str, torch.Tensor]`): The tensors of [`SaraAdapter.state_dict`].
            untrained (`Collection[str]`, *optional*): The sites whose tensors are those of their start.
        """
        check_tensors(tensors, self.spec.state_shapes())
        reshard(self.model)
        for name, tensor in self.tensors().items():
            if tensor.is_meta:
                raise ValueError(f"{name} is on the meta device, where no values can be loaded. Load the model first.")
            value = tensors[name].to(tensor.device)
            if isinstance(tensor, DTensor):
                # This process holds a shard of the tensor, see `state_dict`.
                value = distribute_tensor(value, tensor.device_mesh, tensor.placements)
            tensor.copy_(value)
        for site, delta in self.deltas():
            delta.usage = Usage(self._usage)
            delta.usage.learning = site.name not in untrained
            if site.name in untrained:
                names = [f"{site.name}.{name}" for name in delta.trained()]
                self._initial |= {name: _fingerprint(tensors[name]) for name in names}
        self.mirror_rows()

    def num_parameters(self) -> int:
        """Number of trained parameters."""
        return sum(tensor.numel() for tensor in self.trained().values())

    # ---- training ----

    def _fingerprints(self) -> dict[str, int]:
        return {name: _fingerprint(tensor) for name, tensor in self.trained().items()}

    def changed(self, state: Mapping[str, torch.Tensor] | None = None) -> set[str]:
        """
        The names of the trained tensors that have other bits than at the adapter's start, here or on a copied model.

        Args:
            state (`Mapping[str, torch.Tensor]`, *optional*): The tensors as whole ones, for a model that is spread
                over processes.
        """
        now = self._fingerprints() if state is None else {name: _fingerprint(state[name]) for name in self._initial}
        return {name for name, bits in self._initial.items() if now[name] != bits}

    def is_untrained(self) -> bool:
        """Whether the trained tensors have the bits with which the adapter started, here or on a copied model."""
        return not self.changed()

    def train_alone(self) -> None:
        """
        Let the tensors of this adapter train, and those of the model's other adapters not. `model.sara_adapter` is
        this adapter then.
        """
        let_others_rest(self.model, self)
        if self._resting:
            let_train(self, True)
            self._resting = False
        cast(Any, self.model).sara_adapter = self

    def refuse_others(self, whole: nn.Module | None = None) -> None:
        """
        Raise a `ValueError` if a parameter trains that no adapter of the model holds, so that it would be lost.

        Args:
            whole (`nn.Module`, *optional*): The module that trains, if the model is only a part of it.
        """
        refuse_others(self.model, f"the adapter {self.name!r}", whole)


def factors_of(spec: AdapterSpec, deltas: Iterable[tuple[PlannedSite, Delta]]) -> dict[str, torch.Tensor]:
    """Copies of the frozen factors of updates, see [`SaraAdapter.frozen_factors`]."""
    return {
        f"{site.name}.{name}": _whole_copy(delta.get_parameter(name))
        for site, delta in deltas
        for name in spec.method.frozen_shapes(site.shape, site.k)
    }


def hold_base(model: nn.Module) -> None:
    """Let a frozen base keep its buffers, and pass gradients on, after its adapters have changed."""
    hold_buffers(model)
    hold_packing(model)
    hold_input_gradients(model)


def warn_of_random(model: nn.Module, parts: Sequence[Part], advice: str) -> None:
    """
    Warn of parameters that no checkpoint gave, and that a new adapter with these parts freezes. `advice` says what to
    do.
    """
    held = {name for part in parts for name in part.held()}
    # The rows of new tokens are random, and are kept with those that train.
    held |= {f"{part.name}.weight" for part in parts if isinstance(part, TokenPart)}
    parameters = dict(model.named_parameters())
    random = [name for name in random_parameters(model) if parameters[name].requires_grad and name not in held]
    if random:
        logger.warning(
            "These parameters are random, because the checkpoint of the base does not have them, or not all of their "
            "rows, and attaching the adapter freezes them: %s. %s",
            ", ".join(random),
            advice,
        )


def _refuse_mixture(model: nn.Module, spec: AdapterSpec) -> None:
    """Raise a `ValueError` if a part of an adapter cannot stand beside its sites, or beside the model's adapters."""
    refuse_overlap(model, spec.parts, spec.sites)
    for part in spec.parts:
        refuse_copy(model.get_submodule(part.name), part)
    for name, other in adapters_on(model).items():
        refuse_overlap(model, other.parts, spec.sites)
        refuse_overlap(model, spec.parts, other.sites)
        for part in spec.parts:
            for theirs in other.parts:
                if part.name != theirs.name and parts_collide(model, part, theirs):
                    raise ValueError(
                        f"{part.name} cannot be trained in an adapter beside the adapter {name!r}, which trains "
                        f"{theirs.name}: they have tensors in common. Detach that adapter first."
                    )
    refuse_in_use(model, spec.parts, None)


def refuse_in_use(model: nn.Module, parts: Sequence[Part], adapter: AdapterContents | None) -> None:
    """Raise a `ValueError` if another adapter's trained copy of one of these parts is in use, or merged."""
    for name, other in adapters_on(model).items():
        in_use = (copy.part for _, copy in other.copies() if other.merged or copy.is_enabled())
        theirs = [] if other is adapter else list(in_use)
        for part in parts:
            if any(parts_collide(model, part, one) for one in theirs):
                state, remedy = ("merged", "unmerge") if other.merged else ("in use", "disable")
                raise ValueError(
                    f"{part.name} can have one trained copy at a time, and that of the adapter {name!r} is {state}. "
                    f"Call SaraAdapter.of(model, {name!r}).{remedy}() first."
                )


def _fingerprint(tensor: torch.Tensor) -> int:
    """A sum of a tensor's bits. It is the same on every device, in any order, and in a copy."""
    local = tensor.to_local() if isinstance(tensor, DTensor) else tensor.detach()
    bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[local.element_size()]
    return 0 if local.is_meta else int(local.view(bits).sum(dtype=torch.int64))


def reshard(model: nn.Module) -> None:
    """
    Let each process have its shards of the model alone. After an evaluation, FSDP keeps some tensors whole, which are
    rounded for it, and are not the ones that the optimizer has.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def _spread_like(weight: Any, delta: Delta) -> None:
    """Let the frozen factors of an update be partitioned if the weight of its linear is."""
    if is_partitioned(weight):
        make_contiguous(delta)
        partition([tensor for tensor in delta.parameters() if not tensor.requires_grad], like=weight)


def make_contiguous(module: nn.Module) -> None:
    """Let a module's parameters be contiguous, as FSDP and DeepSpeed need them, while U is stored by columns."""
    for parameter in module.parameters():
        # A matrix of one column counts as contiguous in both ways, and DeepSpeed looks at its strides.
        if parameter.dim() == 2 and parameter.stride() != (parameter.shape[1], 1):
            parameter.data = parameter.data.clone(memory_format=torch.contiguous_format)
        parameter.data = parameter.data.contiguous()


def _whole_copy(tensor: torch.Tensor) -> torch.Tensor:
    values = whole(tensor) if isinstance(tensor, DTensor) or is_partitioned(tensor) else tensor.detach()
    return values.cpu().clone().contiguous()
