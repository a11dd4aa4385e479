"""
The updates of linears for batches whose rows have different adapters.

An adapter of a bank is one row of a table, in which all of its trained tensors stand side by side. While a batch runs,
the rows of its adapters are put together once, and every linear takes its tensors from there as views. So neither the
number of different adapters in a batch nor that of the adapters in the bank makes a difference.
"""

import contextlib
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from .methods import Delta
from .methods.base import Shapes, Tensors, keep_wide
from .methods.shards import Shards

Places = dict[str, tuple[int, tuple[int, ...]]]


class Batch:
    """
    The adapters of the batch that runs now.

    Attributes:
        table (`torch.Tensor` of shape `(rows, numbers)`, *optional*): For each row of the batch, all numbers of its
            adapter, one site after the other; `None` while the model is the base.
        size (`int`, *optional*): The rows of what the model computes now. Where a search has several beams for each
            row, it is a multiple of the rows of the batch.
        alone (`bool`): Whether all rows have the one adapter of the bank, and its tensors are those of the updates
            themselves, as while it trains.
    """

    def __init__(self) -> None:
        self.table: torch.Tensor | None = None
        self.size: int | None = None
        self.alone = False
        # Whether the model must get as many rows as there are names.
        self.exact = False
        self._kept: torch.Tensor | None = None
        self._copies: dict[torch.device, torch.Tensor] = {}
        # By its first number in a row, each tensor's length.
        self._lengths: dict[int, int] = {}
        self._pieces: dict[torch.device, dict[int, torch.Tensor]] = {}

    def begin(self, table: torch.Tensor) -> None:
        """Let the model compute with these adapters."""
        kept = self._kept
        if table.requires_grad:
            self.table = table
        elif kept is not None and _can_hold(kept, table):
            # A compiled graph may know the tensor by its place.
            self.table = kept.copy_(table)
        else:
            self.table = self._kept = table
            if table.device.type == "cuda":
                # A CUDA graph would copy it at each step.
                torch._dynamo.mark_static_address(table)
        self.size, self._copies, self._pieces = None, {}, {}

    def begin_alone(self) -> None:
        """Let the model compute with the one adapter of the bank, whose tensors are those of the updates."""
        self.table, self.size, self.alone = None, None, True

    @contextlib.contextmanager
    def as_it_is(self, exact: bool = True) -> Iterator[None]:
        """Let nothing make several rows of one within a `with` block, as a search does."""
        self.exact = exact
        try:
            yield
        finally:
            self.exact = False

    def take(self, rows: int | None) -> None:
        """Note how many rows the model computes now."""
        names = None if self.table is None else len(self.table)
        if self.exact and None not in (names, rows) and names != rows:
            raise ValueError(f"The model gets {rows} rows for {names} names of adapters. Each row needs one name.")
        self.size = rows

    def end(self) -> None:
        """Let the model be the base."""
        self.table, self.size, self.alone, self._copies, self._pieces = None, None, False, {}, {}

    def on(self, device: torch.device) -> torch.Tensor:
        """The table on a device. A model can be spread over several."""
        assert self.table is not None
        if self.table.device == device:
            return self.table
        if device not in self._copies:
            self._copies[device] = self.table.to(device)
        return self._copies[device]

    def views(self, device: torch.device, places: Places) -> dict[str, torch.Tensor]:
        """Tensors of each row as views of the table on a device, of shape `(rows, *shape)`."""
        table = self.on(device)
        if not table.requires_grad:
            pieces = {start: table.narrow(1, start, math.prod(shape)) for start, shape in places.values()}
        else:
            if device not in self._pieces:
                # All are made at once, because the gradient of each narrow one would be as large as the table.
                # Activation checkpointing calls the linears without a gradient first.
                with torch.enable_grad():
                    split = table.split(list(self._lengths.values()), 1)
                self._pieces[device] = dict(zip(self._lengths, split, strict=True))
            pieces = self._pieces[device]
        return {name: pieces[start].view(len(table), *shape) for name, (start, shape) in places.items()}

    def knows(self, places: Places) -> None:
        """Note where the tensors of the next site stand in a row."""
        self._lengths |= {start: math.prod(shape) for start, shape in places.values()}


