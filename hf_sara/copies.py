"""The parts of an adapter on a model: trained copies of modules, and trained rows of embeddings.

A copy takes the place of the base's own parameters in their module, where everything that reads the module finds it.
The base's tensors keep their bits in a child of the model meanwhile, and come back when the adapter is switched off or
removed.
"""

import contextlib
import functools
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, cast

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from transformers.utils import ModelOutput

from .carrier import drop_hooks
from .linears import take_back
from .parts import ModulePart, Part, TokenPart, row_owners, widened
from .spread import shares_values, tensor_parallel, whole
from .token_rows import TokenRows, refuse_offloaded, use_rows

# What stands for a dot in the name of a parameter that a module of torch can have.
DOT = ":"
CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)


def attach_parts(model: Any, parts: Sequence[Part], name: str) -> None:
    """Put an adapter's parts on a model, and switch them on. Parts that share a parameter share its copy."""
    made: dict[int, nn.Parameter] = {}
    if parts and not _shows_base(model):
        _let_show_base(model)
    for part in parts:
        host: Any = model.get_submodule(part.name)
        if isinstance(part, TokenPart):
            rows = TokenRows(host, part, name)
            for owner in row_owners(model, host):
                # Rows that do not train need no gradient, so that the weight, which has their values, is enough.
                _insert(owner, name, rows, {"forward": use_rows} if part.trained else {})
            rows.switch(host, True)
            continue
        copy = ModuleCopy(host, part, made)
        _store(model)[_store_key(part, name)] = copy
        if copy.is_wider(host):
            host.register_forward_pre_hook(functools.partial(cast_inputs, copy), with_kwargs=True)
            host.register_forward_hook(functools.partial(cast_output, copy), with_kwargs=True)
        copy.switch(host, True)


def refuse_copy(host: nn.Module, part: Part) -> None:
    """Raise a `ValueError` if a module cannot have a trained copy."""
    parameters = list(host.parameters())
    if isinstance(part, ModulePart) and any(isinstance(parameter, DTensor) for parameter in parameters):
        raise ValueError(
            f"{part.name} is spread over processes while the model is loaded, so no process could train it in full. "
            "Leave it out of modules_to_save, or let TrainingArguments spread the model: fsdp, or deepspeed."
        )
    if isinstance(part, ModulePart) and any(getattr(module, "_is_hooked", False) for module in host.modules()):
        raise ValueError(
            f"{part.name} computes with a part of its input in each process under tensor parallelism, and its "
            "gradient is not that of one process. Leave it out of modules_to_save."
        )
    if any(parameter.is_meta for parameter in parameters) and not shares_values():
        raise ValueError(
            f"{part.name} is offloaded to the CPU or the disk, so it cannot be trained, or take trained values. Give "
            "a device_map that keeps it on a device."
        )
    narrow = any(widened(parameter.dtype) != parameter.dtype for parameter in parameters)
    if narrow and isinstance(part, ModulePart) and isinstance(host, CONTAINERS):
        raise ValueError(
            f"{part.name} is a {type(host).__name__}, which has no forward that could cast between the dtype of the "
            "base and float32. Name the modules in it in modules_to_save."
        )


def part_on(model: Any, part: Part, name: str) -> tuple[nn.Module, "ModuleCopy | TokenRows"]:
    """The module of an attached part, and what is attached there."""
    host: Any = model.get_submodule(part.name)
    if isinstance(part, ModulePart):
        copy = _store(model)[_store_key(part, name)]
        if part.ties:
            refuse_offloaded(part, host, copy)
        # Their values may have to change places, which those that accelerate has put aside would not do.
        take_back(host)
        take_back(copy)
        return host, copy
    if name not in getattr(host, "sara", {}):
        raise ValueError(
            f"{part.name} is not the module any more whose rows the adapter {name!r} has. Resize the embeddings "
            "before an adapter is attached."
        )
    refuse_offloaded(part, host, host.sara[name])
    return host, host.sara[name]


def is_attached(model: Any, part: Part, name: str) -> bool:
    """Whether an adapter's part is on a model."""
    if isinstance(part, ModulePart):
        return hasattr(model, "sara_parts") and _store_key(part, name) in _store(model)
    return name in getattr(model.get_submodule(part.name), "sara", {})


