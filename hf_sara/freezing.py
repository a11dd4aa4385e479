"""What of a model trains: which parameters an adapter or a bank holds, and which are frozen meanwhile."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn

from .carrier import adapters_on, banks_on, has_frozen_base
from .dequantizing import FULL_DTYPES
from .patterns import is_of_update


def refuse_others(model: nn.Module, whose: str, whole: nn.Module | None = None) -> None:
    """See [`SaraAdapter.refuse_others`]."""
    whole = model if whole is None else whole
    held = held_ids(model)
    lost = {n: p for n, p in whole.named_parameters() if p.requires_grad and id(p) not in held}
    if lost:
        names = list(lost)
        inside = {id(parameter) for parameter in model.parameters()}.issuperset(map(id, lost.values()))
        raise ValueError(
            f"These parameters train, and {whose} does not hold them, so they would be lost: "
            f"{', '.join(names[:5])}{' ...' if len(names) > 5 else ''}. "
            + ("Name their modules in modules_to_save, or freeze them" if inside else "Freeze them")
            + ": parameter.requires_grad_(False)."
        )


def trainable(model: nn.Module) -> list[str]:
    """The names of the parameters of the base that train."""
    held = held_ids(model)
    return [n for n, p in model.named_parameters() if p.requires_grad and not is_of_update(n) and id(p) not in held]


def freeze_base(model: nn.Module) -> None:
    """Let nothing of a base train, and note on the model what did, for [`thaw_base`]."""
    names = trainable(model)
    for name in names:
        model.get_parameter(name).requires_grad_(False)
    vars(model)["sara_frozen"] = [*vars(model).get("sara_frozen", ()), *names]


def thaw_base(model: nn.Module) -> None:
    """Let train again what trained before, after nothing needs a frozen base any more."""
    if not has_frozen_base(model):
        thaw(model, vars(model).pop("sara_frozen", ()))


def base_dtype(model: nn.Module) -> torch.dtype:
    """The dtype of the base. A copy that is trained in its place may have a wider one."""
    # A bank trains nothing but updates, whose names tell.
    held = _ids_of(adapters_on(model).values())
    base = ((n, p) for n, p in model.named_parameters() if not is_of_update(n) and id(p) not in held)
    return next((parameter.dtype for name, parameter in base if parameter.dtype in FULL_DTYPES), torch.float32)


def held_ids(model: nn.Module) -> set[int]:
    """The ids of the tensors that the adapters and the banks of a model train."""
    return _ids_of([*adapters_on(model).values(), *banks_on(model)])


def _ids_of(holders: Iterable[Any]) -> set[int]:
    return {id(tensor) for holder in holders for tensor in holder.trained().values()}


def thaw(model: nn.Module, names: Sequence[str]) -> None:
    """Let parameters train again."""
    for name in names:
        model.get_parameter(name).requires_grad_(True)
    if "sara_frozen" in vars(model):
        vars(model)["sara_frozen"] = [name for name in vars(model)["sara_frozen"] if name not in names]


def let_train(holder: Any, trains: bool) -> None:
    """Let the tensors of an adapter, or of a bank, train or not."""
    for tensor in holder.trained().values():
        tensor.requires_grad_(trains)


def let_others_rest(model: nn.Module, chosen: Any) -> None:
    """Let the tensors of all adapters and banks of a model rest, apart from the chosen one."""
    for adapter in adapters_on(model).values():
        if adapter is not chosen:
            let_train(adapter, False)
            adapter._resting = True
    for bank in banks_on(model):
        if bank is not chosen:
            let_train(bank, False)