class BankDelta(nn.Module):
    """
    The updates of one linear for all adapters of a bank. It stands where an adapter's own update would.

    Args:
        delta ([`Delta`]): An update of the adapters' kind. Its frozen factors are those of all of them, and its
            trained tensors are not used.
        batch ([`Batch`]): The adapters of the batch that runs.
        start (`int`): The first number of this site in a row of the table.
    """

    def __init__(self, delta: Delta, batch: Batch, start: int):
        super().__init__()
        self.delta = delta.requires_grad_(False)
        self.usage = delta.usage
        self.batch = batch
        self.places = places(shapes_of(delta), start)
        batch.knows(self.places)
        self._views: tuple[Any, Any] = (None, None)
        # While a bank trains, its first update has the parameters of all adapters.
        self.rows: nn.ParameterList | None = None

    def _apply(self, fn, recurse=True):
        before = [parameter.data for parameter in self.rows or ()]
        super()._apply(fn, recurse)
        for parameter, value in zip(self.rows or (), before, strict=True):
            keep_wide(parameter, value)
        return self

    @property
    def enabled(self) -> bool:
        """Whether a batch with adapters runs now."""
        return self.batch.alone or self.batch.table is not None

    def follow_weight(self, module: nn.Module) -> None:
        """See [`Delta.follow_weight`]."""
        self.delta.follow_weight(module)

    def forward(
        self, x: torch.Tensor, output: torch.Tensor, linear: nn.Linear | None = None, shards: Shards | None = None
    ) -> torch.Tensor:
        """See [`Delta.forward`]. Each row of the batch has the update of its own adapter."""
        if self.batch.alone:
            return self.delta(x, output, linear, shards)
        table = self.batch.on(output.device)
        check_rows(x, len(table), self.batch.size, self.delta.site_name)
        return self.delta(x, output, linear, shards, self._own(table))

    def _own(self, table: torch.Tensor) -> Tensors:
        """The tensors of the adapter of each row, as views of the table. They are made once for all steps."""
        known, own = self._views
        if known is not table:
            own = self.batch.views(table.device, self.places)
            if not torch.compiler.is_compiling() and not table.requires_grad:
                self._views = table, own
        return own


def _can_hold(kept: torch.Tensor, table: torch.Tensor) -> bool:
    """Whether a tensor of an earlier batch can take the numbers of a table."""
    if kept.is_inference() and not torch.is_inference_mode_enabled():
        return False
    return (kept.shape, kept.device, kept.dtype) == (table.shape, table.device, table.dtype)


def shapes_of(delta: Delta) -> Shapes:
    """Names and shapes of the trained tensors of an update."""
    return {name: tuple(tensor.shape) for name, tensor in delta.trained().items()}


def places(shapes: Shapes, start: int = 0) -> Places:
    """Where each tensor begins in a row of numbers in which they stand one after the other, and its shape."""
    found = {}
    for name, shape in shapes.items():
        found[name] = (start, shape)
        start += math.prod(shape)
    return found


def check_rows(x: Any, rows: int, size: int | None, site: str) -> None:
    """
    Raise a `RuntimeError` unless the input of a linear has the tokens of each row of the batch side by side, and the
    rows in their order.
    """
    count = rows if size is None else size
    ahead = x.shape[0] % count == 0 and (size is None or size % rows == 0)
    # With three dimensions, the second one may be that of the rows.
    if not ahead or (x.dim() == 3 and x.shape[0] != count and x.shape[1] == count):
        raise RuntimeError(
            f"{site}: an input of shape {tuple(x.shape)} does not have the {count} rows of the batch one after the "
            "other, so it cannot be told which adapter belongs to which part of it. This linear, or this way to call "
            "the model, does not work with adapter_names."
        )
