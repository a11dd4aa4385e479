"""The reference model of trainers that compare a policy with it, such as TRL's for DPO, KTO and GRPO.

With a new adapter, the reference is the base. With an adapter that came trained, it is that adapter as it came. TRL
would load the bare base in both cases. The reference shares the frozen weights of the policy, so that it takes the
memory of an adapter only.
"""

import copy
import inspect
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from types import MethodType
from typing import Any
from unittest.mock import patch

from accelerate.utils import parse_flag_from_env
from torch import nn
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedModel

from ..adapter import SaraAdapter
from ..carrier import unwrap
from ..contents import make_contiguous
from ..copies import TokenRows
from ..freezing import held_ids
from ..spread import is_partitioned

# TRL's functions that make a reference in trainers whose constructors do not take one: the first loads it by the name
# of the base, and loads teachers and policies too; the second copies the policy.
LOADER, COPIER = "create_model_from_path", "create_reference_model"


def make_reference(adapter: SaraAdapter, share: bool = True) -> nn.Module:
    """
    A frozen copy of an adapted model: with the adapter as it is now, or without it if it is untrained.

    Args:
        adapter ([`SaraAdapter`]): The adapter.
        share (`bool`, *optional*, defaults to `True`): Whether the copy shares the frozen tensors of the model.

    Returns:
        [`~transformers.PreTrainedModel`]: The copy. Its modules and its trained tensors are its own.

    Raises:
        `ValueError`: If this process does not have the values of the model.
    """
    model: Any = adapter.model
    sharded = any(isinstance(module, FSDPModule) for module in model.modules())
    if sharded or any(is_partitioned(tensor) or tensor.is_meta for tensor in model.parameters()):
        raise ValueError(
            "This process holds only a part of the model, so no copy of it can be the reference. Load the reference "
            "in the same way as the model, and give it as ref_model: the base, or from_hub of the adapter as it came."
        )
    own = held_ids(model)
    # Trained rows of an embedding are written into its weight.
    own |= {id(m.weight) for m in model.modules() for c in getattr(m, "sara", {}).values() if isinstance(c, TokenRows)}
    memo = {id(tensor): tensor for tensor in model.parameters() if share and id(tensor) not in own}
    reference = copy.deepcopy(model, memo)
    if isinstance(vars(reference).get("forward"), MethodType):
        # An earlier trainer of TRL has put it there, and it would call the forward of the policy.
        del reference.forward
    if adapter.is_untrained():
        reference.sara_adapters[adapter.name].detach()
    if not share:
        make_contiguous(reference)
    return reference.requires_grad_(False).eval()


@contextmanager
def reference_for(trainer: Any, model: Any, args: Any, kwargs: dict[str, Any]) -> Iterator[None]:
    """
    Give a trainer its reference while its constructor runs: as the argument `ref_model`, or in place of the model that
    it would load. A trainer without a reference, or with one that the user gave, is left alone.

    Raises:
        `ValueError`: If the reference has to follow the policy, or the trainer made another one by itself.
    """
    given = kwargs.get("ref_model")
    if getattr(args, "sync_ref_model", False) and given is None:
        raise ValueError(
            "sync_ref_model=True writes the policy's weights into the reference, which shares the base with it "
            "or has no adapter. Leave it out, or give a second model with the same adapter as ref_model."
        )
    policy = unwrap(model) if isinstance(model, nn.Module) else None
    if given is not None or not isinstance(policy, PreTrainedModel):
        yield
        return
    makers = (LOADER, COPIER) if hasattr(args, "sync_ref_model") else (COPIER,)
    # The module of a class that `exec` has made may be none.
    modules = {sys.modules.get(kind.__module__) for kind in type(trainer).__mro__}
    replaced = [(module, name) for module in modules for name in makers if hasattr(module, name)]
    takes, reference = _takes_reference(trainer), None
    if trainer.bank is not None and not takes and not replaced:
        yield
        return
    adapter = trainer.choose_adapter(policy)
    was_trained = not adapter.is_untrained()
    if takes or replaced:
        spread = getattr(args, "deepspeed_plugin", None) is not None or getattr(args, "fsdp", None)
        # `accelerate launch` says so in the environment.
        spread = spread or parse_flag_from_env("ACCELERATE_USE_FSDP")
        reference = make_reference(adapter, share=not spread)
    if takes:
        kwargs["ref_model"] = reference
    with ExitStack() as stack:
        for module, name in () if takes else replaced:
            stack.enter_context(patch.object(module, name, lambda *_, **__: reference))
        yield
    found = getattr(trainer, "ref_model", None)
    if was_trained and isinstance(found, nn.Module) and SaraAdapter.of(unwrap(found), adapter.name) is None:
        raise ValueError(
            f"The adapter {adapter.name!r} came trained, and {type(trainer).__name__} made a reference model without "
            "it. Give the reference as ref_model."
        )


def _takes_reference(trainer: Any) -> bool:
    """Whether the constructor of a trainer takes a `ref_model`."""
    constructors = [kind.__dict__["__init__"] for kind in type(trainer).__mro__ if "__init__" in kind.__dict__]
    return any("ref_model" in inspect.signature(constructor).parameters for constructor in constructors)
