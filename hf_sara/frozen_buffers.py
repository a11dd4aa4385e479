"""The buffers of a frozen base, which a training would change: statistics of normalisations, and ranges of values.

A frozen base computes the same in training as later. So a normalisation uses its running statistics and does not move
them, as layers that are frozen do in other libraries. Any other module that keeps buffers and looks at whether it
trains works on copies of them, so that the base's stay as they are.
"""

import functools
import inspect
from typing import Any, cast

from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from .carrier import adapters_on, drop_hooks, has_frozen_base
from .parts import ModulePart, saved_buffers
from .patterns import is_of_update, is_within


def hold_buffers(model: nn.Module) -> None:
    """
    Keep the buffers of a model that carries adapters, apart from those of modules that are trained in full now, and
    let go of all others. This is called whenever one of the two may have changed.
    """
    adapters = adapters_on(model).values()
    trained = [
        copy.part.name
        for adapter in adapters
        for _, copy in adapter.copies()
        if isinstance(copy.part, ModulePart) and copy.is_enabled()
    ]
    frozen = has_frozen_base(model)
    for name, module in model.named_modules():
        held = frozen and not is_within(name, trained) and not is_of_update(name)
        if isinstance(module, _NormBase):
            _hold_norm(module, held and module.running_mean is not None)
        elif any(saved_buffers(module)):
            # Another hook may change a buffer too, as that of a spectral norm does.
            hooked = any(hook is not use_copies for hook in module._forward_pre_hooks.values())
            _hold_others(module, held and (hooked or _knows_training(cast(Any, type(module)))))


def hold_packing(model: nn.Module) -> None:
    """
    Let an evaluation leave 4-bit weights of bitsandbytes as they are. On some CPUs it would pack them anew, which
    rounds their scales, and from then on they pass no gradient on, without a word.
    """
    for module in model.modules():
        if getattr(module, "support_avx512bf16_for_cpu", False):
            cast(Any, module).support_avx512bf16_for_cpu = False


def _hold_norm(module: Any, held: bool) -> None:
    if held and "train" not in vars(module):
        module.sara_mode = module.training
        # This can be copied and pickled together with its module, which a function inside of another cannot.
        module.train = functools.partial(_note_mode, module)
        nn.Module.train(module, False)
    elif not held and "sara_mode" in vars(module):
        del module.train
        module.train(module.sara_mode)
        del module.sara_mode


def _note_mode(module: Any, mode: bool = True) -> nn.Module:
    """Stands in for `train` of a normalisation that stays in evaluation."""
    module.sara_mode = mode
    return module


def _hold_others(module: nn.Module, held: bool) -> None:
    hooked = any(hook is use_copies for hook in module._forward_pre_hooks.values())
    if held and not hooked:
        module.register_forward_pre_hook(use_copies, prepend=True)
        module.register_forward_hook(use_own, always_call=True)
    elif hooked and not held:
        drop_hooks(module, (use_copies, use_own))


def use_copies(module: Any, args: Any) -> None:
    """The forward pre-hook of a module that may change its buffers in a training."""
    if module.training:
        module.sara_buffers = dict(saved_buffers(module))
        for name, buffer in module.sara_buffers.items():
            module._buffers[name] = buffer.clone()


def use_own(module: Any, args: Any, output: Any) -> None:
    """The forward hook that gives such a module its own buffers back."""
    if "sara_buffers" in vars(module):
        module._buffers.update(module.sara_buffers)
        del module.sara_buffers


@functools.cache
def _knows_training(kind: Any) -> bool:
    """Whether the code of a class looks at whether it trains. A class without code is taken for one that does."""
    try:
        return any(".training" in inspect.getsource(base) for base in kind.__mro__[: kind.__mro__.index(nn.Module)])
    except (OSError, TypeError):
        return True
