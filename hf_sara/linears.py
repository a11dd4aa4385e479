"""The linear modules of a model: which of them can hold updates, and the values of their weights.

An update is added to the output x W + b of a module. So a module can hold updates only if it is called, if its output
is this sum, and if the values of W can be read, whether they are quantized, offloaded or plain.
"""

import ast
import contextlib
import functools
import inspect
import textwrap
import threading
from collections.abc import Iterable, Iterator
from typing import Any, cast

import torch
from accelerate.hooks import remove_hook_from_module
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrize
from transformers.pytorch_utils import Conv1D

from .dequantizing import FULL_DTYPES, dequantizer, holds_numbers

# Attributes of a weight that say nothing of its values.
FACTS_OF_A_WEIGHT = {"dtype", "device", "shape", "size", "ndim", "dim", "numel", "requires_grad", "is_meta", "grad"}
REMEDY = "Load the base in a floating-point dtype, or with bitsandbytes quantization."

# A weight that is fetched for one reader is put away again, which must not happen while another thread reads it.
_fetching = threading.RLock()


def is_linear(module: nn.Module) -> bool:
    """Whether a module is a kind of linear whose weight can be read."""
    return isinstance(module, (nn.Linear, Conv1D)) or (has_sizes(module) and dequantizer(module) is not None)


def has_sizes(module: Any) -> bool:
    """Whether a module has the sizes of a linear, as modules with packed weights have too."""
    return all(type(getattr(module, name, None)) is int for name in ("in_features", "out_features"))


def is_packed(module: Any) -> bool:
    """Whether a module looks like a linear, with a weight that cannot be read. Not all of these say their sizes."""
    if is_linear(module) or hasattr(module, "num_embeddings"):
        return False
    own = module.parameters(recurse=False)
    return has_sizes(module) or any(weight.dim() == 2 and not holds_numbers(weight) for weight in own)


def linear_shape(module: nn.Module) -> tuple[int, int]:
    """(d_in, d_out) of a linear. It is not read from the weight, because a quantized one has another shape."""
    if isinstance(module, Conv1D):
        return module.nx, module.nf
    linear = cast(nn.Linear, module)
    return linear.in_features, linear.out_features


def is_quantized(module: Any) -> bool:
    """Whether the stored weight of a linear is not a plain tensor of floating-point numbers."""
    return not holds_numbers(getattr(module, "weight", None))


def compute_dtype(module: Any, model: Any) -> torch.dtype:
    """The dtype that a linear computes in. Nothing can be computed in that of a quantized weight."""
    weight = getattr(module, "weight", None)
    tensors = (weight, model, *model.parameters())
    return next((t.dtype for t in tensors if getattr(t, "dtype", None) in FULL_DTYPES), torch.float32)


def compute_device(module: Any) -> torch.device:
    """The device that a linear computes on. An offloaded weight has no values on it between the calls."""
    devices = [hook.execution_device for hook in _offloading(module) if hook.execution_device is not None]
    if devices:
        return torch.device(devices[0])
    own = (*module.parameters(recurse=False), *module.buffers(recurse=False))
    return next((tensor.device for tensor in (*own, *module.parameters())), torch.device("cpu"))


# ---- offloading ----


def is_offloaded(module: nn.Module) -> bool:
    """Whether accelerate keeps the values of a module's tensors elsewhere between its calls."""
    return bool(_offloading(module))


def _offloading(module: nn.Module) -> list[Any]:
    hook = getattr(module, "_hf_hook", None)
    return [one for one in getattr(hook, "hooks", [hook]) if getattr(one, "offload", False)]


@contextlib.contextmanager
def with_values(module: nn.Module) -> Iterator[None]:
    """Let a module have the values of its tensors within a `with` block, also if they are offloaded."""
    with _fetching:
        hooks = _offloading(module)
        for hook in hooks:
            hook.pre_forward(module)
        try:
            yield
        finally:
            for hook in hooks:
                hook.post_forward(module, None)


def take_back(module: nn.Module) -> None:
    """
    Let a module keep its tensors, which accelerate has offloaded. An adapter is small, and the tensors that accelerate
    puts in its module for one call would lose what they learn.
    """
    for inner in module.modules():
        if is_offloaded(inner):
            for hook in _offloading(inner):
                hook.pre_forward(inner)
                hook.offload = False
            remove_hook_from_module(inner)


def refuse_outer_hooks(model: nn.Module, name: str) -> None:
    """Raise a `ValueError` if tensors without values are offloaded together with those of a module around theirs."""
    if any(map(is_offloaded, model.modules())):
        raise ValueError(
            f"{name}: accelerate offloads this together with a module around it, as preload_module_classes asks for, "
            "so its values cannot be had. Leave that out, or bring them back with "
            "accelerate.hooks.remove_hook_from_submodules(model)."
        )


def refuse_gradients(tensors: Iterable[torch.Tensor], why: str) -> None:
    """Let a backward pass that reaches these tensors raise a `RuntimeError`, in place of training the wrong thing."""
    for tensor in tensors:
        if tensor.requires_grad:
            tensor.register_hook(functools.partial(_raise, why))


def _raise(why: str, gradient: torch.Tensor) -> None:
    raise RuntimeError(why)


# ---- the values of a weight ----


def read_weight(module: Any, name: str) -> torch.Tensor:
    """
    The stored weight of a linear as a plain tensor of floating-point numbers. A quantized one is dequantized, and one
    that is offloaded is fetched.

    Raises:
        `ValueError`: If its values cannot be read. The message has the name, and the class of the module.
    """
    if not is_offloaded(module):
        return _values(module, name)
    try:
        with with_values(module):
            return _values(module, name).clone()
    except NotImplementedError as error:
        raise ValueError(
            f"{name}: accelerate has offloaded the weight of this {type(module).__name__}, and cannot fetch it: "
            f"{error} Load the base without offloading."
        ) from error


def _values(module: Any, name: str) -> torch.Tensor:
    weight: Any = getattr(module, "weight", None)
    if hasattr(weight, "ds_id") and not weight.numel():
        raise ValueError(
            f"{name}: DeepSpeed has spread this weight over the processes while the model was loaded. Load the model, "
            "and attach the adapter, before TrainingArguments with ZeRO stage 3 are made."
        )
    if getattr(weight, "is_meta", False):
        raise ValueError(
            f"{name}: the weight is on the meta device, so it has no values now. Load the model first, and without "
            "preload_module_classes if accelerate offloads it."
        )
    if holds_numbers(weight) and weight.numel():
        return weight.detach()
    dequantize = dequantizer(module)
    stored = f"stored as {weight.dtype}" if isinstance(weight, torch.Tensor) else "packed"
    unreadable = f"{name}: the weight of this {type(module).__name__} is {stored}, and its values cannot be read"
    if dequantize is None:
        raise ValueError(f"{unreadable}. {REMEDY}")
    try:
        values = dequantize().detach()
    except Exception as error:
        # Each class fails in its own way, and none says what to do.
        raise ValueError(f"{unreadable}: {error}. {REMEDY}") from error
    if tuple(values.shape) != linear_shape(module)[::-1]:
        raise ValueError(f"{unreadable}: they come in the shape {tuple(values.shape)}. {REMEDY}")
    return values


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
    return leaf in _weights_read(cast(Any, kind))


@functools.cache
def _weights_read(kind: Any) -> frozenset[str]:
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
