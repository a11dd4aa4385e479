"""The linear modules of a model: which of them can hold updates, and the values of their weights.

An update is added to the output x W + b of a module. So a module can hold updates only if it is called, if its output
is this sum, and if the values of W can be read, whether they are quantized, offloaded or plain.
"""

import ast
import contextlib
import functools
import inspect
import textwrap
from collections.abc import Iterator
from typing import Any, cast

import torch
from accelerate.utils import align_module_device
from torch import nn
from torch.distributed.tensor import DTensor
from torch.nn import functional as F
from torch.nn.utils import parametrize
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from transformers.pytorch_utils import Conv1D

# Attributes of a weight that say nothing of its values.
FACTS_OF_A_WEIGHT = {"dtype", "device", "shape", "size", "ndim", "dim", "numel", "requires_grad", "is_meta", "grad"}
FULL_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def is_linear(module: nn.Module) -> bool:
    """Whether a module is a kind of linear whose weight can be read."""
    return isinstance(module, (nn.Linear, Conv1D)) or (has_sizes(module) and _dequantizer(module) is not None)


def has_sizes(module: Any) -> bool:
    """Whether a module has the sizes of a linear, as modules with packed weights have too."""
    return all(type(getattr(module, name, None)) is int for name in ("in_features", "out_features"))


def linear_shape(module: nn.Module) -> tuple[int, int]:
    """(d_in, d_out) of a linear. It is not read from the weight, because a quantized one has another shape."""
    if isinstance(module, Conv1D):
        return module.nx, module.nf
    linear = cast(nn.Linear, module)
    return linear.in_features, linear.out_features


def is_quantized(module: Any) -> bool:
    """Whether the stored weight of a linear is not a plain tensor of floating-point numbers."""
    weight = getattr(module, "weight", None)
    if weight is None or weight.dtype not in FULL_DTYPES or getattr(weight, "quant_state", None) is not None:
        return True
    return is_traceable_wrapper_subclass(weight) and not isinstance(weight, DTensor)


def compute_dtype(module: Any, model: Any) -> torch.dtype:
    """The dtype that a linear computes in. Nothing can be computed in that of a quantized weight."""
    weight = getattr(module, "weight", None)
    if weight is not None and weight.dtype in FULL_DTYPES:
        return weight.dtype
    return model.dtype


def compute_device(module: Any) -> torch.device:
    """The device that a linear computes on. An offloaded weight has no values on it between the calls."""
    hook = getattr(module, "_hf_hook", None)
    if is_offloaded(module) and getattr(hook, "execution_device", None) is not None:
        device = hook.execution_device
        return torch.device(device) if not isinstance(device, int) else torch.empty(0, device=device).device
    return next(tensor.device for tensor in (*module.parameters(), *module.buffers()))


def is_offloaded(module: nn.Module) -> bool:
    """Whether accelerate keeps the values of a module's tensors elsewhere between its calls."""
    hook = getattr(module, "_hf_hook", None)
    hooks = getattr(hook, "hooks", [hook])
    return any(getattr(one, "offload", False) for one in hooks)


@contextlib.contextmanager
def with_values(module: nn.Module) -> Iterator[None]:
    """Let a module have the values of its tensors within a `with` block, also if they are offloaded."""
    with align_module_device(module) if is_offloaded(module) else contextlib.nullcontext():
        yield


# ---- the values of a weight ----


def read_weight(module: Any, name: str) -> torch.Tensor:
    """
    The stored weight of a linear as a plain tensor of floating-point numbers. A quantized one is dequantized, and one
    that is offloaded is fetched.

    Raises:
        `ValueError`: If its values cannot be read. The message has the name, and the class of the module.
    """
    if is_offloaded(module):
        with with_values(module):
            return _values(module, name).clone()
    return _values(module, name)


def _values(module: Any, name: str) -> torch.Tensor:
    weight = getattr(module, "weight", None)
    if weight is not None and hasattr(weight, "ds_id") and not weight.numel():
        raise ValueError(
            f"{name}: DeepSpeed has spread this weight over the processes while the model was loaded. Load the model, "
            "and attach the adapter, before TrainingArguments with ZeRO stage 3 are made."
        )
    if weight is not None and weight.is_meta:
        raise ValueError(f"{name}: the weight is on the meta device, it has no values yet. Load the model first.")
    dequantize = _dequantizer(module)
    values = weight.detach() if dequantize is None else dequantize().detach()
    if values.dtype not in FULL_DTYPES or (is_traceable_wrapper_subclass(values) and not isinstance(values, DTensor)):
        raise ValueError(
            f"{name}: the weight of this {type(module).__name__} is stored as {values.dtype}, and its values cannot "
            "be read. Load the base in a floating-point dtype, or with bitsandbytes quantization."
        )
    return values


