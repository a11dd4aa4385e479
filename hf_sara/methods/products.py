"""The tensor operations that the updates of all methods share."""

import math

import torch
from torch import nn

from ..layouts import OutputSlice


def is_plain(module: nn.Module) -> bool:
    """Whether a module is torch's own linear, unquantized and frozen, so that its output is x W + b."""
    if type(module) is not nn.Linear or "forward" in module.__dict__:
        # accelerate, for one, puts another forward on the module, after which the weight may have no values.
        return False
    weight, bias = module.weight, module.bias
    # A quantized weight of a plain linear is of a class of its own.
    if weight.requires_grad or type(weight) not in (nn.Parameter, torch.Tensor):
        return False
    return bias is None or not bias.requires_grad


def uniform_(tensor: torch.Tensor, fan_in: int) -> None:
    """Fill a tensor uniformly in +-1/sqrt(fan_in). This is Kaiming-uniform with a = sqrt(5), also for vectors."""
    nn.init.uniform_(tensor, -1.0 / math.sqrt(fan_in), 1.0 / math.sqrt(fan_in))


def add_product(
    output: torch.Tensor, left: torch.Tensor, right: torch.Tensor, part: OutputSlice | None
) -> torch.Tensor:
    """`output` plus left @ right, of shape (n, d_out), on the site's columns. The other columns keep their bits."""
    if part is None and output.dtype == left.dtype:
        return torch.addmm(output.reshape(-1, output.shape[-1]), left, right).view(output.shape)
    return add_update(output, left @ right, part)


def add_update(output: torch.Tensor, update: torch.Tensor, part: OutputSlice | None) -> torch.Tensor:
    """`output` plus an update of shape (n, d_out) on the site's columns. The other columns keep their bits."""
    update = update.to(output.dtype)
    if part is None:
        return output + update.view(output.shape)
    if not is_transformed():
        return AddToColumns.apply(output, update, part)
    blocks = output.unflatten(-1, (part.groups, -1))
    before, own, after = blocks.tensor_split((part.start, part.stop), -1)
    return torch.cat([before, own + update.view(own.shape), after], -1).flatten(-2)


def is_transformed() -> bool:
    """Whether a transform of torch.func is active. Such a transform can handle plain operations only."""
    return not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active()


def has_own_gradients() -> bool:
    """Whether to use our own gradients. torch.compile is faster with plain operations, and torch.jit needs those."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or not torch.is_grad_enabled():
        return False
    return not is_transformed()


class AddToColumns(torch.autograd.Function):
    """
    `output` plus `update` on the columns of `part`. An in-place addition to a view does the same, but autograd copies
    the whole gradient for it.
    """

    @staticmethod
    def forward(ctx, output, update, part):
        ctx.part = part
        result = output.clone(memory_format=torch.contiguous_format)
        columns = part.view(result)
        columns.add_(update.view(columns.shape))
        return result

    @staticmethod
    def backward(ctx, grad_output):
        return grad_output, ctx.part.view(grad_output).reshape(-1, ctx.part.size), None
