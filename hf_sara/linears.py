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
from torch import nn
from torch.distributed.tensor import DTensor
from transformers.pytorch_utils import Conv1D

from .dequantizing import FULL_DTYPES, dequantizer, holds_numbers
from .spectrum import doubled
from .spread import is_partitioned, is_spread, shares_values, whole

# Attributes of a weight that say nothing of its values.
FACTS_OF_A_WEIGHT = {"dtype", "device", "shape", "size", "ndim", "dim", "numel", "requires_grad", "is_meta", "grad"}
# Attributes of a module by which it reaches its children without their names.
OTHER_WAYS = ("children", "modules", "named_children", "named_modules", "_modules")
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
    if has_sizes(module):
        return not holds_numbers(getattr(module, "weight", None))
    own = module.named_parameters(recurse=False)
    return any("weight" in name and weight.dim() == 2 and not holds_numbers(weight) for name, weight in own)


def is_strange(module: Any) -> bool:
    """Whether a module has the sizes of a linear and is none, although its weight may be a plain one."""
    return has_sizes(module) and not is_linear(module) and any(True for _ in module.parameters())


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
            # accelerate has offloaded the module, so it is loaded already.
            from accelerate.hooks import remove_hook_from_module

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
    that is offloaded is fetched. One that is spread over processes is gathered, so all of them have to call this.

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
    if getattr(weight, "is_meta", False) and not shares_values():
        raise ValueError(
            f"{name}: the weight is on the meta device, so it has no values now. Load the model first, and without "
            "preload_module_classes if accelerate offloads it. If another process has its values, attach the adapter "
            "there at the same time."
        )
    if holds_numbers(weight) and (weight.numel() or is_partitioned(weight)):
        return whole(weight)
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
    if isinstance(parent, nn.MultiheadAttention) or leaf in _weights_read(cast(Any, type(parent))):
        return f"{outer} reads the weight of this {kind} without calling it, so an update would have no effect"
    if _has_own_forward(module):
        with with_values(module):
            if not computes_product(module):
                return f"this {kind} has a forward of its own, which computes something else than x W + b"
    return None


def why_not_on(model: nn.Module, name: str) -> str | None:
    """The reason of [`why_not`] for the linear of this full name."""
    parent, _, leaf = name.rpartition(".")
    return why_not(model.get_submodule(name), model.get_submodule(parent), leaf)


def _has_own_forward(module: nn.Module) -> bool:
    """Whether a linear of full precision computes something that its base class does not say."""
    if is_quantized(module):
        return False
    known = Conv1D if isinstance(module, Conv1D) else nn.Linear
    # Tensor parallelism puts a forward of its own on a module, which computes the same with the other processes.
    own = None if isinstance(getattr(module, "weight", None), DTensor) else _forward(module)
    return own is not None or type(module).forward is not known.forward


def _forward(module: nn.Module) -> Any:
    """The forward that somebody put on a module in place of its class's. accelerate keeps the one before its own."""
    own = vars(module)
    found = own.get("_old_forward", own.get("forward"))
    return None if getattr(found, "__func__", None) is type(module).forward else found


@torch.no_grad()
def computes_product(module: Any) -> bool:
    """Whether a linear returns x W + b, for small and for large x. A module without whole values is believed."""
    weight, bias = module.weight.detach(), module.bias
    if weight.is_meta or is_spread(module.weight):
        return True
    stored = weight if isinstance(module, Conv1D) else weight.t()
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(6, len(stored), generator=generator).to(weight.device, weight.dtype)
    training = module.training
    module.eval()
    try:
        return all(_is_product(module, size * x, stored, bias) for size in (1, 100))
    finally:
        module.train(training)


def _is_product(module: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> bool:
    expected = doubled(x) @ doubled(weight) + (0 if bias is None else doubled(bias))
    # The forward itself is tried, so that no hook sees these numbers.
    forward = _forward(module) or functools.partial(type(module).forward, module)
    for shape in ((2, 3), (6,)):
        try:
            found = forward(x.unflatten(0, shape))
        except Exception:
            # Some take three dimensions only, and some take two.
            continue
        if not isinstance(found, torch.Tensor) or found.shape != (*shape, expected.shape[-1]):
            return False
        error = (doubled(found.reshape(expected.shape)) - expected).norm()
        return bool(error <= max(1e-4, torch.finfo(x.dtype).eps) * expected.norm())
    return False


@functools.cache
def _weights_read(kind: Any) -> frozenset[str]:
    """
    The names x for which the forward of a class reads `self.x.weight`, and never calls `self.x` nor passes it on. A
    class that goes over its children in another way is believed to call them.
    """
    methods: dict[str, ast.FunctionDef] = {}
    for base in kind.__mro__[: kind.__mro__.index(nn.Module)]:
        methods = {**_methods(base), **methods}
    read, used, seen, waiting = set(), set(), set(), ["forward"]
    while waiting:
        name = waiting.pop()
        if name in seen or name not in methods:
            continue
        seen.add(name)
        parents = {child: node for node in ast.walk(methods[name]) for child in ast.iter_child_nodes(node)}
        if any(isinstance(node, ast.Call) and getattr(node.func, "id", "") == "getattr" for node in parents):
            return frozenset()
        for node in _attributes_of_self(methods[name]):
            outer = parents[node]
            waiting.append(node.attr)
            if node.attr in OTHER_WAYS:
                return frozenset()
            if not isinstance(outer, ast.Attribute) or outer.attr == "forward":
                used.add(node.attr)
            elif outer.attr == "weight" and getattr(parents[outer], "attr", None) not in FACTS_OF_A_WEIGHT:
                read.add(node.attr)
    return frozenset(read - used)


def _attributes_of_self(method: ast.FunctionDef) -> list[ast.Attribute]:
    """The expressions `self.x` in a method."""
    me = method.args.args[0].arg if method.args.args else None
    attributes = (node for node in ast.walk(method) if isinstance(node, ast.Attribute))
    return [node for node in attributes if isinstance(node.value, ast.Name) and node.value.id == me]


def _methods(kind: type) -> dict[str, ast.FunctionDef]:
    """The code of a class's own methods by name."""
    try:
        source = ast.parse(textwrap.dedent(inspect.getsource(kind)))
    except (OSError, TypeError, SyntaxError):
        return {}
    body = cast(ast.ClassDef, source.body[0]).body
    return {node.name: node for node in body if isinstance(node, ast.FunctionDef)}