def _dequantizer(module: Any) -> Any:
    """The function that returns the values of a linear's quantized weight, or `None`."""
    weight = getattr(module, "weight", None)
    own = getattr(module, "dequantize", None) or getattr(module, "dequantize_weight", None)
    if callable(own):
        return own
    if weight is None:
        return None
    if getattr(weight, "quant_state", None) is not None or (weight.dtype == torch.int8 and hasattr(module, "state")):
        from transformers.integrations.bitsandbytes import dequantize_bnb_weight

        return lambda: dequantize_bnb_weight(weight, state=getattr(module, "state", None))
    scale = getattr(module, "weight_scale_inv", None)
    if scale is not None and weight.element_size() == 1:
        return lambda: _scaled(weight, scale)
    if is_traceable_wrapper_subclass(weight) and not isinstance(weight, DTensor):
        return getattr(weight, "dequantize", None)
    return None


def _scaled(weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """An 8-bit floating-point weight times its scale: one number, or one for each block of rows and columns."""
    scale = scale.detach().float()
    if scale.numel() > 1:
        sizes = [-(-size // blocks) for size, blocks in zip(weight.shape, scale.shape, strict=True)]
        for dim, size in enumerate(sizes):
            scale = scale.repeat_interleave(size, dim).narrow(dim, 0, weight.shape[dim])
    return weight.detach().float() * scale


# ---- what cannot hold updates ----


def why_not(module: nn.Module, parent: nn.Module, leaf: str) -> str | None:
    """
    The reason why a linear cannot hold updates, or `None` if it can.

    Args:
        module (`nn.Module`): The linear.
        parent (`nn.Module`): The module that it is a child of.
        leaf (`str`): Its name there.
    """
    kind, outer = type(module).__name__, type(parent).__name__
    if isinstance(parent, nn.MultiheadAttention) or _reads_only_weight(type(parent), leaf):
        return f"{outer} reads the weight of this {kind} without calling it, so an update would have no effect"
    if _has_own_forward(module) and not computes_product(cast(nn.Linear, module)):
        return f"this {kind} has a forward of its own, which computes something else than x W + b"
    return None


def _has_own_forward(module: nn.Module) -> bool:
    """Whether a linear of full precision computes something that its base class does not say."""
    if is_quantized(module) or parametrize.is_parametrized(module) or is_offloaded(module):
        return False
    known = Conv1D if isinstance(module, Conv1D) else nn.Linear
    return isinstance(module, known) and type(module).forward is not known.forward


@torch.no_grad()
def computes_product(module: nn.Linear) -> bool:
    """Whether a linear returns x W + b, for small and for large x. A module without values is believed."""
    weight = module.weight
    if weight.is_meta:
        return True
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, weight.shape[-1], generator=generator).to(weight.device, weight.dtype)
    training = module.training
    module.eval()
    try:
        for size in (1, 100):
            # Only the class's own forward is tried, so that no hook sees these numbers.
            found, expected = module.forward(size * x), F.linear(size * x, weight, module.bias)
            if not isinstance(found, torch.Tensor) or found.shape != expected.shape:
                return False
            rounding = 32 * torch.finfo(weight.dtype).eps * expected.abs().max()
            if not (found - expected).abs().max() <= rounding:
                return False
    except (RuntimeError, ValueError, TypeError, IndexError, AttributeError):
        return False
    finally:
        module.train(training)
    return True


def _reads_only_weight(kind: type[nn.Module], leaf: str) -> bool:
    """Whether the code of a class reads `self.<leaf>.weight`, and never calls `self.<leaf>` nor passes it on."""
    return leaf in _weights_read(kind)


@functools.cache
def _weights_read(kind: type[nn.Module]) -> frozenset[str]:
    read, used = set(), set()
    for base in kind.__mro__:
        if base is nn.Module:
            break
        for tree in _methods(base):
            parents = {child: node for node in ast.walk(tree) for child in ast.iter_child_nodes(node)}
            for node in ast.walk(tree):
                name = _own_attribute(node)
                if name is None:
                    continue
                outer = parents.get(node)
                if not isinstance(outer, ast.Attribute):
                    used.add(name)
                elif outer.attr == "weight" and getattr(parents.get(outer), "attr", None) not in FACTS_OF_A_WEIGHT:
                    read.add(name)
                elif outer.attr == "forward":
                    used.add(name)
    return frozenset(read - used)


def _methods(kind: type) -> Iterator[ast.AST]:
    """The code of a class's own methods, apart from those that make its modules and fill them."""
    try:
        source = ast.parse(textwrap.dedent(inspect.getsource(kind)))
    except (OSError, TypeError, SyntaxError):
        return
    for node in cast(ast.ClassDef, source.body[0]).body:
        if isinstance(node, ast.FunctionDef) and node.name not in ("__init__", "_init_weights", "reset_parameters"):
            yield node


def _own_attribute(node: ast.AST) -> str | None:
    """The name x of an expression `self.x`."""
    if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "self":
        return node.attr
    return None
