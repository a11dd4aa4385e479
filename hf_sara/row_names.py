"""Names of adapters for the rows of a batch, and the model that takes them."""

import contextlib
import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from .carrier import banks_on, drop_hooks, unwrap

# In `adapter_names`, this name stands for the base alone, as in PEFT.
BASE = "__base__"
# The inputs of a model that have a row for each row of the batch.
INPUTS = ("input_ids", "inputs_embeds", "inputs", "pixel_values", "input_features", "input_values", "attention_mask")


@contextlib.contextmanager
def adapter_rows(model: Any, names: Sequence[str] | str, rows: int | None = None) -> Iterator[None]:
    """
    Let each row of the batches have its own adapter within a `with` block. `model(..., adapter_names=names)` and
    `model.generate(..., adapter_names=names)` do the same for one call. A model that is compiled with
    `fullgraph=True` needs this form.

    Args:
        model ([`~transformers.PreTrainedModel`]): A model with one or several [`AdapterBank`].
        names (`Sequence[str]` or `str`): The name of the adapter of each row, where `"__base__"` is none. One name
            stands for all rows.
        rows (`int`, *optional*): The number of rows, if it is known.

    Raises:
        `ValueError`: If there are more or fewer names than rows, or a name is that of no adapter.
    """
    banks = banks_on(model)
    if not banks:
        raise ValueError(
            f"This {type(unwrap(model)).__name__} has no AdapterBank, so no row can have an adapter's name."
        )
    if isinstance(names, str):
        if rows is None:
            raise ValueError(
                f"adapter_names={names!r} needs the number of rows. Give a list with a name for each row."
            )
        names = [names] * rows
    names = list(names)
    if rows is not None and len(names) != rows:
        raise ValueError(
            f"adapter_names has {len(names)} names, and the batch has {rows} rows. Give one for each row."
        )
    known = {name for bank in banks for name in bank._slots}
    unknown = [repr(name) for name in dict.fromkeys(names) if name not in known]
    if unknown:
        there = sorted(known - {BASE})
        some = ", ".join(there[:5]) + (f" and {len(there) - 5} more" if len(there) > 5 else "")
        raise ValueError(
            f"adapter_names names {', '.join(unknown)}, and the banks of the model have: {some or 'none'}."
        )
    with contextlib.ExitStack() as stack:
        for bank in banks:
            stack.enter_context(bank._with_rows(names))
        yield


def let_take_names(model: Any) -> None:
    if any(hook is take_names for hook in model._forward_pre_hooks.values()):
        return
    # It comes before that of the adapters, which refuses names.
    model.register_forward_pre_hook(take_names, with_kwargs=True, prepend=True)
    model.register_forward_hook(drop_names, always_call=True)
    for name, stand_in in STAND_INS.items():
        if hasattr(model, name):
            # This can be copied and pickled together with its model, which a function inside of another cannot.
            setattr(model, name, functools.partial(stand_in, model, getattr(model, name)))


def let_take_no_names(model: Any) -> None:
    drop_hooks(model, (take_names, drop_names))
    for name, stand_in in STAND_INS.items():
        made = vars(model).get(name)
        if isinstance(made, functools.partial) and made.func is stand_in:
            delattr(model, name)
            if made.args[1] != getattr(model, name):
                setattr(model, name, made.args[1])


def take_names(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any] | None:
    """The forward pre-hook of a model with banks, which takes `adapter_names` out of the arguments."""
    rows = rows_of(args, kwargs)
    if "adapter_names" in kwargs:
        names = kwargs.pop("adapter_names")
        if names is not None:
            stack = contextlib.ExitStack()
            stack.enter_context(adapter_rows(model, names, rows))
            model.sara_rows = stack
    for bank in banks_on(model):
        bank.batch.take(rows)
    return args, kwargs


def drop_names(model: Any, args: tuple[Any, ...], output: Any) -> None:
    """The forward hook that makes such a model the base again."""
    if "sara_rows" in vars(model):
        model.sara_rows.close()
        del model.sara_rows


def _generate(model: Any, generate: Any, *args: Any, adapter_names: Any = None, **kwargs: Any) -> Any:
    """Stands in for `generate` of a model with banks."""
    if adapter_names is None:
        return generate(*args, **kwargs)
    with adapter_rows(model, adapter_names, rows_of(args, kwargs)):
        return generate(*args, **kwargs)


def _generate_batch(model: Any, generate: Any, *args: Any, **kwargs: Any) -> Any:
    """Stands in for `generate_batch` of a model with banks, which would ignore the names."""
    if kwargs.pop("adapter_names", None) is not None:
        raise ValueError(
            "generate_batch puts the tokens of all requests into one row, and does not tell the layers which token is "
            "of which request, so they cannot have adapters of their own. Use generate with a row for each request."
        )
    return generate(*args, **kwargs)


STAND_INS = {"generate": _generate, "generate_batch": _generate_batch}


def rows_of(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> int | None:
    """The rows of the batch that a model is called with."""
    found = (*args[:1], *(kwargs.get(name) for name in INPUTS))
    return next((len(value) for value in found if isinstance(value, torch.Tensor) and value.dim() > 1), None)
