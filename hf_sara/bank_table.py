"""The adapters of a bank as the rows of one table, and the updates on the model that take their numbers from there."""

import contextlib
import math
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

import torch
from torch import nn

from .arguments import SaraArguments
from .carrier import banks_on, set_banks
from .contents import insert_delta, remove_delta
from .factors import Factors
from .frozen_buffers import hold_packing
from .kinds import refuse_sites, refuse_time_first
from .linears import compute_device, compute_dtype
from .methods import Delta
from .planning import AdapterSpec
from .row_names import BASE, let_take_names, let_take_no_names
from .rows import BankDelta, Batch, places
from .seeds import Seed
from .sites import PlannedSite


class BankTable:
    """
    The adapters of a bank on a model. Each is a row of a table, in which its trained tensors stand side by side.

    Args:
        model ([`~transformers.PreTrainedModel`]): The model.
        spec ([`AdapterSpec`]): What all adapters have in common: method, sites and ranks.
        seeds (`dict[str, Seed]`): The seeds that identify the frozen factors of each site, for a method that has some.
        factors (`dict[str, Factors]`): The frozen factors by site, for a method that has some.
        capacity (`int`): For how many adapters to take memory.

    Raises:
        `ValueError`: If the input of a site does not have the rows of a batch in their order, or the method does not
            support banks. The model is then left as it was.
    """

    def __init__(
        self, model: nn.Module, spec: AdapterSpec, seeds: dict[str, Seed], factors: dict[str, Factors], capacity: int
    ):
        refuse_sites(model, spec.sites)
        hold_packing(model)
        refuse_time_first(model, spec.sites)
        self.model = model
        self.spec = spec
        self.seeds = seeds
        self.batch = Batch()
        self._make_locks()
        # The first row of the table is that of the base.
        self._slots: dict[str, int] = {BASE: 0}
        # Of each adapter its own arguments and threshold, and the sites whose tensors are those of their start.
        self._own: dict[str, tuple[SaraArguments, float]] = {}
        self._untrained: dict[str, frozenset[str]] = {}
        self._key = f"bank{1 + max((int(bank._key[4:]) for bank in banks_on(model)), default=-1)}"
        try:
            width = self._insert(factors)
        except BaseException:
            self._remove()
            raise
        dtype = torch.promote_types(compute_dtype(spec.sites[0].linear(model), model), torch.float32)
        self._table = torch.zeros(1 + capacity, width, dtype=dtype)
        set_banks(model, [*banks_on(model), self])
        let_take_names(model)

    def _make_locks(self) -> None:
        # One is held while the table changes, and the other one while a batch runs.
        self._changing, self._running = threading.Lock(), threading.RLock()

    def _insert(self, factors: dict[str, Factors]) -> int:
        """Put the updates on the linears. Returns the length of a row of the table."""
        self._starts: dict[str, int] = {}
        start = 0
        for site in self.spec.sites:
            module = site.linear(self.model)
            delta = self.spec.method.make_delta(site, self.model, factors.pop(site.name, None))
            if type(delta).update_of_rows is Delta.update_of_rows:
                raise ValueError(f"{self.spec.method.title} does not support an AdapterBank, so load one adapter.")
            self._starts[site.name] = start
            insert_delta(module, self._key_of(site), cast(Delta, BankDelta(delta, self.batch, start)))
            start += self.spec.count(site)
        return start

    def _remove(self) -> None:
        for site in self.spec.sites:
            module: Any = site.linear(self.model)
            if self._key_of(site) in getattr(module, "sara", {}):
                remove_delta(module, self._key_of(site))

    def _key_of(self, site: PlannedSite) -> str:
        return f"{self._key}:{site.label}" if site.label else self._key

    def _update(self, site: PlannedSite) -> BankDelta:
        module: Any = site.linear(self.model)
        return module.sara[self._key_of(site)]

    def __getstate__(self) -> dict[str, Any]:
        # A lock can be neither copied nor pickled.
        return {name: value for name, value in vars(self).items() if name not in ("_changing", "_running")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._make_locks()

    # ---- the adapters ----

    @property
    def names(self) -> list[str]:
        """The names of the adapters, in the order in which they came."""
        return [name for name in self._slots if name != BASE]

    @property
    def nbytes(self) -> int:
        """The bytes that the adapters take, apart from the frozen factors that they share."""
        return self._table.nbytes

    def remove(self, name: str) -> None:
        """Remove an adapter, also while the model runs. A batch that has begun keeps it to its end."""
        with self._changing:
            self._slot(name)
            for of_name in (self._slots, self._own, self._untrained):
                del of_name[name]

    def state(self, name: str) -> dict[str, torch.Tensor]:
        """Copies of the trained tensors of an adapter on the CPU, named as in [`SaraAdapter.trained`]."""
        return self._tensors_of(self._row(name).cpu())

    def _tensors_of(self, row: torch.Tensor) -> dict[str, torch.Tensor]:
        """The tensors of which a row of the table consists."""
        return {
            f"{site.name}.{key}": row[start : start + math.prod(shape)].view(shape).clone()
            for site in self.spec.sites
            for key, (start, shape) in self._places(site).items()
        }

    def detach(self) -> None:
        """Remove the bank from the model."""
        self._remove()
        left = [bank for bank in banks_on(self.model) if bank is not self]
        set_banks(self.model, left)
        if not left:
            let_take_no_names(self.model)

    def __repr__(self) -> str:
        return f"AdapterBank({len(self.names):,} adapters, {self.nbytes:,} bytes, {self.spec})"

    def spec_of(self, name: str) -> AdapterSpec:
        """The definition of one adapter, which has arguments of its own, such as its dropout."""
        args, threshold = self._own[name]
        return replace(self.spec, args=args, threshold=threshold)

    def _places(self, site: PlannedSite) -> Any:
        return places(self.spec.method.trained_shapes(site.shape, site.k), self._starts[site.name])

    def _slot(self, name: str) -> int:
        if name not in self._slots or name == BASE:
            known = ", ".join(self.names[:5]) + (" ..." if len(self.names) > 5 else "")
            raise ValueError(f"The bank has no adapter {name!r}. It has: {known or 'none'}.")
        return self._slots[name]

    def _numbers(self) -> torch.Tensor:
        """The table with the newest numbers."""
        return self._table

    def _row(self, name: str) -> torch.Tensor:
        """The newest numbers of one adapter."""
        return self._table[self._slot(name)]

    def _row_of(self, tensors: Mapping[str, torch.Tensor], untrained: Sequence[PlannedSite]) -> torch.Tensor:
        row = torch.zeros(self._table.shape[1], dtype=self._table.dtype)
        for site in self.spec.sites:
            for key, (start, shape) in self._places(site).items():
                row[start : start + math.prod(shape)] = tensors[f"{site.name}.{key}"].flatten()
        self._silence(row, untrained)
        return row

    def _silence(self, row: torch.Tensor, sites: Sequence[PlannedSite]) -> None:
        """Let the updates of sites add nothing in a row of the table, see `SaraAdapter.rest`."""
        for site in sites:
            start = self._starts[site.name]
            row[start : start + self.spec.count(site)] = 0.0

    def _put(self, name: str, own: AdapterSpec, row: torch.Tensor, untrained: frozenset[str]) -> None:
        with self._changing:
            taken = set(self._slots.values())
            slot = next((index for index in range(len(self._table)) if index not in taken), len(self._table))
            if slot == len(self._table):
                more = max(1, len(self._table) // 2)
                self._table = torch.cat([self._table, self._table.new_zeros(more, self._table.shape[1])])
            self._table[slot] = row
            self._slots[name] = slot
            self._own[name] = (own.args, own.threshold)
            self._untrained[name] = untrained

    # ---- the batch ----

    @contextlib.contextmanager
    def _with_rows(self, names: Sequence[str]) -> Iterator[None]:
        """Let each row of the next batches have its adapter, within a `with` block."""
        with self._running:
            with self._changing:
                slots = [self._slots.get(name, 0) for name in names]
                # These are copies, so that the batch does not see what changes meanwhile.
                numbers = self._numbers()
                index = torch.tensor(slots, device=numbers.device)
                table = numbers.index_select(0, index) if any(slots) else None
            if table is None:
                yield
                return
            module = self.spec.sites[0].linear(self.model)
            # In its dtype it has fewer bytes to send to a GPU.
            self.batch.begin(table.to(compute_dtype(module, self.model)).to(compute_device(module)))
            try:
                yield
            finally:
                self.batch.end()
