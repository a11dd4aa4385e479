"""The tensor operations that the updates of all methods share."""

import contextlib
import math
from collections.abc import Iterator

import torch
from torch import nn

from ..layouts import OutputSlice

# A GPU adds an update to an output of so many numbers in less time than Python needs to call our own gradients.
LARGE_ON_GPU = 2**22


def random_state(device: torch.device) -> torch.Tensor:
    """The state of a device's random numbers."""
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()


@contextlib.contextmanager
def random_numbers_from(device: torch.device, state: torch.Tensor) -> Iterator[None]:
    """Draw the random numbers of an earlier state once more, within a `with` block."""
    now = random_state(device)
    _set_random_state(device, state)
    try:
        yield
    finally:
        _set_random_state(device, now)


def _set_random_state(device: torch.device, state: torch.Tensor) -> None:
    if device.type == "cuda":
        torch.cuda.set_rng_state(state, device)
    else:
        torch.set_rng_state(state)


def at_least_float32(dtype: torch.dtype) -> torch.dtype:
    """The dtype, or float32 for half precision. `torch.promote_types` is an operation of torch, and takes longer."""
    return dtype if dtype.itemsize > 2 else torch.float32


def is_plain(module: nn.Module) -> bool:
    """Whether a module is torch's own linear, unquantized and frozen, so that its output is x W + b."""
    if type(module) is not nn.Linear or "forward" in module.__dict__:
        # accelerate, for one, puts another forward on the module, after which the weight may have no values.
        return False
    # A look into the module's own dictionary takes a part of the time of its attributes.
    parameters = module._parameters
    weight, bias = parameters.get("weight"), parameters.get("bias")
    # A quantized weight of a plain linear is of a class of its own.
    if type(weight) is not nn.Parameter or weight.requires_grad:
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


def own_gradients_pay(output: torch.Tensor) -> bool:
    """
    Whether to use our own gradients for an update of `output`. torch.compile is faster with plain operations, and
    torch.jit needs those. A GPU waits for Python unless it has much to compute.
    """
    if not torch.is_grad_enabled() or torch.compiler.is_compiling() or torch.jit.is_tracing():
        return False
    if output.device.type != "cpu" and output.numel() < LARGE_ON_GPU:
        return False
    return not torch._C._are_functorch_transforms_active()


def can_drop_again(x: torch.Tensor, output: torch.Tensor, dropout: nn.Module) -> bool:
    """
    Whether our own gradients for an update of `output` apply dropout to the input `x` themselves, and keep the state
    of the random numbers in the place of the mask. The CPU would take longer, and has memory enough.
    """
    if output.device.type != "cuda" or type(dropout) is not nn.Dropout or not own_gradients_pay(output):
        return False
    # torch.compile, which cannot ask these, has got its answer. A CUDA graph has no state of random numbers at hand.
    return not torch.cuda.is_current_stream_capturing() and has_fixed_mask(x)


def has_fixed_mask(x: torch.Tensor) -> bool:
    """
    Whether the mask of dropout depends on nothing but the shape of a tensor and the state of the random numbers. It is
    drawn in the order of the memory, and on a GPU another kernel draws it where memory does not begin as new one does.
    """
    return x.is_contiguous() and x.data_ptr() % 16 == 0


def add_dropped(grad: torch.Tensor, update: torch.Tensor, mask: torch.Tensor, p: float) -> torch.Tensor:
    """`grad` plus the gradient of dropout, for the gradient `update` of what it gave. `grad` is overwritten."""
    scale = 1.0 / (1.0 - p) if p < 1.0 else 0.0
    if torch.is_grad_enabled():
        # The derivative of the other operation multiplies the mask in float32.
        return grad + torch.ops.aten.native_dropout_backward(update, mask, scale)
    return grad.addcmul_(update, mask, value=scale)


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