def remove_parts(model: Any, parts: Sequence[Part], name: str) -> None:
    """Give the base its own tensors back, and take an adapter's parts off a model."""
    for part in parts:
        host, attached = part_on(model, part, name)
        attached.switch(host, False)
        if isinstance(part, TokenPart):
            for owner in row_owners(model, host):
                _remove(owner, name)
            continue
        store = _store(model)
        del store[_store_key(part, name)]
        _drop_casts(host, attached)
        if not len(store):
            del model.sara_parts
    if not hasattr(model, "sara_parts") and not any(_rows_in_use(model)):
        drop_hooks(model, (show_base, load_base))


def refuse_spread(model: nn.Module, parts: Sequence[Part], name: str, enabled: bool) -> None:
    """Raise a `ValueError` if parts would have to be switched whose tensors are spread over processes."""
    others = [part for part in parts if part_on(model, part, name)[1].is_enabled() != enabled]
    spread = any(isinstance(module, FSDPModule) for module in model.modules()) or any(
        isinstance(parameter, DTensor) or hasattr(parameter, "ds_id")
        for other in others
        for parameter in model.get_submodule(other.name).parameters()
        # Trained rows are whole under tensor parallelism, and a hook alone brings them in.
        if isinstance(other, ModulePart) or tensor_parallel(parameter) is None
    )
    if others and spread:
        names = ", ".join(part.name for part in others)
        raise ValueError(
            f"{names}: FSDP or DeepSpeed spreads the trained tensors over the processes, so they can neither be "
            "switched nor merged nor detached. Do this on a model that is whole."
        )


def _store(model: Any) -> Any:
    """
    The copies on a model, by adapter and part. They are children of the model, because a module like nn.Sequential
    calls all of its own children.
    """
    if not hasattr(model, "sara_parts"):
        # As with updates, the full name of each tensor has `.sara.` in it.
        model.sara_parts = nn.ModuleDict({"sara": nn.ModuleDict()})
    return model.sara_parts.sara


def _rows_in_use(model: nn.Module) -> Iterator[tuple[str, "TokenRows"]]:
    """The trained rows that are in a weight now, each with a name of this weight."""
    for name, module in model.named_modules():
        for child in getattr(module, "sara", nn.ModuleDict()).values():
            if isinstance(child, TokenRows) and child.is_enabled():
                yield f"{name}.weight", child


# In the state dict of a model, the names of the base stand for the tensors of the base, also while copies are in their
# places, so that the state of the base is the same with and without an adapter.


def _shows_base(model: nn.Module) -> bool:
    return any(hook is show_base for hook in model._state_dict_hooks.values())


def _let_show_base(model: nn.Module) -> None:
    model._register_state_dict_hook(show_base)
    model._register_load_state_dict_pre_hook(load_base, with_module=True)


@contextlib.contextmanager
def own_names(model: nn.Module) -> Iterator[None]:
    """
    Let each tensor have the name of its place in the state dict, within a `with` block. Those who spread a model over
    processes look up the dtype of a place, or whether it is frozen, by this name.
    """
    shows = _shows_base(model)
    drop_hooks(model, (show_base, load_base))
    try:
        yield
    finally:
        if shows:
            _let_show_base(model)


