"""A model that carries adapters: its record of them, and what it refuses meanwhile."""

import functools
import re
from collections.abc import Sequence
from typing import Any

from torch import nn
from transformers import PreTrainedModel


def unwrap(model: Any) -> Any:
    """
    The model that carries adapters: the one inside of `torch.compile`'s wrapper, or inside of a module that is no
    model of transformers but holds exactly one, such as a SentenceTransformer.
    """
    model = getattr(model, "_orig_mod", model)
    if isinstance(model, PreTrainedModel):
        return model
    inner: list[nn.Module] = []
    seen: set[nn.Module] = set()
    for module in model.modules():
        if isinstance(module, PreTrainedModel) and module not in seen:
            inner.append(module)
            seen |= set(module.modules())
    return inner[0] if len(inner) == 1 else model


def refuse_names(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """
    The forward pre-hook of an adapted model, which refuses PEFT's argument `adapter_names`. A model would ignore it,
    and compute every row with the adapters that are enabled.
    """
    names = kwargs.get("adapter_names")
    if names is None:
        return
    adapters = adapters_on(model)
    unknown = [name for name in dict.fromkeys(names) if name not in adapters and name != "__base__"]
    if unknown:
        raise ValueError(
            f"adapter_names names {', '.join(map(repr, unknown))}, and the model carries the adapters "
            f"{', '.join(map(repr, adapters))}."
        )
    raise ValueError(
        "adapter_names, one name for each row of a batch, is not supported. Enable and disable adapters for the whole "
        "batch: SaraAdapter.of(model, name).disable()."
    )


def _refuse_save(model: Any, *args: Any, **kwargs: Any) -> None:
    """
    Stands in for `save_pretrained` and `push_to_hub` of an adapted model, which would write a base with stray tensors.
    """
    carried = [*map(repr, adapters_on(model)), *(f"those of {bank!r}" for bank in banks_on(model))]
    raise ValueError(
        f"This {type(model).__name__} carries the adapters {', '.join(carried)}, and its own "
        "save_pretrained and push_to_hub would lose them. Save the adapter with "
        "model.sara_adapter.save_pretrained(folder) or push_to_hub(repo_id), or write a plain model with "
        "hf_sara.merge(model, folder)."
    )


REFUSED_METHODS = ("save_pretrained", "push_to_hub")


def adapters_on(model: nn.Module) -> dict[str, Any]:
    """The adapters that a model carries, by name, in the order in which they were attached."""
    return getattr(unwrap(model), "sara_adapters", {})


def banks_on(model: nn.Module) -> list[Any]:
    """The banks of adapters that a model has, in the order in which they were loaded."""
    return getattr(unwrap(model), "sara_banks", [])


def has_frozen_base(model: nn.Module) -> bool:
    """Whether something of the model trains, or may train, beside a base that is frozen for it."""
    return bool(adapters_on(model)) or any(bank.trained() for bank in banks_on(model))


def set_banks(model: Any, banks: Sequence[Any]) -> None:
    """Record on the model which banks it has."""
    if banks:
        model.sara_banks = list(banks)
    else:
        vars(model).pop("sara_banks", None)
    _guard_saving(model)


def _guard_saving(model: Any) -> None:
    """Let a model refuse to save itself as long as it carries something."""
    for name in REFUSED_METHODS:
        if adapters_on(model) or banks_on(model):
            # This can be copied and pickled together with its model, which a function inside of another cannot.
            setattr(model, name, functools.partial(_refuse_save, model))
        else:
            vars(model).pop(name, None)


def set_adapters(model: Any, adapters: dict[str, Any]) -> None:
    """Record on the model which adapters it carries. `model.sara_adapter` is the one that was attached last."""
    if adapters and not adapters_on(model):
        model.register_forward_pre_hook(refuse_names, with_kwargs=True)
    if adapters:
        model.sara_adapters = adapters
        model.sara_adapter = next(reversed(adapters.values()))
    else:
        drop_hooks(model, (refuse_names,))
        for name in ("sara_adapters", "sara_adapter"):
            vars(model).pop(name, None)
    _guard_saving(model)


def check_name(model: nn.Module, name: str) -> None:
    """Raise a `ValueError` unless a new adapter of the model can have the name."""
    if not re.fullmatch(r"[A-Za-z0-9_-]+", name):
        raise ValueError(f"The adapter name {name!r} may have letters, digits, '_' and '-' only.")
    if name in adapters_on(model):
        raise ValueError(f"The model already carries an adapter {name!r}. Detach it, or choose another name.")


def drop_hooks(module: nn.Module, ours: Sequence[Any]) -> None:
    """Remove hooks of these functions from a module."""
    for hooks, with_kwargs in (
        (module._forward_hooks, module._forward_hooks_with_kwargs),
        (module._forward_pre_hooks, module._forward_pre_hooks_with_kwargs),
        (module._state_dict_hooks, {}),
        (module._load_state_dict_pre_hooks, {}),
    ):
        for handle in [handle for handle, hook in hooks.items() if _function(hook) in ours]:
            del hooks[handle]
            with_kwargs.pop(handle, None)


def _function(hook: Any) -> Any:
    """The function of a hook, which may have its first argument bound, or be wrapped by torch."""
    return getattr(hook, "func", getattr(hook, "hook", hook))
