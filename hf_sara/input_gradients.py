"""Models with a backward pass of their own, which may give no gradient to updates unless their input has one.

Reformer is an example: it computes its layers again in the backward pass, and lets autograd see their input alone. The
embeddings of a frozen base have no gradient, so autograd would see nothing to train.
"""

import functools
import inspect
import re
from typing import Any, cast

import torch
from torch import nn

from .carrier import drop_hooks, has_frozen_base
from .parts import input_embedding


def hold_input_gradients(model: nn.Module) -> None:
    """
    Let the embeddings of a model have a gradient while it carries adapters, if its code has a backward pass of its
    own. This is called whenever the adapters of the model may have changed.
    """
    embedding = input_embedding(model) if _has_own_backward(cast(Any, type(model))) else None
    if embedding is None:
        return
    drop_hooks(embedding, (require_gradient,))
    if has_frozen_base(model):
        embedding.register_forward_hook(require_gradient)


def require_gradient(module: nn.Module, args: Any, output: torch.Tensor) -> None:
    """The forward hook of such an embedding."""
    if module.training and torch.is_grad_enabled() and output.is_leaf:
        output.requires_grad_(True)


@functools.cache
def _has_own_backward(kind: Any) -> bool:
    """Whether the file of a model's class has a function whose backward pass starts another one."""
    file = inspect.getmodule(kind)
    classes = [] if file is None else [value for value in vars(file).values() if inspect.isclass(value)]
    return any(issubclass(value, torch.autograd.Function) and _goes_backward(value) for value in classes)


def _goes_backward(function: Any) -> bool:
    try:
        return re.search(r"\.backward|enable_grad", inspect.getsource(function.backward)) is not None
    except (OSError, TypeError):
        return False
