"""
Updates of linears that tensor parallelism spreads over processes.

Every process has the whole tensors of an update, since they are small, and computes with the rows or columns that
belong to its part of the linear. What the forward pass splits, the backward pass puts together, so that every process
has the whole gradient, and all of them make the same steps.
"""

import functools
import hashlib
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard

from ..layouts import OutputSlice
from ..linears import linear_shape
from ..spread import tensor_parallel


@functools.cache
def check_random(mesh: DeviceMesh, device: torch.device) -> None:
    """Raise a `RuntimeError` unless the processes draw the same random numbers when they first need some."""
    state = torch.get_rng_state() if device.type == "cpu" else torch.get_device_module(device).get_rng_state(device)
    found: list[Any] = [None] * mesh.size()
    dist.all_gather_object(found, hashlib.sha256(state.numpy().tobytes()).hexdigest(), group=mesh.get_group())
    if len(set(found)) > 1:
        raise RuntimeError(
            "The processes of tensor parallelism draw different random numbers, so that dropout would not be that of "
            "one model. Set the same seed in all of them before the training: transformers.set_seed(seed)."
        )


@dataclass(frozen=True)
class Shards:
    """
    The part of a linear that a process has: some of its columns, while its input is whole, or the rows for the part of
    its input that this process has, while its output is whole.

    Args:
        mesh ([`~torch.distributed.device_mesh.DeviceMesh`]): The processes.
        by_columns (`bool`): Whether the outputs are spread, and not the inputs.
    """

    mesh: DeviceMesh
    by_columns: bool

    @classmethod
    def of(cls, module: Any, x: torch.Tensor, output: torch.Tensor) -> "Shards | None":
        """The part of a linear that computed `output` from `x`, or `None` if both are whole."""
        if not isinstance(getattr(module, "weight", None), DTensor):
            return None
        d_in, d_out = linear_shape(module)
        if (x.shape[-1], output.shape[-1]) == (d_in, d_out):
            return None
        found = tensor_parallel(module.weight)
        if found is None:
            raise RuntimeError(
                f"A linear of {d_in} inputs and {d_out} outputs has computed {output.shape[-1]} outputs from "
                f"{x.shape[-1]} inputs, so something beside tensor parallelism has changed it."
            )
        return cls(found[0], by_columns=output.shape[-1] != d_out)

    def rows(self, tensor: torch.Tensor, dim: int) -> torch.Tensor:
        """The part of a tensor for this process's inputs, which go along a dimension."""
        return tensor if self.by_columns else self._part(tensor, dim)

    def columns(self, tensor: torch.Tensor, dim: int) -> torch.Tensor:
        """The part of a tensor for this process's outputs, which go along a dimension."""
        return self._part(tensor, dim) if self.by_columns else tensor

    def slice(self, whole: OutputSlice | None) -> OutputSlice | None:
        """The output columns of a projection among those of this process, which are whole groups."""
        if whole is None or not self.by_columns:
            return whole
        return replace(whole, groups=whole.groups // self.mesh.size())

    def dropped(self, x: torch.Tensor, dropout: nn.Module, d_in: int) -> torch.Tensor:
        """The input after dropout. Its mask is that of one process, also for a part of the input."""
        check_random(self.mesh, x.device)
        if self.by_columns:
            return dropout(x)
        return x * self.rows(dropout(x.new_ones(*x.shape[:-1], d_in)), -1)

    def summed(self, tensor: torch.Tensor) -> torch.Tensor:
        """What all inputs together give, from what those of this process give."""
        return tensor if self.by_columns else self._moved(tensor, Partial(), Replicate())

    def shared(self, tensor: torch.Tensor) -> torch.Tensor:
        """A whole tensor, of which the outputs of every process give a part of the gradient."""
        if not self.by_columns or not tensor.requires_grad:
            return tensor
        spread = DTensor.from_local(tensor, self.mesh, [Replicate()], run_check=False)
        return spread.to_local(grad_placements=[Partial()])

    def _part(self, tensor: torch.Tensor, dim: int) -> torch.Tensor:
        return self._moved(tensor, Replicate(), Shard(dim))

    def _moved(self, tensor: torch.Tensor, here: Placement, there: Placement) -> torch.Tensor:
        return (
            DTensor.from_local(tensor, self.mesh, [here], run_check=False).redistribute(placements=[there]).to_local()
        )
