"""
Tensors that no single process holds whole.

DeepSpeed's ZeRO stage 3 partitions them while a model is loaded, and tensor parallelism and FSDP shard them. Under
FSDP, one process can also load the values for the others, whose tensors are on the meta device. All processes have to
read such a tensor together.
"""

import contextlib
import hashlib
import logging
import re
import time
from collections.abc import Iterable, Iterator, Sequence
from contextvars import ContextVar
from types import SimpleNamespace
from typing import Any, cast

import torch
import torch.distributed as dist
from accelerate.utils import parse_flag_from_env
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Shard

logger = logging.getLogger(__name__)

# The number of a layer in a module's name, for which a plan of tensor parallelism has a star.
LAYER_NUMBER = re.compile(r"\.\d+(?=\.|$)")
# The ways in which a linear whose columns are spread over processes gives each of them its whole output.
GATHERED = ("colwise_gather_output", "colwise_rep")
# For so many seconds a process waits for the others: one whose model has no values, one under FSDP, and any other.
PATIENCE = {"empty": 600.0, "fsdp": 60.0, "whole": 3.0}

# The process whose values all processes use now.
_source: ContextVar[int | None] = ContextVar("source", default=None)
# The meetings of the processes of a group so far.
_meetings = SimpleNamespace(group=None, count=0)


def is_partitioned(tensor: Any) -> bool:
    """Whether ZeRO stage 3 has left this process only a part of a tensor, which is then empty."""
    return hasattr(tensor, "ds_id") and not tensor.numel()


def is_spread(tensor: Any) -> bool:
    """Whether all processes have to read a tensor together."""
    return isinstance(tensor, DTensor) or is_partitioned(tensor) or shares_values()


def partition(tensors: Sequence[torch.Tensor], like: Any) -> None:
    """Let ZeRO stage 3 leave this process a part of tensors that are whole, as it has done with the tensor `like`."""
    if tensors:
        like.convert_to_zero_parameters(param_list=list(tensors))


def whole_shape(tensor: torch.Tensor) -> tuple[int, ...]:
    """The shape of a tensor, also if this process holds a part of it."""
    return tuple(getattr(tensor, "ds_shape", tensor.shape))


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """All values of a tensor, without gradient. If it is spread over processes, every process has to call this."""
    if isinstance(tensor, DTensor):
        return cast(DTensor, tensor.detach()).full_tensor()
    if is_partitioned(tensor):
        import deepspeed

        with deepspeed.zero.GatheredParameters([tensor], modifier_rank=None):
            return tensor.detach().clone()
    source = _source.get()
    if source is None:
        return tensor.detach()
    own = dist.get_rank() == source
    # torch sends dense tensors only.
    box = (
        tensor.detach().to(_device()).contiguous()
        if own
        else torch.empty(tensor.shape, dtype=tensor.dtype, device=_device())
    )
    dist.broadcast(box, src=source)
    return tensor.detach() if own else box


def _device() -> torch.device:
    """The device whose tensors the processes can send to each other."""
    accelerator = torch.accelerator.current_accelerator()
    return torch.device("cpu") if "cpu:" in dist.get_backend_config() or accelerator is None else accelerator


# ---- values that another process has ----


def shares_values() -> bool:
    """Whether the values of a model come from one process now, see [`with_values_of_others`]."""
    return _source.get() is not None


def works_together(model: nn.Module) -> bool:
    """Whether all processes have to do together what reads the weights of a model."""
    return any(is_spread(parameter) for parameter in model.parameters())


@contextlib.contextmanager
def with_values_of_others(model: nn.Module, deed: str) -> Iterator[None]:
    """
    Let [`whole`] return the values of another process within a `with` block, if this process, or one of the others,
    has a model without values. Every process has to come here with the same model. Where nobody is without values, a
    process may also come alone, since others are not waited for longer than some seconds.

    Args:
        model ([`~transformers.PreTrainedModel`]): The model.
        deed (`str`): What is going to be done. All processes that meet have to do the same.
    """
    if shares_values():
        # This is a part of what the processes do together already.
        yield
        return
    source = _find_source(model, deed)
    token = _source.set(source)
    try:
        if source is not None:
            _fill_buffers(model, source)
        yield
    finally:
        _source.reset(token)


@contextlib.contextmanager
def agreed(model: nn.Module) -> Iterator[None]:
    """
    Let an error within a `with` block be one in every process, if they work together, so that none waits for one that
    has failed. Nothing in the block may need the other processes.
    """
    error = None
    try:
        yield
    except Exception as found:
        error = found
    if works_together(model):
        said: list[str | None] = [None] * dist.get_world_size()
        dist.all_gather_object(said, None if error is None else f"{type(error).__name__}: {error}")
        if error is None:
            for rank, text in enumerate(said):
                if text is not None:
                    raise RuntimeError(f"Process {rank} has failed, so that this one cannot go on. {text}")
    if error is not None:
        raise error


@torch.no_grad()
def send_to_all(tensors: Iterable[torch.Tensor]) -> None:
    """Let tensors have the values of the first process. Each process may have drawn other random numbers."""
    for tensor in tensors:
        values = tensor.detach().to(_device()).contiguous()
        dist.broadcast(values, src=0)
        tensor.copy_(values)


