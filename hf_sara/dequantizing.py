"""The values of a quantized weight.

There are many ways to pack a weight. Some are known here. A class may also offer a method of its own, but such methods
differ: some return the transpose, and some change their module in place. So a method is called on a copy, and what it
returns is compared with what the module computes.
"""

import copy
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.nn import functional as F
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from .spectrum import doubled

FULL_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
# What classes call the method that returns the values of their weight.
METHODS = ("dequantize", "dequantize_weight", "dequant", "_dequantize_weights")
# Quantized inputs make an error of some percent, and a wrong weight one of more than 100 percent.
LARGEST_ERROR = 0.5


def holds_numbers(weight: Any) -> bool:
    """Whether a weight is a plain tensor of floating-point numbers, or one that is spread over processes."""
    if not isinstance(weight, torch.Tensor) or weight.dtype not in FULL_DTYPES:
        return False
    if getattr(weight, "quant_state", None) is not None:
        return False
    return isinstance(weight, DTensor) or not is_traceable_wrapper_subclass(weight)


def dequantizer(module: Any) -> Callable[[], torch.Tensor] | None:
    """
    The function that returns the values of the quantized weight of a linear, of shape (out_features, in_features).

    Args:
        module (`nn.Module`): The linear.

    Returns:
        `Callable`, *optional*: The function, or `None` if the weight is not quantized, or in a way that is not known.
            It may raise any error. Some values cannot be read after all.
    """
    weight: Any = getattr(module, "weight", None)
    if holds_numbers(weight) and weight.dim() == 2:
        return None
    if type(weight).__name__ in ("Params4bit", "Int8Params"):
        return lambda: _of_bitsandbytes(module)
    if isinstance(weight, torch.Tensor) and weight.dtype.is_floating_point and weight.element_size() == 1:
        scale = _scale(module)
        if scale is not None:
            # transformers' own classes multiply by the scale. Many of them cannot be called on every device.
            known = type(module).__module__.startswith("transformers.integrations.")
            found = weight.detach().float() * scale
            return (lambda: found) if known else (lambda: _verified(module, found))
    if isinstance(weight, torch.Tensor) and is_traceable_wrapper_subclass(weight) and hasattr(weight, "dequantize"):
        return lambda: _verified(module, weight.dequantize())
    if callable(weight):
        # The modules of torch.ao.nn.quantized have a method of this name.
        return lambda: _verified(module, module.weight().dequantize())
    if any(callable(getattr(module, name, None)) for name in METHODS):
        return lambda: _own(module)
    return None


def _of_bitsandbytes(module: Any) -> torch.Tensor:
    from transformers.integrations.bitsandbytes import dequantize_bnb_weight

    if getattr(getattr(module.weight, "quant_state", None), "packing_format_for_cpu", False):
        raise ValueError(
            "bitsandbytes has packed it anew, and rounded its scales, when the model was evaluated on this CPU. Load "
            "the base again, and attach or load the adapter before the model is used"
        )
    return dequantize_bnb_weight(module.weight, state=getattr(module, "state", None))


def _scale(module: Any) -> torch.Tensor | None:
    """
    The scale of an 8-bit floating-point weight, in a shape that can be multiplied with it: one number, or one for each
    row, or one for each block of rows and columns, of which the last ones may be smaller. `None` if it has no scale.
    """
    scale = getattr(module, "weight_scale_inv", getattr(module, "weight_scale", None))
    if not isinstance(scale, torch.Tensor) or hasattr(module, "n_groups"):
        return None
    d_out, d_in = module.weight.shape
    scale = scale.detach().float()
    if scale.numel() == 1:
        return scale.reshape(())
    block = getattr(module, "block_size", None)
    if block is None:
        return scale.reshape(-1, 1) if scale.numel() == d_out else None
    if scale.shape != (-(-d_out // block[0]), -(-d_in // block[1])):
        return None
    return scale.repeat_interleave(block[0], 0)[:d_out].repeat_interleave(block[1], 1)[:, :d_in]


def _own(module: nn.Module) -> torch.Tensor:
    """What a class's own method returns."""
    copied = _copy(module)
    method = next(getattr(copied, name) for name in METHODS if callable(getattr(module, name, None)))
    return _verified(module, method(), may_be_transposed=True)


def _copy(module: nn.Module) -> Any:
    """A copy of a module that can be changed. Not all of these modules support `copy.deepcopy`."""
    copied = copy.copy(module)
    for name, value in vars(module).items():
        if isinstance(value, dict):
            tensors = {key: one.detach().clone() for key, one in value.items() if isinstance(one, torch.Tensor)}
            vars(copied)[name] = {**value, **tensors}
        elif isinstance(value, torch.Tensor):
            vars(copied)[name] = value.detach().clone()
        elif isinstance(value, types.MethodType) and value.__self__ is module:
            vars(copied)[name] = types.MethodType(value.__func__, copied)
    return copied


def _verified(module: Any, values: Any, may_be_transposed: bool = False) -> torch.Tensor:
    """
    The values of a weight in the orientation in which the module multiplies by them.

    Raises:
        `ValueError`: If they are no such values, or if the module passes no gradient to its input.
    """
    shape = (module.out_features, module.in_features)
    if not isinstance(values, torch.Tensor) or values.dtype not in FULL_DTYPES:
        raise ValueError(f"its values come as {getattr(values, 'dtype', type(values).__name__)}")
    values = values.detach()
    both = (values, values.mT) if may_be_transposed and values.dim() == 2 else (values,)
    found = [one for one in both if one.shape == shape]
    if not found:
        raise ValueError(f"its values come in the shape {tuple(values.shape)}, and not in {shape}")
    generator = torch.Generator().manual_seed(0)
    x, side = (torch.randn(32, size, generator=generator).to(values) for size in reversed(shape))
    forward = getattr(module, "_old_forward", module.forward)
    try:
        with torch.enable_grad():
            output = forward(x.requires_grad_(True))
    except Exception as error:
        # Many of these modules cannot be called on every device.
        if len(found) > 1:
            raise ValueError(f"its values may be transposed, and its forward cannot tell: {error}") from error
        return found[0]
    bias = getattr(module, "bias", None)
    bias = bias.detach().to(values) if isinstance(bias, torch.Tensor) else None
    fits = [one for one in found if _is_near(output, F.linear(x, one, bias))]
    if not fits:
        raise ValueError("its forward multiplies by something else than its values")
    if not _is_near(_gradient(output, x, side), side @ fits[0]):
        raise ValueError("its forward passes no gradient to its input, so that the updates before it would not train")
    return fits[0]


def _gradient(output: torch.Tensor, x: torch.Tensor, side: torch.Tensor) -> torch.Tensor | None:
    try:
        return torch.autograd.grad(output, x, side.to(output), allow_unused=True)[0]
    except (RuntimeError, NotImplementedError):
        return None


@torch.no_grad()
def _is_near(found: Any, expected: torch.Tensor) -> bool:
    if not isinstance(found, torch.Tensor) or found.shape != expected.shape:
        return False
    return bool((doubled(found) - doubled(expected)).norm() <= LARGEST_ERROR * doubled(expected).norm())