def show_base(model: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """The state-dict hook of a model with parts."""
    if _accelerate_asks():
        return
    _exchange(model, state, prefix)
    for name, rows in _rows_in_use(model):
        weight = state.get(prefix + name)
        if weight is not None and not isinstance(weight, DTensor):
            state[prefix + name] = rows.replaced(weight, rows.get_buffer("base"))


def _accelerate_asks() -> bool:
    """
    Whether accelerate offloads the model. It takes the state dict for what is in each place, and puts that there again
    for each call.
    """
    frame: Any = sys._getframe()
    while frame is not None and frame.f_globals.get("__name__") != "accelerate.big_modeling":
        frame = frame.f_back
    return frame is not None


def load_base(model: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """The hook that takes such a state apart again when it is loaded."""
    _exchange(model, state, prefix)
    for name, rows in _rows_in_use(model):
        weight = state.get(prefix + name)
        if weight is not None and not isinstance(weight, DTensor):
            rows.get_buffer("base").copy_(weight[rows.get_buffer("indices").to(weight.device)])
            trained = state.get(f"{prefix}{name.removesuffix('weight')}sara.{rows.key}.rows", rows.rows)
            state[prefix + name] = rows.replaced(weight, trained.detach())


def _exchange(model: Any, state: dict[str, Any], prefix: str) -> None:
    for key, copy in _store(model).items() if hasattr(model, "sara_parts") else ():
        if copy.is_enabled():
            for name in (*copy.part.parameters, *copy.part.ties, *copy.part.buffers):
                one = f"{prefix}{copy.part.name}.{name}"
                other = f"{prefix}sara_parts.sara.{key}.{name.replace('.', DOT)}"
                if one in state and other in state:
                    state[one], state[other] = state[other], state[one]
                elif one in state:
                    # A state of the base alone is loaded.
                    state[other] = state.pop(one)


def _store_key(part: Part, name: str) -> str:
    return f"{name}{DOT}{part.name.replace('.', DOT)}"


@contextlib.contextmanager
def watch_rows(model: nn.Module) -> Iterator[None]:
    """
    Raise a `RuntimeError` if a module that shares the weight of trained rows runs no forward within a `with` block,
    because what reads the weight in another way gives the rows no gradient.
    """
    idle = {
        name: module
        for name, module in model.named_modules()
        for child in getattr(module, "sara", nn.ModuleDict()).values()
        if isinstance(child, TokenRows) and child.part.trained and child.rows.requires_grad
    }

    def saw(module: nn.Module, *_: Any) -> None:
        for name in [name for name, other in idle.items() if other is module]:
            del idle[name]

    watched = [module.register_forward_hook(saw) for module in idle.values()]
    try:
        yield
    finally:
        for handle in watched:
            handle.remove()
    if idle:
        raise RuntimeError(
            f"{', '.join(idle)} shares the weight of the trained rows, and the training reads the weight without "
            "calling the module, so that the rows have no gradient from there. Use modules_to_save in place of "
            "trainable_token_indices."
        )


def _insert(module: Any, key: str, child: nn.Module, hooks: Mapping[str, Any]) -> None:
    if not hasattr(module, "sara"):
        module.sara = nn.ModuleDict()
        if "forward" in hooks:
            module.register_forward_hook(hooks["forward"], with_kwargs=True)
    module.sara[key] = child


def _remove(module: Any, key: str) -> None:
    del module.sara[key]
    if not len(module.sara):
        del module.sara
        drop_hooks(module, (use_rows,))


# ---- modules that are trained in full ----


class ModuleCopy(nn.Module):
    """
    One of two sets of a module's tensors, that of the base or the trained one, while the other is in the module.

    Args:
        host (`nn.Module`): The module, with the base's tensors.
        part ([`ModulePart`]): Its description.
        made (`dict[int, nn.Parameter]`): By the id of a parameter of the base, its copy, if an earlier part has made
            it.
    """

    def __init__(self, host: nn.Module, part: ModulePart, made: dict[int, nn.Parameter]):
        super().__init__()
        self.part = part
        self._enabled = False
        for name in (*part.parameters, *part.ties):
            base = host.get_parameter(name)
            if id(base) not in made:
                made[id(base)] = nn.Parameter(whole(base).to(widened(base.dtype), copy=True))
            self.register_parameter(name.replace(".", DOT), made[id(base)])
        for name in part.buffers:
            buffer = host.get_buffer(name)
            self.register_buffer(name.replace(".", DOT), whole(buffer).to(widened(buffer.dtype), copy=True))

    def trained(self, host: nn.Module) -> dict[str, nn.Parameter]:
        """The trained parameters, by their full names."""
        return {f"{self.part.name}.{name}": cast(nn.Parameter, self._get(host, name)) for name in self.part.parameters}

    def buffers_of(self, host: nn.Module) -> dict[str, torch.Tensor]:
        """The buffers that belong to the trained parameters, by their full names."""
        return {f"{self.part.name}.{name}": self._get(host, name) for name in self.part.buffers}

    def _get(self, host: nn.Module, name: str) -> torch.Tensor:
        """A trained tensor, wherever it is now."""
        owner, leaf = _owner(host, name) if self._enabled else (self, name.replace(".", DOT))
        return getattr(owner, leaf)

    def is_enabled(self) -> bool:
        """Whether the trained tensors are in the module."""
        return self._enabled

    def switch(self, host: nn.Module, enabled: bool) -> None:
        """Put the trained tensors, or the base's, into the module."""
        if enabled == self._enabled:
            return
        for name in (*self.part.parameters, *self.part.ties, *self.part.buffers):
            owner, leaf = _owner(host, name)
            aside = name.replace(".", DOT)
            here, there = getattr(owner, leaf), getattr(self, aside)
            setattr(owner, leaf, there)
            setattr(self, aside, here)
        self._enabled = enabled

    def dtypes(self, host: nn.Module) -> tuple[torch.dtype, torch.dtype]:
        """The dtypes of the module and of the base, which are the same unless a wider copy is in use."""
        here = next(parameter.dtype for parameter in host.parameters())
        aside = (parameter.dtype for parameter in self.parameters() if self._enabled)
        return here, next((dtype for dtype in aside if dtype != here), here)

    def is_wider(self, host: nn.Module) -> bool:
        """Whether a trained tensor has a wider dtype than the base's, so that the module needs hooks that cast."""
        return any(
            copy.dtype != host.get_parameter(name.replace(DOT, ".")).dtype for name, copy in self.named_parameters()
        )

    @torch.no_grad()
    def merged(self, host: nn.Module) -> dict[str, torch.Tensor]:
        """The trained tensors by name, in the dtypes of the base, or a `ValueError` if one cannot be rounded to it."""
        found = {}
        for name in (*self.part.parameters, *self.part.ties, *self.part.buffers):
            base = getattr(self, name.replace(".", DOT)) if self._enabled else getattr(*_owner(host, name))
            found[name] = self._get(host, name).to(base.dtype)
            if not torch.isfinite(found[name]).all():
                raise ValueError(
                    f"{self.part.name}.{name}: the trained values leave the range of {base.dtype}. Use a wider dtype."
                )
        return found

    @torch.no_grad()
    def write(self, host: nn.Module, values: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Switch the copy off and write values into the base's tensors. Returns the bits that these had before."""
        self.switch(host, False)
        tensors = {name: getattr(*_owner(host, name)) for name in values}
        before = {name: tensor.detach().clone() for name, tensor in tensors.items()}
        for name, tensor in tensors.items():
            tensor.data.copy_(values[name])
        return before


def _owner(host: nn.Module, name: str) -> tuple[nn.Module, str]:
    path, _, leaf = name.rpartition(".")
    return host.get_submodule(path), leaf


def cast_inputs(copy: ModuleCopy, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """
    The forward pre-hook of a module with a trained copy of a wider dtype than the base's: its inputs take the dtype of
    the copy.
    """
    trained, base = copy.dtypes(module)
    if trained == base:
        return None
    return tuple(_to(value, trained) for value in args), {key: _to(value, trained) for key, value in kwargs.items()}


def cast_output(copy: ModuleCopy, module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
    """The forward hook of such a module: its output takes the dtype of the base."""
    trained, base = copy.dtypes(module)
    return output if trained == base else _to(output, base)


def _drop_casts(module: nn.Module, copy: nn.Module) -> None:
    for hooks, with_kwargs in (
        (module._forward_pre_hooks, module._forward_pre_hooks_with_kwargs),
        (module._forward_hooks, module._forward_hooks_with_kwargs),
    ):
        for handle in [handle for handle, hook in hooks.items() if copy in getattr(hook, "args", ())]:
            del hooks[handle]
            with_kwargs.pop(handle, None)


def _to(value: Any, dtype: torch.dtype) -> Any:
    if isinstance(value, torch.Tensor):
        return value.to(dtype) if value.is_floating_point() else value
    if isinstance(value, ModelOutput):
        return type(value)(**{key: _to(item, dtype) for key, item in value.items()})
    if type(value) in (tuple, list):
        return type(value)(_to(item, dtype) for item in value)
    if type(value) is dict:
        return {key: _to(item, dtype) for key, item in value.items()}
    return value