def _find_source(model: nn.Module, deed: str) -> int | None:
    """The first process that has values, if another one has none."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return None
    sizes = getattr(getattr(model, "config", None), "distributed_config", None)
    if (getattr(sizes, "pp_size", None) or 1) > 1:
        raise ValueError(
            "Pipeline parallelism gives each process some of the layers only, and hf_sara does not support it. Load "
            "the base with pp_size=1, and spread it by tp_size or fsdp_size."
        )
    parameters = list(model.parameters())
    if any(isinstance(parameter, DTensor) or hasattr(parameter, "ds_id") for parameter in parameters):
        # All processes read these together anyway.
        return None
    empty = any(parameter.is_meta for parameter in parameters)
    patience = PATIENCE["empty" if empty else "fsdp" if parse_flag_from_env("ACCELERATE_USE_FSDP") else "whole"]
    kinds = repr([(name, tuple(p.shape), p.dtype) for name, p in model.named_parameters()])
    facts = (hashlib.sha256(text.encode()).hexdigest() for text in (kinds, deed))
    found = [word.split() for word in _meet(" ".join(["empty" if empty else "whole", *facts]), patience)]
    states = [word[0] for word in found]
    if {"empty", "whole"} != set(states):
        return None
    if len({word[1] for word in found}) > 1:
        raise ValueError(
            "Some processes have a model without values, and parameters of other names, shapes or dtypes than the "
            "process that has them. Make the model there with the same configuration and the same dtype."
        )
    if len({word[2] for word in found}) > 1:
        raise ValueError(
            "Some processes have a model without values, and the one that has them does something else with the model "
            f"than they do. Here it is: {deed}. Let all processes do the same, with the same arguments."
        )
    return states.index("whole")


def _fill_buffers(model: nn.Module, source: int) -> None:
    """
    Give the buffers that no state dict has their values, such as the frequencies of rotary embeddings. Those who
    spread a model send its state dict only.
    """
    places = {
        f"{path}.{name}": (module, name)
        for path, module in model.named_modules()
        for name in sorted(module._non_persistent_buffers_set)
    }
    buffers = {full: module._buffers[name] for full, (module, name) in places.items()}
    own = dist.get_rank() == source
    box = [{full: buffer.cpu() for full, buffer in buffers.items() if buffer is not None} if own else {}]
    dist.broadcast_object_list(box, src=source)
    for full, value in box[0].items():
        module, name = places[full]
        here = module._buffers[name]
        if here is None or here.is_meta:
            module._buffers[name] = value


def _meet(word: str, patience: float) -> list[str]:
    """
    The words that all processes say, or none if they did not all come in time. torch's own ways to meet would let a
    process that comes alone wait for half an hour, and then fail.
    """
    store = dist.PrefixStore("hf_sara", dist.distributed_c10d._get_default_store())
    if _meetings.group is not dist.group.WORLD:
        _meetings.group, _meetings.count = dist.group.WORLD, 0
    while store.check([f"{_meetings.count}/outcome"]):
        # It took place without this process.
        _meetings.count += 1
    number = _meetings.count
    names = [f"{number}/{rank}" for rank in range(dist.get_world_size())]
    store.set(names[dist.get_rank()], word)
    start, told = time.monotonic(), False
    while not (complete := store.check(names)) and time.monotonic() < start + patience:
        if not told and time.monotonic() > start + 10.0:
            missing = [rank for rank, name in enumerate(names) if not store.check([name])]
            logger.warning("Waiting for the processes %s, which may have values of this model.", missing)
            told = True
        time.sleep(0.01)
    # Whoever is first to write it decides for all.
    outcome = store.compare_set(f"{number}/outcome", "", "met" if complete else "left")
    _meetings.count += 1
    return [store.get(name).decode() for name in names] if outcome == b"met" else []


# ---- tensor parallelism ----


def tensor_parallel(weight: Any) -> tuple[DeviceMesh, Placement] | None:
    """The processes over which tensor parallelism has spread a weight, and in what way, or `None`."""
    names = weight.device_mesh.mesh_dim_names if isinstance(weight, DTensor) else None
    if names is None or "tp" not in names:
        return None
    # FSDP may have spread it too.
    mesh, placement = weight.device_mesh, weight.placements[names.index("tp")]
    return None if placement.is_replicate() else (mesh["tp"] if mesh.ndim > 1 else mesh, placement)


def why_not_spread(model: Any, name: str, groups: int | None) -> str | None:
    """
    The reason why no update can stand beside a weight that is spread in its way, or `None`.

    Args:
        model ([`~transformers.PreTrainedModel`]): The model.
        name (`str`): The name of the linear.
        groups (`int`, *optional*): For a projection of a fused module, its [`OutputSlice.groups`].
    """
    module = model.get_submodule(name)
    weight = getattr(module, "weight", None)
    # transformers marks the modules whose forward it has replaced.
    parallel = getattr(module, "_is_hooked", False)
    if parallel and not isinstance(weight, DTensor):
        return (
            "tensor parallelism runs it in a way that hf_sara does not know, or that of an older transformers. Load "
            "the base without tensor parallelism"
        )
    found = tensor_parallel(weight)
    if found is None:
        return None
    mesh, placement = found
    if type(placement) is not Shard:
        return f"tensor parallelism spreads its weight as {placement}, which hf_sara does not know"
    style = (getattr(model, "_tp_plan", None) or {}).get(LAYER_NUMBER.sub(".*", name))
    if placement.dim == 0 and style not in GATHERED and groups is not None and groups % mesh.size():
        return f"tensor parallelism over {mesh.size()} processes cuts its projections, which stand in {groups} groups"
    return None
